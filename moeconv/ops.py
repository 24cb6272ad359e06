"""How a stored tensor is made of the parts of one expert: the words of a recipe's right-hand side.

    down                              the part itself
    {concat: [gate, up], axis: 0}     one after the other along an axis (0 is the default)
    {interleave: [gate, up]}          alternating: gate row 0, up row 0, gate row 1, ...
    {transpose: down}                 last two axes exchanged

Each word is an index map: exact, invertible, and free of data. `place` turns an expression into one
`View` for each part, which is all that reading and writing need. Ops see shapes, never names of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moeconv.tensors import Axis, Shape, View


class ShapeError(ValueError):
    """Parts whose shapes do not fit together; the text says which and how."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part by its recipe name, such as `gate`."""

    name: str


@dataclass(frozen=True, slots=True)
class Concat:
    """Children one after the other along `axis` (counted from 0, or -1 for the last)."""

    children: tuple[Expression, ...]
    axis: int = 0


@dataclass(frozen=True, slots=True)
class Interleave:
    """Children alternating along `axis`: index `i` of child `c` of `n` is index `i * n + c` of the result."""

    children: tuple[Expression, ...]
    axis: int = 0


@dataclass(frozen=True, slots=True)
class Transpose:
    """The child with its last two axes exchanged."""

    child: Expression


Expression = Part | Concat | Interleave | Transpose


def parts_of(expression: Expression) -> tuple[str, ...]:
    """Names of the parts in the order in which they are written."""
    if isinstance(expression, Part):
        return (expression.name,)
    if isinstance(expression, Transpose):
        return parts_of(expression.child)
    return tuple(name for child in expression.children for name in parts_of(child))


def place(expression: Expression, part_shapes: Mapping[str, Shape]) -> tuple[Shape, dict[str, View]]:
    """Shape of the block that `expression` describes, and where each part lies in it.

    Args:
        expression: what the block is made of; each part appears once.
        part_shapes: shape of every part named in the expression.

    Raises:
        ShapeError: parts cannot be joined as written.
    """
    block, leaves = _place(expression, part_shapes)
    return block, {name: View(block, part_shapes[name], axes) for name, axes in leaves}


_Leaves = list[tuple[str, tuple[Axis, ...]]]


def _place(expression: Expression, part_shapes: Mapping[str, Shape]) -> tuple[Shape, _Leaves]:
    if isinstance(expression, Part):
        shape = part_shapes[expression.name]
        return shape, [(expression.name, View.whole(shape).axes)]
    if isinstance(expression, Transpose):
        shape, leaves = _place(expression.child, part_shapes)
        if len(shape) < 2:
            raise ShapeError(f"transpose needs two axes, {list(shape)} has {len(shape)}")
        last, before = len(shape) - 1, len(shape) - 2
        exchanged = {last: before, before: last}
        moved: _Leaves = [
            (name, tuple(Axis(exchanged.get(axis.of, axis.of), axis.start, axis.step) for axis in axes))
            for name, axes in leaves
        ]
        return (*shape[:before], shape[last], shape[before]), moved
    return _join(expression, [_place(child, part_shapes) for child in expression.children])


def _join(expression: Concat | Interleave, placed: list[tuple[Shape, _Leaves]]) -> tuple[Shape, _Leaves]:
    shapes = [shape for shape, _ in placed]
    along = expression.axis if expression.axis >= 0 else len(shapes[0]) + expression.axis
    if not 0 <= along < len(shapes[0]):
        raise ShapeError(f"axis {expression.axis} does not exist in {list(shapes[0])}")
    others = {(*shape[:along], *shape[along + 1 :]) for shape in shapes}
    if len(others) != 1:
        raise ShapeError(f"shapes {', '.join(str(list(shape)) for shape in shapes)} differ outside axis {along}")
    if isinstance(expression, Interleave) and len({shape[along] for shape in shapes}) != 1:
        raise ShapeError(f"interleaved shapes {', '.join(str(list(shape)) for shape in shapes)} differ")
    joined = sum(shape[along] for shape in shapes)
    leaves: _Leaves = []
    before = 0
    for turn, (shape, child_leaves) in enumerate(placed):
        start, step = (before, 1) if isinstance(expression, Concat) else (turn, len(placed))
        for name, axes in child_leaves:
            leaves.append((name, tuple(_shifted(axis, along, start, step) for axis in axes)))
        before += shape[along]
    first = shapes[0]
    return (*first[:along], joined, *first[along + 1 :]), leaves


def _shifted(axis: Axis, along: int, start: int, step: int) -> Axis:
    return Axis(along, start + step * axis.start, step * axis.step) if axis.of == along else axis
