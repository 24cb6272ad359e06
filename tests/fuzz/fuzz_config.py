"""Bytes as config.json of a sound checkpoint that has experts, quantized matrices and others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from moeconv import recipe_file, selection
from moeconv.checkpoint import Checkpoint, open_checkpoint
from moeconv.errors import CheckpointError, MoeconvError
from moeconv.explain import Disk, plan_json, plan_text
from moeconv.header import build_header
from moeconv.inspect import inspect_json, inspect_text
from moeconv.plan import Options, plan
from moeconv.quantize import plan_dequantize, plan_quantize
from moeconv.scheme import scheme_of
from moeconv.selection import model_types, select_recipe
from moeconv.tensors import Spec
from moeconv.verify import Request, verify_folder
from tests.folders import CONFIG
from tests.fuzz.memory import ROOT, MemoryFiles, assert_worded

MAX_LEN = 2048
_SCHEME: dict[str, Any] = {
    "format": "fp8_dynamic", "options": {}, "rules": "", "ignore": [], "only": [], "dtype": None,
    "allow_nonfinite": False,
}  # fmt: skip
_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
_INT4 = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {
        name: {"targets": ["Linear", "re:.*q_proj"], "weights": {"num_bits": 4, "group_size": 32, "symmetric": True}}
        for name in ("group_0", "group_1")
    },
}  # fmt: skip
_DISK = Disk(1, 2)

load_shipped, load_recipe = cache(recipe_file.load_shipped), cache(recipe_file.load_recipe)


@contextmanager
def _recipes_read_once() -> Iterator[None]:
    """Each time takes hundreds of milliseconds."""
    before = selection.load_shipped, selection.load_recipe  # type: ignore[attr-defined]
    selection.load_shipped, selection.load_recipe = load_shipped, load_recipe  # type: ignore[attr-defined]
    try:
        yield
    finally:
        selection.load_shipped, selection.load_recipe = before  # type: ignore[attr-defined]


def seeds() -> Iterator[bytes]:
    for more in ({}, {"quantization_config": _FP8}, {"quantization_config": _INT4, "torch_dtype": "bfloat16"}):
        yield json.dumps({**CONFIG, **more}).encode()
        yield json.dumps({"model_type": "x", "text_config": {**CONFIG, **more}, "architectures": None}).encode()
    yield json.dumps({**CONFIG, "num_experts": [4, "4", 4.0, 1e400], "hidden_size": None}).encode()


@cache
def _head() -> bytes:
    """Two layers in full precision, and matrices in FP8, packed in four bits, and as GPTQ has them."""
    specs = [Spec("model.embed_tokens.weight", "BF16", (7, 32)), Spec("lm_head.weight", "BF16", (7, 32))]
    for layer in range(2):
        block = f"model.layers.{layer}"
        specs += [Spec(f"{block}.mlp.gate.weight", "F32", (4, 32)), Spec(f"{block}.norm.weight", "BF16", (32,))]
        for expert in range(4):
            for part, shape in (("gate", (16, 32)), ("up", (16, 32)), ("down", (32, 16))):
                specs.append(Spec(f"{block}.mlp.experts.{expert}.{part}_proj.weight", "BF16", shape))
    attention = "model.layers.0.self_attn."
    specs += [Spec(f"{attention}q_proj.weight", "F8_E4M3", (128, 128))]
    specs += [Spec(f"{attention}q_proj.weight_scale_inv", "F32", (1, 1))]
    specs += [Spec(f"{attention}k_proj.weight_packed", "I32", (32, 4))]
    specs += [Spec(f"{attention}k_proj.weight_scale", "BF16", (32, 1))]
    specs += [Spec(f"{attention}k_proj.weight_shape", "I64", (2,))]
    return build_header(specs, {})[0] + bytes(sum(spec.nbytes for spec in specs))


@cache
def _plain_head() -> bytes:
    specs = [spec for spec in open_folder(b"{}", _head()).tensors.values() if "self_attn" not in spec.spec.name]
    return build_header([tensor.spec for tensor in specs], {})[0] + bytes(sum(t.spec.nbytes for t in specs))


def folder_of(config: bytes, weights: bytes) -> MemoryFiles:
    return MemoryFiles({"config.json": config, "model.safetensors": weights})


def open_folder(config: bytes, weights: bytes) -> Checkpoint:
    return open_checkpoint(ROOT, folder_of(config, weights))


def one_input(data: bytes) -> None:
    """Every command that looks at config.json gives a result or a MoeconvError, and results can be shown."""
    for weights in (_plain_head(), _head()):
        try:
            source = open_folder(data, weights)
        except CheckpointError:
            return
        with _recipes_read_once():
            _look(source, folder_of(data, weights))


def _look(source: Checkpoint, files: MemoryFiles) -> None:
    known = {model_type for recipe in load_shipped() for model_type in recipe.model_types}
    is_known = not known.isdisjoint(model_types(source.config))
    try:
        recipe = select_recipe(source, None if is_known else "gate_up_down")  # to try all recipes takes a second
    except MoeconvError:
        recipe = None
    report = inspect_json(source, recipe)
    json.loads(json.dumps(report))
    inspect_text(report)
    with suppress(MoeconvError):
        verify_folder(source, Request(recipe=None if is_known else "gate_up_down"))
    if recipe is None:
        return
    for make in (
        lambda: plan(source, recipe, "packed", Options()),
        lambda: plan_quantize(source, recipe, scheme_of(_SCHEME), Options()),
        lambda: plan_dequantize(source, recipe, None, Options()),
    ):
        try:
            made = make()
        except MoeconvError as error:
            assert_worded(error)
            continue
        plan_text(made, _DISK)
        json.dumps(plan_json(made, _DISK, files))
        for path, content in made.contents.items():
            assert path != "config.json" or isinstance(json.loads(content), dict)
