"""`gptoss_mxfp4`: OpenAI's rule, in the tensors of gpt-oss, as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from moeconv.formats import FLOATS, make_format
from tests.commands import refused, succeeds
from tests.golden.sources import MATRICES, matrix_of
from tests.test_formats import assert_same, gaussian
from tests.test_microscaling import BORDERS, NUMBERS
from tests.test_quantize import config_of, folder_tensors

GOLDEN = load_file(Path(__file__).parent / "golden" / "openai.safetensors")
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "intermediate_size": 96, "num_local_experts": 3, "num_experts_per_tok": 2,
    "head_dim": 16,
}  # fmt: skip
BLOCK = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model("gpt_oss", **SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path_factory.mktemp("gpt_oss") / "source"
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_codes_and_scales_are_those_of_openai(kind: str, dtype: str) -> None:
    matrix = matrix_of(kind, dtype)
    codes, scales = make_format("gptoss_mxfp4", {}).encode(matrix)
    assert_same(codes, GOLDEN[f"{dtype}/{kind}/weight_blocks"], f"{kind} codes")
    assert_same(scales, GOLDEN[f"{dtype}/{kind}/weight_scales"], f"{kind} scales")


def test_ties_are_rounded_away_from_zero_and_zero_keeps_its_sign() -> None:
    near = torch.cat([BORDERS, BORDERS.nextafter(torch.tensor(0.0)), torch.tensor([0.0, -0.0, -1e-30, 6.0])])
    matrix = torch.zeros(2 * len(near), 32)
    matrix[:, 0], matrix[:, 1] = 6.0, torch.cat([near, -near])
    codes, scales = make_format("gptoss_mxfp4", {}).encode(matrix)
    assert (scales == 127).all()
    expected = (matrix[:, 1].abs()[:, None] >= BORDERS).sum(1) + 8 * matrix[:, 1].signbit()
    assert torch.equal((codes[:, 0, 0] >> 4).long(), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_shows_in_its_scale(value: float) -> None:
    matrix = gaussian((3, 96), 1)
    matrix[1, 40] = value
    _, scales = make_format("gptoss_mxfp4", {}).encode(matrix)
    assert (scales == 255).nonzero().tolist() == [[1, 1]]


def by_table(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[experts, rows, K] from codes and scales."""
    numbers = torch.cat([NUMBERS, -NUMBERS])
    values = numbers[torch.stack((blocks & 15, blocks >> 4), -1).long()].flatten(-2)
    return (values * 2.0 ** (scales[..., None].float() - 127)).flatten(-2)


def encoded(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix [rows, K] as it is decoded again."""
    blocks, scales = make_format("gptoss_mxfp4", {}).encode(matrix)
    return by_table(blocks, scales)


@pytest.mark.parametrize("tile", [1 << 20, 1 << 10])
@pytest.mark.parametrize("is_unpacked", [False, True])
def test_experts_are_where_gpt_oss_has_them(
    source: Path, tmp_path: Path, tile: int, is_unpacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeconv.budget.CPU_TILE_ELEMENTS", (tile,))
    monkeypatch.setattr("moeconv.tasks.TASK_BYTES", tile)
    given = source
    if is_unpacked:
        given = tmp_path / "unpacked"
        succeeds("unpack", source, given)
    made = tmp_path / "made"
    succeeds("quantize", given, made, "--format", "gptoss_mxfp4", "--max-shard-size", "60kB")
    before, after = folder_tensors(source), folder_tensors(made)
    packed = {f"{BLOCK}.{part}_proj" for part in ("gate_up", "down")}
    assert {name for name in before if name not in after} == {
        name.replace("1", layer) for name in packed for layer in "01"
    }
    assert all(torch.equal(after[name], item) for name, item in before.items() if name in after)
    for part in ("gate_up", "down"):
        found = by_table(after[f"{BLOCK}.{part}_proj_blocks"], after[f"{BLOCK}.{part}_proj_scales"])
        for expert, matrix in enumerate(before[f"{BLOCK}.{part}_proj"]):
            assert torch.equal(found[expert], encoded(matrix.T.contiguous())), f"{part} {expert}"
    config = config_of(made)["quantization_config"]
    assert config["quant_method"] == "mxfp4"
    assert "model.layers.0.self_attn.q_proj" in config["modules_to_not_convert"]
    succeeds("verify", made, "--against", given)
    assert "already up to date" in succeeds(
        "quantize", given, made, "--format", "gptoss_mxfp4", "--max-shard-size", "60kB"
    ).out  # fmt: skip


def test_transformers_reads_it(source: Path, tmp_path: Path) -> None:
    """Every parameter, and the same logits as of the decoded matrices."""
    made = tmp_path / "made"
    plan = json.loads(succeeds("plan", "quantize", source, "--format", "gptoss_mxfp4", "--json").out)
    assert {item["engine"]: item["reads"] for item in plan["engines"]} == {
        "transformers 5.23": "yes",
        "vllm 0.32": "yes",
    }
    assert {name for group in plan["groups"] for name in group["to"] if "_scales" in name} == {
        f"model.layers.{{0..1}}.mlp.experts.{part}_proj_scales" for part in ("gate_up", "down")
    }
    succeeds("quantize", source, made, "--format", "gptoss_mxfp4")
    load = transformers.AutoModelForCausalLM.from_pretrained
    found = load(made, dtype=torch.bfloat16, quantization_config=transformers.Mxfp4Config(dequantize=True))
    wanted = load(source, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in wanted.named_parameters():
            if name.endswith(("gate_up_proj", "down_proj")):
                for matrix in parameter:
                    matrix.copy_(encoded(matrix.T.contiguous()).T)
    parameters = dict(found.named_parameters())
    for name, parameter in wanted.named_parameters():
        assert torch.equal(parameters[name], parameter), name
    tokens = torch.arange(16)[None]
    assert torch.equal(found(tokens).logits, wanted(tokens).logits)


def test_what_is_mxfp4_already_keeps_its_codes(source: Path, tmp_path: Path) -> None:
    succeeds("quantize", source, tmp_path / "first", "--format", "gptoss_mxfp4")
    succeeds("quantize", tmp_path / "first", tmp_path / "again", "--format", "gptoss_mxfp4")
    succeeds("unpack", tmp_path / "first", tmp_path / "experts")
    succeeds("quantize", tmp_path / "experts", tmp_path / "back", "--format", "gptoss_mxfp4")
    first = folder_tensors(tmp_path / "first")
    for other in ("again", "back"):
        found = folder_tensors(tmp_path / other)
        assert found.keys() == first.keys()
        assert all(torch.equal(found[name], item) for name, item in first.items())


def test_it_comes_back(source: Path, tmp_path: Path) -> None:
    succeeds("quantize", source, tmp_path / "made", "--format", "gptoss_mxfp4")
    succeeds("dequantize", tmp_path / "made", tmp_path / "plain")
    succeeds("pack", tmp_path / "plain", tmp_path / "packed")
    before, after = folder_tensors(source), folder_tensors(tmp_path / "packed")
    assert before.keys() == after.keys()
    for name, item in before.items():
        expected = item
        if name.endswith(("gate_up_proj", "down_proj")):
            expected = torch.stack([encoded(matrix.T.contiguous()).T for matrix in item]).to(item.dtype)
        assert torch.equal(after[name], expected), name


def test_other_families_cannot_have_it(tmp_path: Path) -> None:
    from tests.folders import CONFIG, experts_layout, write_folder

    other = write_folder(tmp_path / "other", experts_layout(), CONFIG, 0)
    message = refused("quantize", other, tmp_path / "made", "--format", "gptoss_mxfp4", within=tmp_path)
    assert "gptoss_mxfp4" in message
