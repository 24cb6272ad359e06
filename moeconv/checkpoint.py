"""A checkpoint folder as it is: tensors by name, config.json, and every other file.

Opening one reads headers only. Everything that is wrong with it is collected, so that a user with three
damaged shards learns of all three. Links to files are followed: a Hugging Face cache snapshot is a folder
of links to `../../blobs`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from moeconv.errors import CheckpointError, Problem
from moeconv.files import Files, FileStat
from moeconv.formats import Decoder
from moeconv.header import HeaderError, header_length, header_problem, parse_header, read_json
from moeconv.tensors import Spec, View, total_nbytes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
MANIFEST = "moeconv.json"
#: Notes of an unfinished run; a run that dies right behind its last step leaves it in a finished folder.
JOURNAL = ".moeconv-journal"
#: In an unfinished run with --consume-source: what planning needs of source files that are deleted.
CONSUMED = ".moeconv-consumed"
#: What follows the name of such a file in that of another, which holds the time of the file that it stands for.
TIME_SUFFIX = ".mtime_ns"
MAX_INDEX_BYTES = 200_000_000
MAX_CONFIG_BYTES = 20_000_000

#: Weights that moeconv does not read, by file name ending.
_OTHER_WEIGHTS = (".bin", ".pth", ".pt", ".gguf", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".mlmodel")
_OTHER_INDEXES = (".bin.index.json", ".h5.index.json", ".msgpack.index.json", ".safetensors.index.json")
#: Folders that hold other copies of the weights, or what tools keep for themselves.
_LEFT_OUT_FOLDERS = {"original": "the publisher's own format", ".git": "version control", ".cache": "download cache"}
#: What a clone holds in place of a large file that was not downloaded; never longer than 1024 bytes.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_POINTER_BYTES = 1024
#: An escaped byte of a name that is not UTF-8, and no second half of a character.
_ESCAPED_BYTE = re.compile(rb"(?<!\\ud[89ab][0-9a-f]{2})\\udc[89a-f][0-9a-f]")


class StoredTensor(NamedTuple):
    """A tensor and where its bytes lie: `offset` in file number `file` of the checkpoint.

    A matrix that is stored quantized has no place of its own; `encoded` says where its parts are. Of a piece of a
    tensor, `inside` says which, and `offset` is that of the whole tensor.
    """

    spec: Spec
    file: int
    offset: int
    encoded: Encoded | None = None
    inside: Inside | None = None


#: As the class itself makes one of all its fields, in a third of the time.
_new_tensor = partial(tuple.__new__, StoredTensor)


class Inside(NamedTuple):
    """Where a piece lies in a stored tensor: as `view` in the block whose first element is number `at`."""

    whole: Spec
    at: int
    view: View


class Encoded(NamedTuple):
    """A matrix as a quantized checkpoint holds it: its format, and the stored tensors by suffix."""

    format: Decoder
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
    """A file, or a whole folder (`NAME/`), that is not carried over, and why."""

    path: str
    nbytes: int
    why: str


class Checkpoint(NamedTuple):
    """What a folder holds. `tensors` is in natural order of files, then of their offsets.

    `stand_ins` are files of another folder in place of weight files that an unfinished run has deleted (`consumption`):
    they have headers and small tensors alone.
    """

    root: Path
    files: tuple[WeightFile, ...]
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any]
    sidecars: tuple[FileStat, ...]
    left_out: tuple[LeftOut, ...]
    manifest: Mapping[str, Any]
    index_metadata: Mapping[str, Any]
    stand_ins: Mapping[str, Path] = MappingProxyType({})

    @property
    def weight_paths(self) -> tuple[Path, ...]:
        """Where the weight files lie."""
        return tuple(self.stand_ins.get(file.path, self.root / file.path) for file in self.files)

    @property
    def index_total_size(self) -> int | None:
        """Bytes of all tensors as the index has them."""
        total = self.index_metadata.get("total_size")
        if type(total) is int or (isinstance(total, float) and isfinite(total)):
            return int(total)
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return total_nbytes([tensor.spec for tensor in self.tensors.values()])

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
    stand_ins: dict[str, Path] = field(default_factory=dict)

    def place(self, path: str) -> Path:
        """Where a file of the folder lies, or what stands in for it."""
        return self.stand_ins.get(path, self.root / path)

    def is_usable(self, entry: FileStat) -> bool:
        """Whether a file can be read and is no pointer of Git LFS; else a problem is noted."""
        if not len(_LFS_POINTER) <= entry.nbytes <= _MAX_POINTER_BYTES:
            return True
        try:
            self._check_content(entry.path, self.files.read_bytes(self.place(entry.path), _MAX_POINTER_BYTES))
        except CheckpointError as error:
            self.problems += error.problems
            return False
        return True

    def _check_content(self, name: str, content: bytes) -> None:
        if content.startswith(_LFS_POINTER):
            raise CheckpointError(
                f"{self.root / name} is a Git LFS pointer; the file itself was not downloaded",
                f"Run `git lfs pull` in {self.root}.",
            )

    def mapping(self, name: str, limit: int) -> dict[str, Any] | None:
        """The JSON object in a file; None, with a problem noted, where there is none."""
        try:
            content = self.files.read_bytes(self.root / name, limit)
            self._check_content(name, content)
            value = read_manifest(content) if name == MANIFEST else read_json(content, _index_strings)
        except HeaderError as error:
            self.problems.append(Problem(f"{self.root / name}: {error}", "Download the file again."))
        except CheckpointError as error:
            self.problems += error.problems
        else:
            if isinstance(value, dict):
                return value
            self.problems.append(Problem(f"{self.root / name} is not a JSON object", "Download the file again."))
        return None


def _index_strings(value: Any) -> int:
    """Of an index: words of the metadata, and a name and a file for each tensor."""
    if not isinstance(value, dict) or value.keys() != {"metadata", "weight_map"}:
        return -1
    metadata, weight_map = value["metadata"], value["weight_map"]
    if not isinstance(metadata, dict) or not isinstance(weight_map, dict):
        return -1
    if any(isinstance(word, dict | list) for word in metadata.values()):
        return -1
    files = [*metadata.values(), *weight_map.values()]
    return 2 + len(metadata) + len(weight_map) + sum(1 for file in files if type(file) is str)


def read_manifest(content: bytes) -> Any:
    """Parse a `moeconv.json`. Names that are not UTF-8 stand in it as Python has them, with bytes as half characters.

    Raises:
        HeaderError: not JSON that can be trusted.
    """
    read_json(_ESCAPED_BYTE.sub(b"?", content))  # of other files it refuses such text
    return json.loads(content)


def open_checkpoint(
    root: Path, files: Files | None = None, include: tuple[str, ...] = (), stand_ins: Path | None = None
) -> Checkpoint:
    """Read the headers of a checkpoint folder.

    Args:
        root: the folder.
        files: door to the file system.
        include: further safetensors files, relative to the folder, that belong to the model though no
            index names them.
        stand_ins: folder of files in place of weight files that are missing; it need not exist.

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
    if stand_ins is not None and opening.files.is_folder(stand_ins):
        for path, entry in opening.files.walk(stand_ins):
            if entry is not None and path not in found and not path.endswith(TIME_SUFFIX):
                found[path] = entry._replace(mtime_ns=_time_of(opening, stand_ins / path, entry.mtime_ns))
                opening.stand_ins[path] = stand_ins / path
    if JOURNAL in found and MANIFEST not in found:
        raise CheckpointError(
            f"{root} is an unfinished run of moeconv: not all of its weights are there",
            "Finish it with the command that began it, then give the finished folder.",
        )
    config = (opening.mapping(CONFIG, MAX_CONFIG_BYTES) if CONFIG in found else None) or {}
    manifest = (opening.mapping(MANIFEST, MAX_INDEX_BYTES) if MANIFEST in found else None) or {}
    weight_map, index_metadata, index = _weight_map(opening, found)
    names = sorted({*(name for name in weight_map.values()), *include}) if weight_map else sorted(include)
    for name in include:
        if name not in found or not name.endswith(".safetensors"):
            opening.problems.append(
                Problem(f"--include {name}: no such safetensors file in {root}", "Give a path relative to the folder.")
            )
    weights, tensors = _read_headers(opening, [name for name in names if name in found], found)
    _check_index(opening, weight_map, weights, tensors, found, include)
    sidecars, left_out = _others(found, unreadable, {*names, index})
    for entry in sidecars:
        if entry.path != CONFIG:  # which was looked at before
            opening.is_usable(entry)
    _check_readable(opening, unreadable)
    if opening.problems:
        raise CheckpointError.of(opening.problems)
    return Checkpoint(
        root, tuple(weights), tensors, config, tuple(sidecars), tuple(left_out), manifest, index_metadata,
        opening.stand_ins,
    )  # fmt: skip


def _time_of(opening: _Opening, stand_in: Path, own: int) -> int:
    """The time of the file that is gone; that of its stand-in may have been lost where that was copied."""
    path = stand_in.with_name(stand_in.name + TIME_SUFFIX)
    content = opening.files.read_bytes(path, 100) if opening.files.exists(path) else b""
    return int(content) if content.isdigit() else own


def _check_readable(opening: _Opening, unreadable: list[str]) -> None:
    for path in unreadable:
        if path.split("/", 1)[0] in _LEFT_OUT_FOLDERS:
            continue
        whole = opening.root / path
        if not opening.files.is_folder(whole):
            problem = Problem(
                f"{whole} cannot be read or is no regular file", "Restore the link's target, or remove it."
            )
        elif opening.files.is_link(whole):
            problem = Problem(
                f"{whole} is a link to a folder, and moeconv does not follow those",
                "Put the folder itself there if the model needs it; else remove the link.",
            )
        else:
            problem = Problem(f"{whole} is a folder that cannot be listed", "Make it readable for this user.")
        opening.problems.append(problem)


def _weight_map(opening: _Opening, found: Mapping[str, FileStat]) -> tuple[dict[str, str], dict[str, Any], str | None]:
    """Tensor name -> file, from the index; {"": file} for a single file. Then the index's metadata and its name."""
    root = opening.root
    top = [path for path in found if "/" not in path and path.endswith(".safetensors")]
    indexes = [path for path in found if "/" not in path and path.endswith(".safetensors.index.json")]
    index = INDEX if INDEX in indexes else indexes[0] if len(indexes) == 1 else None
    if index is None:
        single = SINGLE if SINGLE in top else top[0] if len(top) == 1 else None
        if single:
            return {"": single}, {}, None
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
        return {}, {}, None
    parsed = opening.mapping(index, MAX_INDEX_BYTES)
    if parsed is None:
        return {}, {}, index
    weight_map = parsed.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        opening.problems.append(Problem(f"{root / index} has no weight_map", "Download the index again."))
        return {}, {}, index
    metadata = parsed.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    if set(map(type, weight_map.values())) == {str} and all(map(_is_file_name, set(weight_map.values()))):
        return weight_map, metadata, index
    valid: dict[str, str] = {}
    for name, file in weight_map.items():
        if not _is_file_name(file):
            opening.problems.append(
                Problem(
                    f"{root / index} places {name[:200]!r} in {str(file)[:200]!r}, which is no file name here",
                    "Weight files lie beside the index: download the index again.",
                )
            )
        else:
            valid[name] = file
    return valid, metadata, index


def _is_file_name(name: Any) -> bool:
    """Of a file in the same folder."""
    return isinstance(name, str) and not set("/\\\0") & set(name) and name not in ("", ".", "..")


def _read_headers(
    opening: _Opening, names: list[str], found: Mapping[str, FileStat]
) -> tuple[list[WeightFile], dict[str, StoredTensor]]:
    weights: list[WeightFile] = []
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        if not opening.is_usable(found[name]):
            continue
        try:
            file, placed = _read_header(opening, found[name], len(weights))
        except HeaderError as error:
            opening.problems.append(header_problem(str(opening.place(name)), error))
            continue
        except CheckpointError as error:
            opening.problems += error.problems
            continue
        for twice in sorted(tensors.keys() & placed.keys()) if not tensors.keys().isdisjoint(placed) else ():
            other = weights[tensors[twice].file].path
            opening.problems.append(
                Problem(
                    f"{twice!r} is in {other} and again in {name}",
                    "Remove one of the two files from the model, or leave it out of --include.",
                )
            )
        tensors.update(placed)
        weights.append(file)
    return weights, tensors


def _read_header(opening: _Opening, entry: FileStat, number: int) -> tuple[WeightFile, dict[str, StoredTensor]]:
    if entry.nbytes < 8:
        raise HeaderError(f"{entry.nbytes} bytes are no safetensors file")
    file = opening.files.open_read(opening.place(entry.path))
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
    digest = hashlib.sha256(head)
    digest.update(text)
    weight = WeightFile(entry.path, entry.nbytes, entry.mtime_ns, digest.hexdigest(), metadata)
    fields = ((spec, number, data_start + offset, None, None) for spec, offset in placed)
    return weight, {tensor.spec.name: tensor for tensor in map(_new_tensor, fields)}


def _check_index(
    opening: _Opening,
    weight_map: Mapping[str, str],
    weights: list[WeightFile],
    tensors: Mapping[str, StoredTensor],
    found: Mapping[str, FileStat],
    include: tuple[str, ...],
) -> None:
    root = opening.root
    placed = Counter(weight_map.values())
    for file in sorted(file for file in placed if file not in found):
        count = placed[file]
        opening.problems.append(
            Problem(f"{root / file} is missing; the index places {count:,} tensors there", f"Download {file} again.")
        )
    if "" in weight_map:
        return
    paths = [file.path for file in weights]
    if {name: paths[tensor.file] for name, tensor in tensors.items()} == weight_map:
        return
    readable = {path: number for number, path in enumerate(paths)}
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
    found: Mapping[str, FileStat], unreadable: list[str], own: set[str | None]
) -> tuple[list[FileStat], list[LeftOut]]:
    """Split what is not the model's `own` (weight files, index) into files to carry over and files to leave out."""
    sidecars: list[FileStat] = []
    left_out: list[LeftOut] = []
    tops = [path.split("/", 1)[0] for path in unreadable]
    folders: dict[str, list[int]] = {top: [] for top in tops if top in _LEFT_OUT_FOLDERS}
    for path, entry in found.items():
        folder = path.split("/", 1)[0] if "/" in path else ""
        if path in own or path in (MANIFEST, JOURNAL) or folder == CONSUMED:
            continue
        why = ""
        if folder in _LEFT_OUT_FOLDERS:
            folders.setdefault(folder, []).append(entry.nbytes)
            continue
        if path.endswith(".safetensors"):
            why = "safetensors that no index names"
        elif path.endswith(_OTHER_INDEXES):
            why = "index of other weight files"
        elif path.endswith(_OTHER_WEIGHTS):
            why = "weights in another format"
        if why:
            left_out.append(LeftOut(path, entry.nbytes, why))
        else:
            sidecars.append(entry)
    for folder, sizes in folders.items():
        files = f"{len(sizes):,} file{'s' * (len(sizes) != 1)}"
        left_out.append(LeftOut(f"{folder}/", sum(sizes), f"{_LEFT_OUT_FOLDERS[folder]}, {files}"))
    return sidecars, left_out
