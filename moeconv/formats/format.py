"""What a quantized format is to moeconv: how a matrix becomes parts, and parts become a matrix.

A format sees tiles of whole rows of one matrix [N, K] (out, in) and never a name or a file. `parts` says, from
shape and dtype alone, which tensors a matrix becomes; `encode` and `decode` make their rows. No shape ever depends
on a value, so that a plan made from headers holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from moeconv.formats.strips import amax
from moeconv.tensors import Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Source dtypes that can be quantized.
FLOATS = ("BF16", "F16", "F32")


class StoredPart(NamedTuple):
    """One tensor of an encoded matrix.

    Attributes:
        suffix: what follows the module's name: `weight_scale` in `model.layers.0.mlp.up_proj.weight_scale`.
        dtype: a safetensors name such as "F8_E4M3".
        shape: of the whole tensor.
        rows: matrix rows that one index of axis 0 stands for; where this is not 1, a part of less than two axes belongs
            to all rows. 0 for a part that has nothing to do with rows.
        is_across: the matrix' rows lie along axis 1, not 0.
        values: of the matrix, in row-major order, for which one element stands, where the shape says nothing of rows.
    """

    suffix: str
    dtype: str
    shape: Shape
    rows: int
    is_across: bool = False
    values: int = 0


class FormatError(ValueError):
    """Stored values that a format cannot mean; the text says why, without a name."""


class Decoder(ABC):
    """A format that can be read.

    Attributes:
        name: as `--format` has it, or would.
        row_multiple: a tile begins at a multiple of this many rows, and ends at one or at the matrix' end.
        block: values that belong together, in row-major order; a tile begins between two blocks.
        live_nbytes: bytes that encoding or decoding holds at once for each element of a tile, all included (held by
            a test).
        tables: suffixes of parts that hold the same for every matrix of the format.
    """

    name: str
    row_multiple: int = 1
    block: int = 1
    live_nbytes: int = 20
    tables: tuple[str, ...] = ()

    @abstractmethod
    def parts(self, shape: Shape, dtype: str) -> tuple[StoredPart, ...]:
        """The tensors that a matrix of that shape and dtype becomes; the first holds the codes."""

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor], columns: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows of a matrix [rows, K], computed in float32, from the rows of its parts.

        Args:
            parts: by suffix; all that have rows, each with its other axes as one.
            columns: K, where parts are padded.
            dtype: to round to in the end; None for float32.

        Raises:
            FormatError: the values contradict each other.
        """


class Format(Decoder):
    """A format that can be written, with its options.

    Attributes:
        quant_method: `quant_method` of config.json.
        shares_scale: one number is measured over the whole matrix, and over those that engines fuse with it.
        is_packed: experts of a layer are one tensor for each of its parts.
        experts_only: engines have it for experts alone.
        experts_kept: engines have it for all but experts.
        layout_recipe: the recipe in whose layout `packed` experts of this format are written; empty for one by one.
    """

    quant_method: str
    shares_scale: bool = False
    is_packed: bool = False
    experts_only: bool = False
    experts_kept: bool = False
    layout_recipe: str = ""

    def known_as(self, has_experts: bool) -> str:
        """What the table of engines calls it, by whether experts have it too."""
        return self.name

    def refusal(self, shape: Shape, dtype: str) -> str | None:
        """Why a matrix cannot have this format, or None."""
        if len(shape) != 2 or 0 in shape:
            return f"a matrix is needed, not {list(shape)}"
        if dtype not in FLOATS:
            return f"{dtype} is no float of full precision"
        return None

    @abstractmethod
    def encode(self, tile: Tensor, peak: float = 0.0) -> tuple[Tensor, ...]:
        """Encode rows of a matrix.

        Args:
            tile: [rows, K] in the dtype of the source.
            peak: what was measured over all matrices that share it (`joined`), where the format has such a number.

        Returns:
            The rows of all parts that have rows, in the order of `parts`. Not finite where the tile was not: a scale
            is then NaN or Inf, or 255 among bytes.
        """

    def read_again(self, tile: Tensor, peak: float = 0.0) -> Tensor:
        """What rows of a matrix [rows, K] are once they were encoded, in float32.

        Args:
            tile: as for `encode`, and
            peak: as well.
        """
        suffixes = [part.suffix for part in self.parts(tuple(tile.shape), "BF16") if part.rows]
        return self.decode(dict(zip(suffixes, self.encode(tile, peak), strict=True)), tile.shape[1])

    def takes(self, stored: Decoder, dtype: str) -> bool:
        """Whether a matrix in that format can be written in this one with the values that it has, bit for bit.

        Args:
            stored: the format.
            dtype: in which the matrix would be encoded.
        """
        return False

    def retold(self, stored: Decoder, parts: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Rows of all parts, as `encode` returns them, from rows in a format that this one takes.

        Raises:
            FormatError: the values contradict each other.
        """
        raise NotImplementedError(stored.name)

    def constant(self, part: StoredPart, shape: Shape, dtype: str) -> bytes:
        """Content of a part without rows, for a matrix of that shape and dtype."""
        raise NotImplementedError(part.suffix)

    def bound(self, shape: Shape, dtype: str) -> Format:
        """The format for one shape and dtype, where its encoder has to know them."""
        return self

    def expert_refusal(self, shape: Shape) -> str | None:
        """Why matrices [N, K] of experts cannot lie one behind the other in one tensor, or None."""
        return None

    def measured(self, tile: Tensor) -> Tensor:
        """What a tile contributes to the number that is measured: its largest magnitude."""
        return amax(tile.view(1, -1), 1)

    def joined(self, measured: Sequence[float]) -> float:
        """The number, from what all tiles contribute."""
        return max(measured)

    def checked(self, encoded: Sequence[Tensor]) -> Tensor:
        """What tells whether all that was encoded was finite."""
        return encoded[1]

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What config.json says of it: for compressed-tensors a scheme (one of `config_groups`, without targets)."""
