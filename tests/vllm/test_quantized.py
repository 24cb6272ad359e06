"""vLLM loads quantized checkpoints as recipes/engines.yaml says: "yes" is every parameter, byte for byte.

vLLM's own code reads config.json, builds the model and fuses what it loads; only kernels are left out (`load`). So
names, dtypes, shapes, lists of what is kept, and where each byte goes are proved, not what a kernel makes of them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from moeconv.engines import entries

pytest.importorskip("vllm")

import torch
from safetensors.torch import load_file, save_file

from moeconv.formats import FORMATS as ALL_FORMATS
from tests.commands import BITSANDBYTES, succeeds
from tests.vllm import models
from tests.vllm.placement import NOT_LOADED, Placement, Tensors, differences, place, raw
from tests.vllm.server import Ask, asking

FORMATS = [name for name in ALL_FORMATS if name not in BITSANDBYTES]
CLAIMS = sorted(
    (model_type, name, entry.reads)
    for entry in entries()
    if entry.engine == "vllm" and not entry.when
    for model_type in entry.model_types
    for name in entry.formats & set(FORMATS)
)
MODEL_TYPES = sorted({model_type for model_type, _, _ in CLAIMS})
# vLLM does not know their experts one by one, not in full precision either: there is nothing to compare with.
ONLY_PACKED = {"gpt_oss"}
COMPARED = sorted({*MODEL_TYPES} - ONLY_PACKED)

# What vLLM's fused parameters hold, in this order.
FUSED = {
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
}


class Source(NamedTuple):
    """A tiny checkpoint in full precision, with one tensor an expert where `plain` is, and where vLLM puts each."""

    folder: Path
    plain: Tensors
    parameters: Tensors
    placement: Placement


@pytest.fixture(scope="session")
def load() -> Iterator[Ask]:
    """Where the parameters are that vLLM holds after loading a folder: `file`, or `error`."""
    with asking("tests.vllm.load") as ask:
        yield ask


@pytest.fixture(scope="session")
def source(load: Ask, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    @cache
    def built(model_type: str) -> Source:
        if model_type in models.WITH_PICTURES:
            pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
        folder = tmp_path_factory.mktemp(model_type) / "source"
        models.build(model_type, folder, wide=True)
        plain = folder
        if not any(".experts.0." in name for name in tensors_of(folder)):
            plain = folder.parent / "experts"
            succeeds("convert", folder, plain, "--to", "experts")
        parameters = loaded(load, plain)
        tensors = tensors_of(plain)
        return Source(folder, tensors, parameters, {} if model_type in ONLY_PACKED else place(parameters, tensors))

    return built


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Path]:
    """A folder to be made, which does not outlive its test: there are hundreds."""
    yield tmp_path / "made"
    shutil.rmtree(tmp_path)


def tensors_of(folder: Path) -> Tensors:
    return {name: item for path in sorted(folder.glob("*.safetensors")) for name, item in load_file(path).items()}


def loaded(load: Ask, folder: Path) -> Tensors:
    answer = load(folder)
    assert "error" not in answer, answer["error"]
    return {name: item for name, item in torch.load(answer["file"]).items() if not NOT_LOADED.search(name)}


def reading(load: Ask, folder: Path, placement: Placement, one_by_one: Path | None = None) -> str:
    """`yes`, or `no` and why; of a packed folder against the one that it was packed from."""
    answer = load(folder)
    if "error" in answer:
        return f"no: {answer['error']}"
    parameters, tensors = torch.load(answer["file"]), tensors_of(one_by_one or folder)
    found = list(differences(parameters, tensors, placement)) if placement else strays(parameters, tensors)
    return f"no: {found}" if found else "yes"


def strays(parameters: Tensors, tensors: Tensors) -> list[str]:
    """Tensors whose bytes are nowhere in a model."""
    contents = [raw(item) for item in parameters.values()]
    return [name for name, item in tensors.items() if not any(raw(item) in content for content in contents)]


def quantize(source: Path, made: Path, *options: str | Path) -> Path:
    succeeds("quantize", source, made, *options, "--no-fsync")
    return made


def test_the_table_speaks_of_every_format() -> None:
    assert {(model_type, name) for model_type, name, _ in CLAIMS} == {(m, f) for m in MODEL_TYPES for f in FORMATS}
    assert len(CLAIMS) == len(MODEL_TYPES) * len(FORMATS)


@pytest.mark.parametrize("model_type", COMPARED)
def test_in_full_precision_every_tensor_has_its_place(model_type: str, source: Callable[[str], Source]) -> None:
    """The layout of what is fused is known here too, so that an error of vLLM's loader is no part of the oracle."""
    _, plain, parameters, placement = source(model_type)
    assert set(placement) == set(parameters)
    assert {piece.tensor for pieces in placement.values() for piece in pieces} == set(plain)
    for parameter, pieces in placement.items():
        names = [piece.tensor for piece in pieces]
        assert {_layer(name) for name in names} == {_layer(parameter)}
        assert_order(names)


def _layer(name: str) -> tuple[str, ...]:
    return tuple(re.findall(r"(?:layers|blocks)\.(\d+)\.", name))


def assert_order(names: Sequence[str]) -> None:
    last = tuple(name.split(".")[-2] for name in names)
    experts = [int(match[1]) for name in names if (match := re.search(r"\.experts\.(\d+)\.", name))]
    if experts:
        each = len(names) // models.EXPERTS
        assert experts == [expert for expert in range(models.EXPERTS) for _ in range(each)]
        assert last == last[:each] * models.EXPERTS
        last = last[:each]
    assert len(last) == 1 or last in FUSED, names


@pytest.mark.parametrize(("model_type", "name", "reads"), CLAIMS)
def test_vllm_reads_a_format_as_the_table_says(
    model_type: str, name: str, reads: str, source: Callable[[str], Source], load: Ask, made: Path
) -> None:
    folder, _, _, placement = source(model_type)
    answer = reading(load, quantize(folder, made, "--format", name), placement)
    assert answer.partition(":")[0] == reads, answer


def test_vllm_reads_mxfp4_of_gpt_oss(source: Callable[[str], Source], load: Ask, made: Path) -> None:
    """It pads what its kernels need: each tensor's bytes are in a parameter, row by row."""
    folder = source("gpt_oss").folder
    answer = load(quantize(folder, made, "--format", "gptoss_mxfp4"))
    assert "error" not in answer, answer["error"]
    parameters = torch.load(answer["file"])
    for name, item in tensors_of(made).items():
        content = item.view(torch.uint8)
        rows = content.flatten(0, 1).flatten(1) if item.ndim > 2 else content[None].flatten(1)
        assert any(all(raw(row) in raw(held) for row in rows) for held in parameters.values()), name


KEPT = sorted(
    (model_type, name, entry.reads)
    for entry in entries()
    if entry.engine == "vllm" and entry.when == "kept experts"
    for model_type in entry.model_types
    for name in entry.formats
)


@pytest.mark.parametrize(("model_type", "name", "reads"), KEPT)
def test_vllm_reads_a_layer_with_kept_experts_as_the_table_says(
    model_type: str, name: str, reads: str, source: Callable[[str], Source], load: Ask, made: Path
) -> None:
    folder, _, _, placement = source(model_type)
    options = ("--format", name, "--ignore", "*.layers.1.*.experts.*")
    answer = reading(load, quantize(folder, made, *options), placement)
    assert answer.partition(":")[0] == reads, answer


#: The format that `quantize` writes for each form of packed experts.
WRITTEN = {"fp8": "fp8", "channel": "fp8_dynamic", "fp8_block": "fp8_block", "int4": "w4a16", "int8": "w8a16"}
PACKED = sorted(
    (model_type, form, entry.reads)
    for entry in entries()
    if entry.engine == "vllm" and entry.layout == "packed"
    for model_type in entry.model_types
    for form in entry.forms
)


@pytest.mark.parametrize(("model_type", "form", "reads"), PACKED)
def test_vllm_reads_packed_quantized_experts_as_the_table_says(
    model_type: str, form: str, reads: str, source: Callable[[str], Source], load: Ask, made: Path
) -> None:
    folder, _, _, placement = source(model_type)
    quantize(folder, made, "--format", WRITTEN[form])
    succeeds("pack", made, made.with_name("packed"))
    answer = reading(load, made.with_name("packed"), placement, made)
    assert answer.partition(":")[0] == reads, answer


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize(
    "options",
    [
        ("fp8", "--ue8m0"),
        ("w4a16", "--group-size", "32"),
        ("w4a16", "--group-size", "64", "--scale", "mse"),
        ("w8a16", "--group-size", "32"),
        ("w4a16_asym", "--group-size", "64"),
        ("w4a16", "--ignore", "*.layers.1.*"),
        ("fp8", "--ignore", "*.self_attn.*"),
        ("w8a8", "--ignore", "*.experts.*"),
        ("fp8_dynamic", "--only", "*.experts.*"),
    ],
    ids=" ".join,
)
def test_vllm_reads_options(
    model_type: str, options: tuple[str, ...], source: Callable[[str], Source], load: Ask, made: Path
) -> None:
    folder, _, _, placement = source(model_type)
    assert reading(load, quantize(folder, made, "--format", *options), placement) == "yes"


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe"])
def test_vllm_reads_several_formats_in_one_checkpoint(
    model_type: str, source: Callable[[str], Source], load: Ask, made: Path
) -> None:
    made.parent.joinpath("mixed.yaml").write_text(
        "about: mixed\nquantize:\n"
        '  - {match: "*.layers.0.self_attn.o_proj", format: keep}\n'
        '  - {match: "*.self_attn.*", format: fp8_dynamic}\n'
        '  - {match: "*.experts.*", format: w4a16, group_size: 32}\n'
    )
    folder, _, _, placement = source(model_type)
    assert reading(load, quantize(folder, made, "--recipe", made.parent / "mixed.yaml"), placement) == "yes"


@pytest.mark.parametrize("name", ["fp8_block", "w4a16_asym"])
@pytest.mark.parametrize("model_type", ["llama4", "llama4_text"])
def test_vllm_reads_a_model_whose_rows_it_reorders_if_those_are_kept(
    model_type: str, name: str, source: Callable[[str], Source], load: Ask, made: Path
) -> None:
    """Which is what the table advises."""
    folder, _, _, placement = source(model_type)
    options = (f"--ignore=*.{which}_proj" for which in "qkv")
    assert reading(load, quantize(folder, made, "--format", name, *options), placement) == "yes"


@pytest.mark.parametrize("model_type", COMPARED)
def test_vllm_reads_what_was_packed_before(
    model_type: str, source: Callable[[str], Source], load: Ask, made: Path
) -> None:
    folder, _, _, placement = source(model_type)
    packed = made.parent / "packed"
    succeeds("pack", folder, packed, "--no-fsync")
    assert reading(load, quantize(packed, made, "--format", "w4a16"), placement) == "yes"


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_kept_by_default_stays_as_it_was(
    name: str, source: Callable[[str], Source], load: Ask, made: Path
) -> None:
    folder, _, before, _ = source("deepseek_v3")
    after = loaded(load, quantize(folder, made, "--format", name))
    kept = [key for key in before if key in after and raw(after[key]) == raw(before[key])]
    for module in ("mlp.gate", "fused_qkv_a_proj", "kv_b_proj"):
        assert f"model.layers.1.{'self_attn.' * module.endswith('proj')}{module}.weight" in kept
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(kept)
    assert {before[key].dtype for key in kept if key.endswith(".weight")} == {torch.bfloat16}
    assert not any(part in key for key in kept for part in ("experts", "q_b_proj", "o_proj", "mlp.down_proj"))


@pytest.mark.parametrize("name", FORMATS)
def test_a_router_that_the_config_does_not_keep_is_a_no(
    name: str, source: Callable[[str], Source], load: Ask, made: Path
) -> None:
    """vLLM casts it to FP8 without a word."""
    folder, _, _, placement = source("qwen3_moe")
    path = quantize(folder, made, "--format", name) / "config.json"
    path.write_text(path.read_text().replace("model.layers.1.mlp.gate", "model.layers.1.mlp.other"))
    assert reading(load, made, placement).startswith("no: ")


@pytest.mark.parametrize("name", FORMATS)
def test_one_byte_of_any_tensor_makes_a_difference(
    name: str, source: Callable[[str], Source], load: Ask, made: Path
) -> None:
    folder, _, _, placement = source("qwen3_moe")
    parameters, tensors = loaded(load, quantize(folder, made, "--format", name)), tensors_of(made)
    assert not list(differences(parameters, tensors, placement))
    for key, item in tensors.items():
        if not key.endswith(".weight_shape"):
            changed = item.clone()
            changed.flatten()[-1:].view(torch.uint8)[-1] ^= 1
            assert len(list(differences(parameters, {**tensors, key: changed}, placement))) == 1, key


def test_a_changed_file_an_exchange_and_a_stranger_make_a_difference(
    source: Callable[[str], Source], load: Ask, made: Path
) -> None:
    folder, _, _, placement = source("mixtral")
    tensors = dict(tensors_of(quantize(folder, made, "--format", "w4a16_asym")))
    block = "model.layers.1.block_sparse_moe.experts"
    one, other = f"{block}.2.w1.weight_zero_point", f"{block}.3.w1.weight_zero_point"

    def found_in(changed: Mapping[str, torch.Tensor]) -> list[str]:
        save_file(dict(changed), made / "model.safetensors", {"format": "pt"})
        return list(differences(loaded(load, made), tensors, placement))

    assert found_in(tensors) == []
    exchanged = {**tensors, one: tensors[other], other: tensors[one]}
    assert found_in(exchanged) == [f"{block}.routed_experts.w13_weight_zero_point has other bytes"]
    flipped = {**tensors, one: tensors[one] ^ 1}
    assert found_in(flipped) == [f"{block}.routed_experts.w13_weight_zero_point has other bytes"]
    stranger = {**tensors, "model.layers.9.weight": torch.ones(2)}
    parameters = loaded(load, quantize(folder, made.parent / "again", "--format", "w4a16_asym"))
    assert list(differences(parameters, stranger, placement)) == ["model.layers.9.weight is in no parameter"]
    del parameters["model.norm.weight"]
    assert list(differences(parameters, tensors, placement)) == [
        "model.norm.weight is in no parameter",
        "model.norm.weight does not exist",
    ]
