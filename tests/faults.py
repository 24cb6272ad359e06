"""File systems that fail, die, or lose power: derived from the one door that moeconv has to files."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from moeconv.errors import OutputError
from moeconv.files import Files, ReadFile, WriteFile

#: Everything that changes the disk, and reading.
CHANGES = frozenset({"folder", "create", "write", "sync", "rename", "remove", "remove_tree", "sync_folder"})
Calls = Callable[[str], None]


#: Where `make soak` counts what was injected.
NOTES = os.environ.get("MOECONV_SOAK", "")


def noted(what: str) -> None:
    """Count a fault."""
    if NOTES:
        with open(NOTES, "a", encoding="ascii") as file:
            file.write(f"{what}\n")


class Killed(BaseException):
    """The process is dead: nothing that it would have done later happens."""


class _Read(ReadFile):
    def __init__(self, path: Path, fd: int, before: Calls) -> None:
        super().__init__(path, fd)
        self.before = before

    def _pread(self, buffer: memoryview, offset: int) -> int:
        self.before("read")
        return super()._pread(buffer, offset)


class _Write(WriteFile):
    def __init__(self, path: Path, fd: int, before: Calls) -> None:
        super().__init__(path, fd)
        self.before = before

    def _pwrite(self, buffer: memoryview | bytes, offset: int) -> int:
        try:
            self.before("write")
        except Killed:
            if buffer:  # a write may be cut short by the death of the process
                super()._pwrite(buffer[: len(buffer) // 2], offset)
            raise
        return super()._pwrite(buffer, offset)

    def _fsync(self) -> None:
        self.before("sync")
        super()._fsync()


class CountingFiles(Files):
    """Counts calls by kind; derived classes make one of them fail."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.lock = threading.RLock()

    def before(self, kind: str) -> None:
        with self.lock:
            self.count(kind)

    def count(self, kind: str) -> None:
        self.calls[kind] = self.calls.get(kind, 0) + 1

    def open_read(self, path: Path) -> ReadFile:
        return _Read(path, os.open(path, os.O_RDONLY), self.before)

    def create(self, path: Path, nbytes: int, *, reserve: bool = True) -> WriteFile:
        self._worded("create", path)
        return _Write(path, super().create(path, nbytes, reserve=reserve)._fd, self.before)

    def open_write(self, path: Path) -> WriteFile:
        return _Write(path, super().open_write(path)._fd, self.before)

    def make_folder(self, path: Path) -> None:
        self._worded("folder", path)
        super().make_folder(path)

    def rename(self, source: Path, target: Path) -> None:
        self._worded("rename", target)
        super().rename(source, target)

    def sync_folder(self, path: Path, *, is_ours: bool = True) -> None:
        self._worded("sync_folder", path)
        super().sync_folder(path, is_ours=is_ours)

    def remove_file(self, path: Path) -> None:
        self._worded("remove", path)
        super().remove_file(path)

    def remove_tree(self, path: Path) -> None:
        try:
            self._worded("remove_tree", path)
        except Killed:
            files = sorted(entry for entry in path.rglob("*") if entry.is_file())
            files[0].unlink()  # the death of the process may leave some of a tree
            raise
        super().remove_tree(path)

    def _worded(self, kind: str, path: Path) -> None:
        try:
            self.before(kind)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}", "Look at the disk.") from error


class FailingFiles(CountingFiles):
    """The n-th call of a kind (counted from 1) fails with an error of the operating system, all others work."""

    def __init__(self, kind: str, number: int, code: int = errno.EIO) -> None:
        super().__init__()
        self.kind, self.number, self.code = kind, number, code

    def count(self, kind: str) -> None:
        super().count(kind)
        if kind == self.kind and self.calls[kind] == self.number:
            noted("failing calls")
            raise OSError(self.code, os.strerror(self.code))


class DyingFiles(CountingFiles):
    """The process dies at its n-th change (counted from 1) to the disk."""

    def __init__(self, number: int, kinds: Collection[str] = CHANGES) -> None:
        super().__init__()
        self.left = number
        self.kinds = kinds

    def count(self, kind: str) -> None:
        super().count(kind)
        if kind in self.kinds:
            self.left -= 1
        if self.left == 0:
            noted("deaths")
        if self.left <= 0:
            raise Killed


class PowerLossFiles(DyingFiles):
    """Dies like `DyingFiles`; then `lose` takes back all that was not synced, as a power loss may.

    Bytes that were written to a file that was not synced since: all of them, or all but the first `kept` of each file.
    Names that were made, changed or removed in a folder that was not synced since, unless `keeps_names`: kernels write
    them in whatever order they like.
    """

    def __init__(self, number: int, kept: int = 0, *, keeps_names: bool = False) -> None:
        super().__init__(number)
        self.kept = kept
        self.keeps_names = keeps_names
        self.unsynced: dict[Path, list[tuple[int, bytes]]] = {}
        self.names: list[_Name] = []

    def create(self, path: Path, nbytes: int, *, reserve: bool = True) -> WriteFile:
        made = super().create(path, nbytes, reserve=reserve)
        self.names.append(_Name(path))
        return self._watched(path, made)

    def open_write(self, path: Path) -> WriteFile:
        return self._watched(path, super().open_write(path))

    def _watched(self, path: Path, file: WriteFile) -> WriteFile:
        return _Unsynced(path, file._fd, self.before, self.unsynced.setdefault(path, []))

    def make_folder(self, path: Path) -> None:
        new = [folder for folder in (path, *path.parents) if not folder.exists()]
        super().make_folder(path)
        self.names += [_Name(folder) for folder in reversed(new)]

    def remove_file(self, path: Path) -> None:
        content, times = path.read_bytes(), path.stat()
        super().remove_file(path)
        self.names.append(_Name(path, removed=content, mtime_ns=times.st_mtime_ns))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        moved = {path: lost for path, lost in self.unsynced.items() if path.is_relative_to(source)}
        for path, lost in moved.items():
            self.unsynced[target / path.relative_to(source)] = lost
            del self.unsynced[path]
        self.names = [name.moved(source, target) for name in self.names]
        self.names.append(_Name(target, renamed=source))

    def sync_folder(self, path: Path, *, is_ours: bool = True) -> None:
        super().sync_folder(path, is_ours=is_ours)
        self.names = [name for name in self.names if name.path.parent != path]

    def lose(self) -> None:
        noted("power losses")
        for path, lost in self.unsynced.items():
            if not path.exists():
                continue
            with path.open("r+b") as file:
                for offset, old in reversed(lost[self.kept :]):
                    file.seek(offset)
                    file.write(old)
        for name in reversed(self.names) if not self.keeps_names else ():
            name.take_back()


@dataclass(frozen=True)
class _Name:
    """A name in a folder that was not synced since it was made, or removed, or got what `renamed` named."""

    path: Path
    removed: bytes | None = None
    mtime_ns: int = 0
    renamed: Path | None = None

    def moved(self, source: Path, target: Path) -> _Name:
        """The same once a folder above it has another name."""
        inside = self.path.is_relative_to(source)
        return replace(self, path=target / self.path.relative_to(source)) if inside else self

    def take_back(self) -> None:
        if self.renamed is not None:
            self.path.rename(self.renamed)
        elif self.removed is not None:
            if self.path.parent.exists():
                self.path.write_bytes(self.removed)
                os.utime(self.path, ns=(self.mtime_ns, self.mtime_ns))
        elif self.path.is_dir():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)


class _Unsynced(_Write):
    """Remembers what each write replaced until the file is synced."""

    def __init__(self, path: Path, fd: int, before: Calls, lost: list[tuple[int, bytes]]) -> None:
        super().__init__(path, fd, before)
        self.lost = lost

    def _pwrite(self, buffer: memoryview | bytes, offset: int) -> int:
        old = os.pread(self._fd, len(buffer), offset)
        self.lost.append((offset, old.ljust(len(buffer), b"\0")))
        return super()._pwrite(buffer, offset)

    def _fsync(self) -> None:
        super()._fsync()
        self.lost.clear()


class FullDisk(Files):
    """Says that so many bytes are free."""

    def __init__(self, free: int) -> None:
        self.free = free

    def free_bytes(self, path: Path) -> int:
        return self.free
