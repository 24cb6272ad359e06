"""4-bit tensors of bitsandbytes, whose state lies beside them as JSON: shape, block size, offset.

That state, and the values that codes stand for, are read when a run is planned: a few hundred bytes for a tensor.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import cache
from math import prod
from typing import Any

from moeconv.checkpoint import Checkpoint, Encoded, StoredTensor
from moeconv.errors import Problem
from moeconv.formats import CODEBOOKS, StoredBnb4, is_dynamic_map
from moeconv.header import HeaderError, read_json
from moeconv.small_tensors import SmallTensors
from moeconv.tensors import Shape, Spec

_STATE = ".quant_state.bitsandbytes__"
_WORDS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_MAX_STATE_BYTES = 4096
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def stated_view(source: Checkpoint, problems: list[Problem], dtype: str | None = None) -> Checkpoint:
    """The checkpoint with every 4-bit tensor of bitsandbytes as one tensor of full precision.

    Args:
        source: as opened.
        problems: receives tensors that cannot be read.
        dtype: dtype of the decoded tensors; None for the one that their state names.
    """
    marks = {name: kind for kind in CODEBOOKS for name in source.tensors if name.endswith(_STATE + kind)}
    if not marks:
        return source
    tensors = dict(source.tensors)
    with SmallTensors(source) as contents:
        for mark, kind in marks.items():
            base = mark.removesuffix(_STATE + kind)
            found = _stated(base, mark, kind, source.tensors, contents, dtype)
            if isinstance(found, str):
                problems.append(Problem(f"{base}: {found}", "Start from the checkpoint in full precision."))
            else:
                tensors[base] = found
            for word in (*_WORDS, _STATE + kind):
                tensors.pop(base + word, None)
    return source._replace(tensors=tensors)


def is_stated(name: str) -> bool:
    """The name of a state."""
    return name.endswith(tuple(_STATE + kind for kind in CODEBOOKS))


def _stated(
    base: str, mark: str, kind: str, tensors: Mapping[str, StoredTensor], contents: SmallTensors, dtype: str | None
) -> StoredTensor | str:
    """A 4-bit tensor, or why it cannot be read."""
    if tensors[mark].spec.dtype != "U8" or tensors[mark].spec.nbytes > _MAX_STATE_BYTES:
        return f"{tensors[mark].spec} is no state of bitsandbytes"
    state = _state(contents.read(tensors[mark]), kind)
    if isinstance(state, str):
        return state
    shape, own, offset = state
    made = _decoder(kind) if offset is None else StoredBnb4(kind, True, offset)
    parts: dict[str, StoredTensor] = {}
    for part in made.parts(shape, own):
        name = base + part.suffix.removeprefix("weight")
        tensor = tensors.get(name)
        if tensor is None:
            return f"{name} is missing"
        if (tensor.spec.dtype, tensor.spec.shape) != (part.dtype, part.shape) and name != mark:
            return f"{tensor.spec} should be {part.dtype} {list(part.shape)}"
        parts[part.suffix] = tensor
    values = struct.unpack("<16f", contents.read(parts["weight.quant_map"]))
    if values != CODEBOOKS[kind]:
        return f"its quant_map is not that of {kind}"
    nested_map = parts.get("weight.nested_quant_map")
    if nested_map and not _is_usual_map(contents.read(nested_map)):
        return "its nested_quant_map is not the one of bitsandbytes"
    codes = parts["weight"]
    return StoredTensor(Spec(base, dtype or own, shape), codes.file, codes.offset, Encoded(made, parts))


def _state(content: bytes, kind: str) -> tuple[Shape, str, float | None] | str:
    """Shape, dtype, and offset of scales that are quantized themselves; or why there is no reading it."""
    try:
        said: Any = read_json(content)
    except HeaderError as error:
        return f"its state is no JSON: {error}"
    if not isinstance(said, dict) or said.get("quant_type") != kind or said.get("blocksize") != StoredBnb4.block:
        return f"its state is not that of {kind} with blocks of {StoredBnb4.block}: {str(said)[:200]}"
    shape, dtype, offset = said.get("shape"), _DTYPES.get(str(said.get("dtype"))), said.get("nested_offset")
    if not isinstance(shape, list) or not 2 <= len(shape) <= 32:
        return f"its state has the shape {str(shape)[:100]}"
    if not all(type(size) is int and 0 < size < 1 << 63 for size in shape) or prod(shape) >> 63:
        return f"its state has the shape {str(shape)[:100]}"
    if dtype is None:
        return f"its state has the dtype {str(said.get('dtype'))[:50]}"
    if offset is None:
        return tuple(shape), dtype, None
    is_usual = said.get("nested_blocksize") == 256 and said.get("nested_dtype") == "float32"
    if not is_usual or not isinstance(offset, int | float) or not abs(offset) < 1e38:  # float32, and no NaN
        return f"its scales are quantized in a way that is not known: {str(said)[:200]}"
    return tuple(shape), dtype, float(offset)


@cache  # nearly always the same
def _is_usual_map(content: bytes) -> bool:
    return is_dynamic_map(struct.unpack("<256f", content))


@cache
def _decoder(kind: str) -> StoredBnb4:
    return StoredBnb4(kind)
