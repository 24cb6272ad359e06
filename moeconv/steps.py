"""What the executor can do: copy bytes, rearrange a block, write zeros. And how fills become such steps.

Steps name files by number and places by byte offset; they carry all that is needed to run them in any
order, on any thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from math import isqrt, prod
from typing import NamedTuple

from moeconv.formats import Decoder, Format
from moeconv.moves import Fill
from moeconv.tensors import DTYPE_BITS, Shape, View, row_major_strides

#: Parts of a quantized matrix begin at multiples of this in a staging buffer.
PART_ALIGNMENT = 64


class Copy(NamedTuple):
    """`nbytes` bytes from one place to another."""

    source_file: int
    source_offset: int
    target_file: int
    target_offset: int
    nbytes: int


class Zeros(NamedTuple):
    """`nbytes` zero bytes."""

    target_file: int
    target_offset: int
    nbytes: int


class Piece(NamedTuple):
    """A part of a `Rearrange`: seen as `source_view` in the source block whose first byte is at `source_offset`."""

    source_file: int
    source_offset: int
    source_view: View
    target_view: View


class Rearrange(NamedTuple):
    """Rows `first` to `last` (excluded, along axis 0) of a target block, filled element by element.

    Attributes:
        target_file: number of the target file.
        block_offset: byte offset of the block's first element.
        block: shape of the whole block.
        item_nbytes: bytes of one element.
        first: first row.
        last: row behind the last.
        pieces: what fills the block; together they cover it.
    """

    target_file: int
    block_offset: int
    block: Shape
    item_nbytes: int
    first: int
    last: int
    pieces: tuple[Piece, ...]

    @property
    def row_nbytes(self) -> int:
        return prod(self.block[1:]) * self.item_nbytes

    @property
    def target_offset(self) -> int:
        return self.block_offset + self.first * self.row_nbytes

    @property
    def nbytes(self) -> int:
        return (self.last - self.first) * self.row_nbytes


class Part(NamedTuple):
    """Where the rows of one part of an encoded matrix lie.

    Attributes:
        suffix: as its format calls it.
        dtype: a safetensors name.
        file: number of the file.
        offset: byte offset of the part's first element.
        row_nbytes: bytes of one index of its axis 0.
        size: of its axis 0.
        rows: matrix rows that one index stands for.
        stride: bytes from one index of axis 0 to the next; 0 where they follow each other. Where rows lie across, from
            one run of them to the next.
        runs: where the matrix' rows lie along axis 1, the size of axis 0; all else then speaks of axis 1.
        values: of the matrix for which one element stands, where elements follow those and not rows; and
        columns: of the matrix then. An index is that of an element.
    """

    suffix: str
    dtype: str
    file: int
    offset: int
    row_nbytes: int
    size: int
    rows: int
    stride: int = 0
    runs: int = 0
    values: int = 0
    columns: int = 0

    def bounds(self, first: int, last: int) -> tuple[int, int]:
        """Indices of axis 0 that belong to matrix rows `first` to `last` (excluded)."""
        if self.values:
            return first * self.columns // self.values, min(self.size, -(-last * self.columns // self.values))
        return first // self.rows, min(self.size, -(-last // self.rows))

    def nbytes(self, first: int, last: int) -> int:
        """Bytes that belong to these rows."""
        begin, end = self.bounds(first, last)
        return (end - begin) * self.row_nbytes * max(1, self.runs)


class Decode(NamedTuple):
    """A source matrix that is stored quantized."""

    format: Decoder
    parts: tuple[Part, ...]


class Matrix(NamedTuple):
    """A matrix to be read, or decoded.

    Attributes:
        name: for messages.
        shape: of the whole matrix.
        dtype: what it is taken as, a safetensors name.
        source: the matrix as pieces of source tensors, or as parts of a quantized one.
        source_dtype: dtype of the pieces.
    """

    name: str
    shape: Shape
    dtype: str
    source: Rearrange | Decode
    source_dtype: str


class Transcode(NamedTuple):
    """Rows `first` to `last` (excluded) of a matrix: read, or decoded, then encoded, or cast, and written.

    Attributes:
        matrix: what is read.
        encoder: the format to write; None to write the matrix in its dtype.
        targets: places of the parts that have rows, in the order of the encoder; one part where there is none.
        row_multiple: rows can be cut at multiples of this.
        row_nbytes: bytes written for one row, on average; for progress.
        first: first row.
        last: row behind the last.
        allow_nonfinite: NaN and infinities count as zero; otherwise they are an error.
        sharing: all matrices with which it shares a scale, itself included; they are measured first.
        is_retold: the encoder takes the parts of the source as they are.
        sampled: so many first rows are decoded again, to tell what encoding lost; 0 for none.
    """

    matrix: Matrix
    encoder: Format | None
    targets: tuple[Part, ...]
    row_multiple: int
    row_nbytes: int
    first: int
    last: int
    allow_nonfinite: bool
    sharing: tuple[Matrix, ...] = ()
    is_retold: bool = False
    sampled: int = 0

    @property
    def target_file(self) -> int:
        return self.targets[0].file

    @property
    def target_offset(self) -> int:
        part = self.targets[0]
        return part.offset + part.bounds(self.first, self.last)[0] * (part.stride or part.row_nbytes)

    @property
    def nbytes(self) -> int:
        return (self.last - self.first) * self.row_nbytes


def tile_rows(step: Transcode, elements: int) -> int:
    """Rows of a tile of about so many elements, at least what the formats take at once."""
    rows = elements // max(1, step.matrix.shape[1]) // step.row_multiple * step.row_multiple
    return min(step.matrix.shape[0], max(step.row_multiple, rows))


def staged_nbytes(source: Rearrange | Decode, first: int, last: int) -> int:
    """Bytes in a staging buffer of what rows `first` to `last` (excluded) are made from."""
    if isinstance(source, Rearrange):
        return (last - first) * source.row_nbytes
    return sum(-(-part.nbytes(first, last) // PART_ALIGNMENT) * PART_ALIGNMENT for part in source.parts)


class Content(NamedTuple):
    """A few bytes that the plan knows, such as a shape."""

    target_file: int
    target_offset: int
    content: bytes

    @property
    def nbytes(self) -> int:
        return len(self.content)


Step = Copy | Zeros | Rearrange | Transcode | Content


def needs_whole_bytes(fill: Fill) -> bool:
    """Whether the fill can run on bytes: elements of full bytes, or runs that begin and end between two bytes."""
    bits = DTYPE_BITS[fill.target.dtype]
    if bits % 8 == 0:
        return True
    edges = [fill.at, prod(fill.target.shape)]
    for move in fill.moves:
        if move.route.run is None:
            return False
        source_first, target_first, count = move.route.run
        edges += [move.source_at + source_first, target_first, count]
    return all(edge * bits % 8 == 0 for edge in edges)


def steps_of(fill: Fill, target: tuple[int, int]) -> Iterator[Step]:
    """The steps of a fill.

    Args:
        fill: what to fill.
        target: file number of the target tensor and the byte offset of its first element in that file.
    """
    file, start = target
    bits = DTYPE_BITS[fill.target.dtype]
    begin = start + fill.at * bits // 8
    if not fill.moves:
        yield Zeros(file, begin, prod(fill.block) * bits // 8)
        return
    if all(move.route.run is not None for move in fill.moves):
        for move in fill.moves:
            assert move.route.run is not None
            source_first, target_first, count = move.route.run
            yield Copy(
                move.source.file,
                move.source.offset + (move.source_at + source_first) * bits // 8,
                file,
                begin + target_first * bits // 8,
                count * bits // 8,
            )
        return
    yield rearrangement(fill, file, begin)


def rearrangement(fill: Fill, file: int, begin: int) -> Rearrange:
    """A whole fill, element by element, to a block at byte `begin` of target file number `file`."""
    item = DTYPE_BITS[fill.target.dtype] // 8
    pieces = tuple(
        Piece(move.source.file, move.source.offset + move.source_at * item, move.route.source, move.route.target)
        for move in fill.moves
    )
    return Rearrange(file, begin, fill.block, item, 0, fill.block[0], pieces)


def whole_run(step: Rearrange) -> int | None:
    """Byte offset in its source file of a block that lies there as it is, or None."""
    if len(step.pieces) != 1:
        return None
    piece = step.pieces[0]
    if not (piece.source_view.is_run and piece.target_view.is_run) or prod(piece.target_view.shape) != prod(step.block):
        return None
    return piece.source_offset + piece.source_view.first * step.item_nbytes


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


def overlap(piece: Piece, ranges: Ranges) -> Overlap | None:
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
