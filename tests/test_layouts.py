import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import refused_source, succeeds
from tests.folders import (
    CONFIG,
    Tensor,
    Tensors,
    experts_layout,
    pack_by_hand,
    read_folder,
    tensor,
    write_folder,
)

BLOCK = "model.layers.1.mlp.experts"
PARTS = ("gate", "up", "down")


def refusal(folder: Path, tensors: Tensors, config: dict[str, Any] | None = None, *options: str) -> str:
    return refused_source(write_folder(folder / "source", tensors, {**CONFIG, **(config or {})}, 2), *options)


def without(tensors: Tensors, is_lost: Callable[[str], bool]) -> Tensors:
    return {name: item for name, item in tensors.items() if not is_lost(name)}


def renumbered(tensors: Tensors, old: int, new: int) -> Tensors:
    return {name.replace(f".experts.{old}.", f".experts.{new}."): item for name, item in tensors.items()}


def transposed(item: Tensor) -> Tensor:
    rows, columns = item.shape
    width = len(item.content) // (rows * columns)
    elements = [item.content[at : at + width] for at in range(0, len(item.content), width)]
    content = b"".join(elements[row * columns + column] for column in range(columns) for row in range(rows))
    return Tensor(item.dtype, (columns, rows), content)


# Experts


@pytest.mark.parametrize("expert", [0, 2, 3])
def test_a_missing_expert_is_named(tmp_path: Path, expert: int) -> None:
    message = refusal(tmp_path, without(experts_layout(), lambda name: f"{BLOCK}.{expert}." in name))
    for part in PARTS:
        assert (
            f"model.layers.1: mlp.experts.{{expert}}.{part}_proj.weight has 3 of 4 experts; missing: {expert}\n"
        ) in message
    assert "model.layers.0" not in message
    assert "experts are never renumbered" in message


@pytest.mark.parametrize("config", [{}, {"num_experts": None}], ids=["config.json counts", "nothing counts"])
def test_a_gap_in_the_expert_ids_is_named(tmp_path: Path, config: dict[str, Any]) -> None:
    message = refusal(tmp_path, renumbered(experts_layout(), 3, 7), config)
    found = "4 of 8 experts; missing: 3..6\n" if config else "3 of 4 experts; missing: 3; beyond the last: 7\n"
    assert f"model.layers.1: mlp.experts.{{expert}}.up_proj.weight has {found}" in message


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("config", [{}, {"num_experts": None}], ids=["config.json counts", "nothing counts"])
def test_parts_with_unlike_expert_ids_are_refused(tmp_path: Path, part: str, config: dict[str, Any]) -> None:
    message = refusal(tmp_path, without(experts_layout(), lambda name: f"{BLOCK}.3.{part}" in name), config)
    assert f"model.layers.1: mlp.experts.{{expert}}.{part}_proj.weight has 3 of 4 experts; missing: 3\n" in message
    assert message.count("has 3 of 4") == 1


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_missing_from_a_layer_is_named(tmp_path: Path, part: str) -> None:
    message = refusal(tmp_path, without(experts_layout(), lambda name: BLOCK in name and part in name))
    assert f"model.layers.1: mlp.experts.{{expert}}.{part}_proj.weight is missing" in message


@pytest.mark.parametrize("count", [3, 5, 1 << 40])
def test_more_or_fewer_experts_than_config_json_says_are_refused(tmp_path: Path, count: int) -> None:
    message = refusal(tmp_path, experts_layout(), {"num_experts": count})
    says = "has the experts 3 beyond the last, 2" if count == 3 else f"has 4 of {count} experts; missing: 4"
    assert f"model.layers.0: mlp.experts.{{expert}}.gate_proj.weight {says}" in message


def test_fewer_packed_experts_than_config_json_says_are_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", pack_by_hand(experts_layout()), {**CONFIG, "num_experts": 5}, 1)
    message = refused_source(source, command="unpack")
    assert "model.layers.0: E is 4 in the files and 5 in config.json (num_experts, " in message


def test_an_absurd_expert_id_costs_neither_time_nor_memory(tmp_path: Path) -> None:
    config = {**CONFIG, "num_experts": None}
    source = write_folder(tmp_path / "source", renumbered(experts_layout(), 3, 999_999_999), config, 1)
    done = subprocess.run(
        [sys.executable, "-m", "moeconv", "pack", str(source), str(tmp_path / "target")],
        capture_output=True, text=True, check=False, timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
    )  # fmt: skip
    assert done.returncode == 1
    assert "has 4 of 1000000000 experts; missing: 3..999999998\n" in done.stderr


@pytest.mark.parametrize("expert", ["03", "-1", "1e1", "²", "٣", "9" * 400])
def test_an_expert_id_that_is_no_plain_number_is_refused(tmp_path: Path, expert: str) -> None:
    tensors = {name.replace(".experts.3.", f".experts.{expert}."): item for name, item in experts_layout().items()}
    assert "missing: 3" in refusal(tmp_path, tensors)


@pytest.mark.parametrize(
    "name",
    [
        f"{BLOCK}.0.gate_proj.weight_scale_inv",
        f"{BLOCK}.0.gate_proj.bias",
        f"{BLOCK}.0.w1.weight",
        "model.layers.1.mlp.shared.experts.0.w",
    ],
)
def test_a_tensor_of_an_expert_that_no_rule_names_is_refused(tmp_path: Path, name: str) -> None:
    message = refusal(tmp_path, {**experts_layout(), name: tensor((6,))})
    assert f"{name} BF16 [6] looks like an expert's (1 tensors of that kind)" in message


# Shapes and dtypes


@pytest.mark.parametrize("part", PARTS)
def test_one_tensor_with_exchanged_axes_is_named(tmp_path: Path, part: str) -> None:
    tensors, name = experts_layout(), f"{BLOCK}.2.{part}_proj.weight"
    tensors[name] = transposed(tensors[name])
    message = refusal(tmp_path, tensors)
    claim = "[H, I] = [10, 6]" if part == "down" else "[I, H] = [6, 10]"
    assert f"{name} has the shape {list(tensors[name].shape)}; recipe " in message
    assert f"claims {claim}" in message
    assert "layers.0" not in message


def test_exchanged_axes_of_all_experts_are_refused(tmp_path: Path) -> None:
    tensors = {
        name: transposed(item) if ".experts." in name else item for name, item in experts_layout(layers=1).items()
    }
    message = refusal(tmp_path, tensors)
    assert "I is 10 in the files and 6 in config.json" in message
    assert "H is 6 in the files and 10 in config.json" in message


def test_exchanged_axes_of_packed_experts_are_refused(tmp_path: Path) -> None:
    packed = pack_by_hand(experts_layout(layers=1))
    for name, (dtype, shape, content) in list(packed.items()):
        if ".experts." in name:
            packed[name] = Tensor(dtype, (shape[0], shape[2], shape[1]), content)
    message = refused_source(write_folder(tmp_path / "source", packed, CONFIG, 1), command="unpack")
    assert "gate_up_proj has the shape [4, 10, 12]" in message or "I is 10 in the files" in message


def test_one_expert_of_another_size_is_named(tmp_path: Path) -> None:
    tensors, name = experts_layout(), f"{BLOCK}.3.up_proj.weight"
    tensors[name] = tensor((8, 10))
    assert f"{name} has the shape [8, 10]" in refusal(tmp_path, tensors)


@pytest.mark.parametrize("dtype", ["F16", "F32", "F8_E4M3", "I8"])
def test_one_tensor_of_another_dtype_in_a_stack_is_named(tmp_path: Path, dtype: str) -> None:
    tensors, name = experts_layout(), f"{BLOCK}.1.up_proj.weight"
    tensors[name] = tensor((6, 10), dtype)
    assert f"{name} is {dtype}; the others of its stack are BF16" in refusal(tmp_path, tensors)


def test_parts_of_different_dtypes_do_not_go_into_one_tensor(tmp_path: Path) -> None:
    tensors = experts_layout()
    for expert in range(4):
        tensors[f"{BLOCK}.{expert}.up_proj.weight"] = tensor((6, 10), "F16")
    message = refusal(tmp_path, tensors)
    assert (
        "model.layers.1: cannot be stored as packed: {block}.mlp.experts.gate_up_proj would join BF16 and F16"
        in message
    )


def test_the_problems_of_all_layers_are_shown_together(tmp_path: Path) -> None:
    tensors = experts_layout(layers=12)
    for layer in range(12):
        tensors.pop(f"model.layers.{layer}.mlp.experts.0.up_proj.weight")
        tensors[f"model.layers.{layer}.mlp.experts.1.gate_proj.weight"] = tensor((6, 11))
    message = refusal(tmp_path, tensors)
    assert "24 problems, 4 of them not shown." in message
    assert message.count("\n  -> ") == 20


# Layouts


def test_layers_in_the_wanted_layout_already_are_copied(tmp_path: Path) -> None:
    tensors = experts_layout(layers=3)
    mixed = {
        **{name: item for name, item in tensors.items() if ".layers.1.mlp.experts" not in name},
        **{name: item for name, item in pack_by_hand(tensors).items() if ".layers.1.mlp.experts" in name},
    }
    succeeds("pack", write_folder(tmp_path / "source", mixed, CONFIG, 2), tmp_path / "packed")
    assert read_folder(tmp_path / "packed") == pack_by_hand(tensors)
    succeeds("unpack", tmp_path / "source", tmp_path / "unpacked")
    assert read_folder(tmp_path / "unpacked") == tensors


@pytest.mark.parametrize("command", ["pack", "unpack"])
@pytest.mark.parametrize("lost", ["", "gate_up_proj"], ids=["both complete", "one incomplete"])
def test_an_expert_in_both_layouts_is_refused(tmp_path: Path, command: str, lost: str) -> None:
    tensors = experts_layout(layers=1)
    packed = without(pack_by_hand(tensors), lambda name: bool(lost) and lost in name)
    source = write_folder(tmp_path / "source", {**tensors, **packed}, CONFIG, 2)
    message = refused_source(source, command=command)
    assert "model.layers.0 holds experts in the layout" in message
    assert "nothing says which of the two is right" in message


def test_one_expert_beside_a_packed_layer_is_refused(tmp_path: Path) -> None:
    tensors = experts_layout(layers=1)
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    source = write_folder(tmp_path / "source", {**pack_by_hand(tensors), name: tensors[name]}, CONFIG, 2)
    for command in ("pack", "unpack"):
        assert f"and also {name} of layout experts" in refused_source(source, command=command)


RECIPE = """\
about: two packed layouts with the same names
model_types: [test_moe]
dims: {E: num_experts, I: moe_intermediate_size, H: hidden_size}
layouts:
  hub:
    "{block}.experts.gate_up [E, H, 2*I]": {transpose: {concat: [gate, up]}}
    "{block}.experts.down [E, I, H]": {transpose: down}
  packed:
    "{block}.experts.gate_up [E, 2*I, H]": {concat: [gate, up]}
    "{block}.experts.down [E, H, I]": down
  experts:
    "{block}.experts.{expert}.gate [I, H]": gate
    "{block}.experts.{expert}.up [I, H]": up
    "{block}.experts.{expert}.down [H, I]": down
"""


def square_source(folder: Path, inner: int, hidden: int) -> tuple[Path, Path]:
    (folder / "r.yaml").write_text(RECIPE)
    tensors = {
        "layer.0.experts.gate_up": tensor((2, hidden, 2 * inner)),
        "layer.0.experts.down": tensor((2, inner, hidden)),
    }
    config = {"num_experts": 2, "moe_intermediate_size": inner, "hidden_size": hidden}
    return write_folder(folder / "source", tensors, config, 1), folder / "r.yaml"


def test_a_shape_tells_two_layouts_with_the_same_names_apart(tmp_path: Path) -> None:
    source, recipe = square_source(tmp_path, 6, 10)
    assert " hub " in succeeds("inspect", source, "--recipe", recipe).out
    assert "hub -> experts" in succeeds("plan", "unpack", source, "--recipe", recipe).out


def test_where_shapes_do_not_tell_layouts_apart_the_user_must(tmp_path: Path) -> None:
    tensors = {"layer.0.experts.gate_up": tensor((2, 8, 8)), "layer.0.experts.down": tensor((2, 8, 8))}
    text = RECIPE.replace("2*I", "I")
    text = text.replace("{concat: [gate, up]}", "gate").replace('    "{block}.experts.{expert}.up [I, H]": up\n', "")
    (tmp_path / "r.yaml").write_text(text)
    config = {"num_experts": 2, "moe_intermediate_size": 8, "hidden_size": 8}
    source = write_folder(tmp_path / "source", tensors, config, 1)
    message = refused_source(source, "--recipe", tmp_path / "r.yaml", command="unpack")
    assert "layer.0: shapes fit the layouts hub or packed of recipe r alike\n" in message
    assert "-> Say which one it is with --layout hub|packed." in message
    for layout in ("hub", "packed"):
        succeeds("unpack", source, tmp_path / layout, "--recipe", tmp_path / "r.yaml", "--layout", layout)
    hub, packed = (read_folder(tmp_path / layout) for layout in ("hub", "packed"))
    assert hub.keys() == packed.keys()
    for name in hub:
        assert hub[name] == transposed(packed[name])


def test_a_model_type_without_a_recipe_is_told_which_one_fits(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", experts_layout(), {**CONFIG, "model_type": "never_seen"}, 2)
    message = refused_source(source)
    assert f"no recipe is for the model_type of {source} (config.json says never_seen)" in message
    assert "Names and shapes fit " in message
    assert "gate_up_down" in message
    succeeds("pack", source, tmp_path / "target", "--recipe", "gate_up_down")
    assert read_folder(tmp_path / "target") == pack_by_hand(experts_layout())


@pytest.mark.parametrize("model_type", ["never_seen", None, 3, ["qwen3_moe"]])
def test_a_model_type_that_nothing_fits_is_refused(tmp_path: Path, model_type: object) -> None:
    source = write_folder(tmp_path / "source", {"a.b": tensor((2, 2))}, {"model_type": model_type}, 1)
    message = refused_source(source)
    assert f"(config.json says {model_type if isinstance(model_type, str) else 'nothing'})" in message
    assert "Write a recipe for it" in message


def test_a_checkpoint_without_experts_is_refused(tmp_path: Path) -> None:
    tensors = without(experts_layout(), lambda name: ".experts." in name)
    assert "holds no experts that recipe" in refusal(tmp_path, tensors)


def test_two_sources_for_one_target_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "about: x\nmodel_types: [test_moe]\ndims: {E: num_experts, I: moe_intermediate_size}\nlayouts:\n  experts:\n"
        '    "{block}.left.{expert}.w [I]": left\n    "{block}.right.{expert}.w [I]": right\n  packed:\n'
        '    "{block}.w [E, I]": left\n    "{block}.w [E,I]": right\n'
    )
    tensors = {f"m.{side}.{expert}.w": tensor((3,)) for side in ("left", "right") for expert in range(2)}
    source = write_folder(tmp_path / "source", tensors, {"num_experts": 2, "moe_intermediate_size": 3}, 1)
    assert "two sources for the one target m.w: " in refused_source(source, "--recipe", tmp_path / "r.yaml")


def test_a_tensor_of_half_bytes_is_moved_only_whole(tmp_path: Path) -> None:
    source, recipe = square_source(tmp_path, 6, 10)
    tensors = {
        "layer.0.experts.gate_up": Tensor("F4", (2, 10, 12), bytes(range(120))),
        "layer.0.experts.down": Tensor("F4", (2, 6, 10), bytes(range(60))),
    }
    config = {"num_experts": 2, "moe_intermediate_size": 6, "hidden_size": 10}
    write_folder(source, tensors, config, 1)
    message = refused_source(source, "--recipe", recipe, command="unpack")
    assert "cannot be rearranged: its elements are smaller than a byte" in message
    succeeds("convert", source, tmp_path / "same", "--to", "hub", "--recipe", recipe)
    assert read_folder(tmp_path / "same") == tensors


# What hangs on an expert moves with it, or stops the run


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("gate_up_proj_bias", (4, 12)),
        ("gate_up_proj_scale_inv", ()),
        ("down_proj_scale_inv", (4,)),
        ("down_proj.weight_scale", (4, 10, 1)),
        ("down_proj.input_scale", (1,)),
    ],
)
def test_a_companion_of_packed_experts_is_never_left_behind(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    tensors = pack_by_hand(experts_layout())
    tensors[f"{BLOCK}.{name}"] = tensor(shape, "F32")
    source = write_folder(tmp_path / "source", tensors, CONFIG)
    message = refused_source(source, command="unpack")
    assert f"{BLOCK}.{name} F32 {list(shape)} looks like an expert's" in message


def test_an_expert_id_with_a_leading_zero_is_not_copied_as_something_else(tmp_path: Path) -> None:
    tensors = {**experts_layout(), f"{BLOCK}.03.up_proj.scale": tensor((6,))}
    assert f"{BLOCK}.03.up_proj.scale BF16 [6] looks like an expert's" in refusal(tmp_path, tensors)


@pytest.mark.parametrize("recipe", ["gpt_oss_mxfp4", "inkling"])
def test_sizes_that_no_whole_block_fits_are_refused(tmp_path: Path, recipe: str) -> None:
    """48 / 32 is no whole number: the axis must not vanish."""
    experts, inner, hidden = 2, 48, 64
    sizes = {"num_local_experts": experts, "n_routed_experts": experts, "hidden_size": hidden}
    config = {**sizes, "intermediate_size": inner, "moe_intermediate_size": inner}
    if recipe == "inkling":
        shapes = {
            "w13_weight": (experts, 2 * inner, hidden),
            "w13_weight_scale": (experts, 2 * inner, hidden // 32),
            "w2_weight": (experts, hidden, inner),
            "w2_weight_scale": (experts, hidden, 2),
        }
    else:
        shapes = {
            "gate_up_proj_blocks": (experts, 2 * inner, hidden // 32, 16),
            "gate_up_proj_scales": (experts, 2 * inner, hidden // 32),
            "gate_up_proj_bias": (experts, 2 * inner),
            "down_proj_blocks": (experts, hidden, 2, 16),
            "down_proj_scales": (experts, hidden, 2),
            "down_proj_bias": (experts, hidden),
        }
    tensors = {f"{BLOCK}.{name}": tensor(shape, "U8", name) for name, shape in shapes.items()}
    source = write_folder(tmp_path / "source", tensors, {"model_type": "x", **config})
    assert "I/32 is no whole number for I = 48" in refused_source(source, "--recipe", recipe, command="unpack")


@pytest.mark.parametrize("count", [4.0, "4"])
def test_a_number_of_experts_counts_however_config_json_writes_it(tmp_path: Path, count: object) -> None:
    tensors = without(experts_layout(), lambda name: f"{BLOCK}.3." in name)
    assert "has 3 of 4 experts; missing: 3" in refusal(tmp_path, tensors, {"num_experts": count})


def test_each_model_of_several_has_its_own_config(tmp_path: Path) -> None:
    """Both have four experts in the first layer; the thinker's second layer has as many as the talker's should."""
    tensors = {f"thinker.{name}": item for name, item in experts_layout(2, 4).items()}
    tensors |= {f"talker.{name}": item for name, item in experts_layout(1, 2).items()}
    config = {
        f"{who}_config": {"text_config": {**CONFIG, "num_experts": count}}
        for who, count in {"thinker": 4, "talker": 2}.items()
    }
    config["model_type"] = "qwen3_omni_moe"  # type: ignore[assignment]
    source = write_folder(tmp_path / "source", tensors, config)
    succeeds("pack", source, tmp_path / "packed")
    short = without(tensors, lambda name: ".layers.1.mlp.experts.2." in name or ".layers.1.mlp.experts.3." in name)
    source = write_folder(tmp_path / "short" / "source", short, config)
    assert "thinker.model.layers.1" in refused_source(source)


def test_a_layout_that_the_source_does_not_have_is_no_answer(tmp_path: Path) -> None:
    message = refusal(tmp_path, experts_layout(), None, "--layout", "packed")
    assert "model.layers.0 holds nothing of the layout packed that --layout names, but tensors of experts" in message


def test_elements_of_half_a_byte_are_never_cut_in_two(tmp_path: Path) -> None:
    """Three elements of four bits: the second expert would begin inside a byte."""
    tensors = {
        f"{BLOCK}.gate_up_proj": Tensor("F4", (2, 6, 3), bytes(18)),
        f"{BLOCK}.down_proj": Tensor("F4", (2, 3, 3), bytes(9)),
    }
    config = {**CONFIG, "num_experts": 2, "moe_intermediate_size": 3, "hidden_size": 3}
    source = write_folder(tmp_path / "source", tensors, config)
    assert "its elements are smaller than a byte" in refused_source(source, "--layout", "packed", command="unpack")


@pytest.mark.parametrize("gone", ["all", "half"])
def test_a_layer_that_lost_its_experts_is_named(tmp_path: Path, gone: str) -> None:
    tensors = experts_layout(layers=3)
    tensors.update((f"model.layers.{n}.mlp.gate.weight", tensor((4, 10), seed=n)) for n in range(3))
    for name in list(tensors):
        if ".layers.1.mlp.experts." in name and (gone == "all" or ".experts.3." in name):
            del tensors[name]
    message = refused_source(write_folder(tmp_path / "source", tensors, CONFIG))
    assert "model.layers.1" in message
    assert ("has a router (mlp.gate.weight) and no experts" in message) == (gone == "all")


def test_a_dense_layer_has_lost_nothing(tmp_path: Path) -> None:
    tensors = experts_layout(layers=2)
    tensors.update((f"model.layers.{n}.mlp.gate.weight", tensor((4, 10), seed=n)) for n in range(2))
    tensors.update((f"model.layers.2.mlp.{part}_proj.weight", tensor((6, 10))) for part in ("gate", "up"))
    succeeds("pack", write_folder(tmp_path / "source", tensors, CONFIG), tmp_path / "packed")


@pytest.mark.parametrize(
    "name", ["self_attn.gate.weight", "hyper.router_norm.weight", "mlp.gate.e_score_correction_bias"]
)
def test_what_every_layer_has_is_no_router(tmp_path: Path, name: str) -> None:
    tensors = experts_layout(layers=3)
    for layer in range(4):
        tensors[f"model.layers.{layer}.{name}"] = tensor((4,) if "bias" in name else (7, 10), seed=layer)
    succeeds("pack", write_folder(tmp_path / "source", tensors, CONFIG), tmp_path / "packed")


@pytest.mark.parametrize("gone", ["one", "all"])
@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_a_router_that_moves_does_not_go_without_its_experts(tmp_path: Path, gone: str, command: str) -> None:
    tensors: Tensors = {}
    for layer in range(3):
        block = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{block}.gate.weight"] = tensor((4, 10), seed=layer)
        for expert in range(4 if gone == "one" and layer != 1 else 0):
            for part, shape in {"w1": (6, 10), "w3": (6, 10), "w2": (10, 6)}.items():
                tensors[f"{block}.experts.{expert}.{part}.weight"] = tensor(shape, seed=(layer, expert, part))
    config = {"model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 6, "hidden_size": 10}
    message = refused_source(write_folder(tmp_path / "source", tensors, config), command=command)
    if gone == "one":
        assert "model.layers.1 has a router (block_sparse_moe.gate.weight) and no experts" in message
    else:
        assert "holds what recipe mixtral calls router, and no block holds experts" in message


def test_experts_by_another_name_are_not_left_behind(tmp_path: Path) -> None:
    tensors = experts_layout(layers=1)
    tensors |= {name.replace(".experts.", ".local_experts."): item for name, item in experts_layout(layers=1).items()}
    message = refused_source(write_folder(tmp_path / "source", tensors, CONFIG))
    assert "local_experts.0" in message
