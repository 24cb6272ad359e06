"""Bytes as a recipe, of layouts and of rules for formats."""

from __future__ import annotations

from collections.abc import Iterator

from moeconv.errors import MoeconvError, RecipeError
from moeconv.recipe import Recipe
from moeconv.recipe_file import parse_recipe, shipped_folder
from moeconv.scheme import Decider, Scheme, read_rules
from tests.fuzz.memory import assert_worded

MAX_LEN = 4096
_RULES = """about: FP8 attention, 4-bit experts
extends: gate_up_down
quantize:
  - {match: "*.layers.0.*", format: keep}
  - {match: "*.[a-z]*.?", format: nf4, double_quant: true}
  - {match: "*.experts.*", format: w4a16, group_size: 32, search: mse}
"""


def seeds() -> Iterator[bytes]:
    yield _RULES.encode()
    for path in sorted(shipped_folder().glob("*.yaml")):
        if path.stat().st_size <= MAX_LEN:
            yield path.read_bytes()


def one_input(data: bytes) -> None:
    """A recipe that is accepted says the same when its own text is read again; rules can be asked for any name."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    try:
        recipe = parse_recipe(text, "fuzzed", "fuzzed.yaml")
    except RecipeError as error:
        assert_worded(error)
    else:
        again = parse_recipe(recipe.text, "fuzzed", "fuzzed.yaml")
        assert _said(again) == _said(recipe)
    try:
        read = read_rules(text, "fuzzed.yaml")
    except MoeconvError:
        return
    if read is not None:
        scheme = Scheme(read[0], None, (), None, False, "")
        decider = Decider(scheme, recipe_keep(text), 4)
        for name in ("model.layers.0.mlp.gate", "lm_head", "a" * 200):
            decider.decide(name, is_expert=False)
        decider.unused()


def recipe_keep(text: str) -> tuple[str, ...]:
    """Words of the text as patterns of modules that are kept."""
    return tuple(text.split()[:20])


def _said(recipe: Recipe) -> str:
    """All that a recipe says but its own text and the lines on which it says it."""
    components = [
        (component.parts, {
            layout: [(str(rule.pattern), list(map(str, rule.claim)), rule.value, str(rule.pad)) for rule in rules]
            for layout, rules in component.rules.items()
        })
        for component in recipe.components
    ]  # fmt: skip
    return repr((components, recipe._replace(components=(), text="", part_claims={}, part_ids={})))
