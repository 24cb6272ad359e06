"""Golden vectors: what llm-compressor's `model_free_ptq` makes of the checkpoints of `sources`, on a CPU.

    PYTHON_WITH_LLMCOMPRESSOR tests/golden/make_llmcompressor.py

Run with llmcompressor 0.14.0.1, compressed-tensors 0.19.0 and torch 2.13.0. Writes, beside this file,
llmcompressor.safetensors with all scales, zero points and shapes as `SOURCE/PRESET/NAME`, and llmcompressor.json with
the codes' dtypes, shapes and SHA-256, each preset's `quantization_config`, and the versions.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from llmcompressor.entrypoints.model_free import model_free_ptq

from tests.folders import Tensors, read_folder, write_file, write_folder
from tests.golden.sources import SOURCES, config_of, fingerprint, tensors_of

PRESETS = ("FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4A16", "W8A16", "W4A16_ASYM")
#: It needs whole groups, and cannot save what ends within a block of columns (0.14.0.1: non contiguous tensor).
PRESETS_OF_EDGES = ("FP8_DYNAMIC", "W8A8")
IGNORE = ("lm_head", "model.embed_tokens", r"re:.*mlp\.gate$")


def main() -> None:
    """Run every preset on every source that it can quantize."""
    golden: dict[str, Any] = {
        "versions": {name: version(name) for name in ("llmcompressor", "compressed-tensors", "torch")},
        "quantization_configs": {},
        "sources": {},
        "codes": {},
    }
    parts: Tensors = {}
    with TemporaryDirectory() as folder:
        for name, source in SOURCES.items():
            tensors = tensors_of(source)
            start = write_folder(Path(folder) / name, tensors, config_of(source), shards=0)
            golden["sources"][name] = {key: fingerprint(item) for key, item in tensors.items()}
            for preset in PRESETS_OF_EDGES if "edges" in name else PRESETS:
                made = Path(folder) / f"{name} {preset}"
                model_free_ptq(start, made, scheme=preset, ignore=IGNORE, device="cpu")
                config = json.loads((made / "config.json").read_text())["quantization_config"]
                assert config == golden["quantization_configs"].setdefault(preset, config)
                codes = golden["codes"][f"{name}/{preset}"] = {}
                for key, item in read_folder(made).items():
                    if ".weight_" in key and not key.endswith("_packed"):
                        parts[f"{name}/{preset}/{key}"] = item
                    elif item != tensors.get(key):
                        codes[key] = fingerprint(item)
    beside = Path(__file__).parent
    (beside / "llmcompressor.json").write_text(json.dumps(golden, indent=1) + "\n")
    write_file(beside / "llmcompressor.safetensors", parts)


if __name__ == "__main__":
    main()
