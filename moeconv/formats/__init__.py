"""Quantized formats by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moeconv.formats.bnb4 import CODEBOOKS, METHOD, Bnb4, StoredBnb4, is_dynamic_map
from moeconv.formats.columns import ColumnInt
from moeconv.formats.format import FLOATS, Decoder, Format, FormatError, StoredPart
from moeconv.formats.fp4 import FP4_DIALECTS, GptOssMxFp4, GroupFp4, ModelOptNvFp4, MxFp4, NvFp4
from moeconv.formats.fp8 import BlockFp8, ChannelFp8, FineGrainedFp8, ModelOptFp8, MxFp8, TensorFp8
from moeconv.formats.integers import ChannelInt8, PackedInt
from moeconv.formats.llm_int8 import LlmInt8
from moeconv.formats.mx import EXPONENT_NAN
from moeconv.formats.probe import Probe
from moeconv.formats.strips import amax

__all__ = [
    "CODEBOOKS", "EXPONENT_NAN", "FAMILY_FORMATS", "FLOATS", "FORMATS", "FP4_DIALECTS", "METHOD", "BlockFp8", "Bnb4",
    "ChannelFp8", "ChannelInt8", "ColumnInt", "Decoder", "FineGrainedFp8", "Format", "FormatError", "GroupFp4",
    "LlmInt8", "ModelOptFp8", "MxFp8", "PackedInt", "Probe", "StoredBnb4", "StoredPart", "TensorFp8", "amax",
    "format_name", "is_dynamic_map", "make_format",
]  # fmt: skip

#: Formats that can be written, by name, and the options that each takes, with a type or the words that are known.
FORMATS: dict[str, tuple[Callable[..., Format], dict[str, type | tuple[str, ...]]]] = {
    "fp8": (FineGrainedFp8, {"ue8m0": bool}),
    "fp8_dynamic": (ChannelFp8, {}),
    "fp8_block": (BlockFp8, {}),
    "mxfp8a16": (MxFp8, {}),
    "w8a8": (ChannelInt8, {}),
    "w4a16": (lambda **own: PackedInt(4, **own), {"group_size": int, "search": ("amax", "mse", "full_range")}),
    "w8a16": (lambda **own: PackedInt(8, **own), {"group_size": int, "search": ("amax", "mse", "full_range")}),
    "nvfp4a16": (NvFp4, {"search": ("amax", "four_over_six", "mse")}),
    "modelopt_nvfp4": (ModelOptNvFp4, {"search": ("amax", "four_over_six", "mse")}),
    "mxfp4a16": (MxFp4, {"search": ("amax", "mse")}),
    "nf4": (lambda **own: Bnb4("nf4", **own), {"double_quant": bool, "experts": ("packed", "per_expert")}),
    "fp4": (lambda **own: Bnb4("fp4", **own), {"double_quant": bool, "experts": ("packed", "per_expert")}),
    "int8": (LlmInt8, {}),
    "w4a16_asym": (lambda **own: PackedInt(4, False, **own), {"group_size": int, "search": ("amax", "mse")}),
}


#: Formats of one family, which no other can have.
FAMILY_FORMATS: dict[str, tuple[Callable[..., Format], dict[str, type | tuple[str, ...]]]] = {
    "gptoss_mxfp4": (GptOssMxFp4, {}),
}


def format_name(text: str) -> str:
    """A format's name as typed, in any case and with `-` for `_`, as the tables have it."""
    return text.strip().lower().replace("-", "_")


def make_format(name: str, options: dict[str, Any]) -> Format:
    """A format with its options; both must be known."""
    return {**FORMATS, **FAMILY_FORMATS}[name][0](**options)
