"""Integers of 4 and 8 bits with the input axis first, as GPTQ and AWQ store a matrix [N, K]; they are read only.

| | codes | zero points | scales | groups |
|---|---|---|---|---|
| GPTQ | `qweight` [K*b/32, N], along K | `qzeros` [G, N*b/32], along N | `scales` [G, N] | `g_idx` [K] |
| AWQ ("gemm") | `qweight` [K, N*b/32], along N | `qzeros` [G, N*b/32], along N | `scales` [G, N] | |

A word of 32 bits holds the first code in its lowest bits; AWQ has columns in the order 0, 2, 4, 6, 1, 3, 5, 7 there. A
weight is (code - zero point) * scale. GPTQ's first checkpoint format stores zero points less one, modulo 2^b, its
second (`gptq_v2`) as they are. Formulas: AutoAWQ 0.2.9 (`utils/packing_utils.py`), AutoGPTQ 0.7.1 and GPTQModel 7.7
(`qlinear_cuda_old.py`, `qlinear/`), AutoRound 0.16 (`auto_round_extension/torch/`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moeconv.formats.format import Decoder, FormatError, StoredPart
from moeconv.tensors import Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_WORD_BITS = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class ColumnInt(Decoder):
    """One of the forms of the table.

    Args:
        name: `gptq` or `awq`.
        bits: 4 or 8; AWQ has 4.
        group: rows of K that share a scale.
        is_symmetric: the zero point is the middle of the codes, however it is stored.
        offset: what is added to stored zero points.
        scale_dtype: of the scales.
        has_order: there is a `g_idx`.
        is_ordered: groups need not be made of neighbours (act-order).
    """

    live_nbytes = 24

    def __init__(
        self, name: str, bits: int, group: int, is_symmetric: bool, offset: int, scale_dtype: str,
        has_order: bool = False, is_ordered: bool = False,
    ) -> None:  # fmt: skip
        self.name = name
        self.bits = bits
        self.group = group
        self.is_symmetric = is_symmetric
        self.offset = offset
        self.scale_dtype = scale_dtype
        self.has_order = has_order
        self.is_ordered = is_ordered
        self.row_multiple = _WORD_BITS // bits

    def parts(self, shape: Shape, dtype: str) -> tuple[StoredPart, ...]:
        rows, columns = shape
        per_word = _WORD_BITS // self.bits
        groups = -(-columns // self.group)
        is_awq = self.name == "awq"
        codes = (columns, rows // per_word) if is_awq else (columns // per_word, rows)
        parts = (
            StoredPart("qweight", "I32", codes, per_word if is_awq else 1, is_across=True),
            StoredPart("qzeros", "I32", (groups, rows // per_word), per_word, is_across=True),
            StoredPart("scales", self.scale_dtype, (groups, rows), 1, is_across=True),
        )
        return (*parts, StoredPart("g_idx", "I32", (columns,), rows)) if self.has_order else parts

    def decode(self, parts: Mapping[str, Tensor], columns: int, dtype: torch.dtype | None = None) -> Tensor:
        import torch

        codes, zeros, of_column = self.integers(parts)
        scales = parts["scales"].float()
        decoded = torch.empty((codes.shape[1], columns), dtype=dtype or torch.float32, device=codes.device)
        values = codes.float()
        values -= zeros.float()[of_column]
        values *= scales[of_column]
        return decoded.copy_(values.T)

    def integers(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [K, rows] and zero points [G, rows] as uint8, and the group of each column [K].

        Raises:
            FormatError: a group that does not exist, or zero points of a symmetric matrix that are not in the middle.
        """
        import torch

        if self.name == "awq":
            order = torch.tensor(_AWQ_ORDER, device=parts["qweight"].device).argsort()
            codes, zeros = (_along_columns(parts[name], self.bits, order) for name in ("qweight", "qzeros"))
        else:
            codes = _along_rows(parts["qweight"], self.bits)
            zeros = _along_columns(parts["qzeros"], self.bits)
        middle = 1 << self.bits - 1
        if not self.is_symmetric:
            zeros = zeros.add(self.offset).bitwise_and((1 << self.bits) - 1)
        elif not any(bool((zeros == stored).all()) for stored in (middle, middle - 1)):
            raise FormatError("config.json says that it is symmetric (sym), and its zero points say otherwise")
        else:
            zeros = torch.full_like(zeros, middle)
        count, groups = codes.shape[0], zeros.shape[0]
        of_column = torch.arange(count, device=codes.device) // self.group
        if self.has_order:
            found = parts["g_idx"].flatten().long()
            if not bool(((found >= 0) & (found < groups)).all()):
                raise FormatError(f"g_idx names groups that do not exist; there are {groups}")
            if not self.is_ordered and not bool((found == of_column).all()):
                raise FormatError("config.json says that columns keep their order (desc_act), and g_idx says otherwise")
            of_column = found
        return codes, zeros, of_column


def _along_rows(words: Tensor, bits: int) -> Tensor:
    """Words [n, rows] int32 as codes [n * 32 / b, rows] uint8."""
    import torch

    count = _WORD_BITS // bits
    codes = torch.empty((words.shape[0], count, words.shape[1]), dtype=torch.uint8, device=words.device)
    for place in range(count):
        codes[:, place] = (words >> bits * place) & (1 << bits) - 1
    return codes.flatten(0, 1)


def _along_columns(words: Tensor, bits: int, order: Tensor | None = None) -> Tensor:
    """Words [n, words] int32 as codes [n, words * 32 / b] uint8; `order` is where each column is in its word."""
    import torch

    content = words.contiguous().view(torch.uint8)
    if bits == 4:
        content = torch.stack((content & 15, content >> 4), -1).flatten(1)
    return content if order is None else content.view(len(content), -1, len(order))[..., order].flatten(1)
