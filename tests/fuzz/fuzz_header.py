"""Bytes as the header of a safetensors file: two bytes say how many bytes of tensors follow it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import suppress

from safetensors import deserialize

from moeconv import header
from moeconv.header import HeaderError, build_header, header_length, parse_header
from moeconv.tensors import DTYPE_BITS, Spec

MAX_LEN = 4096


def seeds() -> Iterator[bytes]:
    some = [
        Spec("model.layers.0.mlp.experts.3.up_proj.weight", "BF16", (2, 3)),
        Spec("s", "U8", ()),
        Spec("e", "F4", (0, 5)),
    ]
    many = [Spec(f"{dtype}.\u00e9", dtype, (4, 2)) for dtype in DTYPE_BITS]
    for specs, metadata in ((some, {"format": "pt"}), (many, {}), ([], {"a": 'b"\\'}), (some[:1], {})):
        head, _, nbytes = build_header(specs, metadata)
        text = head[8:].rstrip(b" ")
        for spelled in (text, json.dumps(json.loads(text)).encode(), json.dumps(json.loads(text), indent=1).encode()):
            yield struct.pack("<H", nbytes - len(head)) + spelled


def one_input(data: bytes) -> None:
    """What is accepted, the safetensors library accepts and reads as the same tensors; all else is a HeaderError."""
    if len(data) < 2:
        return
    (nbytes,), text = struct.unpack("<H", data[:2]), data[2:]
    content = bytes(range(256)) * (nbytes // 256 + 1)
    file = struct.pack("<Q", len(text)) + text + content[:nbytes]
    with suppress(HeaderError):
        header_length(data[:8].ljust(8, b"\0"), len(data))
    try:
        metadata, placed = parse_header(text, nbytes)
    except HeaderError as error:
        _assert_short(str(error))
        return
    theirs = {name: (item["dtype"], tuple(item["shape"]), bytes(item["data"])) for name, item in deserialize(file)}
    ours = {spec.name: (spec.shape, content[at : at + spec.nbytes]) for spec, at in placed}
    assert {name: item[1:] for name, item in theirs.items()} == ours
    said = json.loads(text)
    assert said.pop("__metadata__", {}) == metadata
    assert {name: entry["dtype"] for name, entry in said.items()} == {spec.name: spec.dtype for spec, _ in placed}
    usual = header._usual_header(text, nbytes)
    assert usual is None or usual == (metadata, placed)


def _assert_short(message: str) -> None:
    assert 0 < len(message) < 1000
