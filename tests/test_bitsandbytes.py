"""`nf4`, `fp4` and `int8`: codes, scales and states of bitsandbytes, bit for bit, and every way from and to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from moeconv.formats import CODEBOOKS, FLOATS, make_format
from moeconv.formats.bnb4 import dynamic_map
from tests.commands import refused, run, succeeds
from tests.families import build, model_class, save_published
from tests.folders import read_folder
from tests.golden.sources import MATRICES, matrix_of
from tests.meter import Meter
from tests.test_quantize import EVERY, FAMILIES, config_of, folder_tensors, save, sources

__all__ = ["sources"]  # a fixture

NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
EXPERTS = "model.layers.1.mlp.experts"
STATE = "quant_state.bitsandbytes__nf4"


def assert_bits(made: Tensor, reference: Tensor) -> None:
    assert (made.dtype, made.shape) == (reference.dtype, reference.shape)
    assert torch.equal(made.contiguous().view(torch.uint8), reference.contiguous().view(torch.uint8))


@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("content", [kind for kind in MATRICES if kind not in ("nan", "inf")])
def test_codes_and_scales_are_those_of_bitsandbytes(content: str, dtype: str, kind: str) -> None:
    matrix = matrix_of(content, dtype)
    codes, state = bnb.quantize_4bit(matrix, quant_type=kind)
    made = make_format(kind, {})
    packed, absmax = made.encode(matrix)
    assert_bits(packed, codes)
    assert_bits(absmax, state.absmax)
    parts = {"weight": packed, "weight.absmax": absmax}
    # The second zero of fp4 is decoded to -0.0 by bitsandbytes' kernel on some CPUs, to 0.0 on others.
    decoded = made.decode(parts, matrix.shape[1], matrix.dtype)
    assert_bits(decoded + 0.0, bnb.dequantize_4bit(codes, state) + 0.0)


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_every_bound_between_two_codes_and_the_floats_beside_it(kind: str) -> None:
    values = torch.tensor(sorted(CODEBOOKS[kind]))
    bounds = torch.cat([(values[1:] + values[:-1]) / 2, values, torch.linspace(-1, 1, 4099), torch.tensor([-0.0])])
    near = torch.cat([bounds, bounds.nextafter(torch.tensor(9.0)), bounds.nextafter(torch.tensor(-9.0))]).clamp(-1, 1)
    matrix = torch.zeros(len(near), 64)
    matrix[:, 0], matrix[:, 1] = 1.0, near
    codes, state = bnb.quantize_4bit(matrix, quant_type=kind)
    packed, absmax = make_format(kind, {}).encode(matrix)
    assert_bits(packed, codes)
    assert_bits(absmax, state.absmax)


@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(64, 256), (3, 192), (130, 1024)])
@pytest.mark.parametrize("factor", [1.0, 1e-4, 50.0])
def test_scales_that_are_quantized_are_those_of_bitsandbytes(
    shape: tuple[int, int], dtype: str, kind: str, factor: float
) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    matrix = (torch.randn(shape, generator=generator) * factor).to(getattr(torch, NAMES[dtype]))
    matrix[0] = 0
    codes, state = bnb.quantize_4bit(matrix, quant_type=kind, compress_statistics=True)
    made = make_format(kind, {"double_quant": True}).bound(shape, dtype)
    offset = made.joined([float(made.measured(matrix))])
    assert offset == pytest.approx(float(state.offset), rel=1e-6)
    packed, absmax, nested, said = made.encode(matrix, float(state.offset))
    assert_bits(packed, codes)
    assert_bits(absmax, state.absmax)
    assert_bits(nested, state.state2.absmax)
    reference = state.as_dict(packed=True)
    tensors = {"absmax": absmax, "nested_absmax": nested, f"quant_state.bitsandbytes__{kind}": said}
    parts = {part.suffix.removeprefix("weight."): part for part in made.parts(shape, dtype)}
    for word in ("quant_map", "nested_quant_map"):
        content = made.constant(parts[word], shape, dtype)
        assert content == reference[word].numpy().tobytes()
        tensors[word] = torch.frombuffer(bytearray(content), dtype=torch.float32)
    assert len(said) == parts[f"quant_state.bitsandbytes__{kind}"].shape[0]
    read = bnb.QuantState.from_dict(dict(tensors), torch.device("cpu"))
    assert (read.shape, read.dtype, float(read.offset)) == (matrix.shape, matrix.dtype, float(state.offset))
    assert_bits(bnb.dequantize_4bit(packed, read), bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize("shape", [(5, 24), (3, 7), (70, 1000)])
@pytest.mark.parametrize("double", [False, True])
def test_a_last_block_may_be_shorter(tmp_path: Path, shape: tuple[int, int], double: bool) -> None:
    """bitsandbytes quantizes linear layers of any shape."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    codes, state = bnb.quantize_4bit(matrix, quant_type="nf4", compress_statistics=double)
    name = "model.layers.0.self_attn.q_proj.weight"
    parts = {f"{name}.{word}": item for word, item in state.as_dict(packed=True).items()}
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    source = save(
        tmp_path / "made", {name: codes, **parts}, {"model_type": "qwen3_moe", "quantization_config": settings}
    )
    succeeds("dequantize", source, tmp_path / "plain")
    assert_bits(folder_tensors(tmp_path / "plain")[name], bnb.dequantize_4bit(codes, state))


def test_tables_are_those_of_bitsandbytes() -> None:
    assert_bits(torch.tensor(dynamic_map()), bnb.create_dynamic_map())
    for kind, values in CODEBOOKS.items():
        assert_bits(torch.tensor(values), bnb.get_4bit_type(kind, "cpu"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("content", [kind for kind in MATRICES if kind not in ("nan", "inf", "huge")])
def test_eight_bits_are_those_of_bitsandbytes(content: str, dtype: str) -> None:
    matrix = matrix_of(content, dtype)
    codes, scales, _ = bnb.int8_vectorwise_quant(matrix.half())
    made, absmax = make_format("int8", {}).encode(matrix)
    if not torch.isfinite(scales).all():
        assert not torch.isfinite(absmax).all()
        return
    assert_bits(absmax, scales)
    is_zero = scales == 0  # where bitsandbytes casts NaN
    assert_bits(made[~is_zero], codes[~is_zero])
    assert not made[is_zero].any()
    parts = {"weight": made, "SCB": absmax}
    assert_bits(make_format("int8", {}).decode(parts, matrix.shape[1]), bnb.int8_vectorwise_dequant(made, absmax))


@pytest.mark.parametrize("double", [(), ("--double-quant",)], ids=["plain", "double"])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("tile", [1 << 20, 1 << 14])
def test_a_folder_is_what_bitsandbytes_makes_of_the_fused_parameters(
    sources: dict[str, Path], tmp_path: Path, name: str, double: tuple[str, ...], tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whatever the tiles: an offset is the mean of all scales of a parameter."""
    monkeypatch.setattr("moeconv.budget.CPU_TILE_ELEMENTS", (tile,))
    succeeds("quantize", sources["qwen3_moe"], tmp_path / "made", "--format", name, *double)
    found = folder_tensors(tmp_path / "made")
    plain = model_class("qwen3_moe").from_pretrained(sources["qwen3_moe"], dtype=torch.bfloat16)
    packed = {key: item for key, item in plain.named_parameters() if f"{key}.absmax" in found}
    assert len(packed) == 2 * (2 + 4)
    kept = {key for key, _ in plain.named_parameters()} - packed.keys()
    assert {key for key in found if not any(key.startswith(own) for own in packed)} == kept
    for key, parameter in packed.items():
        codes, state = bnb.quantize_4bit(parameter.detach(), quant_type=name, compress_statistics=bool(double))
        assert_bits(found[key], codes)
        own = {
            word.removeprefix(f"{key}."): item for word, item in found.items() if word.startswith(f"{key}.")
        }  # fmt: skip
        reference = state.as_dict(packed=True)
        assert own.keys() == reference.keys()
        said = json.loads(bytes(own[f"quant_state.bitsandbytes__{name}"].tolist()))
        wanted = json.loads(bytes(reference[f"quant_state.bitsandbytes__{name}"].tolist()))
        if double:
            offset = said["nested_offset"]
            assert offset == pytest.approx(wanted["nested_offset"], rel=1e-6)
            absmax, nested = bnb.quantize_blockwise(
                bnb.quantize_4bit(parameter.detach(), quant_type=name)[1].absmax - torch.tensor(offset), blocksize=256
            )
            assert_bits(own["absmax"], absmax)
            assert_bits(own["nested_absmax"], nested.absmax)
            assert said == {**wanted, "nested_offset": offset}
        else:
            for word, item in reference.items():
                assert_bits(own[word], item)
    succeeds("verify", tmp_path / "made", "--against", sources["qwen3_moe"])


@pytest.mark.parametrize("first", ["nf4", "fp4", "nf4 --double-quant", "nf4 --experts per-expert", "fp8"])
@pytest.mark.parametrize("then", ["nf4", "w4a16", "nf4 --experts per-expert", "fp4 --double-quant"])
def test_in_one_pass_as_in_two(sources: dict[str, Path], tmp_path: Path, first: str, then: str) -> None:
    succeeds("quantize", sources["qwen3_moe"], tmp_path / "first", "--format", *first.split())
    succeeds("dequantize", tmp_path / "first", tmp_path / "plain")
    name = first.split()[0]
    is_kept = name == then.split()[0] == "nf4" and "double" not in first  # the codes, which is without loss
    succeeds("quantize", tmp_path / "first", tmp_path / "one", "--format", *then.split())
    succeeds("quantize", tmp_path / "plain", tmp_path / "two", "--format", *then.split())
    one, two = read_folder(tmp_path / "one"), read_folder(tmp_path / "two")
    assert one.keys() == two.keys()
    if is_kept:
        succeeds("dequantize", tmp_path / "one", tmp_path / "back")
        succeeds("convert", tmp_path / "back", tmp_path / "a", "--to", "packed")
        succeeds("convert", tmp_path / "plain", tmp_path / "b", "--to", "packed")
        assert read_folder(tmp_path / "a") == read_folder(tmp_path / "b")
    else:
        assert one == two


def test_what_is_packed_comes_back_as_bitsandbytes_decodes_it(sources: dict[str, Path], tmp_path: Path) -> None:
    succeeds("quantize", sources["mixtral"], tmp_path / "made", "--format", "nf4")
    succeeds("dequantize", tmp_path / "made", tmp_path / "plain")
    plain, made = folder_tensors(tmp_path / "plain"), folder_tensors(tmp_path / "made")
    fused = model_class("mixtral").from_pretrained(tmp_path / "plain").state_dict()
    source = model_class("mixtral").from_pretrained(sources["mixtral"], dtype=torch.bfloat16)
    for key, parameter in source.named_parameters():
        if f"{key}.absmax" in made:
            codes, state = bnb.quantize_4bit(parameter.detach(), quant_type="nf4")
            assert_bits(fused[key].to(torch.bfloat16), bnb.dequantize_4bit(codes, state))
    assert all(item.dtype == torch.bfloat16 for item in plain.values())


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_eight_bits_load_in_transformers_as_it_is(sources: dict[str, Path], tmp_path: Path, model_type: str) -> None:
    message = refused("quantize", sources[model_type], tmp_path / "no", "--format", "int8", within=tmp_path)
    assert "--experts keep leaves them as they are" in message
    succeeds("quantize", sources[model_type], tmp_path / "made", "--format", "int8", "--experts", "keep")
    made, before = folder_tensors(tmp_path / "made"), folder_tensors(sources[model_type])
    loaded = model_class(model_type).from_pretrained(tmp_path / "made", dtype=torch.bfloat16)
    found = dict(loaded.named_parameters())
    plain = dict(model_class(model_type).from_pretrained(sources[model_type], dtype=torch.bfloat16).named_parameters())
    quantized = {key.removesuffix(".SCB") for key in made if key.endswith(".SCB")}
    assert quantized
    for module in quantized:
        codes, scales, _ = bnb.int8_vectorwise_quant(before[f"{module}.weight"].half())
        parameter: Any = found[f"{module}.weight"]
        assert_bits(parameter.data, codes)
        assert_bits(parameter.SCB, scales)
    rest = {key for key in found if key.removesuffix(".weight") not in quantized}
    assert all(torch.equal(found[key].float(), plain[key].float()) for key in rest)
    loaded(torch.arange(8)[None])


def test_experts_one_by_one_are_bitsandbytes_own_form(sources: dict[str, Path], tmp_path: Path) -> None:
    succeeds("quantize", sources["qwen3_moe"], tmp_path / "made", "--format", "nf4", "--experts", "per-expert")
    found, before = folder_tensors(tmp_path / "made"), folder_tensors(sources["qwen3_moe"])
    for expert in range(12):
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = f"{EXPERTS}.{expert}.{part}.weight"
            codes, state = bnb.quantize_4bit(before[name], quant_type="nf4")
            assert_bits(found[name], codes)
            for word, item in state.as_dict(packed=True).items():
                assert_bits(found[f"{name}.{word}"], item)
    settings = config_of(tmp_path / "made")["quantization_config"]
    assert (settings["quant_method"], settings["load_in_4bit"]) == ("bitsandbytes", True)
    assert {"lm_head", "model.layers.1.mlp.gate"} <= set(settings["llm_int8_skip_modules"])


def test_quantizing_to_the_same_in_another_form_keeps_codes(sources: dict[str, Path], tmp_path: Path) -> None:
    """There and back is without loss: codes and scales are those of the blocks, wherever they lie."""
    succeeds("quantize", sources["mixtral"], tmp_path / "packed", "--format", "nf4")
    options = ("--format", "nf4", "--experts")
    succeeds("quantize", tmp_path / "packed", tmp_path / "one", *options, "per-expert")
    succeeds("quantize", tmp_path / "one", tmp_path / "again", *options, "packed")
    assert read_folder(tmp_path / "again") == read_folder(tmp_path / "packed")


def source_of(folder: Path, model_type: str, **own: int) -> Path:
    config = {**EVERY, **FAMILIES.get(model_type, {}), **own}
    save_published(build(model_type, 1, config), folder, "1MB")
    return folder


@pytest.mark.parametrize(
    ("sizes", "options", "says"),
    [
        ({"moe_intermediate_size": 72, "hidden_size": 20}, (), "blocks of 64 values would lie partly in one expert"),
        ({}, ("--double-quant",), "blocks of 16,384 values would lie partly in one expert"),
    ],
)
def test_blocks_that_straddle_experts_are_refused(
    tmp_path: Path, sizes: dict[str, int], options: tuple[str, ...], says: str
) -> None:
    source = source_of(
        tmp_path / "source", "qwen3_moe", **{"hidden_size": 64, "moe_intermediate_size": 72, "num_experts": 4, **sizes}
    )
    message = refused("quantize", source, tmp_path / "made", "--format", "nf4", *options, within=tmp_path)
    assert says in message or "is not made of whole blocks of 64 values" in message


def test_stacks_that_lie_across_are_those_of_the_parameter(tmp_path: Path) -> None:
    """Of quantized experts they are made in `test_woven.py`."""
    source = source_of(tmp_path / "source", "gpt_oss", intermediate_size=64, num_local_experts=4, head_dim=64)
    succeeds("quantize", source, tmp_path / "made", "--format", "nf4")
    plain = model_class("gpt_oss").from_pretrained(source, dtype=torch.bfloat16)
    found = folder_tensors(tmp_path / "made")
    for key, parameter in plain.named_parameters():
        if f"{key}.absmax" in found:
            assert_bits(found[key], bnb.quantize_4bit(parameter.detach().contiguous(), quant_type="nf4")[0])
    assert sum(key.endswith("experts.gate_up_proj") for key in found) == 2


@pytest.mark.parametrize(
    ("word", "content", "says"),
    [
        ("quant_map", torch.zeros(16), "its quant_map is not that of nf4"),
        ("absmax", None, f"{EXPERTS}.down_proj.absmax is missing"),
        ("absmax", torch.zeros(7), "should be F32"),
        (STATE, torch.zeros(40, dtype=torch.uint8), "its state is no JSON"),
        (STATE, torch.tensor(list(b'{"quant_type": "fp4"}'), dtype=torch.uint8), "its state is not that of nf4"),
        (STATE, torch.zeros(5000, dtype=torch.uint8), "is no state of bitsandbytes"),
    ],
)
def test_damaged_states_are_refused_by_name(
    sources: dict[str, Path], tmp_path: Path, word: str, content: Tensor | None, says: str
) -> None:
    succeeds("quantize", sources["qwen3_moe"], tmp_path / "made", "--format", "nf4")
    tensors = folder_tensors(tmp_path / "made")
    name = f"{EXPERTS}.down_proj.{word}"
    del tensors[name]
    if content is not None:
        tensors[name] = content
    broken = save(tmp_path / "broken", tensors, config_of(tmp_path / "made"))
    message = refused("dequantize", broken, tmp_path / "plain", within=tmp_path)
    assert says in message
    assert "problems" not in message
    assert says in run("inspect", broken).out


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("own", [{}, {"double_quant": True}], ids=["plain", "double"])
def test_encoding_and_decoding_hold_no_more_than_they_say(name: str, own: dict[str, Any]) -> None:
    if name == "int8" and own:
        pytest.skip("has no such option")
    made = make_format(name, own).bound((512, 1024), "BF16")
    matrix = torch.randn(512, 1024, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    made.encode(matrix[:64], 1.0)  # tables are made once
    with Meter(matrix) as used:
        encoded = made.encode(matrix, 1.0)
    assert used.peak <= made.live_nbytes * matrix.numel()
    suffixes = [part.suffix for part in made.parts((512, 1024), "BF16") if part.rows]
    parts = dict(zip(suffixes, encoded, strict=True))
    with Meter(*parts.values()) as used:
        made.decode(parts, 1024, torch.bfloat16)
    assert used.peak <= made.live_nbytes * matrix.numel()
