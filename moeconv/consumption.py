"""Deleting a source while it is converted, for disks that cannot hold both (`--consume-source`).

A weight file goes when every task that reads it is done: its bytes durable in `DST.partial`, read again from the disk
and found to be what the source makes. Tasks then run in the order of the plan and space is taken as it is needed, so
that the run needs what `peak_disk` says, and no more.

A run that dies has to be planned again, from headers that are deleted by then. So before a file goes, a stand-in with
its name and size takes its place in `DST.partial/.moeconv-consumed`: a sparse file of its header and of tensors of at
most `MAX_PLANNED_BYTES`, which is all that planning reads. Its time stands in a file beside it, which copies keep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from moeconv.checkpoint import CONSUMED, TIME_SUFFIX, Checkpoint
from moeconv.errors import CheckpointError, OutputError
from moeconv.explain import Disk, stored_specs
from moeconv.files import Files
from moeconv.header import HeaderError, header_length, header_problem, parse_header
from moeconv.plan import Plan
from moeconv.small_tensors import MAX_PLANNED_BYTES
from moeconv.tasks import Task, source_files

#: Tasks are begun until as much as this is written and not journalled: files go that much later than they could.
LAG_BYTES = 224 << 20
#: What a stand-in has for each tensor in its header, and file systems have for a file, about.
_NAME_BYTES, _FILE_BYTES = 256, 4096


def check_consumable(source: Checkpoint, files: Files) -> None:
    """Refuse what cannot be deleted safely, or would free no space.

    Raises:
        OutputError: weight files that are links, or have further names.
    """
    for file, path in zip(source.files, source.weight_paths, strict=True):
        if files.is_link(path):
            raise OutputError(
                f"{path} is a link: to delete it would free nothing, or take the file from others who link to it",
                "Give the folder that holds the files themselves, or leave out --consume-source.",
            )
        if files.count_names(path) > 1:
            raise OutputError(
                f"{source.root / file.path} has further names (hard links): to delete one frees nothing",
                "Remove the other names, or leave out --consume-source.",
            )


def peak_disk(plan: Plan, destination: Path, files: Files, done: Iterable[str] = ()) -> Disk:
    """What a run that deletes its source needs on the destination's disk, beside what is there already.

    Args:
        plan: what is done.
        destination: the folder that is to exist.
        files: door to the file system.
        done: ids of tasks that an earlier run did.
    """
    is_shared = files.disk_number(plan.source.root) == files.disk_number(destination)
    finished = set(done)
    tasks = [task for task in plan.tasks if task.id not in finished]
    left = Counter(number for task in tasks for number in source_files(task))
    # Headers and other files, and what stands in for files that are gone.
    small = [spec.nbytes for spec in stored_specs(plan.source.tensors.values()) if spec.nbytes <= MAX_PLANNED_BYTES]
    extra = max(0, plan.output_nbytes - sum(task.nbytes for task in plan.tasks))
    held = peak = extra + sum(small) + _NAME_BYTES * len(plan.source.tensors) + _FILE_BYTES * len(plan.source.files)
    for task in tasks:
        held += task.nbytes
        peak = max(peak, held)
        for number in source_files(task):
            left[number] -= 1
            if not left[number] and is_shared:
                held -= plan.source.files[number].nbytes
    ahead = min(LAG_BYTES, sum(task.nbytes for task in tasks))
    ahead += plan.memory.jobs * max((task.nbytes for task in tasks), default=0)
    return Disk(peak + ahead, files.free_bytes(destination))


class Consumption:
    """Deletes weight files of a source, each when nothing needs it any more.

    Args:
        plan: what is done.
        partial: the folder of the unfinished run.
        files: door to the file system.
        tasks: that are still to be done.
    """

    def __init__(self, plan: Plan, partial: Path, files: Files, tasks: Iterable[Task]) -> None:
        self._source = plan.source
        self._folder = partial / CONSUMED
        self._files = files
        self._left = Counter(number for task in tasks for number in source_files(task))
        read = {number for task in plan.tasks for number in source_files(task)}
        self._consumed = {number for number, file in enumerate(plan.source.files) if file.path in plan.source.stand_ins}
        self._kept = [number for number in range(len(plan.source.files)) if number not in self._left]
        self._unread = [number for number in self._kept if number not in read]

    def has_consumed(self, number: int) -> bool:
        """Whether a weight file is gone, in this run or before."""
        return number in self._consumed

    def begin(self) -> None:
        """Delete what an earlier run could have deleted when it died."""
        for number in self._kept:
            if number not in self._unread:
                self._consume(number)

    def note(self, tasks: Iterable[Task]) -> None:
        """Tasks are durable, checked and journalled."""
        for task in tasks:
            for number in sorted(source_files(task)):
                self._left[number] -= 1
                if not self._left[number]:
                    self._consume(number)

    def end(self) -> None:
        """Delete the files that nothing of the result is made from, when all else is done."""
        for number in self._unread:
            self._consume(number)

    def _consume(self, number: int) -> None:
        file = self._source.files[number]
        path = self._source.root / file.path
        if number in self._consumed:
            return
        now = self._files.stat(path)
        if (now.nbytes, now.mtime_ns) != (file.nbytes, file.mtime_ns):
            raise CheckpointError(
                f"{path} changed while it was read",
                "It was not deleted. Restore it as it was, with its time, then run the same command again.",
            )
        stand_in = self._folder / file.path
        self._files.make_folder(stand_in.parent)
        self._write_stand_in(number, path, stand_in)
        time = stand_in.with_name(stand_in.name + TIME_SUFFIX)
        self._files.write_whole(time, str(file.mtime_ns).encode(), sync=True)
        self._files.sync_folder(stand_in.parent)
        self._files.sync_folder(self._folder.parent)
        self._consumed.add(number)
        self._files.remove_file(path)
        self._files.sync_folder(path.parent)

    def _write_stand_in(self, number: int, path: Path, stand_in: Path) -> None:
        nbytes = self._source.files[number].nbytes
        reading = self._files.open_read(path)
        if self._files.exists(stand_in):  # of a run that died before the file went
            self._files.remove_file(stand_in)
        writing = self._files.create(stand_in, nbytes, reserve=False)
        try:

            def copy(offset: int, size: int) -> bytes:
                content = bytearray(size)
                reading.read_into(memoryview(content), offset)
                writing.write_at(bytes(content), offset)
                return bytes(content)

            try:
                length = header_length(copy(0, 8), nbytes)
                _, placed = parse_header(copy(8, length), nbytes - 8 - length)
            except HeaderError as error:
                raise CheckpointError.of([header_problem(str(path), error)]) from None
            for spec, offset in placed:
                if 0 < spec.nbytes <= MAX_PLANNED_BYTES:
                    copy(8 + length + offset, spec.nbytes)
            writing.sync()
        finally:
            reading.close()
            writing.close()
