"""What the executor can do: copy bytes, rearrange a block, write zeros. And how fills become such steps.

Steps name files by number and places by byte offset; they carry all that is needed to run them in any
order, on any thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd, prod
from typing import NamedTuple

from moeconv.formats import Decoder, Format
from moeconv.moves import Fill
from moeconv.tensors import DTYPE_BITS, Shape, View

#: Tiles of a strip that is decoded for them: the more, the less often each row of its strands.
STRIP_TILES = 8
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


class Strand(NamedTuple):
    """A quantized matrix, or some of its rows and columns, in a `Woven` one.

    Attributes:
        decode: the whole of it.
        shape: rows and columns of the whole.
        source_view: what is taken of it.
        target_view: where that lies in the woven matrix.
    """

    decode: Decode
    shape: tuple[int, int]
    source_view: View
    target_view: View

    @property
    def row_multiple(self) -> int:
        """Rows can be decoded apart from others that begin at a multiple of this."""
        return self.decode.format.row_multiple * whole_rows(self.decode.format, self.shape[1])


class Woven(NamedTuple):
    """A matrix [rows, columns] made of quantized matrices whose rows are not its rows.

    It is decoded in strips of its rows, each from all rows of the strands that it crosses.
    """

    shape: tuple[int, int]
    item_nbytes: int
    strands: tuple[Strand, ...]


class Matrix(NamedTuple):
    """A matrix to be read, or decoded.

    Attributes:
        name: for messages.
        shape: of the whole matrix.
        dtype: what it is taken as, a safetensors name.
        source: the matrix as pieces of source tensors, as parts of a quantized one, or woven of such.
        source_dtype: dtype of the pieces, or in which strands are decoded.
        expert_rows: rows of one expert, where it becomes a tensor in which experts lie one behind the other.
        at_row: of that tensor, where the matrix begins.
    """

    name: str
    shape: Shape
    dtype: str
    source: Rearrange | Decode | Woven
    source_dtype: str
    expert_rows: int | None = None
    at_row: int = 0


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


def whole_rows(made: Decoder, columns: int) -> int:
    """Rows between two of which a block ends."""
    return made.block // gcd(made.block, columns)


def strip_rows(step: Transcode, elements: int) -> int:
    """Rows of a woven matrix that are decoded at once, for tiles of about so many elements."""
    return min(step.matrix.shape[0], STRIP_TILES * tile_rows(step, elements))


def strand_rows(strand: Strand, elements: int) -> int:
    """Rows of a strand that are decoded at once, of about so many elements."""
    rows = elements // max(1, strand.shape[1]) // strand.row_multiple * strand.row_multiple
    return min(strand.shape[0], max(strand.row_multiple, rows))


def staged_nbytes(source: Rearrange | Decode | Woven, first: int, last: int) -> int:
    """Bytes in a staging buffer of what rows `first` to `last` (excluded) are made from."""
    if isinstance(source, Rearrange):
        return (last - first) * source.row_nbytes
    if isinstance(source, Woven):
        return (last - first) * source.shape[1] * source.item_nbytes
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
