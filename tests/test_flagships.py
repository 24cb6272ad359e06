"""Plans of the largest models, from headers alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import succeeds
from tests.flagships import FLAGSHIPS, write


@pytest.fixture(scope="module")
def flagship(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("flagships")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write(folder, name)
        return made[name]

    return get


#: Tensors of experts that are stored for each layer with experts once they are packed, and layers with experts.
PACKED = {
    "deepseek-v3-fp8": (4, 59), "kimi-k2-int4": (6, 60), "qwen3-235b": (2, 94), "glm-5": (2, 76),
    "gpt-oss-120b": (6, 36), "llama4-maverick": (2, 24), "qwen3.5-397b": (2, 60), "minimax-m2": (4, 62),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGSHIPS)
def test_packing_is_planned_to_the_byte(flagship: Callable[[str], Path], name: str) -> None:
    report = json.loads(succeeds("plan", "pack", flagship(name), "--json").out)
    stored = sum(path.stat().st_size for path in flagship(name).glob("*.safetensors"))
    assert report["bytes_in"] == report["bytes_out"]
    assert 0.99 * stored < report["bytes_in"] < stored
    groups = [group for group in report["groups"] if group["what"] != "copied"]
    expected = PACKED[name][0] * PACKED[name][1]
    routers = sum("gate.weight" in name or "e_score" in name for group in groups for name in group["to"])
    assert sum(group["tensors_out"] for group in groups) - routers * PACKED[name][1] == expected
    assert report["peak_memory_bytes"] < 1e9


@pytest.mark.parametrize("name", ["gpt-oss-120b", "llama4-maverick", "qwen3-235b", "qwen3.5-397b"])
def test_unpacking_is_planned_to_the_byte(flagship: Callable[[str], Path], name: str) -> None:
    report = json.loads(succeeds("plan", "unpack", flagship(name), "--json").out)
    assert report["bytes_in"] == report["bytes_out"]
    whats = {group["what"] for group in report["groups"]}
    assert whats == ({"kept", "copied"} if name == "qwen3-235b" else {"split", "copied"})


@pytest.mark.parametrize("name", ["deepseek-v3-fp8", "gpt-oss-120b"])
def test_dequantizing_is_planned_to_the_byte(flagship: Callable[[str], Path], name: str) -> None:
    report = json.loads(succeeds("plan", "dequantize", flagship(name), "--json").out)
    stored = sum(path.stat().st_size for path in flagship(name).glob("*.safetensors"))
    assert 0.99 * stored < report["bytes_in"] < stored
    assert report["bytes_out"] == pytest.approx(2 * PARAMETERS[name], rel=0.005)
    assert sum(file["bytes"] for file in report["files"]) == pytest.approx(report["bytes_out"], rel=0.001)


@pytest.mark.parametrize("name", ["gpt-oss-120b", "llama4-maverick"])
def test_quantizing_is_planned_to_the_byte(flagship: Callable[[str], Path], name: str) -> None:
    report = json.loads(succeeds("plan", "quantize", flagship(name), "--format", "fp8_dynamic", "--json").out)
    assert report["unquantized_share"] < 0.06
    kept = report["unquantized_share"] * 2 * PARAMETERS[name]
    assert report["bytes_out"] == pytest.approx(PARAMETERS[name] + kept / 2, rel=0.01)


#: Parameters of the whole model, layers that predict further tokens included.
PARAMETERS = {"deepseek-v3-fp8": 684.5e9, "gpt-oss-120b": 116.8e9, "llama4-maverick": 400.7e9}
