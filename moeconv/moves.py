"""From a layout to a layout: which piece of which source tensor becomes which piece of which target tensor.

Nothing here knows files. A `Fill` is one block of one target tensor (one expert's, or a whole tensor) and
the moves that fill it; every element of every target is written by exactly one fill.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from math import prod
from typing import NamedTuple

from moeconv.checkpoint import StoredTensor
from moeconv.errors import Problem
from moeconv.ops import ShapeError, parts_of, place
from moeconv.recipe import Recipe, Rule, stored_shape
from moeconv.tensors import Shape, Spec, View
from moeconv.units import Hits, Unit


class Move(NamedTuple):
    """One part of one block.

    Attributes:
        source: tensor that holds it.
        source_at: element where the source block begins.
        route: from where in the source block to where in the target block.
    """

    source: StoredTensor
    source_at: int
    route: Route


class Route(NamedTuple):
    """A part as it lies in source and target blocks; the same for all experts of a unit.

    Attributes:
        source: its view in the source block.
        target: its view in the target block.
        run: first element in the source block, in the target block, and number of elements, where the part is
            one run of elements in both; else None.
    """

    source: View
    target: View
    run: tuple[int, int, int] | None

    @classmethod
    def between(cls, source: View, target: View) -> Route:
        """The route between two views of the same shape."""
        is_run = source.is_run and target.is_run
        return cls(source, target, (source.first, target.first, prod(source.shape)) if is_run else None)


class Fill(NamedTuple):
    """A block of the target tensor, `block` elements from element `at` on, and what fills it.

    Without moves the block is zeros.
    """

    target: Spec
    at: int
    block: Shape
    moves: tuple[Move, ...]


class Change(NamedTuple):
    """What becomes of one unit: its targets, and the fills that make them."""

    unit: Unit
    layout: str
    targets: tuple[Spec, ...]
    fills: tuple[Fill, ...]


class _Stack(NamedTuple):
    """How one rule stores the parts of several experts.

    Attributes:
        rule: the rule.
        first: id of expert 0 in names, where names have ids.
        size: experts in one tensor; None where a tensor holds one expert or nothing of an expert.
        pad: room for further experts.
        block: shape of one expert's block.
        views: where each part lies in the block.
        shape: shape of a whole tensor.
    """

    rule: Rule
    first: int
    size: int | None
    pad: int
    block: Shape
    views: Mapping[str, View]
    shape: Shape


def change(unit: Unit, layout: str, recipe: Recipe, problems: list[Problem]) -> Change | None:
    """Move a unit to another layout.

    Args:
        unit: as found in the source.
        layout: where to, aliases resolved.
        recipe: the recipe of the unit.
        problems: receives what makes the change impossible.

    Returns:
        The change, or None with at least one more problem.
    """
    try:
        return _change(unit, layout, recipe)
    except ShapeError as error:
        problems.append(
            Problem(
                f"{unit.block}: cannot be stored as {layout}: {error}",
                "Keep the layout it has, or convert from another release of the model.",
            )
        )
    return None


def _change(unit: Unit, layout: str, recipe: Recipe) -> Change:
    sources: dict[str, tuple[_Stack, Hits]] = {}
    for rule, hits in unit.hits:
        stack = _stack(rule, unit, recipe)
        sources.update((part, (stack, hits)) for part in parts_of(rule.value))
    targets: list[Spec] = []
    fills: list[Fill] = []
    if layout not in unit.component.rules:
        raise ShapeError(
            f"tensors of the form {unit.component.form} cannot be joined as this layout joins matrices: "
            "blocks are neither interleaved nor transposed, and numbers without an axis not stacked in pairs"
        )
    for rule in unit.component.rules[layout]:
        parts = parts_of(rule.value)
        absent = [part for part in parts if part not in unit.part_shapes]
        if len(absent) == len(parts):
            continue
        if absent:
            raise ShapeError(f"{rule.pattern} needs {', '.join(absent)}, which the source lacks")
        dtypes = {next(iter(sources[part][1].values())).spec.dtype for part in parts}
        if len(dtypes) > 1:
            raise ShapeError(f"{rule.pattern} would join {' and '.join(sorted(dtypes))} in one tensor")
        for fill in _fills(_stack(rule, unit, recipe), unit, dtypes.pop(), sources, parts):
            if not targets or fill.target is not targets[-1]:
                targets.append(fill.target)
            fills.append(fill)
    return Change(unit, layout, tuple(targets), tuple(fills))


def _stack(rule: Rule, unit: Unit, recipe: Recipe) -> _Stack:
    block, views = place(rule.value, unit.part_shapes)
    ids = rule.pattern.ids
    counted = recipe.part_ids.get(parts_of(rule.value)[0])
    count: int | None = None
    if ids is None and counted is not None and counted.ids is not None:
        start, stop = counted.ids.start.value(unit.sizes), counted.ids.stop.value(unit.sizes)
        if start is None or stop is None:
            raise ShapeError(f"the number of experts of {rule.pattern} is unknown")
        count = stop - start
    pad = rule.pad.value(unit.sizes) if rule.pad is not None else 0
    if pad is None:
        raise ShapeError(f"{rule.pattern}: config.json does not say how many experts {rule.pad} are")
    first = (ids.start.value(unit.sizes) or 0) if ids is not None else 0
    shape = stored_shape(rule, recipe, unit.part_shapes, count, pad)
    claimed = [dim.value(unit.sizes) for dim in rule.claim]
    if unit.component.form and claimed != list(shape):
        raise ShapeError(
            f"{rule.pattern.fill(unit.block, 0)} would need {list(shape)} where {claimed} is due: "
            f"blocks of {unit.component.form} would lie partly in one matrix and partly in the next"
        )
    return _Stack(rule, first, count, pad, block, views, shape)


def _fills(
    stack: _Stack, unit: Unit, dtype: str, sources: Mapping[str, tuple[_Stack, Hits]], parts: Sequence[str]
) -> Iterator[Fill]:
    """Fills of all tensors of one target rule, expert by expert."""
    size = prod(stack.block)
    experts = stack.size if stack.size is not None else len(sources[parts[0]][1])
    if stack.rule.pattern.ids is not None:
        from_stack = sources[parts[0]][0]
        experts = from_stack.size if from_stack.size is not None else experts
    elif stack.size is None:
        experts = 1
    named = stack.rule.pattern.ids is not None
    taken = [(*sources[part], Route.between(sources[part][0].views[part], stack.views[part])) for part in parts]
    target = Spec(stack.rule.pattern.fill(unit.block, stack.first), dtype, stack.shape)
    for expert in range(experts):
        if named and expert:
            target = Spec(stack.rule.pattern.fill(unit.block, stack.first + expert), dtype, stack.shape)
        moves = [
            _move(hits[source.first + expert], route)
            if source.rule.pattern.ids is not None
            else Move(hits[0], expert * prod(source.block), route)
            for source, hits, route in taken
        ]
        yield Fill(target, 0 if named else expert * size, stack.block, tuple(moves))
    if stack.pad:
        yield Fill(target, experts * size, (stack.pad, *stack.block), ())


def _move(tensor: StoredTensor, route: Route) -> Move:
    """A move from a tensor, or from a piece of one as it lies there."""
    if tensor.inside is None:
        return Move(tensor, 0, route)
    return Move(tensor, tensor.inside.at, _through(tensor.inside.view, route.source, route.target))


@cache  # the same for all experts
def _through(piece: View, source: View, target: View) -> Route:
    return Route.between(source.within(piece), target)


def copy_of(tensor: StoredTensor) -> Fill:
    """The fill that copies a tensor, or a piece of one, as it is."""
    if tensor.inside is not None:
        route = Route.between(tensor.inside.view, View.whole(tensor.spec.shape))
        return Fill(tensor.spec, 0, tensor.spec.shape, (Move(tensor, tensor.inside.at, route),))
    return Fill(tensor.spec, 0, tensor.spec.shape, (Move(tensor, 0, _whole(tensor.spec.shape)),))


def as_rows(fill: Fill) -> Fill:
    """A fill that is one run of a tensor, as a matrix with the columns that it has."""
    (move,) = fill.moves
    assert move.route.run is not None
    shape = prod(fill.block[:-1]), fill.block[-1]
    return fill._replace(block=shape, moves=(Move(move.source, move.source_at + move.route.run[0], _whole(shape)),))


def by_move(fill: Fill) -> list[Fill] | None:
    """A fill of a matrix as one for each move, where each fills whole rows of it; None where one does not."""
    columns = fill.block[-1]
    found = []
    for move in fill.moves:
        run = move.route.run
        if run is None or run[1] % columns or run[2] % columns:
            return None
        route = Route.between(move.route.source, View.whole(move.route.source.shape))
        found.append(Fill(fill.target, fill.at + run[1], (run[2] // columns, columns), (move._replace(route=route),)))
    return found


def is_woven(fill: Fill) -> bool:
    """Whether rows of the fill are made of several quantized matrices, or of something else than rows of one."""
    stored = [move.source.encoded for move in fill.moves]
    return any(stored) and (len(stored) > 1 or not _is_run_of_blocks(fill.moves[0]))


def can_be_woven(fill: Fill) -> bool:
    """Whether a woven fill is a matrix of which every source can be decoded without its neighbours."""
    return len(fill.block) == 2 and all(map(_stands_alone, fill.moves))


def _stands_alone(move: Move) -> bool:
    """A quantized matrix that is a tensor, or whole blocks of one where blocks are numbered."""
    stored, shape = move.source.encoded, move.route.source.block
    if stored is None or len(shape) != 2:
        return False
    block = stored.format.block
    return shape == move.source.spec.shape or (block > 1 and move.source_at % block == prod(shape) % block == 0)


def _is_run_of_blocks(move: Move) -> bool:
    """Quantized values that are read as they lie: a whole matrix, or whole blocks where blocks are numbered."""
    run, stored = move.route.run, move.source.encoded
    if run is None or stored is None:
        return False
    first = move.source_at + run[0]
    if stored.format.block == 1:
        return first == 0 and run[2] == prod(move.source.spec.shape)
    return first % stored.format.block == 0


@cache  # the shapes of a model are few
def _whole(shape: Shape) -> Route:
    whole = View.whole(shape)
    return Route.between(whole, whole)
