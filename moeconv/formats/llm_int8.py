"""8-bit matrices of bitsandbytes (LLM.int8): one scale a row.

Formula: bitsandbytes 0.50, `backends/default/ops.py` (`int8_vectorwise_quant`), which takes half precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moeconv.formats.format import Format, StoredPart
from moeconv.formats.strips import amax, strips
from moeconv.tensors import Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor


#: 1 / 127, as bitsandbytes rounds it.
_STEP = 7.874015718698502e-3


class LlmInt8(Format):
    """Codes [N, K], and the largest magnitude of each row in float32, [N]; a value is code * scale / 127."""

    name = "int8"
    quant_method = "bitsandbytes"
    experts_kept = True
    live_nbytes = 16

    def parts(self, shape: Shape, dtype: str) -> tuple[StoredPart, ...]:
        return (
            StoredPart("weight", "I8", shape, 1),
            StoredPart("SCB", "F32", (shape[0],), 1),
            StoredPart("weight_format", "U8", (), 0),
        )

    def constant(self, part: StoredPart, shape: Shape, dtype: str) -> bytes:
        return b"\0"  # row by row

    def encode(self, tile: Tensor, peak: float = 0.0) -> tuple[Tensor, ...]:
        import torch

        codes = torch.empty(tile.shape, dtype=torch.int8, device=tile.device)
        scales = torch.empty(len(tile), dtype=torch.float32, device=tile.device)
        for strip in strips(tile):
            halves = tile[strip].half()  # what is too large becomes infinite, and is found by its scale
            scales[strip] = amax(halves, 1).float()
            factors = (127.0 / scales[strip]).nan_to_num(posinf=0.0)
            codes[strip] = halves.float().mul_(factors[:, None]).nan_to_num_(0.0).round_()
        return codes, scales

    def decode(self, parts: Mapping[str, Tensor], columns: int, dtype: torch.dtype | None = None) -> Tensor:
        import torch

        codes, scales = parts["weight"], parts["SCB"].view(-1, 1)
        decoded = torch.empty(codes.shape, dtype=dtype or torch.float32, device=codes.device)
        for strip in strips(codes):
            decoded[strip] = codes[strip].float().mul_(scales[strip]).mul_(_STEP)
        return decoded

    def settings(self) -> dict[str, Any]:
        return {"load_in_8bit": True, "load_in_4bit": False}
