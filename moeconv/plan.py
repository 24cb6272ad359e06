"""Everything that will happen, decided before anything does.

`plan` sees names, shapes and dtypes, never data. It either returns a complete `Plan` (every byte of the
output has its place, and every task that writes it an id) or raises `PlanError` with all that is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from moeconv.checkpoint import INDEX, Checkpoint, StoredTensor
from moeconv.encoded import MODELOPT_SETTINGS, format_of_module, quantization_config
from moeconv.engines import Reading, format_readings, readings
from moeconv.errors import PlanError, Problem, UsageError
from moeconv.files import FileStat
from moeconv.layouts import find_units
from moeconv.moves import Change, Fill, change
from moeconv.recipe import Recipe
from moeconv.scheme import Scheme
from moeconv.shards import TargetFile, place_specs
from moeconv.steps import Copy, Step, needs_whole_bytes, steps_of
from moeconv.tasks import TASK_BYTES, Task, tasks_of
from moeconv.tensors import Spec
from moeconv.units import Unit, layout_lines
from moeconv.values import Value

DEFAULT_SHARD_BYTES = 5_000_000_000
#: Bytes that one worker holds while it copies.
COPY_BUFFER_BYTES = 512 << 10
#: Bytes that one worker holds at least and at most while it rearranges, and all workers together by default.
#: Smaller tiles mean more and shorter reads, larger ones fall out of the caches (measured: 16 MiB is the fastest).
MIN_TILE_BYTES = 1 << 20
MAX_TILE_BYTES = 16 << 20
ALL_TILES_BYTES = 64 << 20
#: Peak RSS of a run without its buffers: interpreter, libraries, code (measured, `tests/bench/memory.py`).
BASELINE_BYTES = 64 << 20
#: Growth of RSS for each tensor name of source and target together (measured, `tests/bench/memory.py`).
NAME_BYTES = 3000


#: What torch adds to the peak once it is imported (measured).
TORCH_BYTES = 280 << 20


class Options(NamedTuple):
    """What a user may choose about a conversion, apart from where to.

    Attributes:
        max_shard_nbytes: a weight file gets no more than this, unless one tensor alone is larger.
        jobs: threads; None for one a core, at most 8.
        max_memory: bytes of host memory that the run may use; None for the defaults.
        devices: where matrices are encoded; workers take them in turn.
        max_vram: bytes that the run may use on each GPU, beside what a CUDA context takes; None for the defaults.
        layout: layout of the source, where headers do not tell.
        include: weight files beside the index that belong to the model.
        stay: blocks that keep the layout they have.
    """

    max_shard_nbytes: int = DEFAULT_SHARD_BYTES
    jobs: int | None = None
    max_memory: int | None = None
    devices: tuple[str, ...] = ("cpu",)
    max_vram: int | None = None
    layout: str | None = None
    include: tuple[str, ...] = ()
    stay: tuple[str, ...] = ()


class Memory(NamedTuple):
    """Peak host memory of the run, in bytes, and what it is made of.

    Attributes:
        baseline: interpreter and libraries.
        names: of all tensors.
        jobs: threads.
        buffer: of each thread.
        scratch: other memory of each thread, staging included.
        staging: one staging buffer of a thread's lane (`device`).
        strip: of `scratch`, bytes for a strip of a woven matrix (`steps`).
        tile_elements: of a matrix that is encoded or decoded.
        device_bytes: peak on each GPU.
    """

    baseline: int
    names: int
    jobs: int
    buffer: int
    scratch: int = 0
    staging: int = 0
    tile_elements: int = 0
    device_bytes: int = 0
    strip: int = 0

    @property
    def peak(self) -> int:
        return self.baseline + self.names + self.jobs * (self.buffer + self.scratch)


@dataclass(frozen=True, slots=True)
class Plan:
    """A conversion, complete.

    Attributes:
        source: what is read.
        recipe: what was looked for.
        layout: the layout asked for (`hub`, `packed` or `experts`).
        changes: units that change.
        kept: units that are in that layout already; copied.
        copied: tensors that no rule matches; copied.
        files: weight files to write.
        index: content of the index file; empty for a single weight file.
        make_tasks: makes the work, in the order of the targets, once; to look at a plan does not need it.
        memory: see `Memory`.
        readings: which engines read the result.
        warnings: what the user should know, none of which stops the run.
        scheme: what is quantized to what; None for a change of layout.
        values: every target of a quantization.
        contents: small files that are not the source's, config.json above all, by path.
    """

    source: Checkpoint
    recipe: Recipe
    layout: str
    options: Options
    changes: tuple[Change, ...]
    kept: tuple[Unit, ...]
    copied: tuple[StoredTensor, ...]
    files: tuple[TargetFile, ...]
    index: bytes
    make_tasks: Callable[[], tuple[Task, ...]]
    memory: Memory
    readings: tuple[Reading, ...]
    warnings: tuple[str, ...]
    scheme: Scheme | None = None
    values: tuple[Value, ...] = ()
    contents: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The work, in the order of the targets; their ids are the same in every run."""
        return self.make_tasks()

    @property
    def output_nbytes(self) -> int:
        """Bytes of the finished folder, without its manifest."""
        sidecars = sum(f.nbytes for f in self.copied_files) + sum(map(len, self.contents.values()))
        return sum(file.nbytes for file in self.files) + len(self.index) + sidecars

    @property
    def copied_files(self) -> tuple[FileStat, ...]:
        """Files beside the weights that are carried over as they are."""
        return tuple(file for file in self.source.sidecars if file.path not in self.contents)


def plan(source: Checkpoint, recipe: Recipe, layout: str, options: Options | None = None) -> Plan:
    """Plan the conversion of a checkpoint to a layout.

    Args:
        source: the checkpoint.
        recipe: how its experts are stored.
        layout: `hub`, `packed` or `experts`.
        options: see `Options`.

    Raises:
        PlanError: with everything that stands in the way.
        UsageError: a layout that the recipe cannot say.
    """
    options = options or Options()
    check_layouts(recipe, layout, options)
    found = find_units(source, recipe, options.layout)
    problems = list(found.faults)
    goal = recipe.layout(layout)
    stays = [unit.block in options.stay or is_already(unit, goal) for unit in found.units]
    kept = tuple(unit for unit, is_kept in zip(found.units, stays, strict=True) if is_kept)
    changes = [
        made
        for unit, is_kept in zip(found.units, stays, strict=True)
        if not is_kept and (made := change(unit, goal, recipe, problems))
    ]
    problems += found.unknown if changes or not found.units else ()
    if not found.units and not problems:
        problems.append(
            Problem(
                f"{source.root} holds no experts that recipe {recipe.name} describes",
                "Look at the names with `moeconv inspect`, and give the --recipe that matches.",
            )
        )
    fills = [fill for made in changes for fill in made.fills]
    copied = [tensor for unit in kept for tensor in unit.tensors()] + list(found.rest)
    problems += _target_problems(changes, copied, fills)
    if problems:
        raise PlanError.of(problems)
    specs = [spec for made in changes for spec in made.targets] + [tensor.spec for tensor in copied]
    files, places, index = place_specs([(spec,) for spec in specs], source, options.max_shard_nbytes)

    @cache
    def make_tasks() -> tuple[Task, ...]:
        steps: list[Step] = [step for fill in fills for step in steps_of(fill, places()[fill.target.name])]
        steps += [
            Copy(tensor.file, tensor.offset, *places()[tensor.spec.name], tensor.spec.nbytes) for tensor in copied
        ]
        return tasks_of(steps, [file.path for file in files])

    memory = copying_memory(source, files, fills, jobs_of(files, make_tasks, options), options)
    held = [(unit, [tensor.spec for tensor in unit.tensors()]) for unit in kept]
    held += [(made.unit, list(made.targets)) for made in changes]
    readers = _readers(source, recipe, layout, held)
    warnings = [*source_warnings(source, changes), *reader_warnings(readers)]
    forms = sorted({form for unit, _ in held if (form := unit.component.form)})
    if forms and goal == "packed" and all(reading.reads == "unknown" for reading in readers):
        warnings.append(f"no engine is known to read packed experts in the form {', '.join(forms)}")
    return Plan(
        source, recipe, layout, options, tuple(changes), kept, found.rest, files, index, make_tasks, memory, readers,
        tuple(warnings),
    )  # fmt: skip


def check_layouts(recipe: Recipe, layout: str, options: Options) -> None:
    """Refuse layouts that a recipe does not have.

    Raises:
        UsageError: such a layout, as the one to make or the one that the source is said to be in.
    """
    for name in (layout, *((options.layout,) if options.layout else ())):
        if name not in recipe.layouts:
            raise UsageError(f"recipe {recipe.name} has no layout {name!r}", f"It has: {', '.join(recipe.layouts)}.")


def _readers(
    source: Checkpoint, recipe: Recipe, layout: str, held: Sequence[tuple[Unit, Sequence[Spec]]]
) -> tuple[Reading, ...]:
    """Which engines read a result that holds these units as these tensors."""
    examples = {unit.component.form: specs for unit, specs in held if unit.component.form}
    shapes = [spec.shape for _, specs in held for spec in specs]
    if examples and recipe.layout(layout) == "experts":  # engines know them by their formats
        formats = {name for specs in examples.values() if (name := format_of_module(specs, source.config))}
        readers = format_readings(source.config, formats or examples.keys())
    else:
        readers = readings(recipe, source.config, layout, shapes, examples)
    has_settings = quantization_config(source.config) or any(f.path == MODELOPT_SETTINGS for f in source.sidecars)
    if not examples or has_settings:
        return readers
    why = "config.json does not say how experts are quantized, so that codes are taken for numbers"
    return tuple(reading._replace(reads="no", why=why) for reading in readers)


def is_already(unit: Unit, layout: str) -> bool:
    """The unit is stored as `layout` says, under that layout's name or another's with the same lines."""
    return layout_lines(unit.component, unit.layout) == layout_lines(unit.component, layout)


def _target_problems(changes: Sequence[Change], copied: Sequence[StoredTensor], fills: Sequence[Fill]) -> list[Problem]:
    problems: list[Problem] = []
    names: dict[str, str] = {tensor.spec.name: "copied as it is" for tensor in copied} if changes else {}
    for made in changes:
        for spec in made.targets:
            if spec.name in names:
                problems.append(
                    Problem(
                        f"two sources for the one target {spec.name}: {names[spec.name]}, "
                        f"and made from {made.unit.block}",
                        "The checkpoint already holds a tensor of that name: remove the one that is not the model's.",
                    )
                )
            names[spec.name] = f"made from {made.unit.block}"
    odd = next((fill for fill in fills if not needs_whole_bytes(fill)), None)
    if odd:
        problems.append(
            Problem(
                f"{odd.target} cannot be rearranged: its elements are smaller than a byte",
                "Keep the layout it has.",
            )
        )
    return problems


def default_jobs(asked: int | None, tasks: int | None = None) -> int:
    """Workers of a run: as asked for or one a core and at most 8, and no more than there are tasks."""
    wanted = asked or min(8, os.cpu_count() or 1)
    return wanted if tasks is None else min(wanted, max(1, tasks))


def jobs_of(files: Sequence[TargetFile], make_tasks: Callable[[], tuple[Task, ...]], options: Options) -> int:
    """Workers of a run. Only a small one has fewer tasks than workers are wanted, so only then they are made."""
    wanted = default_jobs(options.jobs)
    if sum(file.data_nbytes // TASK_BYTES for file in files) >= wanted:
        return wanted
    return default_jobs(options.jobs, len(make_tasks()))


def copying_memory(
    source: Checkpoint, files: Sequence[TargetFile], fills: Sequence[Fill], jobs: int, options: Options
) -> Memory:
    """What a run needs that changes no values.

    Args:
        source: as opened.
        files: to write.
        fills: all that is not copied tensor by tensor.
        jobs: workers that are wanted.
        options: budget.

    Raises:
        UsageError: a budget that is too small, with the least that works.
    """
    rearranges = any(move.route.run is None for fill in fills for move in fill.moves)
    names = (len(source.tensors) + sum(len(file.specs) for file in files)) * NAME_BYTES
    smallest = MIN_TILE_BYTES if rearranges else COPY_BUFFER_BYTES
    wanted = min(MAX_TILE_BYTES, max(MIN_TILE_BYTES, ALL_TILES_BYTES // jobs)) if rearranges else COPY_BUFFER_BYTES
    if options.max_memory is None:
        return Memory(BASELINE_BYTES, names, jobs, wanted)
    room = options.max_memory - BASELINE_BYTES - names
    if room < smallest:
        least = BASELINE_BYTES + names + smallest
        raise UsageError(
            f"--max-memory {options.max_memory:,} is less than this conversion needs",
            f"The least that works is {least:,} bytes: --max-memory {-(-least // 1_000_000)}MB.",
        )
    jobs = min(jobs, room // smallest)
    return Memory(BASELINE_BYTES, names, jobs, min(wanted, room // jobs))


def source_warnings(source: Checkpoint, changes: Sequence[Change]) -> list[str]:
    """What of a source is not carried over as it is."""
    lines = [f"left out: {item.path} ({item.nbytes:,} bytes): {item.why}" for item in source.left_out]
    conflicts = sorted(
        key
        for key in {key for file in source.files for key in file.metadata}
        if len({file.metadata[key] for file in source.files if key in file.metadata}) > 1
    )
    lines += [
        f"__metadata__ key {key!r} differs between source files; the first file's value is kept" for key in conflicts
    ]
    padded = [made for made in changes if any(not fill.moves for fill in made.fills)]
    if padded:
        lines.append(f"{len(padded)} blocks have room for experts that compute nothing; it is filled with zeros")
    dropped = [made for made in changes if any(rule.pad for rule, _ in made.unit.hits)]
    if dropped:
        lines.append(f"{len(dropped)} blocks have rows of experts that compute nothing; they are not carried over")
    return lines


def reader_warnings(readers: Sequence[Reading]) -> list[str]:
    """Engines that are known not to read the result."""
    return [
        f"{reading.engine} does not read this result: {reading.why}" for reading in readers if reading.reads == "no"
    ]


def index_path(plan_: Plan) -> str | None:
    """Name of the index file, or None for a single weight file."""
    return INDEX if plan_.index else None
