"""Which matrix of one folder is which of another, in whatever layouts and formats the two are.

Both are seen in full precision and one matrix an expert, under the names that the recipe gives them then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import NamedTuple

from moeconv.checkpoint import Checkpoint, StoredTensor
from moeconv.encoded import decoded_view
from moeconv.errors import Problem
from moeconv.formats import FLOATS
from moeconv.layouts import find_units
from moeconv.moves import Fill, change, copy_of
from moeconv.names import collapse
from moeconv.ops import parts_of
from moeconv.recipe import Recipe
from moeconv.recipe_file import load_recipe
from moeconv.units import Unit
from moeconv.unpacked import unpacked_view


class Place(NamedTuple):
    """Which part of which expert a matrix is; `part` as the recipe calls it."""

    block: str
    part: str
    expert: int


class Held(NamedTuple):
    """What a folder holds, by name and, within a tensor, by first element."""

    fills: Mapping[tuple[str, int], Fill]
    places: Mapping[tuple[str, int], Place]


class Pair(NamedTuple):
    """The same matrix in two folders."""

    key: tuple[str, int]
    source: Fill
    made: Fill

    @property
    def name(self) -> str:
        """Its name in the layout in which both are seen."""
        return self.key[0]


def seen(folder: Checkpoint, recipe: Recipe, problems: list[Problem], layout: str | None = None) -> Checkpoint:
    """The folder in full precision, with quantized experts one by one.

    Args:
        folder: as opened.
        recipe: how its experts are stored.
        problems: receives what cannot be read.
        layout: of the folder, where shapes do not tell.
    """
    return decoded_view(unpacked_view(folder, recipe, problems, layout), problems)


def experts_of(view: Checkpoint, recipe: Recipe) -> list[Unit]:
    """The experts of a folder that is seen in full precision."""
    own = load_recipe(recipe.decoded) if recipe.decoded else recipe
    return [unit for unit in find_units(view, own).units if set(unit.component.parts) & set(own.part_ids)]


def held(
    view: Checkpoint, recipe: Recipe, goal: str, problems: list[Problem], layout: str | None = None
) -> Held:  # fmt: skip
    """All matrices and other tensors of a folder, expert by expert.

    Args:
        view: see `seen`.
        recipe: how its experts are stored.
        goal: the layout whose names are used.
        problems: receives what is wrong with experts.
        layout: of the folder, where shapes do not tell.
    """
    own = load_recipe(recipe.decoded) if recipe.decoded else recipe
    goal = own.layout(goal)
    found = find_units(view, own, layout)
    problems += found.faults
    fills: dict[tuple[str, int], Fill] = {(t.spec.name, 0): copy_of(t) for t in found.rest}
    places: dict[tuple[str, int], Place] = {}
    for unit in found.units:
        parts_by_pattern = {rule.pattern: parts_of(rule.value) for rule in unit.component.rules.get(goal, ())}
        for fill in _fills(unit, goal, own, problems):
            key = (fill.target.name, fill.at)
            fills[key] = fill
            for pattern, parts in parts_by_pattern.items():
                match = pattern.match(fill.target.name)
                if match and parts[0] in own.part_ids:
                    expert = match[1] if pattern.ids else fill.at // max(1, prod(fill.block))
                    places[key] = Place(match[0], "+".join(parts), expert)
    return Held(fills, places)


def _fills(unit: Unit, goal: str, recipe: Recipe, problems: list[Problem]) -> list[Fill]:
    """The tensors of a unit as a layout has them; pieces of tensors have that of single experts already."""
    tensors = unit.tensors()
    if any(tensor.inside is not None for tensor in tensors):
        return [copy_of(tensor) for tensor in tensors]
    made = change(unit, goal, recipe, problems)
    return [fill for fill in made.fills if fill.moves] if made else []


def as_stored(view: Checkpoint) -> Held:
    """All tensors of a folder as they are, experts of a layer in one where they are stored so."""
    return Held({(name, 0): copy_of(tensor) for name, tensor in view.tensors.items()}, {})


def is_readable(fill: Fill) -> bool:
    """Whether a fill can be decoded by itself: of quantized matrices it has one, from where a block begins."""
    if not any(move.source.encoded for move in fill.moves):
        return True
    if len(fill.moves) != 1 or fill.moves[0].route.run is None:
        return False
    (move,) = fill.moves
    assert move.source.encoded is not None
    assert move.route.run is not None
    return (move.source_at + move.route.run[0]) % move.source.encoded.format.block == 0


def goals(recipe: Recipe) -> list[str]:
    """Layouts in which two folders can be seen alike, the one with a name for each matrix first."""
    own = load_recipe(recipe.decoded) if recipe.decoded else recipe
    return [name for name in ("experts", "packed", "hub") if name in own.layouts]


def is_number(fill: Fill) -> bool:
    """A matrix or vector of floats that a format may round, not an id or a mask."""
    dtypes = {move.source.spec.dtype for move in fill.moves}
    return dtypes <= set(FLOATS) and bool(fill.block)


def stored_names(fill: Fill) -> set[str]:
    """Names of the tensors, as they lie in files, that a fill is made from."""
    names: set[str] = set()
    for move in fill.moves:
        tensors: Iterable[StoredTensor] = move.source.encoded.parts.values() if move.source.encoded else [move.source]
        names |= {tensor.inside.whole.name if tensor.inside else tensor.spec.name for tensor in tensors}
    return names


#: What quantizers leave beside matrices, which no source has.
_LEFT_BEHIND = ("_scale", ".scale", "_amax", "_zero_point", "_observer", ".g_idx", "_scale_inv", "_quantizer")


def pairs_of(source: Held, made: Held, problems: list[Problem], *, is_tied: bool) -> list[Pair]:
    """Matrices that both folders hold; those of one alone are problems.

    Args:
        source: the one.
        made: the other.
        problems: receives what is missing, not due, or of another shape.
        is_tied: the output layer is the embedding, and need not be stored.
    """
    missing = [key[0] for key in source.fills if key not in made.fills]
    if is_tied:
        missing = [name for name in missing if not name.endswith("lm_head.weight")]
    extra = [key[0] for key in made.fills if key not in source.fills and not key[0].endswith(_LEFT_BEHIND)]
    problems += [Problem(f"{line} is missing", "Convert again.") for line in collapse(missing)]
    problems += [Problem(f"{line} does not come from the source", "Convert again.") for line in collapse(extra)]
    pairs = []
    for key, fill in source.fills.items():
        other = made.fills.get(key)
        if other is None:
            continue
        if other.block != fill.block:
            problems.append(
                Problem(f"{key[0]} is {list(other.block)} and {list(fill.block)} in the source", "Convert again.")
            )
        else:
            pairs.append(Pair(key, fill, other))
    return pairs
