"""What a tensor is to moeconv: a name, a dtype, a shape, and places inside it.

safetensors stores tensors row-major, so a piece of a tensor (one expert, the gate half of a fused
matrix, every second row) is a set of positions that a few integers describe. `View` is those integers.
Stacking, fusing, interleaving and transposing are all of that kind: packed and unpacked checkpoints
hold the same numbers at other places, and converting between them is copying from view to view.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache, partial
from math import prod
from operator import itemgetter
from typing import NamedTuple

Shape = tuple[int, ...]

#: Bits of one element for each dtype name that safetensors knows (safetensors 0.8, `Dtype`).
DTYPE_BITS: dict[str, int] = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I8": 8, "U8": 8, "BOOL": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


class Spec(NamedTuple):
    """A tensor's name, dtype (a safetensors name such as "BF16") and shape."""

    name: str
    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor; a whole number for every spec that a checked header yields."""
        return _nbytes(self.dtype, self.shape)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"


def specs_of(names: Iterable[str], dtypes: Iterable[str], shapes: Iterable[Shape]) -> list[Spec]:
    """The specs of many tensors, made without a call for each."""
    return list(map(_new_spec, zip(names, dtypes, shapes, strict=True)))


_new_spec = partial(tuple.__new__, Spec)


def total_nbytes(specs: Iterable[Spec]) -> int:
    """Bytes of many tensors, counted by their few kinds."""
    return sum(_nbytes(dtype, shape) * count for (dtype, shape), count in Counter(map(_KIND, specs)).items())


_KIND = itemgetter(1, 2)


@cache  # asked for often, and a model has few shapes
def _nbytes(dtype: str, shape: Shape) -> int:
    return prod(shape) * DTYPE_BITS[dtype] // 8


class Axis(NamedTuple):
    """Where one axis of a piece lies in its block: index `i` is at `start + step * i` of block axis `of`."""

    of: int
    start: int
    step: int


class View(NamedTuple):
    """A piece as it lies inside a row-major block of the same rank.

    Attributes:
        block: shape of the block.
        shape: shape of the piece, in the piece's own axis order.
        axes: for each axis of the piece, where it lies in the block; a permutation of the block's axes.
    """

    block: Shape
    shape: Shape
    axes: tuple[Axis, ...]

    @classmethod
    def whole(cls, shape: Shape) -> View:
        """The view of a block that is the piece itself."""
        return cls(shape, shape, tuple(Axis(axis, 0, 1) for axis in range(len(shape))))

    def within(self, outer: View) -> View:
        """The piece as it lies where its block is itself the piece that `outer` shows."""
        axes = [(axis, outer.axes[axis.of]) for axis in self.axes]
        return View(
            outer.block, self.shape,
            tuple(Axis(out.of, out.start + out.step * axis.start, out.step * axis.step) for axis, out in axes),
        )  # fmt: skip

    @property
    def first(self) -> int:
        """Position in the block, in elements, of the piece's first element."""
        position = 0
        strides = row_major_strides(self.block)
        for axis in self.axes:
            position += axis.start * strides[axis.of]
        return position

    @property
    def is_run(self) -> bool:
        """The piece's elements follow each other in the block without a gap, in the piece's order."""
        may_be_partial = True
        for index, (axis, size) in enumerate(zip(self.axes, self.shape, strict=True)):
            if size == 1 and may_be_partial:
                continue  # one index of an outer axis: only moves the start
            if axis.of != index or (axis.step != 1 and size > 1):
                return False
            if not may_be_partial and size != self.block[index]:
                return False
            may_be_partial = False
        return True


def row_major_strides(shape: Shape) -> tuple[int, ...]:
    """Elements between neighbours along each axis of a row-major tensor."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)
