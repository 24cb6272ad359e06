"""What compressed-tensors makes of a matrix: the oracle of its formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor  # type: ignore[import-untyped]
from compressed_tensors.compressors.format import infer_module_format  # type: ignore[import-untyped]
from compressed_tensors.quantization import QuantizationScheme  # type: ignore[import-untyped]
from compressed_tensors.quantization.utils import calculate_qparams, maybe_pad_tensor_for_block_quant  # type: ignore[import-untyped]
from torch import Tensor

#: The preset of compressed-tensors that each format is.
PRESETS = {
    "fp8_dynamic": "FP8_DYNAMIC", "fp8_block": "FP8_BLOCK", "w8a8": "W8A8",
    "w4a16": "W4A16", "w8a16": "W8A16", "w4a16_asym": "W4A16_ASYM",
}  # fmt: skip


def squared_error(decoded: Tensor, source: Tensor) -> float:
    return float((decoded.double() - source.double()).square().sum())


def compressor_of(scheme: QuantizationScheme) -> type[BaseCompressor]:
    name = infer_module_format(torch.nn.Linear, scheme).value
    compressor: type[BaseCompressor] = BaseCompressor.get_value_from_registry(name)
    return compressor


def reference_parameters(scheme: QuantizationScheme, matrix: Tensor) -> dict[str, Tensor]:
    """Scales, and zero points where the scheme has them, from extremes as compressed-tensors' observers see them."""
    weights = scheme.weights
    if weights.strategy == "block":
        height, width = weights.block_structure
        padded = maybe_pad_tensor_for_block_quant(matrix, (height, width))
        rows, columns = padded.shape
        blocks = padded.reshape(rows // height, height, columns // width, width)
        pieces = blocks.transpose(1, 2).flatten(2)
    else:
        pieces = matrix.reshape(matrix.shape[0], -1, weights.group_size or matrix.shape[1])
    scale, zero = calculate_qparams(pieces.amin(-1), pieces.amax(-1), weights)
    # Without force_zero_point, as llm-compressor's model_free has it, a symmetric scheme has no zero points at all:
    # to add zeros would make positive ones of negative zeros.
    return {"weight_scale": scale} if weights.symmetric else {"weight_scale": scale, "weight_zero_point": zero}


def reference_compressed(scheme: QuantizationScheme, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Any:
    return compressor_of(scheme).compress({"weight": matrix, **parameters}, scheme)


def reference_decompressed(scheme: QuantizationScheme, parts: Mapping[str, Tensor]) -> Tensor:
    """In float32: the scale's dtype is the one that compressed-tensors multiplies in."""
    widened = {**parts, "weight_scale": parts["weight_scale"].float()}
    if "weight_zero_point" in parts:
        # compressed-tensors 0.20 cannot view a single row of words as bytes once it is transposed; it reads no second.
        widened["weight_zero_point"] = torch.nn.functional.pad(parts["weight_zero_point"], (0, 0, 0, 1))
    decoded: Tensor = compressor_of(scheme).decompress(widened, scheme)["weight"]
    return decoded


def in_float32(scheme: QuantizationScheme, matrix: Tensor) -> dict[str, Tensor]:
    """What compressed-tensors makes of a matrix, with its division in float32.

    On a CPU compressed-tensors divides in the dtype of the weights, so that quotients are rounded twice: about 3 % of
    FP8 codes, 9 % of INT8 and 1 % of INT4 differ for BF16. Its kernels for GPUs divide in float32 by the very same
    scale. Its own code does so too if it gets float32, here with scale and zero point from the original dtype.
    """
    parameters = reference_parameters(scheme, matrix)
    widened = {**parameters, "weight_scale": parameters["weight_scale"].float()}
    return {
        **reference_compressed(scheme, matrix.float(), widened),
        "weight_scale": parameters["weight_scale"],
    }


def settings_of(scheme: QuantizationScheme) -> dict[str, Any]:
    """What readers take from a scheme; the rest says how its scales were found."""
    fields = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder",
              "scale_dtype", "zp_dtype")  # fmt: skip
    arguments = {of: getattr(scheme, of) for of in ("weights", "input_activations", "output_activations")}
    return {of: own and {field: getattr(own, field) for field in fields} for of, own in arguments.items()}
