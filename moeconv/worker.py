"""Runs steps: reads ranges of source files, and hands finished runs of bytes to a sink.

The sink writes them (executor) or compares them (verify); the reading side is the same, so what `verify`
checks is exactly what a run does. Memory is one buffer a worker, whatever the size of a tensor.
"""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeconv.errors import CheckpointError
from moeconv.files import Files, ReadFile, Rows
from moeconv.steps import (
    Copy,
    Decode,
    Overlap,
    Piece,
    Ranges,
    Rearrange,
    Step,
    Transcode,
    Zeros,
    overlap,
    rows_of,
    tile_rows,
    tiles_of,
    whole_run,
)  # fmt: skip

if TYPE_CHECKING:
    import numpy
    import torch

#: Receives target file number, offset and bytes, and how they are spread where they are not one run. The bytes are
#: only valid during the call.
Sink = Callable[[int, int, memoryview, Rows | None], None]
#: Bytes of one read and write. Larger ones fall out of the second-level cache, smaller ones cost more calls; measured
#: on two threads, 2 GB: 128 KiB 0.49 s, 256 KiB 0.43 s, 512 KiB 0.39 s, `cp` 0.82 s.
COPY_BYTES = 512 << 10
_OPEN_FILES = 16
#: glibc maps blocks that are larger than any freed so far anew each time, and their pages are cleared again; up to 32
#: MiB. Freeing one of this size first leaves a fifth of the page faults of a run.
_REUSED_NBYTES = (32 << 20) - (64 << 10)
_BAD_STRIDE, _PADDING = 512, 64


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(
        torch,
        {
            "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F8_E4M3": "float8_e4m3fn", "I8": "int8",
            "U8": "uint8", "I32": "int32", "F8_E8M0": "float8_e8m0fnu",
        }[name],
    )  # fmt: skip
    return dtype


def _not_finite(step: Transcode, tile: torch.Tensor, first: int, last: int) -> CheckpointError:
    """Why a scale of these rows is not finite: the rows are not, or a range has no width in their dtype."""
    import torch

    name = step.encoder.name if step.encoder else ""
    if bool(torch.isfinite(tile).all()):
        return CheckpointError(
            f"{step.name} holds finite values too large for {name} in rows {first} to {last - 1}",
            "Choose a symmetric format for it, or keep it with --ignore.",
        )
    return CheckpointError(
        f"{step.name} holds NaN or infinite values in rows {first} to {last - 1}",
        "Repair the checkpoint, or count them as zero with --allow-nonfinite.",
    )


class OpenFiles:
    """Source files by number, opened when needed; at most a few at once. For one thread."""

    def __init__(self, files: Files, paths: Sequence[Path]) -> None:
        self._files = files
        self._paths = paths
        self._open: OrderedDict[int, ReadFile] = OrderedDict()

    def __getitem__(self, number: int) -> ReadFile:
        file = self._open.get(number)
        if file is None:
            if len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            file = self._open[number] = self._files.open_read(self._paths[number])
        else:
            self._open.move_to_end(number)
        return file

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()


class Worker:
    """One thread's buffer and open files.

    Args:
        files: door to the file system.
        sources: paths of the source files, by number.
        buffer_nbytes: size of the buffer; a rearrangement keeps what it reads and what it makes in it.
    """

    def __init__(self, files: Files, sources: Sequence[Path], buffer_nbytes: int) -> None:
        self._sources = OpenFiles(files, sources)
        self._buffer = memoryview(mmap.mmap(-1, buffer_nbytes))  # page-aligned: the kernel copies whole pages
        self._chunk = self._buffer[:COPY_BYTES]
        self._is_single = False

    def close(self) -> None:
        self._sources.close()

    def run(self, step: Step, sink: Sink) -> None:
        """Do one step."""
        if isinstance(step, Copy):
            self._copy(step, sink)
        elif isinstance(step, Zeros):
            self._zeros(step, sink)
        elif isinstance(step, Rearrange):
            self._rearrange(step, sink)
        elif isinstance(step, Transcode):
            self._transcode(step, sink)
        else:
            sink(step.target_file, step.target_offset, memoryview(step.content), None)

    def _copy(self, step: Copy, sink: Sink) -> None:
        source = self._sources[step.source_file]
        size = len(self._chunk)
        nbytes, begin, target = step.nbytes, step.source_offset, step.target_offset
        at = 0
        while at < nbytes:
            # Up to the next multiple in the target: page caches keep aligned writes in large folios.
            length = min(size - (target + at) % size, nbytes - at)
            chunk = self._chunk if length == size else self._chunk[:length]
            source.read_into(chunk, begin + at)
            sink(step.target_file, target + at, chunk, None)
            at += length

    def _zeros(self, step: Zeros, sink: Sink) -> None:
        chunk, size = self._chunk, len(self._chunk)
        chunk[:] = bytes(size)
        for at in range(0, step.nbytes, size):
            sink(step.target_file, step.target_offset + at, chunk[: min(size, step.nbytes - at)], None)

    def _transcode(self, step: Transcode, sink: Sink) -> None:
        import torch

        if not self._is_single:
            torch.set_num_threads(1)  # of this thread: tiles run side by side, one a worker
            torch.empty(_REUSED_NBYTES, dtype=torch.uint8)
            self._is_single = True
        rows = tile_rows(step)
        for first in range(step.first, step.last, rows):
            last = min(first + rows, step.last)
            if isinstance(step.source, Decode):
                tile = self._decoded(step.source, step.shape[1], first, last, _torch_dtype(step.dtype))
            else:
                tile = self._read_tile(step, step.source, first, last).to(_torch_dtype(step.dtype))
            if step.allow_nonfinite:
                tile = torch.nan_to_num(tile, nan=0.0, posinf=0.0, neginf=0.0)
            made = step.encoder.encode(tile) if step.encoder else (tile,)
            if step.encoder and not bool(torch.isfinite(made[1].float()).all()):
                raise _not_finite(step, tile, first, last)
            for part, tensor in zip(step.targets, made, strict=True):
                at, _ = part.bounds(first, last)
                content = memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
                sink(part.file, part.offset + at * part.row_nbytes, content, None)

    def _read_tile(self, step: Transcode, source: Rearrange, first: int, last: int) -> torch.Tensor:
        """Rows of a matrix as the source has them, in the worker's buffer."""
        import numpy
        import torch

        columns, item = step.shape[1], source.item_nbytes
        raw = self._buffer[: (last - first) * columns * item]
        run = whole_run(source)
        if run is not None:
            self._sources[source.pieces[0].source_file].read_into(raw, run + first * columns * item)
        else:
            dtype = {2: numpy.uint16, 4: numpy.uint32}[item]
            self._fill(source, ((first, last), (0, columns)), numpy.frombuffer(raw, dtype).reshape(-1, columns))
        return torch.frombuffer(raw, dtype=_torch_dtype(step.source_dtype)).view(-1, columns)

    def _decoded(self, source: Decode, columns: int, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows of a matrix that is stored quantized."""
        import torch

        parts = {}
        for part in source.parts:
            begin, end = part.bounds(first, last)
            content = bytearray((end - begin) * part.row_nbytes)
            self._sources[part.file].read_into(memoryview(content), part.offset + begin * part.row_nbytes)
            parts[part.suffix] = torch.frombuffer(content, dtype=_torch_dtype(part.dtype)).view(end - begin, -1)
        return source.format.decode(parts, columns, dtype)

    def _rearrange(self, step: Rearrange, sink: Sink) -> None:
        import numpy  # here, because a plan or a plain copy does without

        dtype = {1: numpy.uint8, 2: numpy.uint16, 4: numpy.uint32, 8: numpy.uint64}[step.item_nbytes]
        # What is read for a tile is larger than the tile where the source is interleaved; an eighth is for padding.
        last = len(step.block) - 1
        widest = max(axis.step for piece in step.pieces for axis in piece.source_view.axes if axis.of == last)
        tile_nbytes = (len(self._buffer) - _PADDING) // (1 + widest) * 7 // 8
        for ranges in tiles_of(step, tile_nbytes):
            shape = [last - first for first, last in ranges]
            made = self._buffer[: prod(shape) * step.item_nbytes]
            self._fill(step, ranges, numpy.frombuffer(made, dtype).reshape(shape))
            item, done = step.item_nbytes, 0
            for at, count, stride, length in rows_of([(first, last, 1) for first, last in ranges], step.block):
                rows = Rows(count, length * item, stride * item, length * item)
                content = made[done : done + count * rows.nbytes]
                sink(step.target_file, step.block_offset + at * item, content, rows)
                done += len(content)

    def _fill(self, step: Rearrange, ranges: Ranges, target: numpy.ndarray[Any, Any]) -> None:
        """Fill a tile from all pieces."""
        import numpy

        item = step.item_nbytes
        room = self._buffer[-(-target.nbytes // 64) * 64 :]
        for piece in step.pieces:
            part = overlap(piece, ranges)
            if part is None:
                continue
            rows = [len(range(*bounds)) for bounds in part.box[:-1]]
            first, last, last_step = part.box[-1]
            columns = last - first
            # Rows that lie a large power of two apart share few cache lines: transposing is five times slower.
            padding = _PADDING // item if columns * item % _BAD_STRIDE == 0 and part.is_transposed else 0
            box = room[: prod(rows) * (columns + padding) * item]
            self._read_box(piece, part, box, padding, item)
            read = numpy.frombuffer(box, target.dtype).reshape([*rows, columns + padding])[..., :columns:last_step]
            target[part.tile_slices] = read.transpose(part.order)

    def _read_box(self, piece: Piece, part: Overlap, box: memoryview, padding: int, item: int) -> None:
        """Read what a piece gives to a tile; rows of the box are `padding` elements longer than read."""
        source = self._sources[piece.source_file]
        done = 0
        for at, count, stride, length in rows_of(part.box, piece.source_view.block, joined=not padding):
            pitch = (length + padding) * item
            rows = Rows(count, length * item, stride * item, pitch)
            source.read_rows(box[done : done + count * pitch], piece.source_offset + at * item, rows)
            done += count * pitch
