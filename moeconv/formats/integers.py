"""Integers of 4 and 8 bits as compressed-tensors stores them.

Formulas: compressed-tensors, `quantization/utils/helpers.py` (`calculate_qparams`) and `compressors/`. Scales are
computed and stored in the source's dtype; codes come from a division by the stored scale in float32, halves to even.
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import pack
from typing import TYPE_CHECKING, Any

from moeconv.formats.format import Format, StoredPart
from moeconv.tensors import Shape

if TYPE_CHECKING:
    from torch import Tensor

_WORD_BITS = 32
#: Factors of the range that `search: mse` tries, the range itself first; the best of them for each group is taken. In a
#: small group, or with 8 bits, it is often one above 1: codes end at 7 (127), half a step below a scale's full range.
_SHRINKS = (1.0, *(percent / 100 for percent in range(108, 68, -2) if percent != 100))


def _bounds(bits: int) -> tuple[int, int]:
    return -(1 << bits - 1), (1 << bits - 1) - 1


def _range(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value along the last axis, widened to hold zero."""
    return groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)


def _scale(low: Tensor, high: Tensor, steps: float) -> Tensor:
    """Symmetric scale: the larger magnitude over half the number of steps; eps of the dtype for zeros."""
    import torch

    scale = torch.maximum(low.neg(), high) / torch.tensor(steps / 2, dtype=low.dtype)
    return torch.where(scale == 0, torch.finfo(low.dtype).eps, scale).to(low.dtype)


class ChannelInt8(Format):
    """`int-quantized` W8A8: one scale a row, s = amax / 127.5."""

    name = "w8a8"
    quant_method = "compressed-tensors"
    live_nbytes = 10

    def parts(self, shape: Shape, dtype: str) -> tuple[StoredPart, ...]:
        return (StoredPart("weight", "I8", shape, 1), StoredPart("weight_scale", dtype, (shape[0], 1), 1))

    def encode(self, tile: Tensor) -> tuple[Tensor, ...]:
        import torch

        low, high = _bounds(8)
        scale = _scale(*_range(tile), high - low)[:, None]
        codes = tile.to(torch.float32, copy=True).div_(scale.float()).clamp_(low, high).round_()
        return codes.to(torch.int8), scale

    def decode(self, parts: Mapping[str, Tensor], columns: int) -> Tensor:
        return parts["weight"].float().mul_(parts["weight_scale"].float())

    def settings(self) -> dict[str, Any]:
        arguments = {"num_bits": 8, "type": "int", "symmetric": True}
        return {
            "format": "int-quantized",
            "weights": {**arguments, "strategy": "channel", "dynamic": False},
            "input_activations": {**arguments, "strategy": "token", "dynamic": True},
        }


class PackedInt(Format):
    """`pack-quantized`: codes in 32-bit words along a row, a scale (and zero point) for each group of columns.

    Element j of a row lies in bits `b * (j % (32/b))` of word `j // (32/b)`, as code - qmin. Zero points are packed in
    the same way along the rows.

    Args:
        bits: 4 or 8.
        symmetric: False for one zero point a group.
        group_size: columns of a group.
        search: `amax`, or `mse` for the scale of least squared error among 20 narrower and wider ranges.
    """

    quant_method = "compressed-tensors"
    live_nbytes = 16

    def __init__(self, bits: int, symmetric: bool = True, group_size: int = 128, search: str = "amax") -> None:
        self.name = f"w{bits}a16" + ("" if symmetric else "_asym")
        self.bits = bits
        self.symmetric = symmetric
        self.group_size = group_size
        self.search = search
        self.row_multiple = 1 if symmetric else _WORD_BITS // bits

    def refusal(self, shape: Shape, dtype: str) -> str | None:
        refused = super().refusal(shape, dtype)
        if refused is None and shape[1] % self.group_size:
            return f"{shape[1]} columns are not made of whole groups of {self.group_size}"
        return refused

    def parts(self, shape: Shape, dtype: str) -> tuple[StoredPart, ...]:
        rows, columns = shape
        per_word = _WORD_BITS // self.bits
        groups = columns // self.group_size
        parts = [
            StoredPart("weight_packed", "I32", (rows, -(-columns // per_word)), 1),
            StoredPart("weight_scale", dtype, (rows, groups), 1),
        ]
        if not self.symmetric:
            parts.append(StoredPart("weight_zero_point", "I32", (-(-rows // per_word), groups), per_word))
        return (*parts, StoredPart("weight_shape", "I64", (2,), 0))

    def constant(self, part: StoredPart, shape: Shape) -> bytes:
        return pack("<2q", *shape)

    def encode(self, tile: Tensor) -> tuple[Tensor, ...]:
        import torch

        low = _bounds(self.bits)[0]
        groups = _groups(tile, self.group_size)
        least, most = _range(groups)
        if self.search == "mse":
            scale, zero = self._best(groups.float(), least, most)
        else:
            scale, zero = self._parameters(least, most)
        codes = self._codes(groups.float(), scale, zero)
        packed = _packed(codes.sub_(low).to(torch.uint8).flatten(1), self.bits)
        if zero is None:
            return packed, scale
        return packed, scale, _transposed(_packed((zero - low).to(torch.uint8).T, self.bits))

    def _parameters(self, least: Tensor, most: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale in the source's dtype, and the zero point as float32 whole numbers."""
        import torch

        low, high = _bounds(self.bits)
        if self.symmetric:
            return _scale(least, most, high - low), None
        scale = (most - least) / torch.tensor(float(high - low), dtype=least.dtype)
        # A range that underflows to a scale of 0 has its zero point at an end, a range of 0 (0 / 0) has it at 0.
        zero = (low - least / scale).float().clamp_(low, high).round_().nan_to_num_(0.0)
        return torch.where(scale == 0, torch.finfo(least.dtype).eps, scale).to(least.dtype), zero

    def _codes(self, groups: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        low, high = _bounds(self.bits)
        scaled = groups / scale.float()[..., None]
        if zero is not None:
            scaled += zero[..., None]
        return scaled.clamp_(low, high).round_()

    def _best(self, groups: Tensor, least: Tensor, most: Tensor) -> tuple[Tensor, Tensor | None]:
        import torch

        scale, zero = self._parameters(least, most)
        error = torch.full_like(scale, torch.inf, dtype=torch.float32)
        for shrink in _SHRINKS:
            other, shifted = self._parameters(least * shrink, most * shrink)
            squared = self._squared_error(groups, other, shifted)
            better = squared < error
            scale, error = torch.where(better, other, scale), torch.where(better, squared, error)
            if shifted is not None and zero is not None:
                zero = torch.where(better, shifted, zero)
        return scale, zero

    def _squared_error(self, groups: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        decoded = self._codes(groups, scale, zero)
        if zero is not None:
            decoded -= zero[..., None]
        decoded *= scale.float()[..., None]
        return decoded.sub_(groups).square_().sum(-1)

    def decode(self, parts: Mapping[str, Tensor], columns: int) -> Tensor:
        low, _ = _bounds(self.bits)
        codes = _unpacked(parts["weight_packed"], self.bits)[:, :columns].float().add_(low)
        scale = parts["weight_scale"].float()
        codes = _groups(codes, codes.shape[1] // scale.shape[1])
        if not self.symmetric:
            zero = _unpacked(_transposed(parts["weight_zero_point"]), self.bits).T[: scale.shape[0]].float() + low
            codes -= zero[..., None]
        codes *= scale[..., None]
        return codes.flatten(1)

    def settings(self) -> dict[str, Any]:
        zero = {} if self.symmetric else {"zp_dtype": "torch.int8"}
        weights = {
            "num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "strategy": "group",
            "group_size": self.group_size, "dynamic": False, **zero,
        }  # fmt: skip
        return {"format": "pack-quantized", "weights": weights, "input_activations": None}


def _groups(tile: Tensor, size: int) -> Tensor:
    """[rows, K] as [rows, K / size, size]."""
    return tile.reshape(tile.shape[0], -1, size)


def _transposed(words: Tensor) -> Tensor:
    """A copy in row-major order; `.T.contiguous()` keeps the strides of an axis of size 1, which no view accepts."""
    import torch

    return words.T.clone(memory_format=torch.contiguous_format)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, n] below 2^bits as words [rows, ceil(n * bits / 32)] int32, the first in the lowest bits."""
    import torch
    from torch.nn.functional import pad

    codes = pad(codes, (0, -codes.shape[1] % (_WORD_BITS // bits)))
    if bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    words = codes.flatten().view(torch.int32)  # flat, as strides of an axis of size 1 can be anything
    return words.view(codes.shape[0], -1)


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_packed`: uint8 codes."""
    import torch

    codes = words.contiguous().view(torch.uint8)
    if bits == 8:
        return codes
    return torch.stack((codes & 15, codes >> 4), -1).flatten(1)
