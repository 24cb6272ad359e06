"""NVFP4: one scale for the whole of all matrices that engines fuse, wherever they lie and however they are cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme  # type: ignore[import-untyped]
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam  # type: ignore[import-untyped]
from safetensors.torch import load_file, save_file

from moeconv.ops import parts_of
from moeconv.recipe_file import load_shipped
from moeconv.scheme import load_defaults
from tests.commands import refused, run, succeeds
from tests.compressed import compressor_of
from tests.test_quantize import config_of, folder_tensors, sources

__all__ = ["sources"]  # a fixture

FORMATS = {"nvfp4a16": "weight_global_scale", "modelopt_nvfp4": "weight_scale_2"}
#: Modules that share: all that end so, in one parent.
TOGETHER = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3")]


def groups_of(names: list[str]) -> dict[str, list[str]]:
    """For each module, all that share its scale."""
    modules = {name.removesuffix(".weight") for name in names}
    found = {}
    for module in modules:
        parent, _, last = module.rpartition(".")
        group = next((group for group in TOGETHER if last in group), (last,))
        found[module] = [f"{parent}.{word}" for word in group if f"{parent}.{word}" in modules]
    return found


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("tile", [1 << 20, 1 << 11], ids=["whole", "in small tiles"])
def test_a_shared_scale_is_that_of_the_largest(
    sources: dict[str, Path], tmp_path: Path, model_type: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part, against compressed-tensors with the scale of the largest magnitude of all that share it."""
    monkeypatch.setattr("moeconv.budget.CPU_TILE_ELEMENTS", (tile,))
    monkeypatch.setattr("moeconv.tasks.TASK_BYTES", 4 * tile)
    succeeds("quantize", sources[model_type], tmp_path / "made", "--format", "nvfp4a16", "--jobs", "2")
    made, before = folder_tensors(tmp_path / "made"), folder_tensors(sources[model_type])
    quantized = [name for name in before if name not in made]
    assert any("experts" in name for name in quantized)
    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    unlike = 0
    for module, group in groups_of(quantized).items():
        most = torch.stack([before[f"{other}.weight"].abs().amax() for other in group])
        unlike += len(set(most.tolist())) > 1
        factor = generate_gparam(-most.amax(), most.amax())
        matrix = before[f"{module}.weight"]
        pieces = matrix.reshape(len(matrix), -1, 16)
        scale, _ = calculate_qparams(pieces.amin(-1), pieces.amax(-1), scheme.weights, global_scale=factor)
        parts = {"weight": matrix.float(), "weight_scale": scale.float(), "weight_global_scale": factor}
        for suffix, expected in compressor_of(scheme).compress(parts, scheme).items():
            found = made[f"{module}.{suffix}"]
            assert found.dtype == expected.dtype
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), f"{module}.{suffix}"
    assert unlike  # or nothing was shared
    succeeds("verify", tmp_path / "made", "--against", sources[model_type])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("between", ["fp8_dynamic", "w4a16"])
def test_a_quantized_source_is_measured_as_it_is_decoded(
    sources: dict[str, Path], tmp_path: Path, name: str, between: str
) -> None:
    succeeds("quantize", sources["mixtral"], tmp_path / "between", "--format", between)
    succeeds("dequantize", tmp_path / "between", tmp_path / "plain")
    succeeds("quantize", tmp_path / "plain", tmp_path / "wanted", "--format", name)
    succeeds("quantize", tmp_path / "between", tmp_path / "made", "--format", name)
    wanted, found = folder_tensors(tmp_path / "wanted"), folder_tensors(tmp_path / "made")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[key].view(-1), item.view(-1)) for key, item in wanted.items())
    experts = "model.layers.0.block_sparse_moe.experts.1"
    assert f"{experts}.w1.{FORMATS[name]}" in found
    assert found[f"{experts}.w1.{FORMATS[name]}"] == found[f"{experts}.w3.{FORMATS[name]}"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_value_that_is_no_number_is_named_where_it_is(sources: dict[str, Path], tmp_path: Path, name: str) -> None:
    """It is found when the gate's matrix is to be encoded, and lies in the other one."""
    source, culprit = tmp_path / "source", "model.layers.1.mlp.experts.3.up_proj.weight"
    source.mkdir()
    for path in sources["qwen3_moe"].iterdir():
        if path.suffix != ".safetensors":
            (source / path.name).write_bytes(path.read_bytes())
            continue
        tensors = load_file(path)
        if culprit in tensors:
            tensors[culprit][7, 9] = torch.inf
        save_file(tensors, source / path.name, {"format": "pt"})
    message = run("quantize", source, tmp_path / "made", "--format", name).err
    assert f"{culprit} holds NaN or infinite values in rows " in message
    succeeds("quantize", source, tmp_path / "made", "--format", name, "--allow-nonfinite", "--overwrite")


def test_what_is_nvfp4_already_cannot_share_with_what_is_not(sources: dict[str, Path], tmp_path: Path) -> None:
    succeeds("quantize", sources["mixtral"], tmp_path / "first", "--format", "nvfp4a16")
    first, plain = folder_tensors(tmp_path / "first"), folder_tensors(sources["mixtral"])
    names = [name for name in plain if ".w3." in name]
    for name in names:
        for suffix in ("weight_packed", "weight_scale", "weight_global_scale"):
            del first[name.removesuffix("weight") + suffix]
        first[name] = plain[name]
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    save_file(first, mixed / "model.safetensors")
    (mixed / "config.json").write_text((tmp_path / "first" / "config.json").read_text())
    message = refused("quantize", mixed, tmp_path / "made", "--format", "nvfp4a16", within=tmp_path)
    assert "w1.weight has its format already, what engines fuse with it has not" in message
    assert "Dequantize the checkpoint first" in message
    succeeds("dequantize", mixed, tmp_path / "plain")


def test_whatever_a_packed_layout_joins_shares_a_scale() -> None:
    """Matrices that stand in one packed tensor are fused by engines."""
    together = [set(group) for group in load_defaults().together]
    joined = 0
    for recipe in load_shipped():
        if "experts" not in recipe.layouts:
            continue
        goal = recipe.layout("experts")
        for component in recipe.components:
            names = {part: str(rule.pattern) for rule in component.rules[goal] for part in parts_of(rule.value)}
            for rule in (rule for layout, rules in component.rules.items() if layout != goal for rule in rules):
                words = [names[part].split(".")[-2] for part in parts_of(rule.value) if names[part].endswith(".weight")]
                if len(words) > 1:
                    joined += 1
                    assert any(set(words) <= group for group in together), f"{recipe.name}: {words}"
    assert joined > 20


def test_modelopt_is_told_in_both_files(sources: dict[str, Path], tmp_path: Path) -> None:
    import json

    succeeds("quantize", sources["qwen3_moe"], tmp_path / "made", "--format", "modelopt_nvfp4")
    config = config_of(tmp_path / "made")["quantization_config"]
    beside = json.loads((tmp_path / "made" / "hf_quant_config.json").read_text())["quantization"]
    assert config["quant_method"] == "modelopt"
    assert config["quant_algo"] == beside["quant_algo"] == "W4A16_NVFP4"
    assert config["ignore"] == beside["exclude_modules"]
    assert "lm_head" in config["ignore"]
    assert beside["group_size"] == config["config_groups"]["group_0"]["weights"]["group_size"] == 16
    (tmp_path / "made" / "hf_quant_config.json").unlink()
    report = refused("verify", tmp_path / "made", "--against", sources["qwen3_moe"], within=tmp_path)
    assert "hf_quant_config.json is not the one of this conversion" in report


@pytest.mark.parametrize("rules", ["modelopt_nvfp4", "fp8"])
def test_some_formats_stand_alone(sources: dict[str, Path], tmp_path: Path, rules: str) -> None:
    recipe = tmp_path / "rules.yaml"
    recipe.write_text(
        f'quantize:\n  - {{match: "*.experts.*", format: {rules}}}\n  - {{match: "*.self_attn.*", format: w8a8}}\n'
    )
    message = refused("quantize", sources["qwen3_moe"], tmp_path / "made", "--recipe", recipe, within=tmp_path)
    assert f"{rules} cannot stand beside another format" in message


@pytest.mark.parametrize("name", FORMATS)
def test_one_dialect_of_nvfp4_becomes_the_other_with_the_same_codes(
    sources: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """A rename, and the scale of the whole as its reciprocal."""
    other = next(key for key in FORMATS if key != name)
    codes = {"nvfp4a16": "weight_packed", "modelopt_nvfp4": "weight"}
    succeeds("quantize", sources["mixtral"], tmp_path / "first", "--format", name)
    result = succeeds("quantize", tmp_path / "first", tmp_path / "made", "--format", other)
    first, made = folder_tensors(tmp_path / "first"), folder_tensors(tmp_path / "made")
    modules = [key.removesuffix(f".{FORMATS[name]}") for key in first if key.endswith(FORMATS[name])]
    assert len(modules) > 30
    for module in modules:
        assert torch.equal(first[f"{module}.{codes[name]}"], made[f"{module}.{codes[other]}"])
        scales = first[f"{module}.weight_scale"], made[f"{module}.weight_scale"]
        assert torch.equal(*(item.view(torch.uint8) for item in scales))
        assert torch.equal(
            1 / first[f"{module}.{FORMATS[name]}"].flatten(), made[f"{module}.{FORMATS[other]}"].flatten()
        )
    assert "encoded anew" not in result.err
    succeeds("verify", tmp_path / "made", "--against", tmp_path / "first")
    # Decoded, nothing differs but the last bit of a product.
    for folder in ("first", "made"):
        succeeds("dequantize", tmp_path / folder, tmp_path / f"{folder}-plain", "--dtype", "float32")
    one, two = folder_tensors(tmp_path / "first-plain"), folder_tensors(tmp_path / "made-plain")
    assert all(torch.allclose(two[key], item, rtol=3e-7, atol=0) for key, item in one.items())


@pytest.mark.parametrize("name", FORMATS)
def test_scales_that_engines_cannot_fuse_are_made_anew(sources: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Some tools give gate and up of an expert scales of their own; an engine takes one of them for both."""
    succeeds("quantize", sources["mixtral"], tmp_path / "first", "--format", "nvfp4a16")
    first = folder_tensors(tmp_path / "first")
    torn = "model.layers.1.block_sparse_moe.experts.2.w3"
    first[f"{torn}.weight_global_scale"] *= 1.5
    source = tmp_path / "torn"
    source.mkdir()
    save_file(first, source / "model.safetensors")
    (source / "config.json").write_text((tmp_path / "first" / "config.json").read_text())
    result = succeeds("quantize", source, tmp_path / "made", "--format", name)
    assert "2 matrices have another scale for the whole" in result.err
    made = folder_tensors(tmp_path / "made")
    scale = FORMATS[name]
    assert torch.equal(made[f"{torn}.{scale}"], made[f"{torn.removesuffix('3')}1.{scale}"])
    for folder in (source, tmp_path / "made"):
        succeeds("dequantize", folder, folder.with_name(f"{folder.name}-plain"))
    before, after = folder_tensors(tmp_path / "torn-plain"), folder_tensors(tmp_path / "made-plain")
    error = (before[f"{torn}.weight"].float() - after[f"{torn}.weight"].float()).norm()
    assert error < 0.1 * before[f"{torn}.weight"].float().norm()
    other = "model.layers.1.block_sparse_moe.experts.1.w3"
    assert torch.allclose(before[f"{other}.weight"].float(), after[f"{other}.weight"].float(), rtol=0.01)
