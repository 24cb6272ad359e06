"""Whether a finished folder is what it should be: its structure, its values, and all of it against its source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moeconv.checkpoint import Checkpoint, open_checkpoint
from moeconv.claims import is_tied
from moeconv.comparison import compare
from moeconv.device import find_devices
from moeconv.diagnosis import Diagnosis
from moeconv.errors import CheckpointError, MoeconvError, Problem
from moeconv.files import Files
from moeconv.forms import with_forms
from moeconv.layouts import find_units
from moeconv.likeness import Likeness, Likenesses
from moeconv.looking import Look, looking_memory
from moeconv.manifest import kept_blocks
from moeconv.matching import Held, Pair, as_stored, goals, held, is_number, is_readable, pairs_of, seen, stored_names
from moeconv.moves import Fill, copy_of
from moeconv.plan import Options, Plan
from moeconv.quantize import plan_dequantize, plan_quantize
from moeconv.recipe import Recipe
from moeconv.recipe_file import load_shipped
from moeconv.relayout import plan_layout
from moeconv.report import Report, Summary
from moeconv.sample import Sample, chosen
from moeconv.scheme import scheme_of
from moeconv.selection import select_recipe
from moeconv.soundness import Soundness
from moeconv.structure import Structure, check_structure

#: Matrices that are looked at once more to say what differing bytes hold.
_MOST_EXPLAINED = 512


class Request(NamedTuple):
    """What to verify.

    Attributes:
        against: the folder it was made from; None to look at it alone.
        recipe: recipe by name or path; None for the one it was made with, or the one of its model_type.
        layout: layout of the source, where shapes do not tell.
        by: `bytes` or `values`; None for bytes where they can be made again here.
        device: as `--device` has it, for what is encoded again.
        jobs: threads.
        max_memory: bytes of host memory.
        sample: how much to look at.
        structure_only: nothing but headers and config.
    """

    against: Path | None = None
    recipe: str | None = None
    layout: str | None = None
    by: str | None = None
    device: str = "auto"
    jobs: int | None = None
    max_memory: int | None = None
    sample: Sample | None = None
    structure_only: bool = False


def verify_folder(made: Checkpoint, request: Request, files: Files | None = None) -> Report:
    """Verify a folder, alone or against its source.

    Args:
        made: the folder.
        request: what to do.
        files: door to the file system.

    Raises:
        MoeconvError: the source cannot be read or planned.
    """
    files = files or Files()
    recipe = select_recipe(made, request.recipe)
    structure = check_structure(made, recipe, files, digests=not request.structure_only and request.sample is None)
    notes = [
        *structure.notes,
        *(f"{r.engine} does not read it: {r.why}" for r in structure.readings if r.reads == "no"),
    ]
    report = Report(len(made.tensors), structure.problems, structure.readings, tuple(notes))
    if request.structure_only or not structure.is_known:
        return report
    try:
        if request.against is not None:
            report = _Against(made, recipe, structure, request, request.against, files).run(report)
        return _look_at_values(made, structure, request, files, report)
    except MoeconvError as error:
        if not structure.problems:
            raise
        return report._replace(problems=(*report.problems, *error.problems))  # what was found before is the reason


def _look_at_values(
    made: Checkpoint, structure: Structure, request: Request, files: Files, report: Report
) -> Report:  # fmt: skip
    """Whether values can be those of a model; with a source those that are not held against its own."""
    against = request.against is not None
    soundness = Soundness(made, structure.view, structure.experts, files, against_source=against)
    items = soundness.items(request.sample)
    looks = [Look.at(copy_of(tensor)) for tensor in soundness.kinds()]
    options = Options(jobs=request.jobs, max_memory=request.max_memory)
    soundness.run(items, looking_memory(looks, 2 * len(made.tensors), options))
    problems = soundness.problems()
    report = report._replace(problems=(*report.problems, *problems))
    return report if against else report._replace(looked_nbytes=soundness.nbytes, of_nbytes=soundness.of_nbytes)


class _Against:
    """A folder and the source that it was made from."""

    def __init__(
        self, made: Checkpoint, recipe: Recipe, structure: Structure, request: Request, against: Path, files: Files
    ) -> None:
        self.made = made
        self.recipe = recipe
        self.structure = structure
        self.request = request
        self.files = files
        source = open_checkpoint(against, files)
        include = _included(made, {item.path for item in source.left_out})
        self.source = open_checkpoint(against, files, include) if include else source
        said = made.manifest.get("source_layout")
        self.layout = request.layout or (said if isinstance(said, str) else None)
        scheme = made.manifest.get("scheme")
        self.scheme = scheme if isinstance(scheme, dict) else None
        self.options = Options(
            layout=self.layout, jobs=request.jobs, max_memory=request.max_memory, include=include,
            stay=kept_blocks(made.manifest, str(made.manifest.get("layout"))),
        )  # fmt: skip

    def run(self, report: Report) -> Report:
        by, devices, note = self._way()
        report = report._replace(by=by, notes=(*report.notes, *([note] if note else [])))
        return self._by_values(report) if by == "values" else self._by_bytes(report, devices)

    def _way(self) -> tuple[str, tuple[str, ...], str]:
        """How to compare, on which devices, and why not byte for byte."""
        request, made = self.request, self.made
        if request.by == "values":
            return "values", ("cpu",), ""
        if self.scheme is not None:
            told = made.manifest.get("devices")
            names = [str(name) for name in told] if isinstance(told, list) and told else ["cpu"]
            kind = names[0].partition(":")[0]
            is_auto = request.device == "auto"
            devices = ("cpu",) if is_auto and kind == "cpu" else find_devices(request.device)
            if kind == devices[0].partition(":")[0]:
                return "bytes", devices, ""
            note = f"compared by value: it was encoded on {kind}, which rounds in its own way, and {devices[0]} is here"
            return ("bytes", devices, "") if request.by == "bytes" else ("values", ("cpu",), note)
        if made.manifest or request.by == "bytes":
            return "bytes", ("cpu",), ""
        ours, theirs = self.structure.formats, self._formats_of_source()
        if ours == theirs:
            return "bytes", ("cpu",), ""
        made_of = [", ".join(names) or "full precision" for names in (ours, theirs)]
        note = f"compared by value: another tool made it, {made_of[0]} of {made_of[1]}"
        return "values", ("cpu",), note

    def _formats_of_source(self) -> tuple[str, ...]:
        problems: list[Problem] = []
        view = seen(self.source, select_recipe(self.source, self.request.recipe, self.layout), problems, self.layout)
        if problems:
            raise CheckpointError.of(problems)
        return tuple(sorted({tensor.encoded.format.name for tensor in view.tensors.values() if tensor.encoded}))

    def _by_bytes(self, report: Report, devices: tuple[str, ...]) -> Report:
        recipe, made = self.recipe, self.made
        options = self.options._replace(devices=devices)
        if not made.manifest and self.request.recipe is None:
            recipe = select_recipe(self.source, None, self.layout)
        if self.scheme is not None:
            wanted = _plan_again(self.source, recipe, self.scheme, options)
        else:
            wanted = plan_layout(self.source, recipe, _layout_of(made, recipe), options)
        found = compare(wanted, made, self.files, self.request.sample)
        problems = list(found.problems)
        if found.differing:
            problems += self._explained(found.differing)
        return report._replace(
            compared_nbytes=found.nbytes, looked_nbytes=found.nbytes, of_nbytes=found.of_nbytes,
            problems=(*report.problems, *problems),
        )  # fmt: skip

    def _explained(self, differing: Iterable[str]) -> list[Problem]:
        """What tensors hold whose bytes are not the source's, where that can be said."""
        problems: list[Problem] = []
        try:
            source, pairs = self._pairs(problems)
        except CheckpointError:
            return []  # it is known that they differ; that no more can be said is no fault of the folder
        names = set(differing)
        concerned = [pair for pair in pairs if stored_names(pair.made) & names][:_MOST_EXPLAINED]
        _, found = self._compared(source, concerned)
        return found

    def _by_values(self, report: Report) -> Report:
        problems: list[Problem] = []
        source, pairs = self._pairs(problems)
        taken = chosen(self.request.sample, [(f"{pair.name}.{pair.key[1]}", pair) for pair in pairs])
        likenesses, found = self._compared(source, taken)
        return report._replace(
            compared_nbytes=likenesses.nbytes, looked_nbytes=likenesses.nbytes, matrices=len(taken),
            of_matrices=len(pairs), formats=tuple(_summaries(likenesses.found)),
            problems=(*report.problems, *problems, *found), of_nbytes=self.made.nbytes,
        )  # fmt: skip

    def _pairs(self, problems: list[Problem]) -> tuple[Held, list[Pair]]:
        """Matrices of both, in the first layout in which all can be decoded one by one."""
        recipe = select_recipe(self.source, self.request.recipe, self.layout)
        wrong: list[Problem] = []
        view = seen(self.source, recipe, wrong, self.layout)
        for goal in goals(recipe) if not wrong else ():
            wrong = []
            source = held(view, recipe, goal, wrong, self.layout)
            made = held(self.structure.view, self.recipe, goal, wrong)
            if not wrong and all(is_readable(fill) for side in (source, made) for fill in side.fills.values()):
                return source, pairs_of(source, made, problems, is_tied=is_tied(self.made.config))
        source, made = as_stored(view), as_stored(self.structure.view)
        if not wrong and source.fills.keys() == made.fills.keys():
            return source, pairs_of(source, made, problems, is_tied=is_tied(self.made.config))
        where = f"{self.made.root} and {self.source.root}"
        alone = Problem(
            f"{where} have no layout in which the matrices of both can be decoded one by one",
            "Compare them byte for byte, or dequantize both first.",
        )
        raise CheckpointError.of(wrong or [alone])

    def _compared(self, source: Held, pairs: Sequence[Pair]) -> tuple[Likenesses, list[Problem]]:
        """Compare by value, and say of what is off what it is."""
        looks = [Look.at(*pair) for pair in _kinds(pairs)]
        names = 2 * (len(self.source.tensors) + len(self.made.tensors))
        memory = looking_memory(looks, names, self.options)
        likenesses = Likenesses(self.source, self.made, self.files)
        likenesses.run(pairs, memory)
        diagnosis = Diagnosis(likenesses, source, memory)
        try:
            found = diagnosis.problems([likeness for likeness in likenesses.found if not likeness.is_like])
        finally:
            diagnosis.close()
        return likenesses, likenesses.problems + found


def _kinds(pairs: Iterable[Pair]) -> list[tuple[Fill, Fill]]:
    """One of each kind of matrix."""
    found = {}
    for pair in (pair for pair in pairs if is_number(pair.source) and is_number(pair.made)):
        key = tuple(
            (
                fill.block,
                move.source.spec.dtype,
                id(move.source.encoded and move.source.encoded.format),
                move.route.run is None,
            )
            for fill in (pair.source, pair.made)
            for move in fill.moves
        )
        found[key] = pair.source, pair.made
    return list(found.values())


def _summaries(found: Sequence[Likeness]) -> list[Summary]:
    """What each format lost."""
    groups: dict[str, list[Likeness]] = {}
    for likeness in found:
        if likeness.squares:
            groups.setdefault(likeness.format, []).append(likeness)
    return [Summary.of(name, groups[name]) for name in sorted(groups)]


def _plan_again(source: Checkpoint, recipe: Recipe, scheme: dict[str, Any], options: Options) -> Plan:
    """The plan of a change of values, or of how they are stored, that a manifest tells of."""
    recipe = with_forms(_before_decoding(source, recipe), source)
    try:
        if "layout" in scheme:
            return plan_layout(source, recipe, scheme["layout"], options)
        if "dequantize" in scheme:
            return plan_dequantize(source, recipe, scheme["dequantize"], options)
        return plan_quantize(source, recipe, scheme_of(scheme), options)
    except (KeyError, TypeError):
        raise CheckpointError("moeconv.json says nothing sensible about formats", "Convert again.") from None


def _before_decoding(source: Checkpoint, recipe: Recipe) -> Recipe:
    """The recipe of the source's quantized experts, where another one is for them once they are decoded."""
    others = (other for other in load_shipped() if other.decoded == recipe.name)
    return next((other for other in others if find_units(source, other).units), recipe)


def _included(made: Checkpoint, candidates: set[str]) -> tuple[str, ...]:
    """Weight files beside the source's index that were included when the folder, or what it is made from, was made."""
    history = made.manifest.get("history")
    steps = [made.manifest, *(history if isinstance(history, list) else [])]
    names = [name for step in steps if isinstance(step, dict) for name in _texts(step.get("include"))]
    return tuple(dict.fromkeys(name for name in names if name in candidates))


def _texts(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _layout_of(made: Checkpoint, recipe: Recipe) -> str:
    """The layout that a folder is in: its manifest's, else the one that its experts are found in."""
    said = made.manifest.get("layout")
    if isinstance(said, str) and said in recipe.layouts:
        return said
    layouts = Counter(unit.layout for unit in find_units(made, recipe).units)
    return layouts.most_common(1)[0][0] if layouts else recipe.layouts[0]
