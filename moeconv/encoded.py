"""Matrices that a checkpoint holds quantized, found from names, shapes and config.json.

`decoded_view` shows a quantized checkpoint as if it held full-precision matrices: what comes after it plans with
names and shapes of the model, and the bytes are decoded when they are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

from moeconv.checkpoint import CONFIG, Checkpoint, Encoded, StoredTensor
from moeconv.errors import Problem
from moeconv.formats import (
    FLOATS,
    FP4_DIALECTS,
    METHOD,
    BlockFp8,
    ChannelFp8,
    ChannelInt8,
    ColumnInt,
    Decoder,
    FineGrainedFp8,
    LlmInt8,
    ModelOptFp8,
    MxFp8,
    PackedInt,
    StoredPart,
    TensorFp8,
)  # fmt: skip
from moeconv.states import stated_view
from moeconv.targets import is_target
from moeconv.tensors import Shape, Spec

#: Files beside config.json that say how the matrices are quantized.
MODELOPT_SETTINGS = "hf_quant_config.json"
SETTINGS = (MODELOPT_SETTINGS, "quantize_config.json", "quant_config.json")
#: Names of dtypes in config.json.
CONFIG_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_EXPONENTS = ("F8_E8M0", "U8")
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
            short = CONFIG_DTYPES.get(str(holder.get(key)))
            if short is not None:
                return short
    return "BF16"


def decoded_view(source: Checkpoint, problems: list[Problem], dtype: str | None = None) -> Checkpoint:
    """The checkpoint with every quantized matrix as one tensor `MODULE.weight` of full precision.

    Args:
        source: as opened.
        problems: receives quantized tensors that cannot be read.
        dtype: dtype of the decoded matrices; None for the one of their scales, or the model's.
    """
    quantization = quantization_config(source.config)
    method = str(quantization.get("quant_method", "")).lower()
    if method not in _METHODS:
        problems.append(
            Problem(
                f"{source.root} is quantized as {method!r}, which cannot be decoded yet",
                "Start from the checkpoint in full precision.",
            )
        )
        return source
    problems += [
        Problem(f"{source.root / CONFIG} says that {what} ({key})", "Start from the checkpoint in full precision.")
        for key, what in _ALTERED.items()
        if isinstance(said := quantization.get(key), Mapping) and said and said.get("format") != "dense"
    ]
    source = stated_view(source, problems, dtype)
    modules, tensors = _by_module(source.tensors)
    is_quantized = bool(quantization) or any(file.path in SETTINGS for file in source.sidecars)
    usual = model_dtype(source.config)
    groups = _groups(quantization)
    schemes = _schemes(groups, "")
    known: dict[object, tuple[Shape, str, Decoder]] = {}  # by all that decides; a model has few kinds
    for module, beside in modules.items():
        own, foreign = _sorted_words(tuple(beside), "weight" in beside and beside["weight"].spec.dtype in _CODES)
        if not own:
            tensors.update({tensor.spec.name: tensor for tensor in beside.values()})
            continue
        parts = {word: beside[word] for word in own} if own != tuple(beside) else beside
        schemes = _schemes(groups, module) if len(groups) > 1 else schemes
        kind = (*map(id, schemes), own, *[tensor.spec[1:] for tensor in parts.values()])
        if kind not in known:
            found = _format_of(parts, quantization, schemes)
            if isinstance(found, str):
                problems.append(Problem(f"{module}: {found}", "Start from the checkpoint in full precision."))
                continue
            known[kind] = found[0], dtype or _scale_dtype(parts) or usual, found[1]
        shape, dtype_, made = known[kind]
        for word in foreign:
            problems.append(
                Problem(
                    f"{module}.{word} changes what the codes beside it mean, in a way that cannot be decoded yet",
                    "Start from the checkpoint in full precision.",
                )
            )
        first = parts[own[0]]
        spec = Spec(f"{module}.weight", dtype_, shape)
        tensors[spec.name] = StoredTensor(spec, first.file, first.offset, Encoded(made, parts))
    problems += _left_over(tensors.values(), bool(known), is_quantized)
    return source._replace(tensors=tensors)


def _left_over(tensors: Iterable[StoredTensor], has_matrices: bool, is_quantized: bool) -> Iterator[Problem]:
    """What belongs to quantized matrices and was decoded with none of them."""
    for tensor in tensors:
        if has_matrices and tensor.spec.name.endswith(_BESIDE):
            yield Problem(
                f"{tensor.spec.name} changes what quantized matrices mean, in a way that cannot be decoded yet",
                "Start from the checkpoint in full precision.",
            )
        if tensor.encoded is None and _is_bare(tensor.spec, is_quantized):
            yield Problem(
                f"{tensor.spec} has no scales that are known here",
                "Start from the checkpoint in full precision.",
            )


def _by_module(
    tensors: Mapping[str, StoredTensor],
) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, StoredTensor]]:
    """Tensors whose last word says that they may belong to a quantized matrix, by module and word; and all others."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    others: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        module, _, word = name.rpartition(".")
        if word in _WORDS and module and tensor.encoded is None:
            if module in modules:
                modules[module][word] = tensor
            else:
                modules[module] = {word: tensor}
        else:
            others[name] = tensor
    return modules, others


@cache  # a model has few combinations
def _sorted_words(words: tuple[str, ...], has_codes: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of the words behind a module's name, those of a quantized matrix, in one order, and those that are foreign to it.

    Both are empty where nothing tells of such a matrix.
    """
    tells = (
        not {"weight_scale_inv", "weight_scale", "weight_scales"}.isdisjoint(words)
        or {"scales", "qweight"} <= set(words)
        or (not {"scale", "SCB"}.isdisjoint(words) and has_codes)
    )
    if not tells:
        return (), ()
    return tuple(w for w in _SUFFIXES if w in words), tuple(w for w in _FOREIGN if w in words and w not in _SUFFIXES)


def _scale_dtype(parts: Mapping[str, StoredTensor]) -> str | None:
    """The dtype of scales that are of the model's dtype."""
    scale = parts.get("weight_scale", parts.get("scales"))
    return scale.spec.dtype if scale is not None and scale.spec.dtype in ("BF16", "F16") else None


#: What compressed-tensors does to weights beside quantizing them, none of which can be undone here.
_ALTERED = {
    "transform_config": "weights are rotated, and inputs have to be where the model runs",
    "sparsity_config": "weights are stored sparse",
}
_SUFFIXES = (
    "weight", "weight_packed", "weight_blocks", "weight_scale_inv", "weight_scale", "weight_scales", "scale",
    "weight_zero_point", "weight_shape", "weight_global_scale", "weight_scale_2",
    "qweight", "qzeros", "scales", "g_idx", "SCB", "weight_format",
)  # fmt: skip
#: What `quant_method` may be.
_METHODS = (
    "", "fp8", "mxfp8", "compressed-tensors", "mxfp4", "modelopt", "awq", "gptq", "auto-round", "auto_round",
    "intel/auto-round", "bitsandbytes", METHOD,
)  # fmt: skip
#: Methods whose matrices have their input axis first.
_COLUMN_METHODS = ("awq", "gptq", "auto-round", "auto_round", "intel/auto-round")
#: What `checkpoint_format` and `packing_format` call zero points that are stored less one, and as they are.
_FIRST_ZEROS = ("gptq", "auto_round:auto_gptq")
_TRUE_ZEROS = ("gptq_v2", "", "auto_round", "auto_round:gptqmodel")
#: What can stand beside codes and change their meaning: a factor for each column, and the order of columns.
_FOREIGN = ("pre_quant_scale", "weight_g_idx", "g_idx", "svdquant_lora_a", "svdquant_lora_b")
#: The same under names that need not begin with the matrix' module.
_BESIDE = ("._pre_quant_scale", ".smooth_scale")
#: Scales for activations that were measured; nothing that decodes a matrix needs them.
STATIC_SCALES = (".input_scale", ".input_global_scale")
_WORDS = frozenset((*_SUFFIXES, *_FOREIGN, *(suffix[1:] for suffix in STATIC_SCALES)))


def _is_bare(spec: Spec, is_quantized: bool) -> bool:
    """Codes that were not decoded with the others, or what is left of such a matrix."""
    if len(spec.shape) < 2:
        return False
    is_weight = spec.name.endswith((".weight", ".weight_packed", ".weight_blocks", ".qweight", ".qzeros"))
    return spec.dtype.startswith("F8") or (is_quantized and is_weight and spec.dtype in (*_CODES, "I32"))


def _format_of(
    parts: Mapping[str, StoredTensor], quantization: Mapping[str, Any], schemes: Sequence[Mapping[str, Any]]
) -> tuple[Shape, Decoder] | str:
    """Shape and format of a quantized matrix, or why it cannot be read."""
    specs = {suffix: tensor.spec for suffix, tensor in parts.items()}
    size = quantization.get("weight_block_size")
    inverse = specs.get("weight_scale_inv")
    known = [None, [_BLOCK, _BLOCK], *([[1, MxFp8.group]] if inverse and inverse.dtype in _EXPONENTS else [])]
    if inverse and size not in known:
        return f"its blocks are {size}; [128, 128] are known, and [1, 32] with exponents for scales"
    if "qweight" in specs:
        return _column_format(specs, quantization)
    if any(scheme.get("actorder") in ("group", "dynamic") for scheme in schemes[:1]) and "weight_packed" in specs:
        return "its columns are in order of activation, which cannot be read"
    for shape, made in _candidates(specs, schemes):
        scale = specs.get("weight_scale")
        wanted = {part.suffix: part for part in made.parts(shape, scale.dtype if scale else "")}
        needed = {suffix for suffix in wanted if suffix not in ("weight_shape", "weight_format")}
        if needed <= set(specs) <= set(wanted) and all(_is_part(spec, wanted[key]) for key, spec in specs.items()):
            return shape, made
    shown = ", ".join(f"{suffix} {spec.dtype} {list(spec.shape)}" for suffix, spec in specs.items())
    return f"its tensors are of no known form: {shown}"


_CODES = ("F8_E4M3", "I8", "U8")


def _candidates(specs: Mapping[str, Spec], schemes: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Shape, Decoder]]:
    """Formats that the codes may have, with the shape of the matrix."""
    codes = next((specs[key] for key in ("weight", "weight_packed", "weight_blocks") if key in specs), None)
    scale = next((specs[key] for key in ("weight_scale_inv", "weight_scale", "scale") if key in specs), None)
    if codes is None or len(codes.shape) < 2:
        return
    if scale is not None and codes.dtype == "F8_E4M3":
        suffix = _suffix(scale, specs)
        is_exponent = scale.dtype in _EXPONENTS
        if suffix != "weight_scale" and (is_exponent or scale.dtype in FLOATS):
            yield codes.shape, FineGrainedFp8(is_exponent, scale.dtype, suffix)
        if is_exponent:
            yield codes.shape, MxFp8(suffix, scale.dtype)
        elif scale.dtype in FLOATS:
            yield codes.shape, BlockFp8()
            yield codes.shape, ChannelFp8()
            if scale.dtype == "F32" and len(scale.shape) in (1, 4):
                yield codes.shape, ModelOptFp8(len(scale.shape) == 4)
            if scale.shape in ((), (1,)):
                yield codes.shape, TensorFp8(scale.shape, suffix, scale.dtype)
    if "SCB" in specs:
        yield codes.shape, LlmInt8()
    if scale is not None and codes.dtype == "I8" and scale.dtype in FLOATS:
        yield codes.shape, ChannelInt8()
    if codes.dtype == "I32":
        yield from _packed_formats(codes, specs, schemes)
    for dialect in FP4_DIALECTS:
        if dialect.codes == (_suffix(codes, specs), codes.dtype):
            yield (codes.shape[0], 2 * prod(codes.shape[1:])), dialect


def _column_format(specs: Mapping[str, Spec], quantization: Mapping[str, Any]) -> tuple[Shape, Decoder] | str:
    """GPTQ, AWQ, and what AutoRound stores like one of them. Shapes tell bits and groups, the settings all else."""
    codes, zeros, scales, order = (specs.get(key) for key in ("qweight", "qzeros", "scales", "g_idx"))
    shown = ", ".join(f"{suffix} {spec.dtype} {list(spec.shape)}" for suffix, spec in specs.items())
    if zeros is None or scales is None or codes is None or any(len(s.shape) != 2 for s in (codes, zeros, scales)):
        return f"its tensors are of no known form: {shown}"
    method = str(quantization.get("quant_method", "")).lower()
    if method not in _COLUMN_METHODS:
        return "config.json does not say what its qweight means: write there what quantize_config.json says"
    packing = str(quantization.get("packing_format", "")).lower()
    is_awq = method == "awq" or "awq" in packing
    groups, rows = scales.shape
    bits = 32 * zeros.shape[1] // max(1, rows)
    columns = codes.shape[0] if is_awq else codes.shape[0] * 32 // max(1, bits)
    size = quantization.get("group_size")
    group = size if isinstance(size, int) and size > 0 and -(-columns // size) == groups else columns // max(1, groups)
    version = str(quantization.get("version", "gemm")).lower()
    if bits not in (4, 8) or group < 1 or (is_awq and (version != "gemm" or bits != 4)):
        return f"{method} with {bits} bits{f' and version {version}' * is_awq} is not known: {shown}"
    # AutoRound stores zero points as they are, but where it names AutoGPTQ; AutoGPTQ's first format less one.
    said = str(quantization.get("checkpoint_format", "gptq")).lower() if method == "gptq" else packing
    if not is_awq and said not in (*_FIRST_ZEROS, *_TRUE_ZEROS):
        return f"{method} in the form {said!r} is not known"
    is_first = said in _FIRST_ZEROS
    if quantization.get("desc_act") and order is None and not is_awq:
        return "its columns are in order of activation (desc_act), and its g_idx is missing"
    made = ColumnInt(
        "awq" if is_awq else "gptq", bits, group, bool(quantization.get("sym")) and not is_awq,
        int(is_first and not is_awq), scales.dtype, order is not None, bool(quantization.get("desc_act")),
    )  # fmt: skip
    shape = (rows, columns)
    wanted = {part.suffix: part for part in made.parts(shape, "")}
    is_whole = specs.keys() == wanted.keys() and all(_is_part(spec, wanted[key]) for key, spec in specs.items())
    if scales.dtype not in FLOATS or not is_whole:
        return f"its tensors are of no known form: {shown}"
    return shape, made


def _suffix(spec: Spec, specs: Mapping[str, Spec]) -> str:
    return next(suffix for suffix, other in specs.items() if other is spec)


def _packed_formats(
    packed: Spec, specs: Mapping[str, Spec], schemes: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Shape, Decoder]]:
    scale = specs.get("weight_scale")
    if scale is None or len(scale.shape) != 2 or scale.dtype not in FLOATS:
        return
    for group in schemes:
        bits, size = group.get("num_bits"), group.get("group_size")
        if group.get("strategy") == "channel" and bits in (4, 8):
            size = packed.shape[1] * 32 // bits
        if bits not in (4, 8) or not isinstance(size, int) or size < 1 or group.get("type", "int") != "int":
            continue
        if (group.get("symmetric") is False) != ("weight_zero_point" in specs):
            continue
        made = PackedInt(bits, "weight_zero_point" not in specs, size)
        shape = (packed.shape[0], scale.shape[1] * size)
        if group.get("actorder") not in ("group", "dynamic") and made.refusal(shape, scale.dtype) is None:
            yield shape, made


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
        if stem == module and f".{suffix}" not in STATIC_SCALES:
            parts[suffix] = StoredTensor(spec, 0, 0)
    if not any(suffix in parts for suffix in ("weight_scale", "weight_scale_inv", "weight_scales", "scale")):
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
    named = [
        (not any(isinstance(target, str) and is_target(target, module) for target in targets), weights)
        for targets, weights in groups
    ]
    return [weights for _, weights in sorted(named, key=lambda item: item[0])]


def is_readable(config: Mapping[str, Any]) -> bool:
    """Whether matrices are quantized in a way that is known here, as far as config.json tells."""
    return str(quantization_config(config).get("quant_method", "")).lower() in _METHODS


def arguments_of(quantization: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """What compressed-tensors says of the weights of a module; empty where it says nothing."""
    schemes = _schemes(_groups(quantization), module)
    return schemes[0] if schemes else {}


def weight_bits(config: Mapping[str, Any]) -> set[int]:
    """The numbers of bits that config.json gives for weights of compressed-tensors."""
    return {
        bits for _, weights in _groups(quantization_config(config)) if isinstance(bits := weights.get("num_bits"), int)
    }


def is_symmetric(config: Mapping[str, Any]) -> bool:
    """Whether config.json says of some weights of compressed-tensors that they have no zero points, or says nothing."""
    groups = _groups(quantization_config(config))
    return not groups or any(weights.get("symmetric") is not False for _, weights in groups)
