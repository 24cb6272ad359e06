"""The one door to the file system: every read, write, sync and rename of moeconv goes through here.

Keeping the door small is what makes it possible to test what happens when the n-th write fails, and to
read from something else than a local disk later. Errors of the operating system leave as `MoeconvError`s
that name the file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from moeconv.errors import CheckpointError, OutputError

#: Linux moves at most this many bytes in one read or write (`man 2 write`).
MAX_IO_BYTES = 0x7FFFF000
_OPEN_FILES = 16
_HASH_BYTES = 1 << 20
_HAS_PREADV = hasattr(os, "preadv")  # not on macOS before 11


class FileStat(NamedTuple):
    """A regular file below a folder.

    Attributes:
        path: relative to the folder, with `/`.
        nbytes: size.
        mtime_ns: time of the last change, nanoseconds since 1970.
    """

    path: str
    nbytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Rows:
    """`count` runs of `nbytes` bytes, `stride` bytes apart in a file and `pitch` bytes apart in memory."""

    count: int
    nbytes: int
    stride: int
    pitch: int


class ReadFile:
    """An open file to read ranges from. Safe to use from several threads."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes from `offset` on.

        Raises:
            CheckpointError: the file ends too early, or cannot be read.
        """
        try:
            done = self._pread(buffer, offset)  # one call is nearly always enough
            while done < len(buffer):
                count = self._pread(buffer[done : done + MAX_IO_BYTES], offset + done)
                if count == 0:
                    raise CheckpointError(
                        f"{self.path} ended at byte {offset + done:,}; {len(buffer) - done:,} more were expected",
                        "The file became shorter while it was read: restore it and run again.",
                    )
                done += count
        except OSError as error:
            _fail_reading(error, self.path)

    def read_rows(self, buffer: memoryview, offset: int, rows: Rows) -> None:
        """Fill `buffer` with rows that lie apart in the file; in the buffer they lie `rows.pitch` apart.

        Raises:
            CheckpointError: the file ends too early, or cannot be read.
        """
        pread, nbytes, stride = self._pread, rows.nbytes, rows.stride
        try:
            for at in range(0, rows.count * rows.pitch, rows.pitch):
                piece = buffer[at : at + nbytes]
                if pread(piece, offset) != nbytes:
                    self.read_into(piece, offset)
                offset += stride
        except OSError as error:
            _fail_reading(error, self.path)

    def _pread(self, buffer: memoryview, offset: int) -> int:
        if _HAS_PREADV:
            return os.preadv(self._fd, (buffer,), offset)
        piece = os.pread(self._fd, len(buffer), offset)
        buffer[: len(piece)] = piece
        return len(piece)

    def forget(self) -> None:
        """Have the next reads come from the disk where the system allows it; what was not synced stays in memory."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        os.close(self._fd)


class WriteFile:
    """An open file to write ranges to. Safe to use from several threads that write different ranges."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    def write_at(self, buffer: memoryview | bytes, offset: int) -> None:
        """Write all of `buffer` at `offset`.

        Raises:
            OutputError: disk full, or not writable.
        """
        try:
            done = self._pwrite(buffer, offset)  # one call is nearly always enough
            view = buffer if done == len(buffer) else memoryview(buffer)
            while done < len(view):
                count = self._pwrite(view[done : done + MAX_IO_BYTES], offset + done)
                if count == 0:
                    raise OSError(errno.EIO, "nothing was written")
                done += count
        except OSError as error:
            _fail_writing(error, self.path)

    def write_rows(self, buffer: memoryview, offset: int, rows: Rows) -> None:
        """Write rows that are to lie apart in the file; in the buffer they lie `rows.pitch` apart.

        Raises:
            OutputError: disk full, or not writable.
        """
        pwrite, nbytes, stride = self._pwrite, rows.nbytes, rows.stride
        try:
            for at in range(0, rows.count * rows.pitch, rows.pitch):
                piece = buffer[at : at + nbytes]
                if pwrite(piece, offset) != nbytes:
                    self.write_at(piece, offset)
                offset += stride
        except OSError as error:
            _fail_writing(error, self.path)

    def _pwrite(self, buffer: memoryview | bytes, offset: int) -> int:
        return os.pwrite(self._fd, buffer, offset)

    def sync(self) -> None:
        """Wait until everything written so far would survive a power loss."""
        try:
            self._fsync()
        except OSError as error:
            _fail_writing(error, self.path)

    def lock(self) -> bool:
        """Claim the file for this process until it is closed; False if another process holds it."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _fsync(self) -> None:
        if hasattr(os, "fdatasync"):
            os.fdatasync(self._fd)
        else:  # macOS
            os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class Files:
    """Local files. Tests derive from this class to make single calls fail."""

    def open_read(self, path: Path) -> ReadFile:
        """Open a regular file for reading; links are followed, and a pipe that took its place is not waited for."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            _fail_reading(error, path)
        return ReadFile(path, fd)

    def read_bytes(self, path: Path, limit: int) -> bytes:
        """The whole content of a small file.

        Raises:
            CheckpointError: cannot be read, or is larger than `limit` bytes.
        """
        nbytes = self.stat(path).nbytes
        if nbytes > limit:
            raise CheckpointError(
                f"{path} has {nbytes:,} bytes; at most {limit:,} are expected",
                "Look at the file: it is not what its name says.",
            )
        file = self.open_read(path)
        try:
            content = bytearray(nbytes)
            file.read_into(memoryview(content), 0)
        finally:
            file.close()
        return bytes(content)

    def stat(self, path: Path) -> FileStat:
        """Size and time of a regular file; links are followed.

        Raises:
            CheckpointError: missing, or not a regular file.
        """
        try:
            found = os.stat(path)
        except OSError as error:
            _fail_reading(error, path)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path} is not a regular file", "Replace it by the file itself.")
        return FileStat(path.name, found.st_size, found.st_mtime_ns)

    def walk(self, folder: Path) -> Iterator[tuple[str, FileStat | None]]:
        """Every path below `folder` in natural order of folders; None where it is not a readable regular file.

        Links to files count as files. Links to folders are not entered; they are None, as are folders that cannot be.
        """
        pending = [""]
        while pending:
            below = pending.pop()
            try:
                entries = sorted(os.scandir(folder / below), key=lambda entry: entry.name)
            except OSError as error:
                if not below:
                    _fail_reading(error, folder)
                yield below.rstrip("/"), None
                continue
            for entry in entries:
                path = below + entry.name
                if entry.is_dir(follow_symlinks=False):
                    pending.append(path + "/")
                    continue
                try:
                    found = os.stat(entry.path)
                except OSError:
                    yield path, None
                    continue
                if stat.S_ISREG(found.st_mode):
                    yield path, FileStat(path, found.st_size, found.st_mtime_ns)
                else:
                    yield path, None

    def exists(self, path: Path) -> bool:
        """Whether anything has that name, a dangling link included."""
        return os.path.lexists(path)

    def count_names(self, path: Path) -> int:
        """How many names (hard links) a regular file has.

        Raises:
            CheckpointError: missing.
        """
        try:
            return os.stat(path).st_nlink
        except OSError as error:
            _fail_reading(error, path)

    def sha256(self, path: Path) -> str:
        """Of a file's whole content, hexadecimal.

        Raises:
            CheckpointError: cannot be read.
        """
        nbytes, found = self.stat(path).nbytes, hashlib.sha256()
        buffer = memoryview(bytearray(min(_HASH_BYTES, max(1, nbytes))))
        file = self.open_read(path)
        try:
            for at in range(0, nbytes, _HASH_BYTES):
                piece = buffer[: min(_HASH_BYTES, nbytes - at)]
                file.read_into(piece, at)
                found.update(piece)
        finally:
            file.close()
        return found.hexdigest()

    def file_system(self, path: Path) -> str:
        """The type of the file system below a path, such as `fuse.mountpoint-s3`, as far as the system tells."""
        try:
            lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return "unknown"
        real = os.path.realpath(path)
        mounts = [line.split(" ")[1:3] for line in lines if line.count(" ") >= 2]
        holding = [(len(at), kind) for at, kind in mounts if real == at or real.startswith(at.rstrip("/") + "/")]
        return max(holding)[1] if holding else "unknown"

    def is_link(self, path: Path) -> bool:
        return os.path.islink(path)

    def is_elsewhere(self, path: Path) -> bool:
        """Whether what is written there may be seen under another name: a link, or a file with several names."""
        found = os.lstat(path)
        return stat.S_ISLNK(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink > 1)

    def is_folder(self, path: Path) -> bool:
        return os.path.isdir(path)

    def free_bytes(self, path: Path) -> int:
        """Bytes that an ordinary user may still write on the disk of the nearest existing parent of `path`."""
        return shutil.disk_usage(_nearest(path)).free

    def disk_number(self, path: Path) -> int:
        """Tells disks apart: that of the nearest existing parent of `path`."""
        return os.stat(_nearest(path)).st_dev

    def boot_id(self) -> str:
        """Differs after a restart of the machine; empty where the system does not tell."""
        try:
            return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        except OSError:
            return ""

    def make_folder(self, path: Path) -> None:
        """Make a folder and its parents."""
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            _fail_writing(error, path)

    def create(self, path: Path, nbytes: int, *, reserve: bool = True) -> WriteFile:
        """Make a file of its final size, with the blocks reserved where that is wanted and the file system can.

        Raises:
            OutputError: not enough space, a name that exists, or not writable.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o644)
        except OSError as error:
            _fail_writing(error, path)
        try:
            self._reserve(fd, nbytes) if reserve else os.ftruncate(fd, nbytes)
        except OSError as error:
            os.close(fd)
            _fail_writing(error, path)
        return WriteFile(path, fd)

    def _reserve(self, fd: int, nbytes: int) -> None:
        if nbytes == 0:
            return  # a truncated file, even to the size it has, ext4 sends to the disk as soon as it is closed
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(fd, 0, nbytes)
                return
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                    raise
        os.ftruncate(fd, nbytes)  # macOS, and file systems that cannot reserve

    def write_whole(self, path: Path, content: bytes, *, sync: bool = False) -> None:
        """Make a small file, in place of one of that name."""
        if self.exists(path):
            self.remove_file(path)
        file = self.create(path, len(content))
        try:
            file.write_at(content, 0)
            if sync:
                file.sync()
        finally:
            file.close()

    def open_write(self, path: Path) -> WriteFile:
        """Open an existing file for writing; never through a link."""
        try:
            return WriteFile(
                path, os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
            )
        except OSError as error:
            _fail_writing(error, path)

    def copy_mode(self, source: Path, target: Path) -> None:
        """Give a file the permission bits of another, where the file system has such."""
        try:
            wanted, found = (stat.S_IMODE(os.stat(path).st_mode) & 0o777 for path in (source, target))
            if wanted != found:
                os.chmod(target, wanted)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                _fail_writing(error, target)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file or folder; `target` must not exist unless it is a file."""
        try:
            os.rename(source, target)
        except OSError as error:
            _fail_writing(error, target)

    def sync_folder(self, path: Path, *, is_ours: bool = True) -> None:
        """Wait until the names in a folder would survive a power loss; of one that is not ours, where we may."""
        try:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            if not is_ours and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                return
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without folder syncing
                _fail_writing(error, path)

    def remove_file(self, path: Path) -> None:
        try:
            os.unlink(path)
        except OSError as error:
            _fail_writing(error, path)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder of our own with all that is in it; links are removed, not followed."""
        try:
            shutil.rmtree(path)
        except OSError as error:
            _fail_writing(error, path)


def _nearest(path: Path) -> Path:
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    return path


def _fail_reading(error: OSError, path: Path) -> NoReturn:
    remedy = {
        errno.ENOENT: "Check the path; if an index names the file, download it again.",
        errno.EACCES: "Make the file readable for this user.",
        errno.EIO: "The disk or mount reports a read error: check it, then run again.",
        errno.ESTALE: "The mount of that path was lost: mount it again, then run the same command again.",
        errno.ENOTCONN: "The mount of that path was lost: mount it again, then run the same command again.",
    }.get(error.errno or 0, "Check the file, then run again.")
    raise CheckpointError(f"{path} cannot be read: {error.strerror or error}", remedy) from error


def _fail_writing(error: OSError, path: Path) -> NoReturn:
    remedy = {
        errno.ENOSPC: "Free space on that disk or choose another destination, then run again.",
        errno.EDQUOT: "Your disk quota is used up: free space, then run again.",
        errno.EACCES: "Choose a destination that this user may write to.",
        errno.EROFS: "The file system is read-only: choose another destination.",
        errno.EEXIST: "Remove it, or choose another destination.",
        errno.ELOOP: "moeconv does not write through symbolic links: remove it.",
        errno.EFBIG: "This file system cannot hold files of that size: lower --max-shard-size.",
        errno.ESPIPE: "This file system cannot write in the middle of a file: write to a local disk, then copy.",
        errno.EIO: "The disk or mount reports a write error: check it, then run again.",
        errno.ESTALE: "The mount of that path was lost: mount it again, then run the same command again.",
        errno.ENOTCONN: "The mount of that path was lost: mount it again, then run the same command again.",
    }.get(error.errno or 0, "Check the destination, then run again.")
    raise OutputError(f"{path} cannot be written: {error.strerror or error}", remedy) from error


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
