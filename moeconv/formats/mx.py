"""Scales of the MX formats (OCP Microscaling specification 1.0): a byte e, E8M0, stands for 2 ^ (e - 127)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

#: The byte of a group that is not finite.
EXPONENT_NAN = 255
#: float32: the bits of infinity, and a quarter of a mantissa.
_INFINITY, _QUARTER = 0x7F800000, 1 << 21


def exponents(most: Tensor, offset: int) -> Tensor:
    """Bytes [..., groups] for the largest magnitudes of groups, as compressed-tensors chooses them.

    A magnitude is rounded to a power of two, down below 1.75 of it; the exponent less `offset` (that of the largest
    number of the codes) is the scale, 255 where that power is beyond float32. A group of zeros has byte 0, in half
    precision 127: 2^-127 is zero there, which compressed-tensors replaces by 1. Smaller numbers of half precision than
    the normal ones, which it takes for zero as well, have their own exponent here.
    """
    import torch

    bits = most.float().view(torch.int32)
    found = ((bits + _QUARTER >> 23) - offset).clamp_(0, EXPONENT_NAN - 1)
    found = torch.where(bits >= _INFINITY - _QUARTER, EXPONENT_NAN, found)
    if most.dtype == torch.float16:
        found = torch.where(bits == 0, 127, found)
    return found.to(torch.uint8)


def power_of_two(exponents: Tensor) -> Tensor:
    """float32 that bytes stand for; NaN for 255."""
    import torch

    return exponents.view(torch.float8_e8m0fnu).float()
