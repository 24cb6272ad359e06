"""The way of a tile through a device: order, bounds and freeing, with lanes that compute as late as they may.

What runs here is what runs on a GPU, but for the lane. GPU tests carry the marker `gpu`.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor

from moeconv.checkpoint import open_checkpoint
from moeconv.device import Compute, Device, Lane, find_devices
from moeconv.errors import CheckpointError, UsageError
from moeconv.executor import execute
from moeconv.formats import FORMATS, strips
from moeconv.plan import Options, Plan
from moeconv.quantize import plan_dequantize, plan_quantize
from moeconv.scheme import build_scheme
from moeconv.selection import select_recipe
from tests.commands import run, succeeds, tree
from tests.folders import CONFIG, read_folder, tensor, write_folder
from tests.meter import Meter

EXPERTS, HIDDEN, INNER = 3, 512, 640


class LateJob:
    """Computes when it is waited for: whatever came into its staging buffer since then shows in the result."""

    def __init__(self, lane: LateLane, inputs: Sequence[Tensor], compute: Compute) -> None:
        self.lane, self.inputs, self.compute = lane, inputs, compute

    def wait(self) -> Sequence[Tensor]:
        assert self.lane.under_way[0] is self, "jobs are waited for in their order"
        with Meter() as meter:
            on_device = [item.clone() for item in self.inputs]
            results = self.compute(on_device)
        self.lane.live_nbytes = max(self.lane.live_nbytes, meter.peak)
        self.lane.copied_nbytes += sum(item.nbytes for item in (*on_device, *results))
        self.lane.under_way.pop(0)
        # The oldest results are gone once `depth` younger ones exist.
        self.lane.results.append(results)
        for old in self.lane.results[: -self.lane.depth]:
            for item in old:
                item.zero_()
        return results


class LateLane(Lane):
    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.thread = threading.get_ident()
        self.buffers: list[Tensor] = []
        self.under_way: list[LateJob] = []
        self.results: list[Sequence[Tensor]] = []
        self.jobs = self.most = self.live_nbytes = self.copied_nbytes = 0

    def staging(self, nbytes: int) -> Tensor:
        self.buffers.append(torch.zeros(nbytes, dtype=torch.uint8))
        return self.buffers[-1]

    def submit(self, inputs: Sequence[Tensor], compute: Compute) -> LateJob:
        assert threading.get_ident() == self.thread
        used = {item.untyped_storage().data_ptr() for item in inputs}
        assert used <= {buffer.untyped_storage().data_ptr() for buffer in self.buffers}, "what a device reads is staged"
        busy = {item.untyped_storage().data_ptr() for job in self.under_way for item in job.inputs}
        assert not used & busy, "a staging buffer rests until its job is done"
        job = LateJob(self, inputs, compute)
        self.under_way.append(job)
        self.jobs += 1
        self.most = max(self.most, len(self.under_way))
        return job


class LateDevice(Device):
    name = "late"

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.lanes: list[LateLane] = []

    def lane(self) -> Lane:
        self.lanes.append(LateLane(self.depth))
        return self.lanes[-1]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two layers of experts of odd sizes in three files."""
    tensors = {"model.norm.weight": tensor((HIDDEN,), seed="norm"), "lm_head.weight": tensor((64, HIDDEN), seed="head")}
    for layer in range(2):
        block = f"model.layers.{layer}"
        tensors[f"{block}.mlp.gate.weight"] = tensor((EXPERTS, HIDDEN), seed=f"router {layer}")
        tensors[f"{block}.self_attn.o_proj.weight"] = bfloats((HIDDEN, HIDDEN), layer)
        for expert in range(EXPERTS):
            for name, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
                key = f"{block}.mlp.experts.{expert}.{name}_proj.weight"
                tensors[key] = bfloats(shape, len(tensors))
    config = {**CONFIG, "num_experts": EXPERTS, "hidden_size": HIDDEN, "moe_intermediate_size": INNER}
    return write_folder(tmp_path / "source", tensors, {**config, "num_hidden_layers": 2}, 3)


def bfloats(shape: tuple[int, int], seed: int) -> Any:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return tensor(shape)._replace(content=values.view(torch.uint8).numpy().tobytes())


def plan_of(source: Path, name: str, **options: Any) -> Plan:
    checkpoint = open_checkpoint(source)
    scheme, _ = build_scheme(name, {}, None, (), (), None, False)
    options = {"max_shard_nbytes": 1_000_000, **options}  # several files are several tasks
    return plan_quantize(checkpoint, select_recipe(checkpoint), scheme, Options(**options))


@pytest.fixture
def whole_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders work on whole tiles, as on a GPU."""
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", 1 << 62)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "int8"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_late_device_writes_what_the_cpu_writes(source: Path, tmp_path: Path, name: str, depth: int) -> None:
    succeeds("quantize", source, tmp_path / "wanted", "--format", name)
    device = LateDevice(depth)
    # A budget for several tiles of each matrix.
    made = plan_of(source, name, devices=("late",), max_vram=4_000_000, jobs=2)
    execute(made, tmp_path / "made", ["test"], fsync=False, devices=[device])
    assert read_folder(tmp_path / "made") == read_folder(tmp_path / "wanted")
    assert 1 <= len(device.lanes) <= 2
    for lane in device.lanes:
        assert lane.most == depth
        assert not lane.under_way
        assert [len(buffer) for buffer in lane.buffers] == [made.memory.staging] * depth
    assert sum(lane.jobs for lane in device.lanes) > 2 * (3 * EXPERTS + 1)
    back = plan_dequantize(open_checkpoint(tmp_path / "made"), made.recipe, None, Options(devices=("late",)))
    succeeds("dequantize", tmp_path / "wanted", tmp_path / "plain")
    execute(back, tmp_path / "back", ["test"], fsync=False, devices=[LateDevice(depth)])
    assert read_folder(tmp_path / "back") == read_folder(tmp_path / "plain")


@pytest.mark.parametrize("depth", [1, 3])
def test_what_is_not_finite_is_passed_on_with_all_that_is_under_way(source: Path, tmp_path: Path, depth: int) -> None:
    succeeds("quantize", source, tmp_path / "first", "--format", "w8a8")
    tensors = read_folder(tmp_path / "first")
    name = "model.layers.0.mlp.experts.1.up_proj.weight_scale"
    content = b"\xc0\x7f" + tensors[name].content[2:]  # the first row is NaN
    tensors[name] = tensors[name]._replace(content=content)
    broken = write_folder(
        tmp_path / "broken", tensors, json.loads((tmp_path / "first" / "config.json").read_text()), 2
    )  # fmt: skip
    succeeds("dequantize", broken, tmp_path / "wanted", "--dtype", "float16")
    checkpoint = open_checkpoint(broken)
    options = Options(devices=("late",), max_vram=4_000_000, max_shard_nbytes=1_000_000)
    back = plan_dequantize(checkpoint, select_recipe(checkpoint), "F16", options)
    execute(back, tmp_path / "made", ["test"], fsync=False, devices=[LateDevice(depth)])
    assert read_folder(tmp_path / "made") == read_folder(tmp_path / "wanted")


@pytest.mark.usefixtures("whole_tiles")
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "int8"])
@pytest.mark.parametrize("max_vram", [None, 8_000_000, 4_000_000])
def test_a_device_holds_no_more_than_planned(source: Path, tmp_path: Path, name: str, max_vram: int | None) -> None:
    made = plan_of(source, name, devices=("late",), max_vram=max_vram, jobs=2)
    assert max_vram is None or made.memory.device_bytes <= max_vram
    device = LateDevice(2)
    execute(made, tmp_path / "made", ["test"], fsync=False, devices=[device])
    assert 0 < sum(lane.live_nbytes for lane in device.lanes) <= made.memory.device_bytes


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "int8"])
def test_too_small_a_budget_names_the_least_that_works(source: Path, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan_of(source, name, devices=("cuda:0",), max_vram=1000)
    assert "--max-vram 1,000 is less than this conversion needs" in str(caught.value)
    least = int(re.search(r"([\d,]+) bytes", str(caught.value))[1].replace(",", ""))  # type: ignore[index]
    made = plan_of(source, name, devices=("cuda:0",), max_vram=least, jobs=4)
    assert (made.memory.jobs, made.memory.device_bytes) == (1, least)
    with pytest.raises(UsageError):
        plan_of(source, name, devices=("cuda:0",), max_vram=least - 1)
    assert plan_of(source, name, devices=("cuda:0", "cuda:1"), max_vram=least, jobs=4).memory.jobs == 2


def test_workers_take_devices_in_turn(source: Path, tmp_path: Path) -> None:
    devices = [LateDevice(2), LateDevice(2)]
    made = plan_of(source, "fp8", devices=("cuda:0", "cuda:1"), jobs=4)
    execute(made, tmp_path / "made", ["test"], fsync=False, devices=devices)
    assert all(device.lanes for device in devices)
    assert len(devices[0].lanes) + len(devices[1].lanes) <= 4


def test_after_a_failure_nothing_is_under_way(source: Path, tmp_path: Path) -> None:
    tensors = read_folder(source)
    name = "model.layers.1.mlp.experts.1.up_proj.weight"
    tensors[name] = tensors[name]._replace(content=b"\x7f\xc0" * (INNER * HIDDEN))  # 0xc07f little-endian: finite
    content = bytearray(tensors[name].content)
    content[-2:] = b"\xc0\x7f"  # NaN, in the last tile
    tensors[name] = tensors[name]._replace(content=bytes(content))
    broken = write_folder(tmp_path / "broken", tensors, json.loads((source / "config.json").read_text()), 3)
    device = LateDevice(3)
    made = plan_of(broken, "w8a8", devices=("late",), max_vram=4_000_000, jobs=2)
    with pytest.raises(CheckpointError, match=r"experts\.1\.up_proj\.weight holds NaN or infinite values in rows"):
        execute(made, tmp_path / "made", ["test"], fsync=False, devices=[device])
    assert not any(lane.under_way for lane in device.lanes)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("word", ["gpu", "cuda:", "cuda:x", "cpu,cuda", "", "cuda:0,"])
def test_a_word_that_names_no_device_is_refused(source: Path, word: str) -> None:
    before = tree(source.parent)
    result = run("quantize", source, source.parent / "made", "--format", "fp8", "--device", word)
    assert (result.code, tree(source.parent)) == (2, before)
    assert f"--device {word!r} names no device" in result.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(source: Path) -> None:
    result = run("plan", "quantize", source, "--format", "fp8", "--device", "cuda:1")
    assert result.code == 2
    assert "can use 0 GPUs" in result.err
    assert "take --device cpu" in result.err
    assert find_devices("auto") == find_devices("cpu") == ("cpu",)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "int8"])
def test_a_gpu_writes_what_the_cpu_writes(source: Path, tmp_path: Path, name: str) -> None:
    for device in ("cpu", "cuda"):
        succeeds("quantize", source, tmp_path / device, "--format", name, "--device", device)
        succeeds("dequantize", tmp_path / device, tmp_path / f"{device} back", "--device", device)
    assert read_folder(tmp_path / "cuda") == read_folder(tmp_path / "cpu")
    assert read_folder(tmp_path / "cuda back") == read_folder(tmp_path / "cpu back")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_holds_no_more_than_planned(source: Path, tmp_path: Path) -> None:
    made = plan_of(source, "w4a16", devices=("cuda:0",), max_vram=8_000_000, jobs=2)
    torch.cuda.reset_peak_memory_stats()
    execute(made, tmp_path / "made", ["test"], fsync=False)
    assert 0 < torch.cuda.max_memory_allocated() <= made.memory.device_bytes
