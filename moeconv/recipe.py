"""Recipes: how the experts of a family are stored, as checked data.

A recipe names the *parts* of one expert (gate, up, down, their biases and scales) and says, for each of
up to three *layouts* (`hub` as published, `packed` as transformers holds them, `experts` one tensor per
expert and projection), which tensors exist and what they are made of:

    layouts:
      experts:
        "{block}.mlp.experts.{expert}.gate_proj.weight [I, H]": gate
      packed:
        "{block}.mlp.experts.gate_up_proj [E, 2*I, H]": {concat: [gate, up]}
      hub: experts

A hole that one layout has and another lacks is the leading axis of the tensors that lack it: nothing else
says "stack". Shapes are claims, checked against headers in every run and against each other on loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from moeconv.dims import Dim
from moeconv.names import Pattern
from moeconv.ops import Expression, place
from moeconv.tensors import Shape

LAYOUTS = ("hub", "packed", "experts")


class Rule(NamedTuple):
    """One kind of tensor in one layout.

    Attributes:
        pattern: its names.
        claim: its shape.
        value: what it is made of.
        pad: experts beyond the last that the tensor has room for; written as zeros, not read.
        where: `FILE:LINE`.
    """

    pattern: Pattern
    claim: tuple[Dim, ...]
    value: Expression
    pad: Dim | None
    where: str


class Component(NamedTuple):
    """Parts that some layout joins, directly or through others: they are found and moved together.

    Attributes:
        parts: names of the parts, in the order of the recipe.
        rules: for each layout, the rules that hold these parts. A form lacks the layouts that it cannot have.
        form: how the matrices are quantized (`forms`); empty for full precision.
        forms: the same component quantized, as it may be found instead.
    """

    parts: tuple[str, ...]
    rules: Mapping[str, tuple[Rule, ...]]
    form: str = ""
    forms: tuple[Component, ...] = ()


class Recipe(NamedTuple):
    """A checked recipe.

    Attributes:
        name: file name without `.yaml`.
        about: one line for `recipes list`.
        model_types: values of `model_type` in config.json that the recipe is for.
        scopes: where in config.json sizes are looked up; "." is the top.
        dims: for each symbol, the config.json keys that may hold it, first that exists.
        optional: parts that a checkpoint may lack.
        forms: how the families publish quantized experts (`forms.yaml`), where names and shapes allow several forms.
        decoded: the recipe of the same experts in full precision, one by one; empty for this one.
        keep: modules that are not quantized by default, beside those that no recipe has quantized.
        aliases: layouts that are another layout, such as hub -> experts.
        components: see `Component`.
        part_claims: shape of each part, as sizes.
        part_ids: parts that exist once per expert, and the pattern that counts them.
        text: a file that says the same and extends nothing; kept in the manifest.
    """

    name: str
    about: str
    model_types: tuple[str, ...]
    scopes: tuple[str, ...]
    dims: Mapping[str, tuple[str, ...]]
    optional: frozenset[str]
    forms: tuple[str, ...]
    decoded: str
    keep: tuple[str, ...]
    aliases: Mapping[str, str]
    components: tuple[Component, ...]
    part_claims: Mapping[str, tuple[Dim, ...]]
    part_ids: Mapping[str, Pattern]
    text: str

    def layout(self, name: str) -> str:
        """The layout that `name` stands for, aliases resolved."""
        return self.aliases.get(name, name)

    @property
    def layouts(self) -> tuple[str, ...]:
        """Names of the layouts that the recipe can say, aliases included."""
        own = set(self.components[0].rules) | set(self.aliases)
        return tuple(name for name in LAYOUTS if name in own)


def stored_shape(rule: Rule, recipe: Recipe, part_shapes: Mapping[str, Shape], count: int | None, pad: int) -> Shape:
    """The shape that `rule`'s tensors have when the parts have `part_shapes`.

    Args:
        rule: where the parts are stored.
        recipe: the recipe that holds the rule.
        part_shapes: shape of each part.
        count: number of experts that one tensor holds; None where it holds one expert or no expert's part.
        pad: experts beyond the last.

    Raises:
        ShapeError: the parts do not fit together.
    """
    block, _ = place(rule.value, part_shapes)
    if count is None:
        return block
    if len(rule.claim) == len(block):  # the expert axis is folded into the first: [E*I, H]
        return ((count + pad) * block[0], *block[1:])
    return (count + pad, *block)
