"""Whether the values of a folder can be those of a model, without the source that they were made from.

Every byte is read once: numbers in full precision have to be finite, codes and scales have to belong together.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from math import inf, prod
from typing import TYPE_CHECKING, Any, NamedTuple

from moeconv.checkpoint import Checkpoint, StoredTensor
from moeconv.errors import Problem
from moeconv.files import Files, OpenFiles
from moeconv.formats import Decoder, FormatError, amax
from moeconv.formats.rounding import block_of, by_block, rounding_of, scales_of, unscaled
from moeconv.looking import Hand, Look, Reader, in_threads
from moeconv.moves import copy_of
from moeconv.names import collapse, ranges
from moeconv.plan import Memory
from moeconv.sample import Sample, chosen
from moeconv.steps import Decode
from moeconv.tensors import Shape

if TYPE_CHECKING:
    import numpy

#: Bits of a number that is not finite, or of one byte NaN: (bytes, mask, least masked value that is not finite).
_NOT_FINITE = {
    "BF16": (2, 0x7FFF, 0x7F80), "F16": (2, 0x7FFF, 0x7C00), "F32": (4, 0x7FFFFFFF, 0x7F800000),
    "F64": (8, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000), "F8_E4M3": (1, 0x7F, 0x7F), "F8_E5M2": (1, 0x7F, 0x7C),
    "F8_E8M0": (1, 0xFF, 0xFF),
}  # fmt: skip
#: Bytes of one read, and of one piece that a thread takes.
_READ_NBYTES, _PIECE_NBYTES = 512 << 10, 64 << 20
#: So many scales that are all alike are no accident, if the largest codes of blocks differ by this factor.
_FEW_SCALES, _UNLIKE = 16, 0.4
_DAMAGED = "Verify with --against SRC, which tells whether the source has it; else convert again."


class Piece(NamedTuple):
    """Bytes `first` to `last` (excluded) of a tensor in full precision; of experts in one tensor those of one."""

    tensor: StoredTensor
    first: int
    last: int
    expert: int | None


Item = Piece | StoredTensor


def encoded_of(view: Checkpoint) -> list[StoredTensor]:
    """The quantized matrices of a folder that is seen in full precision."""
    return [tensor for tensor in view.tensors.values() if tensor.encoded is not None]


def plain_of(folder: Checkpoint, view: Checkpoint) -> list[StoredTensor]:
    """The tensors of a folder that hold floats and are no parts of quantized matrices."""
    parts = [part for tensor in encoded_of(view) if tensor.encoded for part in tensor.encoded.parts.values()]
    used = {part.inside.whole.name if part.inside else part.spec.name for part in parts}
    return [t for name, t in folder.tensors.items() if name not in used and t.spec.dtype in _NOT_FINITE]


def pieces_of(tensor: StoredTensor, is_expert: bool) -> Iterator[Piece]:
    """A tensor in pieces: of experts that lie in one tensor one piece each."""
    spec = tensor.spec
    if is_expert and len(spec.shape) > 2:
        size = spec.nbytes // max(1, spec.shape[0])
        yield from (Piece(tensor, at * size, (at + 1) * size, at) for at in range(spec.shape[0]))
    elif is_expert:
        yield Piece(tensor, 0, spec.nbytes, None)
    else:
        for first in range(0, spec.nbytes, _PIECE_NBYTES):
            yield Piece(tensor, first, min(first + _PIECE_NBYTES, spec.nbytes), None)


class Soundness:
    """Looks at values and gathers what is off.

    Args:
        folder: the folder.
        view: the same in full precision.
        experts: names of tensors that are experts, in the view and as stored.
        files: door to the file system.
        against_source: tensors in full precision are held against a source elsewhere, and left out here.
    """

    def __init__(
        self, folder: Checkpoint, view: Checkpoint, experts: Iterable[str], files: Files, *, against_source: bool
    ) -> None:
        self.folder = folder
        self.view = view
        self.experts = frozenset(experts)
        self.files = files
        self.against_source = against_source
        self.lock = threading.Lock()
        self.nbytes = self.of_nbytes = 0
        self.matrices = 0
        self._found: dict[str, list[str]] = {}
        self._zeros: dict[str, list[int]] = {}
        self._other: list[Problem] = []

    def items(self, sample: Sample | None) -> list[Item]:
        """What is looked at."""
        named: list[tuple[str, Item]] = [(tensor.spec.name, tensor) for tensor in encoded_of(self.view)]
        for tensor in [] if self.against_source else plain_of(self.folder, self.view):
            name = tensor.spec.name
            named += [(f"{name}.{p.expert or 0}", p) for p in pieces_of(tensor, name in self.experts)]
        self.of_nbytes = sum(_nbytes(item) for _, item in named)
        return chosen(sample, named)

    def kinds(self) -> list[StoredTensor]:
        """A quantized matrix of each kind."""
        return list({(id(t.encoded and t.encoded.format), t.spec.shape): t for t in encoded_of(self.view)}.values())

    def run(self, items: list[Item], memory: Memory) -> None:
        """Look at all items."""
        in_threads(memory.jobs, items, lambda: _SoundnessHand(self, memory))

    def note(self, what: str, name: str) -> None:
        """Something is off with a tensor."""
        with self.lock:
            self._found.setdefault(what, []).append(name)

    def note_zeros(self, name: str, expert: int | None) -> None:
        """All of an expert's matrix is zero."""
        with self.lock:
            self._zeros.setdefault(name, []).extend([] if expert is None else [expert])

    def note_error(self, problem: Problem) -> None:
        """A tensor cannot be decoded."""
        with self.lock:
            self._other.append(problem)

    def count(self, nbytes: int, matrices: int = 0) -> None:
        """So much was looked at."""
        with self.lock:
            self.nbytes += nbytes
            self.matrices += matrices

    def problems(self) -> list[Problem]:
        """All that is off, names collapsed."""
        found = [
            Problem(f"{line} {what}", _DAMAGED) for what in sorted(self._found) for line in collapse(self._found[what])
        ]
        whole = [name for name, experts in self._zeros.items() if not experts]
        found += [Problem(f"{line}: all of the expert's numbers are zero", _DAMAGED) for line in collapse(whole)]
        found += [
            Problem(
                f"{name}: all numbers of {'expert' if len(set(e)) == 1 else 'experts'} {ranges(e)} are zero", _DAMAGED
            )
            for name, e in sorted(self._zeros.items())
            if e
        ]
        return found + self._other


class _SoundnessHand(Hand[Item]):
    """One thread's part of it."""

    def __init__(self, whole: Soundness, memory: Memory) -> None:
        self._whole = whole
        self._memory = memory
        self._reader = Reader(whole.files, whole.folder, memory)
        self._opened = OpenFiles(whole.files, [whole.folder.root / file.path for file in whole.folder.files])
        self._buffer = memoryview(bytearray(_READ_NBYTES))

    def close(self) -> None:
        self._reader.close()
        self._opened.close()

    def take(self, item: Item) -> None:
        if isinstance(item, Piece):
            self._take_piece(item)
            return
        try:
            self._take_matrix(item)
        except FormatError as error:
            self._whole.note_error(Problem(f"{item.spec.name}: {error}", _DAMAGED))

    def _take_piece(self, piece: Piece) -> None:
        import numpy

        spec = piece.tensor.spec
        item, mask, least = _NOT_FINITE[spec.dtype]
        kind = {1: numpy.uint8, 2: numpy.uint16, 4: numpy.uint32, 8: numpy.uint64}[item]
        worst, is_zero = 0, True
        for at in range(piece.first, piece.last, _READ_NBYTES):
            content = self._buffer[: min(_READ_NBYTES, piece.last - at)]
            self._opened[piece.tensor.file].read_into(content, piece.tensor.offset + at)
            most = _largest(numpy.frombuffer(content, kind), mask)
            worst, is_zero = max(worst, most), is_zero and most == 0
        is_finite = worst < least
        if not is_finite and (prod(spec.shape) > 1 or worst > least):  # a single number may be a bound that never binds
            self._whole.note("holds NaN or infinite numbers", spec.name)
        if is_zero and piece.last > piece.first and spec.name in self._whole.experts and len(spec.shape) > 1:
            self._whole.note_zeros(spec.name, piece.expert)
        self._whole.count(piece.last - piece.first)

    def _take_matrix(self, tensor: StoredTensor) -> None:
        assert tensor.encoded is not None
        name, made = tensor.spec.name, tensor.encoded.format
        look = Look.at(copy_of(tensor))
        (matrix,) = look.matrices
        assert isinstance(matrix.source, Decode)
        found = _Codes(made, matrix.shape)
        for first, last in look.tiles(self._memory.tile_elements):
            parts, floats = self._reader.coded(matrix, first, last)
            found.add(parts, floats)
        for what in found.faults():
            self._whole.note(what, name)
        if found.is_zero and name in self._whole.experts and not self._whole.against_source:
            self._whole.note_zeros(name, None)
        self._whole.count(_nbytes(tensor), 1)


def _nbytes(item: Item) -> int:
    """Bytes in files, of a quantized matrix those of its parts."""
    if isinstance(item, Piece):
        return item.last - item.first
    return sum(part.spec.nbytes for part in item.encoded.parts.values()) if item.encoded else 0


def _largest(numbers: numpy.ndarray[Any, Any], mask: int) -> int:
    return int((numbers & numbers.dtype.type(mask)).max()) if numbers.size else 0


class _Codes:
    """What is seen of one quantized matrix, tile by tile."""

    def __init__(self, made: Decoder, shape: Shape) -> None:
        self.made = made
        self.block = block_of(made, shape)
        self.rounding = rounding_of(made, "BF16")
        self.elements = shape[0] * shape[1]
        self.columns = shape[1]
        self.bad_scales = self.bad_values = self.unscaled = self.outermost = self.scales = 0
        self.is_zero = True
        self.least_scale, self.most_scale = inf, -inf
        self.least_code, self.most_code = inf, 0.0

    def add(self, parts: Mapping[str, Any], floats: Any) -> None:
        """Rows of it: the parts, and what they stand for."""
        codes = unscaled(self.made, parts, self.columns)
        for scales in scales_of(parts):
            self.bad_scales += int((~scales.isfinite()).sum())
        # Of blocks, because to find the largest is one pass over the elements, and NaN counts as larger than all.
        most, found = (amax(by_block(item, self.block), 1) for item in (codes, floats))
        self.bad_values += int((~found.isfinite()).sum())
        self.unscaled += int(((found == 0) & (most != 0)).sum())
        self.is_zero = self.is_zero and not bool(found.any())
        largest = self.rounding.largest * 0.999
        if largest and bool((most >= largest).any()):
            self.outermost += int((codes >= largest).sum()) + int((codes <= -largest).sum())
        self._add_scales(scales_of(parts)[:1], most)

    def _add_scales(self, found: list[Any], most: Any) -> None:
        scales = found[0].flatten() if found else None
        if scales is None or len(scales) != len(most):  # of the whole matrix, or codes themselves
            return
        used = scales[most > 0]
        if len(used):
            self.scales += len(used)
            self.least_scale = min(self.least_scale, float(used.min()))
            self.most_scale = max(self.most_scale, float(used.max()))
            self.least_code = min(self.least_code, float(most[most > 0].min()))
            self.most_code = max(self.most_code, float(most.max()))

    def faults(self) -> Iterator[str]:
        """What is off with the matrix."""
        name = self.made.name
        if self.bad_scales:
            yield f"({name}) has scales that are NaN or infinite"
        elif self.bad_values:
            yield f"({name}) has codes that stand for NaN"
        if self.unscaled:
            yield f"({name}) has scales of zero where codes are not zero"
        size = self.block.columns * max(1, self.block.rows)
        most = self.rounding.most_there + 2 / size
        if self.rounding.largest and self.outermost > most * self.elements:
            yield f"({name}) has most of its codes at the largest magnitude: they were cut off, or scales are too small"
        if (
            self.scales >= _FEW_SCALES
            and self.least_scale == self.most_scale
            and self.least_code < _UNLIKE * self.most_code
            and self.rounding.largest != 0
        ):
            yield f"({name}) has one and the same scale everywhere, and codes that fill it in some blocks alone"
