"""A plan as people and programs read it: groups of tensors and what becomes of them, sizes, engines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from moeconv.checkpoint import StoredTensor
from moeconv.engines import model_type_of
from moeconv.errors import shown
from moeconv.files import Files
from moeconv.moves import Change
from moeconv.names import collapse
from moeconv.ops import Part
from moeconv.origin import fingerprint_of, origin_of
from moeconv.plan import Plan
from moeconv.tensors import Spec, total_nbytes
from moeconv.units import Unit, unit_names
from moeconv.values import Value, alike, nbytes_of, part_name

SCHEMA_VERSION = 1


class Group(NamedTuple):
    """Tensors of a plan that share a fate.

    Attributes:
        what: `merged`, `split`, `rearranged`, `renamed`, `kept` (in the wanted layout already) or `copied`; where
            values change, the name of a format, `decoded`, `moved` or `copied`.
        why: one sentence.
        sources: names, collapsed.
        targets: names, collapsed.
        tensors_in: number of source tensors.
        tensors_out: number of target tensors.
        nbytes_in: bytes read.
        nbytes_out: bytes written.
        example: one target with dtype and shape.
    """

    what: str
    why: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    tensors_in: int
    tensors_out: int
    nbytes_in: int
    nbytes_out: int
    example: str


def groups_of(plan: Plan) -> list[Group]:
    """What becomes of every tensor of the source."""
    if plan.scheme is not None:
        return _valued(plan)
    groups = [_changed(plan, changes) for changes in _alike(plan.changes)]
    kept: dict[tuple[str, int], list[Unit]] = {}
    for unit in plan.kept:
        kept.setdefault((unit.layout, id(unit.component)), []).append(unit)
    for (layout, _), units in kept.items():
        specs = [tensor.spec for unit in units for tensor in unit.tensors()]
        why = f"already in the layout {layout}; copied byte for byte"
        groups.append(_copied("kept", why, specs, unit_names(units)))
    if plan.copied:
        specs = [tensor.spec for tensor in plan.copied]
        why = "no rule of the recipe names them; copied byte for byte"
        groups.append(_copied("copied", why, specs, collapse([spec.name for spec in specs])))
    return groups


def _valued(plan: Plan) -> list[Group]:
    """Groups of a quantization: what has the same fate for the same reason."""
    together: dict[tuple[str, str], list[list[Value]]] = {}
    for kind in alike(plan.values):
        together.setdefault((_what(kind[0]), kind[0].fate.why), []).append(kind)
    groups = []
    for (what, why), kinds in together.items():
        values = [value for kind in kinds for value in kind]
        sources = {move.source.spec.name: move.source for value in values for move in value.fill.moves}
        stored = _stored(sources.values())
        made = [spec for value in values for spec in value.targets]
        is_joint = any(value.inside for value in values)
        if is_joint or any(kind[0].fate.is_piece for kind in kinds):
            made = list({spec.name: spec for spec in made}.values())
        names_in = _names(_source_names(sources.values()))
        names_out = tuple(collapse([spec.name for spec in made])) if is_joint else _names(_target_names(kinds))
        nbytes_in, nbytes_out = total_nbytes(stored), total_nbytes(made)
        counts = len(stored), len(made), nbytes_in, nbytes_out
        groups.append(Group(what, why, names_in, names_out, *counts, str(made[0])))
    order = {"copied": 2, "decoded": 1}
    return sorted(groups, key=lambda group: (order.get(group.what, 0), -group.nbytes_out))


def _what(value: Value) -> str:
    """One word for what becomes of it, and of all that share its fate."""
    if value.format:
        return value.format.name
    if value.fate.decoder:
        return "decoded"
    return "copied" if all(move.source.spec == value.fill.target for move in value.fill.moves) else "moved"


def _stored(sources: Iterable[StoredTensor]) -> list[Spec]:
    """All tensors that matrices are stored as; those that hold several matrices once."""
    wholes: dict[str, Spec] = {}
    own = []
    for tensor in sources:
        for part in tensor.encoded.parts.values() if tensor.encoded else (tensor,):
            if part.inside is None:
                own.append(part.spec)
            else:
                wholes[part.inside.whole.name] = part.inside.whole
    return own + list(wholes.values())


#: Names of matrices, by the words that stand for `weight` in the names of their tensors.
_Named = dict[tuple[str, ...], dict[str, None]]
_PLAIN = ("",)


def _source_names(sources: Iterable[StoredTensor]) -> _Named:
    """What is read. Tensors that hold several matrices have names of their own."""
    named: _Named = {}
    for tensor in sources:
        parts = tensor.encoded.parts if tensor.encoded else {"": tensor}
        wholes = [part.inside.whole.name for part in parts.values() if part.inside is not None]
        if wholes:
            named.setdefault(_PLAIN, {}).update(dict.fromkeys(wholes))
        else:
            named.setdefault(tuple(parts), {})[tensor.spec.name] = None
    return named


def _target_names(kinds: Iterable[Sequence[Value]]) -> _Named:
    """What is written."""
    named: _Named = {}
    for kind in kinds:
        value = kind[0]
        parts = value.source.parts if value.source and value.fate.keeps == "bytes" else {}
        words = tuple(parts) or tuple([part.suffix for part in value.fate.parts if part]) or _PLAIN
        named.setdefault(words, {}).update(dict.fromkeys([value.fill.target.name for value in kind]))
    return named


def _names(named: _Named) -> tuple[str, ...]:
    """Names of tensors, collapsed once for all tensors of a matrix."""
    found: dict[str, None] = {}
    for words, names in named.items():
        lines = _collapsed(tuple(names))
        found |= dict.fromkeys(
            lines if words == _PLAIN else [part_name(line, word) for line in lines for word in words]
        )
    return tuple(found)


@lru_cache(maxsize=4)  # what is read often has the names of what is written
def _collapsed(names: tuple[str, ...]) -> list[str]:
    return collapse(names)


def _alike(changes: Iterable[Change]) -> list[list[Change]]:
    """Changes of one component from one layout, with the same sizes."""
    alike: dict[tuple[int, str, tuple[tuple[str, int], ...]], list[Change]] = {}
    for made in changes:
        key = (id(made.unit.component), made.unit.layout, tuple(sorted(made.unit.sizes.items())))
        alike.setdefault(key, []).append(made)
    return list(alike.values())


def _changed(plan: Plan, changes: Sequence[Change]) -> Group:
    sources = [tensor.spec for made in changes for tensor in made.unit.tensors()]
    targets = [spec for made in changes for spec in made.targets]
    first = changes[0]
    layout = plan.recipe.layout(plan.layout)
    what = "merged" if len(targets) < len(sources) else "split" if len(targets) > len(sources) else "rearranged"
    rules = first.unit.component.rules[layout]
    if what == "rearranged" and all(
        isinstance(rule.value, Part) for rule in (*rules, *(r for r, _ in first.unit.hits))
    ):
        what = "renamed"
    parts = ", ".join(first.unit.parts)
    if first.unit.component.form:
        parts += f"; quantized, in the form {first.unit.component.form}"
    return Group(
        what, f"{first.unit.layout} -> {layout} by recipe {plan.recipe.name}: {parts}",
        tuple(unit_names([made.unit for made in changes])), tuple(collapse([spec.name for spec in targets])),
        len(sources), len(targets), total_nbytes(sources), total_nbytes(targets),
        str(targets[0]) if targets else "",
    )  # fmt: skip


def _copied(what: str, why: str, specs: Sequence[Spec], names: Sequence[str]) -> Group:
    size = total_nbytes(specs)
    return Group(what, why, tuple(names), tuple(names), len(specs), len(specs), size, size, str(specs[0]))


class Disk(NamedTuple):
    """Bytes that a run needs on the destination's disk, and bytes that are free there."""

    needed: int
    free: int


def disk_of(plan: Plan, destination: Path, files: Files | None = None) -> Disk:
    """Disk space needed and free for a plan."""
    return Disk(plan.output_nbytes, (files or Files()).free_bytes(destination))


def plan_json(plan: Plan, disk: Disk, files: Files | None = None) -> dict[str, Any]:
    """The plan as JSON; keys are only ever added while `schema_version` stays."""
    memory = plan.memory
    return {
        "schema_version": SCHEMA_VERSION,
        "source": str(plan.source.root),
        "model_type": plan.source.config.get("model_type"),
        "recipe": plan.recipe.name,
        "layout": plan.layout,
        "fingerprint": fingerprint_of(origin_of(plan, files)),
        "groups": [
            {
                "what": group.what, "why": group.why, "from": list(group.sources), "to": list(group.targets),
                "tensors_in": group.tensors_in, "tensors_out": group.tensors_out,
                "bytes_in": group.nbytes_in, "bytes_out": group.nbytes_out, "example": group.example,
            }
            for group in groups_of(plan)
        ],
        "bytes_in": _bytes_in(plan),
        "unquantized_share": unquantized_share(plan),
        "bytes_out": sum(file.data_nbytes for file in plan.files),
        "files": [{"path": file.path, "bytes": file.nbytes, "tensors": len(file.specs)} for file in plan.files],
        "sidecars": [{"path": file.path, "bytes": file.nbytes} for file in plan.source.sidecars],
        "left_out": [{"path": f.path, "bytes": f.nbytes, "why": f.why} for f in plan.source.left_out],
        "tasks": len(plan.tasks),
        "peak_memory_bytes": memory.peak,
        "memory": {
            "baseline_bytes": memory.baseline, "names_bytes": memory.names,
            "jobs": memory.jobs, "buffer_bytes": memory.buffer, "scratch_bytes": memory.scratch,
            "device_bytes": memory.device_bytes,
        },
        "devices": list(plan.options.devices),
        "disk": {"needed_bytes": disk.needed, "free_bytes": disk.free},
        "engines": [{"engine": r.engine, "reads": r.reads, "why": r.why} for r in plan.readings],
        "warnings": list(plan.warnings) + disk_warnings(disk),
    }  # fmt: skip


def _bytes_in(plan: Plan) -> int:
    """Bytes of all tensors of the source as they are stored."""
    return total_nbytes(stored_specs(plan.source.tensors.values()))


def stored_specs(tensors: Iterable[StoredTensor]) -> list[Spec]:
    """Of all that is stored of tensors, or of matrices that are quantized."""
    return [
        part.spec for tensor in tensors for part in (tensor.encoded.parts.values() if tensor.encoded else (tensor,))
    ]


def unquantized_share(plan: Plan) -> float | None:
    """Share of the model's full-precision bytes that a quantization leaves as they are; None for other plans."""
    if not any(value.format for value in plan.values):
        return None
    kinds = alike(plan.values)
    whole, plain = nbytes_of(kinds), nbytes_of([kind for kind in kinds if kind[0].format is None])
    return round(plain / whole, 6) if whole else None


def disk_warnings(disk: Disk) -> list[str]:
    """What to say about the disk."""
    if disk.free >= disk.needed:
        return []
    return [f"the destination's disk has {size(disk.free)} free and {size(disk.needed)} are needed: a run would refuse"]


def plan_text(plan: Plan, disk: Disk) -> str:
    """The plan for a terminal."""
    source = plan.source
    lines = [
        f"{source.root}  ({model_type_of(source.config) or 'no model_type'}, recipe {plan.recipe.name})"
        f"  ->  {plan.layout}",
        "",
    ]
    for group in groups_of(plan):
        lines.append(
            f"  {group.what:<10} {group.tensors_in:>7,} -> {group.tensors_out:>7,} tensors  "
            f"{size(group.nbytes_out):>9}   {group.why}"
        )
        if group.what not in ("copied", "kept"):
            lines += _some(group.sources, "             from ")
            lines += _some(group.targets, "             to   ")
            lines.append(f"             e.g. {group.example}")
    written = sum(file.data_nbytes for file in plan.files)
    lines += [
        "",
        f"  weights    {size(_bytes_in(plan))} in {count(source.files, 'file')} -> "
        f"{size(written)} in {count(plan.files, 'file')}",
        *(
            [f"  kept       {100 * share:.3g} % of the weights stay as they are"]
            if (share := unquantized_share(plan)) is not None
            else []
        ),
        f"  other      {count(source.sidecars, 'file')} carried over",
        f"  memory     {size(plan.memory.peak)} at most, {plan.memory.jobs} job{'s' * (plan.memory.jobs > 1)}"
        + (
            f", {size(plan.memory.device_bytes)} on {', '.join(plan.options.devices)}"
            if plan.memory.device_bytes
            else ""
        ),
        f"  disk       {size(disk.needed)} needed, {size(disk.free)} free",
    ]
    lines += [
        f"  {'engines' if not i else '':<10} {r.engine}: {r.reads} ({r.why})" for i, r in enumerate(plan.readings)
    ]
    lines += [f"  warning    {warning}" for warning in (*plan.warnings, *disk_warnings(disk))]
    return "\n".join(map(shown, lines))


def _some(names: Sequence[str], head: str, most: int = 6) -> list[str]:
    lines = [f"{head}{name}" for name in names[:most]]
    if len(names) > most:
        lines.append(f"{head}... and {len(names) - most} more patterns (all in --json)")
    return lines


def count(things: Sequence[object], word: str) -> str:
    """`1 file`, `1,234 files`."""
    return f"{len(things):,} {word}{'s' * (len(things) != 1)}"


def size(nbytes: int) -> str:
    """Bytes for people: 1.23 GB (powers of 1000, as disks are sold)."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError
