"""Experts that are quantized already, packed and unpacked: codes, scales and whatever else goes with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from moeconv.engines import entries
from moeconv.forms import load_forms
from tests.commands import refused, succeeds
from tests.folders import Tensors, read_folder, tensor, write_folder
from tests.test_quantize import FAMILIES, answer, config_of, decoded, folder_tensors, rounded, save, sources

__all__ = ["sources"]  # a fixture

#: A format that `quantize` writes, and the form in which its experts are found.
WRITTEN = {
    "fp8": "fp8", "fp8_dynamic": "channel", "fp8_block": "fp8_block", "w8a8": "channel", "w4a16": "int4",
    "w8a16": "int8", "w4a16_asym": "int4",
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_experts_of_every_format_are_packed_and_come_back(
    sources: dict[str, Path], tmp_path: Path, model_type: str, name: str
) -> None:
    succeeds("quantize", sources[model_type], tmp_path / "made", "--format", name)
    succeeds("pack", tmp_path / "made", tmp_path / "packed")
    succeeds("verify", tmp_path / "packed", "--against", tmp_path / "made")
    succeeds("unpack", tmp_path / "packed", tmp_path / "back")
    before, packed, after = (read_folder(tmp_path / folder) for folder in ("made", "packed", "back"))
    assert after == before
    assert config_of(tmp_path / "back") == config_of(tmp_path / "made")
    experts = {key for key in before if ".experts." in key}
    assert experts
    assert not [key for key in packed if ".experts.0." in key]
    assert sum(len(item.content) for item in packed.values()) == sum(len(item.content) for item in before.values())


@pytest.mark.parametrize("name", ["fp8", "w4a16"])
def test_what_lies_where_in_packed_experts(sources: dict[str, Path], tmp_path: Path, name: str) -> None:
    succeeds("quantize", sources["qwen3_moe"], tmp_path / "made", "--format", name)
    succeeds("pack", tmp_path / "made", tmp_path / "packed")
    before, after = folder_tensors(tmp_path / "made"), folder_tensors(tmp_path / "packed")
    tails = {"fp8": ("", "_scale_inv"), "w4a16": ("_packed", "_scale", "_shape")}[name]
    for tail in tails:
        for expert in range(12):
            block = "model.layers.1.mlp.experts"
            gate, up, down = (before[f"{block}.{expert}.{part}_proj.weight{tail}"] for part in ("gate", "up", "down"))
            joined = after[f"{block}.gate_up_proj{tail}"][expert]
            assert torch.equal(joined.view(torch.uint8), torch.cat([gate, up]).view(torch.uint8))
            assert torch.equal(after[f"{block}.down_proj{tail}"][expert].view(torch.uint8), down.view(torch.uint8))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_packed_fp8_has_the_names_and_shapes_of_transformers_fp8_experts(
    sources: dict[str, Path], tmp_path: Path, model_type: str
) -> None:
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    succeeds("quantize", sources[model_type], tmp_path / "made", "--format", "fp8")
    succeeds("pack", tmp_path / "made", tmp_path / "packed")
    stored = {key: item for key, item in folder_tensors(tmp_path / "packed").items() if ".experts." in key}
    settings = config_of(tmp_path / "packed")["quantization_config"]
    quantization = transformers.FineGrainedFP8Config(weight_block_size=tuple(settings["weight_block_size"]))
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(sources[model_type])
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = replace_with_fp8_linear(model, settings["modules_to_not_convert"], quantization)
    wanted = {key: item for key, item in model.state_dict().items() if ".experts." in key and item is not None}
    assert {key: tuple(item.shape) for key, item in stored.items()} == {
        key: tuple(item.shape) for key, item in wanted.items()
    }
    assert len(stored) >= 4


PACKED = sorted(
    (model_type, name, entry.reads)
    for entry in entries()
    if entry.engine == "transformers" and entry.forms
    for model_type in entry.model_types
    for name, form in WRITTEN.items()
    if form in entry.forms
)


@pytest.mark.parametrize(("model_type", "name", "reads"), PACKED)
def test_transformers_reads_packed_experts_as_the_table_says(
    sources: dict[str, Path], tmp_path: Path, model_type: str, name: str, reads: str
) -> None:
    succeeds("quantize", sources[model_type], tmp_path / "made", "--format", name)
    result = succeeds("pack", tmp_path / "made", tmp_path / "packed")
    assert ("transformers 5.23 does not read this result" in result.err) == (reads == "no")
    config = config_of(tmp_path / "made")
    del config["quantization_config"]
    plain = save(tmp_path / "plain", {k: rounded(k, v) for k, v in decoded(tmp_path / "made").items()}, config)
    wanted = dict(transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16).named_parameters())
    assert answer(tmp_path / "packed", wanted).startswith(reads)
    assert len(PACKED) == 7 * len(FAMILIES)


# Forms that moeconv does not write

E, I, H = 4, 256, 128  # noqa: E741
CONFIG = {"model_type": "qwen3_moe", "num_experts": E, "moe_intermediate_size": I, "hidden_size": H}


def experts(form: str, *, layers: int = 1, inner: int = I, prefix: str = "model.layers.{}.mlp") -> Tensors:
    """Random bytes in the names and shapes of a form, computed here on their own."""
    made: Tensors = {}
    for layer in range(layers):
        made[f"model.layers.{layer}.input_layernorm.weight"] = tensor((H,), seed=f"norm{layer}")
        for expert in range(E):
            for part, (rows, columns) in {"gate": (inner, H), "up": (inner, H), "down": (H, inner)}.items():
                stem = f"{prefix.format(layer)}.experts.{expert}.{part}_proj"
                for word, (dtype, shape) in stored(form, rows, columns).items():
                    made[f"{stem}.{word}"] = tensor(shape, dtype, seed=f"{stem}{word}")
    return made


def stored(form: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    blocks = (-(-rows // 128), -(-columns // 128))
    return {
        "bf16": {"weight": ("BF16", (rows, columns))},
        "fp8": {"weight": ("F8_E4M3", (rows, columns)), "weight_scale_inv": ("BF16", blocks)},
        "fp8_scale": {"weight": ("F8_E4M3", (rows, columns)), "scale": ("F32", blocks)},
        "fp4_scale": {"weight": ("I8", (rows, columns // 2)), "scale": ("F8_E8M0", (rows, columns // 32))},
        "mxfp8": {"weight": ("F8_E4M3", (rows, columns)), "weight_scale_inv": ("U8", (rows, columns // 32))},
        "mxfp8_ct": {"weight": ("F8_E4M3", (rows, columns)), "weight_scale": ("U8", (rows, columns // 32))},
        "int4": {
            "weight_packed": ("I32", (rows, columns // 8)), "weight_scale": ("BF16", (rows, columns // 32)),
            "weight_shape": ("I64", (2,)),
        },
        "nvfp4": {
            "weight_packed": ("U8", (rows, columns // 2)), "weight_scale": ("F8_E4M3", (rows, columns // 16)),
            "weight_global_scale": ("F32", (1,)), "input_global_scale": ("F32", (1,)),
        },
        "mxfp4": {"weight_packed": ("U8", (rows, columns // 2)), "weight_scale": ("U8", (rows, columns // 32))},
        "modelopt_nvfp4": {
            "weight": ("U8", (rows, columns // 2)), "weight_scale": ("F8_E4M3", (rows, columns // 16)),
            "weight_scale_2": ("F32", ()), "input_scale": ("F32", ()),
        },
        "per_tensor": {"weight": ("F8_E4M3", (rows, columns)), "weight_scale": ("F32", ())},
        "per_tensor_array": {
            "weight": ("F8_E4M3", (rows, columns)), "weight_scale": ("F32", (1,)), "input_scale": ("F32", (1,)),
        },
        "channel int8": {"weight": ("I8", (rows, columns)), "weight_scale": ("BF16", (rows, 1))},
    }[form]  # fmt: skip


MOVING = ["fp8", "fp8_scale", "fp4_scale", "mxfp8", "mxfp8_ct", "int4", "nvfp4", "mxfp4", "per_tensor_array"]


@pytest.mark.parametrize("form", MOVING)
@pytest.mark.parametrize("shards", [0, 3])
def test_all_that_belongs_to_an_expert_moves_with_it(tmp_path: Path, form: str, shards: int) -> None:
    tensors = experts(form, layers=2)
    source = write_folder(tmp_path / "source", tensors, CONFIG, shards)
    succeeds("pack", source, tmp_path / "packed")
    succeeds("unpack", tmp_path / "packed", tmp_path / "back")
    assert read_folder(tmp_path / "back") == tensors
    packed = read_folder(tmp_path / "packed")
    words = stored(form, I, H)
    assert len(packed) == 2 * (1 + 2 * len(words))
    for word, (dtype, shape) in words.items():
        tail = {"scale": "_scale_inv"}.get(word, word.removeprefix("weight") or "")
        tail = tail if tail.startswith("_") or not tail else f"_{tail}"
        found = packed[f"model.layers.1.mlp.experts.gate_up_proj{tail}"]
        assert (found.dtype, found.shape) == (dtype, (E, 2 * shape[0], *shape[1:]))
        stem = "model.layers.1.mlp.experts"
        content = [tensors[f"{stem}.{e}.{part}_proj.{word}"].content for e in range(E) for part in ("gate", "up")]
        assert found.content == b"".join(content)


@pytest.mark.parametrize("form", ["modelopt_nvfp4", "per_tensor"])
def test_numbers_without_an_axis_cannot_be_joined(tmp_path: Path, form: str) -> None:
    source = write_folder(tmp_path / "source", experts(form), CONFIG, 2)
    message = refused("pack", source, tmp_path / "packed", within=tmp_path)
    assert "model.layers.0: cannot be stored as packed" in message
    assert form in message
    succeeds("unpack", source, tmp_path / "same")
    assert read_folder(tmp_path / "same") == read_folder(source)


@pytest.mark.parametrize("form", ["fp8", "fp8_scale"])
def test_blocks_that_would_lie_in_two_matrices_are_refused(tmp_path: Path, form: str) -> None:
    config = {**CONFIG, "moe_intermediate_size": 192}
    source = write_folder(tmp_path / "source", experts(form, inner=192), config, 1)
    message = refused("pack", source, tmp_path / "packed", within=tmp_path)
    assert "blocks" in message
    assert "partly in one matrix and partly in the next" in message
    assert "Traceback" not in message


def test_layers_may_have_different_forms(tmp_path: Path) -> None:
    """Quantized, in full precision, and in another form, as releases keep single layers."""
    first, second, third = experts("fp8", layers=1), experts("bf16", layers=2), experts("int4", layers=3)
    tensors = {
        **first,
        **{name: item for name, item in second.items() if ".layers.1." in name},
        **{name: item for name, item in third.items() if ".layers.2." in name},
    }
    source = write_folder(tmp_path / "source", tensors, CONFIG, 2)
    succeeds("pack", source, tmp_path / "packed")
    packed = read_folder(tmp_path / "packed")
    assert packed["model.layers.0.mlp.experts.gate_up_proj"].dtype == "F8_E4M3"
    assert packed["model.layers.1.mlp.experts.gate_up_proj"].dtype == "BF16"
    assert packed["model.layers.2.mlp.experts.gate_up_proj_packed"].dtype == "I32"
    succeeds("unpack", tmp_path / "packed", tmp_path / "back")
    assert read_folder(tmp_path / "back") == tensors


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("lost", "weight_scale_inv has 3 of 4 experts; missing: 2"),
        ("shape", "has the shape [3, 1]"),
        ("dtype", "is F32; the others of its stack are BF16"),
    ],
)
def test_a_scale_that_is_wrong_is_named(tmp_path: Path, change: str, says: str) -> None:
    tensors = experts("fp8")
    name = "model.layers.0.mlp.experts.2.up_proj.weight_scale_inv"
    if change == "lost":
        del tensors[name]
    else:
        tensors[name] = tensor((3, 1), "BF16") if change == "shape" else tensor((2, 1), "F32")
    source = write_folder(tmp_path / "source", tensors, CONFIG, 1)
    assert says in refused("pack", source, tmp_path / "packed", within=tmp_path)


def test_packed_codes_without_scales_are_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", experts("fp8"), CONFIG, 1)
    succeeds("pack", source, tmp_path / "packed")
    tensors = read_folder(tmp_path / "packed")
    del tensors["model.layers.0.mlp.experts.down_proj_scale_inv"]
    broken = write_folder(tmp_path / "broken", tensors, CONFIG, 1)
    message = refused("unpack", broken, tmp_path / "back", within=tmp_path)
    assert "down_proj" in message


QUANTIZED = {**CONFIG, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


@pytest.mark.parametrize("form", ["fp8", "int4", "nvfp4", "channel int8"])
@pytest.mark.parametrize("lost", [".layers.1.", ".layers."], ids=["of one layer", "of all layers"])
def test_codes_that_lost_all_their_scales_are_refused(tmp_path: Path, form: str, lost: str) -> None:
    tensors = {name: item for name, item in experts(form, layers=2).items() if "scale" not in name or lost not in name}
    source = write_folder(tmp_path / "source", tensors, QUANTIZED, 1)
    for command in ("pack", "unpack"):
        message = refused(command, source, tmp_path / "made", within=tmp_path)
        said = ("there are no scales beside them", "what belongs to it may be missing", "weight_scale is missing")
        assert any(words in message for words in said)
        assert "model.layers." in message


def test_numbers_of_eight_bits_of_a_model_that_is_not_quantized_move(tmp_path: Path) -> None:
    tensors = {name: item for name, item in experts("fp8").items() if "scale" not in name}
    source = write_folder(tmp_path / "source", tensors, CONFIG, 1)
    succeeds("pack", source, tmp_path / "packed")
    succeeds("unpack", tmp_path / "packed", tmp_path / "back")
    assert read_folder(tmp_path / "back") == tensors


@pytest.mark.parametrize("size", [1, 64], ids=["a row", "another size"])
def test_layers_and_matrices_may_have_groups_of_their_own(tmp_path: Path, size: int) -> None:
    """Groups of 32 in layer 0; in layer 1 one group for a row (K columns, which differ), or groups of 64."""
    tensors = experts("int4", layers=2)
    for name, item in list(tensors.items()):
        if ".layers.1." in name and name.endswith("weight_scale"):
            groups = 1 if size == 1 else item.shape[1] // 2
            tensors[name] = tensor((item.shape[0], groups), "BF16", seed=name)
    source = write_folder(tmp_path / "source", tensors, CONFIG, 1)
    succeeds("pack", source, tmp_path / "packed")
    succeeds("unpack", tmp_path / "packed", tmp_path / "back")
    assert read_folder(tmp_path / "back") == tensors


def test_matrices_of_a_layer_in_two_forms_are_named(tmp_path: Path) -> None:
    tensors, plain = experts("fp8"), experts("bf16")
    for name in [name for name in tensors if "down_proj" in name]:
        del tensors[name]
    tensors.update((name, item) for name, item in plain.items() if "down_proj" in name)
    source = write_folder(tmp_path / "source", tensors, QUANTIZED, 1)
    message = refused("pack", source, tmp_path / "packed", within=tmp_path)
    assert (
        "model.layers.0: model.layers.0.mlp.experts.0.down_proj.weight BF16 [128, 256] is in full precision" in message
    )
    assert "other matrices of these experts are quantized (form fp8)" in message


def test_names_at_other_places_follow_the_recipe(tmp_path: Path) -> None:
    """DeepSeek-V4: published as ffn.experts.N.w1 with `.scale`, packed as transformers holds its FP8 experts."""
    tensors: Tensors = {}
    for expert in range(E):
        for part, (rows, columns) in {"w1": (I, H), "w3": (I, H), "w2": (H, I)}.items():
            for word, (dtype, shape) in stored("fp4_scale", rows, columns).items():
                name = f"layers.3.ffn.experts.{expert}.{part}.{word}"
                tensors[name] = tensor(shape, dtype, seed=name)
    config = {"model_type": "deepseek_v4", "n_routed_experts": E, "moe_intermediate_size": I, "hidden_size": H}
    source = write_folder(tmp_path / "source", tensors, config, 1)
    succeeds("pack", source, tmp_path / "packed")
    packed = {name: (item.dtype, item.shape) for name, item in read_folder(tmp_path / "packed").items()}
    assert packed == {
        "layers.3.mlp.experts.gate_up_proj": ("I8", (E, 2 * I, H // 2)),
        "layers.3.mlp.experts.gate_up_proj_scale_inv": ("F8_E8M0", (E, 2 * I, H // 32)),
        "layers.3.mlp.experts.down_proj": ("I8", (E, H, I // 2)),
        "layers.3.mlp.experts.down_proj_scale_inv": ("F8_E8M0", (E, H, I // 32)),
    }
    succeeds("unpack", tmp_path / "packed", tmp_path / "back")
    assert read_folder(tmp_path / "back") == tensors


def test_the_published_names_are_those_of_the_family(tmp_path: Path) -> None:
    """A packed folder without a manifest: both `fp8` and `fp8_scale` fit, and DeepSeek-V4 has the latter."""
    tensors = {}
    for expert in range(E):
        for part, (rows, columns) in {"w1": (I, H), "w3": (I, H), "w2": (H, I)}.items():
            for word, (dtype, shape) in stored("fp8_scale", rows, columns).items():
                name = f"layers.3.ffn.experts.{expert}.{part}.{word}"
                tensors[name] = tensor(shape, dtype, seed=name)
    config = {"model_type": "deepseek_v4", "n_routed_experts": E, "moe_intermediate_size": I, "hidden_size": H}
    succeeds("pack", write_folder(tmp_path / "source", tensors, config, 1), tmp_path / "packed")
    (tmp_path / "packed" / "moeconv.json").unlink()
    succeeds("unpack", tmp_path / "packed", tmp_path / "back")
    assert read_folder(tmp_path / "back") == tensors


@pytest.mark.parametrize("options", [["dequantize"], ["quantize", "--format", "w8a8"]], ids=lambda words: words[0])
@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_packed_experts_are_decoded_as_unpacked_ones(
    sources: dict[str, Path], tmp_path: Path, model_type: str, name: str, options: list[str]
) -> None:
    command, *rest = options
    succeeds("quantize", sources[model_type], tmp_path / "made", "--format", name)
    succeeds("pack", tmp_path / "made", tmp_path / "packed")
    succeeds(command, tmp_path / "made", tmp_path / "one", *rest)
    succeeds(command, tmp_path / "packed", tmp_path / "other", *rest)
    one, other = read_folder(tmp_path / "one"), read_folder(tmp_path / "other")
    experts = {key for key in one if ".experts." in key}
    assert experts
    assert {key: other[key] for key in experts} == {key: one[key] for key in experts}
    if name != "w8a8":
        succeeds("verify", tmp_path / "other", "--against", tmp_path / "packed")


GPT_OSS = {"num_local_experts": 6, "intermediate_size": 32, "hidden_size": 64, "num_hidden_layers": 2,
           "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 96,
           "layer_types": ["full_attention"] * 2}  # fmt: skip


def gpt_oss(folder: Path) -> Path:
    """gpt-oss as published: random codes, exponents as far from 127 as a half can show."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("gpt_oss", **GPT_OSS))
    tensors = {name: item for name, item in model.to(torch.bfloat16).state_dict().items() if "_proj" not in name}
    tensors |= {name: item for name, item in model.state_dict().items() if "self_attn" in name or "_proj_bias" in name}
    for layer in range(2):
        for part, rows, columns in (("gate_up", 64, 64), ("down", 64, 32)):
            stem = f"model.layers.{layer}.mlp.experts.{part}_proj"
            tensors[f"{stem}_blocks"] = torch.randint(0, 256, (6, rows, columns // 32, 16), dtype=torch.uint8)
            tensors[f"{stem}_scales"] = torch.randint(107, 130, (6, rows, columns // 32), dtype=torch.uint8)
    config = model.config.to_dict() | {"model_type": "gpt_oss", "dtype": "bfloat16"}
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return save(folder, tensors, config | {"quantization_config": settings})


def test_gpt_oss_is_decoded_as_transformers_decodes_it(tmp_path: Path) -> None:
    source = gpt_oss(tmp_path / "source")
    load = transformers.AutoModelForCausalLM.from_pretrained
    wanted = load(
        source, dtype=torch.bfloat16, quantization_config=transformers.Mxfp4Config(dequantize=True)
    ).state_dict()
    succeeds("dequantize", source, tmp_path / "plain")
    succeeds("verify", tmp_path / "plain", "--against", source)
    succeeds("pack", tmp_path / "plain", tmp_path / "packed")
    found = load(tmp_path / "packed", dtype=torch.bfloat16).state_dict()
    assert wanted.keys() == found.keys()
    assert wanted["model.layers.1.mlp.experts.gate_up_proj"].shape == (6, 64, 64)
    for name, item in wanted.items():
        assert torch.equal(item, found[name]), name
    assert "quantization_config" not in config_of(tmp_path / "packed")


def test_gpt_oss_is_decoded_alike_packed_and_one_by_one(tmp_path: Path) -> None:
    source = gpt_oss(tmp_path / "source")
    succeeds("unpack", source, tmp_path / "experts")
    for folder in (source, tmp_path / "experts"):
        succeeds("dequantize", folder, folder.with_name(f"{folder.name}-plain"))
    assert read_folder(tmp_path / "experts-plain") == read_folder(tmp_path / "source-plain")


JOINED = """\
about: an expert's gate and up in one tensor
model_types: [test]
dims: {E: num_experts, I: moe_intermediate_size, H: hidden_size}
layouts:
  hub:
    "{block}.mlp.experts.gate_proj [E, I, H]": gate
    "{block}.mlp.experts.up_proj [E, I, H]": up
  experts:
    "{block}.mlp.experts.{expert}.gate_up_proj.weight [2*I, H]": {concat: [gate, up]}
"""


def test_a_layout_that_joins_matrices_is_no_way_to_decode_them(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(JOINED)
    tensors = {}
    for part in ("gate", "up"):
        stem = f"model.layers.0.mlp.experts.{part}_proj"
        tensors[stem] = tensor((E, I, H), "F8_E4M3", seed=part)
        tensors[f"{stem}_scale_inv"] = tensor((E, 2, 1), "F32", seed=part)
    source = write_folder(tmp_path / "source", tensors, {**CONFIG, "model_type": "test"}, 1)
    message = refused("dequantize", source, tmp_path / "made", "--recipe", tmp_path / "r.yaml", within=tmp_path)
    assert "would be joined from several matrices" in message


def test_a_form_that_the_table_lacks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(JOINED.replace("layouts:", "forms: [fp9]\nlayouts:"))
    message = refused("recipes", "check", tmp_path / "r.yaml", within=tmp_path)
    assert "unknown form 'fp9'" in message
    assert "fp8" in message


def test_gpt_oss_is_quantized_again_in_one_pass(tmp_path: Path) -> None:
    source = gpt_oss(tmp_path / "source")
    succeeds("dequantize", source, tmp_path / "plain")
    for folder in (source, tmp_path / "plain"):
        succeeds("quantize", folder, folder.with_name(f"{folder.name}-made"), "--format", "fp8_dynamic")
    assert read_folder(tmp_path / "source-made") == read_folder(tmp_path / "plain-made")


@pytest.mark.parametrize("change", ["scales", "shape"])
def test_broken_mxfp4_of_gpt_oss_is_refused(tmp_path: Path, change: str) -> None:
    source = gpt_oss(tmp_path / "source")
    tensors = read_folder(source)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    del tensors[name]
    if change == "shape":
        tensors[name] = tensor((6, 64, 2), "U8")
    broken = write_folder(tmp_path / "broken", tensors, config_of(source), 1)
    message = refused("dequantize", broken, tmp_path / "made", within=tmp_path)
    assert "down_proj" in message


def test_every_form_of_the_table_is_tested() -> None:
    assert {form.name for form in load_forms()} <= {*MOVING, *WRITTEN.values(), "modelopt_nvfp4", "per_tensor"}


def test_inspect_names_the_form(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", experts("nvfp4"), CONFIG, 1)
    report = json.loads(succeeds("inspect", source, "--json").out)
    assert {group["form"] for group in report["experts"]} == {"nvfp4"}
    assert [group["parts"] for group in report["experts"]] == [["gate", "up", "down"]]
