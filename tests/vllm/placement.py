"""Which tensors of a checkpoint lie in each parameter of a model in vLLM, and whether they do after quantization.

vLLM fuses: q, k and v, gate and up, all experts of a layer. What it makes of the checkpoint in full precision tells
where each tensor belongs: there every parameter is some tensors one behind the other, found by their values alone. A
parameter of the quantized model must be the codes (scales, zero points) of the same tensors in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Placement = dict[str, list[str]]

# Parameters of vLLM that no tensor of a checkpoint belongs to.
NOT_LOADED = re.compile(
    r"\.(k|v|q|prob)_(scale|zero_point)$"  # of the KV cache: constants, as the checkpoint says nothing of it
    r"|\.(w13_|w2_)?weight_shape$"  # nothing reads it: the shapes of layers and codes say the same
    r"|\.(w13|w2)_(weight_)?g_idx(_sort_indices)?$"  # the order of columns, for checkpoints that have one
)
_PART = re.compile(r"weight(?:_(?:packed|scale_inv|scale|zero_point))?$")


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _values(tensor: Tensor) -> bytes:
    """In float32, as vLLM holds some small tensors wider than they are stored."""
    return raw(tensor.float())


def place(parameters: Tensors, tensors: Tensors) -> Placement:
    """The tensors that each parameter is made of, in order; of a model and a checkpoint in full precision.

    Raises:
        LookupError: a part of a parameter is none of the tensors, or any of several.
    """
    values = {name: _values(tensor) for name, tensor in tensors.items()}
    placement: Placement = {}
    for parameter, found in parameters.items():
        content, at = _values(found), 0
        placement[parameter] = []
        while at < len(content):
            fitting = [name for name, value in values.items() if content.startswith(value, at)]
            if len(fitting) != 1:
                raise LookupError(f"{parameter}, after {placement[parameter]}: any of {fitting}")
            placement[parameter] += fitting
            at += len(values[fitting[0]])
    return placement


def differences(parameters: Tensors, tensors: Tensors, placement: Placement) -> Iterator[str]:
    """Parameters that are not, byte for byte, the tensors that belong there, and tensors that are in none."""
    used = {name for name in tensors if name.endswith(".weight_shape")}
    for name, found in parameters.items():
        if NOT_LOADED.search(name):
            continue
        part = _PART.search(name)
        whole = name[: part.start()] + "weight" if part else name
        if whole not in placement:
            yield f"{name} is unknown"
            continue
        names = [f"{_PART.sub('', item)}{part[0]}" if part else item for item in placement[whole]]
        used.update(names)
        problem = _difference(found, names, tensors)
        if problem:
            yield f"{name} {problem}"
    yield from (f"{name} is in no parameter" for name in tensors if name not in used)
    yield from (f"{name} does not exist" for name in placement if not _has(name, parameters))


def _has(name: str, parameters: Tensors) -> bool:
    return name in parameters or f"{name}_packed" in parameters


def _difference(found: Tensor, names: Sequence[str], tensors: Tensors) -> str | None:
    missing = [name for name in names if name not in tensors]
    if missing:
        return f"is {found.dtype}, and {missing[0]} is not in the checkpoint"
    stored = [tensors[name] for name in names]
    if found.dtype == torch.float32:  # some are held wider than they are stored, which changes no value
        stored = [item.float() if item.dtype in (torch.bfloat16, torch.float16) else item for item in stored]
    kinds = {(item.dtype, item.shape[-1] if item.ndim > 1 else 1) for item in stored}
    if kinds != {(found.dtype, found.shape[-1] if found.ndim > 1 else 1)}:
        return f"is {found.dtype} {list(found.shape)}, not {stored[0].dtype} {list(stored[0].shape)}"
    return None if raw(found) == b"".join(map(raw, stored)) else "has other bytes"
