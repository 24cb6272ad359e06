"""Plans that change values: quantize and dequantize.

The source is seen in full precision (`decoded_view`), its experts one by one; each matrix gets a format or keeps what
it has. The result is an ordinary plan, whose steps the executor runs like those of a change of layout.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import cache
from typing import NamedTuple

from moeconv.budget import transcoding_memory
from moeconv.checkpoint import Checkpoint, LeftOut
from moeconv.choices import STACK, Choices, kept_modules, module_of
from moeconv.config_json import Group, groups_of, rewritten
from moeconv.encoded import SETTINGS, STATIC_SCALES, decoded_view, quantization_config
from moeconv.engines import KEPT, MIXED, Reading, format_readings, readings
from moeconv.errors import PlanError, Problem
from moeconv.formats import Probe
from moeconv.fused import torn_matrices
from moeconv.joined import joined_values
from moeconv.layouts import find_units
from moeconv.losses import sampled_matrices
from moeconv.moves import Change, Fill, by_move, can_be_woven, change, copy_of, is_woven
from moeconv.names import collapse, natural_key
from moeconv.plan import (
    NAME_BYTES,
    Options,
    Plan,
    jobs_of,
    reader_warnings,
    source_warnings,
)
from moeconv.recipe import Recipe
from moeconv.recipe_file import load_recipe
from moeconv.scheme import Decider, Decision, Scheme
from moeconv.shards import place_specs
from moeconv.steps import Step
from moeconv.tasks import Task, tasks_of
from moeconv.transcodes import ANYWHERE, value_steps
from moeconv.units import Unit
from moeconv.unpacked import unpacked_view
from moeconv.values import WEIGHT, Fates, Kind, Value, alike, nbytes_of, targets_together


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


class Measurement(NamedTuple):
    """A plan to measure what formats would cost: only results are written, nothing is carried over.

    Attributes:
        plan: the plan.
        values: every target of a quantization, measured or kept.
        blocks: the block of each expert's matrix, by name.
        torn: names of matrices whose stored codes are of no use (`fused`).
    """

    plan: Plan
    values: tuple[Value, ...]
    blocks: Mapping[str, str]
    torn: Set[str]


def plan_measurement(
    source: Checkpoint, recipe: Recipe, scheme: Scheme, options: Options | None = None
) -> Measurement:  # fmt: skip
    """Plan to measure what formats would cost.

    Args:
        source: the checkpoint.
        recipe: how its experts are stored.
        scheme: whose default format is a `Probe`.
        options: see `Options`.

    Raises:
        PlanError: with everything that stands in the way.
    """
    planner = _Planner(source, recipe, scheme, options or Options())
    plan = planner.plan()
    return Measurement(plan, planner.every, planner.blocks, planner.torn)


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


class _Planner:
    def __init__(self, source: Checkpoint, recipe: Recipe, scheme: Scheme, options: Options) -> None:
        self.stored = source
        self.recipe = recipe
        self.scheme = scheme
        self.options = options
        self.problems: list[Problem] = []
        self.fates = Fates(scheme.dtype, scheme.allow_nonfinite)
        self.every: tuple[Value, ...] = ()
        self.blocks: dict[str, str] = {}
        self.quantizes = scheme.default is not None or bool(scheme.rules)
        view = unpacked_view(source, recipe, self.problems, self.options.layout)
        self.source = _without_stale_files(decoded_view(view, self.problems, scheme.dtype))
        if recipe.decoded:
            self.recipe = load_recipe(recipe.decoded)
        layers = source.config_values(".", "num_hidden_layers") or source.config_values(
            "text_config", "num_hidden_layers"
        )
        self.decider = Decider(scheme, self.recipe.keep, layers if isinstance(layers, int) else None)
        self.choices = Choices(self.decider, self.recipe, self.fates, self.problems)
        formats = [scheme.default, *(rule.format for rule in scheme.rules)]
        shares = any(made and made.shares_scale and not made.is_packed for made in formats)
        self.packs = any(made and made.is_packed for made in formats)
        self.sampled: Set[tuple[str, int]] = set()
        self.torn = torn_matrices(self.source, self.decider.partners) if shares else set()

    def plan(self) -> Plan:
        if self.problems:  # what follows from them would only hide them
            raise PlanError.of(self.problems)
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
        held = [(unit, [tensor.spec.name for tensor in unit.tensors()]) for unit in kept]
        held += [(made.unit, [spec.name for spec in made.targets]) for made in changes]
        stacks: dict[str, list[str]] = {}
        for unit, names in held:
            if set(unit.component.parts) & set(self.recipe.part_ids):
                stacks.setdefault(unit.block, []).extend(names)
        self.blocks = {name: block for block, names in stacks.items() for name in names}
        fills += [copy_of(tensor) for tensor in found.rest]
        values = self._values(fills, stacks)
        values = joined_values(values, self.source, self.recipe, self.problems)
        kinds = alike(values)
        groups = groups_of((kind[0].format, _modules(kind)) for kind in kinds if kind[0].format)
        shared = self._shared(values)
        self._check(values, groups, bool(found.units))
        if self.problems:
            raise PlanError.of(self.problems)
        if isinstance(self.scheme.default, Probe):
            self.every, values = tuple(values), [value for value in values if value.format is not None]
            kinds = [kind for kind in kinds if kind[0].format is not None]
            self.source = self.source._replace(sidecars=())
        self.sampled = sampled_matrices(kinds)
        targets = targets_together(values, kinds)
        files, places, index = place_specs(targets, self.source, self.options.max_shard_nbytes)

        @cache
        def make_tasks() -> tuple[Task, ...]:
            steps = [step for value in values for step in self._steps(value, places(), shared)]
            return tasks_of(steps, [file.path for file in files])

        jobs = jobs_of(files, make_tasks, self.options)
        examples = [step for value in _examples(kinds) for step in self._steps(value, ANYWHERE, shared)]
        count = len(self.stored.tensors) + sum(len(file.specs) for file in files)
        memory = transcoding_memory(examples, count * NAME_BYTES, jobs, self.options)
        config = {} if isinstance(self.scheme.default, Probe) else self._config(kinds, groups, found.units)
        joint = next((value.format.layout_recipe for value in values if value.inside and value.format), None)
        recipe = load_recipe(joint) if joint else self.recipe  # of the result
        layout = "experts" if changes or not self.quantizes else self._layout(kept)
        layout = "packed" if joint or (self.packs and changes) else layout
        readers = self._readers(kinds, groups, kept, bool(joint), bool(changes))
        warnings = [*source_warnings(self.source, changes), *self._warnings(kinds), *reader_warnings(readers)]
        return Plan(
            self.source, recipe, layout, self.options, tuple(changes), tuple(kept), found.rest, files, index,
            make_tasks, memory, readers, tuple(warnings), self.scheme, tuple(values), config,
        )  # fmt: skip

    def _readers(
        self, kinds: Sequence[Kind], groups: Sequence[Group], kept: Sequence[Unit], joint: bool, moves: bool
    ) -> tuple[Reading, ...]:
        """Which engines read the result."""
        if groups:
            of_experts = [kind[0].format for kind in kinds if kind[0].fate.is_expert]
            is_mixed = len(groups_of((made, ()) for made in of_experts if made)) > 1
            has_kept = len({made is None for made in of_experts}) > 1
            conditions = [MIXED] * is_mixed + [KEPT] * has_kept
            names = sorted({group.format.known_as(any(of_experts)) for group in groups})
            readers = format_readings(self.stored.config, names, conditions)
            if self.choices.overridden:
                why = "not tried: rules quantize modules that are kept by default"
                readers = tuple(r._replace(reads="unknown", why=why) if r.reads == "yes" else r for r in readers)
            if joint or self.packs or not moves or "experts" not in self.recipe.layouts:
                return readers
            plain = readings(self.recipe, self.stored.config, "experts")  # an engine may know no experts one by one
            return tuple(
                other if one.reads == "unknown" and other.reads == "no" else one
                for one, other in zip(readers, plain, strict=True)
            )
        if self.quantizes or any(unit.component.form for unit in kept):
            return ()
        shapes = [tensor.spec.shape for unit in kept for tensor in unit.tensors()]
        return readings(self.recipe, self.stored.config, self._layout(kept), shapes)

    def _layout(self, kept: Sequence[Unit]) -> str:
        return kept[0].layout if kept else self.recipe.layouts[0]

    def _experts(self, units: Iterable[Unit]) -> tuple[list[Change], list[Unit], list[Fill]]:
        """Units that change, expert by expert, if any of them is to be quantized; and those that stay as they are."""
        changes: list[Change] = []
        kept: list[Unit] = []
        fills: list[Fill] = []
        layout = "packed" if self.packs else "experts"
        goal = self.recipe.layout(layout) if layout in self.recipe.layouts else None
        moving: list[Change] = []
        for unit in units:
            if not self.quantizes or goal is None or unit.layout == goal:
                kept.append(unit)
            elif (made := change(unit, goal, self.recipe, self.problems)) is not None:
                moving.append(made)
        if self.choices.is_any_quantized(moving):  # then all of them move: engines expect one layout
            changes, known = moving, len(self.problems)
            fills = [fill for made in moving for fill in self._decodable(made.fills)]
            if len(self.problems) > known:  # nothing can be said of targets that nothing fills
                raise PlanError.of(self.problems)
        else:
            kept += [made.unit for made in moving]
        return changes, kept, fills

    def _decodable(self, fills: Iterable[Fill]) -> Iterator[Fill]:
        """Fills each of which reads one quantized matrix at most, or can be woven of several."""
        for fill in fills:
            if self.packs and not fill.moves:
                self.problems.append(
                    Problem(
                        f"{fill.target.name} has room for experts that compute nothing, which have no quantized form",
                        "Take --experts per-expert, or a format that is written one by one.",
                    )
                )
                continue
            if not any(move.source.encoded for move in fill.moves):
                yield fill
                continue
            found = (by_move(fill) if self.packs else None) or [fill]
            if not any(map(is_woven, found)):
                yield from found
            elif can_be_woven(fill):
                yield fill
            else:
                self.problems.append(
                    Problem(
                        f"{fill.target.name} would be made of quantized matrices that cannot be decoded one by one",
                        "Dequantize the checkpoint first, then quantize it.",
                    )
                )

    def _values(self, fills: Sequence[Fill], stacks: Mapping[str, Sequence[str]]) -> list[Value]:
        decisions = self.choices.of(fills, self.blocks, stacks) if self.quantizes else {}
        plain = Decision(None, "not quantized")
        made, torn, experts = self.fates.value, self.torn, self.blocks
        names = [fill.target.name for fill in fills]
        return [
            made(fill, decisions.get(name, plain), is_expert=name in experts, is_torn=name in torn)
            for name, fill in zip(names, fills, strict=True)
        ]

    def _check(self, values: Sequence[Value], groups: Sequence[Group], has_units: bool) -> None:
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
        elif not self.problems and not any(v.format for v in values if v.fill.target.name in self.blocks):
            is_meant = self.scheme.only or self.scheme.keeps_experts
            if not is_meant and all(rule.format is not None for rule in self.scheme.rules):
                self.problems.append(self._unquantized_experts(values))
        if not self.problems and not any(value.format for value in values):
            named = " For this format experts have the names that `moeconv plan pack` shows." if self.packs else ""
            self.problems.append(Problem("nothing would be quantized", f"Loosen --only or --ignore.{named}"))
        alone = [group.format.name for group in groups if group.format.quant_method != "compressed-tensors"]
        if len(groups) > 1 and alone:
            self.problems.append(
                Problem(
                    f"{alone[0]} cannot stand beside another format in one config.json",
                    "Take formats of compressed-tensors, such as fp8_dynamic, which can be mixed.",
                )
            )

    def _unquantized_experts(self, values: Sequence[Value]) -> Problem:
        """Why no expert gets a format, where none is told to stay."""
        modules = (module_of(v.fill.target) for v in values if v.fill.target.name in self.blocks)
        wanted = (self.decider.decide(module, is_expert=True).format for module in modules)
        if any(made and made.is_packed for made in wanted):
            return Problem(
                f"recipe {self.recipe.name} packs experts below each other in one matrix, not as a stack of them, "
                "which is all that 4 bits of bitsandbytes have a form for",
                "Take --experts per-expert or keep, or a format that is written one by one.",
            )
        return Problem("no expert would be quantized", "Say so with --ignore if that is what you want.")

    def _shared(self, values: Sequence[Value]) -> dict[str, tuple[Value, ...]]:
        """For each matrix that shares a scale, all that share it: those that engines fuse with it, in one order."""
        sharing = [v for v in values if v.format is not None and v.format.shares_scale]
        whole: dict[str, list[Value]] = {}
        for value in (v for v in sharing if v.format and v.format.is_packed):
            whole.setdefault(value.fill.target.name, []).append(value)
        shared = {name: tuple(pieces) for name, pieces in whole.items()}
        named = {module_of(v.fill.target): v for v in sharing if v.format and not v.format.is_packed}
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
        name = value.fill.target.name
        is_sampled = (name, value.fill.at) in self.sampled
        return value_steps(value, places, self.scheme.allow_nonfinite, shared.get(name, ()), is_sampled)

    def _warnings(self, kinds: Sequence[Kind]) -> list[str]:
        lines = []
        static = sum(
            1 for name in self.stored.tensors if name.endswith(STATIC_SCALES) and name not in self.source.tensors
        )
        if static:
            lines.append(f"{static:,} static scales for activations are dropped: no format here keeps them")
        before = quantization_config(self.stored.config)
        if any(before.get(key) for key in ("kv_cache_scheme", "kv_cache_quant_algo")):
            lines.append("what config.json says of a quantized KV cache is dropped")
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
        if self.choices.overridden:
            names = ", ".join(collapse(self.choices.overridden)[:6])
            lines.append(f"rules quantize what is kept by default, and engines may not read: {names}")
        if self.scheme.dtype and not any(f.decoder or f.dtype != kind[0].fill.target.dtype for f, kind in fates):
            lines.append("--dtype changes nothing: no matrix is float32")
        unknown = [
            value.fill.target.name
            for fate, kind in fates
            if fate.format is None and fate.why.startswith("not known")
            for value in kind
        ]
        if unknown:
            lines.append(f"kept because they are not known as linear layers: {', '.join(collapse(unknown)[:6])}")
        stacks = [value.fill.target.name for fate, kind in fates if fate.why == STACK for value in kind]
        if stacks:
            lines.append(f"kept because the recipe does not know these stacks: {', '.join(collapse(stacks)[:6])}")
        return lines

    def _config(self, kinds: Sequence[Kind], groups: Sequence[Group], units: Sequence[Unit]) -> dict[str, bytes]:
        kept = kept_modules(kinds, self.blocks, units)
        is_cast = any(kind[0].fate.decoder or kind[0].fate.dtype != kind[0].fill.target.dtype for kind in kinds)
        is_copied = any(kind[0].fate.keeps == "bytes" for kind in kinds)
        carried = ("scale_fmt",) if is_copied else ()  # how engines treat the scales that stay as they are
        return rewritten(self.stored.config, groups, kept, self.scheme.dtype if is_cast else None, carried)


#: Files beside config.json that say how the source is quantized, which its result is not any more.
_STALE = (*SETTINGS, "recipe.yaml")


def _without_stale_files(source: Checkpoint) -> Checkpoint:
    stale = [file for file in source.sidecars if file.path in _STALE]
    left_out = [LeftOut(file.path, file.nbytes, "says how the source was quantized") for file in stale]
    return source._replace(
        sidecars=tuple(file for file in source.sidecars if file not in stale), left_out=(*source.left_out, *left_out)
    )


def _examples(kinds: Sequence[Kind]) -> list[Value]:
    """One for each way to read a matrix: they tell what memory a run needs."""
    return [
        value
        for kind in kinds
        for value in {tuple([id(move.route) for move in value.fill.moves]): value for value in kind}.values()
    ]


def _modules(kind: Kind) -> list[str]:
    return [value.fill.target.name.removesuffix(WEIGHT) for value in kind]
