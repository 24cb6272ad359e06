"""What each matrix of a checkpoint gets, where matrices depend on each other.

`scheme` decides by names. Here shapes are asked, and what engines hold together is given one format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence

from moeconv.errors import Problem
from moeconv.moves import Change, Fill
from moeconv.names import Pattern, collapse, natural_key
from moeconv.recipe import Recipe
from moeconv.scheme import Decider, Decision
from moeconv.tensors import Spec
from moeconv.units import Unit, other_names
from moeconv.values import WEIGHT, Fates, Kind, is_layer, is_matrix, is_same, is_stack

#: Why a tensor is kept that may be experts without being described.
STACK = "several matrices in one tensor, which the recipe does not name"


class Choices:
    """Decides all targets of a quantization.

    Args:
        decider: decides by name.
        recipe: how experts are stored.
        fates: knows the dtypes in which matrices are encoded.
        problems: receives what cannot be.

    Attributes:
        overridden: modules that rules quantize and that are kept by default.
    """

    def __init__(self, decider: Decider, recipe: Recipe, fates: Fates, problems: list[Problem]) -> None:
        self.overridden: list[str] = []
        self._decider = decider
        self._recipe = recipe
        self._fates = fates
        self._problems = problems
        self._refused: dict[str, list[str]] = {}
        self._kept_why: dict[str, str] = {}

    def is_any_quantized(self, changes: Sequence[Change]) -> bool:
        """Whether a matrix of experts gets a format. All are asked, so that rules that name one count as used."""
        experts = [made for made in changes if set(made.unit.component.parts) & set(self._recipe.part_ids)]
        held = [(made.unit.block, spec) for made in experts for spec in made.targets]
        asked = [(block, spec) for block, spec in held if is_matrix(spec) or is_stack(spec)]
        named = [(block, self._decider.decide(module_of(spec), is_expert=True)) for block, spec in asked]
        self._kept_why = {block: decision.why for block, decision in named if not decision.format}
        return any(decision.format for _, decision in named)

    def of(
        self, fills: Sequence[Fill], blocks: Mapping[str, str], stacks: Mapping[str, Sequence[str]]
    ) -> dict[str, Decision]:
        """The decision for every target, by name.

        Args:
            fills: all targets.
            blocks: for each tensor of an expert, the block that it belongs to.
            stacks: for each block, the names of its experts' tensors.
        """
        decisions: dict[str, Decision] = {}
        for fill in fills:
            if fill.target.name not in decisions or not fill.at:  # all pieces of a tensor get one format
                decisions[fill.target.name] = self._decide(fill, blocks.get(fill.target.name))
        self._problems += [
            Problem(f"{line} cannot be {why}", "Choose another format or group size for it, or keep it with --ignore.")
            for why, names in self._refused.items()
            for line in collapse(names)
        ]
        self._keep_together(decisions)
        self._check_experts(decisions, stacks)
        return decisions

    def _decide(self, fill: Fill, block: str | None) -> Decision:
        """The format of a target; `block` is that of an expert's tensor."""
        spec, is_expert = fill.target, block is not None
        if not is_matrix(spec):
            if is_stack(spec) and block is not None:
                return self._decide_stack(fill, block)
            is_unknown = is_stack(spec) and self._decider.kept(module_of(spec)) is None
            return Decision(None, STACK if is_unknown else "no matrix of full precision")
        decision = self._decider.decide(module_of(spec), is_expert=is_expert)
        if decision.format is None:
            return decision
        if decision.is_named and not is_expert and self._decider.kept(module_of(spec)) is not None:
            self.overridden.append(module_of(spec))
        if decision.format.experts_kept and is_expert:
            why = "engines have no experts of that kind; --experts keep leaves them as they are"
            self._refused.setdefault(f"{decision.format.name}: {why}", []).append(spec.name)
            return Decision(None, f"experts cannot be {decision.format.name}")
        if decision.format.is_packed and is_expert and block in self._kept_why:
            return Decision(None, self._kept_why[block])
        if decision.format.is_packed and is_expert:
            self._refused.setdefault(f"{decision.format.name}: its experts would be one tensor", []).append(spec.name)
            return Decision(None, f"only packed experts can be {decision.format.name}")
        if decision.format.experts_only and not is_expert:
            self._refused.setdefault(f"{decision.format.name}: only experts can have it", []).append(spec.name)
            return Decision(None, f"only experts can be {decision.format.name}")
        refused = decision.format.refusal(spec.shape, self._fates.dtype(spec.dtype))
        if refused is None:
            return decision
        if is_expert or decision.is_named:
            self._refused.setdefault(f"{decision.format.name}: {refused}", []).append(spec.name)
        return Decision(None, f"{refused}, so not {decision.format.name}")

    def _decide_stack(self, fill: Fill, block: str) -> Decision:
        """The format of experts in one tensor, which only few formats can have."""
        spec = fill.target
        decision = self._decider.decide(module_of(spec), is_expert=True)
        made = decision.format
        if made is not None and not made.is_packed and decision.is_named:
            why = "its experts are one tensor beside those of a packed format"
            self._refused.setdefault(f"{made.name}: {why}", []).append(spec.name)
        if made is None or not made.is_packed:
            return Decision(None, self._kept_why.get(block, "kept with its layer's experts"))
        refused = made.refusal(spec.shape[1:], self._fates.dtype(spec.dtype)) or made.expert_refusal(spec.shape[1:])
        if refused is None:
            return decision
        self._refused.setdefault(f"{made.name}: {refused}", []).append(spec.name)
        return Decision(None, f"{refused}, so not {made.name}")

    def _keep_together(self, decisions: dict[str, Decision]) -> None:
        """What engines fuse is quantized together or not at all."""
        usual = Counter(decision.format for decision in decisions.values()).most_common(1)[0][0] if decisions else None
        # Of two that differ, one has not the usual format: only its partners have to be looked at.
        unusual = [name for name, decision in decisions.items() if decision.format is not usual]
        asked = {p + WEIGHT for name in unusual for p in self._decider.partners(name.removesuffix(WEIGHT))}
        before = {name: decision for name, decision in decisions.items() if name in asked}
        unlike: dict[tuple[str, str], list[str]] = {}
        for name, decision in before.items():
            if decision.format is None:
                continue
            for partner in self._decider.partners(name.removesuffix(WEIGHT)):
                other = before.get(partner + WEIGHT)
                if other is None or other.format is decision.format or is_same(other.format, decision.format):
                    continue
                if decision.is_named or other.is_named:
                    rest = f"{partner.rpartition('.')[2]} {other.format.name if other.format else 'kept'}"
                    unlike.setdefault((decision.format.name, rest), []).append(name)
                decisions[name] = Decision(None, f"engines fuse it with {partner.rsplit('.', 1)[-1]}, which is kept")
                break
        self._problems += [
            Problem(
                f"{line} would be {own} and its {rest}; engines fuse the two", "Write a rule that gives both the same."
            )
            for (own, rest), names in unlike.items()
            for line in collapse(names)
        ]

    def _check_experts(self, decisions: Mapping[str, Decision], stacks: Mapping[str, Sequence[str]]) -> None:
        """All experts of a layer get one format: engines hold them together and are told of the first expert alone."""
        if "experts" not in self._recipe.layouts:
            return
        goal = self._recipe.layout("experts")
        rules = [rule for component in self._recipe.components for rule in component.rules[goal]]
        for names in stacks.values():
            matrices = [name for name in names if name.endswith(WEIGHT)]
            if len({decisions[name].format for name in matrices}) > 1:
                self._check_stacks(decisions, sorted(matrices, key=natural_key), [rule.pattern for rule in rules])

    def _check_stacks(self, decisions: Mapping[str, Decision], names: Sequence[str], patterns: list[Pattern]) -> None:
        """The same of one block; experts that are counted apart may differ."""
        firsts: dict[tuple[object, ...], str] = {}
        unlike: set[tuple[object, ...]] = set()
        for name in names:
            found = next((pattern for pattern in patterns if pattern.ids and pattern.match(name)), None)
            if found is None:
                continue
            group = (found.before, found.ids)
            first = firsts.setdefault(group, name)
            one, other = decisions[first].format, decisions[name].format
            if group not in unlike and not is_same(one, other):
                unlike.add(group)
                self._problems.append(
                    Problem(
                        f"{first} would be {one.name if one else 'kept'} and {name} {other.name if other else 'kept'}; "
                        "engines hold all experts of a layer together",
                        "Write a rule that gives all of them the same.",
                    )
                )


def kept_modules(kinds: Iterable[Kind], blocks: Container[str], units: Iterable[Unit]) -> list[str]:
    """Modules that hold matrices in full precision, by the names that they have in any layout.

    Args:
        kinds: every target.
        blocks: names of tensors of experts.
        units: of the source.
    """
    plain = [value.fill.target for kind in kinds if kind[0].format is None for value in kind]
    kept = [module_of(spec) for spec in plain if is_layer(spec)]
    kept += {spec.name.rpartition(".")[0] for spec in plain if is_stack(spec) and spec.name in blocks}
    kept_set = set(kept)
    return kept + [name for unit in units for name in other_names(unit, kept_set)]


def module_of(spec: Spec) -> str:
    """A matrix' module."""
    return spec.name.removesuffix(WEIGHT)
