"""Whole conversions that change values: what is written, what transformers makes of it, and the way back."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moeconv.engines import entries
from moeconv.formats import FORMATS as ALL_FORMATS
from moeconv.formats import make_format
from tests.commands import BITSANDBYTES, refused, run, succeeds
from tests.folders import read_folder

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 128, "intermediate_size": 256, "num_experts": 12, "head_dim": 64},
    "mixtral": {"intermediate_size": 128, "num_local_experts": 4},
    "deepseek_v3": {
        "moe_intermediate_size": 128, "intermediate_size": 256, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": 128,
        "num_key_value_heads": 4,
        "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64,
    },
    "glm4_moe_lite": {
        "moe_intermediate_size": 128, "intermediate_size": 256, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": 128,
        "num_key_value_heads": 4,
        "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64,
    },
    "glm4_moe": {
        "moe_intermediate_size": 128, "intermediate_size": 256, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "n_shared_experts": 1, "head_dim": 64, "num_experts_per_tok": 2,
    },
}  # fmt: skip
#: Those of bitsandbytes are tested in test_bitsandbytes.py.
FORMATS = [name for name in ALL_FORMATS if name not in BITSANDBYTES]
EVERY = {
    "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
}  # fmt: skip
ROUTER = "model.layers.1.mlp.gate"


def folder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: item for path in sorted(folder.glob("*.safetensors")) for name, item in load_file(path).items()}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny BF16 model of each family, as transformers saves it, in several files."""
    made = {}
    for model_type, own in FAMILIES.items():
        torch.manual_seed(len(model_type))
        config = transformers.AutoConfig.for_model(model_type, **{**EVERY, **own})
        model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        made[model_type] = tmp_path_factory.mktemp(model_type) / "source"
        model.save_pretrained(made[model_type], max_shard_size="700KB")
    return made


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """Every matrix of a folder in full precision, by arithmetic of its own."""
    stored = folder_tensors(folder)
    made: dict[str, torch.Tensor] = {}
    for name, item in stored.items():
        module = name.rpartition(".")[0]
        if name.endswith(".weight_scale_inv"):
            made[f"{module}.weight"] = _blockwise(stored[f"{module}.weight"].float(), item.float())
        elif name.endswith(".weight_scale"):
            packed = stored.get(f"{module}.weight_packed")
            if item.dtype in (torch.uint8, torch.float8_e4m3fn):
                codes = stored[f"{module}.weight"] if packed is None else packed
                factor, divisor = (stored.get(f"{module}.weight_{end}") for end in ("scale_2", "global_scale"))
                if divisor is not None:  # code * (scale / divisor)
                    scaled = _grouped(codes, item.float() / divisor)
                else:
                    scaled = _grouped(
                        codes, item.float() * factor if factor is not None else 2.0 ** (item.float() - 127)
                    )
            elif packed is None:
                codes = stored[f"{module}.weight"].float()
                is_channel = item.shape == (codes.shape[0], 1)
                scaled = codes * item.float() if is_channel else _blockwise(codes, item.float())
            else:
                shape, zero = stored[f"{module}.weight_shape"], stored.get(f"{module}.weight_zero_point")
                scaled = _unpacked(packed, item, shape, zero)
            made[f"{module}.weight"] = scaled
        elif name.endswith(".weight"):
            made.setdefault(name, item)
        elif ".weight_" not in name:
            made[name] = item
    return made


def _grouped(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes of eight bits, or two of four bits in a byte, with a scale for each group of columns."""
    if codes.dtype == torch.uint8:
        numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
        values = numbers[torch.stack((codes & 15, codes >> 4), -1).long()].flatten(1)
    else:
        values = codes.float()
    return values * scale.repeat_interleave(values.shape[1] // scale.shape[1], 1)


def _blockwise(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    rows, columns = codes.shape
    return codes * scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]


def _unpacked(
    packed: torch.Tensor, scale: torch.Tensor, shape: torch.Tensor, zero: torch.Tensor | None
) -> torch.Tensor:
    rows, columns = shape.tolist()
    bits = 32 * packed.shape[1] // columns
    shifts = torch.arange(0, 32, bits)

    def fields(words: torch.Tensor) -> torch.Tensor:
        return ((words.long()[..., None] >> shifts) & (1 << bits) - 1).flatten(1) - (1 << bits - 1)

    group = columns // scale.shape[1]
    codes = fields(packed)[:, :columns].float()
    if zero is not None:
        codes -= fields(zero.T.contiguous()).T[:rows].repeat_interleave(group, 1).float()
    return codes * scale.float().repeat_interleave(group, 1)


CLAIMS = sorted(
    (model_type, name, entry.reads + " without a word" * ("other values" in entry.why))
    for entry in entries()
    if entry.engine == "transformers" and not entry.when
    for model_type in entry.model_types
    for name in entry.formats & set(FORMATS)
)


def test_the_table_speaks_of_all_formats_and_families() -> None:
    assert {(model_type, name) for model_type, name, _ in CLAIMS} == {(m, f) for m in FAMILIES for f in FORMATS}


@pytest.mark.parametrize(("model_type", "name", "reads"), CLAIMS)
def test_transformers_reads_a_format_as_the_table_says(
    sources: dict[str, Path], tmp_path: Path, model_type: str, name: str, reads: str
) -> None:
    """Parameters, not key lists: every one against the packed form of an independent decode."""
    succeeds("quantize", sources[model_type], tmp_path / "made", "--format", name, "--no-fsync")
    config = config_of(tmp_path / "made")
    del config["quantization_config"]
    matrices = {key: rounded(key, item) for key, item in decoded(tmp_path / "made").items()}
    plain = save(tmp_path / "plain", matrices, config)
    wanted = dict(transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16).named_parameters())
    assert reads == answer(tmp_path / "made", wanted).split(":")[0]


KEPT = sorted(
    (model_type, name, entry.reads)
    for entry in entries()
    if entry.engine == "transformers" and entry.when == "kept experts"
    for model_type in entry.model_types
    for name in entry.formats
)


@pytest.mark.parametrize(("model_type", "name", "reads"), KEPT)
def test_transformers_reads_a_layer_with_kept_experts_as_the_table_says(
    sources: dict[str, Path], tmp_path: Path, model_type: str, name: str, reads: str
) -> None:
    ignored = ["--ignore", "*.layers.1.*.experts.*"]
    plan = json.loads(succeeds("plan", "quantize", sources[model_type], "--format", name, *ignored, "--json").out)
    assert plan["engines"][0]["reads"] == reads
    succeeds("quantize", sources[model_type], tmp_path / "made", "--format", name, *ignored, "--no-fsync")
    dtypes = {item.dtype for key, item in folder_tensors(tmp_path / "made").items() if "experts.0." in key}
    assert torch.bfloat16 in dtypes
    assert len(dtypes) > 1
    config = config_of(tmp_path / "made")
    del config["quantization_config"]
    plain = save(tmp_path / "plain", {k: rounded(k, v) for k, v in decoded(tmp_path / "made").items()}, config)
    wanted = dict(transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16).named_parameters())
    assert answer(tmp_path / "made", wanted).startswith(reads)


def rounded(key: str, item: torch.Tensor) -> torch.Tensor:
    """As the model holds it: all but the routers' corrections in BF16."""
    return item if "correction" in key else item.to(torch.bfloat16)


def answer(folder: Path, wanted: dict[str, torch.Tensor]) -> str:
    """Whether transformers holds these parameters once it has loaded a folder, and run it, which decodes the rest."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model(torch.arange(8)[None])
    except (RuntimeError, ValueError, AssertionError, TypeError):
        return "no"
    found = dict(model.named_parameters())
    different = [key for key, item in wanted.items() if key not in found or not torch.equal(found[key], item)]
    return f"no without a word: {different}" if different else "yes"


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_quantized_and_what_is_kept(sources: dict[str, Path], tmp_path: Path, name: str) -> None:
    succeeds("quantize", sources["deepseek_v3"], tmp_path / "made", "--format", name)
    before, after = folder_tensors(sources["deepseek_v3"]), folder_tensors(tmp_path / "made")
    kept = {key for key in before if key in after and after[key].dtype == before[key].dtype}
    for part in ("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj", "norm", "embed_tokens", "lm_head", "mlp.gate."):
        assert {key for key in before if part in key} <= kept, part
        assert any(part in key for key in before), part
    for part in (".experts.", "shared_experts.", "layers.0.mlp.up_proj", "o_proj", "q_b_proj"):
        assert not {key for key in before if part in key} & kept, part
    for key in kept:
        assert torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8))
    config = config_of(tmp_path / "made")["quantization_config"]
    skipped = config.get("ignore", config.get("modules_to_not_convert"))
    assert {key.removesuffix(".weight") for key in kept if before[key].dim() == 2} == set(skipped)
    assert ROUTER in skipped


@pytest.mark.parametrize("name", FORMATS)
def test_dequantizing_gives_the_decode_in_the_names_of_the_source(
    sources: dict[str, Path], tmp_path: Path, name: str
) -> None:
    source = sources["mixtral"]
    succeeds("quantize", source, tmp_path / "made", "--format", name, "--max-shard-size", "300kB")
    succeeds("dequantize", tmp_path / "made", tmp_path / "back")
    wanted, found, before = decoded(tmp_path / "made"), folder_tensors(tmp_path / "back"), folder_tensors(source)
    assert {key: (item.dtype, item.shape) for key, item in found.items()} == {
        key: (item.dtype, item.shape) for key, item in before.items()
    }
    for key, item in found.items():
        assert torch.equal(item, wanted[key].to(item.dtype)), key
    assert "quantization_config" not in config_of(tmp_path / "back")
    index = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())
    stored = folder_tensors(tmp_path / "made")
    assert set(index["weight_map"]) == set(stored)
    for key in stored:  # what belongs together lies in one file
        module = key.rpartition(".")[0]
        assert len({file for other, file in index["weight_map"].items() if other.startswith(f"{module}.weight")}) == 1


def test_the_plan_of_dequantizing_is_that_of_a_dry_run(sources: dict[str, Path], tmp_path: Path) -> None:
    succeeds("quantize", sources["mixtral"], tmp_path / "made", "--format", "fp8")
    planned = succeeds("plan", "dequantize", tmp_path / "made", tmp_path / "back", "--dtype", "float32", "--json")
    again = succeeds("dequantize", tmp_path / "made", tmp_path / "back", "--dtype", "float32", "--dry-run", "--json")
    planned_json, again_json = json.loads(planned.out), json.loads(again.out)
    for report in (planned_json, again_json):
        report.pop("disk", None)
    assert planned_json == again_json
    assert planned_json["unquantized_share"] is None  # nothing is to be quantized
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["fp8", "w4a16_asym"])
def test_verify_encodes_again_and_finds_one_flipped_bit(sources: dict[str, Path], tmp_path: Path, name: str) -> None:
    source, made = sources["qwen3_moe"], tmp_path / "made"
    succeeds("quantize", source, made, "--format", name)
    succeeds("verify", made)
    succeeds("verify", made, "--against", source)
    path = made / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "differs from the source" in refused("verify", made, "--against", source, within=tmp_path)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_packed_experts_are_quantized_one_by_one(sources: dict[str, Path], tmp_path: Path, model_type: str) -> None:
    """From fused matrices comes the same as from the experts themselves, the router's name included."""
    succeeds("pack", sources[model_type], tmp_path / "packed")
    succeeds("quantize", tmp_path / "packed", tmp_path / "a", "--format", "w4a16", "--jobs", "1")
    succeeds("quantize", sources[model_type], tmp_path / "b", "--format", "w4a16")
    one, other = folder_tensors(tmp_path / "a"), folder_tensors(tmp_path / "b")
    assert set(one) == set(other)
    for key, item in other.items():
        assert torch.equal(one[key].view(torch.uint8), item.view(torch.uint8)), key
    assert config_of(tmp_path / "a") == config_of(tmp_path / "b")


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", ["fp8", "w4a16"])
def test_any_format_becomes_any_other_in_one_pass(
    sources: dict[str, Path], tmp_path: Path, first: str, second: str
) -> None:
    """As if by way of a decoded copy on disk; the same format again changes nothing."""
    succeeds("quantize", sources["glm4_moe"], tmp_path / "first", "--format", first)
    succeeds("quantize", tmp_path / "first", tmp_path / "second", "--format", second)
    found = folder_tensors(tmp_path / "second")
    if first == second:
        assert (tmp_path / "first" / "model.safetensors").read_bytes() == (
            tmp_path / "second" / "model.safetensors"
        ).read_bytes()
        return
    succeeds("dequantize", tmp_path / "first", tmp_path / "plain")
    succeeds("quantize", tmp_path / "plain", tmp_path / "wanted", "--format", second)
    wanted = folder_tensors(tmp_path / "wanted")
    assert set(found) == set(wanted)
    for key, item in wanted.items():
        assert torch.equal(found[key].view(torch.uint8), item.view(torch.uint8)), key


def test_rules_give_parts_of_a_model_different_formats(sources: dict[str, Path], tmp_path: Path) -> None:
    """FP8 attention beside 4-bit experts, as groups that transformers decodes."""
    rules = tmp_path / "mixed.yaml"
    rules.write_text(
        "about: mixed\nquantize:\n"
        '  - {match: "*.self_attn.*", format: fp8_dynamic}\n'
        '  - {match: "*.experts.*", format: w4a16, group_size: 32}\n'
    )
    made = tmp_path / "made"
    succeeds("quantize", sources["qwen3_moe"], made, "--recipe", rules)
    config = config_of(made)["quantization_config"]
    assert config["format"] == "mixed-precision"
    by_format = {group["format"]: group["targets"] for group in config["config_groups"].values()}
    assert r"re:^(?:.*\.)?layers\.\d+\.mlp\.experts\.\d+\.up_proj$" in by_format["pack-quantized"]
    assert r"re:^(?:.*\.)?layers\.\d+\.self_attn\.q_proj$" in by_format["float-quantized"]
    model = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16)
    wanted = decoded(made)
    gate = wanted["model.layers.1.mlp.experts.3.gate_proj.weight"].to(torch.bfloat16)
    assert torch.equal(model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[3, :128], gate)


@pytest.mark.parametrize(("first", "second"), [("w4a16", "w8a16"), ("fp8_dynamic", "w4a16"), ("w8a16", "fp8_dynamic")])
def test_rules_for_single_layers_become_groups_that_do_not_overlap(
    sources: dict[str, Path], tmp_path: Path, first: str, second: str
) -> None:
    """The experts of two layers have two formats, and one layer's attention is kept."""
    rules, made, source = tmp_path / "layers.yaml", tmp_path / "made", sources["mixtral"]
    rules.write_text(
        "about: layers\nquantize:\n"
        '  - {match: "*.layers.1.self_attn.*", format: keep}\n'
        f'  - {{match: "*.layers.1.*.experts.*", format: {second}}}\n'
        f'  - {{match: "*.experts.*", format: {first}}}\n'
        f'  - {{match: "*.self_attn.*", format: {first}}}\n'
    )
    succeeds("quantize", source, made, "--recipe", rules)
    config = config_of(made)["quantization_config"]
    stored = folder_tensors(made)
    groups = config["config_groups"].values()
    for module in {name.rpartition(".")[0] for name in stored if name.endswith(".weight_scale")}:
        (group,) = (g for g in groups if any(re.match(t.removeprefix("re:"), module) for t in g["targets"]))
        is_second = ".layers.1." in module and ".experts." in module
        assert group["weights"] == make_format(second if is_second else first, {}).settings()["weights"], module
    assert "model.layers.1.self_attn.q_proj" in config["ignore"]
    assert sorted(len(group["targets"]) for group in groups) == [3, 3 + 4]
    # Each matrix is what a conversion of the whole model to its format makes of it.
    for name, layer in ((first, ".layers.0."), (second, ".layers.1.")):
        succeeds("quantize", source, tmp_path / name, "--format", name)
        for key, item in folder_tensors(tmp_path / name).items():
            if layer in key and ".experts." in key:
                assert torch.equal(item.view(torch.uint8), stored[key].view(torch.uint8)), key
    plan = json.loads(succeeds("plan", "quantize", source, "--recipe", rules, "--json").out)
    (warning,) = (line for line in plan["warnings"] if "transformers" in line)
    assert "it decodes all experts alike" in warning
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16)
    except (AttributeError, RuntimeError):
        return
    wanted = decoded(made)
    held = [model.get_parameter(f"model.layers.{layer}.mlp.experts.down_proj")[0] for layer in range(2)]
    right = [wanted[f"model.layers.{layer}.block_sparse_moe.experts.0.w2.weight"] for layer in range(2)]
    assert not all(torch.equal(a, b.to(torch.bfloat16)) for a, b in zip(held, right, strict=True))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ('"*.experts.2.*", format: keep', "engines hold all experts of a layer together"),
        ('"*.experts.*.down_proj", format: keep', "engines hold all experts of a layer together"),
        (
            '"*.experts.0.*", format: w8a16',
            "experts.0.down_proj.weight would be w8a16 and model.layers.1.mlp.experts.1.",
        ),
        ('"*.experts.0.*", format: w4a16, group_size: 32', "engines hold all experts of a layer together"),
        ('"*.q_a_proj", format: w4a16', "its kv_a_proj_with_mqa kept; engines fuse the two"),
    ],
)
def test_rules_that_tear_apart_what_engines_fuse(
    sources: dict[str, Path], tmp_path: Path, rule: str, message: str
) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(f"quantize:\n  - {{match: {rule}}}\n")
    source = sources["deepseek_v3"]
    options = ("--recipe", rules, "--format", "w4a16")
    assert message in refused("quantize", source, tmp_path / "made", *options, within=tmp_path)


@pytest.fixture
def values(sources: dict[str, Path]) -> dict[str, torch.Tensor]:
    """Tensors to be changed, then saved with the config beside them by the test."""
    return folder_tensors(sources["mixtral"])


def save(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def expert_of(tensors: dict[str, torch.Tensor]) -> str:
    return next(key for key in sorted(tensors) if ".experts.1." in key)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FORMATS)
def test_a_value_that_is_no_number_stops_the_run(
    sources: dict[str, Path], tmp_path: Path, values: dict[str, torch.Tensor], name: str, bad: float
) -> None:
    expert = expert_of(values)
    values[expert][5, 7] = bad
    source = save(tmp_path / "source", values, config_of(sources["mixtral"]))
    result = run("quantize", source, tmp_path / "made", "--format", name)
    assert result.code == 1
    assert f"{expert} holds NaN or infinite values" in result.err
    assert not (tmp_path / "made").exists()
    succeeds("quantize", source, tmp_path / "made", "--format", name, "--allow-nonfinite", "--overwrite")
    values[expert][5, 7] = 0
    assert torch.isfinite(decoded(tmp_path / "made")[expert]).all()


def test_numbers_too_far_apart_for_a_zero_point_are_not_called_infinite(
    sources: dict[str, Path], tmp_path: Path, values: dict[str, torch.Tensor]
) -> None:
    """Both are finite, the distance between them is not in BF16; to take infinities as zero would not help."""
    expert = expert_of(values)
    values[expert][5, 7], values[expert][5, 8] = 3e38, -3e38
    source = save(tmp_path / "source", values, config_of(sources["mixtral"]))
    for options in ([], ["--allow-nonfinite", "--overwrite"]):
        result = run("quantize", source, tmp_path / "made", "--format", "w4a16_asym", *options)
        assert result.code == 1
        assert f"{expert} holds finite values too large for w4a16_asym in rows" in result.err
        assert "--allow-nonfinite" not in result.err
    succeeds("quantize", source, tmp_path / "symmetric", "--format", "w4a16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "neither --format nor --recipe says what to quantize to"),
        (["--format", "fp9"], "--format 'fp9' is no format"),
        (["--format", "fp8", "--group-size", "32"], "--format fp8 takes no --group-size"),
        (["--format", "w4a16", "--scale", "best"], "'best' is no way to choose scales"),
        (["--format", "w4a16", "--group-size", "12"], "a group of 12 columns cannot be packed"),
        (["--format", "fp8", "--dtype", "float64"], "--dtype 'float64' is no dtype of full precision"),
        (["--format", "fp8", "--device", "cpu", "--max-vram", "1GB"], "--max-vram bounds the memory of GPUs"),
    ],
)
def test_a_command_line_that_cannot_be_right(
    sources: dict[str, Path], tmp_path: Path, options: list[str], message: str
) -> None:
    assert message in refused("quantize", sources["mixtral"], tmp_path / "x", *options, within=tmp_path, code=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "fp8", "--only", "*.nothing"], "--only '*.nothing' names no matrix"),
        (["--format", "fp8", "--ignore", "*.nothing"], "'*.nothing' names no matrix"),
        (["--format", "fp8", "--ignore", "*"], "nothing would be quantized"),
        (["--format", "fp8", "--max-memory", "100MB"], "--max-memory 100,000,000 is less than this conversion needs"),
        (["--format", "w4a16", "--group-size", "96"], "columns are not made of whole groups of 96"),
    ],
)
def test_a_quantization_that_is_refused(
    sources: dict[str, Path], tmp_path: Path, options: list[str], message: str
) -> None:
    code = 2 if "--max-memory" in options else 1
    assert message in refused("quantize", sources["mixtral"], tmp_path / "x", *options, within=tmp_path, code=code)


def test_experts_with_edge_blocks_are_refused_and_can_be_kept(
    sources: dict[str, Path], tmp_path: Path, values: dict[str, torch.Tensor]
) -> None:
    """192 rows are a block and a half, which engines read wrong."""
    config = {**config_of(sources["mixtral"]), "intermediate_size": 192}
    for key, item in values.items():
        if ".experts." in key:
            shape = (256, 192) if key.endswith(("w2.weight", "down_proj.weight")) else (192, 256)
            values[key] = torch.randn(shape).to(item.dtype)
    source = save(tmp_path / "source", values, config)
    message = refused("quantize", source, tmp_path / "made", "--format", "fp8", within=tmp_path)
    assert "is not made of whole 128 x 128 blocks" in message
    succeeds("quantize", source, tmp_path / "made", "--format", "fp8", "--ignore", "*.experts.*")
    found = folder_tensors(tmp_path / "made")
    for key in values:
        if ".experts." in key:
            assert torch.equal(found[key], values[key])


def test_what_engines_fuse_is_kept_together(
    sources: dict[str, Path], tmp_path: Path, values: dict[str, torch.Tensor]
) -> None:
    """k_proj has 64 rows here and cannot have blocks, so q_proj and v_proj stay too."""
    for key in list(values):
        if key.endswith("k_proj.weight"):
            values[key] = values[key][:64].contiguous()
    source = save(tmp_path / "source", values, config_of(sources["mixtral"]))
    succeeds("quantize", source, tmp_path / "made", "--format", "fp8")
    found = folder_tensors(tmp_path / "made")
    dtypes = {name: found[f"model.layers.0.self_attn.{name}.weight"].dtype for name in ("q_proj", "k_proj", "o_proj")}
    assert dtypes == {"q_proj": torch.bfloat16, "k_proj": torch.bfloat16, "o_proj": torch.float8_e4m3fn}


def test_float32_is_rounded_first_where_asked(
    sources: dict[str, Path], tmp_path: Path, values: dict[str, torch.Tensor]
) -> None:
    wide = {key: item.float() for key, item in values.items()}
    source = save(tmp_path / "source", wide, config_of(sources["mixtral"]))
    narrow = save(tmp_path / "narrow", values, config_of(sources["mixtral"]))
    succeeds("quantize", source, tmp_path / "a", "--format", "w4a16", "--dtype", "bfloat16")
    succeeds("quantize", narrow, tmp_path / "b", "--format", "w4a16")
    one, other = folder_tensors(tmp_path / "a"), folder_tensors(tmp_path / "b")
    for key in other:
        if ".weight_" in key:
            assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize("command", ["dequantize", "quantize"])
def test_files_that_say_how_the_source_was_quantized_stay_behind(
    sources: dict[str, Path], tmp_path: Path, command: str
) -> None:
    succeeds("quantize", sources["qwen3_moe"], tmp_path / "source", "--format", "fp8")
    for name in ("hf_quant_config.json", "generation_config.json", "recipe.yaml"):
        (tmp_path / "source" / name).write_text("{}")
    result = succeeds(
        command, tmp_path / "source", tmp_path / "made", *(["--format", "w4a16"] * (command == "quantize"))
    )
    assert "left out: hf_quant_config.json (2 bytes): says how the source was quantized" in result.err
    assert not (tmp_path / "made" / "hf_quant_config.json").exists()
    assert not (tmp_path / "made" / "recipe.yaml").exists()
    assert (tmp_path / "made" / "generation_config.json").exists()
    succeeds("verify", tmp_path / "made", "--against", tmp_path / "source")


def test_the_plan_tells_what_becomes_of_everything(sources: dict[str, Path]) -> None:
    report = json.loads(succeeds("plan", "quantize", sources["qwen3_moe"], "--format", "FP8-Dynamic", "--json").out)
    before = folder_tensors(sources["qwen3_moe"])
    assert sum(group["tensors_in"] for group in report["groups"]) == len(before)
    assert {group["what"] for group in report["groups"]} == {"fp8_dynamic", "copied"}
    kept = sum(group["bytes_in"] for group in report["groups"] if group["what"] == "copied")
    assert report["unquantized_share"] == pytest.approx(kept / report["bytes_in"], abs=1e-6)
    assert {engine["engine"].split()[0]: engine["reads"] for engine in report["engines"]} == {
        "transformers": "yes", "vllm": "yes",
    }  # fmt: skip


@pytest.mark.parametrize("jobs", [1, 2, 8])
def test_the_defaults_stay_below_700_mb_on_any_number_of_cores(
    sources: dict[str, Path], tmp_path: Path, jobs: int
) -> None:
    """Matrices of DeepSeek-V3, in a file that holds nothing but its header."""
    header: dict[str, Any] = {}
    for expert in range(16):
        for part, shape in (("gate", (2048, 7168)), ("up", (2048, 7168)), ("down", (7168, 2048))):
            at = len(header) * 2048 * 7168 * 2
            entry = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + 2048 * 7168 * 2]}
            header[f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"] = entry
    text = json.dumps(header).encode()
    (tmp_path / "source").mkdir()
    file = tmp_path / "source" / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + len(header) * 2048 * 7168 * 2)
    sizes = {"hidden_size": 7168, "moe_intermediate_size": 2048, "n_routed_experts": 16}
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config_of(sources["deepseek_v3"]), **sizes}))
    for name in FORMATS:
        planned = succeeds(
            "plan", "quantize", tmp_path / "source", "--format", name, "--jobs", str(jobs), "--json"
        )  # fmt: skip
        assert json.loads(planned.out)["peak_memory_bytes"] < 700e6, name


def test_scale_search_lowers_the_error_of_the_whole_model(sources: dict[str, Path], tmp_path: Path) -> None:
    errors = {}
    before = folder_tensors(sources["qwen3_moe"])
    for search in ("amax", "mse"):
        succeeds("quantize", sources["qwen3_moe"], tmp_path / search, "--format", "w4a16", "--scale", search)
        found = decoded(tmp_path / search)
        errors[search] = sum(float((found[key].float() - before[key].float()).square().sum()) for key in before)
    assert errors["mse"] < 0.9 * errors["amax"]
    assert make_format("w4a16", {"search": "mse"}).settings() == make_format("w4a16", {}).settings()


def test_fp8_with_scales_in_bf16_is_fp8_already(sources: dict[str, Path], tmp_path: Path) -> None:
    """As some releases have it; encoding again would lose what the first rounding left."""
    succeeds("quantize", sources["mixtral"], tmp_path / "first", "--format", "fp8")
    stored = folder_tensors(tmp_path / "first")
    narrow = {key: item.bfloat16() if key.endswith("scale_inv") else item for key, item in stored.items()}
    source = save(tmp_path / "source", narrow, config_of(tmp_path / "first"))
    succeeds("quantize", source, tmp_path / "made", "--format", "fp8")
    found = folder_tensors(tmp_path / "made")
    assert found.keys() == narrow.keys()
    for key, item in narrow.items():
        assert item.dtype == found[key].dtype
        assert torch.equal(item.view(torch.uint8), found[key].view(torch.uint8)), key


def test_a_recipe_keeps_what_is_peculiar_to_its_families(sources: dict[str, Path], tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("about: x\nextends: gate_up_down\nmodel_types: [qwen3_moe]\nkeep: ['*.o_proj']\n")
    succeeds("quantize", sources["qwen3_moe"], tmp_path / "made", "--format", "fp8", "--recipe", own)
    dtypes = {key: item.dtype for key, item in folder_tensors(tmp_path / "made").items()}
    assert dtypes["model.layers.0.self_attn.o_proj.weight"] == torch.bfloat16
    assert dtypes["model.layers.0.self_attn.q_proj.weight"] == torch.float8_e4m3fn
    assert dtypes["lm_head.weight"] == torch.bfloat16
    assert (
        "model.layers.0.self_attn.o_proj"
        in config_of(tmp_path / "made")["quantization_config"]["modules_to_not_convert"]
    )
    succeeds("verify", tmp_path / "made", "--against", sources["qwen3_moe"])
    plan = json.loads(
        succeeds("plan", "quantize", sources["qwen3_moe"], "--format", "fp8", "--recipe", own, "--json").out
    )
    assert "kept by default: *.o_proj" in {group["why"] for group in plan["groups"]}


def test_state_space_layers_of_nemotron_are_kept(tmp_path: Path) -> None:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    tensors = {f"backbone.layers.0.mixer.{part}.weight": zeros(128, 128) for part in ("in_proj", "out_proj")}
    for expert in range(2):
        for part in ("up_proj", "down_proj"):
            tensors[f"backbone.layers.1.mixer.experts.{expert}.{part}.weight"] = zeros(128, 128)
    config = {"model_type": "nemotron_h", "n_routed_experts": 2, "moe_intermediate_size": 128, "hidden_size": 128}
    source = save(tmp_path / "source", tensors, config)
    plan = json.loads(succeeds("plan", "quantize", source, "--format", "w8a16", "--json").out)
    kept = {name for group in plan["groups"] if group["what"] == "copied" for name in group["from"]}
    assert kept == {f"backbone.layers.0.mixer.{part}.weight" for part in ("in_proj", "out_proj")}


def test_a_dtype_that_changes_nothing_is_not_claimed(sources: dict[str, Path], tmp_path: Path) -> None:
    succeeds("quantize", sources["mixtral"], tmp_path / "made", "--format", "w4a16", "--dtype", "float16")
    config = config_of(tmp_path / "made")
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_what_is_fp8_already_keeps_how_its_scales_are_meant(sources: dict[str, Path], tmp_path: Path) -> None:
    succeeds("quantize", sources["qwen3_moe"], tmp_path / "made", "--format", "fp8", "--ue8m0")
    config = config_of(tmp_path / "made")
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    (tmp_path / "made" / "config.json").write_text(json.dumps(config))
    succeeds("quantize", tmp_path / "made", tmp_path / "again", "--format", "fp8")
    assert config_of(tmp_path / "again")["quantization_config"]["scale_fmt"] == "ue8m0"
    assert read_folder(tmp_path / "again") == read_folder(tmp_path / "made")


@pytest.mark.parametrize("allow", [(), ("--allow-nonfinite",)])
def test_what_is_too_large_for_a_dtype_is_said_and_never_zero(
    sources: dict[str, Path], tmp_path: Path, allow: tuple[str, ...]
) -> None:
    tensors = {name: item.float() for name, item in folder_tensors(sources["mixtral"]).items()}
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    tensors[name][3, 5] = 1e6
    source = save(tmp_path / "source", tensors, config_of(sources["mixtral"]) | {"dtype": "float32"})
    options = ("--format", "w8a16", *allow)
    result = run("quantize", source, tmp_path / "made", *options, "--dtype", "float16")
    assert result.code == 1
    assert f"{name} holds values too large for F16 in rows" in result.err
    succeeds("quantize", source, tmp_path / "wide", *options, "--dtype", "bfloat16")
    result = run("dequantize", tmp_path / "wide", tmp_path / "plain", "--dtype", "float16")
    assert result.code == 1
    assert f"{name} holds values too large for F16 in rows" in result.err


def test_codes_that_mean_nan_can_be_counted_as_zero(sources: dict[str, Path], tmp_path: Path) -> None:
    succeeds("quantize", sources["mixtral"], tmp_path / "first", "--format", "modelopt_nvfp4")
    tensors = folder_tensors(tmp_path / "first")
    module = "model.layers.1.block_sparse_moe.experts.2.w2"
    tensors[f"{module}.weight_scale"].view(torch.uint8)[3, 1] = 0x7F
    broken = save(tmp_path / "broken", tensors, config_of(tmp_path / "first"))
    result = run("quantize", broken, tmp_path / "made", "--format", "nvfp4a16")
    assert result.code == 1
    assert "--allow-nonfinite" in result.err
    succeeds("quantize", broken, tmp_path / "made", "--format", "nvfp4a16", "--allow-nonfinite", "--overwrite")
    row = decoded(tmp_path / "made")[f"{module}.weight"][3]
    assert row.isfinite().all()
    assert (row[16:32] == 0).all()
