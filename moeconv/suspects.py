"""What a recipe finds nothing wrong with and would yet make a conversion wrong silently.

Tensors that look like experts and match no rule, a layer that lost its experts, codes that lost their scales.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain

from moeconv.checkpoint import StoredTensor
from moeconv.errors import Problem
from moeconv.names import collapse, template_of
from moeconv.ops import parts_of
from moeconv.recipe import Recipe
from moeconv.tensors import Shape
from moeconv.units import Unit

#: dtypes of matrices that are numbers.
FULL_PRECISION = ("BF16", "F16", "F32", "F64")
_ROUTER = re.compile(r"\.gate\.|router|classifier")
_EXPERT = re.compile(r"\.(?!\w*shared)\w*experts?\w*\.\d+\.")
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
    moving = {
        tensor.spec.name
        for unit in units
        for rule, hits in unit.hits
        if any(part in recipe.part_ids for part in parts_of(rule.value))
        for tensor in hits.values()
    }
    odd: dict[str, list[StoredTensor]] = {}
    for tensor in rest:
        name = tensor.spec.name
        is_expert = _EXPERT.search(name) or (".experts." in name and len(tensor.spec.shape) > 2)
        if is_expert or (
            _COMPANION.search(name) and any(stem in moving or f"{stem}.weight" in moving for stem in _stems(name))
        ):
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
    """Blocks that have a router as blocks with experts have it, and no experts."""
    held = {unit.block: unit for unit in units if set(unit.component.parts) & set(recipe.part_ids)}
    if units and not held:
        parts = ", ".join(units[0].parts)
        return [
            Problem(
                f"{units[0].block} holds what recipe {recipe.name} calls {parts}, and no block holds experts",
                "Download the shards that should hold them, or give the --recipe that describes them.",
            )
        ]
    templates = {template_of(block) for block in held}
    routers: dict[str, dict[str, Shape]] = {}
    alone = [hits.values() for unit in units for rule, hits in unit.hits if rule.pattern.ids is None]
    for tensor in chain(rest, *alone):
        name, shape = tensor.spec.name, tensor.spec.shape
        if len(shape) == 2 and _ROUTER.search(name):
            for at in (at for at, character in enumerate(name) if character == "."):
                if name[:at] in held or template_of(name[:at]) in templates:
                    routers.setdefault(name[:at], {})[name[at + 1 :]] = shape
    usual = {
        (name, shape)
        for block, unit in held.items()
        for name, shape in routers.get(block, {}).items()
        if shape[0] == _count(unit)
    }
    return [
        Problem(
            f"{block} has a router ({min(found)}) and no experts",
            "Download the shards that should hold them again; if the layer has none by design, remove its router.",
        )
        for block, names in routers.items()
        if block not in held and (found := [name for name, shape in names.items() if (name, shape) in usual])
    ]


def _count(unit: Unit) -> int:
    """Experts of a unit."""
    rule, hits = unit.hits[0]
    return len(hits) if rule.pattern.ids is not None else next(iter(hits.values())).spec.shape[0]


def bare_codes(units: Sequence[Unit], rest: Sequence[StoredTensor], recipe: Recipe) -> list[Problem]:
    """Experts of a quantized model that hold codes and have no scales: without them the codes are no numbers."""
    codes = [tensor for unit in units if not unit.component.form for tensor in _codes(unit, recipe)]
    if not codes:
        return []
    names = [tensor.spec.name for tensor in rest] + [t.spec.name for u in units for t in u.tensors()]
    scaled = {name[: name.index("scale")].rstrip("._") for name in names if "scale" in name}
    scaled |= {stem.removesuffix("_weight") for stem in scaled}
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


def _stems(name: str) -> Iterator[str]:
    """What `name` may be named after: it up to a dot or an underscore."""
    return (name[:at] for at in range(1, len(name)) if name[at] in "._")
