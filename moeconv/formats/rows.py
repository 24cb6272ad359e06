"""What formats with one scale for each row share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from moeconv.formats.format import Format, StoredPart
from moeconv.formats.strips import amax, float_strips, scale_of, strips
from moeconv.tensors import Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class RowFormat(Format):
    """compressed-tensors with the strategy `channel`: codes [N, K], scales [N, 1] in the source's dtype.

    Attributes:
        code_dtype: of the codes, a safetensors name.
        largest: what the largest magnitude of a row becomes, before it is rounded.
    """

    quant_method = "compressed-tensors"
    code_dtype: str
    largest: float

    @abstractmethod
    def _codes(self, quotients: Tensor) -> Tensor:
        """Codes, or float32 that become the codes when cast, of float32 that may be overwritten."""

    @abstractmethod
    def _floats(self, codes: Tensor) -> Tensor:
        """Codes as float32."""

    def parts(self, shape: Shape, dtype: str) -> tuple[StoredPart, ...]:
        return (
            StoredPart("weight", self.code_dtype, shape, 1),
            StoredPart("weight_scale", dtype, (shape[0], 1), 1),
        )

    def encode(self, tile: Tensor, peak: float = 0.0) -> tuple[Tensor, ...]:
        import torch

        code_dtype = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8}[self.code_dtype]
        codes = torch.empty(tile.shape, dtype=code_dtype, device=tile.device)
        scales = torch.empty((len(tile), 1), dtype=tile.dtype, device=tile.device)
        for strip, values in float_strips(tile):
            scale = scale_of(amax(tile[strip], 1)[:, None], self.largest)
            codes[strip] = self._codes(values.div_(scale.float()))
            scales[strip] = scale
        return codes, scales

    def decode(self, parts: Mapping[str, Tensor], columns: int, dtype: torch.dtype | None = None) -> Tensor:
        import torch

        codes, scales = parts["weight"], parts["weight_scale"].float()
        decoded = torch.empty(codes.shape, dtype=dtype or torch.float32, device=codes.device)
        for strip in strips(codes):
            decoded[strip] = self._floats(codes[strip]).mul_(scales[strip])
        return decoded
