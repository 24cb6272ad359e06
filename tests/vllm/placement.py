"""Which tensors of a checkpoint lie in each parameter of a model in vLLM, and whether they do after quantization.

vLLM fuses: q, k and v, gate and up, all experts of a layer. What it makes of the checkpoint in full precision tells
where each tensor belongs: there every parameter is some tensors one behind the other, found by their values alone. A
parameter of the quantized model must be the codes (scales, zero points) of the same tensors in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# What vLLM holds that no tensor of a checkpoint belongs to.
NOT_LOADED = re.compile(
    r"\._?(k|v|q|prob)_(scale|zero_point)$"  # of the KV cache: constants, as the checkpoint says nothing of it
    r"|\.(w13_|w2_)?weight_shape$"  # nothing reads it: the shapes of layers and codes say the same
    r"|\.(w13|w2)_(weight_)?g_idx(_sort_indices)?$"  # the order of columns, for checkpoints that have one
    r"|\.(w13_|w2_)?input_(global_)?scale$"  # for activations, which these checkpoints do not quantize
)
_PART = re.compile(r"weight(?:_(?:packed|scale_inv|scale|zero_point|global_scale|scale_2))?$")


class Piece(NamedTuple):
    """A whole tensor; `rows` is their order where vLLM puts them in another."""

    tensor: str
    rows: Tensor | None = None


Placement = Mapping[str, Sequence[Piece]]


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _values(tensor: Tensor) -> bytes:
    """In one dtype, as vLLM holds some small tensors in another than that on disk."""
    return raw(tensor.bfloat16())


def place(parameters: Tensors, tensors: Tensors) -> Placement:
    """The tensors that each parameter is made of, in order; of a model and a checkpoint in full precision.

    Raises:
        LookupError: a part of a parameter is none of the tensors, or could be any of several.
    """
    values = {name: _values(tensor) for name, tensor in tensors.items()}
    rows = {_values(row): (name, at) for name, item in tensors.items() if item.ndim == 2 for at, row in enumerate(item)}
    placement = {}
    for parameter, found in parameters.items():
        content, pieces = _values(found), []
        while content:
            fitting = [name for name, value in values.items() if content.startswith(value)]
            longest = [name for name in fitting if len(values[name]) == max(len(values[other]) for other in fitting)]
            if len(longest) > 1 or not (longest or found.ndim == 2):
                raise LookupError(f"{parameter}, after {pieces}: any of {longest}")
            piece = Piece(longest[0]) if longest else _permuted(content, found.shape[1], tensors, rows)
            content = content[len(values[piece.tensor]) :]
            pieces.append(piece)
        placement[parameter] = pieces
    return placement


def _permuted(content: bytes, columns: int, tensors: Tensors, rows: Mapping[bytes, tuple[str, int]]) -> Piece:
    """The tensor whose rows `content` begins with, in any order."""
    lines = [content[at : at + 2 * columns] for at in range(0, len(content), 2 * columns)]
    name = rows[lines[0]][0]
    count = tensors[name].shape[0]
    order = [at for item, at in (rows[line] for line in lines[:count]) if item == name]
    if sorted(order) != list(range(count)):
        raise LookupError(f"not the rows of {name}")
    return Piece(name, torch.tensor(order))


def differences(parameters: Tensors, tensors: Tensors, placement: Placement) -> Iterator[str]:
    """Parameters that are not, byte for byte, the tensors that belong there, and tensors that are in none."""
    used = {name for name in tensors if name.endswith(".weight_shape")}
    placed = set()
    for name, found in parameters.items():
        if NOT_LOADED.search(name):
            continue
        part = _PART.search(name)
        whole = name[: part.start()] + "weight" if part else name
        placed.add(whole)
        if whole not in placement:
            yield f"{name} is unknown"
            continue
        pieces = [
            piece._replace(tensor=_PART.sub(part[0], piece.tensor)) if part else piece for piece in placement[whole]
        ]
        used.update(piece.tensor for piece in pieces)
        problem = _difference(found, pieces, tensors, is_kept=name in placement)
        if problem:
            yield f"{name} {problem}"
    yield from (f"{name} is in no parameter" for name in tensors if name not in used)
    yield from (f"{name} does not exist" for name in placement if name not in placed)


def _difference(found: Tensor, pieces: Sequence[Piece], tensors: Tensors, *, is_kept: bool) -> str | None:
    content = b""
    for name, rows in pieces:
        if name not in tensors:
            return f"is {found.dtype}, and {name} is not in the checkpoint"
        stored = tensors[name]
        # vLLM rounds or widens some tensors in full precision; a scale may be widened, which changes no value.
        if stored.dtype in FLOATS and (found.dtype == torch.float32 or (is_kept and found.dtype in FLOATS)):
            stored = stored.to(found.dtype)
        if stored.dtype != found.dtype:
            return f"is {found.dtype}, not {stored.dtype}"
        if rows is not None and stored.ndim == 2:
            order = _order(rows, stored.shape[0])
            if order is None:
                return f"has no {name} in the order of the matrix's rows"
            stored = stored[order]
        content += raw(stored)
    return None if raw(found) == content else "has other bytes"


def _order(rows: Tensor, count: int) -> Tensor | None:
    """The order of `count` blocks of rows; None if these do not stay together."""
    blocks = rows.view(count, -1) // (len(rows) // count)
    return blocks[:, 0] if (blocks == blocks[:, :1]).all() else None
