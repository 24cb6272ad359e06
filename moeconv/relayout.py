"""Changes of layout of experts in bitsandbytes' 4 bits, whose codes and scales stay as they are.

Such a tensor says nothing of rows: codes follow each other, with a scale for each block of them, and its shape stands
in a state beside it. So it moves where parts of experts are runs of whole blocks, in the old place and in the new one;
then the pieces are copied, and states are written for the new shapes. `plan_layout` is `plan` for any checkpoint.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from math import prod

from moeconv.checkpoint import Checkpoint, Encoded
from moeconv.choices import kept_modules
from moeconv.config_json import Group, groups_of, rewritten
from moeconv.engines import KEPT, Reading, format_readings
from moeconv.errors import PlanError, Problem
from moeconv.formats import Bnb4, StoredBnb4
from moeconv.layouts import Found, find_units
from moeconv.moves import Change, Fill, by_move, change, copy_of
from moeconv.plan import (
    Options,
    Plan,
    check_layouts,
    copying_memory,
    is_already,
    jobs_of,
    plan,
    reader_warnings,
    source_warnings,
)
from moeconv.recipe import Recipe
from moeconv.scheme import Decision, Scheme
from moeconv.shards import place_specs
from moeconv.states import is_stated, stated_view
from moeconv.steps import Step
from moeconv.tasks import Task, tasks_of
from moeconv.transcodes import value_steps
from moeconv.units import Unit
from moeconv.values import Fates, Kind, Value, alike, is_layer, is_stack, targets_together

#: What config.json says beside the format, of how an engine computes with it.
_CARRIED = ("bnb_4bit_compute_dtype",)


def plan_layout(source: Checkpoint, recipe: Recipe, layout: str, options: Options | None = None) -> Plan:
    """Plan the conversion of a checkpoint to a layout; see `plan`.

    Raises:
        PlanError: with everything that stands in the way.
        UsageError: a layout that the recipe cannot say.
    """
    options = options or Options()
    if not any(map(is_stated, source.tensors)):
        return plan(source, recipe, layout, options)
    check_layouts(recipe, layout, options)
    problems: list[Problem] = []
    view = stated_view(source, problems)
    found = find_units(view, recipe, options.layout)
    if not any(map(_is_stated, found.units)) and not found.faults:
        return plan(source, recipe, layout, options)  # other matrices alone are in 4 bits: nothing of them moves
    if problems:  # what follows from them would only hide them
        raise PlanError.of(problems)
    return _Planner(source, view, found, recipe, layout, options).plan()


class _Planner:
    def __init__(
        self, stored: Checkpoint, view: Checkpoint, found: Found, recipe: Recipe, layout: str, options: Options
    ) -> None:
        self.stored = stored
        self.view = view
        self.found = found
        self.recipe = recipe
        self.layout = layout
        self.options = options
        self.problems = list(found.faults)
        self.blocks: set[str] = set()
        self.experts = "packed"
        self._fates = Fates(None, allow_nonfinite=False)
        self._formats: dict[tuple[str, bool, float], Bnb4] = {}

    def plan(self) -> Plan:
        changes, kept = self._changes()
        if changes:
            self.problems += self.found.unknown
        fills = [fill for made in changes for fill in self._pieces(made)]
        copies = [copy_of(tensor) for unit in kept for tensor in unit.tensors()]
        copies += [copy_of(tensor) for tensor in self.found.rest]
        self._check(fills, copies, changes)
        if self.problems:
            raise PlanError.of(self.problems)
        values = [*self._moved(fills), *self._copied(copies)]
        kinds = alike(values)
        groups = groups_of(
            (kind[0].format, [value.fill.target.name for value in kind]) for kind in kinds if kind[0].format
        )
        if len(groups) > 1:
            raise PlanError(
                f"{self.stored.root}: matrices in several forms of 4 bits, of which one config.json can only name one",
                "Keep the layout it has.",
            )
        files, places, index = place_specs(targets_together(values, kinds), self.stored, self.options.max_shard_nbytes)

        @cache
        def make_tasks() -> tuple[Task, ...]:
            steps: list[Step] = [step for value in values for step in value_steps(value, places(), False)]
            return tasks_of(steps, [file.path for file in files])

        plain = [value.fill for value in values if value.is_plain]
        memory = copying_memory(self.stored, files, plain, jobs_of(files, make_tasks, self.options), self.options)
        readers = self._readers(kinds, groups)
        warnings = [*source_warnings(self.stored, changes), *reader_warnings(readers)]
        return Plan(
            self.view, self.recipe, self.layout, self.options, tuple(changes), tuple(kept), self.found.rest, files,
            index, make_tasks, memory, readers, tuple(warnings),
            Scheme((), None, (), None, False, json.dumps({"layout": self.layout})), tuple(values),
            self._config(kinds, groups) if changes else {},
        )  # fmt: skip

    def _changes(self) -> tuple[list[Change], list[Unit]]:
        """Units that move, and those that have the layout already. 4-bit experts move all: one form can be told of."""
        changes: list[Change] = []
        kept: list[Unit] = []
        goal = self.recipe.layout(self.layout)
        for unit in self.found.units:
            stays = unit.block in self.options.stay and not any(map(_is_stated, self.found.units))
            if stays or is_already(unit, goal):
                kept.append(unit)
                names = [tensor.spec for tensor in unit.tensors() if tensor.encoded]
            elif (made := change(unit, goal, self.recipe, self.problems)) is not None:
                changes.append(made)
                names = [fill.target for fill in made.fills if any(move.source.encoded for move in fill.moves)]
            else:
                continue
            if any(not is_stack(spec) for spec in names):
                self.experts = "per_expert"
        held = [(made.unit, [spec.name for spec in made.targets]) for made in changes]
        held += [(unit, [tensor.spec.name for tensor in unit.tensors()]) for unit in kept]
        for unit, targets in held:
            if set(unit.component.parts) & set(self.recipe.part_ids):
                self.blocks.update(targets)
        return changes, kept

    def _pieces(self, made: Change) -> Iterator[Fill]:
        """Fills of a unit, those of 4-bit matrices as one for each run of blocks."""
        by_target: dict[str, list[Fill]] = {}
        for fill in made.fills:
            by_target.setdefault(fill.target.name, []).append(fill)
        for fills in by_target.values():
            if not any(move.source.encoded for fill in fills for move in fill.moves):
                yield from fills
            elif (why := _obstacle(fills)) is not None:
                self.problems.append(why)
            else:
                yield from [piece for fill in fills for piece in by_move(fill) or ()]

    def _check(self, fills: Sequence[Fill], copies: Sequence[Fill], changes: Sequence[Change]) -> None:
        names = Counter(
            [spec.name for made in changes for spec in made.targets] + [fill.target.name for fill in copies]
        )
        self.problems += [
            Problem(
                f"two sources for the one target {name}",
                "The checkpoint already holds a tensor of that name: remove the one that is not the model's.",
            )
            for name, count in names.items()
            if count > 1
        ]
        self.problems += [
            Problem(
                f"{fill.target.name} would be a matrix of experts of the shape {list(fill.target.shape)}, "
                "and 4-bit experts are one parameter for a layer, or linear layers",
                "Keep the layout it has, or dequantize it first.",
            )
            for fill in fills
            if any(move.source.encoded for move in fill.moves) and not (is_stack(fill.target) or is_layer(fill.target))
        ]  # fmt: skip

    def _moved(self, fills: Iterable[Fill]) -> Iterator[Value]:
        for fill in fills:
            stored, is_expert = fill.moves[0].source.encoded if fill.moves else None, fill.target.name in self.blocks
            why = f"-> {self.recipe.layout(self.layout)} by recipe {self.recipe.name}"
            if stored is None:
                yield self._fates.value(fill, Decision(None, why), is_expert=is_expert)
            else:
                made = Decision(self._format(stored), f"{why}, with the same codes and scales")
                yield self._fates.value(fill, made, is_expert=is_expert, keeps="runs")

    def _copied(self, fills: Iterable[Fill]) -> Iterator[Value]:
        for fill in fills:
            stored, is_expert = fill.moves[0].source.encoded, fill.target.name in self.blocks
            made = self._format(stored) if stored else None
            yield self._fates.value(fill, Decision(made, "as it is"), is_expert=is_expert, keeps="bytes")

    def _format(self, stored: Encoded) -> Bnb4:
        """The format that a matrix has, written in the form of the result."""
        assert isinstance(stored.format, StoredBnb4)
        kind, nested, offset = form = _form(stored)
        if form not in self._formats:  # one for all that are alike, which then have one fate
            self._formats[form] = Bnb4(kind, nested, self.experts, offset=offset if nested else None)
        return self._formats[form]

    def _readers(self, kinds: Sequence[Kind], groups: Sequence[Group]) -> tuple[Reading, ...]:
        of_experts = {kind[0].format is None for kind in kinds if kind[0].fate.is_expert}
        names = sorted({group.format.name for group in groups})
        return format_readings(self.stored.config, names, [KEPT] * (len(of_experts) > 1))

    def _config(self, kinds: Sequence[Kind], groups: Sequence[Group]) -> dict[str, bytes]:
        kept = kept_modules(kinds, self.blocks, self.found.units)
        return rewritten(self.stored.config, groups, kept, None, _CARRIED)


def _is_stated(unit: Unit) -> bool:
    return any(tensor.encoded is not None for tensor in unit.tensors())


def _form(stored: Encoded) -> tuple[str, bool, float]:
    assert isinstance(stored.format, StoredBnb4)
    return stored.format.name, stored.format.nested, stored.format.offset


def _obstacle(fills: Sequence[Fill]) -> Problem | None:
    """Why 4-bit matrices cannot become one tensor, of which these fills are all, with the codes that they have."""
    name = fills[0].target.name
    moves = [move for fill in fills for move in fill.moves]
    stored = [move.source.encoded for move in moves]
    first = next(encoded for encoded in stored if encoded is not None)
    kind, nested, _ = _form(first)
    form = "packed" if is_stack(fills[0].target) else "per-expert"
    command = f"moeconv quantize --format {kind}{' --double-quant' * nested} --experts {form}"
    anew = f"Keep the layout it has; `{command}` decodes and encodes again."
    if not all(fill.moves for fill in fills):
        return Problem(
            f"{name} has room for experts that compute nothing, which have no quantized form",
            "Keep the layout it has.",
        )
    forms = {encoded and _form(encoded) for encoded in stored}
    if None in forms or len({form and form[:2] for form in forms}) > 1:
        other = next(
            m.source.spec.name for m in moves if (m.source.encoded and _form(m.source.encoded)) != _form(first)
        )
        return Problem(
            f"{name} would be joined from matrices of several formats: {moves[0].source.spec.name} is {kind}, "
            f"{other} is not",
            anew,
        )
    if len(forms) > 1:
        other = next(m.source.spec.name for m in moves if m.source.encoded and _form(m.source.encoded) != _form(first))
        return Problem(
            f"{name}: scales of {moves[0].source.spec.name} and {other} are stored less different means "
            "(double quantization), and one tensor has one mean",
            anew,
        )
    pieces = [by_move(fill) for fill in fills]
    if any(found is None for found in pieces):
        return Problem(
            f"{name} would be made of 4-bit matrices whose rows are not its rows",
            anew,
        )
    block = first.format.block
    for piece in (piece for found in pieces for piece in found or ()):
        (move,) = piece.moves
        at, size = move.source_at + (move.route.run or (0,))[0], prod(piece.block)
        is_last = at + size == prod(move.source.spec.shape), piece.at + size == prod(piece.target.shape)
        if at % block or piece.at % block or (size % block and not all(is_last)):
            return Problem(
                f"{name}: a block of {block:,} values would lie partly in one matrix of {list(piece.block)}, "
                "partly in the next",
                "Keep the layout it has, or dequantize it first.",
            )
    return None
