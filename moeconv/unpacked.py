"""A checkpoint whose quantized experts share tensors, seen one by one.

Codes and scales can be taken apart without being read: each expert's are rows of the tensor that holds them all. What
comes after this view decodes them as it decodes those of any checkpoint.
"""

from __future__ import annotations

from moeconv.checkpoint import Checkpoint, Inside, StoredTensor
from moeconv.errors import Problem
from moeconv.layouts import find_units
from moeconv.moves import change
from moeconv.recipe import Recipe
from moeconv.suspects import FULL_PRECISION


def unpacked_view(source: Checkpoint, recipe: Recipe, problems: list[Problem], layout: str | None = None) -> Checkpoint:
    """The checkpoint with every stack of quantized experts as the tensors of the recipe's layout `experts`.

    Args:
        source: as opened.
        recipe: how its experts are stored.
        problems: receives stacks that cannot be taken apart.
        layout: of the source, where headers do not tell.
    """
    stacked = (tensor.spec for tensor in source.tensors.values() if len(tensor.spec.shape) > 2)
    if "experts" not in recipe.layouts or all(spec.dtype in FULL_PRECISION for spec in stacked):
        return source
    goal = recipe.layout("experts")
    tensors = dict(source.tensors)
    found = find_units(source, recipe, layout)
    problems += found.problems
    moving = [unit for unit in found.units if unit.layout != goal]
    if all(tensor.spec.dtype in FULL_PRECISION for unit in moving for tensor in unit.tensors()):
        return source
    for unit in moving:  # all of them, routers too, so that the model is in one layout
        if (made := change(unit, goal, recipe, problems)) is None:
            continue
        joined = next((fill.target.name for fill in made.fills if len(fill.moves) != 1), None)
        if joined is not None:
            problems.append(
                Problem(
                    f"{joined} would be joined from several matrices in the layout {goal} of recipe {recipe.name}, "
                    "and quantized ones are decoded one by one",
                    "Give each matrix a line of its own in that layout.",
                )
            )
            continue
        for tensor in unit.tensors():
            del tensors[tensor.spec.name]
        for fill in made.fills:
            (move,) = fill.moves
            inside = Inside(move.source.spec, move.source_at, move.route.source)
            tensors[fill.target.name] = StoredTensor(fill.target, move.source.file, move.source.offset, inside=inside)
    return source._replace(tensors=tensors)
