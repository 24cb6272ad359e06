"""No folder that is right is called wrong: every format, from full precision and from other formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moeconv.formats import FORMATS
from tests.commands import succeeds
from tests.families import build, save_published
from tests.folders import write_folder
from tests.weights import config_of, weights

SIZE = 128
OPTIONS = {"int8": ["--experts", "keep"]}
SEARCHED = [(name, search) for name in ("w4a16", "nvfp4a16") for search in FORMATS[name][1]["search"][1:]]  # type: ignore[index]
Verified = Callable[[Path, Path], None]


@pytest.fixture(scope="module", params=["gaussian", "student"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    config = config_of(SIZE, num_hidden_layers=1, num_experts=2)
    return write_folder(root / "source", weights(SIZE, request.param, 5, layers=1, experts=2), config, 2)


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With outliers alone, where that is enough."""
    config = config_of(SIZE, num_hidden_layers=1, num_experts=2)
    folder = tmp_path_factory.mktemp("heavy") / "source"
    return write_folder(folder, weights(SIZE, "student", 5, layers=1, experts=2), config, 2)


def right(made: Path, source: Path, by: str = "values") -> None:
    succeeds("verify", made, "--against", source)
    (made / "moeconv.json").unlink()  # as if another tool had made it
    succeeds("verify", made)
    report = json.loads(succeeds("verify", made, "--against", source, "--json").out)
    assert report["compared_by"] == by
    assert not [item for item in report["formats"] if item["worst"]["relative_error"] > 0.75 * item["worst"]["limit"]]


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_is_right(source: Path, tmp_path: Path, name: str) -> None:
    succeeds("quantize", source, tmp_path / "made", "--format", name, *OPTIONS.get(name, []), "--no-fsync")
    right(tmp_path / "made", source)


@pytest.mark.parametrize(("name", "search"), SEARCHED)
def test_searched_scales_are_right(heavy: Path, tmp_path: Path, name: str, search: str) -> None:
    succeeds("quantize", heavy, tmp_path / "made", "--format", name, "--scale", search, "--no-fsync")
    right(tmp_path / "made", heavy)


@pytest.mark.parametrize("options", [["nf4", "--double-quant"], ["nf4", "--experts", "per-expert"], ["fp8", "--ue8m0"]])
def test_options_are_right(heavy: Path, tmp_path: Path, options: list[str]) -> None:
    succeeds("quantize", heavy, tmp_path / "made", "--format", *options, "--no-fsync")
    right(tmp_path / "made", heavy)


@pytest.mark.parametrize(("first", "then"), [("fp8", "w4a16"), ("mxfp4a16", "fp8_dynamic"), ("nvfp4a16", "nf4")])
def test_what_is_quantized_again_is_right(heavy: Path, tmp_path: Path, first: str, then: str) -> None:
    succeeds("quantize", heavy, tmp_path / "first", "--format", first, "--no-fsync")
    succeeds("quantize", tmp_path / "first", tmp_path / "made", "--format", then, "--no-fsync")
    right(tmp_path / "made", tmp_path / "first")


@pytest.mark.parametrize("name", ["fp8", "nvfp4a16", "nf4"])
def test_what_is_decoded_is_right(heavy: Path, tmp_path: Path, name: str) -> None:
    succeeds("quantize", heavy, tmp_path / "first", "--format", name, "--no-fsync")
    succeeds("dequantize", tmp_path / "first", tmp_path / "made", "--no-fsync")
    right(tmp_path / "made", tmp_path / "first")


FAMILY_SIZES = {
    "hidden_size": SIZE, "moe_intermediate_size": SIZE, "intermediate_size": SIZE, "intermediate_size_mlp": SIZE,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("gpt_oss", "gptoss_mxfp4"), ("gpt_oss", "nf4"), ("llama4_text", "nf4"), ("qwen3_vl_moe", "w4a16")],
)  # fmt: skip
def test_layouts_with_exchanged_axes_are_right(tmp_path: Path, model_type: str, name: str) -> None:
    save_published(build(model_type, seed=1, sizes=FAMILY_SIZES), tmp_path / "source")
    succeeds("quantize", tmp_path / "source", tmp_path / "made", "--format", name, "--ignore", "*.self_attn.*")
    right(tmp_path / "made", tmp_path / "source")


@pytest.mark.parametrize("model_type", ["dots3_note", "gemma4", "longcat_flash"])
def test_what_is_peculiar_to_a_family_is_right(tmp_path: Path, model_type: str) -> None:
    """Towers that count layers of their own, bounds that are infinite, room for experts that compute nothing."""
    save_published(build(model_type, seed=1), tmp_path / "source")
    succeeds("verify", tmp_path / "source")
    succeeds("pack", tmp_path / "source", tmp_path / "packed")
    right(tmp_path / "packed", tmp_path / "source", "bytes")
