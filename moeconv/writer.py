"""The destination: `DST.partial` while work goes on, `DST` when and only when it is complete.

    DST.partial/model-00001-of-00004.safetensors   final size from the start, header written first
    DST.partial/.moeconv-journal                   which tasks are done (`journal`)
    DST.partial/.moeconv-consumed/                 with --consume-source, what is left of deleted files (`consumption`)

At the end everything is synced, the folder gets its name in one rename, and the journal goes. A run that finds a
journal of the same plan goes on where that one stopped.

    DST.replaced    with --overwrite, the finished folder of before, for as long as the new one takes to get its name
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from moeconv.checkpoint import CONSUMED, JOURNAL, MANIFEST, TIME_SUFFIX
from moeconv.consumption import check_consumable, peak_disk
from moeconv.destination import (
    check_destination,
    check_foreign,
    finished_manifest,
    partial_of,
    remove_notes,
    replaced_of,
)
from moeconv.errors import CheckpointError, OutputError
from moeconv.explain import Disk, disk_of, size
from moeconv.files import Files, WriteFile
from moeconv.journal import Done, Journal
from moeconv.origin import differences, fingerprint_of, origin_of
from moeconv.plan import Plan, index_path
from moeconv.random_writes import check_random_writes
from moeconv.shards import TargetFile
from moeconv.tasks import Task

_COPY_BYTES = 1 << 20


class Writer:
    """Makes one destination folder from one plan. `open`, `write_at` and `journal` while working, then `finish`.

    Args:
        plan: what is made.
        destination: the folder that is to exist in the end.
        files: door to the file system.
        fsync: make data durable before saying so.
        overwrite: replace a finished folder that moeconv made, and start anew where a run was cut short.
        restart: start anew where a run was cut short, also where it was one of this plan.
        consumes: the source is deleted while it is read, so that space is not taken before it is needed.
    """

    def __init__(
        self, plan: Plan, destination: Path, files: Files, *, fsync: bool, overwrite: bool, restart: bool = False,
        consumes: bool = False,
    ) -> None:  # fmt: skip
        self.plan = plan
        self.destination = destination
        self.partial = partial_of(destination)
        self.replaced = replaced_of(destination)
        self.files = files
        self.fsync = fsync
        self.overwrite = overwrite
        self.restart = restart
        self.consumes = consumes
        self.origin = origin_of(plan, files)
        self.fingerprint = fingerprint_of(self.origin)
        self._journal: Journal | None = None

    def is_finished(self) -> bool:
        """Whether the destination is there already, made by this very plan.

        Raises:
            OutputError: it is there and is something else.
        """
        check_destination(self.plan.source.root, self.destination)
        if not self.files.exists(self.destination):
            return False
        check_foreign(self.destination, self.files)
        made_by = finished_manifest(self.destination, self.files) or {}
        if made_by.get("fingerprint") == self.fingerprint:
            damaged = self._damaged()
            if damaged is None:
                self._clear_up()
            elif not self.overwrite:
                raise OutputError(
                    f"{self.destination / damaged} is missing or was changed since moeconv made it",
                    "Make the folder anew with --overwrite.",
                )
            return damaged is None
        if not self.overwrite:
            raise OutputError(
                f"{self.destination} exists and was made by another plan: {differences(made_by, self.origin)}",
                "Choose another destination, or replace it with --overwrite.",
            )
        return False

    def _damaged(self) -> str | None:
        """The first file of the finished folder that is not as this plan makes it, as far as a look can tell."""
        index = index_path(self.plan)
        contents = {**self.plan.contents, **({index: self.plan.index} if index else {})}
        for entry in self.plan.copied_files:
            if not self._has(self.destination / entry.path, entry.nbytes):
                return entry.path
        for path, content in contents.items():
            is_sized = self._has(self.destination / path, len(content))
            if not is_sized or self.files.read_bytes(self.destination / path, len(content)) != content:
                return path
        return next((file.path for file in self.plan.files if not self._is_intact(file, self.destination)), None)

    def _has(self, path: Path, nbytes: int) -> bool:
        """Whether a regular file of that size is there."""
        try:
            return self.files.stat(path).nbytes == nbytes
        except CheckpointError:
            return False

    def _clear_up(self) -> None:
        """Remove what a run left that died behind its last rename; nothing of one that is still alive."""
        path = self.destination / JOURNAL
        if not self.files.exists(path):
            return
        journal = self.files.open_write(path)
        try:
            if journal.lock():
                if self.files.exists(self.replaced) and self._is_own(self.replaced):
                    self._discard(self.replaced, MANIFEST)
                remove_notes(self.destination, self.files)
        finally:
            journal.close()

    def _is_own(self, replaced: Path) -> bool:
        """Whether moeconv made that folder, or left it empty when it died while removing it."""
        if finished_manifest(replaced, self.files) is not None:
            return True
        return self.files.is_folder(replaced) and not any(True for _ in self.files.walk(replaced))

    def _check_replaced(self) -> None:
        if self.files.exists(self.replaced) and not self._is_own(self.replaced):
            raise OutputError(
                f"{self.replaced} exists and moeconv did not make it; --overwrite needs that name",
                "Rename it, remove it yourself, or choose another destination.",
            )

    def open(self) -> Mapping[str, Done]:
        """Make or take over `DST.partial`.

        Returns:
            The tasks that are done already, by id.

        Raises:
            OutputError: no space, another run at work, the rest of another plan, or a name that is taken.
        """
        self._check_replaced()
        if self.plan.source.stand_ins and not self.fsync:
            raise OutputError(
                f"{self.partial} holds the only copy of what files of {self.plan.source.root} held, which "
                "--consume-source has deleted, and --no-fsync could lose it",
                "Leave out --no-fsync.",
            )
        done: Mapping[str, Done] = {}
        if self.files.exists(self.partial):
            done = self._take_over()
            if not done:
                self._discard(self.partial, JOURNAL)
        if self.consumes:
            check_consumable(self.plan.source, self.files)
            done = {id_: task for id_, task in done.items() if task.is_checked}
            self._check_space(peak_disk(self.plan, self.destination, self.files, done))
        elif not done:
            self._check_space(disk_of(self.plan, self.destination, self.files))
        if self._journal is None:
            self._create()
        elif self.fsync:  # the run that began it may not have waited for the disk, or its folder was copied since
            self._sync_everything()
            self._sync_names(self.partial.parents if self.consumes else ())
        return done

    def _discard(self, folder: Path, last: str) -> None:
        """Remove a folder of ours, the file `last` at the end: without it, it would count as somebody else's."""
        for path, _ in list(self.files.walk(folder)):
            if path != last:
                self.files.remove_file(folder / path)
        self.files.remove_tree(folder)

    def _check_space(self, disk: Disk) -> None:
        if disk.free < disk.needed:
            raise OutputError(
                f"{self.destination} needs {size(disk.needed)} ({disk.needed:,} bytes) "
                f"and its disk has {size(disk.free)} ({disk.free:,} bytes) free",
                "Free space there, or choose a destination on another disk.",
            )

    def _create(self) -> None:
        new = [folder for folder in self.partial.parents if not self.files.exists(folder)]
        self.files.make_folder(self.partial)
        self._journal = self._locked(self.files.create(self.partial / JOURNAL, 0))
        check_random_writes(self.partial, self.files)
        for target in self.plan.files:
            file = self.files.create(self.partial / target.path, target.nbytes, reserve=not self.consumes)
            try:
                file.write_at(target.head, 0)
                if self.fsync:  # a head that is lost costs all that is done of the other files
                    file.sync()
            finally:
                file.close()
        self._sync_names(self.partial.parents if self.consumes else new)

    def _sync_names(self, made: Iterable[Path]) -> None:
        """Names have to last as well: a journal speaks of files, and of folders, that a power loss must not take."""
        for folder in (self.partial, self.partial.parent) if self.fsync else ():
            self.files.sync_folder(folder)
        for folder in made if self.fsync else ():
            if folder.parent != folder:
                self.files.sync_folder(folder.parent, is_ours=False)

    def _locked(self, file: WriteFile) -> Journal:
        if not file.lock():
            file.close()
            raise OutputError(
                f"another run is at work in {self.partial}", "Wait for it to end, or choose another destination."
            )
        return Journal(self.files, self.partial / JOURNAL, file, fsync=self.fsync)

    def _take_over(self) -> Mapping[str, Done]:
        """Tasks that an earlier run of the same plan finished; empty where nothing of it can be used."""
        path = self.partial / JOURNAL
        if not self.files.exists(path):
            if any(True for _ in self.files.walk(self.partial)):
                raise OutputError(
                    f"{self.partial} exists and has no journal: it is no unfinished run of moeconv",
                    "Remove it yourself, or choose another destination.",
                )
            return {}
        self._journal = self._locked(self.files.open_write(path))
        past = self._journal.read()
        is_same = past.fingerprint == self.fingerprint
        if past.fingerprint is not None and not is_same and not (self.overwrite or self.restart):
            self.close()
            raise OutputError(
                f"{self.partial} is an unfinished run of another plan: {differences(past.origin, self.origin)}",
                "Restore what differs, and finish that one with its own command: its source was consumed."
                if self._consumed()
                else "Finish that one with its own command, or begin anew with --restart, which discards it.",
            )
        is_usable = (
            past.done
            and is_same
            and not self.restart
            and all(self._is_intact(target, self.partial) for target in self.plan.files)
            and not any(self.files.is_elsewhere(self.partial / path) for path, _ in self.files.walk(self.partial))
        )
        if is_usable:
            return past.done
        self._check_replaceable()
        self.close()
        return {}

    def _consumed(self) -> list[str]:
        """Weight files of the source that are gone, of which this folder holds the only copy."""
        found = []
        for path, entry in (
            self.files.walk(self.partial / CONSUMED) if self.files.exists(self.partial / CONSUMED) else ()
        ):
            there = self.plan.source.root / path
            if entry is None or path.endswith(TIME_SUFFIX):
                continue
            if not self.files.exists(there) or self.files.stat(there).nbytes != entry.nbytes:
                found.append(path)
        return found

    def _check_replaceable(self) -> None:
        """Refuse to discard a folder that holds the only copy of weights."""
        consumed = self._consumed()
        if consumed:
            self.close()
            raise OutputError(
                f"{self.partial} holds the only copy of what {len(consumed)} files of {self.plan.source.root} held, "
                "which --consume-source has deleted",
                "Go on with the command that began it. Or restore those files in the source, and use --restart.",
            )

    def _is_intact(self, target: TargetFile, folder: Path) -> bool:
        path = folder / target.path
        if not self.files.exists(path) or self.files.stat(path).nbytes != target.nbytes:
            return False
        head = bytearray(len(target.head))
        file = self.files.open_read(path)
        try:
            file.read_into(memoryview(head), 0)
        finally:
            file.close()
        return bytes(head) == target.head

    @property
    def targets(self) -> tuple[Path, ...]:
        """Where the plan's weight files are made."""
        return tuple(self.partial / file.path for file in self.plan.files)

    def target(self, number: int) -> WriteFile:
        """A handle of target file `number`; the caller closes it."""
        return self.files.open_write(self.partial / self.plan.files[number].path)

    def journal(self, tasks: Sequence[Task], done: Sequence[Done]) -> None:
        """Make what `tasks` wrote durable, then note that they are done."""
        assert self._journal is not None
        if self.fsync:
            for number in sorted({task.steps[0].target_file for task in tasks}):
                file = self.target(number)
                try:
                    file.sync()
                finally:
                    file.close()
        if self._journal.is_empty:
            self._journal.begin(self.fingerprint, self.origin)
        self._journal.note(done)

    def write_others(self) -> None:
        """Write all files but the weights and the manifest."""
        source = self.plan.source
        for entry in self.plan.copied_files:
            self._copy_file(source.root / entry.path, self.partial / entry.path, entry.nbytes)
        for path, content in self.plan.contents.items():
            self.files.write_whole(self.partial / path, content)
        index = index_path(self.plan)
        if index:
            self.files.write_whole(self.partial / index, self.plan.index)

    def paths(self) -> list[str]:
        """Of all files of the result but the manifest."""
        index = index_path(self.plan)
        others = [file.path for file in self.plan.copied_files] + list(self.plan.contents) + [index] * bool(index)
        return [file.path for file in self.plan.files] + sorted(path for path in others if path)

    def finish(self, manifest: bytes) -> None:
        """Write the manifest, make everything durable, and give the folder its name."""
        source = self.plan.source
        self.files.write_whole(self.partial / MANIFEST, manifest)
        if self.fsync:
            self._sync_everything()
        for entry in source.sidecars:  # only now: a file that may not be written could not be opened to be synced
            self.files.copy_mode(source.root / entry.path, self.partial / entry.path)
        self._publish()
        remove_notes(self.destination, self.files)
        self.close()

    def _sync_everything(self) -> None:
        """Data, then the folders that name it. The journal may have synced some files; that costs nothing twice."""
        folders = {self.partial}
        for path, entry in self.files.walk(self.partial):
            folders.update(self.partial / parent for parent in Path(path).parents)
            if entry is not None:
                file = self.files.open_write(self.partial / path)
                try:
                    file.sync()
                finally:
                    file.close()
        for folder in sorted(folders, reverse=True):
            self.files.sync_folder(folder)

    def _publish(self) -> None:
        self._check_replaced()
        if self.files.exists(self.destination):
            self.is_finished()  # raises if it is one that appeared during the run, and not ours to replace
            if self.files.exists(self.replaced):
                self._discard(self.replaced, MANIFEST)
            self.files.rename(self.destination, self.replaced)
        self.files.rename(self.partial, self.destination)
        if self.fsync:
            self.files.sync_folder(self.destination.resolve().parent)
        if self.files.exists(self.replaced):  # or of a run that died between its two renames
            self._discard(self.replaced, MANIFEST)

    def _copy_file(self, source: Path, target: Path, nbytes: int) -> None:
        self.files.make_folder(target.parent)
        if self.files.exists(target):
            self.files.remove_file(target)
        reading, writing = self.files.open_read(source), self.files.create(target, nbytes)
        try:
            buffer = memoryview(bytearray(min(_COPY_BYTES, max(1, nbytes))))
            for at in range(0, nbytes, _COPY_BYTES):
                chunk = buffer[: min(_COPY_BYTES, nbytes - at)]
                reading.read_into(chunk, at)
                writing.write_at(chunk, at)
        finally:
            reading.close()
            writing.close()

    def close(self) -> None:
        """Give up the lock; `DST.partial` stays as it is."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
