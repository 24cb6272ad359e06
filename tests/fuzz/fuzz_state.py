"""Bytes as the state of a 4-bit tensor of bitsandbytes."""

from __future__ import annotations

import atexit
import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from moeconv.checkpoint import open_checkpoint
from moeconv.errors import Problem
from moeconv.formats import CODEBOOKS
from moeconv.header import build_header
from moeconv.states import stated_view
from moeconv.tensors import Spec

MAX_LEN = 1024
_NAME = "model.layers.0.mlp.down_proj.weight"
_SHAPE = (64, 32)


def seeds() -> Iterator[bytes]:
    said = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(_SHAPE)}
    nested = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.03}
    for more in ({}, nested, {"shape": [2048, 1]}, {"dtype": "float32"}):
        yield json.dumps({**said, **more}).encode()


@cache
def _folder() -> Path:
    tmpfs = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(dir=tmpfs if tmpfs.is_dir() else None))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def one_input(data: bytes) -> None:
    """A state is refused with a problem, or gives the tensor of the shape that it names."""
    blocks = 32
    tensors = [
        (Spec(f"{_NAME}.absmax", "F32", (blocks,)), bytes(4 * blocks)),
        (Spec(f"{_NAME}.quant_map", "F32", (16,)), struct.pack("<16f", *CODEBOOKS["nf4"])),
        (Spec(_NAME, "U8", (1024, 1)), bytes(1024)),
        (Spec(f"{_NAME}.quant_state.bitsandbytes__nf4", "U8", (len(data),)), data),
    ]
    head, _, _ = build_header([spec for spec, _ in tensors], {})
    (_folder() / "model.safetensors").write_bytes(head + b"".join(content for _, content in tensors))
    problems: list[Problem] = []
    shown = stated_view(open_checkpoint(_folder()), problems)
    if problems:
        assert [str(problem) for problem in problems]
        assert _NAME not in shown.tensors or shown.tensors[_NAME].encoded is None
        return
    found = shown.tensors[_NAME]
    assert list(found.spec.shape) == json.loads(data)["shape"]
    assert found.encoded is not None
    assert set(shown.tensors) == {_NAME}
