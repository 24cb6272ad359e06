"""FP8 (E4M3): fine-grained with a multiplier for each block, and the two forms of compressed-tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from moeconv.formats.format import Decoder, Format, StoredPart
from moeconv.formats.mx import exponents, power_of_two
from moeconv.formats.rows import RowFormat
from moeconv.formats.strips import amax, by_group, float_strips, scale_of, strips
from moeconv.tensors import Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Largest number of E4M3 (OCP 8-bit floating point, "fn": no infinities).
E4M3_MAX = 448.0
BLOCK = 128
E4M3_NAN = 0x7F
#: All bits of a half but the highest of its exponent.
_HALF_MASK = ~(1 << 14)


def _block_amax(tile: Tensor) -> Tensor:
    """Largest magnitude of each block [row blocks, column blocks], in the dtype of the tile; NaN where one is."""
    import torch
    from torch.nn.functional import pad

    whole = len(tile) // BLOCK * BLOCK
    of_columns = torch.empty((-(-len(tile) // BLOCK), tile.shape[1]), dtype=tile.dtype, device=tile.device)
    for strip in strips(tile[:whole], BLOCK):
        blocks = slice(strip.start // BLOCK, strip.stop // BLOCK)
        of_columns[blocks] = amax(tile[strip].view(-1, BLOCK, tile.shape[1]), 1)
    if whole < len(tile):
        of_columns[-1] = amax(tile[whole:], 0)
    return amax(by_group(pad(of_columns, (0, -tile.shape[1] % BLOCK)), BLOCK), 2)


def _by_column(scales: Tensor, columns: int) -> Tensor:
    """Scales of blocks as float32 [row blocks, columns]."""
    return scales.float().repeat_interleave(BLOCK, 1)[:, :columns]


def _encode_blocks(tile: Tensor, scales: Tensor, *, divided: bool) -> Tensor:
    """Codes of a matrix: of what is multiplied by the scales of its blocks, or divided by them and clamped."""
    import torch

    codes = torch.empty(tile.shape, dtype=torch.float8_e4m3fn, device=tile.device)
    by_column = _by_column(scales, tile.shape[1])
    for strip, values in float_strips(tile):
        for block, rows in _blocks(strip):
            values[rows].div_(by_column[block]) if divided else values[rows].mul_(by_column[block])
        codes[strip] = values.clamp_(-E4M3_MAX, E4M3_MAX) if divided else values
    return codes


def _blocks(strip: slice) -> Iterator[tuple[int, slice]]:
    """Row blocks of a strip, with the rows that each has in it."""
    first = strip.start
    while first < strip.stop:
        last = min(strip.stop, (first // BLOCK + 1) * BLOCK)
        yield first // BLOCK, slice(first - strip.start, last - strip.start)
        first = last


def _decode_blocks(codes: Tensor, scales: Tensor, columns: int, dtype: torch.dtype | None) -> Tensor:
    """A matrix from its codes [rows, columns] and the scales of its blocks."""
    import torch

    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    decoded = torch.empty(codes.shape, dtype=dtype or torch.float32, device=codes.device)
    by_column = _by_column(scales, columns)
    for strip in strips(codes):
        values = _floats(codes[strip])
        for block, rows in _blocks(strip):
            values[rows].mul_(by_column[block])
        decoded[strip] = values
    return decoded


def _floats(codes: Tensor) -> Tensor:
    """E4M3 codes as float32, by hand on a CPU, where torch takes 5.3 ns an element for it; this takes 1.

    Seven bits of magnitude, moved to where a half has the low bits of its exponent, are the number times 2^-8 (the
    biases are 7 and 15), also below the smallest normal number.
    """
    import torch

    if codes.device.type != "cpu":
        return codes.float()
    halves = codes.view(torch.int8).to(torch.int16).mul_(1 << 7).bitwise_and_(_HALF_MASK)
    floats = halves.view(torch.float16).float().mul_(256.0)
    if int((codes.view(torch.uint8) & E4M3_NAN).amax()) == E4M3_NAN:
        floats[codes.isnan()] = torch.nan
    return floats


class _Fp8(Format):
    live_nbytes = 13

    def _blocks_shape(self, shape: Shape) -> Shape:
        return (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))


class FineGrainedFp8(_Fp8):
    """`quant_method: fp8`: a float32 multiplier `weight_scale_inv` for 128 x 128 blocks.

    Scales and codes are those of transformers' `Fp8Quantize`, bit for bit: scale = 448 / amax (1 for a zero block),
    code = E4M3(x * scale), stored is 1 / scale. Where it makes NaN of finite values, they become zero here. With
    `ue8m0` the multiplier is rounded up to a power of two.

    Args:
        ue8m0: multipliers are powers of two (`scale_fmt: ue8m0`), stored as F32.
        scale_dtype: of multipliers that are read.
        suffix: what multipliers that are read are called.
    """

    name = "fp8"
    quant_method = "fp8"
    row_multiple = BLOCK

    def __init__(self, ue8m0: bool = False, scale_dtype: str = "F32", suffix: str = "weight_scale_inv") -> None:
        self.ue8m0 = ue8m0
        self.scale_dtype = scale_dtype
        self.suffix = suffix

    def refusal(self, shape: Shape, dtype: str) -> str | None:
        refused = super().refusal(shape, dtype)
        if refused is None and (shape[0] % BLOCK or shape[1] % BLOCK):
            return f"{list(shape)} is not made of whole {BLOCK} x {BLOCK} blocks, and engines read edge blocks wrong"
        return refused

    def parts(self, shape: Shape, dtype: str) -> tuple[StoredPart, ...]:
        return (
            StoredPart("weight", "F8_E4M3", shape, 1),
            StoredPart(self.suffix, self.scale_dtype, self._blocks_shape(shape), BLOCK),
        )

    def encode(self, tile: Tensor, peak: float = 0.0) -> tuple[Tensor, ...]:
        import torch

        most = _block_amax(tile).float()
        scale = E4M3_MAX / most
        # Of a block that is zero, or so small (below 1.4e-36) that its multiplier would be zero and its codes NaN.
        scale = torch.where((most == 0) | (scale.isinf() & (not self.ue8m0)), 1.0, scale)
        inverse = 1.0 / scale
        if self.ue8m0:
            tiny = torch.finfo(torch.float32).tiny
            inverse = torch.exp2(torch.ceil(torch.log2(inverse.clamp(min=tiny))))
            scale = 1.0 / inverse
        return _encode_blocks(tile, scale, divided=False), inverse

    def decode(self, parts: Mapping[str, Tensor], columns: int, dtype: torch.dtype | None = None) -> Tensor:
        return _decode_blocks(parts["weight"], parts[self.suffix], columns, dtype)

    def takes(self, stored: Decoder, dtype: str) -> bool:
        return isinstance(stored, FineGrainedFp8) and stored.ue8m0 == self.ue8m0

    def retold(self, stored: Decoder, parts: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        import torch

        assert isinstance(stored, FineGrainedFp8)
        scales = parts[stored.suffix]
        return parts["weight"], (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()

    def settings(self) -> dict[str, Any]:
        scale = {"scale_fmt": "ue8m0"} if self.ue8m0 else {}
        return {"activation_scheme": "dynamic", "fmt": "e4m3", **scale, "weight_block_size": [BLOCK, BLOCK]}


class ChannelFp8(RowFormat):
    """compressed-tensors `float-quantized`, one scale a row (FP8_DYNAMIC): s = amax / 448 in the source's dtype."""

    name = "fp8_dynamic"
    live_nbytes = 14
    code_dtype = "F8_E4M3"
    largest = E4M3_MAX

    def _codes(self, quotients: Tensor) -> Tensor:
        return quotients.clamp_(-E4M3_MAX, E4M3_MAX)

    def _floats(self, codes: Tensor) -> Tensor:
        return _floats(codes)

    def settings(self) -> dict[str, Any]:
        return {
            "format": "float-quantized",
            "weights": _arguments(strategy="channel", dynamic=False),
            "input_activations": _arguments(strategy="token", dynamic=True),
        }


class BlockFp8(_Fp8):
    """compressed-tensors `float-quantized` with 128 x 128 blocks (FP8_BLOCK): s = amax / 448 in the source's dtype."""

    name = "fp8_block"
    quant_method = "compressed-tensors"
    row_multiple = BLOCK

    def parts(self, shape: Shape, dtype: str) -> tuple[StoredPart, ...]:
        return (
            StoredPart("weight", "F8_E4M3", shape, 1),
            StoredPart("weight_scale", dtype, self._blocks_shape(shape), BLOCK),
        )

    def encode(self, tile: Tensor, peak: float = 0.0) -> tuple[Tensor, ...]:
        scale = scale_of(_block_amax(tile), E4M3_MAX)
        return _encode_blocks(tile, scale, divided=True), scale

    def decode(self, parts: Mapping[str, Tensor], columns: int, dtype: torch.dtype | None = None) -> Tensor:
        return _decode_blocks(parts["weight"], parts["weight_scale"], columns, dtype)

    def settings(self) -> dict[str, Any]:
        return {
            "format": "float-quantized",
            "weights": _arguments(strategy="block", dynamic=False, block_structure=[BLOCK, BLOCK]),
            "input_activations": _arguments(strategy="group", dynamic=True, group_size=BLOCK),
        }


class MxFp8(Format):
    """compressed-tensors `mxfp8-quantized` (MXFP8A16): a power of two for 32 columns, a byte e for 2 ^ (e - 127).

    It brings the largest magnitude of a group into [224, 448]: formula of compressed-tensors,
    `quantization/utils/mxfp_utils.py`.

    Args:
        suffix: what scales that are read are called.
        scale_dtype: of scales that are read.
    """

    name = "mxfp8a16"
    quant_method = "compressed-tensors"
    live_nbytes = 15
    group = 32

    def __init__(self, suffix: str = "weight_scale", scale_dtype: str = "U8") -> None:
        self.suffix = suffix
        self.scale_dtype = scale_dtype

    def refusal(self, shape: Shape, dtype: str) -> str | None:
        refused = super().refusal(shape, dtype)
        if refused is None and shape[1] % self.group:
            return f"{shape[1]} columns are not made of whole groups of {self.group}"
        return refused

    def encode(self, tile: Tensor, peak: float = 0.0) -> tuple[Tensor, ...]:
        import torch

        codes = torch.empty(tile.shape, dtype=torch.float8_e4m3fn, device=tile.device)
        scales = torch.empty((len(tile), tile.shape[1] // self.group), dtype=torch.uint8, device=tile.device)
        for strip, values in float_strips(tile):
            scales[strip] = exponents(amax(by_group(tile[strip], self.group), 2), offset=8)
            by_group(values, self.group).div_(power_of_two(scales[strip])[..., None])
            codes[strip] = values
        return codes, scales

    def parts(self, shape: Shape, dtype: str) -> tuple[StoredPart, ...]:
        return (
            StoredPart("weight", "F8_E4M3", shape, 1),
            StoredPart(self.suffix, self.scale_dtype, (shape[0], shape[1] // self.group), 1),
        )

    def decode(self, parts: Mapping[str, Tensor], columns: int, dtype: torch.dtype | None = None) -> Tensor:
        import torch

        codes, scales = parts["weight"], parts[self.suffix]
        scales = scales.view(torch.float8_e8m0fnu).float()
        decoded = torch.empty(codes.shape, dtype=dtype or torch.float32, device=codes.device)
        for strip in strips(codes):
            values = by_group(_floats(codes[strip]), self.group)
            decoded[strip] = values.mul_(scales[strip][..., None]).flatten(1)
        return decoded

    def takes(self, stored: Decoder, dtype: str) -> bool:
        return isinstance(stored, MxFp8)

    def retold(self, stored: Decoder, parts: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        import torch

        assert isinstance(stored, MxFp8)
        return parts["weight"], parts[stored.suffix].view(torch.uint8)

    def settings(self) -> dict[str, Any]:
        weights = _arguments(
            strategy="group", group_size=self.group, scale_dtype="torch.uint8", zp_dtype="torch.uint8", dynamic=False
        )
        return {"format": "mxfp8-quantized", "weights": weights, "input_activations": None}


class TensorFp8(Decoder):
    """E4M3 with one float32 multiplier for the matrix (ModelOpt FP8, AutoFP8), a number or an axis of one."""

    name = "fp8_tensor"
    live_nbytes = 13

    def __init__(self, shape: Shape = (), suffix: str = "weight_scale", scale_dtype: str = "F32") -> None:
        self._shape = shape
        self.suffix = suffix
        self.scale_dtype = scale_dtype

    def parts(self, shape: Shape, dtype: str) -> tuple[StoredPart, ...]:
        return StoredPart("weight", "F8_E4M3", shape, 1), StoredPart(
            self.suffix, self.scale_dtype, self._shape, shape[0]
        )

    def decode(self, parts: Mapping[str, Tensor], columns: int, dtype: torch.dtype | None = None) -> Tensor:
        import torch

        codes, scale = parts["weight"], parts[self.suffix].float()
        decoded = torch.empty(codes.shape, dtype=dtype or torch.float32, device=codes.device)
        for strip in strips(codes):
            decoded[strip] = _floats(codes[strip]).mul_(scale)
        return decoded


class ModelOptFp8(Decoder):
    """ModelOpt FP8 with float32 multipliers for rows, `weight_scale` [N], or for blocks, [N/128, 1, K/128, 1]."""

    name = "modelopt_fp8"
    live_nbytes = 13

    def __init__(self, by_block: bool) -> None:
        self.by_block = by_block
        self.row_multiple = BLOCK if by_block else 1

    def parts(self, shape: Shape, dtype: str) -> tuple[StoredPart, ...]:
        blocks = (-(-shape[0] // BLOCK), 1, -(-shape[1] // BLOCK), 1)
        scales = blocks if self.by_block else (shape[0],)
        return (
            StoredPart("weight", "F8_E4M3", shape, 1),
            StoredPart("weight_scale", "F32", scales, self.row_multiple),
        )

    def decode(self, parts: Mapping[str, Tensor], columns: int, dtype: torch.dtype | None = None) -> Tensor:
        import torch

        codes, scales = parts["weight"], parts["weight_scale"].reshape(-1, -(-columns // BLOCK) if self.by_block else 1)
        if self.by_block:
            return _decode_blocks(codes, scales, columns, dtype)
        decoded = torch.empty(codes.shape, dtype=dtype or torch.float32, device=codes.device)
        for strip in strips(codes):
            decoded[strip] = _floats(codes[strip]).mul_(scales[strip])
        return decoded


def _arguments(**own: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "symmetric": True, **own}
