"""Whether files can be written in the middle: moeconv fills files of their final size in any order."""

from __future__ import annotations

import errno
from pathlib import Path

from moeconv.errors import OutputError
from moeconv.files import Files

_PROBE_BYTES = 4096
#: What file systems answer that take no writes but at the end of a file.
_NO_RANDOM_WRITES = (errno.ESPIPE, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EPERM)


def check_random_writes(folder: Path, files: Files) -> None:
    """Refuse a folder in which files can only be written from their beginning to their end.

    Args:
        folder: in which a small file is made, and removed.
        files: door to the file system.

    Raises:
        OutputError: it is on such a file system, as mounts of object stores are, or not writable.
    """
    path, written = folder / ".moeconv-probe", {2 * _PROBE_BYTES: b"2" * _PROBE_BYTES, 0: b"0" * _PROBE_BYTES}
    found = bytearray(_PROBE_BYTES)
    is_kept = True
    try:
        file = files.create(path, 3 * _PROBE_BYTES)
        try:
            for offset, content in written.items():
                file.write_at(content, offset)
        finally:
            file.close()
        reading = files.open_read(path)
        try:
            for offset, content in written.items():
                reading.read_into(memoryview(found), offset)
                is_kept = is_kept and found == content
        finally:
            reading.close()
    except OutputError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno not in _NO_RANDOM_WRITES:
            raise
        is_kept = False
    if not is_kept:
        raise OutputError(
            f"{folder} is on a file system ({files.file_system(folder)}) that cannot write in the middle of a "
            "file, as mounts of object stores cannot",
            "Write to a local disk, then copy the finished folder.",
        )
    files.remove_file(path)
