"""Whether a finished folder is what it should be: its structure, and every byte against its source."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from moeconv.checkpoint import Checkpoint, open_checkpoint
from moeconv.device import CpuDevice
from moeconv.encoded import decoded_view
from moeconv.errors import CheckpointError, Problem
from moeconv.files import Files, OpenFiles, Rows
from moeconv.forms import with_forms
from moeconv.layouts import find_units
from moeconv.manifest import kept_blocks
from moeconv.names import collapse
from moeconv.plan import Options, Plan
from moeconv.quantize import plan_dequantize, plan_quantize
from moeconv.recipe import Recipe
from moeconv.recipe_file import load_shipped
from moeconv.relayout import plan_layout
from moeconv.scheme import scheme_of
from moeconv.selection import select_recipe
from moeconv.worker import Worker

_COMPARE_BYTES = 256 << 10


class Report(NamedTuple):
    """Result of a verification.

    Attributes:
        tensors: tensors looked at.
        compared_nbytes: bytes compared with the source; 0 without `--against`.
        problems: what is off; empty for a good folder.
    """

    tensors: int
    compared_nbytes: int
    problems: tuple[Problem, ...]

    def json(self) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "ok": not self.problems,
            "tensors": self.tensors,
            "compared_bytes": self.compared_nbytes,
            "problems": [{"message": problem.message, "remedy": problem.remedy} for problem in self.problems],
        }


def verify_folder(
    made: Checkpoint, against: Path | None = None, recipe: str | None = None, layout: str | None = None,
    jobs: int | None = None, files: Files | None = None,
) -> Report:  # fmt: skip
    """Verify a folder, alone or against its source.

    Args:
        made: the folder.
        against: the folder it was made from.
        recipe: recipe by name or path; None for the one it was made with, or the one of its model_type.
        layout: layout of the source, where shapes do not tell.
        jobs: threads.
        files: door to the file system.

    Raises:
        MoeconvError: the source cannot be read or planned.
    """
    scheme = made.manifest.get("scheme")
    chosen = select_recipe(made, recipe)
    problems = check_structure(made, chosen)
    if against is None or problems:
        return Report(len(made.tensors), 0, tuple(problems))
    source = open_checkpoint(against, files)
    include = _included(made, {item.path for item in source.left_out})
    if include:
        source = open_checkpoint(against, files, include)
    said = made.manifest.get("source_layout")
    options = Options(
        layout=layout or (said if isinstance(said, str) else None), jobs=jobs, include=include,
        stay=kept_blocks(made.manifest, str(made.manifest.get("layout"))),
    )  # fmt: skip
    if not made.manifest and recipe is None:
        chosen = select_recipe(source, None, layout)
    if isinstance(scheme, dict):
        return compare(_plan_again(source, chosen, scheme, options), made, files)
    return compare(plan_layout(source, chosen, _layout_of(made, chosen), options), made, files)


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
    names = [name for step in steps if isinstance(step, dict) for name in step.get("include") or () if name]
    return tuple(dict.fromkeys(name for name in names if name in candidates))


def _layout_of(made: Checkpoint, recipe: Recipe) -> str:
    """The layout that a folder is in: its manifest's, else the one that its experts are found in."""
    said = made.manifest.get("layout")
    if isinstance(said, str) and said in recipe.layouts:
        return said
    layouts = Counter(unit.layout for unit in find_units(made, recipe).units)
    return layouts.most_common(1)[0][0] if layouts else recipe.layouts[0]


def check_structure(folder: Checkpoint, recipe: Recipe | None) -> list[Problem]:
    """What can be seen without the source: index, sizes, and that every expert is there as the recipe says."""
    problems: list[Problem] = []
    if folder.index_total_size is not None and folder.index_total_size != folder.nbytes:
        problems.append(
            Problem(
                f"the index says total_size {folder.index_total_size:,}; the tensors have {folder.nbytes:,} bytes",
                "Convert again: the index does not belong to these files.",
            )
        )
    if recipe is not None:
        quantized = isinstance(folder.manifest.get("scheme"), dict)
        shown = decoded_view(folder, problems) if quantized else folder
        problems += find_units(shown, recipe).faults
    if not folder.config:
        problems.append(
            Problem(f"{folder.root} has no config.json", "Copy it from the source: no engine loads without.")
        )
    return problems


def compare(wanted_plan: Plan, made: Checkpoint, files: Files | None = None) -> Report:
    """Compare a folder with what a plan would write, byte for byte, by streaming both.

    Args:
        wanted_plan: the conversion of the source to the folder's layout.
        made: the folder.
        files: door to the file system.
    """
    files = files or Files()
    wanted = {spec.name: spec for file in wanted_plan.files for spec in file.specs}
    problems: list[Problem] = []
    missing = [name for name in wanted if name not in made.tensors]
    extra = [name for name in made.tensors if name not in wanted]
    problems += [Problem(f"{line} is missing", "Convert again.") for line in collapse(missing)]
    problems += [Problem(f"{line} does not come from the source", "Convert again.") for line in collapse(extra)]
    for name, spec in wanted.items():
        if name in made.tensors and made.tensors[name].spec != spec:
            problems.append(Problem(f"{made.tensors[name].spec} should be {spec}", "Convert again."))
    problems += _other_files(wanted_plan, made, files)
    if problems:
        return Report(len(wanted), 0, tuple(problems))
    comparison = _Comparison(wanted_plan, made, files)
    comparison.run()
    return Report(len(wanted), sum(task.nbytes for task in wanted_plan.tasks), tuple(comparison.problems()))


def _other_files(wanted: Plan, made: Checkpoint, files: Files) -> Iterator[Problem]:
    """Files that are carried over as they are, or written by the plan, and are missing or differ."""
    source = wanted.source
    found = {file.path: file.nbytes for file in made.sidecars}
    for path, content in wanted.contents.items():
        if found.get(path) != len(content) or files.read_bytes(made.root / path, len(content)) != content:
            yield Problem(f"{made.root / path} is not the one of this conversion", "Convert again.")
    for file in wanted.copied_files:
        theirs, ours = source.root / file.path, made.root / file.path
        if file.path not in found:
            yield Problem(f"{ours} is missing", f"Copy {theirs} there, or convert again.")
        elif found[file.path] != file.nbytes or not _are_equal(files, ours, theirs, file.nbytes):
            yield Problem(f"{ours} differs from {theirs}", f"Copy {theirs} there, or convert again.")


def _are_equal(files: Files, ours: Path, theirs: Path, nbytes: int) -> bool:
    """Two files of the same size, compared in pieces: sidecars may be large."""
    opened = [files.open_read(path) for path in (ours, theirs)]
    try:
        buffers = [bytearray(min(nbytes, _COMPARE_BYTES)) for _ in opened]
        for at in range(0, nbytes, _COMPARE_BYTES):
            size = min(_COMPARE_BYTES, nbytes - at)
            for file, buffer in zip(opened, buffers, strict=True):
                file.read_into(memoryview(buffer)[:size], at)
            if buffers[0] != buffers[1]:
                return False
    finally:
        for file in opened:
            file.close()
    return True


class _Comparison:
    """Runs a plan's steps and holds their bytes against a folder's, which may be sharded in another way."""

    def __init__(self, plan: Plan, made: Checkpoint, files: Files) -> None:
        self.plan = plan
        self.made = made
        self.files = files
        self.lock = threading.Lock()
        self.differing: dict[str, tuple[int, int]] = {}
        self.places = [_Places(plan, number) for number in range(len(plan.files))]

    def run(self) -> None:
        sources = [self.plan.source.root / file.path for file in self.plan.source.files]
        paths = [self.made.root / file.path for file in self.made.files]
        tasks = iter(self.plan.tasks)

        def work() -> None:
            worker, targets = Worker(self.files, sources, self.plan.memory, CpuDevice()), OpenFiles(self.files, paths)
            buffer = memoryview(bytearray(_COMPARE_BYTES))

            def check(file: int, offset: int, content: memoryview, rows: Rows | None) -> None:
                if rows is None:
                    self._check(targets, buffer, file, offset, content)
                    return
                for number in range(rows.count):
                    row = content[number * rows.pitch : number * rows.pitch + rows.nbytes]
                    self._check(targets, buffer, file, offset + number * rows.stride, row)

            try:
                while True:
                    with self.lock:
                        task = next(tasks, None)
                    if task is None:
                        return
                    for step in task.steps:
                        worker.run(step, check)
                    worker.finish(check)
            finally:
                worker.close()
                targets.close()

        with ThreadPoolExecutor(self.plan.memory.jobs) as pool:
            for future in [pool.submit(work) for _ in range(self.plan.memory.jobs)]:
                future.result()

    def _check(self, targets: OpenFiles, buffer: memoryview, file: int, offset: int, content: memoryview) -> None:
        for name, at, first, last in self.places[file].split(offset, len(content)):
            tensor = self.made.tensors[name]
            for begin in range(first, last, len(buffer)):
                size = min(len(buffer), last - begin)
                targets[tensor.file].read_into(buffer[:size], tensor.offset + at + begin - first)
                if bytes(buffer[:size]) != bytes(content[begin : begin + size]):  # memoryviews compare item by item
                    self._note(name, at + begin - first, buffer[:size], content[begin : begin + size])

    def _note(self, name: str, at: int, found: memoryview, wanted: memoryview) -> None:
        first = next(index for index, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
        with self.lock:
            before, count = self.differing.get(name, (1 << 62, 0))
            self.differing[name] = (min(before, at + first), count + 1)

    def problems(self) -> list[Problem]:
        return [
            Problem(
                f"{self.made.tensors[name].spec} differs from the source from byte {first:,} on "
                f"({count} of its pieces of {_COMPARE_BYTES >> 10} KiB or less)",
                "Convert again; if it happens twice, check memory and disk.",
            )
            for name, (first, count) in sorted(self.differing.items())
        ]


class _Places:
    """Which tensor of a planned file a byte belongs to."""

    def __init__(self, plan: Plan, number: int) -> None:
        file = plan.files[number]
        self.starts: list[int] = []
        self.names: list[str] = []
        at = len(file.head)
        for spec in file.specs:
            if spec.nbytes:
                self.starts.append(at)
                self.names.append(spec.name)
            at += spec.nbytes
        self.end = at

    def split(self, offset: int, nbytes: int) -> list[tuple[str, int, int, int]]:
        """Tensor, offset in it, first and last (excluded) byte of a written run, for each tensor it touches."""
        result = []
        index = bisect_right(self.starts, offset) - 1
        done = 0
        while done < nbytes:
            start = self.starts[index]
            stop = self.starts[index + 1] if index + 1 < len(self.starts) else self.end
            size = min(nbytes - done, stop - offset - done)
            result.append((self.names[index], offset + done - start, done, done + size))
            done += size
            index += 1
        return result
