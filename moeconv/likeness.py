"""Whether two folders hold the same numbers, as far as rounding lets them.

For bytes that nobody can make again here: another tool's, or those of another kind of device. Every matrix is decoded
on both sides and compared block by block with what rounding to its format may lose (`formats.rounding`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from math import inf, log10, sqrt
from typing import TYPE_CHECKING, NamedTuple

from moeconv.checkpoint import Checkpoint
from moeconv.errors import Problem
from moeconv.files import Files, OpenFiles
from moeconv.formats import FormatError
from moeconv.formats.rounding import BLOCK, WHOLE, Rounding, block_of, by_block, rounding_of
from moeconv.looking import Hand, Look, Reader, in_threads
from moeconv.matching import Pair, is_number
from moeconv.moves import Fill
from moeconv.plan import Memory
from moeconv.steps import Decode, Matrix, staged_nbytes
from moeconv.tensors import DTYPE_BITS

if TYPE_CHECKING:
    from torch import Tensor

_RAW_NBYTES = 256 << 10
#: What a block may lose in any case: this share of what an average block holds, and squares of so small numbers.
_SMALL, _TINY = 1e-8, 1e-36


class Likeness(NamedTuple):
    """How much a matrix is like that of the source.

    Attributes:
        pair: the two.
        format: of the made one, or its dtype.
        squares: sum of the source's squares.
        lost: sum of squared differences.
        expected: what rounding loses of that on average.
        blocks: blocks that share a scale, and
        wrong_blocks: those of them that are further off than rounding can make them.
        first_wrong: where the first of them begins: row and column.
        factor: by which what the first of them holds would have to be divided to fit best.
    """

    pair: Pair
    format: str
    squares: float = 0.0
    lost: float = 0.0
    expected: float = 0.0
    blocks: int = 0
    wrong_blocks: int = 0
    first_wrong: tuple[int, int] | None = None
    factor: float = 1.0

    @property
    def relative_error(self) -> float:
        """Root of the squared differences by the source's squares."""
        if self.lost == 0:
            return 0.0
        return sqrt(self.lost / self.squares) if self.squares else inf

    @property
    def limit(self) -> float:
        """The most that `relative_error` may be."""
        return WHOLE * sqrt(self.expected / self.squares) if self.squares else 0.0

    @property
    def is_whole(self) -> bool:
        """It is not too far off as a whole."""
        return self.lost <= WHOLE * WHOLE * self.expected

    @property
    def is_like(self) -> bool:
        """It is what rounding makes of the source's."""
        return self.is_whole and not self.wrong_blocks


def decibels(relative_error: float) -> float | None:
    """Signal to noise; None where there is no noise."""
    return -20 * log10(relative_error) if 0 < relative_error < inf else None


class Likenesses:
    """Compares pairs and gathers the results.

    Args:
        source: the source, as opened.
        made: the other folder, as opened.
        files: door to the file system.
    """

    def __init__(self, source: Checkpoint, made: Checkpoint, files: Files) -> None:
        self.source = source
        self.made = made
        self.files = files
        self.found: list[Likeness] = []
        self.problems: list[Problem] = []
        self.nbytes = 0
        self._lock = threading.Lock()

    def run(self, pairs: Iterable[Pair], memory: Memory) -> None:
        """Compare all pairs."""
        in_threads(memory.jobs, pairs, lambda: _LikenessHand(self, memory))
        self.found.sort(key=lambda likeness: likeness.pair.key)

    def add(self, found: Likeness, nbytes: int) -> None:
        """The result for a pair."""
        with self._lock:
            self.found.append(found)
            self.nbytes += nbytes

    def fail(self, problem: Problem) -> None:
        """A matrix cannot be decoded."""
        with self._lock:
            self.problems.append(problem)


class _LikenessHand(Hand[Pair]):
    """One thread's part of it."""

    def __init__(self, whole: Likenesses, memory: Memory) -> None:
        self._whole = whole
        self._memory = memory
        self._readers = [Reader(whole.files, folder, memory) for folder in (whole.source, whole.made)]
        self._opened = [
            OpenFiles(whole.files, [folder.root / file.path for file in folder.files])
            for folder in (whole.source, whole.made)
        ]

    def close(self) -> None:
        for reader in self._readers:
            reader.close()
        for opened in self._opened:
            opened.close()

    def take(self, item: Pair) -> None:
        if not (is_number(item.source) and is_number(item.made)):
            self._take_raw(item)
            return
        look = Look.at(item.source, item.made)
        try:
            self._whole.add(self._compared(item, look), _nbytes(look.matrices[1]))
        except FormatError as error:
            self._whole.fail(Problem(f"{item.name}: {error}", "Convert again."))

    def _compared(self, pair: Pair, look: Look) -> Likeness:
        sums = _Sums(pair, look)
        for first, last in look.tiles(self._memory.tile_elements):
            wanted, found = (
                reader.floats(matrix, first, last) for reader, matrix in zip(self._readers, look.matrices, strict=True)
            )
            sums.add(wanted, found, first)
        return sums.likeness

    def _take_raw(self, pair: Pair) -> None:
        """What is no number is the same byte for byte."""
        spec = pair.source.target._replace(shape=pair.source.block)
        if pair.made.target._replace(shape=pair.made.block) != spec:
            self._whole.fail(Problem(f"{pair.made.target} should be {pair.source.target}", "Convert again."))
            return
        wrong = 0
        for at in range(0, spec.nbytes, _RAW_NBYTES):
            size = min(_RAW_NBYTES, spec.nbytes - at)
            one, other = (self._bytes(number, fill, at, size) for number, fill in enumerate((pair.source, pair.made)))
            wrong += one != other
        self._whole.add(Likeness(pair, spec.dtype, blocks=1, wrong_blocks=int(wrong > 0)), spec.nbytes)

    def _bytes(self, number: int, fill: Fill, at: int, size: int) -> bytes:
        (move,) = fill.moves
        content = bytearray(size)
        begin = move.source_at * DTYPE_BITS[fill.target.dtype] // 8
        self._opened[number][move.source.file].read_into(memoryview(content), move.source.offset + begin + at)
        return bytes(content)


def _nbytes(matrix: Matrix) -> int:
    if isinstance(matrix.source, Decode):
        return sum(part.nbytes(0, matrix.shape[0]) for part in matrix.source.parts)
    return staged_nbytes(matrix.source, 0, matrix.shape[0])


class _Sums:
    """What is summed over the tiles of a pair."""

    def __init__(self, pair: Pair, look: Look) -> None:
        source, made = look.matrices
        self.decoder = made.source.format if isinstance(made.source, Decode) else None
        self.block = block_of(self.decoder, made.shape)
        is_copy = self.decoder is None and made.source_dtype == source.source_dtype
        is_copy = is_copy and not isinstance(source.source, Decode)
        self.rounding = Rounding(0.0, 0.0) if is_copy else rounding_of(self.decoder, made.source_dtype)
        self.columns = made.shape[1]
        self.likeness = Likeness(pair, self.decoder.name if self.decoder else made.source_dtype)

    def add(self, wanted: Tensor, found: Tensor, first: int) -> None:
        """Rows from number `first` on."""
        import torch

        usual = wanted.isfinite()
        if not bool(usual.all()):  # what the source itself has is no fault: the same, or zero
            same = usual | (found == wanted) | found.isnan() | (found == 0)
            wanted, found = (torch.where(usual, item, 0.0) for item in (wanted, found))
            found = torch.where(same, found, torch.nan)
        lost = by_block(found - wanted, self.block).square().sum(1, dtype=torch.float64)
        blocks = by_block(wanted, self.block)
        squares = blocks.square().sum(1, dtype=torch.float64)
        peaks = blocks.abs().amax(1).double().square() * blocks.shape[1]
        expected = self.rounding.relative**2 * squares + self.rounding.step**2 * peaks
        # Blocks so small that scales of the whole matrix have no room for them are lost, and do not matter.
        most = BLOCK * BLOCK * expected + _SMALL * float(squares.mean()) + _TINY * blocks.shape[1]
        wrong = ~(lost <= most if self.decoder else lost <= BLOCK * BLOCK * expected)  # so that NaN is wrong
        before = self.likeness
        made = before._replace(
            squares=before.squares + float(squares.sum()), lost=before.lost + float(lost.sum()),
            expected=before.expected + float(expected.sum()), blocks=before.blocks + len(lost),
            wrong_blocks=before.wrong_blocks + int(wrong.sum()),
        )  # fmt: skip
        if before.first_wrong is None and made.wrong_blocks:
            number = int(wrong.nonzero()[0])
            own = by_block(found, self.block)[number].double()
            dot = float(own @ blocks[number].double())
            factor = float(own @ own) / dot if dot > 0 else 1.0
            made = made._replace(first_wrong=self._at(number, first), factor=factor)
        self.likeness = made

    def _at(self, number: int, first: int) -> tuple[int, int]:
        """Row and column where a block of the tile begins."""
        if self.block.rows == 0:
            at = number * self.block.columns
            return first + at // self.columns, at % self.columns
        across = -(-self.columns // self.block.columns)
        return first + number // across * self.block.rows, number % across * self.block.columns
