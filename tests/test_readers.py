"""What config.json tells engines of a quantized folder, where names or layouts make that hard, and what plans say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moeconv.config_json import groups_of, rewritten
from moeconv.formats import make_format
from tests.commands import refused, run, succeeds
from tests.families import build, model_class, save_published
from tests.test_quantize import config_of, decoded, folder_tensors, rounded

SIZES: dict[str, Any] = {
    "hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "num_experts": 4, "num_local_experts": 4, "head_dim": 16,
}  # fmt: skip


def source_of(folder: Path, model_type: str, **own: Any) -> Path:
    model = build(model_type, 3, {**SIZES, **own})
    if own.get("tie_word_embeddings"):
        model.tie_weights()
    save_published(model, folder, "1MB")
    return folder


def test_a_head_that_is_the_embedding_is_not_taken_for_a_quantized_one(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "qwen3_moe", tie_word_embeddings=True)
    assert "lm_head.weight" not in folder_tensors(source)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = model_class("qwen3_moe").from_pretrained(source, dtype=torch.bfloat16)(ids).logits
    for name, options in (("w4a16", ("--group-size", "32")), ("fp8_dynamic", ()), ("mxfp4a16", ())):
        succeeds("quantize", source, tmp_path / name, "--format", name, *options)
        with torch.no_grad():
            after = model_class("qwen3_moe").from_pretrained(tmp_path / name, dtype=torch.bfloat16)(ids).logits
        assert float((after - before).norm() / before.norm()) < 0.5, name


@pytest.mark.parametrize(
    ("model_type", "name", "is_read"),
    [("phimoe", "mxfp4a16", True), ("olmoe", "nvfp4a16", False), ("hunyuan_v1_moe", "nvfp4a16", False)],
)
def test_other_families_are_read_as_the_plan_says(tmp_path: Path, model_type: str, name: str, is_read: bool) -> None:
    source = source_of(tmp_path / "source", model_type)
    said = succeeds("quantize", source, tmp_path / "made", "--format", name).err
    assert ("without a word" in said) is not is_read
    loaded = model_class(model_type).from_pretrained(tmp_path / "made", dtype=torch.bfloat16)
    loaded(torch.arange(8)[None])  # which decodes what is not decoded yet
    found = dict(loaded.named_parameters())
    (expected_experts,) = [  # of the first layer, in the order of the packed form
        torch.stack([torch.cat([matrices[f"{at}.{e}.{gate}"], matrices[f"{at}.{e}.{up}"]]) for e in range(4)])
        for matrices in [{key: rounded(key, item) for key, item in decoded(tmp_path / "made").items()}]
        for at, gate, up in [
            ("model.layers.0.block_sparse_moe.experts", "w1.weight", "w3.weight")
            if model_type == "phimoe"
            else ("model.layers.0.mlp.experts", "gate_proj.weight", "up_proj.weight")
        ]
    ]
    assert torch.equal(found["model.layers.0.mlp.experts.gate_up_proj"], expected_experts) is is_read


def test_families_that_transformers_cannot_read_one_by_one_are_named(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "granitemoe")
    said = succeeds("quantize", source, tmp_path / "made", "--format", "mxfp4a16").err
    assert "transformers 5.23 does not read this result" in said
    assert "transformers" not in succeeds("quantize", source, tmp_path / "packed", "--format", "nf4").err


def test_experts_that_stay_packed_are_listed(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "qwen3_5_moe_text")
    experts = [name for name in folder_tensors(source) if name.endswith("mlp.experts.gate_up_proj")]
    options = ("--format", "mxfp4a16", "--ignore", "*.experts*")
    said = succeeds("quantize", source, tmp_path / "attention", *options).err
    assert "does not know these stacks" not in said
    ignored = config_of(tmp_path / "attention")["quantization_config"]["ignore"]
    assert {name.rpartition(".")[0] for name in experts} <= set(ignored)
    # Where other layers are quantized, all layers are in one layout, and every kept expert is listed.
    succeeds("quantize", source, tmp_path / "layers", "--format", "mxfp4a16", "--ignore", "*.layers.0.mlp.experts*")
    tensors = folder_tensors(tmp_path / "layers")
    assert not any(name.endswith("experts.gate_up_proj") for name in tensors)
    kept = {
        name.removesuffix(".weight")
        for name in tensors
        if re.search(r"layers\.0\.mlp\.experts\.\d+\.\w+\.weight$", name)
    }
    assert len(kept) == 12
    assert kept <= set(config_of(tmp_path / "layers")["quantization_config"]["ignore"])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("*.layers.0.mlp.experts*", "some experts would be gptoss_mxfp4 and some not"),
        ("*.self_attn.*", "cannot be gptoss_mxfp4: only experts can have it"),
    ],
)
def test_openai_s_format_is_for_all_experts_and_nothing_else(tmp_path: Path, rule: str, message: str) -> None:
    source = source_of(tmp_path / "source", "gpt_oss", tie_word_embeddings=False)
    rules = tmp_path / "rules.yaml"
    rules.write_text(f'quantize:\n  - {{match: "{rule}", format: gptoss_mxfp4}}\n')
    assert message in refused("quantize", source, tmp_path / "made", "--recipe", rules, within=tmp_path)
    options = ("--target-size", "1MB", "--formats", "gptoss_mxfp4")
    assert "all experts of a model or none" in run("quantize", source, tmp_path / "made", *options).err


def test_rules_against_the_defaults_are_said(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "qwen3_moe")
    rules = tmp_path / "rules.yaml"
    rules.write_text('quantize:\n  - {match: "*lm_head", format: w4a16, group_size: 32}\n')
    made = succeeds("plan", "quantize", source, "--recipe", rules, "--format", "w4a16", "--group-size", "32").out
    assert "rules quantize what is kept by default, and engines may not read: lm_head" in made
    assert "yes (" not in made
    plain = succeeds("plan", "quantize", source, "--format", "w4a16", "--group-size", "32").out
    assert "yes (" in plain


def test_patterns_of_groups_fit_whatever_engines_put_before_the_layers() -> None:
    names = [f"model.language_model.layers.{layer}.mlp.{part}" for layer in range(3) for part in ("experts.1.up", "s")]
    vision = "model.visual.layers.1.mlp.s"  # of another group, of the same name but for the beginning
    formats = [make_format("w4a16", {}), make_format("fp8_dynamic", {}), make_format("w8a16", {})]
    modules = [[n for n in names if "experts" in n], [n for n in names if n.endswith("s")], [vision]]
    config = rewritten({"model_type": "x"}, groups_of(zip(formats, modules, strict=True)), [], None)["config.json"]
    groups = re.findall(r'"targets": \[(.*?)\]', config.decode(), re.DOTALL)
    patterns = [[text.encode().decode("unicode_escape") for text in re.findall(r'"re:(.*?)"', g)] for g in groups]
    for number, own in enumerate(modules):
        for name in own:
            fits = [any(re.match(pattern, name) for pattern in each) for each in patterns]
            assert fits == [other == number for other in range(3)], name
    assert any(re.match(p, "language_model.model.layers.2.mlp.experts.7.up") for p in patterns[0])


def test_settings_of_deepseek_v4_do_not_outlive_its_experts(tmp_path: Path) -> None:
    config = {"model_type": "deepseek_v4", "expert_dtype": "fp4"}
    for name, expected in (("fp8", "fp8"), ("w4a16", None)):
        made = rewritten(config, groups_of([(make_format(name, {}), ["a"])]), [], None)["config.json"].decode()
        assert re.findall(r'"expert_dtype": "(\w+)"', made) == ([expected] if expected else [])
