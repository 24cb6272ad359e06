"""The destination: `DST.partial` while work goes on, `DST` when and only when it is complete.

    DST.partial/model-00001-of-00004.safetensors   final size from the start, header written first
    DST.partial/.moeconv-journal                   empty; with the first batch of tasks a JSON line for the plan,
                                                   then one for each batch

A journal line follows the data it speaks of: with fsync on, tasks are journalled only after their bytes
are durable. Each line says whether they are, and in which boot it was written: a run may go on with other options
than it began with. At the end everything is synced, the folder gets its name in one rename, and the journal goes.
A run that finds a journal of the same plan goes on where that one stopped.

    DST.replaced    with --overwrite, the finished folder of before, for as long as the new one takes to get its name
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeconv.checkpoint import JOURNAL, MANIFEST, MAX_INDEX_BYTES, read_manifest
from moeconv.errors import CheckpointError, OutputError
from moeconv.explain import disk_of, size
from moeconv.files import Files, WriteFile
from moeconv.header import HeaderError, read_json
from moeconv.plan import Plan, index_path
from moeconv.shards import TargetFile
from moeconv.steps import Task

MAX_JOURNAL_BYTES = 1 << 30
_COPY_BYTES = 1 << 20


def finished_fingerprint(destination: Path, files: Files) -> str | None:
    """Fingerprint of the plan that made a finished folder, or None for a folder that moeconv did not make."""
    path = destination / MANIFEST
    if not files.exists(path):
        return None
    try:
        manifest = read_manifest(files.read_bytes(path, MAX_INDEX_BYTES))
    except (HeaderError, CheckpointError):
        return None
    value = manifest.get("fingerprint") if isinstance(manifest, dict) else None
    return value if isinstance(value, str) else None


def check_destination(source: Path, destination: Path) -> None:
    """Refuse a destination that is, holds, or lies in the source, and one that is a link.

    Raises:
        OutputError: such a destination.
    """
    source = Path(os.path.realpath(source))
    _check_apart(source, destination, f"the destination {destination}")
    if destination.name in ("", ".."):
        raise OutputError(f"the destination {destination} is no name for a new folder", "Write the folder's name.")
    for path in (partial_of(destination), replaced_of(destination)):
        _check_apart(source, path, f"{path}, which a run to {destination} makes anew,")
    for path in (destination, partial_of(destination), replaced_of(destination)):
        if os.path.islink(path):
            raise OutputError(
                f"{path} is a symbolic link, and moeconv makes folders under their own names",
                "Give the folder that the link leads to as the destination, or remove the link.",
            )


def check_foreign(destination: Path, files: Files) -> None:
    """Refuse a destination that exists and that moeconv did not make.

    Raises:
        OutputError: such a destination.
    """
    if files.exists(destination) and finished_fingerprint(destination, files) is None:
        raise OutputError(
            f"{destination} exists and moeconv did not make it",
            "Choose another destination, or remove it yourself.",
        )


def _check_apart(source: Path, path: Path, what: str) -> None:
    resolved = Path(os.path.realpath(path))  # also of a circle of links
    if resolved == source or source in resolved.parents or resolved in source.parents:
        raise OutputError(
            f"{what} and the source {source} lie in one another", "Choose a destination outside the source folder."
        )


def partial_of(destination: Path) -> Path:
    """Where a run works until the destination is complete."""
    return destination.with_name(destination.name + ".partial")


def replaced_of(destination: Path) -> Path:
    """Where a run puts the folder that it replaces."""
    return destination.with_name(destination.name + ".replaced")


class Writer:
    """Makes one destination folder from one plan. `open`, `write_at` and `journal` while working, then `finish`.

    Args:
        plan: what is made.
        destination: the folder that is to exist in the end.
        files: door to the file system.
        fsync: make data durable before saying so.
        overwrite: replace a finished folder that moeconv made, and start anew where a run was cut short.
    """

    def __init__(self, plan: Plan, destination: Path, files: Files, *, fsync: bool, overwrite: bool) -> None:
        self.plan = plan
        self.destination = destination
        self.partial = partial_of(destination)
        self.replaced = replaced_of(destination)
        self.files = files
        self.fsync = fsync
        self.overwrite = overwrite
        self._journal: WriteFile | None = None
        self._journal_nbytes = 0

    def is_finished(self) -> bool:
        """Whether the destination is there already, made by this very plan.

        Raises:
            OutputError: it is there and is something else.
        """
        check_destination(self.plan.source.root, self.destination)
        if not self.files.exists(self.destination):
            return False
        check_foreign(self.destination, self.files)
        made_by = finished_fingerprint(self.destination, self.files)
        if made_by == self.plan.fingerprint:
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
                f"{self.destination} exists and was made by another plan ({self._difference()})",
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
                self.files.remove_file(path)
        finally:
            journal.close()

    def _is_own(self, replaced: Path) -> bool:
        """Whether moeconv made that folder, or left it empty when it died while removing it."""
        if finished_fingerprint(replaced, self.files) is not None:
            return True
        return self.files.is_folder(replaced) and not any(True for _ in self.files.walk(replaced))

    def _check_replaced(self) -> None:
        if self.files.exists(self.replaced) and not self._is_own(self.replaced):
            raise OutputError(
                f"{self.replaced} exists and moeconv did not make it; --overwrite needs that name",
                "Rename it, remove it yourself, or choose another destination.",
            )

    def _difference(self) -> str:
        """Which of the things that make a plan differs from the finished folder's."""
        manifest: dict[str, Any] = read_manifest(self.files.read_bytes(self.destination / MANIFEST, MAX_INDEX_BYTES))
        source, recipe, tool = (
            value if isinstance(value := manifest.get(key), dict) else {} for key in ("source", "recipe", "tool")
        )
        plan = self.plan
        now = [
            {"path": file.path, "bytes": file.nbytes, "header_sha256": file.header_sha256} for file in plan.source.files
        ]
        then = source.get("files")
        different = [
            what
            for what, differs in (
                (f"layout {manifest.get('layout')}, not {plan.layout}", manifest.get("layout") != plan.layout),
                ("another source", now != then),
                ("another recipe", recipe.get("text") != plan.recipe.text),
                (f"moeconv {tool.get('version')}", tool.get("version") != _version()),
            )
            if differs
        ]
        return ", ".join(different) or "other options, or source files changed since"

    def open(self) -> frozenset[str]:
        """Make or take over `DST.partial`.

        Returns:
            Ids of the tasks that are done already.

        Raises:
            OutputError: no space, another run at work, the rest of another plan, or a name that is taken.
        """
        self._check_replaced()
        done: frozenset[str] = frozenset()
        if self.files.exists(self.partial):
            done = self._take_over()
            if not done:
                self._discard(self.partial, JOURNAL)
        if not done:
            self._check_space()
            self._create()
        return done

    def _discard(self, folder: Path, last: str) -> None:
        """Remove a folder of ours, the file `last` at the end: without it, it would count as somebody else's."""
        for path, _ in list(self.files.walk(folder)):
            if path != last:
                self.files.remove_file(folder / path)
        self.files.remove_tree(folder)

    def _check_space(self) -> None:
        disk = disk_of(self.plan, self.destination, self.files)
        if disk.free < disk.needed:
            raise OutputError(
                f"{self.destination} needs {size(disk.needed)} ({disk.needed:,} bytes) "
                f"and its disk has {size(disk.free)} ({disk.free:,} bytes) free",
                "Free space there, or choose a destination on another disk.",
            )

    def _create(self) -> None:
        new = [folder for folder in self.partial.parents if not self.files.exists(folder)]
        self.files.make_folder(self.partial)
        for folder in new if self.fsync else ():
            self.files.sync_folder(folder.parent)
        self._journal = self.files.create(self.partial / JOURNAL, 0)
        self._lock()
        for target in self.plan.files:
            file = self.files.create(self.partial / target.path, target.nbytes)
            try:
                file.write_at(target.head, 0)
            finally:
                file.close()
        self._journal_nbytes = 0

    def _lock(self) -> None:
        assert self._journal is not None
        if not self._journal.lock():
            self._journal.close()
            self._journal = None
            raise OutputError(
                f"another run is at work in {self.partial}", "Wait for it to end, or choose another destination."
            )

    def _take_over(self) -> frozenset[str]:
        """Tasks that an earlier run of the same plan finished; empty where nothing of it can be used."""
        path = self.partial / JOURNAL
        if not self.files.exists(path):
            if any(True for _ in self.files.walk(self.partial)):
                raise OutputError(
                    f"{self.partial} exists and has no journal: it is no unfinished run of moeconv",
                    "Remove it yourself, or choose another destination.",
                )
            return frozenset()
        self._journal = self.files.open_write(path)
        self._lock()
        head, done = self._read_journal(path)
        if head and head.get("fingerprint") != self.plan.fingerprint and not self.overwrite:
            raise OutputError(
                f"{self.partial} is an unfinished run of another plan",
                "Finish that one with its own command, or discard it with --overwrite.",
            )
        usable = (
            done
            and head.get("fingerprint") == self.plan.fingerprint
            and all(self._is_intact(target, self.partial) for target in self.plan.files)
        )
        if usable:
            return done
        self.close()
        return frozenset()

    def _read_journal(self, path: Path) -> tuple[dict[str, Any], frozenset[str]]:
        """First line, and the tasks whose data is there. From a damaged line on nothing counts, and is written over."""
        boot = self.files.boot_id()
        head: dict[str, Any] = {}
        done: set[str] = set()
        self._journal_nbytes = 0
        for line in self.files.read_bytes(path, MAX_JOURNAL_BYTES).splitlines(keepends=True):
            try:
                entry = read_json(line)
            except HeaderError:
                break
            ids = entry.get("done", []) if isinstance(entry, dict) else None
            if not line.endswith(b"\n") or not isinstance(ids, list) or not all(isinstance(id_, str) for id_ in ids):
                break
            head = head or entry
            if entry.get("fsync") is True or entry.get("boot") == boot != "":  # unsynced data dies with the kernel
                done.update(ids)
            self._journal_nbytes += len(line)
        return head, frozenset(done)

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

    def _append(self, line: dict[str, Any]) -> None:
        assert self._journal is not None
        content = json.dumps(line).encode() + b"\n"
        self._journal.write_at(content, self._journal_nbytes)
        self._journal_nbytes += len(content)
        if self.fsync:
            self._journal.sync()

    @property
    def targets(self) -> tuple[Path, ...]:
        """Where the plan's weight files are made."""
        return tuple(self.partial / file.path for file in self.plan.files)

    def target(self, number: int) -> WriteFile:
        """A handle of target file `number`; the caller closes it."""
        return self.files.open_write(self.partial / self.plan.files[number].path)

    def journal(self, tasks: Sequence[Task]) -> None:
        """Make what `tasks` wrote durable, then note that they are done."""
        if self.fsync:
            for number in sorted({task.steps[0].target_file for task in tasks}):
                file = self.target(number)
                try:
                    file.sync()
                finally:
                    file.close()
        if not self._journal_nbytes:
            self._append({"fingerprint": self.plan.fingerprint})
        done = [task.id for task in tasks]
        self._append({"done": done, "fsync": self.fsync, "boot": self.files.boot_id()})

    def finish(self, manifest: bytes) -> None:
        """Write all other files, make everything durable, and give the folder its name."""
        source = self.plan.source
        for entry in self.plan.copied_files:
            self._copy_file(source.root / entry.path, self.partial / entry.path, entry.nbytes)
        for path, content in self.plan.contents.items():
            self._write_file(self.partial / path, content)
        index = index_path(self.plan)
        if index:
            self._write_file(self.partial / index, self.plan.index)
        self._write_file(self.partial / MANIFEST, manifest)
        if self.fsync:
            self._sync_everything()
        for entry in source.sidecars:  # only now: a file that may not be written could not be opened to be synced
            self.files.copy_mode(source.root / entry.path, self.partial / entry.path)
        self._publish()
        self.files.remove_file(self.destination / JOURNAL)
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

    def _write_file(self, target: Path, content: bytes) -> None:
        if self.files.exists(target):
            self.files.remove_file(target)
        file = self.files.create(target, len(content))
        try:
            file.write_at(content, 0)
        finally:
            file.close()

    def close(self) -> None:
        """Give up the lock; `DST.partial` stays as it is."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None


def _version() -> str:
    from moeconv import __version__

    return __version__
