"""4-bit tensors of bitsandbytes, whose state lies beside them as JSON: shape, block size, offset.

That state, and the values that codes stand for, are read when a run is planned: a few hundred bytes for a tensor.
`read_state` says what a state must be, to the command line and to `moeconv.transformers` alike.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from math import prod
from typing import Any, NamedTuple

from moeconv.checkpoint import Checkpoint, Encoded, StoredTensor
from moeconv.errors import Problem
from moeconv.formats import CODEBOOKS, StoredBnb4, is_dynamic_map
from moeconv.header import HeaderError, read_json
from moeconv.small_tensors import SmallTensors
from moeconv.tensors import Shape, Spec

_STATE = ".quant_state.bitsandbytes__"
#: What follows the name of a 4-bit tensor in that of its state.
STATE_SUFFIXES = tuple(_STATE + kind for kind in CODEBOOKS)
_WORDS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_MAX_STATE_BYTES = 4096
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class State(NamedTuple):
    """What the state of a 4-bit tensor says.

    Attributes:
        shape: of what is decoded.
        dtype: of what was encoded.
        decoder: with the offset of scales that are quantized themselves.
        names: of its tensors, by the suffixes of the decoder's parts.
    """

    shape: Shape
    dtype: str
    decoder: StoredBnb4
    names: dict[str, str]


def stated_view(source: Checkpoint, problems: list[Problem], dtype: str | None = None) -> Checkpoint:
    """The checkpoint with every 4-bit tensor of bitsandbytes as one tensor of full precision.

    Args:
        source: as opened.
        problems: receives tensors that cannot be read.
        dtype: dtype of the decoded tensors; None for the one that their state names.
    """
    stated = stated_names(source.tensors)
    if not stated:
        return source
    tensors = dict(source.tensors)
    specs = {name: tensor.spec for name, tensor in source.tensors.items()}
    with SmallTensors(source) as contents:
        for base in stated:
            found = read_state(base, specs, lambda name: contents.read(source.tensors[name]))
            if isinstance(found, str):
                problems.append(Problem(f"{base}: {found}", "Start from the checkpoint in full precision."))
            else:
                parts = {suffix: source.tensors[name] for suffix, name in found.names.items()}
                codes, spec = parts["weight"], Spec(base, dtype or found.dtype, found.shape)
                tensors[base] = StoredTensor(spec, codes.file, codes.offset, Encoded(found.decoder, parts))
            for word in (*_WORDS, *STATE_SUFFIXES):
                tensors.pop(base + word, None)
    return source._replace(tensors=tensors)


def stated_names(names: Iterable[str]) -> list[str]:
    """Names of tensors beside which there is a state."""
    marks = (name for name in names if is_stated(name))
    return list(dict.fromkeys(name[: name.rindex(_STATE)] for name in marks))


def is_stated(name: str) -> bool:
    """The name of a state."""
    return name.endswith(STATE_SUFFIXES)


def read_state(base: str, specs: Mapping[str, Spec], read: Callable[[str], bytes]) -> State | str:
    """What the state of a 4-bit tensor says, if all that lies beside it agrees; or why it cannot be read.

    Args:
        base: the tensor's name.
        specs: of all tensors.
        read: gives all bytes of a small tensor.
    """
    kinds = [kind for kind in CODEBOOKS if f"{base}{_STATE}{kind}" in specs]
    if len(kinds) > 1:
        return f"it has two states, of {' and '.join(kinds)}"
    (kind,) = kinds
    mark = f"{base}{_STATE}{kind}"
    if specs[mark].dtype != "U8" or specs[mark].nbytes > _MAX_STATE_BYTES:
        return f"{specs[mark]} is no state of bitsandbytes"
    state = _state(read(mark), kind)
    if isinstance(state, str):
        return state
    shape, own, offset = state
    made = _decoder(kind) if offset is None else StoredBnb4(kind, True, offset)
    names: dict[str, str] = {}
    for part in made.parts(shape, own):
        name = base + part.suffix.removeprefix("weight")
        spec = specs.get(name)
        if spec is None:
            return f"{name} is missing"
        if (spec.dtype, spec.shape) != (part.dtype, part.shape) and name != mark:
            return f"{spec} should be {part.dtype} {list(part.shape)}"
        names[part.suffix] = name
    if struct.unpack("<16f", read(names["weight.quant_map"])) != CODEBOOKS[kind]:
        return f"its quant_map is not that of {kind}"
    if offset is not None and not _is_usual_map(read(names["weight.nested_quant_map"])):
        return "its nested_quant_map is not that of bitsandbytes"
    return State(shape, own, made, names)


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
