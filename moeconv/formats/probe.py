"""What formats would cost: squared errors in place of codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import lcm
from typing import TYPE_CHECKING, Any

from moeconv.formats.format import Format, StoredPart
from moeconv.tensors import Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_ROWS = 128


class Probe(Format):
    """Writes what the encoding of a matrix would lose, block of rows by block of rows.

    `errors` [blocks, formats] has sums of squared differences, infinite where a format cannot have the matrix, `norms`
    [blocks, 1] sums of squares; both float64.

    Args:
        formats: what is to be tried.
    """

    name = "quantized"  # in messages: to one of several formats
    quant_method = "none"

    def __init__(self, formats: Sequence[Format]) -> None:
        self.formats = tuple(formats)
        self.row_multiple = lcm(_ROWS, *(made.row_multiple for made in formats))
        self.live_nbytes = 12 + max(made.live_nbytes for made in formats)
        self.shares_scale = any(made.shares_scale for made in formats)

    def parts(self, shape: Shape, dtype: str) -> tuple[StoredPart, ...]:
        blocks = -(-shape[0] // self.row_multiple)
        return (
            StoredPart("errors", "F64", (blocks, len(self.formats)), self.row_multiple),
            StoredPart("norms", "F64", (blocks, 1), self.row_multiple),
        )

    def encode(self, tile: Tensor, peak: float = 0.0) -> tuple[Tensor, ...]:
        import torch

        dtype = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[tile.dtype]
        floats = tile.float()
        errors = []
        for made in self.formats:
            if made.refusal(tuple(tile.shape), dtype) is not None:
                errors.append(torch.full((len(tile),), torch.inf, dtype=torch.float64, device=tile.device))
                continue
            decoded = made.read_again(tile, peak)
            errors.append(decoded.sub_(floats).square_().sum(1, dtype=torch.float64))
        squares = floats.square_().sum(1, dtype=torch.float64)
        return self._by_block(torch.stack(errors, 1)), self._by_block(squares[:, None])

    def _by_block(self, rows: Tensor) -> Tensor:
        from torch.nn.functional import pad

        padded = pad(rows, (0, 0, 0, -len(rows) % self.row_multiple))
        return padded.view(-1, self.row_multiple, rows.shape[1]).sum(1)

    def decode(self, parts: Mapping[str, Tensor], columns: int, dtype: torch.dtype | None = None) -> Tensor:
        raise NotImplementedError(self.name)

    def settings(self) -> dict[str, Any]:
        return {}
