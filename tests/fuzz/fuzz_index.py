"""Bytes as a checkpoint folder: an index, and headers of the two weight files that it should name."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

from safetensors import deserialize

from moeconv.checkpoint import INDEX, open_checkpoint
from moeconv.errors import CheckpointError
from tests.fuzz.memory import ROOT, MemoryFiles, assert_worded

MAX_LEN = 4096
_CUT = b"\n\n"
_NAMES = (INDEX, "a.safetensors", "b.safetensors")


def seeds() -> Iterator[bytes]:
    entry = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
    weight_map = {"m.layers.0.x": "a.safetensors", "m.layers.10.x": "b.safetensors"}
    for metadata in ({"total_size": 4}, {}, {"total_size": 4.0, "more": {"a": [1, "b"]}}):
        index = json.dumps({"metadata": metadata, "weight_map": weight_map})
        headers = [json.dumps({name: entry}) for name in weight_map]
        yield _CUT.join(text.encode() for text in (index, *headers))
    yield json.dumps({"weight_map": {"a": "../a.safetensors", "b": "/etc/passwd", "c": 3}}).encode()


def one_input(data: bytes) -> None:
    """A folder that opens has exactly the tensors that its index names, in the files that it names, inside of them."""
    pieces = data.split(_CUT, len(_NAMES) - 1)
    contents = {
        name: piece if name == INDEX else struct.pack("<Q", len(piece)) + piece + b"ab"
        for name, piece in zip(_NAMES, pieces, strict=False)
    }
    try:
        opened = open_checkpoint(ROOT, MemoryFiles(contents))
    except CheckpointError as error:
        assert_worded(error)
        return
    weight_map = json.loads(contents[INDEX])["weight_map"]
    assert {name: opened.files[tensor.file].path for name, tensor in opened.tensors.items()} == weight_map
    for file in opened.files:
        assert file.path in _NAMES
        theirs = {name: bytes(item["data"]) for name, item in deserialize(contents[file.path])}
        for name, content in theirs.items():
            tensor = opened.tensors[name]
            assert contents[file.path][tensor.offset : tensor.offset + tensor.spec.nbytes] == content
    opened.index_total_size  # noqa: B018, it must not raise
    assert opened.nbytes >= 0
