"""What a recipe finds nothing wrong with and would yet make a conversion wrong silently.

Tensors that look like experts and match no rule, a layer that lost its experts, codes that lost their scales.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from moeconv.checkpoint import StoredTensor
from moeconv.errors import Problem
from moeconv.names import collapse, template_of
from moeconv.ops import parts_of
from moeconv.recipe import Recipe
from moeconv.units import Unit

#: dtypes of matrices that are numbers.
FULL_PRECISION = ("BF16", "F16", "F32", "F64")
_ROUTER = re.compile(r"\.gate\.|router")
_EXPERT = re.compile(r"\.experts\.\d+\.")
#: What quantizers and layers hang behind the name of a weight.
_COMPANION = re.compile(
    r"[._](?:\w*scales?(?:_inv|_2)?|\w*zeros?|\w*zero_points?|\w*bias|absmax|\w*quant_\w+|g_idx|\w*shape"
    r"|\w*packed|\w*blocks|\w*amax)$"
)


def unknown_experts(
    units: Sequence[Unit], rest: Sequence[StoredTensor], recipe: Recipe, method: str = ""
) -> list[Problem]:
    """Tensors that look like experts and match no rule: copying them as they are would be wrong silently.

    That is what stands below `.experts.ID.`, whatever has more than two axes below `.experts.`, and scales, biases
    and the like that are named after a tensor which moves.
    """
    stems = {
        tensor.spec.name.removesuffix(".weight")
        for unit in units
        for rule, hits in unit.hits
        if any(part in recipe.part_ids for part in parts_of(rule.value))
        for tensor in hits.values()
    }
    odd: dict[str, list[StoredTensor]] = {}
    for tensor in rest:
        name = tensor.spec.name
        is_expert = _EXPERT.search(name) or (".experts." in name and len(tensor.spec.shape) > 2)
        if is_expert or (_COMPANION.search(name) and any(name[:end] in stems for end in _ends(name))):
            odd.setdefault(template_of(name), []).append(tensor)
    return [
        Problem(
            f"{tensors[0].spec} looks like an expert's ({len(tensors):,} tensors of that kind); "
            f"recipe {recipe.name} does not say where it goes",
            f"The model is quantized ({method}): what belongs to it may be missing, or that form cannot be moved yet."
            if method
            else "Give a --recipe that covers it (`moeconv recipes list`), or write one: moeconv does not guess.",
        )
        for tensors in odd.values()
    ]


def lost_experts(units: Sequence[Unit], rest: Sequence[StoredTensor], recipe: Recipe) -> list[Problem]:
    """Blocks that have a router by the name that it has in every block with experts, and no experts."""
    blocks = {unit.block for unit in units if set(unit.component.parts) & set(recipe.part_ids)}
    templates = {template_of(block) for block in blocks}
    routers: dict[str, set[str]] = {}
    for name in [t.spec.name for t in rest] + [
        t.spec.name for u in units if u.block not in blocks for t in u.tensors()
    ]:
        if _ROUTER.search(name):
            for at in (at for at, character in enumerate(name) if character == "."):
                if name[:at] in blocks or template_of(name[:at]) in templates:
                    routers.setdefault(name[:at], set()).add(name[at + 1 :])
    usual = set.intersection(*(routers.get(block, set()) for block in blocks)) if blocks else set()
    return [
        Problem(
            f"{block} has a router ({min(found & usual)}) and no experts",
            "Download the shards that should hold them again; if the layer has none by design, remove its router.",
        )
        for block, found in routers.items()
        if block not in blocks and found & usual
    ]


def bare_codes(units: Sequence[Unit], rest: Sequence[StoredTensor], recipe: Recipe) -> list[Problem]:
    """Experts of a quantized model that hold codes and have no scales: without them the codes are no numbers."""
    codes = [tensor for unit in units if not unit.component.form for tensor in _codes(unit, recipe)]
    if not codes:
        return []
    names = [tensor.spec.name for tensor in rest] + [t.spec.name for u in units for t in u.tensors()]
    scaled = {name[: name.index("scale")].rstrip("._") for name in names if "scale" in name}
    bare: dict[str, list[StoredTensor]] = {}
    for tensor in codes:
        stem = tensor.spec.name.removesuffix("_blocks")
        if "scale" not in tensor.spec.name and not {stem, stem.removesuffix(".weight")} & scaled:
            bare.setdefault(template_of(tensor.spec.name), []).append(tensor)
    return [
        Problem(
            f"{line} ({tensors[0].spec.dtype}): codes of quantized matrices, as config.json says, "
            "and there are no scales beside them",
            "Restore the shards that should hold the scales.",
        )
        for tensors in bare.values()
        for line in collapse([tensor.spec.name for tensor in tensors])
    ]


def _codes(unit: Unit, recipe: Recipe) -> Iterator[StoredTensor]:
    """Tensors of experts that are no floats of full precision."""
    for rule, hits in unit.hits:
        if parts_of(rule.value)[0] in recipe.part_ids:
            yield from (tensor for tensor in hits.values() if tensor.spec.dtype not in FULL_PRECISION)


def _ends(name: str) -> Iterator[int]:
    """Where a stem of `name` may end: before a dot or an underscore."""
    return (at for at in range(1, len(name)) if name[at] in "._")
