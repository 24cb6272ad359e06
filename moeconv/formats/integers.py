"""Integers of 4 and 8 bits as compressed-tensors stores them.

Formulas: compressed-tensors, `quantization/utils/helpers.py` (`calculate_qparams`) and `compressors/`. Scales are
computed and stored in the source's dtype; codes come from a division by the stored scale in float32, halves to even.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from struct import pack
from typing import TYPE_CHECKING, Any

from moeconv.formats.columns import ColumnInt
from moeconv.formats.format import Decoder, Format, StoredPart
from moeconv.formats.rows import RowFormat
from moeconv.formats.strips import amax, by_group, float_strips, scale_of, strips
from moeconv.tensors import Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_WORD_BITS = 32
#: Factors of the range that `search: mse` tries, the range itself first; the best of them for each group is taken. In a
#: small group, or with 8 bits, it is often one above 1: codes end at 7 (127), half a step below a scale's full range.
_SHRINKS = (1.0, *(percent / 100 for percent in range(108, 68, -2) if percent != 100))


def _bounds(bits: int) -> tuple[int, int]:
    return -(1 << bits - 1), (1 << bits - 1) - 1


class ChannelInt8(RowFormat):
    """`int-quantized` W8A8: one scale a row, s = amax / 127.5."""

    name = "w8a8"
    live_nbytes = 14
    code_dtype = "I8"
    largest = 127.5

    def _codes(self, quotients: Tensor) -> Tensor:
        return quotients.clamp_(*_bounds(8)).round_()

    def _floats(self, codes: Tensor) -> Tensor:
        return codes.float()

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
        search: `amax`, or `mse` for the scale of least squared error among 20 narrower and wider ranges. Symmetric
            codes have `full_range` too: these and 20 more that bring the value of largest magnitude to the lowest code,
            which has no positive counterpart, so that scales are negative where that value is positive.
    """

    quant_method = "compressed-tensors"

    def __init__(self, bits: int, symmetric: bool = True, group_size: int = 128, search: str = "amax") -> None:
        self.name = f"w{bits}a16" + ("" if symmetric else "_asym")
        self.bits = bits
        self.symmetric = symmetric
        self.group_size = group_size
        self.search = search
        self.live_nbytes = 16 if search == "amax" else 22
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

    def constant(self, part: StoredPart, shape: Shape, dtype: str) -> bytes:
        return pack("<2q", *shape)

    def encode(self, tile: Tensor, peak: float = 0.0) -> tuple[Tensor, ...]:
        import torch

        rows, columns = tile.shape
        # On "meta" as well; codes and zero points are 8 bits each until they are packed.
        codes = torch.empty((rows, columns), dtype=torch.int8, device=tile.device)
        scales = torch.empty((rows, columns // self.group_size), dtype=tile.dtype, device=tile.device)
        zeros = None if self.symmetric else torch.empty(scales.shape, dtype=torch.int8, device=tile.device)
        for strip, floats in float_strips(tile):
            groups, values = by_group(tile[strip], self.group_size), by_group(floats, self.group_size)
            scale, zero = self._parameters(*self._range(groups, values))
            if self.search != "amax":
                scale, zero = self._best(values, *self._range(groups, values))
            codes[strip] = self._codes(values, scale, zero).flatten(1)
            scales[strip] = scale
            if zeros is not None and zero is not None:
                zeros[strip] = zero
        packed = _packed(codes, self.bits)
        return (packed, scales) if zeros is None else (packed, scales, _transposed(_packed(zeros.T, self.bits)))

    def _range(self, groups: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of each group, widened to hold zero; symmetric about it where the codes are."""
        if self.symmetric:
            most = amax(groups, 2)
            return most.neg(), most
        return values.amin(2).clamp_(max=0).to(groups.dtype), values.amax(2).clamp_(min=0).to(groups.dtype)

    def _parameters(self, least: Tensor, most: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale in the source's dtype, and the zero point as float32 whole numbers."""
        import torch

        low, high = _bounds(self.bits)
        if self.symmetric:
            return scale_of(most, (high - low) / 2), None
        scale = (most - least) / torch.tensor(float(high - low), dtype=least.dtype)
        # A range that underflows to a scale of 0 has its zero point at an end, a range of 0 (0 / 0) has it at 0.
        zero = (low - least / scale).float().clamp_(low, high).round_().nan_to_num_(0.0)
        return torch.where(scale == 0, torch.finfo(least.dtype).eps, scale).to(least.dtype), zero

    def _codes(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Codes of float32 groups, in place."""
        low, high = _bounds(self.bits)
        values.div_(scale.float()[..., None])
        if zero is not None:
            values += zero[..., None]
        return values.clamp_(low, high).round_()

    def _best(self, values: Tensor, least: Tensor, most: Tensor) -> tuple[Tensor, Tensor | None]:
        import torch

        scale, zero = self._parameters(least, most)
        error = torch.full_like(scale, torch.inf, dtype=torch.float32)
        for other, shifted in self._tried(values, least, most):
            squared = self._squared_error(values, other, shifted)
            better = squared < error
            scale, error = torch.where(better, other, scale), torch.where(better, squared, error)
            if shifted is not None and zero is not None:
                zero = torch.where(better, shifted, zero)
        return scale, zero

    def _tried(self, values: Tensor, least: Tensor, most: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        import torch

        for shrink in _SHRINKS:
            yield self._parameters(least * shrink, most * shrink)
        if self.search == "full_range":
            edge = torch.where(values.amax(2) >= most.float(), -most, most) / -_bounds(self.bits)[0]
            for shrink in _SHRINKS:
                scale = edge * shrink
                yield torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale), None

    def _squared_error(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        decoded = self._codes(values.clone(), scale, zero)
        if zero is not None:
            decoded -= zero[..., None]
        decoded *= scale.float()[..., None]
        return decoded.sub_(values).square_().sum(-1)

    def decode(self, parts: Mapping[str, Tensor], columns: int, dtype: torch.dtype | None = None) -> Tensor:
        import torch

        words, scales = parts["weight_packed"], parts["weight_scale"].float()
        zeros = None if self.symmetric else _unpacked(_transposed(parts["weight_zero_point"]), self.bits).T
        decoded = torch.empty((len(words), columns), dtype=dtype or torch.float32, device=words.device)
        for strip in strips(decoded):
            values = by_group(_unpacked(words[strip], self.bits)[:, :columns].float(), self.group_size)
            if zeros is not None:
                values -= zeros[strip].float()[..., None]
            values *= scales[strip][..., None]
            decoded[strip] = values.flatten(1)
        return decoded

    def takes(self, stored: Decoder, dtype: str) -> bool:
        """From GPTQ and AWQ: codes and zero points count from another number, and lie in another order."""
        return (
            isinstance(stored, ColumnInt)
            and (stored.bits, stored.group, stored.scale_dtype) == (self.bits, self.group_size, dtype)
            and not stored.is_ordered
            and (stored.is_symmetric or not self.symmetric)
        )

    def retold(self, stored: Decoder, parts: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        import torch

        assert isinstance(stored, ColumnInt)
        codes, zeros, _ = stored.integers(parts)
        signed, shifted = (item.sub(1 << self.bits - 1).view(torch.int8) for item in (codes, zeros))
        made = _packed(signed.T.contiguous(), self.bits), parts["scales"].T.contiguous()
        return made if self.symmetric else (*made, _transposed(_packed(shifted, self.bits)))

    def settings(self) -> dict[str, Any]:
        zero = {} if self.symmetric else {"zp_dtype": "torch.int8"}
        weights = {
            "num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "strategy": "group",
            "group_size": self.group_size, "dynamic": False, **zero,
        }  # fmt: skip
        return {"format": "pack-quantized", "weights": weights, "input_activations": None}


def _transposed(words: Tensor) -> Tensor:
    """A copy in row-major order; `.T.contiguous()` keeps the strides of an axis of size 1, which no view accepts."""
    import torch

    return words.T.clone(memory_format=torch.contiguous_format)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Signed codes [rows, n] as words [rows, ceil(n * bits / 32)] int32, the first in the lowest bits."""
    import torch
    from torch.nn.functional import pad

    padded = pad(codes, (0, -codes.shape[1] % (_WORD_BITS // bits)), value=_bounds(bits)[0])
    flat = padded.flatten()  # as strides of an axis of size 1 can be anything
    if bits == 8:
        packed = flat.view(torch.uint8) ^ 128
    else:
        pairs = flat.add(8).view(torch.int16)
        packed = (pairs | pairs >> 4).to(torch.uint8)  # the low byte
    return packed.view(torch.int32).view(codes.shape[0], -1)


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_packed`: int8 codes."""
    import torch

    codes = words.contiguous().view(torch.uint8)
    if bits == 8:
        return (codes ^ 128).view(torch.int8)
    pairs = codes.to(torch.int16)
    return ((pairs | pairs << 4) & 0x0F0F).view(torch.int8).sub_(8)
