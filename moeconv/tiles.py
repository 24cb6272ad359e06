"""How a rearrangement is cut into tiles that fit in memory, and what of its sources each tile needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from math import isqrt
from typing import NamedTuple

from moeconv.steps import Piece, Rearrange, Strand
from moeconv.tensors import Shape, row_major_strides

#: First and last (excluded) index along each axis.
Ranges = tuple[tuple[int, int], ...]


def is_transposed(step: Rearrange) -> bool:
    """Some piece has another axis order in its source than in the target."""
    return any(
        target.of != source.of
        for piece in step.pieces
        for target, source in zip(piece.target_view.axes, piece.source_view.axes, strict=True)
    )


def tiles_of(step: Rearrange, tile_nbytes: int) -> Iterator[Ranges]:
    """Cut a step into index ranges (first, last excluded) of the block's axes that fit in memory.

    Without a transpose a tile is a strip of whole rows. With one it is about square, so that neither reading
    nor writing falls into tiny runs.

    Args:
        step: what to cut.
        tile_nbytes: most bytes of a tile; one element is always allowed.
    """
    bounds = ((step.first, step.last), *((0, size) for size in step.block[1:]))
    sizes = [last - first for first, last in bounds]
    room = max(1, tile_nbytes // step.item_nbytes)
    most = [1] * len(sizes)
    if is_transposed(step):
        most[-2] = min(sizes[-2], max(1, isqrt(room)))
        most[-1] = min(sizes[-1], max(1, room // most[-2]))
        most[-2] = min(sizes[-2], max(1, room // most[-1]))
    else:
        for axis in range(len(sizes) - 1, -1, -1):
            most[axis] = max(1, min(sizes[axis], room))
            room //= most[axis]
            if most[axis] < sizes[axis]:
                break
    yield from product(*(_even_cuts(start, stop, size) for (start, stop), size in zip(bounds, most, strict=True)))


def _even_cuts(start: int, stop: int, most: int) -> list[tuple[int, int]]:
    """The fewest ranges of at most `most` from `start` to `stop`, of sizes as even as can be."""
    count = -(-(stop - start) // most)
    edges = [start + (stop - start) * number // count for number in range(count + 1)]
    return list(pairwise(edges))


def rows_of(
    ranges: Sequence[tuple[int, int, int]], block: Shape, *, joined: bool = True
) -> Iterator[tuple[int, int, int, int]]:
    """The runs of a row-major block that a box of it takes, in order, as evenly spaced rows.

    Args:
        ranges: first, last (excluded) and step for each axis; the last axis is taken whole from first to last.
        block: shape of the block.
        joined: rows without a gap between them become one.

    Yields:
        First element, number of rows, elements from row to row, and elements of a row.
    """
    strides = row_major_strides(block)
    axis = len(block) - 1
    length = ranges[axis][1] - ranges[axis][0]
    while joined and axis > 0 and length == strides[axis - 1]:  # everything behind this axis is taken
        first, last, step = ranges[axis - 1]
        if step != 1:
            break
        axis -= 1
        length = (last - first) * strides[axis]
    start = sum(bounds[0] * stride for bounds, stride in zip(ranges[axis:], strides[axis:], strict=True))
    if axis == 0:
        yield start, 1, 0, length
        return
    first, last, step = ranges[axis - 1]
    count = len(range(first, last, step))
    start += first * strides[axis - 1]
    for indices in product(*(range(*bounds) for bounds in ranges[: axis - 1])):
        at = start + sum(index * stride for index, stride in zip(indices, strides, strict=False))
        yield at, count, step * strides[axis - 1], length


class Overlap(NamedTuple):
    """What one piece gives to one tile.

    Attributes:
        tile_slices: where in the tile (block axes, relative to the tile's start).
        box: source block ranges that hold the elements: first, last (excluded), step. The step along the last
            axis is applied after reading, the others by reading only the rows that are needed.
        order: axes of the read box in the order of the block's axes.
    """

    tile_slices: tuple[slice, ...]
    box: tuple[tuple[int, int, int], ...]
    order: tuple[int, ...]

    @property
    def is_transposed(self) -> bool:
        return list(self.order) != sorted(self.order)


def overlap(piece: Piece | Strand, ranges: Ranges) -> Overlap | None:
    """The elements of `piece` that lie in the tile `ranges`, or None."""
    slices: list[slice] = [slice(0)] * len(ranges)
    box: list[tuple[int, int, int]] = [(0, 0, 1)] * len(ranges)
    order = [0] * len(ranges)
    for axis, (target, source) in enumerate(zip(piece.target_view.axes, piece.source_view.axes, strict=True)):
        first, last = ranges[target.of]
        low = max(0, -(-(first - target.start) // target.step))
        high = min(piece.target_view.shape[axis], -(-(last - target.start) // target.step))
        if low >= high:
            return None
        begin = target.start + low * target.step - first
        slices[target.of] = slice(begin, begin + (high - low - 1) * target.step + 1, target.step)
        from_ = source.start + low * source.step
        box[source.of] = (from_, from_ + (high - low - 1) * source.step + 1, source.step)
        order[target.of] = source.of
    return Overlap(tuple(slices), tuple(box), tuple(order))
