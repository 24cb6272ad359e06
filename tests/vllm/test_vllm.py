"""vLLM reads each layout as recipes/engines.yaml says: "yes" is the same tokens, with the same log-probabilities.

Equal to the last bit, because the same weights go through the same kernels in the same order. A checkpoint that loads
and generates anything else is a "no", as is one that does not load.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from moeconv.engines import entries
from moeconv.recipe_file import shipped_folder

vllm = pytest.importorskip("vllm")

from tests.folders import read_folder
from tests.vllm import models
from tests.vllm.server import Answer, Ask, asking

TABLE = [entry for entry in entries() if entry.engine == "vllm" and entry.layout]
CLAIMS = sorted((model_type, entry.layout, entry.reads) for entry in TABLE for model_type in entry.model_types)
MODEL_TYPES = sorted({model_type for model_type, _, _ in CLAIMS})


@pytest.fixture(scope="session")
def generate() -> Iterator[Ask]:
    """What vLLM generates from a folder: `tokens` and `logprobs` of each prompt, or `error`."""
    with asking("tests.vllm.generate") as ask:
        yield ask


@pytest.fixture(scope="session")
def source(generate: Ask, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Answer]]:
    """A family's tiny checkpoint as transformers saves it, and what vLLM generates from it."""

    @cache
    def built(model_type: str) -> tuple[Path, Answer]:
        if model_type not in models.SETTINGS:
            pytest.fail(f"engines.yaml lists {model_type} for vllm; add its settings to tests/vllm/models.py")
        if model_type in models.WITH_PICTURES:
            pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
        folder = tmp_path_factory.mktemp(model_type) / "source"
        models.build(model_type, folder)
        return folder, generate(folder)

    return built


def moeconv(*arguments: str | Path) -> None:
    done = subprocess.run([sys.executable, "-m", "moeconv", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def convert(folder: Path, layout: str, into: Path) -> Path:
    """`folder` in a layout. All but the packed one are made from the packed one: no conversion is a mere copy."""
    packed = into / "packed"
    if not packed.exists():
        moeconv("pack", folder, packed)
    if layout == "experts":
        moeconv("unpack", packed, into / layout)
    elif layout != "packed":
        moeconv("convert", packed, into / layout, "--to", layout)
    return into / layout


def test_the_table_is_for_the_vllm_that_is_installed() -> None:
    table = yaml.safe_load((shipped_folder() / "engines.yaml").read_text(encoding="utf-8"))
    assert vllm.__version__.startswith(f"{table['engines']['vllm']}.")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_the_source_generates_depends_on_which_expert_is_which(
    model_type: str, source: Callable[[str], tuple[Path, Answer]], generate: Ask, tmp_path: Path
) -> None:
    _, expected = source(model_type)
    assert "error" not in expected, expected["error"]
    assert all(math.isfinite(value) for prompt in expected["logprobs"] for value in prompt)
    models.build(model_type, tmp_path / "exchanged", exchanged=True)
    assert generate(tmp_path / "exchanged")["logprobs"] != expected["logprobs"]


@pytest.mark.parametrize(("model_type", "layout", "reads"), CLAIMS)
def test_vllm_reads_a_layout_as_the_table_says(
    model_type: str,
    layout: str,
    reads: str,
    source: Callable[[str], tuple[Path, Answer]],
    generate: Ask,
    tmp_path: Path,
) -> None:
    folder, expected = source(model_type)
    assert "error" not in expected, expected["error"]
    converted = convert(folder, layout, tmp_path)
    is_source = read_folder(converted) == read_folder(folder)  # the same tensors need no second load
    answer = expected if is_source else generate(converted)
    assert ("yes" if answer == expected else "no") == reads, answer.get("error", "it loads")
