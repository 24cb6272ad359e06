"""Everything that will happen, decided before anything does.

`plan` sees names, shapes and dtypes, never data. It either returns a complete `Plan` (every byte of the
output has its place, and every task that writes it an id) or raises `PlanError` with all that is wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from moeconv import __version__
from moeconv.checkpoint import INDEX, SINGLE, Checkpoint, Encoded, StoredTensor
from moeconv.encoded import format_of_module, quantization_config
from moeconv.engines import Reading, format_readings, readings
from moeconv.errors import PlanError, Problem, UsageError
from moeconv.formats import Format, StoredPart
from moeconv.header import build_header, entry_nbytes, head_nbytes, in_file_order
from moeconv.layouts import find_units
from moeconv.moves import Change, Fill, change, copy_of
from moeconv.names import natural_key
from moeconv.recipe import Recipe
from moeconv.scheme import Scheme
from moeconv.steps import Rearrange, Step, Task, needs_whole_bytes, steps_of, tasks_of
from moeconv.tensors import Spec
from moeconv.units import Unit, layout_lines

DEFAULT_SHARD_BYTES = 5_000_000_000
#: Bytes that one worker holds while it copies.
COPY_BUFFER_BYTES = 512 << 10
#: Bytes that one worker holds at least and at most while it rearranges, and all workers together by default.
#: Smaller tiles mean more and shorter reads, larger ones fall out of the caches (measured: 16 MiB is the fastest).
MIN_TILE_BYTES = 1 << 20
MAX_TILE_BYTES = 16 << 20
ALL_TILES_BYTES = 64 << 20
#: Peak RSS of a run without its buffers: interpreter, libraries, code (measured, `tests/bench/memory.py`).
BASELINE_BYTES = 64 << 20
#: Where ModelOpt says how a checkpoint is quantized, beside config.json or instead of it.
QUANTIZATION = "hf_quant_config.json"
#: Growth of RSS for each tensor name of source and target together (measured, `tests/bench/memory.py`).
NAME_BYTES = 3000


#: What torch adds to the peak once it is imported (measured).
TORCH_BYTES = 280 << 20


class Options(NamedTuple):
    """What a user may choose about a conversion, apart from where to.

    Attributes:
        max_shard_nbytes: a weight file gets no more than this, unless one tensor alone is larger.
        jobs: threads; None for one a core, at most 8.
        max_memory: bytes of host memory that the run may use; None for the defaults.
        devices: where matrices are encoded; workers take them in turn.
        max_vram: bytes that the run may use on each GPU, beside what a CUDA context takes; None for the defaults.
        layout: layout of the source, where headers do not tell.
        include: weight files beside the index that belong to the model.
        stay: blocks that keep the layout they have.
    """

    max_shard_nbytes: int = DEFAULT_SHARD_BYTES
    jobs: int | None = None
    max_memory: int | None = None
    devices: tuple[str, ...] = ("cpu",)
    max_vram: int | None = None
    layout: str | None = None
    include: tuple[str, ...] = ()
    stay: tuple[str, ...] = ()


class Value(NamedTuple):
    """One target of a quantization: a fill, what it is written as, and why.

    Attributes:
        fill: the matrix or other tensor in full precision, or as stored where it is copied.
        format: what it is encoded in; None for as it is, or decoded.
        parts: the tensors it becomes, with what each is to the format; None for a plain tensor.
        why: one phrase.
    """

    fill: Fill
    format: Format | None
    parts: tuple[tuple[Spec, StoredPart | None], ...]
    why: str

    @property
    def source(self) -> Encoded | None:
        """How the source stores it, where that is quantized."""
        return self.fill.moves[0].source.encoded if self.fill.moves else None

    @property
    def is_plain(self) -> bool:
        """Its bytes are moved and not changed."""
        return self.format is None and self.source is None


class TargetFile(NamedTuple):
    """A weight file to write: `head` (length and header), then `nbytes` in all; tensors in the order of the file."""

    path: str
    head: bytes
    nbytes: int
    specs: tuple[Spec, ...]


class Memory(NamedTuple):
    """Peak host memory of the run, in bytes, and what it is made of.

    Attributes:
        baseline: interpreter and libraries.
        names: of all tensors.
        jobs: threads.
        buffer: of each thread.
        scratch: other memory of each thread, staging included.
        staging: one staging buffer of a thread's lane (`device`).
        tile_elements: of a matrix that is encoded or decoded.
        device_bytes: peak on each GPU.
    """

    baseline: int
    names: int
    jobs: int
    buffer: int
    scratch: int = 0
    staging: int = 0
    tile_elements: int = 0
    device_bytes: int = 0

    @property
    def peak(self) -> int:
        return self.baseline + self.names + self.jobs * (self.buffer + self.scratch)


@dataclass(frozen=True, slots=True)
class Plan:
    """A conversion, complete.

    Attributes:
        source: what is read.
        recipe: what was looked for.
        layout: the layout asked for (`hub`, `packed` or `experts`).
        changes: units that change.
        kept: units that are in that layout already; copied.
        copied: tensors that no rule matches; copied.
        files: weight files to write.
        index: content of the index file; empty for a single weight file.
        tasks: the work, in the order of the targets.
        memory: see `Memory`.
        readings: which engines read the result.
        warnings: what the user should know, none of which stops the run.
        fingerprint: sha256 of everything that decides the output's bytes.
        scheme: what is quantized to what; None for a change of layout.
        values: every target of a quantization.
        config: content of config.json where it is not the source's.
    """

    source: Checkpoint
    recipe: Recipe
    layout: str
    options: Options
    changes: tuple[Change, ...]
    kept: tuple[Unit, ...]
    copied: tuple[StoredTensor, ...]
    files: tuple[TargetFile, ...]
    index: bytes
    tasks: tuple[Task, ...]
    memory: Memory
    readings: tuple[Reading, ...]
    warnings: tuple[str, ...]
    fingerprint: str
    scheme: Scheme | None = None
    values: tuple[Value, ...] = ()
    config: bytes | None = None

    @property
    def output_nbytes(self) -> int:
        """Bytes of the finished folder, without its manifest."""
        sidecars = sum(f.nbytes for f in self.source.sidecars) + len(self.config or b"")
        return sum(file.nbytes for file in self.files) + len(self.index) + sidecars


def plan(source: Checkpoint, recipe: Recipe, layout: str, options: Options | None = None) -> Plan:
    """Plan the conversion of a checkpoint to a layout.

    Args:
        source: the checkpoint.
        recipe: how its experts are stored.
        layout: `hub`, `packed` or `experts`.
        options: see `Options`.

    Raises:
        PlanError: with everything that stands in the way.
        UsageError: a layout that the recipe cannot say.
    """
    options = options or Options()
    for name in (layout, *((options.layout,) if options.layout else ())):
        if name not in recipe.layouts:
            raise UsageError(f"recipe {recipe.name} has no layout {name!r}", f"It has: {', '.join(recipe.layouts)}.")
    found = find_units(source, recipe, options.layout)
    problems = list(found.faults)
    goal = recipe.layout(layout)
    stays = [unit.block in options.stay or _is_already(unit, goal) for unit in found.units]
    kept = tuple(unit for unit, is_kept in zip(found.units, stays, strict=True) if is_kept)
    changes = [
        made
        for unit, is_kept in zip(found.units, stays, strict=True)
        if not is_kept and (made := change(unit, goal, recipe, problems))
    ]
    problems += found.unknown if changes or not found.units else ()
    if not found.units and not problems:
        problems.append(
            Problem(
                f"{source.root} holds no experts that recipe {recipe.name} describes",
                "Look at the names with `moeconv inspect`, and give the --recipe that matches.",
            )
        )
    fills = [fill for made in changes for fill in made.fills]
    copied = [tensor for unit in kept for tensor in unit.tensors()] + list(found.rest)
    fills += [copy_of(tensor) for tensor in copied]
    problems += _target_problems(changes, copied, fills)
    if problems:
        raise PlanError.of(problems)
    specs = [spec for made in changes for spec in made.targets] + [tensor.spec for tensor in copied]
    files, places, index = place_specs([(spec,) for spec in specs], source, options)
    steps: list[Step] = [step for fill in fills for step in steps_of(fill, places[fill.target.name])]
    tasks = tasks_of(steps, [file.path for file in files])
    memory = _memory(source, files, tasks, options)
    held = [(unit, [tensor.spec for tensor in unit.tensors()]) for unit in kept]
    held += [(made.unit, list(made.targets)) for made in changes]
    readers = _readers(source, recipe, layout, held)
    warnings = [*source_warnings(source, changes), *reader_warnings(readers)]
    forms = sorted({form for unit, _ in held if (form := unit.component.form)})
    if forms and goal == "packed" and all(reading.reads == "unknown" for reading in readers):
        warnings.append(f"no engine is known to read packed experts in the form {', '.join(forms)}")
    return Plan(
        source, recipe, layout, options, tuple(changes), kept, found.rest, files, index, tasks, memory, readers,
        tuple(warnings), fingerprint_of(source, recipe, layout, options),
    )  # fmt: skip


def _readers(
    source: Checkpoint, recipe: Recipe, layout: str, held: Sequence[tuple[Unit, Sequence[Spec]]]
) -> tuple[Reading, ...]:
    """Which engines read a result that holds these units as these tensors."""
    examples = {unit.component.form: specs for unit, specs in held if unit.component.form}
    shapes = [spec.shape for _, specs in held for spec in specs]
    if examples and recipe.layout(layout) == "experts":  # engines know them by their formats
        formats = {name for specs in examples.values() if (name := format_of_module(specs, source.config))}
        readers = format_readings(source.config, formats or examples.keys())
    else:
        readers = readings(recipe, source.config, layout, shapes, examples)
    has_settings = quantization_config(source.config) or any(f.path == QUANTIZATION for f in source.sidecars)
    if not examples or has_settings:
        return readers
    why = "config.json does not say how experts are quantized, so that codes are taken for numbers"
    return tuple(reading._replace(reads="no", why=why) for reading in readers)


def _is_already(unit: Unit, layout: str) -> bool:
    """The unit is stored as `layout` says, under that layout's name or another's with the same lines."""
    return layout_lines(unit.component, unit.layout) == layout_lines(unit.component, layout)


def _target_problems(changes: Sequence[Change], copied: Sequence[StoredTensor], fills: Sequence[Fill]) -> list[Problem]:
    problems: list[Problem] = []
    names: dict[str, str] = {tensor.spec.name: "copied as it is" for tensor in copied}
    for made in changes:
        for spec in made.targets:
            if spec.name in names:
                problems.append(
                    Problem(
                        f"two sources for the one target {spec.name}: {names[spec.name]}, "
                        f"and made from {made.unit.block}",
                        "The checkpoint already holds a tensor of that name: remove the one that is not the model's.",
                    )
                )
            names[spec.name] = f"made from {made.unit.block}"
    odd = next((fill for fill in fills if not needs_whole_bytes(fill)), None)
    if odd:
        problems.append(
            Problem(
                f"{odd.target} cannot be rearranged: its elements are smaller than a byte",
                "Keep the layout it has.",
            )
        )
    return problems


def place_specs(
    groups: Sequence[tuple[Spec, ...]], source: Checkpoint, options: Options
) -> tuple[tuple[TargetFile, ...], dict[str, tuple[int, int]], bytes]:
    """Files, the place of every target tensor (file number, byte offset), and the index.

    Args:
        groups: tensors that go into one file together; nearly always one tensor.
        source: whose `__metadata__` is carried over.
        options: see `Options`.
    """
    ordered = sorted(groups, key=lambda group: natural_key(group[0].name))
    metadata = _metadata(source)
    files, places, weight_map = _files(_shards(ordered, metadata, options.max_shard_nbytes), metadata)
    if len(files) == 1:
        return files, places, b""
    total = sum(file.nbytes - len(file.head) for file in files)
    return files, places, _index({**source.index_metadata, "total_size": total}, weight_map)


def _index(metadata: Mapping[str, Any], weight_map: Mapping[str, str]) -> bytes:
    """The index as `json.dumps(..., indent=2)` writes it, which takes ten times as long."""
    head = json.dumps({"metadata": metadata, "weight_map": {}}, indent=2, ensure_ascii=False)
    lines = json.dumps(weight_map, separators=(",\n    ", ": "), ensure_ascii=False)[1:-1]
    return f"{head[: -len('{}' + chr(10) + '}')]}{{\n    {lines}\n  }}\n}}\n".encode()


def _files(
    shards: Sequence[Sequence[Spec]], metadata: Mapping[str, str]
) -> tuple[tuple[TargetFile, ...], dict[str, tuple[int, int]], dict[str, str]]:
    """Files for shards, the place of every tensor, and the file of every tensor."""
    files: list[TargetFile] = []
    places: dict[str, tuple[int, int]] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        path = SINGLE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        ordered = in_file_order(shard)
        head, starts, nbytes = build_header(ordered, metadata)
        places.update((name, (number, start)) for name, start in starts.items())
        weight_map.update((spec.name, path) for spec in shard)
        files.append(TargetFile(path, head, nbytes, tuple(ordered)))
    return tuple(files), places, weight_map


def _shards(groups: Sequence[tuple[Spec, ...]], metadata: Mapping[str, str], limit: int) -> list[list[Spec]]:
    """Cut specs into as few files of at most `limit` bytes as their order allows, of sizes as even as that allows.

    Even files let every worker write to one of its own until the end.
    """
    sizes = [sum(spec.nbytes + entry_nbytes(spec) for spec in group) for group in groups]
    most = max(1, limit - head_nbytes(metadata, limit))
    wanted = len(_cut(sizes, most))
    low, high = min(sum(sizes) // wanted, most), most
    for _ in range(8):
        middle = (low + high) // 2
        if len(_cut(sizes, middle)) <= wanted:
            high = middle
        else:
            low = middle
    edges = [*_cut(sizes, high), len(groups)]
    return [[spec for group in groups[a:b] for spec in group] for a, b in pairwise(edges)]


def _cut(sizes: Sequence[int], most: int) -> list[int]:
    """Number of the first group of each file."""
    firsts = [0]
    size = 0
    for number, nbytes in enumerate(sizes):
        if number > firsts[-1] and size + nbytes > most:
            firsts.append(number)
            size = 0
        size += nbytes
    return firsts


def _metadata(source: Checkpoint) -> dict[str, str]:
    """`__metadata__` of all source files together; of several values for a key, the first file's."""
    merged: dict[str, str] = {}
    for file in source.files:
        for key, value in file.metadata.items():
            merged.setdefault(key, value)
    return merged


def default_jobs(asked: int | None, tasks: int | None = None) -> int:
    """Workers of a run: as asked for or one a core and at most 8, and no more than there are tasks."""
    wanted = asked or min(8, os.cpu_count() or 1)
    return wanted if tasks is None else min(wanted, max(1, tasks))


def _memory(source: Checkpoint, files: Sequence[TargetFile], tasks: Sequence[Task], options: Options) -> Memory:
    jobs = default_jobs(options.jobs, len(tasks))
    names = (len(source.tensors) + sum(len(file.specs) for file in files)) * NAME_BYTES
    rearranges = any(isinstance(step, Rearrange) for task in tasks for step in task.steps)
    smallest = MIN_TILE_BYTES if rearranges else COPY_BUFFER_BYTES
    wanted = min(MAX_TILE_BYTES, max(MIN_TILE_BYTES, ALL_TILES_BYTES // jobs)) if rearranges else COPY_BUFFER_BYTES
    if options.max_memory is None:
        return Memory(BASELINE_BYTES, names, jobs, wanted)
    room = options.max_memory - BASELINE_BYTES - names
    if room < smallest:
        least = BASELINE_BYTES + names + smallest
        raise UsageError(
            f"--max-memory {options.max_memory:,} is less than this conversion needs",
            f"The least that works is {least:,} bytes: --max-memory {-(-least // 1_000_000)}MB.",
        )
    jobs = min(jobs, room // smallest)
    return Memory(BASELINE_BYTES, names, jobs, min(wanted, room // jobs))


def source_warnings(source: Checkpoint, changes: Sequence[Change]) -> list[str]:
    """What of a source is not carried over as it is."""
    lines = [f"left out: {item.path} ({item.nbytes:,} bytes): {item.why}" for item in source.left_out]
    conflicts = sorted(
        key
        for key in {key for file in source.files for key in file.metadata}
        if len({file.metadata[key] for file in source.files if key in file.metadata}) > 1
    )
    lines += [
        f"__metadata__ key {key!r} differs between source files; the first file's value is kept" for key in conflicts
    ]
    padded = [made for made in changes if any(not fill.moves for fill in made.fills)]
    if padded:
        lines.append(f"{len(padded)} blocks have room for experts that compute nothing; it is filled with zeros")
    dropped = [made for made in changes if any(rule.pad for rule, _ in made.unit.hits)]
    if dropped:
        lines.append(f"{len(dropped)} blocks have rows of experts that compute nothing; they are not carried over")
    return lines


def reader_warnings(readers: Sequence[Reading]) -> list[str]:
    """Engines that are known not to read the result."""
    return [
        f"{reading.engine} does not read this result: {reading.why}" for reading in readers if reading.reads == "no"
    ]


def fingerprint_of(source: Checkpoint, recipe: Recipe, layout: str, options: Options) -> str:
    """sha256 of everything that decides the bytes of a change of layout."""
    content: Mapping[str, Any] = {
        "version": __version__,
        "weights": [(file.path, file.nbytes, file.mtime_ns, file.header_sha256) for file in source.files],
        "sidecars": [(file.path, file.nbytes, file.mtime_ns) for file in source.sidecars],
        "recipe": recipe.text,
        "layout": layout,
        "source_layout": options.layout,
        "max_shard_nbytes": options.max_shard_nbytes,
        "stay": options.stay,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def index_path(plan_: Plan) -> str | None:
    """Name of the index file, or None for a single weight file."""
    return INDEX if plan_.index else None
