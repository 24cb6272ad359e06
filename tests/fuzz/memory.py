"""A checkpoint folder that is a mapping: files as `moeconv.files` opens them, without a disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from moeconv.errors import CheckpointError, MoeconvError
from moeconv.files import Files, FileStat, ReadFile

ROOT = Path("/fuzzed")


def assert_worded(error: MoeconvError) -> None:
    """Each problem has a message and a remedy, and both can be shown."""
    assert all(problem.message and problem.remedy for problem in error.problems)
    assert str(error).replace("\n", "").isprintable()


class _MemoryFile(ReadFile):
    def __init__(self, path: Path, content: bytes) -> None:
        super().__init__(path, -1)
        self.content = content

    def _pread(self, buffer: memoryview, offset: int) -> int:
        piece = self.content[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        pass


class MemoryFiles(Files):
    """Serves regular files of one folder, `ROOT`, and counts what else is asked for as missing."""

    def __init__(self, contents: Mapping[str, bytes]) -> None:
        self.contents = contents

    def _content(self, path: Path) -> bytes:
        try:
            return self.contents[str(path.relative_to(ROOT))]
        except (KeyError, ValueError):
            raise CheckpointError(f"{path} cannot be read: no such file", "Check the path.") from None

    def open_read(self, path: Path) -> ReadFile:
        return _MemoryFile(path, self._content(path))

    def stat(self, path: Path) -> FileStat:
        return FileStat(path.name, len(self._content(path)), 0)

    def walk(self, folder: Path) -> Iterator[tuple[str, FileStat | None]]:
        for name, content in sorted(self.contents.items()):
            yield name, FileStat(name, len(content), 0)

    def exists(self, path: Path) -> bool:
        return path == ROOT or str(path.relative_to(ROOT)) in self.contents

    def is_folder(self, path: Path) -> bool:
        return path == ROOT

    def is_link(self, path: Path) -> bool:
        return False
