"""transformers as oracle: a packed folder loads with the very parameters of the source, and comes back exactly."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from moeconv.checkpoint import open_checkpoint
from moeconv.engines import entries
from moeconv.executor import execute
from moeconv.layouts import find_units
from moeconv.plan import Options, Plan, plan
from moeconv.recipe_file import load_shipped
from moeconv.selection import select_recipe
from tests import folders
from tests.commands import refused_source, succeeds
from tests.families import NOT_BUILT, build, save_published
from tests.folders import read_folder, write_folder

MODEL_TYPES = sorted({name for recipe in load_shipped() for name in recipe.model_types} - set(NOT_BUILT))

#: transformers holds rows for experts that compute nothing; what a file says of them is not carried over.
UNUSED_ROWS = {"longcat_flash": "gate_up_proj"}


def plan_of(source: Path, layout: str, **options: object) -> Plan:
    checkpoint = open_checkpoint(source)
    return plan(checkpoint, select_recipe(checkpoint), layout, Options(**options))  # type: ignore[arg-type]


def convert(source: Path, target: Path, layout: str, **options: object) -> Path:
    execute(plan_of(source, layout, **options), target, ["test"], fsync=False)
    return target


def assert_same_parameters(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """The folder loads, without a missing or unexpected name, with exactly the parameters and buffers of `model`."""
    loaded, report = type(model).from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    wanted, found = model.state_dict(), loaded.state_dict()
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        other = found[name]
        unused = UNUSED_ROWS.get(model.config.model_type)
        if unused and name.endswith(unused):
            tensor, other = tensor[: model.config.n_routed_experts], other[: model.config.n_routed_experts]
        assert tensor.shape == other.shape, name
        assert torch.equal(tensor.to(other.dtype), other), name  # the loader keeps some in float32
    return loaded.eval()


def layout_of(folder: Path) -> str:
    """Layout of the source: `hub`, or `packed` where transformers saves a part of a model as it holds it."""
    checkpoint = open_checkpoint(folder)
    recipe = select_recipe(checkpoint)
    layouts = {unit.layout for unit in find_units(checkpoint, recipe).units}
    return "hub" if recipe.layout("hub") in layouts else layouts.pop()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_packed_loads_with_the_parameters_of_the_source(model_type: str, tmp_path: Path) -> None:
    model = build(model_type, seed=len(model_type))
    source = tmp_path / "source"
    save_published(model, source)
    published = read_folder(source)
    packed = convert(source, tmp_path / "packed", "packed", max_shard_nbytes=70_000)
    experts = convert(packed, tmp_path / "experts", "experts")
    back = convert(experts, tmp_path / "back", layout_of(source), max_shard_nbytes=50_000)
    assert read_folder(back) == published
    names = read_folder(experts).keys()
    assert any(".experts.11." in name for name in names)
    assert not any(".experts.11." in name for name in read_folder(packed))
    assert_same_parameters(model, packed)


LOGITS = (
    "qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "glm4_moe", "gpt_oss", "llama4_text", "granitemoe", "nemotron_h",
    "ernie4_5_moe", "qwen3_vl_moe", "phimoe", "hunyuan_v1_moe", "jetmoe", "dbrx",
)  # fmt: skip


@pytest.mark.parametrize("model_type", LOGITS)
def test_packed_gives_identical_logits(model_type: str, tmp_path: Path) -> None:
    model = build(model_type, seed=7)
    save_published(model, tmp_path / "source")
    loaded = assert_same_parameters(model, convert(tmp_path / "source", tmp_path / "packed", "packed"))
    model = type(model).from_pretrained(tmp_path / "source", dtype=torch.bfloat16).eval()
    tokens = torch.arange(2, 14).reshape(2, 6)
    with torch.no_grad():
        wanted, found = (m(input_ids=tokens)[0] for m in (model, loaded))
    assert torch.isfinite(wanted).all()
    assert torch.equal(wanted, found)


@pytest.mark.parametrize("inner", [24, 48], ids=["2I == H", "I == H"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen3_vl_moe", "mixtral", "gpt_oss", "llama4_text", "nemotron_h"])
def test_square_matrices_are_not_mistaken(model_type: str, inner: int, tmp_path: Path) -> None:
    sizes = {"moe_intermediate_size": inner, "intermediate_size": inner}
    model = build(model_type, seed=inner, sizes=sizes)
    save_published(model, tmp_path / "source", max_shard_size="1GB")
    packed = convert(tmp_path / "source", tmp_path / "packed", "packed")
    assert_same_parameters(model, packed)
    back = convert(convert(packed, tmp_path / "experts", "experts"), tmp_path / "back", "hub")
    assert read_folder(back) == read_folder(tmp_path / "source")


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("max_shard_size", ["8KB", "1GB"], ids=["many shards", "a single file"])
def test_sharding_and_seed_do_not_matter(seed: int, max_shard_size: str, tmp_path: Path) -> None:
    model = build("qwen3_moe", seed)
    save_published(model, tmp_path / "source", max_shard_size)
    assert (tmp_path / "source" / "model.safetensors.index.json").exists() == (max_shard_size == "8KB")
    assert_same_parameters(model, convert(tmp_path / "source", tmp_path / "packed", "packed"))


def test_a_router_that_no_layout_moves_does_not_hold_its_experts(tmp_path: Path) -> None:
    """`unpack` leaves what was packed before, but not a block whose router alone needed no change."""
    save_published(build("granitemoe_swa", seed=5), tmp_path / "hub")
    experts = convert(tmp_path / "hub", tmp_path / "experts", "experts")
    succeeds("pack", experts, tmp_path / "packed")
    succeeds("unpack", tmp_path / "packed", tmp_path / "back")
    assert read_folder(tmp_path / "back") == read_folder(experts) != read_folder(tmp_path / "packed")


OTHER_LAYOUTS = [
    (entry.layout, model_type, entry.reads)
    for entry in entries()
    if entry.engine == "transformers" and entry.layout not in ("", "packed") and not entry.when
    for model_type in sorted(entry.model_types)
]


@pytest.mark.parametrize(("layout", "model_type", "reads"), OTHER_LAYOUTS)
def test_the_engine_table_is_right(layout: str, model_type: str, reads: str, tmp_path: Path) -> None:
    model = build(model_type, seed=3)
    save_published(model, tmp_path / "source")
    made = convert(tmp_path / "source", tmp_path / "made", layout)
    if reads == "yes":
        assert_same_parameters(model, made)
    else:
        with pytest.raises((AssertionError, RuntimeError)):
            assert_same_parameters(model, made)


@pytest.mark.parametrize("inner", [24, 48, 32], ids=["2I == H", "I == H", "not square"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen3_vl_moe"])
def test_the_plan_knows_which_square_matrices_are_read_wrong(model_type: str, inner: int, tmp_path: Path) -> None:
    model = build(model_type, seed=4, sizes={"moe_intermediate_size": inner, "intermediate_size": inner})
    save_published(model, tmp_path / "source")
    plan = plan_of(tmp_path / "source", "packed")
    assert {reading.reads for reading in plan.readings if reading.engine.startswith("transformers")} == {"yes"}
    made = convert(convert(tmp_path / "source", tmp_path / "experts", "experts"), tmp_path / "made", "hub")
    (reading,) = (r for r in plan_of(tmp_path / "experts", "hub").readings if r.engine.startswith("transformers"))
    if reading.reads == "yes":
        assert_same_parameters(model, made)
    else:
        assert (model_type, inner) in {("qwen3_vl_moe", 24), ("qwen3_vl_moe", 48)}
        with pytest.raises(AssertionError):
            assert_same_parameters(model, made)


def test_every_model_type_that_the_engine_table_promises_is_tested_here() -> None:
    for entry in entries():
        if entry.engine == "transformers" and entry.reads == "yes":
            assert entry.model_types <= set(MODEL_TYPES)


#: Folders of transformers whose experts have one layout only (`recipes/unsupported.yaml`).
UNSUPPORTED = {"nllb_moe": "nllb-moe", "switch_transformers": "switch_transformers", "doge": "doge"}
#: Model types with rules for experts that are never a checkpoint's own.
PARTS = {"dots3_note_vision_encoder": "a part of dots3_note"}


def test_every_family_of_transformers_with_experts_has_a_recipe() -> None:
    known = {name for recipe in load_shipped() for name in recipe.model_types}
    merging = {
        model_type
        for model_type in CONFIG_MAPPING_NAMES
        for rule in get_checkpoint_conversion_mapping(model_type) or []
        if isinstance(rule, WeightConverter) and "expert" in str([*rule.source_patterns, *rule.target_patterns])
    }
    assert len(merging) > 50
    assert merging - known == set(PARTS)
    packed = {}
    for folder in (Path(transformers.__file__).parent / "models").iterdir():
        if any("Experts(" in line for path in folder.glob("modeling_*.py") for line in _classes(path)):
            texts = [path.read_text(encoding="utf-8") for path in folder.glob("configuration_*.py")]
            packed[folder.name] = {name for text in texts for name in re.findall(r'\bmodel_type.* = "(.+)"', text)}
    assert len(packed) > 50
    assert {name for name, types in packed.items() if not types & known} == set(UNSUPPORTED) - {"doge"}


def _classes(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("class ")]


@pytest.mark.parametrize("model_type", sorted(UNSUPPORTED.values()))
def test_a_family_without_another_layout_is_told_so(model_type: str, tmp_path: Path) -> None:
    config = {"model_type": model_type, "num_experts": 2}
    tensors = {f"decoder.layers.0.ffn.experts.expert_{e}.fc1.weight": folders.tensor((8, 4), seed=e) for e in range(2)}
    source = write_folder(tmp_path / "source", tensors, config)
    for command in ("pack", "unpack", "quantize"):
        options = ["--format", "fp8"] if command == "quantize" else []
        message = refused_source(source, *options, command=command)
        assert f"experts of {model_type} cannot be packed: " in message
        assert "Load the folder as it is" in message
