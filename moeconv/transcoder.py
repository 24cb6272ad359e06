"""One worker's encoding and decoding: tiles go from source files through a lane of its device to a sink."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

from moeconv.device import Compute, Job, Lane
from moeconv.errors import CheckpointError
from moeconv.files import OpenFiles, Rows
from moeconv.formats import EXPONENT_NAN, Format, FormatError
from moeconv.losses import Loss
from moeconv.steps import (
    PART_ALIGNMENT,
    Decode,
    Matrix,
    Rearrange,
    Strand,
    Transcode,
    Woven,
    staged_nbytes,
    strand_rows,
    tile_rows,
    whole_run,
)
from moeconv.tiles import Ranges, overlap

if TYPE_CHECKING:
    import numpy
    import torch
    from torch import Tensor

    from moeconv.plan import Memory

#: Matrices that share a number lie close to each other: those of so many groups are remembered.
_KNOWN_PEAKS = 64

#: Receives target file number, offset and bytes, and how they are spread where they are not one run. The bytes are
#: only valid during the call.
Sink = Callable[[int, int, memoryview, Rows | None], None]
#: Fills the array, a range of a rearrangement's block, from its sources.
Fill = Callable[[Rearrange, Ranges, "numpy.ndarray[Any, Any]"], None]


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that safetensors calls `name`."""
    import torch

    dtype: torch.dtype = getattr(
        torch,
        {
            "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F8_E4M3": "float8_e4m3fn", "I8": "int8",
            "U8": "uint8", "I32": "int32", "F8_E8M0": "float8_e8m0fnu",
        }[name],
    )  # fmt: skip
    return dtype


class _Strip(NamedTuple):
    """Rows `first` to `last` (excluded) of a woven matrix."""

    source: Woven
    first: int
    last: int
    rows: Tensor


class Transcoder:
    """Runs `Transcode` steps. Up to `lane.depth` tiles are under way at once, also of several steps.

    Args:
        lane: where it computes.
        sources: source files.
        fill: reads what does not lie in one run.
        memory: size of tiles and staging buffers.
    """

    def __init__(self, lane: Lane, sources: OpenFiles, fill: Fill, memory: Memory) -> None:
        self._lane = lane
        self._sources = sources
        self._fill = fill
        self._tile_elements = memory.tile_elements
        self._under_way: deque[tuple[Transcode, int, int, Job]] = deque()
        self._losses: list[Loss] = []
        self._staging = deque(lane.staging(memory.staging) for _ in range(lane.depth))
        self._peaks: dict[str, float] = {}
        self._strip_nbytes = memory.strip
        self._room: Tensor | None = None
        self._strip: _Strip | None = None

    def run(self, step: Transcode, sink: Sink) -> None:
        """Begin all tiles of a step; the last ones may still be under way afterwards."""
        rows = tile_rows(step, self._tile_elements)
        peak = self._peak(step, rows, sink) if step.sharing else 0.0
        compute, sampling = _encoding(step, peak, 0), _encoding(step, peak, step.sampled)
        for first in range(step.first, step.last, rows):
            last = min(first + rows, step.last)
            if len(self._under_way) == self._lane.depth:
                self._deliver(sink)  # the job that read the staging buffer which comes next
            if self._is_missing(step.matrix, first, last):
                self.finish(sink)  # the staging buffers are needed
            job = self._submit(step.matrix, first, last, compute if first else sampling)
            self._under_way.append((step, first, last, job))

    def _submit(self, matrix: Matrix, first: int, last: int, compute: Compute) -> Job:
        try:
            return self._lane.submit(self._read(matrix, first, last), compute)
        except FormatError as error:
            raise CheckpointError(
                f"{matrix.name}, rows {first} to {last - 1}: {error}", "Start from the checkpoint in full precision."
            ) from None

    def _is_missing(self, matrix: Matrix, first: int, last: int) -> bool:
        """Rows of a woven matrix are not in the strip that was decoded last."""
        if not isinstance(matrix.source, Woven):
            return False
        known = self._strip
        return known is None or known.source is not matrix.source or not known.first <= first < last <= known.last

    def _rows_of_strip(self, matrix: Matrix, source: Woven, first: int, last: int) -> Tensor:
        """Rows of a woven matrix, in memory that the next strip takes. Nothing may be under way where they are missing.

        Strips begin where they are missed: tiles come in order.
        """
        import torch

        if self._is_missing(matrix, first, last):
            if self._room is None:
                self._room = torch.empty(self._strip_nbytes, dtype=torch.uint8)
            pitch = source.shape[1] * source.item_nbytes
            end = min(source.shape[0], first + self._strip_nbytes // pitch)
            rows = self._room[: (end - first) * pitch].view(torch_dtype(matrix.source_dtype)).view(-1, source.shape[1])
            for strand in source.strands:
                self._weave(strand, rows, first, end)
            self._strip = _Strip(source, first, end, rows)
        assert self._strip is not None
        return self._strip.rows[first - self._strip.first : last - self._strip.first]

    def _weave(self, strand: Strand, rows: Tensor, first: int, last: int) -> None:
        """Decode what a strand gives to rows `first` to `last` (excluded), and put it there."""
        part = overlap(strand, ((first, last), (0, rows.shape[1])))
        if part is None:
            return
        (begin, end, step), columns = part.box[0], slice(*part.box[1])
        target, along = rows[part.tile_slices], part.order.index(0)
        multiple, most = strand.row_multiple, strand_rows(strand, self._tile_elements)
        end = min(strand.shape[0], -(-end // multiple) * multiple)

        def decoded(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            return [strand.decode.format.decode(_parts(strand.decode, inputs), strand.shape[1], rows.dtype)]

        for at in range(begin // multiple * multiple, end, most):
            stop = min(at + most, end)
            low, high = (max(0, -(-(edge - begin) // step)) for edge in (at, stop))
            high = min(high, target.shape[along])
            if low < high:
                (tile,) = self._lane.submit(self._read_parts(strand.decode, at, stop), decoded).wait()
                taken = tile[begin + low * step - at :: step][: high - low, columns]
                target.narrow(along, low, high - low).copy_(taken.permute(part.order))

    def _peak(self, step: Transcode, rows: int, sink: Sink) -> float:
        """What is measured over all matrices that share a number; they follow each other in most tasks."""
        assert step.encoder is not None
        key = step.sharing[0].name
        if key not in self._peaks:
            self.finish(sink)  # the staging buffers are needed
            if len(self._peaks) == _KNOWN_PEAKS:
                del self._peaks[next(iter(self._peaks))]
            measured = [x for matrix in step.sharing for x in self._measured(matrix, rows, step)]
            self._peaks[key] = step.encoder.joined(measured)
        return self._peaks[key]

    def _measured(self, matrix: Matrix, rows: int, step: Transcode) -> Iterator[float]:
        """What the tiles of a matrix contribute."""
        import torch

        compute = _measuring(step, matrix)
        for first in range(0, matrix.shape[0], rows):
            last = min(first + rows, matrix.shape[0])
            (found,) = self._submit(matrix, first, last, compute).wait()
            if not isfinite(found):
                good = torch.isfinite(_tile(matrix, self._read(matrix, first, last), step.allow_nonfinite))
                raise _not_finite(matrix, first, last, good)
            yield float(found)

    def stored(self, matrix: Matrix, first: int, last: int) -> list[Tensor]:
        """Rows of a matrix as they are stored: one tensor, or all parts of a quantized one; valid until the next."""
        return self._read(matrix, first, last)

    def finish(self, sink: Sink) -> None:
        """Wait for all that is under way."""
        while self._under_way:
            self._deliver(sink)

    def take_losses(self) -> list[Loss]:
        """What was seen to be lost since the last call."""
        found, self._losses = self._losses, []
        return found

    def abandon(self) -> None:
        """Wait, after a failure, until nothing reads the staging buffers any more."""
        while self._under_way:
            self._under_way.popleft()[3].wait()

    def _deliver(self, sink: Sink) -> None:
        import torch

        step, first, last, job = self._under_way.popleft()
        *made, lost, is_finite = job.wait()
        if not bool(is_finite):
            raise self._cause(step, first, last)
        if lost.numel() and step.encoder:
            error, norm = lost.tolist()
            self._losses.append(Loss(step.encoder.name, step.matrix.name, error, norm))
        for part, tensor in zip(step.targets, made, strict=True):
            at, end = part.bounds(first, last)
            content = memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            stride = part.stride or part.row_nbytes
            is_spread = stride != part.row_nbytes
            rows = Rows(end - at, part.row_nbytes, stride, part.row_nbytes) if is_spread else None
            sink(part.file, part.offset + at * stride, content, rows)

    def _staged(self, nbytes: int) -> Tensor:
        """The staging buffer that has rested longest."""
        self._staging.rotate(-1)
        return self._staging[-1][:nbytes]

    def _read(self, matrix: Matrix, first: int, last: int) -> list[Tensor]:
        """Rows of a matrix as the source has them: one tensor, or all parts of a quantized one."""
        if isinstance(matrix.source, Decode):
            return self._read_parts(matrix.source, first, last)
        if isinstance(matrix.source, Woven):
            rows = self._rows_of_strip(matrix, matrix.source, first, last)
            tile = self._staged(rows.numel() * rows.element_size()).view(rows.dtype).view(rows.shape)
            return [tile.copy_(rows)]
        import numpy

        source, columns = matrix.source, matrix.shape[1]
        item = source.item_nbytes
        raw = self._staged((last - first) * columns * item)
        run = whole_run(source)
        if run is not None:
            self._sources[source.pieces[0].source_file].read_into(_memory(raw), run + first * columns * item)
        else:
            array = raw.numpy().view({2: numpy.uint16, 4: numpy.uint32}[item]).reshape(-1, columns)
            self._fill(source, ((first, last), (0, columns)), array)
        return [raw.view(torch_dtype(matrix.source_dtype)).view(-1, columns)]

    def _read_parts(self, source: Decode, first: int, last: int) -> list[Tensor]:
        raw = self._staged(staged_nbytes(source, first, last))
        parts, at = [], 0
        for part in source.parts:
            begin, end = part.bounds(first, last)
            content = raw[at : at + part.nbytes(first, last)]
            if part.values:
                rows, start = Rows(1, len(content), len(content), len(content)), begin * part.row_nbytes
            elif part.runs:
                pitch = (end - begin) * part.row_nbytes
                rows, start = Rows(part.runs, pitch, part.stride, pitch), begin * part.row_nbytes
            else:
                pitch = part.row_nbytes
                rows = Rows(end - begin, pitch, part.stride or pitch, pitch)
                start = begin * rows.stride
            self._sources[part.file].read_rows(_memory(content), part.offset + start, rows)
            parts.append(content.view(torch_dtype(part.dtype)).view(rows.count, -1))
            at += -(-len(content) // PART_ALIGNMENT) * PART_ALIGNMENT
        return parts

    def _cause(self, step: Transcode, first: int, last: int) -> CheckpointError:
        """Why these rows are not finite: the source is not, a dtype is too narrow, or a scale has no width in it."""
        import torch

        self.abandon()
        matrix = step.matrix
        inputs = self._read(matrix, first, last)
        wide = torch.isfinite(_tile(matrix._replace(dtype="F32"), inputs, step.allow_nonfinite))
        narrow = torch.isfinite(_tile(matrix, inputs, step.allow_nonfinite))
        if bool((wide & ~narrow).any()):
            return CheckpointError(
                f"{matrix.name} holds values too large for {matrix.dtype} in rows {first} to {last - 1}",
                "Choose another --dtype.",
            )
        if step.encoder and bool(narrow.all()):
            return CheckpointError(
                f"{matrix.name} holds finite values too large for {step.encoder.name} in rows {first} to {last - 1}",
                "Choose a symmetric format for it, or keep it with --ignore.",
            )
        return _not_finite(matrix, first, last, narrow)


def _not_finite(matrix: Matrix, first: int, last: int, good: Tensor) -> CheckpointError:
    of_expert = ""
    if matrix.expert_rows:
        row = matrix.at_row + first + int((~good).any(1).int().argmax())
        of_expert = f", row {row % matrix.expert_rows} of expert {row // matrix.expert_rows}"
    return CheckpointError(
        f"{matrix.name} holds NaN or infinite values in rows {first} to {last - 1}{of_expert}",
        "Repair the checkpoint, or count them as zero with --allow-nonfinite.",
    )


def parts_in(matrix: Matrix, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """What was read of a quantized matrix, by suffix."""
    assert isinstance(matrix.source, Decode)
    return _parts(matrix.source, inputs)


def floats_of(matrix: Matrix, inputs: Sequence[Tensor]) -> Tensor:
    """What was read of a matrix, decoded, as float32; it may be the very memory that was read into.

    Raises:
        FormatError: stored values contradict each other.
    """
    return _tile(matrix._replace(dtype="F32"), inputs, allow_nonfinite=False)


def _memory(tensor: Tensor) -> memoryview:
    return memoryview(tensor.numpy().data)


def _tile(matrix: Matrix, inputs: Sequence[Tensor], allow_nonfinite: bool) -> Tensor:
    """Rows of a matrix in the dtype that it is taken as, from what was read of it."""
    import torch

    dtype = torch_dtype(matrix.dtype)
    # What is not finite in the source counts as zero, what is too large for the dtype does not.
    own = None if allow_nonfinite and dtype == torch.float16 else dtype
    if isinstance(matrix.source, Decode):
        tile = matrix.source.format.decode(_parts(matrix.source, inputs), matrix.shape[1], own)
    else:
        tile = inputs[0] if own is None else inputs[0].to(dtype)
    return torch.nan_to_num(tile, nan=0.0, posinf=0.0, neginf=0.0).to(dtype) if allow_nonfinite else tile


def _parts(source: Decode, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    return {part.suffix: tensor for part, tensor in zip(source.parts, inputs, strict=True)}


def _measuring(step: Transcode, matrix: Matrix) -> Compute:
    """What a device does with a tile to find what it contributes, which is not finite where a value is not."""

    def compute(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        assert step.encoder is not None
        return [step.encoder.measured(_tile(matrix, inputs, step.allow_nonfinite))]

    return compute


def _encoding(step: Transcode, peak: float, sampled: int) -> Compute:
    """What a device does with the inputs of a tile.

    Results are the rows of all parts, squared error and norm of `sampled` rows (nothing for 0), and whether scales are
    finite.
    """

    def compute(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        import torch

        source, nothing = step.matrix.source, torch.empty(0)
        if step.encoder is None:  # what is not finite is passed on; only a narrow dtype can make it so
            if step.matrix.dtype != "F16":
                tile = _tile(step.matrix, inputs, step.allow_nonfinite)
                return tile, nothing, torch.ones((), dtype=torch.bool, device=tile.device)
            wide = _tile(step.matrix._replace(dtype="F32"), inputs, step.allow_nonfinite)
            tile = wide.half()
            return tile, nothing, ~(tile.isinf() & wide.isfinite()).any()
        lost = nothing
        if isinstance(source, Decode) and step.is_retold:
            made = step.encoder.retold(source.format, _parts(source, inputs))
        else:
            tile = _tile(step.matrix, inputs, step.allow_nonfinite)
            if sampled:  # first, since its memory is free again when the tile is encoded
                lost = _lost(step.encoder, tile[:sampled], peak)
            made = step.encoder.encode(tile, peak)
        scales = step.encoder.checked(made)
        is_finite = scales != EXPONENT_NAN if scales.dtype == torch.uint8 else torch.isfinite(scales.float())
        return *made, lost, is_finite.all()

    return compute


def _lost(encoder: Format, rows: Tensor, peak: float) -> Tensor:
    """Squared error and squared norm, float64 [2]."""
    import torch

    floats = rows.float()  # of float32 the rows themselves, which must not change
    error = encoder.read_again(rows, peak).sub_(floats).square_().sum(dtype=torch.float64)
    return torch.stack((error, floats.square().sum(dtype=torch.float64)))
