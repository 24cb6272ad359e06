"""Plans that change values: quantize and dequantize.

The source is seen in full precision (`decoded_view`), its experts one by one; each matrix gets a format or keeps what
it has. The result is an ordinary plan, whose steps the executor runs like those of a change of layout.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache

from moeconv.budget import transcoding_memory
from moeconv.checkpoint import Checkpoint, LeftOut
from moeconv.config_json import MODELOPT_SETTINGS, Group, groups_of, rewritten
from moeconv.encoded import STATIC_SCALES, decoded_view
from moeconv.engines import KEPT, MIXED, Reading, format_readings, readings
from moeconv.errors import PlanError, Problem
from moeconv.formats import FLOATS, Probe
from moeconv.fused import torn_matrices
from moeconv.joined import joined_values
from moeconv.layouts import find_units
from moeconv.moves import Change, Fill, change, copy_of
from moeconv.names import Pattern, collapse, natural_key
from moeconv.plan import (
    NAME_BYTES,
    Options,
    Plan,
    fingerprint_of,
    jobs_of,
    reader_warnings,
    source_warnings,
)
from moeconv.recipe import Recipe
from moeconv.recipe_file import load_recipe
from moeconv.scheme import Decider, Decision, Scheme
from moeconv.shards import place_specs
from moeconv.steps import Step, Task, tasks_of
from moeconv.tensors import Spec
from moeconv.transcodes import ANYWHERE, value_steps
from moeconv.units import Unit
from moeconv.unpacked import unpacked_view
from moeconv.values import WEIGHT, Fates, Value, alike, is_layer, is_matrix, is_same, nbytes_of

_STACK = "several matrices in one tensor, which the recipe does not name"


def plan_quantize(source: Checkpoint, recipe: Recipe, scheme: Scheme, options: Options | None = None) -> Plan:
    """Plan the quantization of a checkpoint.

    Args:
        source: the checkpoint, in full precision or in any format that can be decoded.
        recipe: how its experts are stored.
        scheme: what becomes what.
        options: see `Options`.

    Raises:
        PlanError: with everything that stands in the way.
    """
    return _Planner(source, recipe, scheme, options or Options()).plan()


def plan_measurement(
    source: Checkpoint, recipe: Recipe, scheme: Scheme, options: Options | None = None
) -> tuple[Plan, tuple[Value, ...], dict[str, str]]:
    """Plan to measure what formats would cost: only results are written, nothing is carried over.

    Args:
        source: the checkpoint.
        recipe: how its experts are stored.
        scheme: whose default format is a `Probe`.
        options: see `Options`.

    Returns:
        The plan; every target of a quantization, measured or kept; and the block of each expert's matrix, by name.

    Raises:
        PlanError: with everything that stands in the way.
    """
    planner = _Planner(source, recipe, scheme, options or Options())
    plan = planner.plan()
    return plan, planner.every, planner.blocks


def plan_dequantize(
    source: Checkpoint, recipe: Recipe, dtype: str | None = None, options: Options | None = None
) -> Plan:
    """Plan the way back to full precision; layouts stay as they are.

    Args:
        source: a quantized checkpoint.
        recipe: how its experts are stored.
        dtype: of the matrices; None for the dtype of their scales, or of the model.
        options: see `Options`.

    Raises:
        PlanError: with everything that stands in the way.
    """
    scheme = Scheme((), None, (), dtype, False, json.dumps({"dequantize": dtype}))
    return _Planner(source, recipe, scheme, options or Options()).plan()


#: Values with one fate.
Kind = Sequence[Value]


class _Planner:
    def __init__(self, source: Checkpoint, recipe: Recipe, scheme: Scheme, options: Options) -> None:
        self.stored = source
        self.recipe = recipe
        self.scheme = scheme
        self.options = options
        self.problems: list[Problem] = []
        self.refused: dict[str, list[str]] = {}
        self.fates = Fates(scheme.dtype)
        self.every: tuple[Value, ...] = ()
        self.blocks: dict[str, str] = {}
        self.quantizes = scheme.default is not None or any(rule.format for rule in scheme.rules)
        view = unpacked_view(source, recipe, self.problems, self.options.layout)
        self.source = _without_stale_files(decoded_view(view, self.problems, scheme.dtype))
        if recipe.decoded:
            self.recipe = load_recipe(recipe.decoded)
        layers = source.config_values(".", "num_hidden_layers") or source.config_values(
            "text_config", "num_hidden_layers"
        )
        self.decider = Decider(scheme, self.recipe.keep, layers if isinstance(layers, int) else None)
        formats = [scheme.default, *(rule.format for rule in scheme.rules)]
        shares = any(made and made.shares_scale for made in formats)
        self.torn = torn_matrices(self.source, self.decider.partners) if shares else set()

    def plan(self) -> Plan:
        found = find_units(self.source, self.recipe, self.options.layout)
        for unit in found.units:
            if unit.component.form:
                self.problems.append(
                    Problem(
                        f"{unit.block}: experts quantized in the form {unit.component.form} cannot be decoded yet",
                        "Start from the checkpoint in full precision.",
                    )
                )
        self.problems += found.problems
        changes, kept, expert_fills = self._experts(found.units)
        fills = [*expert_fills, *(copy_of(tensor) for unit in kept for tensor in unit.tensors())]
        stacks = [(unit, [tensor.spec.name for tensor in unit.tensors()]) for unit in kept]
        stacks += [(made.unit, [spec.name for spec in made.targets]) for made in changes]
        stacks = [(unit, names) for unit, names in stacks if set(unit.component.parts) & set(self.recipe.part_ids)]
        self.blocks = {name: unit.block for unit, names in stacks for name in names}
        experts = set(self.blocks)
        fills += [copy_of(tensor) for tensor in found.rest]
        values = self._values(fills, experts, [(unit.block, names) for unit, names in stacks])
        values = joined_values(values, self.source, self.recipe, self.problems)
        kinds = alike(values)
        groups = groups_of((kind[0].format, _modules(kind)) for kind in kinds if kind[0].format)
        shared = self._shared(values)
        self._check(values, groups, experts, bool(found.units))
        if self.problems:
            raise PlanError.of(self.problems)
        if isinstance(self.scheme.default, Probe):
            self.every, values = tuple(values), [value for value in values if value.format is not None]
            kinds = [kind for kind in kinds if kind[0].format is not None]
            self.source = self.source._replace(sidecars=())
        targets = _groups_of_targets(values, kinds)
        files, places, index = place_specs(targets, self.source, self.options.max_shard_nbytes)

        @cache
        def make_tasks() -> tuple[Task, ...]:
            steps = [step for value in values for step in self._steps(value, places(), shared)]
            return tasks_of(steps, [file.path for file in files])

        jobs = jobs_of(files, make_tasks, self.options)
        examples = [step for value in _examples(kinds) for step in self._steps(value, ANYWHERE, shared)]
        names = len(self.stored.tensors) + sum(len(file.specs) for file in files)
        memory = transcoding_memory(examples, names * NAME_BYTES, jobs, self.options)
        config = {} if isinstance(self.scheme.default, Probe) else self._config(kinds, groups)
        joint = next((value.format.layout_recipe for value in values if value.inside and value.format), None)
        recipe = load_recipe(joint) if joint else self.recipe  # of the result
        layout = "packed" if joint else "experts" if changes or not self.quantizes else self._layout(kept)
        readers = self._readers(kinds, groups, kept)
        warnings = [*source_warnings(self.source, changes), *self._warnings(kinds), *reader_warnings(readers)]
        return Plan(
            self.source, recipe, layout, self.options, tuple(changes), tuple(kept), found.rest, files, index,
            make_tasks, memory, readers, tuple(warnings), self._fingerprint(), self.scheme, tuple(values), config,
        )  # fmt: skip

    def _readers(self, kinds: Sequence[Kind], groups: Sequence[Group], kept: Sequence[Unit]) -> tuple[Reading, ...]:
        """Which engines read the result."""
        if groups:
            of_experts = [kind[0].format for kind in kinds if kind[0].fate.is_expert]
            is_mixed = len(groups_of((made, ()) for made in of_experts if made)) > 1
            has_kept = len({made is None for made in of_experts}) > 1
            conditions = [MIXED] * is_mixed + [KEPT] * has_kept
            return format_readings(self.stored.config, sorted({group.format.name for group in groups}), conditions)
        if self.quantizes or any(unit.component.form for unit in kept):
            return ()
        shapes = [tensor.spec.shape for unit in kept for tensor in unit.tensors()]
        return readings(self.recipe, self.stored.config, self._layout(kept), shapes)

    def _layout(self, kept: Sequence[Unit]) -> str:
        return kept[0].layout if kept else self.recipe.layouts[0]

    def _experts(self, units: Iterable[Unit]) -> tuple[list[Change], list[Unit], list[Fill]]:
        """Units that are to be quantized, expert by expert; the others stay in the layout they have."""
        changes: list[Change] = []
        kept: list[Unit] = []
        fills: list[Fill] = []
        goal = self.recipe.layout("experts") if "experts" in self.recipe.layouts else None
        moving: list[Change] = []
        for unit in units:
            if not self.quantizes or goal is None or unit.layout == goal:
                kept.append(unit)
            elif (made := change(unit, goal, self.recipe, self.problems)) is not None:
                moving.append(made)
        # A router moves with its experts. All matrices are asked, so that every rule that names one counts as used.
        asked = [(made.unit.block, spec) for made in moving for spec in made.targets if is_matrix(spec)]
        named = [(block, self.decider.decide(_module(spec), is_expert=True)) for block, spec in asked]
        quantized = {block for block, decision in named if decision.format}
        for made in moving:
            if made.unit.block in quantized:
                changes.append(made)
                fills += made.fills
            else:
                kept.append(made.unit)
        return changes, kept, fills

    def _values(
        self, fills: Sequence[Fill], experts: set[str], stacks: Sequence[tuple[str, Sequence[str]]]
    ) -> list[Value]:
        decisions: dict[str, Decision] = {}
        for fill in fills:
            decisions[fill.target.name] = self._decide(fill, fill.target.name in experts)
        self.problems += [
            Problem(f"{line} cannot be {why}", "Choose another format or group size for it, or keep it with --ignore.")
            for why, names in self.refused.items()
            for line in collapse(names)
        ]
        self._keep_together(decisions, {fill.target.name: fill for fill in fills})
        self._check_experts(decisions, stacks)
        made, torn = self.fates.value, self.torn
        names = [fill.target.name for fill in fills]
        return [
            made(fill, decisions[name], is_expert=name in experts, is_torn=name in torn)
            for name, fill in zip(names, fills, strict=True)
        ]

    def _decide(self, fill: Fill, is_expert: bool) -> Decision:
        spec = fill.target
        if not self.quantizes:
            return Decision(None, "not quantized")
        if not is_matrix(spec):
            is_stack = spec.dtype in FLOATS and len(spec.shape) == 3 and self.decider.kept(_module(spec)) is None
            return Decision(None, _STACK if is_stack else "no matrix of full precision")
        decision = self.decider.decide(_module(spec), is_expert=is_expert)
        if decision.format is None:
            return decision
        refused = decision.format.refusal(spec.shape, self.fates.dtype(spec.dtype))
        if refused is None:
            return decision
        if is_expert or decision.is_named:
            self.refused.setdefault(f"{decision.format.name}: {refused}", []).append(spec.name)
        return Decision(None, f"{refused}, so not {decision.format.name}")

    def _keep_together(self, decisions: dict[str, Decision], fills: Mapping[str, Fill]) -> None:
        """What engines fuse is quantized together or not at all."""
        usual = Counter(decision.format for decision in decisions.values()).most_common(1)[0][0] if decisions else None
        # Of two that differ, one has not the usual format: only its partners have to be looked at.
        unusual = [name for name, decision in decisions.items() if decision.format is not usual]
        asked = {p + WEIGHT for name in unusual for p in self.decider.partners(_module(fills[name].target))}
        for name in [name for name in decisions if name in asked]:
            decision = decisions[name]
            if decision.format is None:
                continue
            for partner in self.decider.partners(_module(fills[name].target)):
                other = decisions.get(partner + WEIGHT)
                if other is None or other.format is decision.format or is_same(other.format, decision.format):
                    continue
                if decision.is_named or other.is_named:
                    self.problems.append(
                        Problem(
                            f"{name} would be {decision.format.name} and {partner + WEIGHT} "
                            f"{other.format.name if other.format else 'kept'}; engines fuse the two",
                            "Write a rule that gives both the same.",
                        )
                    )
                decisions[name] = Decision(None, f"engines fuse it with {partner.rsplit('.', 1)[-1]}, which is kept")
                break

    def _check_experts(self, decisions: Mapping[str, Decision], stacks: Sequence[tuple[str, Sequence[str]]]) -> None:
        """All experts of a layer get one format: engines hold them together and are told of the first expert alone.

        Args:
            decisions: by name.
            stacks: names of experts' tensors, and the block that they belong to.
        """
        if "experts" not in self.recipe.layouts:
            return
        blocks: dict[str, list[str]] = {}
        for block, names in stacks:
            blocks.setdefault(block, []).extend(name for name in names if name.endswith(WEIGHT))
        goal = self.recipe.layout("experts")
        rules = [rule for component in self.recipe.components for rule in component.rules[goal]]
        for names in blocks.values():
            if len({decisions[name].format for name in names}) > 1:
                self._check_stacks(decisions, sorted(names, key=natural_key), [rule.pattern for rule in rules])

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
                self.problems.append(
                    Problem(
                        f"{first} would be {one.name if one else 'kept'} and {name} {other.name if other else 'kept'}; "
                        "engines hold all experts of a layer together",
                        "Write a rule that gives all of them the same.",
                    )
                )

    def _check(self, values: Sequence[Value], groups: Sequence[Group], experts: set[str], has_units: bool) -> None:
        whole = Counter([spec.name for value in values if not value.fate.is_piece for spec in value.specs])
        pieces = {spec.name for value in values if value.fate.is_piece for spec in value.specs}
        self.problems += [
            Problem(f"two sources for the one target {name}", "Remove the one that is not the model's.")
            for name in (whole if pieces or len(whole) < whole.total() else ())
            if whole[name] > 1 or name in pieces
        ]
        if not self.quantizes:
            if not self.problems and not any(value.source for value in values):
                self.problems.append(Problem(f"{self.stored.root} is not quantized", "There is nothing to do."))
            return
        self.problems += self.decider.unused()
        if not has_units:
            self.problems.append(
                Problem(
                    f"{self.stored.root} holds no experts that recipe {self.recipe.name} describes",
                    "Give the --recipe that matches.",
                )
            )
        elif not self.problems and not any(v.format for v in values if v.fill.target.name in experts):
            ignored = any(rule.format is None for rule in self.scheme.rules) or self.scheme.only
            if not ignored:
                self.problems.append(
                    Problem("no expert would be quantized", "Say so with --ignore if that is what you want.")
                )
        if not self.problems and not any(value.format for value in values):
            self.problems.append(Problem("nothing would be quantized", "Loosen --only or --ignore."))
        alone = [group.format.name for group in groups if group.format.quant_method != "compressed-tensors"]
        if len(groups) > 1 and alone:
            self.problems.append(
                Problem(
                    f"{alone[0]} cannot stand beside another format in one config.json",
                    "Take formats of compressed-tensors, such as fp8_dynamic, which can be mixed.",
                )
            )

    def _shared(self, values: Sequence[Value]) -> dict[str, tuple[Value, ...]]:
        """For each matrix that shares a scale, all that share it: those that engines fuse with it, in one order."""
        named = {_module(v.fill.target): v for v in values if v.format is not None and v.format.shares_scale}
        shared = {}
        for module, value in named.items():
            partners = [named[p] for p in self.decider.partners(module) if p in named] or [value]
            copied = [v.fill.target.name for v in partners if v.fate.keeps]
            shared[value.fill.target.name] = () if len(copied) == len(partners) else tuple(partners)
            if copied and len(copied) < len(partners) and value is partners[0]:
                self.problems.append(
                    Problem(
                        f"{copied[0]} has its format already, what engines fuse with it has not: they need one scale",
                        "Dequantize the checkpoint first, then quantize it.",
                    )
                )
        return shared

    def _steps(
        self, value: Value, places: Mapping[str, tuple[int, int]], shared: Mapping[str, tuple[Value, ...]]
    ) -> Iterator[Step]:
        return value_steps(value, places, self.scheme.allow_nonfinite, shared.get(value.fill.target.name, ()))

    def _fingerprint(self) -> str:
        before = fingerprint_of(self.stored, self.recipe, "quantize", self.options)
        return hashlib.sha256(f"{before} {self.scheme.text}".encode()).hexdigest()

    def _warnings(self, kinds: Sequence[Kind]) -> list[str]:
        lines = []
        static = [name for name in self.stored.tensors if name.endswith(STATIC_SCALES)]
        if static and not any(name in self.source.tensors for name in static):
            lines.append(f"{len(static):,} static scales for activations are dropped: no format here keeps them")
        if not self.quantizes:
            is_taken_apart = any(tensor.inside is not None for tensor in self.source.tensors.values()) or any(
                part.inside is not None
                for kind in kinds
                for stored in [value.source for value in kind if kind[0].fate.decoder]
                for part in (stored.parts.values() if stored else ())
            )
            return [*lines, "experts are written one by one: `moeconv pack` joins them"] if is_taken_apart else lines
        whole = nbytes_of(kinds)
        plain = nbytes_of([kind for kind in kinds if kind[0].format is None])
        if plain * 4 > whole:
            lines.append(f"{100 * plain // whole} % of the bytes stay unquantized")
        if self.torn:
            lines.append(
                f"{len(self.torn):,} matrices have another scale for the whole than those that engines fuse with them, "
                f"such as {min(self.torn, key=natural_key)}: they are encoded anew"
            )
        fates = [(kind[0].fate, kind) for kind in kinds]
        unsearched = sum(
            len(kind) for fate, kind in fates if fate.keeps and getattr(fate.format, "search", "amax") != "amax"
        )
        if unsearched:
            lines.append(f"{unsearched:,} matrices keep their codes, so that --scale chooses nothing for them")
        unknown = [
            value.fill.target.name
            for fate, kind in fates
            if fate.format is None and fate.why.startswith("not known")
            for value in kind
        ]
        if unknown:
            lines.append(f"kept because they are not known as linear layers: {', '.join(collapse(unknown)[:6])}")
        stacks = [value.fill.target.name for fate, kind in fates if fate.why == _STACK for value in kind]
        if stacks:
            lines.append(f"kept because the recipe does not know these stacks: {', '.join(collapse(stacks)[:6])}")
        return lines

    def _config(self, kinds: Sequence[Kind], groups: Sequence[Group]) -> dict[str, bytes]:
        plain = [value.fill.target for kind in kinds if kind[0].format is None for value in kind]
        kept = [_module(spec) for spec in plain if is_layer(spec)]
        is_cast = any(kind[0].fate.decoder or kind[0].fate.dtype != kind[0].fill.target.dtype for kind in kinds)
        is_copied = any(kind[0].fate.keeps == "bytes" for kind in kinds)
        carried = ("scale_fmt",) if is_copied else ()  # how engines treat the scales that stay as they are
        return rewritten(self.stored.config, groups, kept, self.scheme.dtype if is_cast else None, carried)


#: Files beside config.json that say how the source is quantized, which its result is not any more.
_STALE = (MODELOPT_SETTINGS, "quantize_config.json", "quant_config.json", "recipe.yaml")


def _without_stale_files(source: Checkpoint) -> Checkpoint:
    stale = [file for file in source.sidecars if file.path in _STALE]
    left_out = [LeftOut(file.path, file.nbytes, "says how the source was quantized") for file in stale]
    return source._replace(
        sidecars=tuple(file for file in source.sidecars if file not in stale), left_out=(*source.left_out, *left_out)
    )


def _groups_of_targets(values: Sequence[Value], kinds: Sequence[Kind]) -> list[tuple[Spec, ...]]:
    """Target tensors that go into one file together, each once also where several matrices lie in it."""
    if any(kind[0].fate.is_piece or any(value.inside for value in kind) for kind in kinds):
        return list(dict.fromkeys(value.targets for value in values))
    return [value.specs for value in values]


def _examples(kinds: Sequence[Kind]) -> list[Value]:
    """One for each way to read a matrix: they tell what memory a run needs."""
    return [
        value
        for kind in kinds
        for value in {tuple([id(move.route) for move in value.fill.moves]): value for value in kind}.values()
    ]


def _modules(kind: Kind) -> list[str]:
    return [value.fill.target.name.removesuffix(WEIGHT) for value in kind]


def _module(spec: Spec) -> str:
    return spec.name.removesuffix(WEIGHT)
