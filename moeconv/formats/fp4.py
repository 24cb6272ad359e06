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

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moeconv.formats.format import Decoder, Format, StoredPart
from moeconv.formats.fp8 import E4M3_MAX, E4M3_NAN
from moeconv.formats.mx import EXPONENT_NAN, exponents, power_of_two
from moeconv.formats.strips import amax, by_group, float_strips, strips
from moeconv.tensors import Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FP4_MAX = 6.0
#: Halfway between neighbouring numbers.
_BORDERS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
#: A half has steps of 2^-24 where it is smallest: a number times this is rounded there to multiples of 0.5.
_TO_HALF_STEPS = 2.0**-23


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


class _WrittenFp4(GroupFp4, Format):
    """A dialect that can be written.

    Attributes:
        search: how scales are chosen; `amax` for the one that brings the largest magnitude to its place.
        rounds_away: of two nearest codes the larger one, and -0 has a code of its own; else the even one.
    """

    search: str = "amax"
    rounds_away = False

    def _choose_by(self, search: str) -> None:
        self.search = search
        self.live_nbytes = 20 if search == "amax" else 28

    def refusal(self, shape: Shape, dtype: str) -> str | None:
        refused = super().refusal(shape, dtype)
        if refused is None and shape[1] % self.group:
            return f"{shape[1]} columns are not made of whole groups of {self.group}"
        return refused

    def takes(self, stored: Decoder, dtype: str) -> bool:
        return isinstance(stored, GroupFp4) and (stored.group, bool(stored.whole)) == (self.group, bool(self.whole))

    def retold(self, stored: Decoder, parts: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        import torch

        assert isinstance(stored, GroupFp4)
        codes, scales = parts[stored.codes[0]].view(torch.uint8), parts[stored.scales[0]]
        codes = codes.reshape(len(codes), -1, self.group // 2) if self.has_blocks else codes.flatten(1)
        scales = scales.view(torch.uint8) if self.scales[1] == "U8" else scales
        if not self.whole:
            return codes, scales
        whole = parts[stored.whole].reshape(() if self.is_number else (1,))
        return codes, scales, whole if self.is_divisor == stored.is_divisor else 1.0 / whole

    @abstractmethod
    def _scales(self, most: Tensor, peak: float) -> tuple[Tensor, Tensor, Tensor]:
        """Scales of groups.

        Args:
            most: largest magnitudes of groups, in the dtype of the source.
            peak: that of all matrices which share a scale.

        Returns:
            Scales as they are stored, float32 by which values are divided, and the scale of the whole matrix.
        """

    def encode(self, tile: Tensor, peak: float = 0.0) -> tuple[Tensor, ...]:
        import torch

        rows, columns = tile.shape
        groups = columns // self.group
        codes = torch.empty((rows, columns // 2), dtype=torch.uint8, device=tile.device)
        most = torch.empty((rows, groups), dtype=tile.dtype, device=tile.device)
        for strip in strips(tile):
            most[strip] = amax(by_group(tile[strip], self.group), 2)
        scales, divisors, whole = self._scales(most, peak)
        if self.search != "amax":
            scales, divisors = self._best(tile, [(scales, divisors), *self._others(most, peak, scales)])
        rounder = _Rounder(self.rounds_away)
        for strip, values in float_strips(tile):
            by_group(values, self.group).div_(divisors[strip][..., None])
            codes[strip] = _packed(rounder.nearest(values))
        made = codes.view(rows, groups, -1) if self.has_blocks else codes, scales
        return (*made, whole) if self.whole else made

    def _others(self, most: Tensor, peak: float, scales: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Other scales of groups, as stored and as divisors, that the search tries."""
        raise NotImplementedError(self.search)

    def _best(self, tile: Tensor, candidates: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """For each group the scale, and its divisor, of least squared error; of several the first."""
        import torch

        stored, divisors = (item.clone() for item in candidates[0])
        codes = stored.view(torch.uint8)
        for strip, values in float_strips(tile):
            groups = by_group(values, self.group)
            least = torch.full(divisors[strip].shape, torch.inf, device=tile.device)
            for scales, others in candidates:
                quotients = groups / others[strip][..., None]
                error = (_rounded(quotients).sub_(quotients)).square_().sum(-1) * others[strip].square()
                is_better = error < least
                least = torch.where(is_better, error, least)
                codes[strip] = torch.where(is_better, scales.view(torch.uint8)[strip], codes[strip])
                divisors[strip] = torch.where(is_better, others[strip], divisors[strip])
        return stored, divisors


class MxFp4(_WrittenFp4):
    """compressed-tensors `mxfp4-pack-quantized` (MXFP4A16).

    The scale is the power of two that brings the largest magnitude of a group into [3.5, 7): formula of
    compressed-tensors, `quantization/utils/mxfp_utils.py`. What is above 6 becomes 6.

    Args:
        search: `amax`, or `mse` for the power of two of least squared error, of this one and its neighbours.
    """

    quant_method = "compressed-tensors"

    def __init__(self, search: str = "amax") -> None:
        super().__init__("mxfp4a16", 32, ("weight_packed", "U8"), ("weight_scale", "U8"))
        self._choose_by(search)

    def _others(self, most: Tensor, peak: float, scales: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        import torch

        for step in (-1, 1):
            moved = scales.int().add_(step).clamp_(0, EXPONENT_NAN - 1).to(torch.uint8)
            moved = torch.where(scales == EXPONENT_NAN, scales, moved)
            yield moved, power_of_two(moved)

    def _scales(self, most: Tensor, peak: float) -> tuple[Tensor, Tensor, Tensor]:
        scales = exponents(most, offset=2)
        return scales, power_of_two(scales), most

    def settings(self) -> dict[str, Any]:
        weights = {
            "num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32,
            "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8", "dynamic": False,
        }  # fmt: skip
        return {"format": "mxfp4-pack-quantized", "weights": weights, "input_activations": None}


class GptOssMxFp4(_WrittenFp4):
    """`quant_method: mxfp4`, experts of gpt-oss in the tensors of its recipe.

    The scale is the least power of two under which nothing is above 6, and ties are rounded away from zero: OpenAI's
    rule (triton_kernels, `numerics_details/mxfp.py`). A group of zeros has byte 0.
    """

    live_nbytes = 20
    quant_method = "mxfp4"
    rounds_away = True
    experts_only = True
    layout_recipe = "gpt_oss_mxfp4"

    def __init__(self) -> None:
        super().__init__("gptoss_mxfp4", 32, ("weight_blocks", "U8"), ("weight_scales", "U8"), has_blocks=True)

    def _scales(self, most: Tensor, peak: float) -> tuple[Tensor, Tensor, Tensor]:
        import torch

        scale = most.float() / FP4_MAX
        bits = (scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000
        found = torch.where(most.isfinite(), bits >> 23, EXPONENT_NAN).to(torch.uint8)
        power = bits.view(torch.float32)
        return found, torch.where(power == 0, 1.0, power), most

    def settings(self) -> dict[str, Any]:
        return {}


class _NvFp4(_WrittenFp4):
    """What both dialects of NVFP4 share.

    The search tries, besides the scale that brings the largest magnitude of a group to 6: `four_over_six`, the one that
    brings it to 4, where steps are finer; `mse`, the E4M3 numbers around it, three below and seven above, which is 0.8
    to 1.8 times as large.
    """

    shares_scale = True

    @abstractmethod
    def _divisors(self, scales: Tensor, peak: float, dtype: torch.dtype) -> Tensor:
        """What values are divided by, for E4M3 scales."""

    def _others(self, most: Tensor, peak: float, scales: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        import torch

        if self.search == "four_over_six":
            moved, divisors, _ = self._scales(most * 1.5, peak)
            yield moved, divisors
            return
        codes = scales.view(torch.uint8).int()
        for step in (-3, -2, -1, 1, 2, 3, 4, 5, 6, 7):
            moved = torch.where(codes == E4M3_NAN, codes, (codes + step).clamp_(1, E4M3_NAN - 1))
            moved = moved.to(torch.uint8).view(torch.float8_e4m3fn)
            yield moved, self._divisors(moved, peak, most.dtype)


class NvFp4(_NvFp4):
    """compressed-tensors `nvfp4-pack-quantized` (NVFP4A16).

    With the largest magnitude A of the matrix and of those that engines fuse with it, and a of a group:
    G = 448 * 6 / A, s = E4M3(G * a / 6), 0.125 for a group of zeros, and a code stands for code * s / G. Quotients
    are rounded to the source's dtype first, as compressed-tensors does (`generate_gparam`, `calculate_qparams`).
    """

    quant_method = "compressed-tensors"

    def __init__(self, search: str = "amax") -> None:
        super().__init__(
            "nvfp4a16", 16, ("weight_packed", "U8"), ("weight_scale", "F8_E4M3"), "weight_global_scale", True
        )
        self._choose_by(search)

    def _factor(self, peak: float, dtype: torch.dtype, device: torch.device) -> Tensor:
        import torch

        largest = torch.tensor(peak, dtype=dtype, device=device)
        factor = (E4M3_MAX * FP4_MAX / largest.clamp(min=torch.finfo(dtype).tiny)).float()
        # Half precision has no room for the factor of small numbers: compressed-tensors takes 1 and loses them.
        factor = torch.where(factor.isinf(), E4M3_MAX * FP4_MAX / largest.float(), factor)
        return factor.nan_to_num_(nan=1.0, posinf=1.0)[None]

    def _divisors(self, scales: Tensor, peak: float, dtype: torch.dtype) -> Tensor:
        return scales.float() / self._factor(peak, dtype, scales.device)

    def _scales(self, most: Tensor, peak: float) -> tuple[Tensor, Tensor, Tensor]:
        import torch

        factor = self._factor(peak, most.dtype, most.device)
        floats = ((most / FP4_MAX).float() * factor).clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
        floats = torch.where(floats == 0, 0.125, floats).where(most.isfinite(), torch.nan)
        return floats.to(torch.float8_e4m3fn), floats.div_(factor), factor

    def settings(self) -> dict[str, Any]:
        weights = {
            "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16,
            "scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn", "dynamic": False,
        }  # fmt: skip
        return {"format": "nvfp4-pack-quantized", "weights": weights, "input_activations": None}


class ModelOptNvFp4(_NvFp4):
    """NVFP4 as ModelOpt writes it without scales for activations (W4A16_NVFP4).

    With A and a as in `NvFp4`: G = A / (448 * 6), s = E4M3(a / (6 * G)) between 2^-9 and 448, 1 for a group of zeros,
    and a code stands for code * s * G; all in float32 (ModelOpt 0.47, `qtensor/nvfp4_tensor.py`).
    """

    quant_method = "modelopt"

    def __init__(self, search: str = "amax", is_number: bool = True) -> None:
        super().__init__(
            "modelopt_nvfp4", 16, ("weight", "U8"), ("weight_scale", "F8_E4M3"), "weight_scale_2", is_number=is_number
        )
        self._choose_by(search)

    def _factor(self, peak: float, device: torch.device) -> Tensor:
        import torch

        factor = torch.tensor(peak, dtype=torch.float32, device=device) / (FP4_MAX * E4M3_MAX)
        return torch.where(factor == 0, 1.0, factor)  # of zeros, where ModelOpt divides by it

    def _divisors(self, scales: Tensor, peak: float, dtype: torch.dtype) -> Tensor:
        return scales.float().mul_(self._factor(peak, scales.device))

    def _scales(self, most: Tensor, peak: float) -> tuple[Tensor, Tensor, Tensor]:
        import torch

        factor = self._factor(peak, most.device)
        floats = most.float() / (FP4_MAX * factor)
        floats = torch.where(floats == 0, 1.0, floats.clamp_(2**-9, E4M3_MAX)).where(most.isfinite(), torch.nan)
        scales = floats.to(torch.float8_e4m3fn)
        return scales, self._divisors(scales, peak, most.dtype), factor

    def settings(self) -> dict[str, Any]:
        weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": self.group}
        return {"quant_algo": "W4A16_NVFP4", "weights": weights}


#: All that can be read.
FP4_DIALECTS = (
    GptOssMxFp4(),
    MxFp4(),
    GroupFp4("modelopt_mxfp4", 32, ("weight", "U8"), ("weight_scale", "U8")),
    GroupFp4("fp4_e8m0", 32, ("weight", "I8"), ("scale", "F8_E8M0")),
    GroupFp4("fp4_e8m0", 32, ("weight", "I8"), ("scale", "U8")),
    GroupFp4("fp4_e8m0", 32, ("weight", "I8"), ("weight_scale_inv", "F8_E8M0")),
    GroupFp4("fp4_e8m0", 32, ("weight", "I8"), ("weight_scale_inv", "U8")),
    NvFp4(),
    ModelOptNvFp4(),
    ModelOptNvFp4(is_number=False),
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


def _rounded(values: Tensor) -> Tensor:
    """Nearest numbers of E2M1, of a tie the even one.

    Steps are half of the power of two below a number, at least 0.5; a sum with 1.5 * 2^23 steps keeps whole ones.
    """
    import torch

    power = values.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    large = power.clamp_(1.0, 4.0).mul_(1.5 * 2**22)
    return values.add(large).sub_(large).clamp_(-FP4_MAX, FP4_MAX)


class _Rounder:
    """Finds nearest codes, in the same memory for one strip after another.

    Args:
        rounds_away: of two nearest codes the larger one, with the sign of any zero. Else the even one; a number of -0
            has the code of 0 then, a negative number that becomes 0 that of -0.
    """

    def __init__(self, rounds_away: bool) -> None:
        self._rounds_away = rounds_away
        self._room: tuple[Tensor, Tensor, Tensor] | None = None

    def nearest(self, values: Tensor) -> Tensor:
        """Codes as int16, of a tie the even one, valid until the next call. The numbers are overwritten.

        They are rounded to multiples of 0.5, 1 and 2, which is what a cast to half precision does with numbers as small
        as its least. Counted in codes, steps of 1 begin at code 2 and steps of 2 at code 4; each rounding is right in
        its own range and too large elsewhere, so that the least of the three is the code. What is above 6 has code 7.
        """
        import torch

        if self._rounds_away:
            magnitudes = values.abs()
            signs = (values.view(torch.int32) >> 28).bitwise_and_(8).to(torch.int16)
            for border in _BORDERS:
                signs += magnitudes >= border
            return signs
        if self._room is None:  # the first strip is the largest
            halves = torch.empty_like(values, dtype=torch.float16)
            self._room = halves, torch.empty_like(halves), torch.empty_like(halves, dtype=torch.int16)
        halves, coarser, codes = (room[: len(values)] for room in self._room)
        finest = halves.copy_(values.add_(0.0).mul_(_TO_HALF_STEPS)).view(torch.int16)
        torch.bitwise_and(finest, 0x7FFF, out=codes)
        for first in (2, 4):
            counted = coarser.copy_(values.mul_(0.5)).view(torch.int16).bitwise_and_(0x7FFF).add_(first)
            torch.minimum(codes, counted, out=codes)
        return codes.clamp_(max=7).bitwise_or_(finest.bitwise_right_shift_(12).bitwise_and_(8))


def _packed(codes: Tensor) -> Tensor:
    """Codes as bytes, two in each."""
    import torch

    pairs = codes.view(torch.int32)
    return (pairs | pairs >> 12).to(torch.uint8)
