"""Runs steps: reads ranges of source files, and hands finished runs of bytes to a sink.

The sink writes them (executor) or compares them (verify); the reading side is the same, so what `verify`
checks is exactly what a run does. Memory is one buffer a worker, whatever the size of a tensor.
"""

from __future__ import annotations

import itertools
import mmap
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeconv.files import Files, ReadFile
from moeconv.steps import Copy, Overlap, Piece, Rearrange, Step, Tile, Zeros, overlap, tiles_of
from moeconv.tensors import row_major_strides

if TYPE_CHECKING:
    import numpy

#: Receives target file number, offset and bytes. The bytes are only valid during the call.
Sink = Callable[[int, int, memoryview], None]
#: Bytes of one read and write. Larger ones fall out of the second-level cache, smaller ones cost more calls; measured
#: on two threads, 2 GB: 128 KiB 0.49 s, 256 KiB 0.43 s, 512 KiB 0.39 s, `cp` 0.82 s.
COPY_BYTES = 512 << 10
_OPEN_FILES = 16


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

    def close(self) -> None:
        self._sources.close()

    def run(self, step: Step, sink: Sink) -> None:
        """Do one step."""
        if isinstance(step, Copy):
            self._copy(step, sink)
        elif isinstance(step, Zeros):
            self._zeros(step, sink)
        else:
            self._rearrange(step, sink)

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
            sink(step.target_file, target + at, chunk)
            at += length

    def _zeros(self, step: Zeros, sink: Sink) -> None:
        chunk, size = self._chunk, len(self._chunk)
        chunk[:] = bytes(size)
        for at in range(0, step.nbytes, size):
            sink(step.target_file, step.target_offset + at, chunk[: min(size, step.nbytes - at)])

    def _rearrange(self, step: Rearrange, sink: Sink) -> None:
        import numpy  # here, because a plan or a plain copy does without

        dtype = {1: numpy.uint8, 2: numpy.uint16, 4: numpy.uint32, 8: numpy.uint64}[step.item_nbytes]
        widest = max(piece.source_view.axes[-1].step if piece.source_view.axes else 1 for piece in step.pieces)
        widest = max(widest, *(axis.step for piece in step.pieces for axis in piece.source_view.axes))
        tile_nbytes = len(self._buffer) // (1 + widest) // 8 * 8
        for tile in tiles_of(step, tile_nbytes):
            made = self._buffer[: tile.nbytes]
            target = numpy.frombuffer(made, dtype).reshape([last - first for first, last in tile.ranges])
            self._fill(step, tile, target)
            sink(step.target_file, tile.target_offset, made)

    def _fill(self, step: Rearrange, tile: Tile, target: numpy.ndarray[Any, Any]) -> None:
        import numpy

        room = self._buffer[-(-tile.nbytes // 8) * 8 :]
        for piece in step.pieces:
            part = overlap(piece, tile.ranges)
            if part is None:
                continue
            shape = [-(-(last - first) // step_) for first, last, step_ in part.box[:-1]]
            shape.append(part.box[-1][1] - part.box[-1][0])
            box = room[: prod(shape) * step.item_nbytes]
            self._read_box(piece, part, box, step.item_nbytes)
            read = numpy.frombuffer(box, target.dtype).reshape(shape)[..., :: part.box[-1][2]]
            target[part.tile_slices] = read.transpose(part.order)

    def _read_box(self, piece: Piece, part: Overlap, box: memoryview, item: int) -> None:
        source = self._sources[piece.source_file]
        done = 0
        for at, count in _runs(part, piece.source_view.block):
            source.read_into(box[done : done + count * item], piece.source_offset + at * item)
            done += count * item


def _runs(part: Overlap, block: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First element and length of each run of the source block that a box takes, in order."""
    strides = row_major_strides(tuple(block))
    axis = len(block) - 1
    length = part.box[axis][1] - part.box[axis][0]
    while axis > 0 and length == strides[axis - 1]:  # everything behind this axis is taken: rows join
        first, last, step = part.box[axis - 1]
        if step != 1:
            break
        axis -= 1
        length = (last - first) * strides[axis]
    start = sum(first * stride for (first, _, _), stride in zip(part.box[axis:], strides[axis:], strict=True))
    for indices in itertools.product(*(range(*bounds) for bounds in part.box[:axis])):
        yield start + sum(index * stride for index, stride in zip(indices, strides, strict=False)), length
