"""Quantized formats by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moeconv.formats.format import FLOATS, Decoder, Format, StoredPart
from moeconv.formats.fp4 import FP4_DIALECTS
from moeconv.formats.fp8 import BlockFp8, ChannelFp8, FineGrainedFp8, MxFp8, TensorFp8
from moeconv.formats.integers import ChannelInt8, PackedInt

__all__ = [
    "FLOATS", "FORMATS", "FP4_DIALECTS", "BlockFp8", "ChannelFp8", "ChannelInt8", "Decoder", "FineGrainedFp8", "Format",
    "MxFp8", "PackedInt", "StoredPart", "TensorFp8", "format_name", "make_format",
]  # fmt: skip

#: Formats that can be written, by name, and the options that each takes with the type of their values.
FORMATS: dict[str, tuple[Callable[..., Format], dict[str, type]]] = {
    "fp8": (FineGrainedFp8, {"ue8m0": bool}),
    "fp8_dynamic": (ChannelFp8, {}),
    "fp8_block": (BlockFp8, {}),
    "w8a8": (ChannelInt8, {}),
    "w4a16": (lambda **own: PackedInt(4, **own), {"group_size": int, "search": str}),
    "w8a16": (lambda **own: PackedInt(8, **own), {"group_size": int, "search": str}),
    "w4a16_asym": (lambda **own: PackedInt(4, False, **own), {"group_size": int, "search": str}),
}


def format_name(text: str) -> str:
    """A format's name as typed, in any case and with `-` for `_`, as the tables have it."""
    return text.strip().lower().replace("-", "_")


def make_format(name: str, options: dict[str, Any]) -> Format:
    """A format with its options; both must be known."""
    return FORMATS[name][0](**options)
