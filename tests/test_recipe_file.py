import json
from pathlib import Path

import pytest

from moeconv.recipe_file import load_recipe, load_shipped, parse_recipe, recipe_text, shipped_names
from tests.commands import refused, refused_source, succeeds
from tests.folders import CONFIG, Tensor, experts_layout, pack_by_hand, read_folder, tensor, write_folder
from tests.recipe_table import README, with_table

GOOD = """\
about: tiny
model_types: [test_moe]
config: [., text_config]
dims:
  E: num_experts
  I: [moe_size, size]
  H: hidden_size
optional: [bias]
layouts:
  experts:
    "{block}.{expert}.gate [I, H]": gate
    "{block}.{expert}.up [I, H]": up
    "{block}.{expert}.down [H, I]": down
    "{block}.{expert}.bias [H]": bias
  packed:
    "{block}.all.gate_up [E, 2*I, H]": {concat: [gate, up]}
    "{block}.all.down [E, I, H]": {transpose: down}
    "{block}.all.bias [E, H]": bias
  hub: experts
"""


def changed(*changes: tuple[str, str]) -> str:
    text = GOOD
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


GATE_UP = "{concat: [gate, up]}"
MISTAKES = [
    (("about: tiny", "abuot: tiny"), 1, "unknown key 'abuot'.", "Did you mean 'about'? Known: about, "),
    (("optional: [bias]", "remember: [bias]"), 8, "unknown key 'remember'.", "Known: about, config, decoded, dims, "),
    (("dims:", "model_types: [x]\ndims:"), 4, "'model_types' stands here twice", "Keep one of the two."),
    (("  H: hidden_size", "  I: hidden_size"), 7, "'I' stands here twice", "Keep one"),
    (("  H: hidden_size", "  h: hidden_size"), 7, "'h' is not a symbol", "Symbols start with a capital"),
    (("  H: hidden_size", "  2*H: hidden_size"), 7, "'2*H' is not a symbol", "Symbols start with a capital"),
    (("dims:", "dims: 3\nconfig2:"), 5, "unknown key 'config2'.", "Did you mean 'config'?"),
    (("[moe_size, size]", "{a: b}"), 6, "expected a list", "Write [a, b] here."),
    (("[moe_size, size]", "[[moe_size], size]"), 6, "expected a single value", "Write one word"),
    (("  packed:", "  pakced:"), 15, "unknown layout 'pakced'.", "Did you mean 'packed'? Known: experts, hub, packed."),
    (("  hub: experts", "  hub: expert"), 19, "layout 'hub' cannot be 'expert'", "Did you mean 'experts'?"),
    (("  hub: experts", "  hub: hub"), 19, "layout 'hub' cannot be 'hub'", "Known: experts, packed."),
    (("optional: [bias]", "decoded: gate_up"), 8, "'gate_up' is no shipped recipe", "Did you mean 'gate_up_down'?"),
    (("  hub: experts", "  hub: [experts]"), 19, "expected a single value", "Write one word"),
    ((GATE_UP, "{concatt: [gate, up]}"), 16, "unknown op 'concatt'.", "Did you mean 'concat'? Known: concat, "),
    ((GATE_UP, "{concat: [gate, up], axes: 1}"), 16, "unknown op 'axes'.", "Known: concat, interleave, transpose."),
    ((GATE_UP, "{concat: [gate, up], axis: 1}"), 16, "axis 1 is not allowed", "Use 0 (first) or -1 (last)"),
    ((GATE_UP, "{concat: [gate, up], axis: last}"), 16, "'last' is not a whole number", "Write a number"),
    ((GATE_UP, "{transpose: down, axis: 0}"), 16, "transpose has no axis", "It exchanges the last two axes."),
    ((GATE_UP, "{concat: [gate]}"), 16, "concat needs two parts or more", "Write [gate, up]."),
    ((GATE_UP, "{concat: gate}"), 16, "expected a list", "Write [a, b]"),
    ((GATE_UP, "{concat: [gate, up], interleave: [gate, up]}"), 16, "expected one op", "Known: concat, "),
    ((GATE_UP, "{axis: 0}"), 16, "expected one op", "Known: concat, "),
    ((GATE_UP, "[gate, up]"), 16, "expected a single value", "Write one word"),
    ((GATE_UP, "{concat: [gate, {concat: [up, up2], pad: E}]}"), 16, "unknown op 'pad'.", "Known: "),
    ((GATE_UP, "{concat: [gate, up], pad: e}"), 16, "'e': cannot read 'e'", "Write how many experts"),
    ((".gate_up [E, 2*I, H]", ".gate_up"), 16, "'{block}.all.gate_up' has no shape", 'Write "NAME [E, 2*I, H]".'),
    ((".gate_up [E, 2*I, H]", ".gate_up [E, 2I, H]"), 16, "'2I': cannot read 'I'", "Write "),
    ((".gate_up [E, 2*I, H]", ".gate_up [E, 2*I, H"), 16, "is not a shape such as", "Write "),
    ((".gate_up [E, 2*I, H]", ".{layer}.x [E, I]"), 16, "has an unknown hole; known: {block}, {expert}", "Write "),
    (("{block}.all.gate_up [", "gate_up ["), 16, "does not start with {block}.", "Write "),
    (("{block}.{expert}.up [I", "{block}.e{expert}.up [I"), 12, "{expert} must stand alone between dots", "Write "),
    (("[E, 2*I, H]", "[E, I, H]"), 16, "[E, I, H] is not the shape of what it is made of", "Correct the shape"),
    (("[E, 2*I, H]", "[E, H, 2*I]"), 16, "[E, H, 2*I] is not the shape of what it is made of", "Correct the shape"),
    (("[E, 2*I, H]", "[2*E, I, H]"), 16, "[2*E, I, H] is not the shape of what it is made of", "Correct the shape"),
    (("[E, 2*I, H]", "[2*I, H]"), 16, "[2*I, H] is not the shape of what it is made of", "Correct the shape"),
    ((GATE_UP, "{concat: [gate, up], axis: -1}"), 16, "[E, 2*I, H] is not the shape", "Correct the shape"),
    ((".{expert}.up [I, H]", ".{expert}.up [H, I]"), 16, "differ outside axis 0", "Correct the op"),
    (("{transpose: down}", "down"), 17, "[E, I, H] is not the shape of what it is made of", "Correct the shape"),
    (("[E, H]\": bias", "[E, H]\": {transpose: bias}"), 18, "transpose needs two axes", "Correct the op"),
]  # fmt: skip
WHOLE = [
    (('    "{block}.all.bias [E, H]": bias\n', ""), "layout 'packed' does not say where bias is stored"),
    (('    "{block}.{expert}.up [I, H]": up\n', ""), "part 'up' has no tensor of its own in any layout"),
    (("[E, H]\": bias", "[E, H]\": down"), "layout 'packed' holds down twice"),
    (("optional: [bias]", "optional: [bais]"), "optional part 'bais' stands in no layout\n  -> Did you mean 'bias'?"),
    (("  hub: experts\n", "  hub: packed\n  packed: hub\n"), "'packed' stands here twice"),
]  # fmt: skip


def refusal(folder: Path, text: str) -> str:
    path = folder / "r.yaml"
    path.write_text(text)
    return refused("recipes", "check", path, within=folder)


@pytest.mark.parametrize(("change", "line", "says", "remedy"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_reported_with_its_line(
    tmp_path: Path, change: tuple[str, str], line: int, says: str, remedy: str
) -> None:
    message = refusal(tmp_path, changed(change))
    assert message.startswith(f"moeconv: {tmp_path / 'r.yaml'}:{line}: ")
    first, second = message.rstrip("\n").split("\n  -> ")
    assert says in first
    assert second.startswith(remedy)


@pytest.mark.parametrize(("change", "says"), WHOLE, ids=lambda value: str(value)[:40])
def test_a_contradiction_is_reported_with_its_file(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    message = refusal(tmp_path, changed(change))
    assert message.startswith(f"moeconv: {tmp_path / 'r.yaml'}:")
    assert says in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("just words", "r.yaml:1: expected a mapping"),
        ("- a\n- b\n", "r.yaml:1: expected a mapping"),
        ("about: x\n", "fewer than two layouts are described"),
        ("layouts: {packed: {}, experts: {}}\n", "fewer than two layouts are described"),
        (changed(("  hub: experts", "  hub: packed")).split("  packed:")[0] + "  hub: packed\n", "'packed', which the"),
        ("extends: gate_up_dwon\n", "r.yaml:1: extends the unknown recipe 'gate_up_dwon'\n  -> Did you"),
        ("extends: [gate_up_down]\n", "r.yaml:1: expected a single value"),
        ("a: &a [x]\nb: *a\n", "r.yaml:1: anchors, aliases and tags are not allowed"),
        ("about: !!python/object/apply:os.system ['true']\n", "r.yaml:1: anchors, aliases and tags are not allowed"),
        ("about: " + "[" * 300_000, "r.yaml:1: nested too deeply"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str, says: str) -> None:
    assert says in refusal(tmp_path, text)


def test_deep_expressions_are_refused(tmp_path: Path) -> None:
    deep = "{transpose: " * 600 + "down" + "}" * 600
    assert "r.yaml:17: nested too deeply" in refusal(tmp_path, changed(("{transpose: down}", deep)))


def test_a_recipe_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"about: \xff\n")
    for command in ("check", "show"):
        assert "cannot be read" in refused("recipes", command, tmp_path / "r.yaml", within=tmp_path)


def test_a_mistake_in_a_given_recipe_stops_a_conversion(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", experts_layout(), CONFIG, 1)
    (tmp_path / "r.yaml").write_text(changed((GATE_UP, "{concatt: [gate, up]}")))
    assert "r.yaml:16: unknown op 'concatt'." in refused_source(source, "--recipe", tmp_path / "r.yaml")


def test_a_good_recipe_is_read_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(GOOD)
    out = succeeds("recipes", "check", tmp_path / "r.yaml").out
    assert out == f"{tmp_path / 'r.yaml'}: layouts hub, packed, experts; parts gate, up, down, bias\n"
    recipe = parse_recipe(GOOD, "r", "r.yaml")
    assert recipe.dims == {"E": ("num_experts",), "I": ("moe_size", "size"), "H": ("hidden_size",)}
    assert recipe.optional == {"bias"}
    assert recipe.scopes == (".", "text_config")
    assert recipe.layout("hub") == "experts"


def tiny_source(folder: Path, *, bias: bool = True, config: dict[str, object] | None = None) -> Path:
    tensors = {}
    for expert in range(3):
        for part, shape in (("gate", (4, 6)), ("up", (4, 6)), ("down", (6, 4)), ("bias", (6,))):
            if bias or part != "bias":
                tensors[f"layer.0.{expert}.{part}"] = tensor(shape, seed=(expert, part))
    sizes = {"num_experts": 3, "size": 4, "hidden_size": 6}
    return write_folder(folder / "source", tensors, {"model_type": "test_moe", **sizes, **(config or {})}, 1)


@pytest.mark.parametrize("bias", [True, False])
def test_an_optional_part_may_be_missing_as_a_whole(tmp_path: Path, bias: bool) -> None:
    (tmp_path / "r.yaml").write_text(GOOD)
    source = tiny_source(tmp_path, bias=bias)
    succeeds("pack", source, tmp_path / "packed", "--recipe", tmp_path / "r.yaml")
    assert ("layer.0.all.bias" in read_folder(tmp_path / "packed")) == bias
    succeeds("unpack", tmp_path / "packed", tmp_path / "again")
    assert read_folder(tmp_path / "again") == read_folder(source)


def test_an_optional_part_that_only_some_experts_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(GOOD)
    source = tiny_source(tmp_path)
    tensors = read_folder(source)
    del tensors["layer.0.1.bias"]
    write_folder(source, tensors, json.loads((source / "config.json").read_text()), 1)
    message = refused_source(source, "--recipe", tmp_path / "r.yaml")
    assert "layer.0: {expert}.bias has 2 of 3 experts; missing: 1" in message


def test_sizes_are_looked_up_where_the_recipe_says(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(GOOD)
    inner = {"num_experts": None, "text_config": {"num_experts": 4}}
    source = tiny_source(tmp_path, config=inner)
    assert "has 3 of 4 experts; missing: 3" in refused_source(source, "--recipe", tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text(changed(("[., text_config]", "[., other_config]")))
    succeeds("pack", source, tmp_path / "packed", "--recipe", tmp_path / "r.yaml")


EXTENDING = """\
extends: gate_up_down
about: 'with "quotes", a colon: and a backslash \\'
model_types: [test_moe, "yes", "a: b"]
config: [., "deep er, scope"]
dims: {E: ["how many, experts?"]}
layouts:
  packed:
    "{block}.mlp.experts.up_gate [E, 2*I, H]": {concat: [up, gate]}
"""


def test_a_recipe_can_build_on_a_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(EXTENDING)
    tensors = experts_layout()
    config = {"model_type": "test_moe", "moe_intermediate_size": 6, "hidden_size": 10, "how many, experts?": 4}
    source = write_folder(tmp_path / "source", tensors, config, 2)
    succeeds("pack", source, tmp_path / "packed", "--recipe", tmp_path / "r.yaml")
    wanted = pack_by_hand(tensors)
    for layer in range(2):
        block = f"model.layers.{layer}.mlp.experts"
        dtype, shape, content = wanted.pop(f"{block}.gate_up_proj")
        halves = [content[at + 120 : at + 240] + content[at : at + 120] for at in range(0, 960, 240)]
        wanted[f"{block}.up_gate"] = Tensor(dtype, shape, b"".join(halves))
    assert read_folder(tmp_path / "packed") == wanted
    (tmp_path / "r.yaml").unlink()  # from here on only the manifest knows the recipe
    succeeds("unpack", tmp_path / "packed", tmp_path / "again")
    assert read_folder(tmp_path / "again") == tensors


def test_the_manifest_keeps_what_an_extending_recipe_means(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(EXTENDING)
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    again = parse_recipe(recipe.text, "r", "again")
    assert "extends" not in recipe.text
    for field in ("about", "model_types", "scopes", "dims", "optional", "aliases", "part_claims"):
        assert getattr(again, field) == getattr(recipe, field), field
    for one, other in zip(again.components, recipe.components, strict=True):
        assert one.parts == other.parts
        for layout, rules in one.rules.items():
            assert [(r.pattern, r.claim, r.value, r.pad) for r in rules] == [
                (r.pattern, r.claim, r.value, r.pad) for r in other.rules[layout]
            ]


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_recipe_can_be_extended_without_changing(tmp_path: Path, name: str) -> None:
    recipe, base = parse_recipe(f"extends: {name}\n", "child", "child.yaml"), load_recipe(name)
    again = parse_recipe(recipe.text, "child", "child.yaml")
    for component, other, read in zip(recipe.components, base.components, again.components, strict=True):
        for layout in component.rules:
            lines = [[(r.pattern, r.claim, r.value, r.pad) for r in c.rules[layout]] for c in (component, other, read)]
            assert lines[0] == lines[1] == lines[2]
    assert (again.dims, again.optional, again.aliases) == (base.dims, base.optional, base.aliases)


def test_shipped_recipes_do_not_shadow_each_other() -> None:
    assert len({recipe.name for recipe in load_shipped()}) == len(shipped_names())
    for name in shipped_names():
        assert recipe_text(name)[1].stem == name


def test_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", experts_layout(), CONFIG, 1)
    for content in ({"recipe": 3}, {"recipe": {"name": "r"}}, {"recipe": {"name": "r", "text": 3}}):
        (source / "moeconv.json").write_text(json.dumps(content))
        assert "moeconv.json names no recipe\n  -> Give --recipe" in refused_source(source)
    (source / "moeconv.json").write_text(json.dumps({"recipe": {"name": "r", "text": "abuot: x"}}))
    assert "moeconv.json (recipe r):1: unknown key 'abuot'" in refused_source(source)
    succeeds("pack", source, tmp_path / "target", "--recipe", "gate_up_down")
    assert read_folder(tmp_path / "target") == pack_by_hand(experts_layout())


def test_only_a_tensor_of_all_experts_can_be_padded(tmp_path: Path) -> None:
    path = tmp_path / "pad.yaml"
    text = recipe_text("gate_up_down")[0]
    line = '"{block}.mlp.experts.{expert}.down_proj.weight [H, I]": down'
    assert line in text
    path.write_text(text.replace(line, line.replace(": down", ": {concat: [down], pad: 1}")), encoding="utf-8")
    assert "pad is for a tensor that holds all experts" in refused("recipes", "check", path, within=tmp_path)


def test_parts_without_axes_cannot_be_joined(tmp_path: Path) -> None:
    path = tmp_path / "scalars.yaml"
    path.write_text(
        "about: scalars\nmodel_types: [x]\ndims: {E: num_experts}\nlayouts:\n"
        '  experts:\n    "{block}.experts.{expert}.gate_scale []": gate\n'
        '    "{block}.experts.{expert}.up_scale []": up\n'
        '  packed:\n    "{block}.experts.scale [E]": {concat: [gate, up], axis: -1}\n'
    )
    assert "axis -1 does not exist in []" in refused("recipes", "check", path, within=tmp_path)


def test_the_table_of_recipes_is_what_the_recipes_say() -> None:
    text = README.read_text(encoding="utf-8")
    assert text == with_table(text), "python -m tests.recipe_table writes it"
