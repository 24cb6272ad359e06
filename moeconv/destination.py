"""Where a result may be made, and what lies there already."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeconv.checkpoint import CONSUMED, JOURNAL, MANIFEST, MAX_INDEX_BYTES, read_manifest
from moeconv.errors import CheckpointError, OutputError
from moeconv.files import Files
from moeconv.header import HeaderError

#: Options without and with a value that change nothing of a result.
_FLAGS = ("--consume-source", "--yes", "--json", "--no-fsync", "--restart", "--overwrite", "--hash")
_VALUES = ("--jobs", "--max-memory", "--max-vram", "--device")


def finished_manifest(destination: Path, files: Files) -> Mapping[str, Any] | None:
    """The manifest of a folder that moeconv made, or None for any other."""
    path = destination / MANIFEST
    if not files.exists(path):
        return None
    try:
        manifest = read_manifest(files.read_bytes(path, MAX_INDEX_BYTES))
    except (HeaderError, CheckpointError):
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("fingerprint"), str) else None


def has_consumed(source: Path, destination: Path, command: Sequence[str], files: Files) -> bool:
    """Whether this very command has made the destination, and deleted the weights of its source.

    Args:
        source: which cannot be opened any more then.
        destination: the finished folder.
        command: the command line, without the program's name.
        files: door to the file system.

    Raises:
        OutputError: it did, and the destination is not what it made any more.
    """
    manifest = finished_manifest(destination, files)
    if manifest is None or manifest.get("consumed_source") is not True:
        return False
    origin, before = manifest.get("source"), manifest.get("command")
    if not isinstance(origin, dict) or not isinstance(before, list):
        return False
    paths = [file.get("path") for file in _listed(origin)]
    if not paths or any(not isinstance(path, str) or files.exists(source / path) for path in paths):
        return False
    folders = {os.path.realpath(folder) for folder in (source, destination)}
    if os.path.realpath(str(origin.get("path"))) != os.path.realpath(source):
        return False
    if _words(list(map(str, before)), folders) != _words(command, folders):
        return False
    for file in _listed(manifest):
        path = destination / str(file.get("path"))
        if not files.exists(path) or files.stat(path).nbytes != file.get("bytes"):
            raise OutputError(
                f"{path} is missing or was changed since moeconv made it, and the weights of {source} are consumed",
                "Restore it from a copy: nothing else holds what was in it.",
            )
    remove_notes(destination, files)
    return True


def _listed(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    listed = content.get("files")
    return [file for file in listed if isinstance(file, dict)] if isinstance(listed, list) else []


def _words(command: Sequence[str], folders: set[str]) -> list[str]:
    """Of a command line, what decides the result: without folders, and options that only say how to get there."""
    found, words = [], iter(command)
    for word in words:
        if word in _VALUES:
            next(words, None)
        elif word not in _FLAGS and word.partition("=")[0] not in _VALUES and os.path.realpath(word) not in folders:
            found.append(word)
    return sorted(found)


def remove_notes(folder: Path, files: Files) -> None:
    """Remove from a finished folder what only an unfinished run needs; the journal last, which tells that it is ours.

    Args:
        folder: of a run that has published it, and may be dead since.
        files: door to the file system.
    """
    if files.exists(folder / CONSUMED):
        files.remove_tree(folder / CONSUMED)
    if files.exists(folder / JOURNAL):
        files.remove_file(folder / JOURNAL)


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
    if files.exists(destination) and finished_manifest(destination, files) is None:
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
