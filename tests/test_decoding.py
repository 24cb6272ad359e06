"""Every form of quantized experts that moeconv reads, against arithmetic of its own and against compressed-tensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme  # type: ignore[import-untyped]
from torch import Tensor

from moeconv.encoded import format_of_module
from moeconv.formats import FP4_DIALECTS, Decoder, MxFp8
from moeconv.forms import load_forms
from moeconv.tensors import Spec
from tests.commands import refused, succeeds
from tests.compressed import compressor_of
from tests.folders import read_folder
from tests.meter import Meter
from tests.test_forms import CONFIG, E, H, I, folder_tensors, save, stored

TORCH = {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "I8": torch.int8, "U8": torch.uint8,
    "I32": torch.int32, "I64": torch.int64, "BF16": torch.bfloat16, "F32": torch.float32,
}  # fmt: skip
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
FORMS = [
    "fp8", "fp8_scale", "fp4_scale", "mxfp8", "mxfp8_ct", "nvfp4", "mxfp4", "modelopt_nvfp4", "per_tensor",
    "per_tensor_array", "channel int8",
]  # fmt: skip


def matrix(form: str, rows: int, columns: int, seed: int) -> dict[str, Tensor]:
    """All that a quantized matrix consists of: any codes, scales near those of trained models."""
    random = torch.Generator().manual_seed(seed)
    made = {}
    for word, (dtype, shape) in stored(form, rows, columns).items():
        if "scale" in word and dtype in ("U8", "F8_E8M0"):
            made[word] = torch.randint(112, 125, shape, generator=random, dtype=torch.uint8).view(TORCH[dtype])
        elif "scale" in word and dtype == "F8_E4M3":
            made[word] = torch.randint(1, 0x7F, shape, generator=random, dtype=torch.uint8).view(TORCH[dtype])
        elif "scale" in word:
            made[word] = (torch.rand(shape, generator=random) * 0.1 + 0.01).to(TORCH[dtype])
        else:
            codes = torch.randint(0, 256, (*shape[:-1], shape[-1] * TORCH[dtype].itemsize), generator=random)
            if dtype == "F8_E4M3":  # no NaN
                codes[(codes & 0x7F) == 0x7F] = 0
            made[word] = codes.to(torch.uint8).view(TORCH[dtype])
    return made


def decoded(form: str, parts: dict[str, Tensor]) -> Tensor:
    """In float32, by tables."""
    codes = parts.get("weight", parts.get("weight_packed"))
    assert codes is not None
    scales = {word: item for word, item in parts.items() if word.endswith(("scale", "scale_inv", "scale_2"))}
    scale = next(item for word, item in scales.items() if word in ("scale", "weight_scale", "weight_scale_inv"))
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        factors = torch.exp2(scale.view(torch.uint8).float() - 127)
    else:
        factors = scale.float()
    if "weight_global_scale" in parts:
        factors = factors / parts["weight_global_scale"]
    if "weight_scale_2" in parts:
        factors = factors * parts["weight_scale_2"]
    if codes.dtype in (torch.uint8,) or form == "fp4_scale":
        pairs = codes.view(torch.uint8).long()
        numbers = torch.stack((E2M1[pairs & 15], E2M1[pairs >> 4]), -1).flatten(1)
    else:
        numbers = codes.float()
    rows, columns = numbers.shape
    if form in ("fp8", "fp8_scale"):
        return numbers * factors.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    if factors.dim() < 2:
        return numbers * factors
    return numbers * factors.repeat_interleave(columns // factors.shape[1], 1)


def checkpoint(folder: Path, form: str) -> Path:
    tensors = {"model.layers.0.input_layernorm.weight": torch.ones(H, dtype=torch.bfloat16)}
    for number, (name, (rows, columns)) in enumerate(names().items()):
        tensors |= {f"{name}.{word}": item for word, item in matrix(form, rows, columns, number).items()}
    return save(folder, tensors, CONFIG)


def names() -> dict[str, tuple[int, int]]:
    sizes = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
    return {f"model.layers.0.mlp.experts.{e}.{part}": size for e in range(E) for part, size in sizes.items()}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_decoded_one_by_one_and_packed(tmp_path: Path, form: str) -> None:
    source = checkpoint(tmp_path / "source", form)
    succeeds("dequantize", source, tmp_path / "plain")
    found = folder_tensors(tmp_path / "plain")
    assert set(found) == {f"{name}.weight" for name in names()} | {"model.layers.0.input_layernorm.weight"}
    for number, (name, (rows, columns)) in enumerate(names().items()):
        wanted = decoded(form, matrix(form, rows, columns, number)).to(torch.bfloat16)
        assert wanted.isfinite().all()
        assert torch.equal(found[f"{name}.weight"].view(torch.int16), wanted.view(torch.int16)), name
    succeeds("verify", tmp_path / "plain", "--against", source)
    if form not in ("modelopt_nvfp4", "per_tensor"):  # scales without an axis stay one by one
        succeeds("pack", source, tmp_path / "packed")
        succeeds("dequantize", tmp_path / "packed", tmp_path / "again")
        assert read_folder(tmp_path / "again") == read_folder(tmp_path / "plain")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_quantized_again_in_one_pass(tmp_path: Path, form: str) -> None:
    source = checkpoint(tmp_path / "source", form)
    succeeds("dequantize", source, tmp_path / "plain")
    succeeds("quantize", tmp_path / "plain", tmp_path / "two", "--format", "w8a16")
    result = succeeds("quantize", source, tmp_path / "one", "--format", "w8a16")
    assert read_folder(tmp_path / "one") == read_folder(tmp_path / "two")
    has_static = any(word.startswith("input") for word in stored(form, I, H))
    assert ("static scales for activations are dropped" in result.err) == has_static


def test_every_form_of_the_table_is_decoded() -> None:
    written = {"channel", "fp8_block", "int4", "int8"}  # by formats, held in test_quantize.py
    assert {form.name for form in load_forms()} <= {*FORMS, *written}


@pytest.mark.parametrize("form", ["fp8_scale", "mxfp8_ct", "nvfp4", "mxfp4"])
def test_a_scale_of_another_shape_is_refused(tmp_path: Path, form: str) -> None:
    source = checkpoint(tmp_path / "source", form)
    tensors = folder_tensors(source)
    name = next(
        name for name in tensors if name.endswith("experts.3.up_proj.weight_scale") or name.endswith("up_proj.scale")
    )
    tensors[name] = tensors[name][:-1]
    save(tmp_path / "broken", tensors, CONFIG)
    message = refused("dequantize", tmp_path / "broken", tmp_path / "plain", within=tmp_path)
    assert "up_proj" in message


PRESETS = {"nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16", "mxfp8_ct": "MXFP8A16"}


@pytest.mark.parametrize("form", PRESETS)
def test_compressed_tensors_decodes_to_the_same(form: str) -> None:
    scheme: QuantizationScheme = preset_name_to_scheme(PRESETS[form], ["Linear"])
    parts = matrix(form, 64, 128, 7)
    reference = compressor_of(scheme).decompress(
        {word: item for word, item in parts.items() if not word.startswith("input")}, scheme
    )["weight"]
    assert torch.equal(decoded(form, parts).to(reference.dtype), reference)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_known_by_the_name_of_its_format(form: str) -> None:
    specs = [Spec(f"a.{word}", dtype, shape) for word, (dtype, shape) in stored(form, I, H).items()]
    name = format_of_module(specs, CONFIG)
    assert name in {
        *(dialect.name for dialect in FP4_DIALECTS), MxFp8.name, "fp8", "w8a8", "fp8_tensor",
    }  # fmt: skip


@pytest.mark.parametrize("decoder", [*FP4_DIALECTS, MxFp8()], ids=lambda decoder: decoder.name)
def test_decoding_holds_no_more_than_it_says(decoder: Decoder) -> None:
    rows, columns = 256, 4096
    parts = {}
    for part in decoder.parts((rows, columns), "F32"):
        size = torch.zeros(part.shape).numel() * TORCH[part.dtype].itemsize
        raw = torch.randint(1, 0x7F, (size,), dtype=torch.uint8)
        shape = (part.shape[0], -1) if len(part.shape) > 1 else part.shape
        parts[part.suffix] = raw.view(TORCH[part.dtype]).reshape(shape)
    with Meter(*parts.values()) as used:
        decoder.decode(parts, columns, torch.bfloat16)
    assert used.peak <= decoder.live_nbytes * rows * columns


MIXTRAL = {"model_type": "mixtral", "num_local_experts": E, "intermediate_size": I, "hidden_size": H}


def test_a_router_goes_where_its_decoded_experts_go(tmp_path: Path) -> None:
    tensors = {"model.layers.0.block_sparse_moe.gate.weight": torch.ones(E, H, dtype=torch.bfloat16)}
    for number, (name, (rows, columns)) in enumerate(names().items()):
        own = name.replace("mlp", "block_sparse_moe")
        own = own.replace("gate_proj", "w1").replace("up_proj", "w3").replace("down_proj", "w2")
        tensors |= {f"{own}.{word}": item for word, item in matrix("fp8", rows, columns, number).items()}
    source = save(tmp_path / "source", tensors, MIXTRAL)
    succeeds("dequantize", source, tmp_path / "plain")
    succeeds("pack", source, tmp_path / "packed")
    assert "model.layers.0.mlp.gate.weight" in read_folder(tmp_path / "packed")
    result = succeeds("dequantize", tmp_path / "packed", tmp_path / "again")
    assert "experts are written one by one: `moeconv pack` joins them" in result.err
    assert read_folder(tmp_path / "again") == read_folder(tmp_path / "plain")


@pytest.mark.parametrize("form", ["modelopt_nvfp4", "per_tensor"])
def test_numbers_of_matrices_that_are_packed_alone_are_decoded(tmp_path: Path, form: str) -> None:
    """Without a gate nothing is joined: the experts' numbers without an axis are stacked to one axis."""
    tensors = {}
    for expert in range(E):
        for part, (rows, columns) in {"up_proj": (I, H), "down_proj": (H, I)}.items():
            stem = f"backbone.layers.1.mixer.experts.{expert}.{part}"
            tensors |= {f"{stem}.{word}": item for word, item in matrix(form, rows, columns, expert).items()}
    config = {"model_type": "nemotron_h", "n_routed_experts": E, "moe_intermediate_size": I, "hidden_size": H}
    source = save(tmp_path / "source", tensors, config)
    succeeds("dequantize", source, tmp_path / "plain")
    succeeds("pack", source, tmp_path / "packed")
    succeeds("dequantize", tmp_path / "packed", tmp_path / "again")
    assert read_folder(tmp_path / "again") == read_folder(tmp_path / "plain")


ATTENTION = "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("lost", "added", "says"),
    [
        ("weight_scale", None, "o_proj.weight I8 [128, 128] has no scales"),
        (None, "pre_quant_scale", "o_proj.pre_quant_scale changes what the codes beside it mean"),
        (None, "weight_g_idx", "o_proj.weight_g_idx changes what the codes beside it mean"),
    ],
)
@pytest.mark.parametrize("command", [["dequantize"], ["quantize", "--format", "w8a16"]], ids=lambda words: words[0])
def test_what_would_be_decoded_wrongly_is_refused(
    tmp_path: Path, lost: str | None, added: str | None, says: str, command: list[str]
) -> None:
    """Also outside experts, where no recipe claims anything."""
    source = checkpoint(tmp_path / "source", "channel int8")
    tensors = folder_tensors(source)
    tensors |= {f"{ATTENTION}.{word}": item for word, item in matrix("channel int8", H, H, 99).items()}
    tensors.pop(f"{ATTENTION}.{lost}", None)
    if added:
        tensors[f"{ATTENTION}.{added}"] = torch.ones(H)
    quantization = {"quantization_config": {"quant_method": "compressed-tensors"}}
    broken = save(tmp_path / "broken", tensors, CONFIG | quantization)
    name, *options = command
    assert says in refused(name, broken, tmp_path / "made", *options, within=tmp_path)


@pytest.mark.parametrize("command", [["dequantize"], ["quantize", "--format", "w8a16"]], ids=lambda words: words[0])
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"transform_config": {"config_groups": {"R2": {"type": "hadamard"}}}}, "weights are rotated"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "weights are stored sparse"),
    ],
)
def test_what_is_done_beside_quantizing_is_refused(
    tmp_path: Path, command: list[str], settings: dict[str, Any], says: str
) -> None:
    source = checkpoint(tmp_path / "source", "channel int8")
    quantization = {"quantization_config": {"quant_method": "compressed-tensors", **settings}}
    made = save(tmp_path / "made", folder_tensors(source), CONFIG | quantization)
    name, *options = command
    assert says in refused(name, made, tmp_path / "plain", *options, within=tmp_path)
    harmless = {"transform_config": {}, "sparsity_config": {"format": "dense"}}
    quantization = {"quantization_config": {"quant_method": "compressed-tensors", **harmless}}
    succeeds(name, save(tmp_path / "dense", folder_tensors(source), CONFIG | quantization), tmp_path / "b", *options)


@pytest.mark.parametrize("has_settings", [False, True])
def test_codes_are_found_whatever_file_says_that_there_are_any(tmp_path: Path, has_settings: bool) -> None:
    source = checkpoint(tmp_path / "source", "modelopt_nvfp4")
    tensors = folder_tensors(source) | {f"{ATTENTION}.weight": torch.ones(H, H // 2, dtype=torch.uint8)}
    broken = save(tmp_path / "broken", tensors, CONFIG)
    if has_settings:
        (broken / "hf_quant_config.json").write_text("{}")
        assert f"{ATTENTION}.weight U8" in refused("dequantize", broken, tmp_path / "made", within=tmp_path)
    else:
        succeeds("dequantize", broken, tmp_path / "made")


@pytest.mark.parametrize("word", ["input_quantizer._pre_quant_scale", "svdquant_lora_a", "smooth_scale"])
def test_factors_beside_codes_are_refused(tmp_path: Path, word: str) -> None:
    source = checkpoint(tmp_path / "source", "modelopt_nvfp4")
    tensors = folder_tensors(source)
    name = next(name for name in tensors if name.endswith("experts.1.up_proj.weight"))
    tensors[name.removesuffix("weight") + word] = torch.ones(H)
    broken = save(tmp_path / "broken", tensors, CONFIG)
    assert word in refused("dequantize", broken, tmp_path / "made", within=tmp_path)


def test_eight_bits_with_exponents_are_read_as_minimax_says(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "mxfp8_ct")
    tensors = {n.replace("weight_scale", "weight_scale_inv"): t for n, t in folder_tensors(source).items()}
    succeeds("dequantize", source, tmp_path / "plain")
    for settings in ({"quant_method": "mxfp8"}, {"quant_method": "fp8", "weight_block_size": [1, 32]}):
        method = settings["quant_method"]
        other = save(tmp_path / str(method), tensors, CONFIG | {"quantization_config": settings})
        succeeds("dequantize", other, tmp_path / f"{method}-plain")
        assert read_folder(tmp_path / f"{method}-plain") == read_folder(tmp_path / "plain")


def test_four_bits_are_read_under_the_name_that_transformers_gives_to_scales(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "fp4_scale")
    tensors = {re.sub(r"\.scale$", ".weight_scale_inv", n): t for n, t in folder_tensors(source).items()}
    other = save(tmp_path / "other", tensors, CONFIG)
    for name, folder in (("a", source), ("b", other)):
        succeeds("dequantize", folder, tmp_path / name)
    assert read_folder(tmp_path / "a") == read_folder(tmp_path / "b")


@pytest.mark.parametrize("command", ["dequantize", "pack"])
def test_lost_zero_points_are_not_taken_for_none(tmp_path: Path, command: str) -> None:
    tensors = {}
    for number, (name, (rows, columns)) in enumerate(names().items()):
        tensors |= {f"{name}.{word}": item for word, item in matrix("int4", rows, columns, number).items()}
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    groups = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    settings = {"quantization_config": {"quant_method": "compressed-tensors", **groups}}
    source = save(tmp_path / "source", tensors, CONFIG | settings)
    message = refused(command, source, tmp_path / "made", within=tmp_path)
    assert "zero_point" in message or "of no known form" in message
