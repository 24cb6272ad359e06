"""Rows of stored matrices, decoded tile by tile on several threads, for those that look and write nothing."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import lcm
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from moeconv.checkpoint import Checkpoint
from moeconv.device import CpuDevice
from moeconv.errors import UsageError
from moeconv.files import Files
from moeconv.moves import Fill
from moeconv.plan import BASELINE_BYTES, COPY_BUFFER_BYTES, NAME_BYTES, TORCH_BYTES, Memory, Options, default_jobs
from moeconv.steps import Decode, Matrix, Rearrange, staged_nbytes, whole_run
from moeconv.transcoder import floats_of, parts_in
from moeconv.transcodes import rows_between_blocks, stored_matrix
from moeconv.worker import Worker

if TYPE_CHECKING:
    from torch import Tensor

#: Elements of a tile, the first that the budget allows.
TILE_ELEMENTS = tuple(1 << bits for bits in range(19, 14, -1))
#: What all threads together take by default, if the smallest tiles allow.
_ALL_THREADS_BYTES = 256 << 20
#: What is computed from a tile, for each of its elements, besides the tile itself.
_COMPUTED_NBYTES = 36
#: Room for each row that is read apart from the others, and copies of a tile that rearranging needs, as in `budget`.
_GAP_NBYTES, _REARRANGED_NBYTES = 64, 8

T = TypeVar("T")


class Hand(ABC, Generic[T]):
    """What one thread does with items, with files and buffers of its own."""

    @abstractmethod
    def take(self, item: T) -> None:
        """Do one item."""

    @abstractmethod
    def close(self) -> None:
        """Give back files and buffers."""


def in_threads(jobs: int, items: Iterable[T], begin: Callable[[], Hand[T]]) -> None:
    """Do all items on several threads; the first failure stops the others and is raised.

    Args:
        jobs: threads.
        items: taken one by one.
        begin: called once in each thread.
    """
    waiting: Iterator[T] = iter(items)
    lock = threading.Lock()
    stopped = threading.Event()

    def work() -> None:
        hand = begin()
        try:
            while not stopped.is_set():
                with lock:
                    item = next(waiting, None)
                if item is None:
                    return
                hand.take(item)
        except BaseException:
            stopped.set()
            raise
        finally:
            hand.close()

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(work) for _ in range(jobs)]
        try:
            for future in futures:
                future.result()
        finally:
            stopped.set()


class Look(NamedTuple):
    """Matrices of one shape that are read side by side.

    Attributes:
        matrices: one of each checkpoint.
        rows: they can be cut at multiples of so many.
    """

    matrices: tuple[Matrix, ...]
    rows: int

    @classmethod
    def at(cls, *fills: Fill) -> Look:
        """The matrices that fills are made from."""
        matrices = tuple(stored_matrix(fill) for fill in fills)
        formats = [matrix.source.format for matrix in matrices if isinstance(matrix.source, Decode)]
        return cls(matrices, lcm(*(rows_between_blocks(made, matrices[0].shape[1]) for made in formats)))

    def tiles(self, elements: int) -> Iterator[tuple[int, int]]:
        """First and last row (excluded) of each tile of about so many elements."""
        count, columns = self.matrices[0].shape
        step = _tile_rows(self, elements)
        return ((first, min(first + step, count)) for first in range(0, count, step)) if columns else iter(())


def _tile_rows(look: Look, elements: int) -> int:
    return max(1, elements // max(1, look.matrices[0].shape[1]) // look.rows) * look.rows


def looking_memory(looks: Iterable[Look], names: int, options: Options, baseline: int = 0) -> Memory:
    """What looking at matrices needs at most.

    Args:
        looks: one of each kind at least.
        names: tensors of all checkpoints.
        options: threads and budget.
        baseline: what something else takes beside it.

    Raises:
        UsageError: a budget that is too small, with the least that works.
    """
    kinds = {tuple([(m.shape, id(_decoder(m)), m.source_dtype) for m in look.matrices]): look for look in looks}
    baseline += BASELINE_BYTES + (TORCH_BYTES if kinds else 0)
    jobs, names = default_jobs(options.jobs), names * NAME_BYTES
    room = None if options.max_memory is None else options.max_memory - baseline - names
    needs = Memory(baseline, names, jobs, COPY_BUFFER_BYTES, COPY_BUFFER_BYTES)
    for elements in TILE_ELEMENTS if kinds else ():
        found = [_needs(look, elements) for look in kinds.values()]
        needs = Memory(
            baseline, names, jobs, max(item.buffer for item in found), max(item.scratch for item in found),
            max(item.staging for item in found), elements,
        )  # fmt: skip
        if jobs * (needs.buffer + needs.scratch) <= (_ALL_THREADS_BYTES if room is None else room):
            break
    each = needs.buffer + needs.scratch
    if room is not None and room < each:
        raise UsageError(
            f"--max-memory {options.max_memory:,} is less than it takes to look at these matrices",
            f"The least that works is {baseline + names + each:,} bytes: "
            f"--max-memory {-(-(baseline + names + each) // 1_000_000)}MB.",
        )
    return needs._replace(jobs=jobs if room is None else max(1, min(jobs, room // each)))


def _decoder(matrix: Matrix) -> object:
    if isinstance(matrix.source, Decode):
        return matrix.source.format
    return isinstance(matrix.source, Rearrange) and whole_run(matrix.source) is None


def _needs(look: Look, elements: int) -> Memory:
    """For one thread: the buffer of a checkpoint, the largest staging buffer, and all else, other buffers included."""
    rows = min(look.matrices[0].shape[0], _tile_rows(look, elements))
    held = rows * look.matrices[0].shape[1]
    buffer, scratch, staging = COPY_BUFFER_BYTES, held * _COMPUTED_NBYTES, 0
    for matrix in look.matrices:
        own = staged_nbytes(matrix.source, 0, rows)
        live = matrix.source.format.live_nbytes if isinstance(matrix.source, Decode) else 8
        if isinstance(matrix.source, Rearrange) and whole_run(matrix.source) is None:
            buffer = max(buffer, held * _REARRANGED_NBYTES + _GAP_NBYTES * sum(matrix.shape))
        scratch += held * live
        staging = max(staging, own)
    count = len(look.matrices)
    return Memory(0, 0, 1, buffer, scratch + count * staging + (count - 1) * buffer, staging)


class Reader:
    """One thread's way to the matrices of a checkpoint.

    Args:
        files: door to the file system.
        folder: the checkpoint.
        memory: what `looking_memory` found.
    """

    def __init__(self, files: Files, folder: Checkpoint, memory: Memory) -> None:
        self._worker = Worker(files, folder.weight_paths, memory, CpuDevice())

    def floats(self, matrix: Matrix, first: int, last: int) -> Tensor:
        """Rows as float32, not to be changed, and valid until the next call.

        Raises:
            FormatError: stored values contradict each other.
        """
        return floats_of(matrix, self._worker.read(matrix, first, last))

    def coded(self, matrix: Matrix, first: int, last: int) -> tuple[dict[str, Tensor], Tensor]:
        """Rows of a quantized matrix: its parts by suffix, and what they stand for.

        Raises:
            FormatError: stored values contradict each other.
        """
        inputs = self._worker.read(matrix, first, last)
        return parts_in(matrix, inputs), floats_of(matrix, inputs)

    def close(self) -> None:
        """Close all files."""
        self._worker.close()
