"""The journal of an unfinished run, in `DST.partial`: one JSON line for the plan, then one for each batch of tasks.

A line follows the data it speaks of: with fsync on, tasks are journalled only after their bytes are durable. Each line
says whether they are, and in which boot it was written: a run may go on with other options than it began with. The
file is empty until the first batch, and from a damaged line on nothing counts, and is written over.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moeconv.checkpoint import read_manifest
from moeconv.files import Files, WriteFile
from moeconv.header import HeaderError

MAX_JOURNAL_BYTES = 1 << 28


class Done(NamedTuple):
    """A task that is done.

    Attributes:
        id: of the task.
        losses: of matrices that it encoded, as JSON has them (`losses`).
        is_checked: its bytes were read again and compared.
    """

    id: str
    losses: tuple[Any, ...] = ()
    is_checked: bool = False


class Past(NamedTuple):
    """What a journal tells.

    Attributes:
        fingerprint: of the plan; None where the run died before its first batch.
        origin: of the plan (`origin_of`).
        done: tasks whose bytes are there, by id.
    """

    fingerprint: Any
    origin: Mapping[str, Any]
    done: Mapping[str, Done]


class Journal:
    """A journal that this process holds until it is closed.

    Args:
        files: door to the file system.
        path: of the journal.
        file: the same, open and locked.
        fsync: make lines durable.
    """

    def __init__(self, files: Files, path: Path, file: WriteFile, *, fsync: bool) -> None:
        self._files = files
        self._path = path
        self._file = file
        self._fsync = fsync
        self._nbytes = 0

    def read(self) -> Past:
        """What the file tells; further lines go behind the last one that is whole."""
        boot = self._files.boot_id()
        head: dict[str, Any] = {}
        done: dict[str, Done] = {}
        self._nbytes = 0
        for line in self._files.read_bytes(self._path, MAX_JOURNAL_BYTES).splitlines(keepends=True):
            try:
                entry = read_manifest(line)
            except HeaderError:
                break
            found = _done_in(entry) if line.endswith(b"\n") else None
            if found is None:
                break
            head = head or entry
            if entry.get("fsync") is True or entry.get("boot") == boot != "":  # unsynced data dies with the kernel
                done.update((task.id, task) for task in found)
            self._nbytes += len(line)
        origin = head.get("origin")
        return Past(head.get("fingerprint"), origin if isinstance(origin, dict) else {}, done)

    @property
    def is_empty(self) -> bool:
        """Nothing was noted yet."""
        return not self._nbytes

    def begin(self, fingerprint: str, origin: Mapping[str, Any]) -> None:
        """Note the plan."""
        self._append({"fingerprint": fingerprint, "origin": origin})

    def note(self, tasks: Iterable[Done]) -> None:
        """Note a batch of tasks, whose bytes are durable where lines are."""
        batch = list(tasks)
        losses = {task.id: task.losses for task in batch if task.losses}
        self._append(
            {
                "done": [task.id for task in batch],
                **({"losses": losses} if losses else {}),
                **({"checked": True} if all(task.is_checked for task in batch) else {}),
                "fsync": self._fsync,
                "boot": self._files.boot_id(),
            }
        )

    def _append(self, line: dict[str, Any]) -> None:
        content = json.dumps(line).encode() + b"\n"
        self._file.write_at(content, self._nbytes)
        self._nbytes += len(content)
        if self._fsync:
            self._file.sync()

    def close(self) -> None:
        """Give up the lock."""
        self._file.close()


def _done_in(entry: Any) -> list[Done] | None:
    """Tasks of a line; None for a line that no run wrote."""
    if not isinstance(entry, dict):
        return None
    ids, losses = entry.get("done", []), entry.get("losses", {})
    if not isinstance(ids, list) or not all(isinstance(id_, str) for id_ in ids) or not isinstance(losses, dict):
        return None
    if not all(isinstance(found, list) for found in losses.values()):
        return None
    is_checked = entry.get("checked") is True
    return [Done(id_, tuple(losses.get(id_, ())), is_checked) for id_ in ids]
