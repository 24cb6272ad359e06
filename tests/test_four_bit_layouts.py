"""Experts in bitsandbytes' 4 bits from layout to layout: codes and scales stay, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from moeconv.checkpoint import open_checkpoint
from moeconv.executor import execute
from moeconv.plan import Options
from moeconv.relayout import plan_layout
from moeconv.selection import select_recipe
from tests.commands import refused, succeeds, tree
from tests.faults import DyingFiles, Killed
from tests.folders import read_folder
from tests.test_bitsandbytes import source_of
from tests.test_quantize import config_of, folder_tensors, save, sources

__all__ = ["sources"]  # a fixture

EXPERTS = "model.layers.1.mlp.experts"
CONFIG = {"model_type": "qwen3_moe", "num_experts": 4, "hidden_size": 24}


def weights(folder: Path) -> dict[str, bytes]:
    """All that a reader sees: weight files, index and config.json, without the manifest."""
    return {name: content for name, content in tree(folder).items() if name != "moeconv.json"}


def stored(name: str, matrix: Tensor, kind: str = "nf4", double: bool = False) -> dict[str, Tensor]:
    """A 4-bit tensor as bitsandbytes' state dicts hold it."""
    codes, state = bnb.quantize_4bit(matrix, quant_type=kind, compress_statistics=double)
    return {name: codes, **{f"{name}.{word}": item for word, item in state.as_dict(packed=True).items()}}


@pytest.mark.parametrize(
    ("family", "options"), [("qwen3_moe", "nf4"), ("mixtral", "fp4"), ("mixtral", "nf4 --double-quant")]
)
def test_unpacked_and_packed_again_is_the_same_folder(
    sources: dict[str, Path], tmp_path: Path, family: str, options: str
) -> None:
    packed, one, again, same = (tmp_path / name for name in ("packed", "one", "again", "same"))
    succeeds("quantize", sources[family], packed, "--format", *options.split())
    succeeds("unpack", packed, one)
    succeeds("pack", one, again)
    assert weights(again) == weights(packed)
    assert "already up to date" in succeeds("unpack", packed, one).out
    succeeds("verify", one, "--against", packed)
    succeeds("verify", again, "--against", one)
    succeeds("quantize", packed, same, "--format", *options.split(), "--experts", "per-expert")
    assert (one / "config.json").read_bytes() == (same / "config.json").read_bytes()
    if "double" not in options:  # with it, quantize encodes again
        assert read_folder(one) == read_folder(same)
    history = json.loads((again / "moeconv.json").read_text())["history"]
    assert [step["command"][0] for step in history] == ["quantize", "unpack"]


def test_quantized_scales_decode_to_the_same_numbers_in_either_layout(sources: dict[str, Path], tmp_path: Path) -> None:
    succeeds("quantize", sources["qwen3_moe"], tmp_path / "packed", "--format", "nf4", "--double-quant")
    succeeds("convert", tmp_path / "packed", tmp_path / "one", "--to", "hub")
    stack, found = folder_tensors(tmp_path / "packed"), folder_tensors(tmp_path / "one")

    def decoded(tensors: dict[str, Tensor], name: str) -> Tensor:
        words = {key.removeprefix(f"{name}."): item for key, item in tensors.items() if key.startswith(f"{name}.")}
        state = bnb.QuantState.from_dict(dict(words), torch.device("cpu"))
        return bnb.dequantize_4bit(tensors[name], state)

    gate_up, down = decoded(stack, f"{EXPERTS}.gate_up_proj"), decoded(stack, f"{EXPERTS}.down_proj")
    for expert in range(len(down)):
        halves = [decoded(found, f"{EXPERTS}.{expert}.{part}_proj.weight") for part in ("gate", "up")]
        assert torch.equal(torch.cat(halves), gate_up[expert])
        assert torch.equal(decoded(found, f"{EXPERTS}.{expert}.down_proj.weight"), down[expert])


def test_a_change_of_layout_needs_no_torch(sources: dict[str, Path], tmp_path: Path) -> None:
    succeeds("quantize", sources["mixtral"], tmp_path / "packed", "--format", "nf4", "--double-quant")
    report = json.loads(succeeds("plan", "unpack", tmp_path / "packed", "--json").out)
    assert report["peak_memory_bytes"] < 80 << 20
    groups = {(group["what"], group["why"]): group for group in report["groups"]}
    moved = groups["nf4", "-> experts by recipe mixtral, with the same codes and scales"]
    assert "model.layers.{0..1}.mlp.experts.down_proj.nested_absmax" in moved["from"]
    assert "model.layers.{0..1}.block_sparse_moe.experts.{0..3}.w2.weight.nested_absmax" in moved["to"]
    assert groups["moved", "-> experts by recipe mixtral"]["to"] == [
        "model.layers.{0..1}.block_sparse_moe.gate.weight"
    ]  # fmt: skip


def test_layers_in_full_precision_move_with_the_others(sources: dict[str, Path], tmp_path: Path) -> None:
    source, packed, one = sources["qwen3_moe"], tmp_path / "packed", tmp_path / "one"
    succeeds("quantize", source, packed, "--format", "nf4", "--ignore", "*.layers.0.mlp.experts*")
    succeeds("unpack", packed, one)
    before, found = folder_tensors(source), folder_tensors(one)
    plain = [name for name in before if ".layers.0.mlp.experts." in name]
    assert len(plain) == 36
    assert all(torch.equal(found[name], before[name]) for name in plain)
    assert found[f"{EXPERTS}.3.up_proj.weight"].dtype == torch.uint8
    assert set(config_of(one)["quantization_config"]["llm_int8_skip_modules"]) > {
        name.removesuffix(".weight") for name in plain
    }
    succeeds("verify", one, "--against", packed)
    succeeds("pack", one, tmp_path / "again")
    assert weights(tmp_path / "again") == weights(packed)


def test_what_is_in_the_layout_already_is_copied_whole(sources: dict[str, Path], tmp_path: Path) -> None:
    succeeds("quantize", sources["mixtral"], tmp_path / "packed", "--format", "nf4")
    succeeds("pack", tmp_path / "packed", tmp_path / "same")
    assert weights(tmp_path / "same") == weights(tmp_path / "packed")


def test_experts_beside_4_bit_attention_move_as_always(sources: dict[str, Path], tmp_path: Path) -> None:
    succeeds("quantize", sources["mixtral"], tmp_path / "made", "--format", "nf4", "--experts", "keep")
    succeeds("pack", tmp_path / "made", tmp_path / "packed")
    succeeds("unpack", tmp_path / "packed", tmp_path / "again")
    assert read_folder(tmp_path / "again") == read_folder(tmp_path / "made")


@pytest.mark.parametrize("number", [4, 14])
def test_a_run_that_died_goes_on(
    sources: dict[str, Path], tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeconv.tasks.TASK_BYTES", 1 << 16)
    succeeds("quantize", sources["mixtral"], tmp_path / "packed", "--format", "nf4")
    source = open_checkpoint(tmp_path / "packed")
    made = plan_layout(source, select_recipe(source), "experts", Options(jobs=1))
    with pytest.raises(Killed):
        execute(made, tmp_path / "one", ["test"], files=DyingFiles(number, {"write"}))
    assert not (tmp_path / "one").exists()
    execute(made, tmp_path / "one", ["test"])
    execute(made, tmp_path / "whole", ["test"])
    assert weights(tmp_path / "one") == weights(tmp_path / "whole")


def folder_of(folder: Path, tensors: dict[str, Tensor], **settings: str) -> Path:
    """One layer of Qwen3-MoE whose experts are as given."""
    router = {"model.layers.0.mlp.gate.weight": torch.zeros(4, 24, dtype=torch.bfloat16)}
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **settings}
    return save(folder, {**router, **tensors}, {**CONFIG, "quantization_config": said})


def one_by_one(inner: int = 32, double: bool = False, kind: str = "nf4") -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for expert in range(4):
        for part, shape in (("gate", (inner, 24)), ("up", (inner, 24)), ("down", (24, inner))):
            matrix = torch.randn(shape, generator=torch.Generator().manual_seed(expert)).to(torch.bfloat16)
            made |= stored(f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight", matrix, kind, double)
    return made


def test_a_folder_of_bitsandbytes_own_making_keeps_what_engines_are_told(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "source", one_by_one(), bnb_4bit_compute_dtype="bfloat16")
    succeeds("pack", source, tmp_path / "packed")
    settings = config_of(tmp_path / "packed")["quantization_config"]
    assert (settings["quant_method"], settings["bnb_4bit_compute_dtype"]) == ("moeconv_bnb4", "bfloat16")
    succeeds("unpack", tmp_path / "packed", tmp_path / "again")
    assert read_folder(tmp_path / "again") == read_folder(source)


DOWN = "model.layers.0.mlp.experts.2.down_proj.weight"


def without_one() -> dict[str, Tensor]:
    return {name: item for name, item in one_by_one().items() if not name.startswith(DOWN)}


def fused() -> dict[str, Tensor]:
    """Of experts of 7.5 blocks each."""
    gate_up = stored("model.layers.0.mlp.experts.gate_up_proj", torch.ones(4, 40, 24, dtype=torch.bfloat16))
    return gate_up | stored("model.layers.0.mlp.experts.down_proj", torch.ones(4, 24, 20, dtype=torch.bfloat16))


REFUSED = {
    "one in full precision": (
        lambda: {**without_one(), DOWN: torch.zeros(24, 32, dtype=torch.bfloat16)},
        f"several formats: model.layers.0.mlp.experts.0.down_proj.weight is nf4, {DOWN} is not",
        "`moeconv quantize --format nf4 --experts packed`",
    ),
    "one of another kind": (
        lambda: {**without_one(), **stored(DOWN, torch.ones(24, 32, dtype=torch.bfloat16), "fp4")},
        f"several formats: model.layers.0.mlp.experts.0.down_proj.weight is nf4, {DOWN} is not",
        "`moeconv quantize --format nf4 --experts packed`",
    ),
    "means that differ": (
        lambda: one_by_one(double=True),
        "scales of model.layers.0.mlp.experts.0.gate_proj.weight and model.layers.0.mlp.experts.1.gate_proj.weight",
        "`moeconv quantize --format nf4 --double-quant --experts packed`",
    ),
    "blocks in two experts": (
        fused,
        "a block of 64 values would lie partly in one matrix of [20, 24], partly in the next",
        "dequantize it first",
    ),
    "a part of the wrong size": (
        lambda: {**one_by_one(), f"{DOWN}.absmax": torch.zeros(7)},
        f"{DOWN}.absmax F32 [7] should be F32 [12]",
        "full precision",
    ),
    "another table": (
        lambda: {**one_by_one(double=True), f"{DOWN}.nested_quant_map": torch.zeros(256)},
        f"{DOWN}: its nested_quant_map is not that of bitsandbytes",
        "full precision",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_room_in_a_layout_is_refused_by_name(tmp_path: Path, case: str) -> None:
    make, says, remedy = REFUSED[case]
    tensors = make()
    command = "unpack" if "model.layers.0.mlp.experts.down_proj" in tensors else "pack"
    message = refused(command, folder_of(tmp_path / "source", tensors), tmp_path / "no", within=tmp_path)
    assert says in message
    assert remedy in message


def test_one_config_names_one_form(tmp_path: Path) -> None:
    attention = stored("model.layers.0.self_attn.q_proj.weight", torch.ones(24, 32, dtype=torch.bfloat16), "fp4")
    source = folder_of(tmp_path / "source", {**one_by_one(), **attention})
    assert "in several forms of 4 bits" in refused("pack", source, tmp_path / "no", within=tmp_path)


def test_experts_that_lie_across_are_refused_with_the_command_that_encodes_them(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "gpt_oss", intermediate_size=64, num_local_experts=4, head_dim=64)
    succeeds("quantize", source, tmp_path / "packed", "--format", "nf4")
    message = refused("unpack", tmp_path / "packed", tmp_path / "no", within=tmp_path)
    assert "4-bit matrices whose rows are not its rows" in message
    assert "`moeconv quantize --format nf4 --experts per-expert` decodes and encodes again" in message
