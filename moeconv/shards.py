"""Where every target tensor goes: into files of a size, in natural order, behind headers that are written first."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from moeconv.checkpoint import SINGLE, Checkpoint
from moeconv.header import build_header, head_nbytes, in_file_order, stored_nbytes
from moeconv.names import natural_key
from moeconv.tensors import Spec


class TargetFile(NamedTuple):
    """A weight file to write: `head` (length and header), then `nbytes` in all; tensors in the order of the file."""

    path: str
    head: bytes
    nbytes: int
    specs: tuple[Spec, ...]

    @property
    def data_nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.nbytes - len(self.head)


#: File number and byte offset of every target tensor.
Places = Mapping[str, tuple[int, int]]


def place_specs(
    groups: Sequence[tuple[Spec, ...]], source: Checkpoint, limit: int
) -> tuple[tuple[TargetFile, ...], Callable[[], Places], bytes]:
    """Files, the places of all target tensors, made once they are asked for, and the index.

    Args:
        groups: tensors that go into one file together; nearly always one tensor.
        source: whose `__metadata__` is carried over.
        limit: bytes that a file gets at most, unless one group alone is larger.
    """
    ordered = sorted(groups, key=lambda group: natural_key(group[0].name))
    metadata = _metadata(source)
    shards = _shards(ordered, metadata, limit)
    files: list[TargetFile] = []
    starts: list[list[int]] = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        path = SINGLE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        specs = in_file_order(shard)
        head, offsets, nbytes = build_header(specs, metadata)
        starts.append(offsets)
        weight_map.update(dict.fromkeys([spec.name for spec in shard], path))
        files.append(TargetFile(path, head, nbytes, tuple(specs)))

    @cache
    def places() -> Places:
        return {
            spec.name: (number, offset)
            for number, (file, offsets) in enumerate(zip(files, starts, strict=True))
            for spec, offset in zip(file.specs, offsets, strict=True)
        }

    if len(files) == 1:
        return tuple(files), places, b""
    total = sum(file.data_nbytes for file in files)
    return tuple(files), places, _index({**source.index_metadata, "total_size": total}, weight_map)


def _index(metadata: Mapping[str, Any], weight_map: Mapping[str, str]) -> bytes:
    """The index as `json.dumps(..., indent=2)` writes it, which takes ten times as long."""
    head = json.dumps({"metadata": metadata, "weight_map": {}}, indent=2, ensure_ascii=False)
    lines = json.dumps(weight_map, separators=(",\n    ", ": "), ensure_ascii=False)[1:-1]
    return f"{head[: -len('{}' + chr(10) + '}')]}{{\n    {lines}\n  }}\n}}\n".encode()


def _shards(groups: Sequence[tuple[Spec, ...]], metadata: Mapping[str, str], limit: int) -> list[list[Spec]]:
    """Cut specs into as few files of at most `limit` bytes as their order allows, of sizes as even as that allows.

    Even files let every worker write to one of its own until the end.
    """
    ends = list(accumulate(map(stored_nbytes, groups)))
    most = max(1, limit - head_nbytes(metadata, limit))
    wanted = len(_cut(ends, most))
    low, high = min(ends[-1] // wanted, most), most
    for _ in range(8):
        middle = (low + high) // 2
        if len(_cut(ends, middle)) <= wanted:
            high = middle
        else:
            low = middle
    edges = [*_cut(ends, high), len(groups)]
    return [[spec for group in groups[a:b] for spec in group] for a, b in pairwise(edges)]


def _cut(ends: Sequence[int], most: int) -> list[int]:
    """Number of the first group of each file; `ends` are the bytes up to the end of each group."""
    firsts = [0]
    while True:
        first = firsts[-1]
        before = ends[first - 1] if first else 0
        behind = max(first + 1, bisect_right(ends, before + most))  # a group that is too large is alone
        if behind >= len(ends):
            return firsts
        firsts.append(behind)


def _metadata(source: Checkpoint) -> dict[str, str]:
    """`__metadata__` of all source files together; of several values for a key, the first file's."""
    merged: dict[str, str] = {}
    for file in source.files:
        for key, value in file.metadata.items():
            merged.setdefault(key, value)
    return merged
