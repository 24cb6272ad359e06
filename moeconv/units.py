"""What is found in a checkpoint: a component of a recipe, in one block, in one layout."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from moeconv.checkpoint import StoredTensor
from moeconv.dims import Dim
from moeconv.names import Pattern, collapse_rows, split_name
from moeconv.ops import Expression, parts_of
from moeconv.recipe import Component, Rule
from moeconv.tensors import Shape

Hits = dict[int, StoredTensor]


class Unit(NamedTuple):
    """One component of a recipe found in one block (layer) of a checkpoint.

    Attributes:
        component: what was found.
        block: where, such as `model.layers.3`.
        layout: how it is stored there.
        sizes: value of every symbol.
        part_shapes: shape of each part that is there.
        hits: for each rule of the layout, the tensors by expert id as named in the file (0 without an id).
    """

    component: Component
    block: str
    layout: str
    sizes: Mapping[str, int]
    part_shapes: Mapping[str, Shape]
    hits: tuple[tuple[Rule, Hits], ...]

    def tensors(self) -> list[StoredTensor]:
        """All tensors of the unit."""
        return [tensor for _, hits in self.hits for tensor in hits.values()]

    @property
    def parts(self) -> list[str]:
        """Names of the parts that are there, as the recipe has them; of a quantized matrix that of the matrix."""
        stored = [part for rule, _ in self.hits for part in parts_of(rule.value)]
        return list(dict.fromkeys(part.partition(".")[0] if self.component.form else part for part in stored))


def unit_names(units: Iterable[Unit]) -> list[str]:
    """Names of all tensors of units, collapsed (see `names.collapse`) without a look at each."""
    groups: dict[str, set[tuple[int, ...]]] = {}
    for rule, hits in (item for unit in units for item in unit.hits):
        template, integers = split_name(next(iter(hits.values())).spec.name)
        rows = groups.setdefault(template, set())
        from_last = rule.pattern.expert_integer
        if from_last is None:
            rows.add(integers)
        else:
            at = len(integers) + from_last
            before, behind = integers[:at], integers[at + 1 :]
            rows.update([(*before, expert, *behind) for expert in hits])
    return collapse_rows(groups)


def other_names(unit: Unit, modules: Collection[str]) -> set[str]:
    """What modules of a unit, such as its router, are called in other layouts: engines have names of their own.

    Args:
        unit: the unit.
        modules: those of interest, under any of their names.
    """
    names: dict[tuple[str, ...], set[str]] = {}
    for rule in (rule for rules in unit.component.rules.values() for rule in rules if rule.pattern.ids is None):
        module, _, last = rule.pattern.fill(unit.block, 0).rpartition(".")
        if last == "weight":
            names.setdefault(parts_of(rule.value), set()).add(module)
    return set().union(*(found for found in names.values() if not found.isdisjoint(modules)))


def layout_lines(component: Component, layout: str) -> set[tuple[Pattern, tuple[Dim, ...], Expression]]:
    """What a layout says of a component; layouts that say the same are one."""
    return {(rule.pattern, rule.claim, rule.value) for rule in component.rules.get(layout, ())}
