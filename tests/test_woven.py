"""Formats of matrices whose rows are not those of the quantized ones that they are made of, in one pass as in two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moeconv.budget import PROCESS_BYTES
from moeconv.checkpoint import open_checkpoint
from moeconv.device import CpuDevice
from moeconv.executor import execute
from moeconv.files import Files, Rows
from moeconv.plan import Options, Plan
from moeconv.quantize import plan_quantize
from moeconv.scheme import build_scheme
from moeconv.selection import select_recipe
from moeconv.steps import Transcode, Woven
from moeconv.worker import Worker
from tests.commands import refused, succeeds, tree
from tests.families import build, save_published
from tests.meter import Meter
from tests.test_device import LateDevice
from tests.test_quantize import EVERY, FAMILIES, folder_tensors

SIZES: dict[str, dict[str, Any]] = {
    "gpt_oss": {"intermediate_size": 128, "num_local_experts": 4, "head_dim": 64},
    "llama4_text": {"intermediate_size": 128, "intermediate_size_mlp": 256, "num_local_experts": 4, "head_dim": 64},
    "qwen3_moe": {**FAMILIES["qwen3_moe"], "num_experts": 3},
}
#: Formats that a packed folder of nf4 is encoded in, and one that is of a single family.
OTHERS = {
    "gpt_oss": (
        "fp8", "fp8_dynamic", "w4a16", "nvfp4a16", "mxfp4a16", "w8a8", "gptoss_mxfp4", "fp4 --experts per-expert",
    ),
    "llama4_text": ("fp8", "nvfp4a16", "gptoss_mxfp4"),
    "qwen3_moe": ("mxfp4a16", "gptoss_mxfp4"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: source_of(tmp_path_factory.mktemp(family) / "source", family, 1) for family in SIZES}


def source_of(path: Path, family: str, layers: int) -> Path:
    save_published(build(family, 1, {**EVERY, "num_hidden_layers": layers, **SIZES[family]}), path)
    return path


def folder(path: Path) -> dict[str, bytes]:
    """Weights, index, config.json: all but the manifest."""
    return {name: content for name, content in tree(path).items() if name != "moeconv.json"}


def one_and_two(source: Path, folders: Path, *options: str) -> Path:
    """Quantize what is quantized, in one pass and by way of full precision: the same files.

    Returns:
        The one made in one pass.
    """
    if not (folders / "plain").exists():
        succeeds("dequantize", source, folders / "plain")
    name = "_".join(options)
    one, two = folders / f"one_{name}", folders / f"two_{name}"
    succeeds("quantize", source, one, "--format", *options)
    succeeds("quantize", folders / "plain", two, "--format", *options)
    assert folder(one) == folder(two), options
    return one


@pytest.mark.parametrize(
    ("family", "first", "tile"),
    [
        ("gpt_oss", "gptoss_mxfp4", 1 << 20),
        ("gpt_oss", "gptoss_mxfp4", 1 << 13),
        ("llama4_text", "fp8", 1 << 20),
        ("llama4_text", "w4a16_asym", 1 << 13),
        ("llama4_text", "nvfp4a16", 1 << 13),
        ("llama4_text", "fp4 --double-quant --experts per-expert", 1 << 13),
    ],
)
def test_packed_across_as_from_full_precision(
    sources: dict[str, Path], tmp_path: Path, family: str, first: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the tiles, of which 8 make a strip."""
    monkeypatch.setattr("moeconv.budget.CPU_TILE_ELEMENTS", (tile,))
    succeeds("quantize", sources[family], tmp_path / "first", "--format", *first.split())
    options = ("fp4", "--double-quant") if tile < 1 << 20 else ("nf4",)
    made = one_and_two(tmp_path / "first", tmp_path, *options)
    succeeds("verify", made, "--against", tmp_path / "first")


@pytest.mark.parametrize("family", SIZES)
def test_packed_nf4_in_every_other_format(sources: dict[str, Path], tmp_path: Path, family: str) -> None:
    succeeds("quantize", sources[family], tmp_path / "first", "--format", "nf4")
    for name in OTHERS[family]:
        if name == "gptoss_mxfp4" and family != "gpt_oss":
            message = refused("quantize", tmp_path / "first", tmp_path / "no", "--format", name, within=tmp_path)
            assert "gptoss_mxfp4 is how experts of recipe gpt_oss are stored" in message
        else:
            one_and_two(tmp_path / "first", tmp_path, *name.split())


def test_biases_of_an_expert_come_from_that_expert(sources: dict[str, Path], tmp_path: Path) -> None:
    """They share a tensor with those of others, in the source and in what is made."""
    succeeds("quantize", sources["gpt_oss"], tmp_path / "first", "--format", "gptoss_mxfp4")
    succeeds("quantize", tmp_path / "first", tmp_path / "made", "--format", "nf4")
    before, after = (folder_tensors(path) for path in (sources["gpt_oss"], tmp_path / "made"))
    biases = [name for name in before if name.endswith("_proj_bias")]
    assert len(biases) == 2
    assert all(torch.equal(before[name], after[name]) for name in biases)


def test_layers_that_are_kept_are_woven_too(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "llama4_text", 2)
    succeeds("quantize", source, tmp_path / "first", "--format", "fp8_dynamic")
    one_and_two(tmp_path / "first", tmp_path, "nf4", "--ignore", "*.layers.0.*")


def plan_of(source: Path, name: str, own: dict[str, Any] | None = None, options: Options | None = None) -> Plan:
    checkpoint, (scheme, _) = open_checkpoint(source), build_scheme(name, own or {}, None, (), (), None, False)
    return plan_quantize(checkpoint, select_recipe(checkpoint), scheme, options)


@pytest.mark.parametrize(
    ("family", "first", "then"),
    [("gpt_oss", "gptoss_mxfp4", "nf4"), ("llama4_text", "nf4", "fp8"), ("llama4_text", "fp8_block", "nf4")],
)
def test_weaving_holds_no_more_than_the_plan_says(
    sources: dict[str, Path], tmp_path: Path, family: str, first: str, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeconv.budget.CPU_TILE_ELEMENTS", (1 << 12,))
    monkeypatch.setattr("moeconv.device._REUSED_NBYTES", 1)  # given back before anything is read
    succeeds("quantize", sources[family], tmp_path / "first", "--format", first)
    plan = plan_of(tmp_path / "first", then)
    steps = [step for task in plan.tasks for step in task.steps if isinstance(step, Transcode)]
    woven = [step for step in steps if isinstance(step.matrix.source, Woven)]
    assert woven
    assert plan.memory.strip
    sources_of_plan = [plan.source.root / file.path for file in plan.source.files]
    first_worker, worker = (Worker(Files(), sources_of_plan, plan.memory, CpuDevice()) for _ in range(2))

    def drop(file: int, offset: int, content: memoryview, rows: Rows | None) -> None:
        pass

    first_worker.run(woven[0], drop)  # tables are made once
    first_worker.finish(drop)
    with Meter() as used:
        for step in woven:
            worker.run(step, drop)
        worker.finish(drop)
    assert 0 < used.peak <= plan.memory.scratch - PROCESS_BYTES


def test_a_late_device_writes_what_the_cpu_writes(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No staging buffer is filled again, for a strip or a tile, before the job that reads it is done."""
    monkeypatch.setattr("moeconv.budget.GPU_TILE_ELEMENTS", (1 << 13,))
    succeeds("quantize", sources["gpt_oss"], tmp_path / "first", "--format", "gptoss_mxfp4")
    succeeds("quantize", tmp_path / "first", tmp_path / "wanted", "--format", "nf4", "--double-quant")
    device = LateDevice(2)
    options = Options(devices=("late",), max_vram=4_000_000, jobs=2)
    made = plan_of(tmp_path / "first", "nf4", {"double_quant": True}, options)
    execute(made, tmp_path / "made", ["test"], devices=[device])
    assert folder(tmp_path / "made") == folder(tmp_path / "wanted")
    assert max(lane.live_nbytes for lane in device.lanes) * len(device.lanes) <= made.memory.device_bytes


def test_the_plan_counts_a_strip_and_no_more_than_a_matrix(sources: dict[str, Path], tmp_path: Path) -> None:
    succeeds("quantize", sources["gpt_oss"], tmp_path / "first", "--format", "gptoss_mxfp4")
    assert plan_of(tmp_path / "first", "nf4").memory.strip == 256 * 256 * 2  # gate and up of one expert
    options = ("--format", "nf4", "--max-memory", "10MB")
    message = refused("quantize", tmp_path / "first", tmp_path / "no", *options, within=tmp_path, code=2)
    assert "The least that works is" in message
    report = json.loads(succeeds("plan", "quantize", tmp_path / "first", "--format", "nf4", "--json").out)
    assert report["memory"]["scratch_bytes"] > 256 * 256 * 2
