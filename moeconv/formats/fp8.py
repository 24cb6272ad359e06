"""FP8 (E4M3): fine-grained with a multiplier for each block, and the two forms of compressed-tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from moeconv.formats.format import Format, StoredPart
from moeconv.tensors import Shape

if TYPE_CHECKING:
    from torch import Tensor

#: Largest number of E4M3 (OCP 8-bit floating point, "fn": no infinities).
E4M3_MAX = 448.0
BLOCK = 128


def _block_amax(tile: Tensor) -> Tensor:
    """Largest magnitude of each block, [row blocks, column blocks]; NaN where a block holds one."""
    import torch
    from torch.nn.functional import pad

    rows = [torch.maximum(block.amax(0), block.amin(0).neg()) for block in torch.split(tile, BLOCK)]
    return pad(torch.stack(rows), (0, -tile.shape[1] % BLOCK)).reshape(len(rows), -1, BLOCK).amax(2)


def _by_column(scales: Tensor, columns: int) -> Tensor:
    """Scales of blocks as float32 [row blocks, columns]."""
    return scales.float().repeat_interleave(BLOCK, 1)[:, :columns]


def _encode_blocks(tile: Tensor, scales: Tensor, scaled: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Codes of a matrix, a row of blocks at a time: `scaled` multiplies by the scales, or divides, in place."""
    import torch

    codes = torch.empty(tile.shape, dtype=torch.float8_e4m3fn, device=tile.device)
    rows = torch.split(tile, BLOCK), _by_column(scales, tile.shape[1]), torch.split(codes, BLOCK)
    for block, own, into in zip(*rows, strict=True):
        into.copy_(scaled(block.to(torch.float32, copy=True), own).clamp_(-E4M3_MAX, E4M3_MAX))
    return codes


def _decode_blocks(codes: Tensor, scales: Tensor, columns: int) -> Tensor:
    import torch

    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    decoded = codes.float()
    for block, factors in zip(torch.split(decoded, BLOCK), _by_column(scales, columns), strict=True):
        block *= factors
    return decoded


class _Fp8(Format):
    live_nbytes = 10

    def _blocks_shape(self, shape: Shape) -> Shape:
        return (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))


class FineGrainedFp8(_Fp8):
    """`quant_method: fp8`: a float32 multiplier `weight_scale_inv` for 128 x 128 blocks.

    Scales and codes are those of transformers' `Fp8Quantize`, bit for bit: scale = 448 / amax (1 for a zero block),
    code = E4M3(x * scale), stored is 1 / scale. Where it makes NaN of finite values, they become zero here. With
    `ue8m0` the multiplier is rounded up to a power of two.

    Args:
        ue8m0: multipliers are powers of two (`scale_fmt: ue8m0`), stored as F32.
    """

    name = "fp8"
    quant_method = "fp8"
    row_multiple = BLOCK

    def __init__(self, ue8m0: bool = False, scale_dtype: str = "F32") -> None:
        self.ue8m0 = ue8m0
        self.scale_dtype = scale_dtype

    def refusal(self, shape: Shape, dtype: str) -> str | None:
        refused = super().refusal(shape, dtype)
        if refused is None and (shape[0] % BLOCK or shape[1] % BLOCK):
            return f"{list(shape)} is not made of whole {BLOCK} x {BLOCK} blocks, and engines read edge blocks wrong"
        return refused

    def parts(self, shape: Shape, dtype: str) -> tuple[StoredPart, ...]:
        return (
            StoredPart("weight", "F8_E4M3", shape, 1),
            StoredPart("weight_scale_inv", self.scale_dtype, self._blocks_shape(shape), BLOCK),
        )

    def encode(self, tile: Tensor) -> tuple[Tensor, ...]:
        import torch

        amax = _block_amax(tile).float()
        scale = E4M3_MAX / amax
        # Of a block that is zero, or so small (below 1.4e-36) that its multiplier would be zero and its codes NaN.
        scale = torch.where((amax == 0) | (scale.isinf() & (not self.ue8m0)), 1.0, scale)
        inverse = 1.0 / scale
        if self.ue8m0:
            tiny = torch.finfo(torch.float32).tiny
            inverse = torch.exp2(torch.ceil(torch.log2(inverse.clamp(min=tiny))))
            scale = 1.0 / inverse
        return _encode_blocks(tile, scale, torch.Tensor.mul_), inverse

    def decode(self, parts: Mapping[str, Tensor], columns: int) -> Tensor:
        return _decode_blocks(parts["weight"], parts["weight_scale_inv"], columns)

    def settings(self) -> dict[str, Any]:
        scale = {"scale_fmt": "ue8m0"} if self.ue8m0 else {}
        return {"activation_scheme": "dynamic", "fmt": "e4m3", **scale, "weight_block_size": [BLOCK, BLOCK]}


class ChannelFp8(_Fp8):
    """compressed-tensors `float-quantized`, one scale a row (FP8_DYNAMIC): s = amax / 448 in the source's dtype."""

    name = "fp8_dynamic"
    quant_method = "compressed-tensors"

    def parts(self, shape: Shape, dtype: str) -> tuple[StoredPart, ...]:
        return (
            StoredPart("weight", "F8_E4M3", shape, 1),
            StoredPart("weight_scale", dtype, (shape[0], 1), 1),
        )

    def encode(self, tile: Tensor) -> tuple[Tensor, ...]:
        import torch

        amax = torch.maximum(tile.amax(1, keepdim=True), tile.amin(1, keepdim=True).neg())
        scale = amax / torch.tensor(E4M3_MAX, dtype=tile.dtype)
        scale = torch.where(scale == 0, torch.finfo(tile.dtype).eps, scale).to(tile.dtype)
        codes = tile.to(torch.float32, copy=True).div_(scale.float()).clamp_(-E4M3_MAX, E4M3_MAX)
        return codes.to(torch.float8_e4m3fn), scale

    def decode(self, parts: Mapping[str, Tensor], columns: int) -> Tensor:
        return parts["weight"].float().mul_(parts["weight_scale"].float())

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

    def encode(self, tile: Tensor) -> tuple[Tensor, ...]:
        import torch

        scale = _block_amax(tile) / torch.tensor(E4M3_MAX, dtype=tile.dtype)
        scale = torch.where(scale == 0, torch.finfo(tile.dtype).eps, scale).to(tile.dtype)
        return _encode_blocks(tile, scale, torch.Tensor.div_), scale

    def decode(self, parts: Mapping[str, Tensor], columns: int) -> Tensor:
        return _decode_blocks(parts["weight"], parts["weight_scale"], columns)

    def settings(self) -> dict[str, Any]:
        return {
            "format": "float-quantized",
            "weights": _arguments(strategy="block", dynamic=False, block_structure=[BLOCK, BLOCK]),
            "input_activations": _arguments(strategy="group", dynamic=True, group_size=BLOCK),
        }


def _arguments(**own: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "symmetric": True, **own}
