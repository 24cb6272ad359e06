"""Bytes as moeconv.json of a folder that is verified, unpacked and quantized by what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from moeconv.checkpoint import MANIFEST, open_checkpoint
from moeconv.errors import MoeconvError
from moeconv.header import build_header
from moeconv.inspect import inspect_json, inspect_text
from moeconv.manifest import build_manifest, kept_blocks, manifest_bytes
from moeconv.origin import origin_of
from moeconv.plan import Options, plan
from moeconv.selection import select_recipe
from moeconv.tensors import Spec
from moeconv.verify import Request, verify_folder
from tests.folders import CONFIG
from tests.fuzz.memory import ROOT, MemoryFiles, assert_worded

MAX_LEN = 8192


@cache
def _contents() -> dict[str, bytes]:
    specs = [Spec("model.embed_tokens.weight", "BF16", (7, 10))]
    for part, shape in (("gate", (6, 10)), ("up", (6, 10)), ("down", (10, 6))):
        specs += [Spec(f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight", "BF16", shape) for expert in range(4)]
    weights = build_header(specs, {})[0] + bytes(sum(spec.nbytes for spec in specs))
    return {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": weights}


def seeds() -> Iterator[bytes]:
    files = MemoryFiles(_contents())
    source = open_checkpoint(ROOT, files)
    wanted = plan(source, select_recipe(source), "packed", Options())
    made = json.loads(manifest_bytes(build_manifest(wanted, origin_of(wanted, files), ["pack"]), wanted))
    made["recipe"]["text"] = "\n".join(line for line in made["recipe"]["text"].split("\n") if len(line) < 200)
    scheme: dict[str, Any] = {
        "format": "fp8_dynamic", "options": {}, "rules": "", "ignore": ["lm_head"], "only": [], "dtype": None,
        "allow_nonfinite": False,
    }  # fmt: skip
    for more in (
        {"layout": "experts"},
        {"scheme": scheme, "layout": "experts"},
        {"scheme": {**scheme, "format": "w4a16", "options": {"group_size": 32, "search": "mse"}}},
        {"scheme": {"dequantize": None}, "include": ["a"], "kept": ["b"], "history": [{"include": ["c"]}]},
    ):
        yield json.dumps({**made, "renamed": [], **more}).encode()


def one_input(data: bytes) -> None:
    """A manifest is believed, or refused with a MoeconvError, whatever it claims."""
    files = MemoryFiles({**_contents(), MANIFEST: data})
    try:
        made = open_checkpoint(ROOT, files)
        kept_blocks(made.manifest, "packed")
        recipe = select_recipe(made)
        inspect_text(inspect_json(made, recipe))
        verify_folder(made, Request(), files)
        verify_folder(made, Request(ROOT, jobs=1), files)
    except MoeconvError as error:
        assert_worded(error)
