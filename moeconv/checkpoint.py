"""A checkpoint folder as it is: tensors by name, config.json, and every other file.

Opening one reads headers only. Everything that is wrong with it is collected, so that a user with three
damaged shards learns of all three. Links to files are followed: a Hugging Face cache snapshot is a folder
of links to `../../blobs`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from moeconv.errors import CheckpointError, Problem
from moeconv.files import Files, FileStat
from moeconv.formats import Format
from moeconv.header import HeaderError, header_length, header_problem, parse_header, read_json
from moeconv.tensors import Spec

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
MANIFEST = "moeconv.json"
#: Notes of an unfinished run; a run that dies right behind its last step leaves it in a finished folder.
JOURNAL = ".moeconv-journal"
MAX_INDEX_BYTES = 200_000_000
MAX_CONFIG_BYTES = 20_000_000

#: Weights that moeconv does not read, by file name ending.
_OTHER_WEIGHTS = (".bin", ".pth", ".pt", ".gguf", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".mlmodel")
_OTHER_INDEXES = (".bin.index.json", ".h5.index.json", ".msgpack.index.json", ".safetensors.index.json")
#: Folders that hold other copies of the weights, or what tools keep for themselves.
_LEFT_OUT_FOLDERS = {"original": "the publisher's own format", ".git": "version control", ".cache": "download cache"}


class StoredTensor(NamedTuple):
    """A tensor and where its bytes lie: `offset` in file number `file` of the checkpoint.

    A matrix that is stored quantized has no place of its own; `encoded` says where its parts are.
    """

    spec: Spec
    file: int
    offset: int
    encoded: Encoded | None = None


class Encoded(NamedTuple):
    """A matrix as a quantized checkpoint holds it: its format, and the stored tensors by suffix."""

    format: Format
    parts: Mapping[str, StoredTensor]


class WeightFile(NamedTuple):
    """A safetensors file of the checkpoint.

    Attributes:
        path: relative to the folder.
        nbytes: size.
        mtime_ns: time of the last change.
        header_sha256: of the length and the JSON, hexadecimal.
        metadata: `__metadata__` of the header.
    """

    path: str
    nbytes: int
    mtime_ns: int
    header_sha256: str
    metadata: Mapping[str, str]


class LeftOut(NamedTuple):
    """A file that is not carried over, and why."""

    path: str
    nbytes: int
    why: str


class Checkpoint(NamedTuple):
    """What a folder holds. `tensors` is in natural order of files, then of their offsets."""

    root: Path
    files: tuple[WeightFile, ...]
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any]
    sidecars: tuple[FileStat, ...]
    left_out: tuple[LeftOut, ...]
    manifest: Mapping[str, Any]
    index_total_size: int | None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.spec.nbytes for tensor in self.tensors.values())

    def config_values(self, scope: str, key: str) -> Any:
        """The value at a dotted `key` below a dotted `scope` ("." is the top) of config.json, or None."""
        value: Any = self.config
        for word in (*(scope.split(".") if scope != "." else ()), *key.split(".")):
            if not isinstance(value, Mapping):
                return None
            value = value.get(word)
        return value


@dataclass(slots=True)
class _Opening:
    root: Path
    files: Files
    problems: list[Problem] = field(default_factory=list)

    def mapping(self, name: str, limit: int) -> dict[str, Any] | None:
        """The JSON object in a file; None, with a problem noted, where there is none."""
        try:
            value = read_json(self.files.read_bytes(self.root / name, limit))
        except HeaderError as error:
            self.problems.append(Problem(f"{self.root / name}: {error}", "Download the file again."))
        except CheckpointError as error:
            self.problems += error.problems
        else:
            if isinstance(value, dict):
                return value
            self.problems.append(Problem(f"{self.root / name} is not a JSON object", "Download the file again."))
        return None


def open_checkpoint(root: Path, files: Files | None = None, include: tuple[str, ...] = ()) -> Checkpoint:
    """Read the headers of a checkpoint folder.

    Args:
        root: the folder.
        files: door to the file system.
        include: further safetensors files, relative to the folder, that belong to the model though no
            index names them.

    Raises:
        CheckpointError: with everything that is wrong.
    """
    opening = _Opening(root, files or Files())
    if not opening.files.is_folder(root):
        raise CheckpointError(f"{root} is not a folder", "Give the folder that holds config.json and the weights.")
    found: dict[str, FileStat] = {}
    unreadable: list[str] = []
    for path, entry in opening.files.walk(root):
        if entry is None:
            unreadable.append(path)
        else:
            found[path] = entry
    config = (opening.mapping(CONFIG, MAX_CONFIG_BYTES) if CONFIG in found else None) or {}
    manifest = (opening.mapping(MANIFEST, MAX_INDEX_BYTES) if MANIFEST in found else None) or {}
    weight_map, total_size = _weight_map(opening, found)
    names = sorted({*(name for name in weight_map.values()), *include}) if weight_map else sorted(include)
    for name in include:
        if name not in found or not name.endswith(".safetensors"):
            opening.problems.append(
                Problem(f"--include {name}: no such safetensors file in {root}", "Give a path relative to the folder.")
            )
    weights, tensors = _read_headers(opening, [name for name in names if name in found], found)
    _check_index(opening, weight_map, weights, tensors, found, include)
    for path in unreadable:
        opening.problems.append(
            Problem(f"{root / path} cannot be read or is no regular file", "Restore the link's target, or remove it.")
        )
    if opening.problems:
        raise CheckpointError.of(opening.problems)
    sidecars, left_out = _others(found, {file.path for file in weights}, weight_map)
    return Checkpoint(
        root, tuple(weights), tensors, config, tuple(sidecars), tuple(left_out), manifest, total_size
    )  # fmt: skip


def _weight_map(opening: _Opening, found: Mapping[str, FileStat]) -> tuple[dict[str, str], int | None]:
    """Tensor name -> file, from the index; {"": file} for a single file."""
    root = opening.root
    top = [path for path in found if "/" not in path and path.endswith(".safetensors")]
    indexes = [path for path in found if "/" not in path and path.endswith(".safetensors.index.json")]
    index = INDEX if INDEX in indexes else indexes[0] if len(indexes) == 1 else None
    if index is None:
        single = SINGLE if SINGLE in top else top[0] if len(top) == 1 else None
        if single:
            return {"": single}, None
        if not top:
            others = [path for path in found if path.endswith(_OTHER_WEIGHTS)]
            hint = f" It has {', '.join(others[:3])}; moeconv reads safetensors only." if others else ""
            opening.problems.append(
                Problem(f"{root} holds no safetensors file.{hint}", "Give a folder with *.safetensors weights.")
            )
        else:
            opening.problems.append(
                Problem(
                    f"{root} has {len(top)} safetensors files and no {INDEX} that says which belong together",
                    f"Download {INDEX}; without one, keep a single weight file.",
                )
            )
        return {}, None
    parsed = opening.mapping(index, MAX_INDEX_BYTES)
    if parsed is None:
        return {}, None
    weight_map = parsed.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        opening.problems.append(Problem(f"{root / index} has no weight_map", "Download the index again."))
        return {}, None
    valid: dict[str, str] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or "/" in file or "\\" in file or file in ("", ".", "..") or "\0" in file:
            opening.problems.append(
                Problem(
                    f"{root / index} places {name[:200]!r} in {str(file)[:200]!r}, which is no file name here",
                    "Weight files lie beside the index: download the index again.",
                )
            )
        else:
            valid[name] = file
    metadata = parsed.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return valid, int(total) if type(total) is int or (isinstance(total, float) and isfinite(total)) else None


def _read_headers(
    opening: _Opening, names: list[str], found: Mapping[str, FileStat]
) -> tuple[list[WeightFile], dict[str, StoredTensor]]:
    weights: list[WeightFile] = []
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        try:
            file, placed = _read_header(opening, found[name])
        except HeaderError as error:
            opening.problems.append(header_problem(str(opening.root / name), error))
            continue
        except CheckpointError as error:
            opening.problems += error.problems
            continue
        for spec, offset in placed:
            if spec.name in tensors:
                other = weights[tensors[spec.name].file].path
                opening.problems.append(
                    Problem(
                        f"{spec.name!r} is in {other} and again in {name}",
                        "Remove one of the two files from the model, or leave it out of --include.",
                    )
                )
            tensors[spec.name] = StoredTensor(spec, len(weights), offset)
        weights.append(file)
    return weights, tensors


def _read_header(opening: _Opening, entry: FileStat) -> tuple[WeightFile, list[tuple[Spec, int]]]:
    if entry.nbytes < 8:
        raise HeaderError(f"{entry.nbytes} bytes are no safetensors file")
    file = opening.files.open_read(opening.root / entry.path)
    try:
        head = bytearray(8)
        file.read_into(memoryview(head), 0)
        length = header_length(bytes(head), entry.nbytes)
        text = bytearray(length)
        file.read_into(memoryview(text), 8)
    finally:
        file.close()
    data_start = 8 + length
    metadata, placed = parse_header(bytes(text), entry.nbytes - data_start)
    digest = hashlib.sha256(head + text).hexdigest()
    weight = WeightFile(entry.path, entry.nbytes, entry.mtime_ns, digest, metadata)
    return weight, [(spec, data_start + offset) for spec, offset in placed]


def _check_index(
    opening: _Opening,
    weight_map: Mapping[str, str],
    weights: list[WeightFile],
    tensors: Mapping[str, StoredTensor],
    found: Mapping[str, FileStat],
    include: tuple[str, ...],
) -> None:
    root = opening.root
    missing = sorted({file for file in weight_map.values() if file not in found})
    for file in missing:
        count = sum(1 for other in weight_map.values() if other == file)
        opening.problems.append(
            Problem(f"{root / file} is missing; the index places {count:,} tensors there", f"Download {file} again.")
        )
    if "" in weight_map:
        return
    readable = {file.path: number for number, file in enumerate(weights)}
    for name, file in weight_map.items():
        if file in readable and (name not in tensors or tensors[name].file != readable[file]):
            opening.problems.append(
                Problem(
                    f"{root / file} lacks {name[:200]!r}, which the index places there",
                    f"Download {file} and the index again: they are of different versions.",
                )
            )
    for name, tensor in tensors.items():
        file = weights[tensor.file].path
        if name not in weight_map and file not in include:
            opening.problems.append(
                Problem(
                    f"{root / file} holds {name!r}, which the index does not name",
                    "Engines differ in whether they read it: download the index again, or add the name to it.",
                )
            )


def _others(
    found: Mapping[str, FileStat], weights: set[str], weight_map: Mapping[str, str]
) -> tuple[list[FileStat], list[LeftOut]]:
    """Split what is no weight file of the model into files to carry over and files to leave out."""
    sidecars: list[FileStat] = []
    left_out: list[LeftOut] = []
    own_index = {INDEX} if "" not in weight_map else set()
    for path, entry in found.items():
        if path in weights or path in own_index or path in (MANIFEST, JOURNAL):
            continue
        folder = path.split("/", 1)[0] if "/" in path else ""
        why = ""
        if folder in _LEFT_OUT_FOLDERS:
            why = _LEFT_OUT_FOLDERS[folder]
        elif path.endswith(".safetensors"):
            why = "safetensors that no index names"
        elif path.endswith(_OTHER_INDEXES):
            why = "index of other weight files"
        elif path.endswith(_OTHER_WEIGHTS):
            why = "weights in another format"
        if why:
            left_out.append(LeftOut(path, entry.nbytes, why))
        else:
            sidecars.append(entry)
    return sidecars, left_out
