"""4-bit codes of bitsandbytes: a scale for each 64 values that follow each other, whatever the shape.

Formulas: bitsandbytes 0.50, `backends/default/ops.py` (`quantize_4bit`), `functional.py` (`create_dynamic_map`, and
`QuantState` for the names of tensors); `backends/cpu` for quantized scales, whose kernel takes the code that is nearest
to the middle of one of 65,536 steps. Codes and scales are those of the CPU, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from math import fsum, prod
from struct import pack, unpack
from typing import TYPE_CHECKING, Any

from moeconv.formats.format import Decoder, Format, StoredPart
from moeconv.tensors import Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: `quant_method` of folders that hold experts in this form; `moeconv.transformers` registers it.
METHOD = "moeconv_bnb4"
BLOCK = 64
NESTED_BLOCK = 256
#: What a code of four bits stands for, in the order of the codes.
CODEBOOKS = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ),
}  # fmt: skip
#: Codes by the values that they stand for, from the least; of the two zeros of `fp4` the first for values up to zero.
_ORDERS = {"nf4": tuple(range(16)), "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)}
_STATE = "weight.quant_state.bitsandbytes__"
_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
#: Steps of a scaled value, from -1 to 1, by which codes are looked up.
_STEPS = 4096
#: Values that are encoded at a time on a CPU: five arrays of them have room in a second-level cache.
_STRIP = 1 << 16
_LONGEST_FLOAT = 25


class StoredBnb4(Decoder):
    """The form, with what its state says of one tensor.

    Args:
        kind: `nf4` or `fp4`.
        nested: scales are quantized themselves (double quantization).
        offset: what is added to decoded scales then.
    """

    block = BLOCK
    live_nbytes = 26
    tables = ("weight.quant_map", "weight.nested_quant_map")

    def __init__(self, kind: str, nested: bool = False, offset: float = 0.0) -> None:
        self.name = kind
        self.nested = nested
        self.offset = offset
        if nested:
            self.block = BLOCK * NESTED_BLOCK

    def parts(self, shape: Shape, dtype: str) -> tuple[StoredPart, ...]:
        count = prod(shape)
        blocks = -(-count // BLOCK)
        codes = StoredPart("weight", "U8", (-(-count // 2), 1), 1, values=2)
        code_map = StoredPart("weight.quant_map", "F32", (16,), 0)
        state = StoredPart(f"{_STATE}{self.name}", "U8", (len(self._state(shape, dtype)),), 0)
        if not self.nested:
            absmax = StoredPart("weight.absmax", "F32", (blocks,), 1, values=BLOCK)
            return codes, absmax, code_map, state
        nested = -(-blocks // NESTED_BLOCK)
        return (
            codes,
            StoredPart("weight.absmax", "U8", (blocks,), 1, values=BLOCK),
            StoredPart("weight.nested_absmax", "F32", (nested,), 1, values=BLOCK * NESTED_BLOCK),
            state,
            code_map,
            StoredPart("weight.nested_quant_map", "F32", (256,), 0),
        )

    def _state(self, shape: Shape, dtype: str) -> bytes:
        """What `QuantState.as_dict` says beside its tensors. The offset takes the same room whatever it is."""
        said: dict[str, Any] = {
            "quant_type": self.name, "blocksize": BLOCK, "dtype": _TORCH_NAMES.get(dtype, "bfloat16"),
            "shape": list(shape),
        }  # fmt: skip
        if not self.nested:
            return json.dumps(said).encode()
        said |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": self.offset}
        return json.dumps(said).encode().ljust(len(json.dumps({**said, "nested_offset": 0})) - 1 + _LONGEST_FLOAT)

    def decode(self, parts: Mapping[str, Tensor], columns: int, dtype: torch.dtype | None = None) -> Tensor:
        import torch

        codes, absmax = parts["weight"].flatten(), parts["weight.absmax"].flatten()
        pairs = _pairs(self.name, codes.device)
        if self.nested:
            steps, largest = _dynamic_map(codes.device), parts["weight.nested_absmax"].flatten()
            scaled = steps[absmax.int()] * largest.repeat_interleave(NESTED_BLOCK)[: len(absmax)]
            absmax = scaled + torch.tensor(self.offset, dtype=torch.float32, device=codes.device)
        decoded = torch.empty(2 * len(codes), dtype=dtype or torch.float32, device=codes.device)
        for first in range(0, len(decoded), step := _step(decoded)):
            strip = slice(first, min(first + step, len(decoded)))
            values = pairs.index_select(0, codes[first // 2 : strip.stop // 2].int()).flatten()
            whole = len(values) // BLOCK * BLOCK  # the last block of a tensor may be shorter
            scales = absmax[first // BLOCK :]
            values[:whole].view(-1, BLOCK).mul_(scales[: whole // BLOCK, None])
            values[whole:].mul_(scales[whole // BLOCK : whole // BLOCK + 1])
            decoded[strip] = values
        return decoded[: len(decoded) // columns * columns].view(-1, columns)


class Bnb4(StoredBnb4, Format):
    """The form as it is written: `nf4` and `fp4`, experts of a layer as the one parameter that transformers has.

    Args:
        kind: `nf4` or `fp4`.
        double_quant: quantize scales too: 8 bits for each of 64 values, with a scale for 256 of them.
        experts: `packed`, or `per_expert` for a tensor for each matrix of each expert, which is bitsandbytes' own form.
        shape: of the whole parameter, and
        dtype: its dtype, once they are known (`bound`).
        offset: what quantized scales are stored less of, where they are kept; None where it is measured.
    """

    def __init__(
        self, kind: str = "nf4", double_quant: bool = False, experts: str = "packed", shape: Shape = (),
        dtype: str = "", offset: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(kind, double_quant, offset or 0.0)
        self.shares_scale = double_quant and offset is None
        self.is_packed = experts == "packed"
        self.quant_method = METHOD if self.is_packed else "bitsandbytes"
        self._experts = experts
        self._shape = shape
        self._dtype = dtype

    def parts(self, shape: Shape, dtype: str) -> tuple[StoredPart, ...]:
        """As they are read, but for the state: it holds a number that is measured, and every tile writes it."""
        rows = prod(shape[:-1]) if self.shares_scale else 0
        return tuple(
            part._replace(rows=rows) if part.suffix.startswith(_STATE) else part for part in super().parts(shape, dtype)
        )

    def takes(self, stored: Decoder, dtype: str) -> bool:
        """Codes of the same kind; scales only as they are."""
        return isinstance(stored, StoredBnb4) and stored.name == self.name and not stored.nested and not self.nested

    def retold(self, stored: Decoder, parts: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return parts["weight"].view(-1, 1), parts["weight.absmax"].flatten()

    def bound(self, shape: Shape, dtype: str) -> Bnb4:
        return _bound(self.name, self.nested, self._experts, shape, dtype)

    def refusal(self, shape: Shape, dtype: str) -> str | None:
        refused = super().refusal(shape, dtype)
        if refused is None and prod(shape) % BLOCK:
            return f"{list(shape)} is not made of whole blocks of {BLOCK} values"
        return refused

    def expert_refusal(self, shape: Shape) -> str | None:
        if prod(shape) % self.block:
            return (
                f"blocks of {self.block:,} values would lie partly in one expert of {list(shape)}, partly in the next"
            )
        return None

    def constant(self, part: StoredPart, shape: Shape, dtype: str) -> bytes:
        if part.suffix.endswith("nested_quant_map"):
            return pack("<256f", *dynamic_map())
        if part.suffix.endswith("quant_map"):
            return pack("<16f", *CODEBOOKS[self.name])
        return self._state(shape, dtype)

    def measured(self, tile: Tensor) -> Tensor:
        """Sum of the scales. They have few bits, so that the sum of 64-bit floats is exact in whatever order."""
        import torch

        return _absmax(tile.view(-1, BLOCK)).sum(dtype=torch.float64)

    def joined(self, measured: Sequence[float]) -> float:
        """The mean of the scales, which they are stored less of; rounded to float32."""
        import torch

        return float(torch.tensor(fsum(measured) / (prod(self._shape) // BLOCK), dtype=torch.float32))

    def encode(self, tile: Tensor, peak: float = 0.0) -> tuple[Tensor, ...]:
        import torch

        flat = tile.reshape(-1)
        packed = torch.empty(len(flat) // 2, dtype=torch.uint8, device=tile.device)
        absmax = _absmax(flat.view(-1, BLOCK))
        bases, bounds = _lookup(self.name, tile.device)
        step = min(_step(flat), len(flat))
        floats = torch.empty((2, step), dtype=torch.float32, device=tile.device)
        integers = torch.empty((2, step), dtype=torch.int32, device=tile.device)
        for first in range(0, len(flat), step):
            count = min(step, len(flat) - first)
            scaled, bound, key, codes = floats[0, :count], floats[1, :count], integers[0, :count], integers[1, :count]
            scaled.copy_(flat[first : first + count])
            largest = absmax[first // BLOCK : (first + count) // BLOCK]
            bound.view(-1, BLOCK).copy_((1.0 / largest.clamp(min=1e-38))[:, None])  # sooner than to multiply by rows
            scaled *= bound
            # Monotone in the scaled value, so that values with one key have one code, but where a bound has that key.
            key.copy_(torch.mul(scaled, _STEPS / 2 - 0.5, out=bound).add_(_STEPS / 2)).clamp_(0, _STEPS - 1)
            torch.index_select(bases, 0, key, out=codes)
            torch.index_select(bounds, 0, key, out=bound)
            codes -= bound.sub_(scaled).view(torch.int32).bitwise_right_shift_(31)  # one more above the bound
            if self.name == "fp4":
                codes = torch.index_select(_order(tile.device), 0, codes, out=key)
            words = codes.to(torch.uint8).view(torch.int16)  # the first code in the low byte
            pairs = words << 4
            pairs |= words >> 8
            packed[first // 2 : (first + count) // 2].copy_(pairs)
        packed = packed.view(-1, 1)
        if not self.nested:
            return packed, absmax
        codes, largest = _nested(absmax - torch.tensor(peak, dtype=torch.float32))
        state = StoredBnb4(self.name, True, peak)._state(self._shape, self._dtype)
        return packed, codes, largest, torch.tensor(list(state), dtype=torch.uint8)

    def read_again(self, tile: Tensor, peak: float = 0.0) -> Tensor:
        words = ("weight", "weight.absmax", "weight.nested_absmax") if self.nested else ("weight", "weight.absmax")
        parts = dict(zip(words, self.encode(tile, peak), strict=False))  # the state is said anew
        return StoredBnb4(self.name, self.nested, peak).decode(parts, tile.shape[1])

    def checked(self, encoded: Sequence[Tensor]) -> Tensor:
        return encoded[2 if self.nested else 1]

    def known_as(self, has_experts: bool) -> str:
        if self.is_packed:
            return self.name
        return f"bnb_{self.name}_experts" if has_experts else f"bnb_{self.name}"

    def settings(self) -> dict[str, Any]:
        # Not for experts that are packed: by `load_in_4bit` transformers takes its own quantizer.
        plain = {} if self.is_packed else {"load_in_4bit": True, "load_in_8bit": False}
        return {
            **plain,
            "bnb_4bit_quant_type": self.name, "bnb_4bit_use_double_quant": self.nested, "bnb_4bit_blocksize": BLOCK,
        }  # fmt: skip


@cache  # a model has few shapes, and steps of one kind are counted by their encoders
def _bound(kind: str, double_quant: bool, experts: str, shape: Shape, dtype: str) -> Bnb4:
    return Bnb4(kind, double_quant, experts, shape, dtype)


def _step(flat: Tensor) -> int:
    """Values that are worked on at once."""
    return _STRIP if flat.device.type == "cpu" else max(BLOCK, flat.numel())


def _absmax(blocks: Tensor) -> Tensor:
    """Largest magnitude of each block, as float32."""
    from moeconv.formats.strips import amax

    return amax(blocks, 1).float()


@cache
def _lookup(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each key the number of bounds below it, and the bound that has that key, or one above all values."""
    import torch

    values = torch.tensor(CODEBOOKS[kind])[list(_ORDERS[kind])]
    bounds = (values[:-1] + values[1:]) / 2
    keys = bounds.mul(_STEPS / 2 - 0.5).add_(_STEPS / 2).to(torch.int32)
    bases = (torch.arange(_STEPS)[:, None] > keys).sum(1, dtype=torch.int32)
    own = torch.full((_STEPS,), 2.0)
    own[keys.long()] = bounds
    return bases.to(device), own.to(device)


@cache
def _order(device: torch.device) -> Tensor:
    import torch

    return torch.tensor(_ORDERS["fp4"], dtype=torch.int32, device=device)


@cache
def _pairs(kind: str, device: torch.device) -> Tensor:
    """The two values of each byte, the first from its high bits."""
    import torch

    values = torch.tensor(CODEBOOKS[kind])
    byte = torch.arange(256)
    return torch.stack((values[byte >> 4], values[byte & 15]), 1).to(device)


@cache
def dynamic_map() -> tuple[float, ...]:
    """The values of 8-bit codes for scales: signed, seven decades, with the finer steps the larger they are.

    As `torch.linspace` and float32 make them where multiply and add are one operation.
    """
    values = [0.0, 1.0]
    first, last = _float32(0.1), 1.0
    for decade in range(7):
        count = 1 << decade
        step, factor = _float32(_float32(last - first) / count), _float32(10.0 ** (decade - 6))
        ups = [_float32(first + step * at) for at in range((count + 1) // 2)]
        edges = [*ups, *(_float32(last - step * (count - at)) for at in range(len(ups), count + 1))]
        means = [_float32(factor * _float32(_float32(a + b) / 2)) for a, b in pairwise(edges)]
        values += [*means, *(-mean for mean in means)]
    return tuple(sorted(values))


def is_dynamic_map(values: Sequence[float]) -> bool:
    """Whether these are the values, but for how a machine rounds them."""
    return all(abs(one - other) <= 1e-6 * abs(other) for one, other in zip(values, dynamic_map(), strict=True))


def _float32(value: float) -> float:
    rounded: float = unpack("<f", pack("<f", value))[0]
    return rounded


@cache
def _dynamic_map(device: torch.device) -> Tensor:
    import torch

    return torch.tensor(dynamic_map(), device=device)


@cache
def _nearest(device: torch.device) -> Tensor:
    """The 8-bit code for each of 65,536 even steps from -1 to 1."""
    import torch

    values = torch.tensor(dynamic_map(), dtype=torch.float64)
    middles = (torch.arange(1 << 16).double() / 32767.5 - 1).float().double()
    return torch.bucketize(middles, (values[:-1] + values[1:]) / 2).to(device)


def _nested(differences: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of scales [n] less their mean, and the scale of each 256 of them."""
    from torch.nn.functional import pad

    count = len(differences)
    blocks = pad(differences, (0, -count % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    largest = blocks.abs().amax(1)
    steps = ((blocks / largest[:, None] + 1) * 32767.5 + 0.5).nan_to_num_(0.0).floor().long()
    codes = _nearest(differences.device)[steps] * (largest[:, None] > 0)
    return codes.flatten()[:count].byte(), largest
