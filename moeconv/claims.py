"""What config.json and moeconv.json claim of a folder, held against its tensors, from headers alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moeconv.checkpoint import CONFIG, MANIFEST, Checkpoint
from moeconv.encoded import SETTINGS, arguments_of, quantization_config
from moeconv.errors import Problem
from moeconv.formats import METHOD, Decoder, Format
from moeconv.layouts import config_sizes
from moeconv.names import collapse, gaps, holes, ranges
from moeconv.recipe import Recipe
from moeconv.units import Unit

_WRONG_CONFIG = "Take the config.json that belongs to these weights: engines go by it."
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
#: Words of keys that count layers which predict further tokens, beyond those of the model.
_MORE_LAYERS = re.compile(r"mtp|nextn|next_n|predict")
#: Parts of a model that have layers of their own, which config.json counts under many names.
_OTHER_TOWERS = re.compile(r"vis|image|audio|speech|tower|encoder|blocks")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight")
_HEADS = ("lm_head.weight", "output.weight", "head.weight", "embed_out.weight")
_FP8 = ("fp8", "modelopt", "compressed-tensors", "fbgemm_fp8", "mxfp8")
_INT_SUFFIXES = ("awq", "gptq", "auto-round", "auto_round", "intel/auto-round")
#: What config.json may call the method of matrices in a format; of all others its own.
_METHODS = {
    "fp8_tensor": _FP8, "mxfp8a16": _FP8, "modelopt_fp8": ("modelopt",), "modelopt_mxfp4": ("modelopt",),
    "fp4_e8m0": ("fp8", "mxfp4"), "awq": _INT_SUFFIXES, "gptq": _INT_SUFFIXES,
    "nf4": ("bitsandbytes", METHOD), "fp4": ("bitsandbytes", METHOD),
}  # fmt: skip


def check_layers(folder: Checkpoint, recipe: Recipe, units: Sequence[Unit]) -> Iterator[Problem]:
    """Every layer that config.json counts is there, and no other.

    Args:
        folder: the folder.
        recipe: of its experts, which says where in config.json to look.
        units: its experts.
    """
    stems: dict[str, str] = {}
    for unit in units:
        found = next(holes(unit.tensors()[0].spec.name), None)
        if found and not _OTHER_TOWERS.search(found[0]):
            stems.setdefault(found[0], unit.block)
    if not stems:
        return
    layers: dict[str, set[int]] = {stem: set() for stem in stems}
    for name in folder.tensors:
        for stem in stems:
            if name.startswith(stem):
                found = next(holes(name[len(stem) :]), None)
                if found and not found[0]:
                    layers[stem].add(found[1])
    counted = recipe._replace(dims={"L": _LAYERS})
    for stem, block in stems.items():
        allowed = config_sizes(folder, counted, block).get("L", frozenset())
        if not allowed or stem.startswith("mtp") or ".mtp." in stem:
            continue
        there = layers[stem]
        wanted = min(allowed, key=lambda count: (abs(count - len(there)), count))
        missing, extra = gaps(there, 0, wanted), [layer for layer in there if layer >= wanted]
        where = f"{folder.root / CONFIG} says that there are {wanted:,} layers"
        if missing:
            yield Problem(f"{where}; {stem}{{{ranges(there)}}} are there, missing: {missing}", _WRONG_CONFIG)
        elif extra and not _has_more_layers(folder.config):
            yield Problem(f"{where}; the tensors have {stem}{{{ranges(extra)}}} beyond them", _WRONG_CONFIG)


def _has_more_layers(config: Mapping[str, Any]) -> bool:
    return any(_MORE_LAYERS.search(key) and value not in (0, None, False) for key, value in _entries(config))


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of config.json, nested ones too."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield str(key), value
            yield from _entries(value)


def check_embeddings(view: Checkpoint) -> Iterator[Problem]:
    """Rows of embeddings are what config.json counts as words, and an output layer is there where it must be."""
    words = {value for key, value in _entries(view.config) if key.endswith("vocab_size") and type(value) is int}
    for name, tensor in view.tensors.items():
        is_table = name.endswith(_EMBEDDINGS) and len(tensor.spec.shape) == 2
        if is_table and words and tensor.spec.shape[0] not in words:
            said = " or ".join(f"{count:,}" for count in sorted(words))
            yield Problem(
                f"{tensor.spec} has {tensor.spec.shape[0]:,} rows; {view.root / CONFIG} says vocab_size {said}",
                _WRONG_CONFIG,
            )
    names = view.config.get("architectures")
    ends = ("CausalLM", "ConditionalGeneration")
    has_head = isinstance(names, list) and any(str(name).endswith(ends) for name in names)
    if has_head and _is_tied(view.config) is False and not any(name.endswith(_HEADS) for name in view.tensors):
        yield Problem(
            f"{view.root / CONFIG} says that the output layer is not the embedding (tie_word_embeddings: false), "
            "and there is no lm_head.weight",
            "Restore the shard that should hold it, or config.json.",
        )


def _is_tied(config: Mapping[str, Any]) -> bool | None:
    """What config.json says, None where it says nothing."""
    for holder in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        said = holder.get("tie_word_embeddings")
        if isinstance(said, bool):
            return said
    return None


def is_tied(config: Mapping[str, Any]) -> bool:
    """The output layer is the embedding, and need not be stored."""
    return _is_tied(config) is not False


def check_quantization(folder: Checkpoint, view: Checkpoint) -> Iterator[Problem]:
    """What config.json says of quantization is what the tensors are.

    Args:
        folder: as opened.
        view: the same in full precision.
    """
    said = quantization_config(folder.config)
    kinds: dict[str, tuple[Decoder, list[str]]] = {}
    for name, tensor in view.tensors.items():
        if tensor.encoded is not None:
            made = tensor.encoded.format
            what = json.dumps(made.settings(), sort_keys=True) if isinstance(made, Format) else ""
            kinds.setdefault(made.name + what, (made, []))[1].append(name.removesuffix(".weight"))
    where = folder.root / CONFIG
    method = str(said.get("quant_method", "")).lower()
    if said and not kinds:
        yield Problem(
            f"{where} says that the model is quantized ({method or 'by an unnamed method'}), and no tensor is",
            "Remove quantization_config: it is that of another checkpoint, and engines would take numbers for codes.",
        )
    has_settings = any(file.path in SETTINGS for file in folder.sidecars)
    if kinds and not said and not has_settings:
        names = ", ".join(sorted({made.name for made, _ in kinds.values()}))
        yield Problem(
            f"{folder.root} holds matrices in {names}, and config.json has no quantization_config",
            "Restore it: engines take codes for numbers without.",
        )
    for made, modules in kinds.values() if said else ():
        wanted = _METHODS.get(made.name) or ((made.quant_method,) if isinstance(made, Format) else ())
        if wanted and method and method not in wanted:
            yield Problem(
                f"{where} says quant_method {method!r}; {collapse(modules)[0]} is {made.name}, which is "
                f"{' or '.join(map(repr, wanted))}",
                _WRONG_CONFIG,
            )
        elif isinstance(made, Format) and method == "compressed-tensors":
            yield from _check_group(made, modules, said, str(where))
        ignored = _ignored(said)
        wrong = [module for module in modules if module in ignored]
        for line in collapse(wrong):
            yield Problem(
                f"{line} is {made.name}, and {where} lists it among modules that are not quantized", _WRONG_CONFIG
            )


#: Words that end names of codes and scales.
_OF_CODES = (".weight_packed", ".weight_scale", ".weight_scale_inv", ".qweight", ".SCB", ".weight_blocks", "_scale_inv")


def check_silence(folder: Checkpoint) -> Iterator[Problem]:
    """Codes and scales are there, and nothing says what they mean."""
    found = [name for name in folder.tensors if name.endswith(_OF_CODES)]
    is_silent = not quantization_config(folder.config) and not any(file.path in SETTINGS for file in folder.sidecars)
    if found and is_silent:
        yield Problem(
            f"{folder.root} holds quantized matrices, {collapse(found)[0]}, and config.json has no quantization_config",
            "Restore it: engines take codes for numbers without.",
        )


def _check_group(made: Format, modules: Sequence[str], said: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """The group of config.json that names a module says of its weights what its tensors are."""
    wanted = made.settings().get("weights", {})
    for module in (modules[0], modules[-1]):
        own = arguments_of(said, module)
        unlike = [key for key in ("num_bits", "type") if own and key in own and own[key] != wanted.get(key)]
        if own and wanted.get("strategy") == "group" == own.get("strategy") and "group_size" in own:
            unlike += ["group_size"] * (own["group_size"] != wanted.get("group_size"))
        if unlike:
            theirs = ", ".join(f"{key} {own[key]}" for key in unlike)
            ours = ", ".join(f"{key} {wanted.get(key)}" for key in unlike)
            yield Problem(f"{where} says {theirs} of {module}, which is {made.name}: {ours}", _WRONG_CONFIG)
            return


def _ignored(said: Mapping[str, Any]) -> frozenset[str]:
    """Modules that config.json names as not quantized, as far as it names them in full."""
    lists = [said.get(key) for key in ("ignore", "modules_to_not_convert", "llm_int8_skip_modules")]
    return frozenset(str(name) for names in lists if isinstance(names, list) for name in names)


def check_manifest(folder: Checkpoint, formats: Sequence[str], *, is_known: bool) -> Iterator[Problem]:
    """moeconv.json tells of these files and tensors.

    Args:
        folder: as opened.
        formats: in which its matrices are stored, if that
        is_known: here.
    """
    manifest, where = folder.manifest, folder.root / MANIFEST
    weights = {file.path: file for file in folder.files}
    sizes = {file.path: file.nbytes for file in folder.sidecars} | {file.path: file.nbytes for file in folder.files}
    left_out = {item.path for item in folder.left_out}
    for entry in files_told(manifest):
        path, nbytes = str(entry.get("path")), entry.get("bytes")
        if path.endswith(".index.json") or path in left_out:
            continue
        if path not in sizes:
            yield Problem(f"{folder.root / path} is missing; {where} names it", "Convert again.")
        elif isinstance(nbytes, int) and sizes[path] != nbytes:
            yield Problem(f"{folder.root / path} has {sizes[path]:,} bytes; {where} says {nbytes:,}", "Convert again.")
        elif path in weights and entry.get("header_sha256") not in (None, weights[path].header_sha256):
            yield Problem(
                f"{folder.root / path}: its header is not the one that {where} tells of",
                "Convert again: the file is of another folder, or was written over.",
            )
    scheme = manifest.get("scheme")
    said = scheme.get("format") if isinstance(scheme, Mapping) else None
    if is_known and isinstance(said, str) and said not in formats:
        yield Problem(
            f"{where} says that the folder is {said}; its matrices are {', '.join(formats) or 'not quantized'}",
            "Convert again: the weights are of another folder.",
        )


def files_told(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What moeconv.json says of the folder's own files: path, bytes, header_sha256, and sha256 where it knows it."""
    files = manifest.get("files")
    return [entry for entry in files if isinstance(entry, Mapping)] if isinstance(files, list) else []
