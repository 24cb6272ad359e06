"""What rounding to a format does to numbers: how far a faithful copy of a matrix may be from it.

A number of a block whose largest magnitude is `a` is stored as a multiple of a step. Of integers the step is the same
for the whole block, `a` over 127.5 or 7.5; of floats it is a share of the number itself, and below their smallest
normal number a share of `a`. Numbers lie anywhere between two steps, so the root mean square of what is lost is
1 / sqrt(12) = 0.289 of a step. So for each number x it is about

    sqrt((relative * x) ** 2 + (step * a) ** 2)

`tests/test_rounding.py` holds the coefficients against what every encoder loses, for Gaussian numbers and Student's t
with five degrees of freedom: at most 1.1 times this for a matrix and 2.3 times for a block. Methods that choose codes
by what a layer puts out (GPTQ) lose more, so that `WHOLE` and `BLOCK` leave room.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod, sqrt
from typing import TYPE_CHECKING, NamedTuple

from moeconv.formats.bnb4 import BLOCK as BNB_BLOCK
from moeconv.formats.bnb4 import StoredBnb4
from moeconv.formats.columns import ColumnInt
from moeconv.formats.format import Decoder
from moeconv.formats.mx import EXPONENT_NAN
from moeconv.tensors import Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: How many times what is expected a matrix may be off, and a block of one that shares a scale.
WHOLE, BLOCK = 2.0, 3.0
_OF_A_STEP = 1 / sqrt(12)


class Rounding(NamedTuple):
    """What rounding loses, as the root mean square of many numbers, and what codes it makes.

    Attributes:
        relative: in proportion to each number.
        step: in proportion to the largest magnitude of the block that shares a scale.
        largest: magnitude of the outermost codes; 0 where they tell nothing.
        most_there: share of a matrix that has these codes at most, beside the largest number of each block.
    """

    relative: float
    step: float
    largest: float = 0.0
    most_there: float = 1.0


#: A mantissa between 1 and 2 has steps of 1/8, on average over all of them 0.088 of the number; the smallest normal
#: number is 2^-6, of at most 448.
_E4M3 = Rounding(0.088 * _OF_A_STEP, 2**-9 / 224 * _OF_A_STEP, 448.0, 0.2)
#: Steps of 1/2, on average 0.35 of the number; below 1, of at most 6, or 3.5 where scales are powers of two.
_E2M1 = Rounding(0.35 * _OF_A_STEP, 0.5 / 6 * _OF_A_STEP, 6.0, 0.4)
_MX_E2M1 = _E2M1._replace(step=0.5 / 3.5 * _OF_A_STEP)
_INT8 = Rounding(0.002, _OF_A_STEP / 127, 127.0, 0.2)
_INT4 = Rounding(0.002, _OF_A_STEP / 7.5, 7.0, 0.4)
_BY_NAME = {
    **dict.fromkeys(("fp8", "fp8_dynamic", "fp8_block", "mxfp8a16", "fp8_tensor", "modelopt_fp8"), _E4M3),
    **dict.fromkeys(("nvfp4a16", "modelopt_nvfp4"), _E2M1),
    **dict.fromkeys(("mxfp4a16", "gptoss_mxfp4", "modelopt_mxfp4", "fp4_e8m0"), _MX_E2M1),
    **dict.fromkeys(("w8a8", "w8a16"), _INT8),
    "int8": _INT8._replace(largest=1.0),
    "w4a16": _INT4,
    "w4a16_asym": _INT4._replace(largest=0.0),
    # Sixteen values that are no multiples of a step: 0.08 apart around zero, 0.3 at the lower end.
    "nf4": Rounding(0.06, 0.13 * _OF_A_STEP, 1.0, 0.4),
    # 1/12 apart below a quarter, and a third at the end.
    "fp4": Rounding(0.26 * _OF_A_STEP, 0.15 * _OF_A_STEP, 1.0, 0.4),
}
#: Of numbers that are stored as they are, in a dtype.
_BY_DTYPE = {"BF16": Rounding(2**-9, 0.0), "F16": Rounding(2**-12, 2**-25), "F32": Rounding(2**-22, 0.0)}


def rounding_of(made: Decoder | None, dtype: str) -> Rounding:
    """What rounding to a format does; without one, to a dtype.

    Args:
        made: the format, any that can be read.
        dtype: a safetensors name.
    """
    if made is None:
        return _BY_DTYPE[dtype]
    if isinstance(made, ColumnInt):
        found = _INT4 if made.bits == 4 else _INT8
        return found if made.is_symmetric else found._replace(largest=0.0)
    return _BY_NAME[made.name]


class Block(NamedTuple):
    """What shares a scale: `rows` x `columns` of a matrix; without rows, `columns` values that follow each other."""

    rows: int
    columns: int


def block_of(made: Decoder | None, shape: Shape) -> Block:
    """The block of a format in a matrix; a row where all of the matrix shares a scale, or has none.

    Args:
        made: the format.
        shape: of the matrix.
    """
    _rows, columns = shape
    if isinstance(made, StoredBnb4):
        return Block(0, BNB_BLOCK)
    if isinstance(made, ColumnInt):
        return Block(1, columns if made.is_ordered or columns % made.group else made.group)
    if made is None:
        return Block(1, columns)
    scales = made.parts(shape, "BF16")[1]
    if not scales.shape or scales.shape == (1,):
        return Block(1, columns)
    if made.row_multiple > 1 and scales.rows > 1:
        return Block(scales.rows, scales.rows)
    return Block(1, columns // prod(scales.shape[1:]))


def by_block(tile: Tensor, block: Block) -> Tensor:
    """Rows of a matrix as [blocks, values], edge blocks filled with zeros."""
    from torch.nn.functional import pad

    if block.rows < 2:
        return tile.reshape(-1, block.columns)
    padded = pad(tile, (0, -tile.shape[1] % block.columns, 0, -tile.shape[0] % block.rows))
    cut = padded.view(-1, block.rows, padded.shape[1] // block.columns, block.columns)
    return cut.transpose(1, 2).reshape(-1, block.rows * block.columns)


#: Parts that multiply or divide codes.
_SCALES = frozenset(
    ("weight_scale", "weight_scale_inv", "weight_scales", "scale", "scales", "weight_global_scale", "weight_scale_2",
     "SCB", "weight.absmax", "weight.nested_absmax")
)  # fmt: skip


def scales_of(parts: Mapping[str, Tensor]) -> list[Tensor]:
    """The parts that multiply or divide codes, as float32; of scales that are codes themselves nothing."""
    import torch

    found = []
    for suffix, part in parts.items():
        if suffix in _SCALES and not (suffix == "weight.absmax" and part.dtype == torch.uint8):
            found.append((part.view(torch.float8_e8m0fnu) if part.dtype == torch.uint8 else part).float())
    return found


def unscaled(made: Decoder, parts: Mapping[str, Tensor], columns: int) -> Tensor:
    """What codes stand for before they are scaled, as float32 rows [rows, K].

    Args:
        made: the format.
        parts: as `Decoder.decode` takes them.
        columns: K.
    """
    import torch

    ones = {
        suffix: torch.full_like(part, EXPONENT_NAN // 2) if part.dtype == torch.uint8 else _ones(part)
        for suffix, part in parts.items()
        if suffix in _SCALES
    }
    if isinstance(made, StoredBnb4) and made.nested:
        plain = torch.ones(parts["weight.absmax"].shape, dtype=torch.float32)
        return StoredBnb4(made.name).decode({"weight": parts["weight"], "weight.absmax": plain}, columns)
    return made.decode({**parts, **ones}, columns)


def _ones(part: Tensor) -> torch.Tensor:
    import torch

    return torch.ones(part.shape, dtype=torch.float32, device=part.device).to(part.dtype)
