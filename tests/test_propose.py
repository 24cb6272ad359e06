"""Proposed recipes: what is decided is right, what is not is asked, and every family comes back from its own names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moeconv.checkpoint import Checkpoint, open_checkpoint
from moeconv.executor import execute
from moeconv.forms import with_forms
from moeconv.layouts import find_units
from moeconv.ops import parts_of
from moeconv.plan import Options, plan
from moeconv.propose import propose
from moeconv.recipe import Recipe
from moeconv.recipe_file import load_shipped, parse_recipe
from moeconv.selection import select_recipe
from tests.commands import refused, succeeds
from tests.families import NOT_BUILT, build, save_published
from tests.folders import CONFIG, Tensor, Tensors, experts_layout, pack_by_hand, read_folder, tensor, write_folder

UNKNOWN = {**CONFIG, "model_type": "never_seen"}
SHAPES = {"gate": (6, 10), "up": (6, 10), "down": (10, 6)}


def decided(text: str, *words: str) -> str:
    """The proposal with the first choice that has one of the words, or the first, in place of every DECIDE."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.endswith(": DECIDE"):
            above: list[str] = []
            while not above or "DECIDE" not in above[0]:
                above.insert(0, lines.pop().strip())
            name = line.removesuffix(": DECIDE").strip()
            in_place = [f"{name}: {value}" for value in above[0].removeprefix("# DECIDE: ").split(", or ")]
            choices = [choice.lstrip("# ") for choice in above[1:]] or in_place
            line = "    " + next((choice for word in words for choice in choices if word in choice), choices[0])
        lines.append(line)
    return "\n".join(lines) + "\n"


def body(text: str) -> str:
    """A proposal without its comments."""
    return re.sub(r"\s*#.*", "", text)


def gated(stem: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"), experts: int = 4) -> Tensors:
    return {
        name: tensor(shape, seed=name)
        for expert in range(experts)
        for word, shape in zip(names, SHAPES.values(), strict=True)
        for name in [f"{stem}.{expert}.{word}.weight"]
    }


def packed(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    return {
        name: tensor(shape, seed=name)
        for layer in range(2)
        for word, shape in {"gate.weight": (4, 10), **shapes}.items()
        for name in [f"model.layers.{layer}.mlp.{word}"]
    }


def proposal(folder: Path) -> str:
    return succeeds("recipes", "new", folder).out


def comes_back(source: Path, text: str) -> Tensors:
    """Pack by a recipe; converted back to `hub`, the folder is the source."""
    recipe = source.parent / "recipe.yaml"
    recipe.write_text(text)
    succeeds("recipes", "check", recipe)
    made = [source.parent / name for name in ("packed", "experts", "back")]
    succeeds("pack", source, made[0], "--recipe", recipe)
    succeeds("convert", made[0], made[1], "--to", "experts", "--recipe", recipe)
    succeeds("convert", made[1], made[2], "--to", "hub", "--recipe", recipe)
    assert read_folder(made[2]) == read_folder(source)
    return read_folder(made[0])


# Families

#: These have towers of full size, seconds to build; the experts of aria_text and gemma4 are the same.
LARGE = {"aria", "diffusion_gemma"}
MODEL_TYPES = sorted({name for recipe in load_shipped() for name in recipe.model_types} - set(NOT_BUILT) - LARGE)
#: One of each recipe's families is converted, of the others names and shapes are enough.
CONVERTED = {min(set(recipe.model_types) & set(MODEL_TYPES), default="") for recipe in load_shipped()}
#: Packed names alike and bytes not: what the class holds differs from what is published, which headers do not tell.
OTHER_BYTES = {"aria", "qwen3_vl_moe", "longcat_flash"}
#: Gate and up have names that say nothing of them.
NOT_NAMED = {"dots3_note"}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_proposal_says_what_the_shipped_recipe_says(model_type: str, tmp_path: Path) -> None:
    save_published(build(model_type), tmp_path / "source", max_shard_size="1GB")
    source = open_checkpoint(tmp_path / "source")
    shipped = select_recipe(source)
    units = find_units(source, shipped).units
    joins = [rule.value for unit in units for rule, _ in unit.hits if set(parts_of(rule.value)) & set(shipped.part_ids)]
    is_fused = any("Concat" in repr(value) or "Interleave" in repr(value) for value in joins)
    text = propose(source._replace(config={**source.config, "model_type": "never_seen"}))
    assert ("DECIDE" in text) == (is_fused or model_type in NOT_NAMED)
    assert "PROBLEM" not in text
    is_interleaved = any("Interleave" in repr(value) for value in joins)
    recipe = parse_recipe(decided(text, "interleave" if is_interleaved else "concat"), "proposed", "proposed")
    found = find_units(source, recipe)
    assert found.units
    assert not found.problems
    of_experts = {name for unit in units for name in stacked_names(unit.hits, shipped)}
    assert {tensor.spec.name for unit in found.units for tensor in unit.tensors()} == of_experts
    if model_type in CONVERTED:
        assert_same_as_shipped(source, recipe, shipped, tmp_path)


def stacked_names(hits: object, recipe: Recipe) -> set[str]:
    return {
        held.spec.name
        for rule, tensors in hits  # type: ignore[attr-defined]
        if set(parts_of(rule.value)) & set(recipe.part_ids)
        for held in tensors.values()
    }


def assert_same_as_shipped(source: Checkpoint, recipe: Recipe, shipped: Recipe, folder: Path) -> None:
    """Packed and back is the source; packed is what the shipped recipe makes, where both have the same names."""
    made = {}
    for name, start, by, layout in (
        ("packed", "source", recipe, "packed"),
        ("experts", "packed", recipe, "experts"),
        ("back", "experts", recipe, "hub"),
        ("shipped", "source", shipped, "packed"),
    ):
        execute(plan(open_checkpoint(folder / start), by, layout, Options()), folder / name, ["test"], fsync=False)
        made[name] = read_folder(folder / name)
    assert made["back"] == read_folder(folder / "source")
    if made["packed"].keys() == made["shipped"].keys():
        assert (made["packed"] == made["shipped"]) != (shipped.name in OTHER_BYTES)


# What headers tell


def test_usual_names_are_decided_and_check_accepts_the_proposal(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", experts_layout(), UNKNOWN, 2)
    text = proposal(source)
    assert (
        "# model.layers.{0..1}: 4 experts in mlp.experts, one by one, I = 6, H = 10; gate_proj.weight as gate," in text
    )
    assert "gate_up_down" in text  # a shipped recipe that fits
    assert "(routers, by their size): model.layers.{0..1}.mlp.gate.weight." in text
    assert "\n  I: moe_intermediate_size  # 6\n" in text
    assert comes_back(source, text) == pack_by_hand(experts_layout())


@pytest.mark.parametrize(
    ("names", "shapes"),
    [
        (("w1", "w3", "w2"), ((6, 10), (6, 10), (10, 6))),
        (("up_proj", "down_proj"), ((6, 10), (10, 6))),
        (("fc1", "fc2"), ((6, 10), (10, 6))),
        (("0", "2"), ((6, 10), (10, 6))),
        (("gate", "up", "down"), ((10, 6), (10, 6), (6, 10))),
    ],
    ids=["w1 w3 w2", "not gated", "fc1 fc2", "a sequence of layers", "transposed"],
)
def test_experts_one_by_one(names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], tmp_path: Path) -> None:
    """As many experts as layers: neither the word `experts` nor numbers alone tell which hole is theirs."""
    tensors: Tensors = {}
    for layer in range(4):
        tensors[f"net.h.{layer}.router.weight"] = tensor((4, 10))
        for expert in range(4):
            for word, shape in zip(names, shapes, strict=True):
                name = f"net.h.{layer}.units.{expert}.{word}"
                tensors[f"{name}.weight"] = tensor(shape, seed=name)
                tensors[f"{name}.bias"] = tensor((6,) if word != names[-1] else (10,), seed=f"{name}.bias")
    source = write_folder(tmp_path / "source", tensors, {**UNKNOWN, "num_layers": 4}, 1)
    made = comes_back(source, proposal(source))
    stem = "net.h.3.units.experts"
    if len(names) == 2:
        assert made[f"{stem}.up_proj"].shape == (4, 6, 10)
        return
    is_transposed = names[0] == "gate"
    gate, up = (tensors[f"net.h.3.units.1.{word}.weight"].content for word in names[:2])
    rows = made[f"{stem}.gate_up_proj"].content[240:480]
    assert rows == (by_columns(gate) + by_columns(up) if is_transposed else gate + up)
    assert made[f"{stem}.gate_up_proj_bias"].shape == (4, 12)


def by_columns(content: bytes) -> bytes:
    """A matrix [10, 6] of two bytes a number, transposed."""
    return b"".join(content[2 * (6 * row + column) :][:2] for column in range(6) for row in range(10))


@pytest.mark.parametrize("names", [("alpha", "beta", "gamma"), ("w1", "w2", "w3")], ids=["unknown", "unusual shapes"])
def test_which_of_two_matrices_is_the_gate_is_asked(names: tuple[str, str, str], tmp_path: Path) -> None:
    """Of w1, w2, w3 the last has the shape of the way out: the usual meaning of the names does not hold."""
    source = write_folder(tmp_path / "source", gated("model.layers.0.experts", names), UNKNOWN, 1)
    text = proposal(source)
    (tmp_path / "mine.yaml").write_text(text)
    numbers = [number for number, line in enumerate(text.splitlines(), 1) if line.endswith(": DECIDE")]
    message = refused("recipes", "check", tmp_path / "mine.yaml", within=tmp_path)
    assert re.findall(r"mine.yaml:(\d+): not decided yet", message) == list(map(str, numbers))
    assert len(numbers) == 2
    assert f'"{{block}}.experts.{{expert}}.{names[2]}.weight [H, I]": down' in text
    made = []
    for first, second in (("gate", "up"), ("up", "gate")):
        choices = [text.splitlines()[number - 2] for number in numbers]
        assert all(re.search(r"# DECIDE: (gate, or up|up, or gate)$", line) for line in choices)
        chosen = text.replace(": DECIDE\n", f": {first}\n", 1).replace(": DECIDE\n", f": {second}\n", 1)
        folder = tmp_path / first
        folder.mkdir()
        write_folder(folder / "source", read_folder(source), UNKNOWN, 1)
        made.append(comes_back(folder / "source", chosen)["model.layers.0.experts.gate_up_proj"].content)
    assert made[0][:240] == made[1][120:240] + made[1][:120]


def test_how_a_fused_tensor_is_joined_is_asked(tmp_path: Path) -> None:
    shapes = {
        "experts.gate_up_proj": (4, 12, 10),
        "experts.gate_up_proj_bias": (4, 12),
        "experts.down_proj": (4, 10, 6),
    }
    source = write_folder(tmp_path / "source", packed(shapes), UNKNOWN, 1)
    text = proposal(source)
    assert "    # DECIDE: {concat: [gate, up]}, or {interleave: [gate, up]}\n" in text
    assert "    # DECIDE: {concat: [gate_bias, up_bias]}, or {interleave: [gate_bias, up_bias]}\n" in text
    comes_back(source, decided(text, "interleave"))
    experts = read_folder(tmp_path / "experts")
    rows = packed(shapes)["model.layers.1.mlp.experts.gate_up_proj"].content
    assert experts["model.layers.1.mlp.experts.2.gate_proj.weight"].content == b"".join(
        rows[at : at + 20] for at in range(480, 720, 40)
    )


@pytest.mark.parametrize("sizes", [((4, 10, 10), (4, 10, 5)), ((4, 20, 10), (4, 10, 10))], ids=["2I == H", "I == H"])
def test_the_orientation_of_square_matrices_is_asked(sizes: tuple[tuple[int, ...], ...], tmp_path: Path) -> None:
    shapes = dict(zip(("experts.gate_up_proj", "experts.down_proj"), sizes, strict=True))
    text = propose(open_checkpoint(write_folder(tmp_path / "source", packed(shapes), UNKNOWN, 1)))
    assert sum("{transpose: " in line for line in text.splitlines() if line.startswith("    #   ")) in (1, 2)
    (tmp_path / "source").rename(tmp_path / "other")
    comes_back(write_folder(tmp_path / "source", packed(shapes), UNKNOWN, 1), decided(text, "transpose"))


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_a_quantized_checkpoint_is_proposed_in_full_precision(form: str, tmp_path: Path) -> None:
    plain = experts_layout(inner=128, hidden=256)
    config = {**UNKNOWN, "moe_intermediate_size": 128, "hidden_size": 256}
    quantized: Tensors = {}
    for name, item in plain.items():
        if ".experts." not in name:
            quantized[name] = item
            continue
        rows, columns = item.shape
        if form == "fp8":
            quantized[name] = tensor(item.shape, "F8_E4M3", name)
            quantized[f"{name}_scale_inv"] = tensor((rows // 128, columns // 128), "F32", f"{name}s")
        else:
            quantized[f"{name}_packed"] = tensor((rows, columns // 8), "I32", name)
            quantized[f"{name}_scale"] = tensor((rows, columns // 32), "BF16", f"{name}s")
            quantized[f"{name}_shape"] = Tensor("I64", (2,), b"".join(n.to_bytes(8, "little") for n in item.shape))
    source = write_folder(tmp_path / "source", quantized, config, 1)
    text = proposal(source)
    assert body(text) == body(proposal(write_folder(tmp_path / "plain", plain, config, 1)))
    assert "gate_up_down" in text
    comes_back(source, text)


def test_layers_that_are_stored_otherwise_have_lines_of_their_own(tmp_path: Path) -> None:
    """Layers that predict further tokens: one by one where the others are packed, or under other names."""
    shapes = {"experts.gate_up_proj": (4, 12, 10), "experts.down_proj": (4, 10, 6)}
    tensors = packed(shapes) | gated("mtp.layers.0.mlp.experts") | gated("draft.mlp.experts", ("w1", "w3", "w2"))
    source = write_folder(tmp_path / "source", tensors, UNKNOWN, 1)
    text = decided(proposal(source))
    found = find_units(open_checkpoint(source), parse_recipe(text, "proposed", "proposed"))
    assert not found.problems
    assert sorted(unit.block for unit in found.units) == ["mlp", "model.layers.0", "model.layers.1", "mtp.layers.0"]
    (tmp_path / "recipe.yaml").write_text(text)
    succeeds("pack", source, tmp_path / "packed", "--recipe", tmp_path / "recipe.yaml")
    succeeds("unpack", tmp_path / "packed", tmp_path / "back")
    assert "draft.mlp.experts_2.gate_up_proj" in read_folder(tmp_path / "packed")
    assert read_folder(tmp_path / "back") == tensors


def test_what_is_numbered_alike_beside_experts_is_only_mentioned(tmp_path: Path) -> None:
    tensors = experts_layout() | gated("model.layers.0.mlps") | gated("model.layers.0.mlp.shared_experts")
    text = proposal(write_folder(tmp_path / "source", tensors, UNKNOWN, 1))
    assert "# Not taken for experts, though alike: model.layers.0.mlps.\n" in text
    assert "(shared experts): model.layers.0.mlp.shared_experts.\n" in text
    assert body(text) == body(proposal(write_folder(tmp_path / "plain", experts_layout(), UNKNOWN, 1)))


def test_a_missing_expert_is_a_problem_in_the_comments(tmp_path: Path) -> None:
    tensors = experts_layout()
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    text = proposal(write_folder(tmp_path / "source", tensors, UNKNOWN, 1))
    assert "# PROBLEM: model.layers.1: mlp.experts.{expert}.up_proj.weight has 3 of 4 experts; missing: 2" in text


# What cannot be proposed


def test_without_experts_there_is_nothing_to_propose(tmp_path: Path) -> None:
    dense = {name.replace(".experts.0", ""): item for name, item in experts_layout(4, 1).items()}
    folder = write_folder(tmp_path / "dense", dense, UNKNOWN, 1)
    assert "A dense model needs no recipe." in refused("recipes", "new", folder, within=tmp_path)
    numbered = {name.replace(".experts.", ".experts.expert_"): item for name, item in experts_layout().items()}
    folder = write_folder(tmp_path / "numbered", numbered, UNKNOWN, 1)
    message = refused("recipes", "new", folder, within=tmp_path)
    assert "24 names say so: model.layers.0.mlp.experts.expert_0.gate_proj.weight [6, 10]" in message


HOSTILE = [
    "gate'\\\"",
    "#: x",
    "{up}",
    "- &a",
    "*b",
    "\U0001f600",
    "!!python/object:",
    "down, DECIDE",
    "a b",
    "]",
]


@pytest.mark.parametrize("word", HOSTILE)
def test_names_cannot_break_out_of_the_proposal(word: str, tmp_path: Path) -> None:
    tensors = {name.replace("model", word): item for name, item in experts_layout().items()}
    tensors |= gated(f"x.{word}.0.moe", (word, "up_proj", "down_proj"))
    config = {**UNKNOWN, "model_type": f"{word}\n# {word}", f"num_experts: {word}": 4}
    source = write_folder(tmp_path / "source", tensors, config, 1)
    if any(character in word for character in "{ "):
        assert "names that no recipe can say" in refused("recipes", "new", source, within=tmp_path)
        return
    text = decided(proposal(source))
    assert all(line.isprintable() for line in text.splitlines())
    recipe = parse_recipe(text, "proposed", "proposed")
    assert recipe.model_types == (config["model_type"],)
    assert not find_units(open_checkpoint(source), with_forms(recipe, open_checkpoint(source))).problems
