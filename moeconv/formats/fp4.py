"""FP4 (E2M1): a sign, two bits of exponent (bias 1) and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and negative.

Two codes share a byte, the first in the lower half. Each group of columns has a scale that multiplies it. In the MX
formats (OCP Microscaling specification 1.0) a group has 32 columns and the scale is a byte e, E8M0, which stands for
2 ^ (e - 127), 255 for NaN. In NVFP4 a group has 16 columns and an E4M3 scale, and one float32 scales the whole matrix.

| | codes | scales | of the matrix |
|---|---|---|---|
| MXFP4 in blocks, OpenAI | `weight_blocks` [N, K/32, 16] | `weight_scales` [N, K/32] | |
| MXFP4, compressed-tensors | `weight_packed` [N, K/2] | `weight_scale` [N, K/32] | |
| MXFP4, ModelOpt | `weight` [N, K/2] | `weight_scale` [N, K/32] | |
| MXFP4 with E8M0 | `weight` [N, K/2], I8 | `scale` [N, K/32] | |
| NVFP4, compressed-tensors | `weight_packed` [N, K/2] | `weight_scale` [N, K/16] | `weight_global_scale` [1], divides |
| NVFP4, ModelOpt | `weight` [N, K/2] | `weight_scale` [N, K/16] | `weight_scale_2` [], multiplies |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moeconv.formats.format import Decoder, StoredPart
from moeconv.formats.strips import strips
from moeconv.tensors import Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class GroupFp4(Decoder):
    """E2M1 codes with a scale for each group of columns, as one dialect stores them.

    Args:
        name: of the dialect.
        group: columns of a group.
        codes: suffix and dtype of the codes.
        scales: suffix and dtype of the scales.
        whole: suffix of a scale of the whole matrix, empty for none.
        is_divisor: that scale divides.
        is_number: that scale has no axis.
        has_blocks: codes have an axis for the groups.
    """

    live_nbytes = 12

    def __init__(
        self, name: str, group: int, codes: tuple[str, str], scales: tuple[str, str], whole: str = "",
        is_divisor: bool = False, is_number: bool = False, has_blocks: bool = False,
    ) -> None:  # fmt: skip
        self.name = name
        self.group = group
        self.codes = codes
        self.scales = scales
        self.whole = whole
        self.is_divisor = is_divisor
        self.is_number = is_number
        self.has_blocks = has_blocks

    def parts(self, shape: Shape, dtype: str) -> tuple[StoredPart, ...]:
        rows, columns = shape
        groups = columns // self.group
        held = (rows, groups, self.group // 2) if self.has_blocks else (rows, columns // 2)
        parts = (
            StoredPart(self.codes[0], self.codes[1], held, 1),
            StoredPart(self.scales[0], self.scales[1], (rows, groups), 1),
        )
        if not self.whole:
            return parts
        return (*parts, StoredPart(self.whole, "F32", () if self.is_number else (1,), rows))

    def decode(self, parts: Mapping[str, Tensor], columns: int, dtype: torch.dtype | None = None) -> Tensor:
        import torch

        codes, scales = parts[self.codes[0]], parts[self.scales[0]]
        scales = scales.view(torch.float8_e8m0fnu).float() if scales.dtype == torch.uint8 else scales.float()
        if self.whole:
            scales = scales / parts[self.whole] if self.is_divisor else scales * parts[self.whole]
        decoded = torch.empty((len(codes), columns), dtype=dtype or torch.float32, device=codes.device)
        for strip in strips(decoded):
            values = _floats(codes[strip]).view(-1, columns // self.group, self.group)
            decoded[strip] = values.mul_(scales[strip][..., None]).flatten(1)
        return decoded


BLOCKS_MXFP4 = GroupFp4("gptoss_mxfp4", 32, ("weight_blocks", "U8"), ("weight_scales", "U8"), has_blocks=True)
#: All that can be read.
FP4_DIALECTS = (
    BLOCKS_MXFP4,
    GroupFp4("mxfp4a16", 32, ("weight_packed", "U8"), ("weight_scale", "U8")),
    GroupFp4("modelopt_mxfp4", 32, ("weight", "U8"), ("weight_scale", "U8")),
    GroupFp4("fp4_e8m0", 32, ("weight", "I8"), ("scale", "F8_E8M0")),
    GroupFp4("fp4_e8m0", 32, ("weight", "I8"), ("scale", "U8")),
    GroupFp4("nvfp4a16", 16, ("weight_packed", "U8"), ("weight_scale", "F8_E4M3"), "weight_global_scale", True),
    GroupFp4("modelopt_nvfp4", 16, ("weight", "U8"), ("weight_scale", "F8_E4M3"), "weight_scale_2", is_number=True),
    GroupFp4("modelopt_nvfp4", 16, ("weight", "U8"), ("weight_scale", "F8_E4M3"), "weight_scale_2"),
)


def _floats(codes: Tensor) -> Tensor:
    """Codes [rows, ...] as float32 [rows, K].

    Three bits of magnitude, moved to where a half has the low bits of its exponent and the first of its mantissa, are
    the number times 2^-14 (the biases are 1 and 15), also below 1.
    """
    import torch

    pairs = codes.flatten(1).view(torch.uint8).to(torch.int16)
    both = torch.stack((pairs & 15, pairs >> 4), -1).flatten(1)
    halves = (both & 7) << 9 | (both & 8) << 12
    return halves.view(torch.float16).float().mul_(float(1 << 14))
