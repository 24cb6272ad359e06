"""Folders in bitsandbytes' form: what is in them, what transformers makes of them, and how much memory that takes."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import save_file
from torch.nn.utils import parametrize
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

import moeconv.transformers as loader
from moeconv.engines import entries
from moeconv.errors import CheckpointError, UsageError
from moeconv.formats import METHOD
from tests import families  # keeps transformers off the network
from tests.commands import refused, run, succeeds
from tests.test_quantize import config_of, folder_tensors

ROOT = Path(__file__).parent.parent
FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3", "olmoe", "gpt_oss", "llama4_text"]
#: 128 x 128 values are one block of scales that are quantized themselves.
SIZES = {
    "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "intermediate_size_mlp": 128,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 32,
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32,
}  # fmt: skip
TOKENS = torch.arange(3, 13)[None]
UP = "model.layers.1.mlp.experts.gate_up_proj"
STATE = ".quant_state.bitsandbytes__"
FORMS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]


class Folder(NamedTuple):
    source: PreTrainedModel
    source_path: Path
    path: Path
    tensors: dict[str, torch.Tensor]

    @property
    def packed(self) -> list[str]:
        return [name for name in self.tensors if f"{name}.absmax" in self.tensors]


Quantized = Callable[..., Folder]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """Folders that `moeconv quantize` makes of tiny models, each made once."""

    @cache
    def source(family: str, tie: bool) -> tuple[PreTrainedModel, Path]:
        model = families.build(family, sizes=SIZES | {"tie_word_embeddings": tie})
        path = tmp_path_factory.mktemp(family) / "source"
        families.save_published(model, path, max_shard_size="200KB")
        return model, path

    @cache
    def make(
        family: str = "qwen3_moe", kind: str = "nf4", double: bool = False, tie: bool = False,
        options: tuple[str, ...] = (),
    ) -> Folder:  # fmt: skip
        model, path = source(family, tie)
        made = tmp_path_factory.mktemp(f"{family}-{kind}") / "quantized"
        if double:
            rules = made.parent / "rules.yaml"
            rule = f"format: {kind}, double_quant: true"
            lines = [f'  - {{match: "{name}", {rule}}}' for name in ("*.experts.*", "*.[qkvo]_proj")]
            rules.write_text("\n".join(["quantize:", *lines, ""]))
            options = ("--recipe", str(rules), *options)
        else:
            options = ("--format", kind, *options)
        succeeds("quantize", path, made, *options)
        return Folder(model, path, made, folder_tensors(made))

    return make


def said_of(tensors: dict[str, torch.Tensor], name: str) -> dict[str, Any]:
    (key,) = (key for key in tensors if key.startswith(name + STATE))
    said: dict[str, Any] = json.loads(bytes(tensors[key].tolist()))
    return said


def decoded(tensors: dict[str, torch.Tensor], name: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """By arithmetic of its own."""
    said, absmax = said_of(tensors, name), tensors[f"{name}.absmax"]
    if "nested_offset" in said:
        largest = tensors[f"{name}.nested_absmax"].repeat_interleave(256)[: len(absmax)]
        absmax = tensors[f"{name}.nested_quant_map"][absmax.long()] * largest + said["nested_offset"]
    codes = tensors[name].flatten()
    values = tensors[f"{name}.quant_map"][torch.stack((codes >> 4, codes & 15), 1).long()]
    return (values.view(-1, 64) * absmax[:, None]).view(said["shape"]).to(dtype)


def held(model: PreTrainedModel, name: str) -> torch.Tensor:
    """A packed parameter of a model in full precision, as its layer computes with it."""
    owner, _, leaf = name.rpartition(".")
    value = getattr(model.get_submodule(owner), leaf)
    return bnb.dequantize_4bit(value.data, value.quant_state) if hasattr(value, "quant_state") else value


def assert_holds(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Parameters, not key lists: all that is on disk is in the model as it is, and decodes to what it should."""
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        if STATE in name:
            assert json.loads(bytes(state[name].tolist())) == json.loads(bytes(tensor.tolist())), name
        else:
            is_part = any(name.startswith(packed) for packed in tensors if f"{packed}.absmax" in tensors)
            assert state[name].dtype == tensor.dtype or not is_part, name
            assert torch.equal(state[name], tensor), name
        if f"{name}.absmax" in tensors:
            assert torch.equal(held(model, name), decoded(tensors, name)), name


def load(path: Path, **options: Any) -> PreTrainedModel:
    """With a place for every tensor, and a tensor for every place."""
    model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.float()


def assert_near(one: torch.Tensor, other: torch.Tensor) -> None:
    """Layers round in another order, by which a router may choose otherwise. Parameters are the same bits."""
    assert ((one - other).norm() / other.norm()).item() < 0.05


def plain(folder: Folder, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The source with what was packed as it decodes."""
    model = type(folder.source)(folder.source.config).eval()
    model.load_state_dict(folder.source.state_dict())
    with torch.no_grad():
        for name in folder.packed:
            model.get_parameter(name).copy_(decoded(folder.tensors, name))
    return model.to(dtype)


@pytest.mark.parametrize(("kind", "double"), FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_those_of_bitsandbytes_for_the_whole_parameter(
    quantized: Quantized, family: str, kind: str, double: bool
) -> None:
    folder = quantized(family, kind, double)
    assert any(".experts." in name for name in folder.packed)
    assert any(name.endswith("q_proj.weight") or name.endswith("o_proj.weight") for name in folder.packed)
    for name in folder.packed:
        parameter = folder.source.get_parameter(name).data
        codes, state = bnb.quantize_4bit(parameter, blocksize=64, quant_type=kind)
        wanted = {name: codes} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        if double:
            said = said_of(folder.tensors, name)
            offset = torch.tensor(said.pop("nested_offset"))
            # A sum of many floats depends on its order; all else is the same bits, given that sum.
            torch.testing.assert_close(offset, state.absmax.mean(), rtol=1e-6, atol=0)
            scales, nested = bnb.quantize_blockwise(state.absmax - offset, blocksize=256)
            wanted[f"{name}.absmax"] = scales
            wanted[f"{name}.nested_absmax"], wanted[f"{name}.nested_quant_map"] = nested.absmax, nested.code
            plain_said = json.loads(bytes(wanted.pop(f"{name}{STATE}{kind}").tolist()))
            assert said == plain_said | {"nested_blocksize": 256, "nested_dtype": "float32"}
        for key, tensor in wanted.items():
            assert folder.tensors[key].dtype == tensor.dtype, key
            assert torch.equal(folder.tensors[key], tensor), key


@pytest.mark.parametrize(("kind", "double"), FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_loaded_is_what_was_written_and_computes_as_decoded(
    quantized: Quantized, family: str, kind: str, double: bool
) -> None:
    folder = quantized(family, kind, double)
    model = load(folder.path)
    assert_holds(model, folder.tensors)
    assert_near(logits(model), logits(plain(folder)))
    assert_holds(model, folder.tensors)  # a forward pass changes nothing


@pytest.mark.parametrize("family", FAMILIES[:-1])  # the last one has eager alone
def test_all_experts_implementations_give_the_same_tokens(quantized: Quantized, family: str) -> None:
    folder = quantized(family)
    tokens = []
    for name in ("eager", "batched_mm", "grouped_mm"):
        model = load(folder.path, experts_implementation=name, dtype=torch.float32)
        tokens.append(model.generate(TOKENS, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist())
    assert tokens[0] == tokens[1] == tokens[2]
    assert len(tokens[0][0]) > TOKENS.shape[1]


def test_without_the_import_transformers_refuses(quantized: Quantized) -> None:
    code = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    command = [sys.executable, "-c", code, str(quantized().path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TRANSFORMERS_VERBOSITY": "warning"}
    )
    assert done.returncode != 0
    assert f"Unknown quantization type, got {METHOD}" in done.stderr
    assert "ignore_mismatched_sizes" in done.stderr.splitlines()[-1]


def test_scales_cast_to_integers_would_be_seen(quantized: Quantized, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap that `hf_quantizer` avoids: no key is missing, and the values are nonsense."""

    attach = loader.AttachPacked

    class Hidden(attach):  # type: ignore[misc, valid-type]
        hf_quantizer = None  # type: ignore[assignment]

        def __init__(self, hf_quantizer: loader.PackedQuantizer) -> None:
            self.its_quantizer = hf_quantizer

        def convert(self, *args: Any, **kwargs: Any) -> dict[str, list[torch.Tensor]]:
            return attach(self.its_quantizer).convert(*args, **kwargs)

    monkeypatch.setattr(loader, "AttachPacked", Hidden)
    folder = quantized()
    model = load(folder.path)
    assert model.state_dict()[f"{UP}.absmax"].dtype == torch.uint8
    with pytest.raises(AssertionError):
        assert_holds(model, folder.tensors)


@pytest.mark.parametrize(
    ("family", "double"), [("qwen3_moe", False), ("mixtral", False), ("deepseek_v3", True), ("gpt_oss", False)]
)
def test_what_a_loaded_model_saves_loads_again(quantized: Quantized, family: str, double: bool, tmp_path: Path) -> None:
    folder = quantized(family, double=double)
    model = load(folder.path)
    logits(model)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    said = config_of(tmp_path)["quantization_config"]
    assert said["quant_method"] == METHOD
    assert "load_in_4bit" not in said
    assert_holds(load(tmp_path), folder.tensors)


@pytest.mark.parametrize(
    "options",
    [
        ("--max-shard-size", "100KB"), ("--only", "*.experts.*"), ("--only", "*.self_attn.*"),
        ("--ignore", "*.layers.0.*"),
    ],
)  # fmt: skip
def test_any_part_can_be_packed_in_any_number_of_files(
    quantized: Quantized, options: tuple[str, ...], tmp_path: Path
) -> None:
    folder = quantized(options=options)
    model = load(folder.path)
    assert model.hf_quantizer.packed.keys() == set(folder.packed)
    assert 0 < len(folder.packed) <= 12
    assert_near(logits(model), logits(plain(folder)))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_base_model_takes_what_it_has_a_place_for(quantized: Quantized) -> None:
    folder = quantized()
    tensors = {name.removeprefix("model."): t for name, t in folder.tensors.items() if name != "lm_head.weight"}
    assert_holds(AutoModel.from_pretrained(folder.path), tensors)


def test_tied_embeddings_stay_tied(quantized: Quantized) -> None:
    folder = quantized(tie=True)
    model = load(folder.path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_near(logits(model), logits(plain(folder)))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_device_maps(quantized: Quantized, device_map: Any) -> None:
    folder = quantized()
    assert_holds(load(folder.path, device_map=device_map), folder.tensors)


def test_device_maps_count_codes_and_scales(quantized: Quantized) -> None:
    quantizer = load(quantized().path).hf_quantizer
    codes = torch.empty(quantizer.packed[UP].place.shape, dtype=torch.uint8)
    assert quantizer.param_element_size(None, UP, codes) == 1 + 4 / 32
    assert quantizer.param_element_size(None, "another", codes) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_experts_are_unpacked_in_the_dtype_of_their_input(quantized: Quantized, dtype: torch.dtype) -> None:
    folder = quantized()
    model = load(folder.path, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype, torch.uint8}
    assert torch.equal(held(model, UP), decoded(folder.tensors, UP, dtype))
    assert_near(logits(model), logits(plain(folder, dtype)))
    torch.nn.Module.to(model, torch.float32)
    assert_near(logits(model), logits(plain(folder, torch.float32)))
    assert said_of(model.state_dict(), UP) == said_of(folder.tensors, UP)


def test_experts_are_unpacked_in_float64_and_linear_layers_refuse_it(quantized: Quantized) -> None:
    """bitsandbytes decodes to 32 bits at most, and from 64 its linear layers compute nonsense."""
    folder = quantized(options=("--only", "*.experts.*"))
    model = load(folder.path, experts_implementation="eager").double()
    assert_near(logits(model), logits(plain(folder, torch.float32)))
    assert held(model, UP).dtype == torch.float64
    with pytest.raises(UsageError, match="packed linear layers do not compute in float64"):
        logits(load(quantized().path).double())


def changed(folder: Folder, path: Path, change: Callable[[dict[str, torch.Tensor]], Any], **config: Any) -> Path:
    """A copy with other tensors, or more in its `quantization_config`."""
    tensors = dict(folder.tensors)
    change(tensors)
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    said = config_of(folder.path)
    said["quantization_config"] |= config
    (path / "config.json").write_text(json.dumps(said))
    return path


def test_the_dtype_in_which_linear_layers_compute(quantized: Quantized, tmp_path: Path) -> None:
    folder = quantized()
    copy = changed(folder, tmp_path / "copy", lambda _: None, bnb_4bit_compute_dtype="float32")
    model = load(copy)
    assert model.model.layers[0].self_attn.q_proj.compute_dtype == torch.float32
    assert_near(logits(model), logits(plain(folder)))
    wrong = changed(folder, tmp_path / "wrong", lambda _: None, bnb_4bit_compute_dtype="int8")
    with pytest.raises(CheckpointError, match="bnb_4bit_compute_dtype is 'int8'"):
        load(wrong)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_of_one_layer_are_unpacked_once_and_dropped(
    quantized: Quantized, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(quantized().path, experts_implementation=implementation)
    unpacked, most, dequantize = [], [0], loader.dequantize_4bit

    def watched(codes: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
        values = dequantize(codes, state)
        unpacked.append(tuple(values.shape))
        most[0] = max(most[0], 1 + len(parametrize._cache))
        return values

    monkeypatch.setattr(loader, "dequantize_4bit", watched)
    logits(model)
    assert len(unpacked) == 2 * model.config.num_hidden_layers
    assert most == [2]
    assert not parametrize._cache


def test_a_model_can_be_dequantized_for_good(quantized: Quantized, tmp_path: Path) -> None:
    folder = quantized("mixtral")
    model = load(folder.path).dequantize()
    assert not model.is_quantized
    wanted = plain(folder).state_dict()
    assert model.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    assert_near(logits(model), logits(plain(folder)))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in config_of(tmp_path)
    folder.source.save_pretrained(tmp_path / "source")
    assert folder_tensors(tmp_path).keys() == folder_tensors(tmp_path / "source").keys()


def test_a_model_that_computes_in_float32_is_dequantized_without_loss(quantized: Quantized) -> None:
    folder = quantized()
    packed, plain_model = load(folder.path, dtype=torch.float32), load(folder.path, dtype=torch.float32).dequantize()
    for name in folder.packed:
        assert torch.equal(plain_model.get_parameter(name), decoded(folder.tensors, name, torch.float32)), name
    assert torch.equal(logits(packed), logits(plain_model))


def test_a_model_can_be_saved_and_then_dequantized(quantized: Quantized, tmp_path: Path) -> None:
    folder = quantized()
    model = load(folder.path)
    model.save_pretrained(tmp_path)  # which leaves the dtype in the config as a word
    model.dequantize()
    assert torch.equal(model.get_parameter(UP), decoded(folder.tensors, UP))
    logits(model)


@pytest.mark.parametrize("rule", ["format: fp8", "format: nf4, experts: per_expert", "format: int8"])
def test_rules_that_packed_experts_cannot_follow_are_refused(quantized: Quantized, rule: str, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(f'quantize:\n  - {{match: "*.layers.0.*.experts.*", {rule}}}\n')
    options = ("--recipe", rules, "--format", "nf4")
    message = refused("quantize", quantized().source_path, tmp_path / "made", *options, within=tmp_path)
    assert "layers.0.mlp.experts.gate_up_proj cannot be" in message
    assert "its experts are one tensor beside those of a packed format" in message


def test_experts_below_each_other_are_refused_for_that_reason(quantized: Quantized, tmp_path: Path) -> None:
    source = quantized("dbrx", options=("--experts", "per-expert")).source_path
    message = refused("quantize", source, tmp_path / "made", "--format", "nf4", within=tmp_path)
    assert "recipe dbrx packs experts below each other in one matrix" in message
    rules = tmp_path / "rules.yaml"
    rules.write_text('quantize:\n  - {match: "*.self_attn.*", format: nf4}\n')
    options = ("--recipe", rules)
    message = refused("quantize", quantized("mixtral").source_path, tmp_path / "made", *options, within=tmp_path)
    assert "no expert would be quantized" in message


def test_patterns_see_packed_experts_by_their_packed_names(quantized: Quantized, tmp_path: Path) -> None:
    folder = quantized("mixtral", options=("--ignore", "*.mlp.experts.*"))
    assert len(folder.packed) == 8
    assert not any(".experts." in name for name in folder.packed)
    assert_near(logits(load(folder.path)), logits(plain(folder)))
    folder = quantized("mixtral", options=("--ignore", "*.layers.0.*"))
    assert sum(".experts." in name for name in folder.packed) == 2
    assert_near(logits(load(folder.path)), logits(plain(folder)))
    options = ("--format", "nf4", "--only", "*.block_sparse_moe.experts.*")
    message = refused("quantize", folder.source_path, tmp_path / "made", *options, within=tmp_path)
    assert "For this format experts have the names that `moeconv plan pack` shows" in message


def test_a_value_that_is_not_finite_is_found_in_its_expert(quantized: Quantized, tmp_path: Path) -> None:
    source = quantized().source_path
    tensors = folder_tensors(source)
    tensors["model.layers.1.mlp.experts.2.down_proj.weight"][3, 5] = float("nan")
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    shutil.copy(source / "config.json", tmp_path / "source")
    for options in ((), ("--double-quant",)):
        result = run("quantize", tmp_path / "source", tmp_path / "made", "--format", "nf4", "--restart", *options)
        assert re.search(r"layers\.1\.mlp\.experts\.down_proj holds NaN .*, row 3 of expert 2\n", result.err), result


def move(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    """Give one packed tensor what another has."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("", ".absmax", ".quant_map", f"{STATE}nf4"):
            tensors[new + part] = tensors[old + part].clone()

    return change


def says(name: str, **changes: Any) -> Callable[[dict[str, torch.Tensor]], Any]:
    """Let the state of a packed tensor say something else; what is None is not said."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        said = {key: value for key, value in (said_of(tensors, name) | changes).items() if value is not None}
        tensors[f"{name}{STATE}nf4"] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    return change


def becomes(word: str, made: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], Any]:
    """Replace one part of a packed tensor."""
    return lambda tensors: tensors.update({UP + word: made(tensors[UP + word])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{UP}.absmax"), rf"{UP}: {UP}\.absmax is missing"),
        (lambda tensors: tensors.pop(UP), rf"{UP}: {UP} is missing"),
        (lambda tensors: tensors.pop(f"{UP}{STATE}nf4"), f"there is no quant_state for {UP}"),
        (becomes("", lambda codes: codes[:-8]), rf"{UP} U8 \[65528, 1\] should be U8 \[65536, 1\]"),
        (becomes("", lambda codes: codes.view(torch.int8)), rf"{UP} I8 .* should be U8"),
        (becomes(".absmax", lambda scales: scales.bfloat16()), rf"{UP}\.absmax BF16 .* should be F32"),
        (becomes(".quant_map", lambda values: values * 2), f"{UP}: its quant_map is not that of nf4"),
        (becomes(".quant_map", lambda values: values[:8].clone()), r"quant_map F32 \[8\] should be F32 \[16\]"),
        (says(UP, quant_type="fp4"), f"{UP}: its state is not that of nf4 with blocks of 64"),
        (says(UP, blocksize=0), f"{UP}: its state is not that of nf4 with blocks of 64"),
        (says(UP, dtype="float64"), f"{UP}: its state has the dtype float64"),
        (says(UP, shape=None), f"{UP}: its state has the shape None"),
        (says(UP, shape="abc"), f"{UP}: its state has the shape abc"),
        (says(UP, nested_offset=1), f"{UP}: its scales are quantized in a way that is not known"),
        (becomes(f"{STATE}nf4", lambda _: torch.zeros(30, dtype=torch.uint8)), f"{UP}: its state is no JSON"),
        (becomes(f"{STATE}nf4", lambda _: torch.tensor(list(b"[1, 2]"), dtype=torch.uint8)), r"blocks of 64: \[1, 2\]"),
        (lambda t: t.update({f"{UP}{STATE}fp4": t[f"{UP}{STATE}nf4"].clone()}), f"{UP}: it has two states, of nf4 and"),
        (move("model.layers.1.mlp.experts.down_proj", UP), r"packed as \[4, 128, 128\], the model has \[4, 256, 128\]"),
    ],
)
@pytest.mark.parametrize("ignore_mismatched_sizes", [False, True])
def test_damaged_folders_are_refused(
    quantized: Quantized, change: Callable[..., Any], message: str, ignore_mismatched_sizes: bool, tmp_path: Path
) -> None:
    folder = changed(quantized(), tmp_path / "damaged", change)
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder, ignore_mismatched_sizes=ignore_mismatched_sizes)
    assert "\n  -> " in str(error.value)


def test_a_damaged_table_of_scales_is_refused(quantized: Quantized, tmp_path: Path) -> None:
    change = becomes(".nested_quant_map", lambda values: values.flip(0))
    folder = changed(quantized(double=True), tmp_path / "damaged", change)
    with pytest.raises(CheckpointError, match=f"{UP}: its nested_quant_map is not that of bitsandbytes"):
        load(folder)
    assert "its nested_quant_map is not" in refused("dequantize", folder, tmp_path / "plain", within=tmp_path)


def test_all_problems_are_told_together(quantized: Quantized, tmp_path: Path) -> None:
    names = [name for name in quantized().packed if "q_proj" in name]
    folder = changed(quantized(), tmp_path / "damaged", lambda tensors: [tensors.pop(f"{n}.absmax") for n in names])
    with pytest.raises(CheckpointError, match="2 problems"):
        load(folder)


def test_parameters_that_cannot_be_packed_are_refused(
    quantized: Quantized, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text('quantize:\n  - {match: "model.embed_tokens", format: nf4}\n')
    folder = quantized(tie=True, options=("--recipe", str(rules)))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight is packed, but Qwen3MoeForCausalLM has it in two"):
        load(folder.path)
    monkeypatch.setattr(type(folder.source), "_keep_in_fp32_modules_strict", ["o_proj"])
    with pytest.raises(CheckpointError, match=r"o_proj\.weight is packed, but .* needs it in full precision"):
        load(quantized().path)


def test_a_parameter_whose_name_is_not_to_be_renamed_is_found(quantized: Quantized, tmp_path: Path) -> None:
    """Renaming would put a second `mlp` before `experts`; then transformers takes a name as it is."""
    folder = quantized("mistral_large4_text")
    cls = type(folder.source)
    model, report = cls.from_pretrained(folder.path, output_loading_info=True)
    assert not any(report.values()), report
    packed = model.hf_quantizer.packed
    assert len(packed) == len(folder.packed)
    assert any(name.endswith("experts.gate_up_proj") for name in packed)
    for name in packed:
        parameter = folder.source.get_parameter(name).data
        assert torch.equal(held(model, name), bnb.dequantize_4bit(*bnb.quantize_4bit(parameter, quant_type="nf4"))), (
            name
        )
    model.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_what_is_refused_says_which_pattern_to_ignore(quantized: Quantized) -> None:
    """Gate and up of shared experts are made one parameter while they are loaded."""
    cls = type(quantized("minimax_m3_vl").source)
    with pytest.raises(
        CheckpointError, match=r"layers\.\{0\.\.1\}.*up_proj\.weight is packed, but transformers mak"
    ) as error:
        cls.from_pretrained(quantized("minimax_m3_vl").path)
    options = re.findall(r"-> Quantize again with (--ignore) '(.*)'\.", str(error.value))
    assert len(options) == 2
    folder = quantized("minimax_m3_vl", options=tuple(word for option in options for word in option))
    assert len(cls.from_pretrained(folder.path).hf_quantizer.packed) == len(folder.packed) > 4


def test_a_layer_whose_input_is_cast_to_the_dtype_of_codes_is_refused(quantized: Quantized) -> None:
    layer = load(quantized().path).model.layers[0].self_attn.q_proj
    with pytest.raises(CheckpointError, match="casts the input of a packed layer"):
        layer(torch.ones(1, 128).to(layer.weight.dtype))


def test_disk_is_refused_also_where_auto_means_it(quantized: Quantized, tmp_path: Path) -> None:
    folder = quantized().path
    for wanted in ({"model": "disk", "lm_head": "cpu"}, "auto"):
        with pytest.raises(UsageError, match="device_map leaves parts of the model on disk"):
            load(folder, device_map=wanted, max_memory={"cpu": "300KB"}, offload_folder=tmp_path)


def test_it_quantizes_nothing() -> None:
    with pytest.raises(ValueError, match="pre-quantized"):
        loader.PackedQuantizer(loader.PackedConfig(), pre_quantized=False)


def test_older_or_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["transformers"], "__version__", "5.9.2")  # what `import` finds
        with pytest.raises(
            ImportError, match=r"needs transformers>=5\.10 .*; this is transformers 5\.9\.2\.\n  -> pip"
        ):
            importlib.reload(loader)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn.parametrize", None)
    with pytest.raises(ImportError, match=r"needs transformers>=5\.10 and bitsandbytes>=0\.50: .*\n  -> pip install"):
        importlib.reload(loader)


def test_nothing_else_of_the_package_imports_these_libraries() -> None:
    for path in (ROOT / "moeconv").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        named |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        found = [
            name
            for name in named
            if re.match(r"(transformers|bitsandbytes|peft|accelerate|moeconv\.transformers)", name)
        ]
        assert bool(found) == (path.name == "transformers.py"), path


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_adapters_on_attention_train_and_leave_the_rest_as_it_is(quantized: Quantized, implementation: str) -> None:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    folder = quantized()
    model = load(folder.path, experts_implementation=implementation)
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    model.train()
    losses = []
    for _ in range(3):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    assert any(not torch.equal(trained[name], dict(model.named_parameters())[name]) for name in trained)
    state = model.unload().state_dict()
    for name in (name for name in folder.tensors if any(name.startswith(packed) for packed in folder.packed)):
        assert torch.equal(state[name], folder.tensors[name]), name
    assert not parametrize._cache


def test_adapters_on_all_linear_layers_leave_packed_experts_out(quantized: Quantized) -> None:
    """Packed experts are modules called `down_proj`, too, which peft must be told to pass by, as README says."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    wanted = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="ParametrizationList"):
        get_peft_model(load(quantized("qwen2_moe").path), wanted)
    (pattern,) = re.findall(r'exclude_modules=r"(.*?)"', (ROOT / "README.md").read_text(encoding="utf-8"))
    wanted = LoraConfig(r=2, target_modules=targets, exclude_modules=pattern, task_type="CAUSAL_LM")
    model: Any = get_peft_model(load(quantized("qwen2_moe").path), wanted)
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_modules() if name.endswith("lora_A")}
    assert any("shared_expert.down_proj" in name for name in adapted)
    assert not any(".mlp.experts" in name for name in adapted)
    logits(model)


def test_adapters_on_experts_are_refused(quantized: Quantized) -> None:
    """peft 0.21 leaves its parametrization behind: what a model computes would change with every pass."""
    from peft import LoraConfig, get_peft_model

    wanted = LoraConfig(r=2, target_modules=[], target_parameters=[UP], task_type="CAUSAL_LM")
    model = get_peft_model(load(quantized().path), wanted)
    with pytest.raises(UsageError, match="have a parametrization besides"):
        logits(model)


def readings_of(*formats: str) -> dict[str, list[str]]:
    """What the table of engines says of transformers, by whether it reads these formats."""
    said: dict[str, list[str]] = {}
    for entry in entries():
        if entry.engine == "transformers" and entry.formats >= set(formats):
            said.setdefault(entry.reads, []).extend(entry.model_types or ["any other"])
    return {reads: sorted(found) for reads, found in said.items()}


def test_the_table_of_engines_has_the_families_that_are_tested_here() -> None:
    assert readings_of("nf4", "fp4") == {"yes": sorted(FAMILIES), "no": ["diffusion_gemma", "minimax_m3_vl"]}
    assert readings_of("int8", "bnb_nf4", "bnb_fp4") == {"yes": sorted(FAMILIES[:-1]), "no": sorted(BY_OTHER_NAMES)}
    assert readings_of("bnb_nf4_experts", "bnb_fp4_experts") == {"yes": ["llama4_text"], "no": ["any other"]}


BY_OTHER_NAMES = ["axk2", "deepseek_v4", "diffusion_gemma", "hy_v4", "llama4_text"]
OWN_FORMS = {
    "int8": ("int8", "--experts", "keep"),
    "bnb_nf4": ("nf4", "--experts", "per-expert", "--ignore", "*.experts.*"),
}


def codes_of(parameter: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "int8":
        return bnb.int8_vectorwise_quant(parameter.half())[0]
    return bnb.quantize_4bit(parameter.contiguous(), quant_type="nf4")[0]


@pytest.mark.parametrize("family", sorted({*BY_OTHER_NAMES, "gpt_oss", "olmoe"} - {"diffusion_gemma"}))  # takes long
@pytest.mark.parametrize("kind", OWN_FORMS)
def test_transformers_reads_linear_layers_of_bitsandbytes_as_the_table_says(
    quantized: Quantized, family: str, kind: str
) -> None:
    name, *options = OWN_FORMS[kind]
    folder = quantized(family, name, options=tuple(options))
    model, report = type(folder.source).from_pretrained(folder.path, output_loading_info=True, dtype=torch.bfloat16)
    is_complete = not any(report.values())
    linear = [item for item in model.modules() if isinstance(item, (Linear4bit, Linear8bitLt))]
    is_whole = all(not item.weight.is_floating_point() for item in linear)
    found = dict(model.named_parameters())
    for key, parameter in folder.source.named_parameters() if is_complete and is_whole else ():
        wanted = parameter.data if found[key].is_floating_point() else codes_of(parameter.data, kind)
        assert torch.equal(found[key].data.float(), wanted.float()), key
    reads = "yes" if is_complete and is_whole else "no"
    assert family in readings_of("int8", "bnb_nf4", "bnb_fp4")[reads]
    if reads == "yes":
        logits(model)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "llama4_text"])
def test_plans_say_who_reads_experts_one_by_one(quantized: Quantized, family: str) -> None:
    folder = quantized(family, options=("--experts", "per-expert"))
    try:
        model = load(folder.path)
    except (RuntimeError, AssertionError):
        reads = "no"
    else:
        reads = "yes"
        packed = {name for name in folder.packed if ".experts." in name}
        assert packed
        assert all(torch.equal(model.get_parameter(name).data, folder.tensors[name]) for name in packed)
    options = ("--format", "nf4", "--experts", "per-expert", "--json")
    plan = json.loads(succeeds("plan", "quantize", folder.source_path, *options).out)
    assert plan["engines"][0]["reads"] == reads
    assert any("transformers" in line for line in plan["warnings"]) == (reads == "no")


LARGE = {
    "vocab_size": 1024, "hidden_size": 1024, "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 128, "num_experts": 48, "num_experts_per_tok": 4, "moe_intermediate_size": 512,
}  # fmt: skip

MEASURE = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM
import moeconv.transformers

def status(key):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

def peak(work):
    Path("/proc/self/clear_refs").write_text("5")  # the kernel measures the peak from here on
    before = status("VmRSS")
    made = work()
    return made, status("VmHWM") - before

folder = sys.argv[1]
with torch.device("meta"):  # code that is loaded with the first model of its kind belongs to the baseline
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
model, loading = peak(lambda: AutoModelForCausalLM.from_pretrained(folder))
with torch.no_grad():
    _, forward = peak(lambda: model(input_ids=torch.arange(3, 35)[None]))
    _, again = peak(lambda: model(input_ids=torch.arange(3, 35)[None]))
experts = model.model.layers[0].mlp.experts
layer = sum(value.nbytes for value in (experts.gate_up_proj, experts.down_proj))
print(json.dumps({"loading": loading, "forward": forward, "again": again, "layer": layer}))
"""


def write_large(folder: Path) -> None:
    """Random codes in the form that the command writes, several hundred megabytes in a second."""
    config = AutoConfig.for_model("qwen3_moe", **LARGE, dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(folder)
    said = config_of(folder) | {"quantization_config": {"quant_method": METHOD}}
    (folder / "config.json").write_text(json.dumps(said))
    files: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for number, (name, value) in enumerate(model.named_parameters()):
        part = files[number * len(files) // len(list(model.parameters()))]
        if ".experts." in name or name.endswith("_proj.weight"):
            scales = torch.full((value.numel() // 64,), 0.02)
            state = bnb.QuantState(scales, value.shape, bnb.get_4bit_type("nf4", "cpu"), 64, "nf4", torch.bfloat16)
            part[name] = torch.randint(1 << 62, (value.numel() // 16, 1)).view(torch.uint8).view(-1, 1)
            part |= {f"{name}.{key}": tensor.clone() for key, tensor in state.as_dict(packed=True).items()}
        else:
            part[name] = torch.full(value.shape, 0.02, dtype=torch.bfloat16)
    names = [f"model-{number + 1:05d}-of-00003.safetensors" for number in range(3)]
    for name, part in zip(names, files, strict=True):
        save_file(part, folder / name, {"format": "pt"})
    weight_map = {tensor: name for name, part in zip(names, files, strict=True) for tensor in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.skipif(sys.platform != "linux", reason="measured by /proc")
def test_memory_is_that_of_the_files_and_of_one_layers_experts(tmp_path: Path) -> None:
    folder = tmp_path / "large"
    write_large(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size > 200e6
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    measured = json.loads(done.stdout.splitlines()[-1])
    print(f"folder {size:,}", {name: f"{value:,}" for name, value in measured.items()})
    shutil.rmtree(folder)
    assert measured["loading"] <= 1.15 * size
    assert measured["loading"] + measured["forward"] <= 1.15 * size + 1.15 * measured["layer"]
    assert measured["again"] <= 1.15 * measured["layer"]


def test_the_example_runs(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / "nf4.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for line in ("$ moeconv quantize", "on disk", "in memory", "tokens"):
        assert line in done.stdout, done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("kind", "double"), FORMS)
def test_on_a_gpu_it_holds_and_computes_the_same(quantized: Quantized, kind: str, double: bool) -> None:
    folder = quantized("qwen3_moe", kind, double)
    wanted = logits(plain(folder, torch.float32))
    for model in (load(folder.path, device_map="cuda"), load(folder.path).to("cuda")):
        state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        for name, tensor in folder.tensors.items():
            if STATE not in name:
                assert torch.equal(state[name], tensor), name
        for name in folder.packed:
            torch.testing.assert_close(held(model, name).cpu(), decoded(folder.tensors, name))
        with torch.no_grad():
            found = model(input_ids=TOKENS.to("cuda")).logits.float().cpu()
        assert ((found - wanted).norm() / wanted.norm()).item() < 0.05
