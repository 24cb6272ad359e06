"""Matrices that a checkpoint holds quantized, found from names, shapes and config.json.

`decoded_view` shows a quantized checkpoint as if it held full-precision matrices: what comes after it plans with
names and shapes of the model, and the bytes are decoded when they are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from moeconv.checkpoint import Checkpoint, Encoded, StoredTensor
from moeconv.errors import Problem
from moeconv.formats import (
    FLOATS,
    BlockFp8,
    ChannelFp8,
    ChannelInt8,
    Decoder,
    FineGrainedFp8,
    GptOssMxfp4,
    PackedInt,
    StoredPart,
)
from moeconv.tensors import Shape, Spec

#: Names of dtypes in config.json.
CONFIG_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_SCALES = {"BF16", "F16", "F32", "F8_E8M0", "U8"}
_BLOCK = 128


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says about quantization, wherever it says it; empty where it says nothing."""
    for holder in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in ("quantization_config", "compression_config"):
            value = holder.get(key)
            if isinstance(value, Mapping):
                return value
    return {}


def model_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that config.json names for the model; BF16 where it names none."""
    for holder in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in ("dtype", "torch_dtype"):
            if holder.get(key) in CONFIG_DTYPES:
                return CONFIG_DTYPES[str(holder[key])]
    return "BF16"


def decoded_view(source: Checkpoint, problems: list[Problem], dtype: str | None = None) -> Checkpoint:
    """The checkpoint with every quantized matrix as one tensor `MODULE.weight` of full precision.

    Args:
        source: as opened.
        problems: receives quantized tensors that cannot be read.
        dtype: dtype of the decoded matrices; None for the one of their scales, or the model's.
    """
    tensors = dict(source.tensors)
    quantization = quantization_config(source.config)
    method = str(quantization.get("quant_method", ""))
    if method not in ("", "fp8", "compressed-tensors", "mxfp4"):
        problems.append(
            Problem(
                f"{source.root} is quantized as {method!r}, which cannot be decoded yet",
                "Start from the checkpoint in full precision.",
            )
        )
        return source
    usual = model_dtype(source.config)
    groups = _groups(quantization)
    known: dict[object, tuple[Shape, Decoder]] = {}  # by all that decides; a model has few kinds
    last_words = {name.rpartition(".")[2] for name in source.tensors}
    suffixes = [suffix for suffix in _SUFFIXES if suffix in last_words]
    for module in _modules(source.tensors):
        parts = {
            suffix: tensor for suffix in suffixes if (tensor := source.tensors.get(f"{module}.{suffix}")) is not None
        }
        schemes = _schemes(groups, module)
        kind = (*map(id, schemes), *((suffix, *tensor.spec[1:]) for suffix, tensor in parts.items()))
        if kind not in known:
            found = _format_of(parts, quantization, schemes)
            if isinstance(found, str):
                problems.append(Problem(f"{module}: {found}", "Start from the checkpoint in full precision."))
                continue
            known[kind] = found
        shape, made = known[kind]
        scale = parts.get("weight_scale")
        own = scale.spec.dtype if scale is not None and scale.spec.dtype in ("BF16", "F16") else None
        for suffix in parts:
            del tensors[f"{module}.{suffix}"]
        first = next(iter(parts.values()))
        spec = Spec(f"{module}.weight", dtype or own or usual, shape)
        tensors[spec.name] = StoredTensor(spec, first.file, first.offset, Encoded(made, parts))
    for tensor in tensors.values():
        if tensor.encoded is None and tensor.spec.dtype.startswith("F8") and len(tensor.spec.shape) > 1:
            problems.append(
                Problem(
                    f"{tensor.spec} has no scales that are known here",
                    "Start from the checkpoint in full precision.",
                )
            )
    return source._replace(tensors=tensors)


_SUFFIXES = ("weight", "weight_packed", "weight_scale_inv", "weight_scale", "weight_zero_point", "weight_shape",
             "input_scale", "weight_blocks", "weight_scales")  # fmt: skip


def _modules(tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    for name in tensors:
        for suffix in (".weight_scale_inv", ".weight_scale", ".weight_scales"):
            if name.endswith(suffix):
                yield name.removesuffix(suffix)


def _format_of(
    parts: Mapping[str, StoredTensor], quantization: Mapping[str, Any], schemes: Sequence[Mapping[str, Any]]
) -> tuple[Shape, Decoder] | str:
    """Shape and format of a quantized matrix, or why it cannot be read."""
    specs = {suffix: tensor.spec for suffix, tensor in parts.items()}
    if "weight_scales" in specs:
        return _blocks_format(specs)
    scale = specs.get("weight_scale_inv") or specs["weight_scale"]
    if "input_scale" in specs:
        return "it has a static scale for activations, which no target keeps"
    if scale.dtype not in _SCALES or len(scale.shape) != 2:
        return f"its scale {scale} is of no known form"
    if "weight_packed" in specs:
        return _packed_format(specs, schemes)
    weight = specs.get("weight")
    if weight is None or len(weight.shape) != 2:
        return "it has scales and no matrix of codes"
    rows, columns = weight.shape
    blocks = (-(-rows // _BLOCK), -(-columns // _BLOCK))
    if weight.dtype == "F8_E4M3" and "weight_scale_inv" in specs:
        size = quantization.get("weight_block_size")
        if size not in (None, [_BLOCK, _BLOCK]):
            return f"its blocks are {size}; only [128, 128] are known"
        if scale.shape == blocks:
            return weight.shape, FineGrainedFp8(scale.dtype in ("F8_E8M0", "U8"), scale.dtype)
    elif weight.dtype == "F8_E4M3" and scale.shape == (rows, 1) and blocks != (rows, 1):
        return weight.shape, ChannelFp8()
    elif weight.dtype == "F8_E4M3" and scale.shape == blocks:
        return weight.shape, BlockFp8()
    elif weight.dtype == "I8" and scale.shape == (rows, 1):
        return weight.shape, ChannelInt8()
    return f"its scale {scale} does not belong to {weight}"


def _blocks_format(specs: Mapping[str, Spec]) -> tuple[Shape, Decoder] | str:
    codes, scales = specs.get("weight_blocks"), specs["weight_scales"]
    shape = (scales.shape[0], 32 * scales.shape[-1]) if len(scales.shape) == 2 else ()
    if codes is None or not shape:
        return f"its scales {scales} are of no known form"
    made = GptOssMxfp4()
    wanted = [(part.dtype, part.shape) for part in made.parts(shape, "BF16")]
    if [spec[1:] for spec in (codes, scales)] != wanted:
        return f"{codes} and {scales} do not belong to a matrix in MXFP4"
    return shape, made


def _packed_format(specs: Mapping[str, Spec], schemes: Sequence[Mapping[str, Any]]) -> tuple[Shape, Decoder] | str:
    packed, scale = specs["weight_packed"], specs["weight_scale"]
    if packed.dtype != "I32" or len(packed.shape) != 2 or scale.dtype not in FLOATS:
        return f"{packed} is of no known form"
    fitting = []
    for group in schemes:
        bits, size = group.get("num_bits"), group.get("group_size")
        if group.get("strategy") == "channel" and bits in (4, 8):
            size = packed.shape[1] * 32 // bits
        if bits not in (4, 8) or not isinstance(size, int) or size < 1 or group.get("type") != "int":
            continue
        made = PackedInt(bits, "weight_zero_point" not in specs, size)
        shape = (packed.shape[0], scale.shape[1] * size)
        if group.get("actorder") in ("group", "dynamic"):
            return "its columns are in order of activation, which cannot be read"
        if made.refusal(shape, scale.dtype) is None and all(
            part.suffix not in specs or _is_part(specs[part.suffix], part) for part in made.parts(shape, scale.dtype)
        ):
            fitting.append((shape, made))
    if not fitting:
        return f"{packed} and its scale {scale} fit no group of quantization_config"
    return fitting[0]


def _is_part(spec: Spec, part: StoredPart) -> bool:
    dtypes = ("I64", "I32") if part.suffix == "weight_shape" else (part.dtype,)
    return spec.dtype in dtypes and spec.shape == part.shape


def format_of_module(specs: Iterable[Spec], config: Mapping[str, Any]) -> str | None:
    """The name of the format that the first matrix among the tensors has, as far as it can be decoded."""
    parts: dict[str, StoredTensor] = {}
    module = ""
    for spec in specs:
        stem, _, suffix = spec.name.rpartition(".")
        module = module or stem
        if stem == module:
            parts[suffix] = StoredTensor(spec, 0, 0)
    if not {"weight_scale", "weight_scale_inv", "weight_scales"} & set(parts):
        return None
    quantization = quantization_config(config)
    found = _format_of(parts, quantization, _schemes(_groups(quantization), module))
    return None if isinstance(found, str) else found[1].name


_Groups = list[tuple[list[Any], Mapping[str, Any]]]


def _groups(quantization: Mapping[str, Any]) -> _Groups:
    """Targets and arguments for weights of each group."""
    groups = quantization.get("config_groups")
    found = []
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            targets = group.get("targets")
            found.append((targets if isinstance(targets, list) else [], weights))
    return found


def _schemes(groups: _Groups, module: str) -> list[Mapping[str, Any]]:
    """Arguments for weights, those first whose targets name the module."""
    if len(groups) < 2:
        return [weights for _, weights in groups]
    named = [(not any(_is_target(target, module) for target in targets), weights) for targets, weights in groups]
    return [weights for _, weights in sorted(named, key=lambda item: item[0])]


def weight_bits(config: Mapping[str, Any]) -> set[int]:
    """The numbers of bits that config.json gives for weights of compressed-tensors."""
    return {
        bits for _, weights in _groups(quantization_config(config)) if isinstance(bits := weights.get("num_bits"), int)
    }


def _is_target(target: object, module: str) -> bool:
    if not isinstance(target, str):
        return False
    if not target.startswith("re:"):
        return target in (module, "Linear")
    try:
        return re.match(target[3:], module) is not None
    except re.error:
        return False
