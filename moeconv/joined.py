"""Encoded experts that are written into the tensors which hold all of a layer, as one family has them."""

from __future__ import annotations

from collections.abc import Sequence

from moeconv.checkpoint import Checkpoint, Inside, StoredTensor
from moeconv.errors import Problem
from moeconv.layouts import find_units
from moeconv.moves import Fill, Move, Route, change
from moeconv.recipe import Recipe
from moeconv.recipe_file import load_recipe
from moeconv.values import Value


def joined_values(
    values: Sequence[Value], source: Checkpoint, recipe: Recipe, problems: list[Problem]
) -> list[Value]:  # fmt: skip
    """The values of a quantization, with experts in joint tensors where their format is written so.

    They are planned one by one, as the recipe of that format has them in its layout `experts`; its layout `packed` says
    where each part lies.

    Args:
        values: every target, experts one by one.
        source: the checkpoint, in full precision.
        recipe: how its experts are stored.
        problems: receives what stands in the way.
    """
    made = next((value.format for value in values if value.format and value.format.layout_recipe), None)
    if made is None or problems:
        return list(values)
    own = load_recipe(made.layout_recipe)
    if own.decoded != recipe.name:
        problems.append(
            Problem(
                f"{made.name} is how experts of recipe {own.decoded} are stored, and these are of {recipe.name}",
                "Take mxfp4a16.",
            )
        )
        return list(values)
    experts = [value.format for value in values if value.fate.is_expert]
    if any(other is None or not other.layout_recipe for other in experts):
        problems.append(
            Problem(
                f"some experts would be {made.name} and some not; engines read all of a model as {made.name}",
                "Quantize all experts, or take mxfp4a16.",
            )
        )
        return list(values)
    outputs = {spec.name: (spec, value) for value in values for spec in value.specs}
    tensors = {name: StoredTensor(spec, 0, 0) for name, (spec, _) in outputs.items()}
    inside: dict[str, Inside] = {}
    copied: list[Value] = []
    replaced: set[str] = set()
    for unit in find_units(source._replace(tensors=tensors), own).units:
        moved = change(unit, own.layout("packed"), own, problems)
        for fill in moved.fills if moved else ():
            origins = [outputs[move.source.spec.name][1] for move in fill.moves]
            if all(value.is_plain for value in origins):
                nbytes, is_piece = fill.target._replace(shape=fill.block).nbytes, fill.block != fill.target.shape
                fate = origins[0].fate._replace(nbytes=nbytes, is_piece=is_piece)
                copied.append(Value(_through(fill, origins), fate, (fill.target,)))
                replaced |= {move.source.spec.name for move in fill.moves}
            else:
                inside |= {m.source.spec.name: Inside(fill.target, fill.at, m.route.target) for m in fill.moves}
    result = []
    for value in values:
        names = [spec.name for spec in value.specs]
        if names[0] in inside:
            result.append(value._replace(inside=tuple([inside[name] for name in names])))
        elif names[0] not in replaced:
            result.append(value)
    return result + copied


def _through(fill: Fill, origins: Sequence[Value]) -> Fill:
    """A fill whose moves read what each origin, a whole tensor made by one move, is read from."""
    firsts = [origin.fill.moves[0] for origin in origins]
    moves = [
        Move(first.source, first.source_at, Route.between(first.route.source, move.route.target))
        for first, move in zip(firsts, fill.moves, strict=True)
    ]
    return fill._replace(moves=tuple(moves))
