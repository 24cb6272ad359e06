"""FP4 (E2M1): a sign, two bits of exponent (bias 1) and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and negative.

Two codes share a byte, the first in the lower half. What they are multiplied with is stored beside them; here, as
OpenAI publishes gpt-oss, for each 32 columns a byte e that stands for 2 ^ (e - 127) (E8M0 of the OCP Microscaling
specification 1.0, 255 is NaN). Read by transformers and vLLM.
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

_GROUP = 32


class GptOssMxfp4(Decoder):
    """`quant_method: mxfp4`: codes [N, K / 32, 16] and exponents [N, K / 32], both bytes."""

    name = "gptoss_mxfp4"
    live_nbytes = 12

    def parts(self, shape: Shape, dtype: str) -> tuple[StoredPart, ...]:
        rows, columns = shape
        return (
            StoredPart("weight_blocks", "U8", (rows, columns // _GROUP, _GROUP // 2), 1),
            StoredPart("weight_scales", "U8", (rows, columns // _GROUP), 1),
        )

    def decode(self, parts: Mapping[str, Tensor], columns: int, dtype: torch.dtype | None = None) -> Tensor:
        import torch

        codes, exponents = parts["weight_blocks"], parts["weight_scales"]
        decoded = torch.empty((len(codes), columns), dtype=dtype or torch.float32, device=codes.device)
        scales = exponents.view(torch.float8_e8m0fnu).float()
        for strip in strips(decoded):
            values = _floats(codes[strip]).view(-1, columns // _GROUP, _GROUP)
            decoded[strip] = values.mul_(scales[strip][..., None]).flatten(1)
        return decoded


def _floats(codes: Tensor) -> Tensor:
    """Codes [rows, K / 2] as float32 [rows, K].

    Three bits of magnitude, moved to where a half has the low bits of its exponent and the first of its mantissa, are
    the number times 2^-14 (the biases are 1 and 15), also below 1.
    """
    import torch

    pairs = codes.flatten(1).to(torch.int16)
    both = torch.stack((pairs & 15, pairs >> 4), -1).flatten(1)
    halves = (both & 7) << 9 | (both & 8) << 12
    return halves.view(torch.float16).float().mul_(float(1 << 14))
