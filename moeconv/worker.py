"""Runs steps: reads ranges of source files, and hands finished runs of bytes to a sink.

The sink writes them (executor) or compares them (verify); the reading side is the same, so what `verify`
checks is exactly what a run does. Memory is one buffer a worker, whatever the size of a tensor.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeconv.files import Files, OpenFiles, Rows
from moeconv.losses import Loss
from moeconv.steps import Copy, Matrix, Piece, Rearrange, Step, Transcode, Zeros
from moeconv.tiles import Overlap, Ranges, overlap, rows_of, tiles_of
from moeconv.transcoder import Sink, Transcoder

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

    from moeconv.device import Device
    from moeconv.plan import Memory

#: Bytes of one read and write. Larger ones fall out of the second-level cache, smaller ones cost more calls; measured
#: on two threads, 2 GB: 128 KiB 0.49 s, 256 KiB 0.43 s, 512 KiB 0.39 s, `cp` 0.82 s.
COPY_BYTES = 512 << 10
_BAD_STRIDE, _PADDING = 512, 64


class Worker:
    """One thread's buffer, open files and lane of a device.

    Args:
        files: door to the file system.
        sources: paths of the source files, by number.
        memory: what the plan allows; a rearrangement keeps what it reads and what it makes in one buffer.
        device: where matrices are encoded.
    """

    def __init__(self, files: Files, sources: Sequence[Path], memory: Memory, device: Device) -> None:
        self._sources = OpenFiles(files, sources)
        self._memory = memory
        self._buffer = memoryview(mmap.mmap(-1, memory.buffer))  # page-aligned: the kernel copies whole pages
        self._chunk = self._buffer[:COPY_BYTES]
        self._device = device
        self._transcoder: Transcoder | None = None

    def close(self) -> None:
        if self._transcoder is not None:
            self._transcoder.abandon()
        self._sources.close()

    def run(self, step: Step, sink: Sink) -> None:
        """Do one step, or begin it: `finish` must follow."""
        if isinstance(step, Copy):
            self._copy(step, sink)
        elif isinstance(step, Zeros):
            self._zeros(step, sink)
        elif isinstance(step, Rearrange):
            self._rearrange(step, sink)
        elif isinstance(step, Transcode):
            self._own_transcoder().run(step, sink)
        else:
            sink(step.target_file, step.target_offset, memoryview(step.content), None)

    def read(self, matrix: Matrix, first: int, last: int) -> list[Tensor]:
        """Rows of a matrix as they are stored, where no steps are run; valid until the next call."""
        return self._own_transcoder().stored(matrix, first, last)

    def _own_transcoder(self) -> Transcoder:
        if self._transcoder is None:  # its lane belongs to the thread that asks for it
            self._transcoder = Transcoder(self._device.lane(), self._sources, self._fill_tile, self._memory)
        return self._transcoder

    def finish(self, sink: Sink) -> None:
        """Wait for all steps that were begun."""
        if self._transcoder is not None:
            self._transcoder.finish(sink)

    def take_losses(self) -> list[Loss]:
        """What encoding was seen to lose since the last call."""
        return [] if self._transcoder is None else self._transcoder.take_losses()

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
            room = self._buffer[-(-len(made) // 64) * 64 :]
            self._fill(step, ranges, numpy.frombuffer(made, dtype).reshape(shape), room)
            item, done = step.item_nbytes, 0
            for at, count, stride, length in rows_of([(first, last, 1) for first, last in ranges], step.block):
                rows = Rows(count, length * item, stride * item, length * item)
                content = made[done : done + count * rows.nbytes]
                sink(step.target_file, step.block_offset + at * item, content, rows)
                done += len(content)

    def _fill_tile(self, step: Rearrange, ranges: Ranges, target: numpy.ndarray[Any, Any]) -> None:
        self._fill(step, ranges, target, self._buffer)

    def _fill(self, step: Rearrange, ranges: Ranges, target: numpy.ndarray[Any, Any], room: memoryview) -> None:
        """Fill a tile from all pieces; what is read for it fits into `room`."""
        import numpy

        item = step.item_nbytes
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
