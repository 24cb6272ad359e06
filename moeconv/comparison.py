"""A folder byte for byte against its source: the plan's own steps run again, and compared instead of written."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from moeconv.checkpoint import Checkpoint
from moeconv.device import Device, make_device
from moeconv.errors import Problem
from moeconv.files import Files, OpenFiles, Rows
from moeconv.looking import Hand, in_threads
from moeconv.names import collapse
from moeconv.plan import Plan
from moeconv.sample import Sample, chosen
from moeconv.steps import Content, Copy, Step, Zeros
from moeconv.worker import Worker

COMPARE_BYTES = 256 << 10


class Compared(NamedTuple):
    """Result of a comparison.

    Attributes:
        nbytes: compared.
        of_nbytes: of so many.
        problems: what differs.
        differing: names of tensors whose bytes do.
    """

    nbytes: int
    of_nbytes: int
    problems: tuple[Problem, ...]
    differing: frozenset[str] = frozenset()


def compare(wanted_plan: Plan, made: Checkpoint, files: Files, sample: Sample | None = None) -> Compared:
    """Compare a folder with what a plan would write, byte for byte, by streaming both.

    Args:
        wanted_plan: the conversion of the source to the folder's layout and formats.
        made: the folder.
        files: door to the file system.
        sample: how much of it.
    """
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
    total = sum(task.nbytes for task in wanted_plan.tasks)
    if problems:
        return Compared(0, total, tuple(problems))
    comparison = _Comparison(wanted_plan, made, files)
    comparison.run(sample)
    return Compared(comparison.nbytes, total, tuple(comparison.problems()), frozenset(comparison.differing))


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
        buffers = [bytearray(min(nbytes, COMPARE_BYTES)) for _ in opened]
        for at in range(0, nbytes, COMPARE_BYTES):
            size = min(COMPARE_BYTES, nbytes - at)
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
        self.nbytes = 0
        self.differing: dict[str, tuple[int, int]] = {}
        self.places = [_Places(plan, number) for number in range(len(plan.files))]

    def run(self, sample: Sample | None) -> None:
        devices = cycle([make_device(name) for name in self.plan.options.devices])
        groups: Sequence[Sequence[Step]] = [task.steps for task in self.plan.tasks]
        if sample is not None:
            named = [named for steps in groups for step in steps for named in self._named(step)]
            groups = [[step] for step in chosen(sample, named)]
        in_threads(self.plan.memory.jobs, groups, lambda: _ComparingHand(self, next(devices)))
        self.nbytes = sum(step.nbytes for steps in groups for step in steps)

    def _named(self, step: Step) -> Iterator[tuple[str, Step]]:
        """A step under the name of what it makes; one that copies several tensors as several steps."""
        if isinstance(step, Copy | Zeros):
            for name, at, first, last in self.places[step.target_file].split(step.target_offset, step.nbytes):
                moved = step._replace(target_offset=step.target_offset + first, nbytes=last - first)
                if isinstance(moved, Copy):
                    moved = moved._replace(source_offset=moved.source_offset + first)
                yield f"{name}.{at}", moved
        elif not isinstance(step, Content):
            offset = step.target_offset
            yield f"{self.places[step.target_file].split(offset, 1)[0][0]}.{offset}", step

    def check(self, targets: OpenFiles, buffer: memoryview, file: int, offset: int, content: memoryview) -> None:
        """Hold bytes that belong at an offset of a planned file against those of the folder."""
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
                f"({count} of its pieces of {COMPARE_BYTES >> 10} KiB or less)",
                "Convert again; if it happens twice, check memory and disk.",
            )
            for name, (first, count) in sorted(self.differing.items())
        ]


class _ComparingHand(Hand[Sequence[Step]]):
    """One thread's part of it."""

    def __init__(self, whole: _Comparison, device: Device) -> None:
        plan, files = whole.plan, whole.files
        self._whole = whole
        self._worker = Worker(files, [plan.source.root / f.path for f in plan.source.files], plan.memory, device)
        self._targets = OpenFiles(files, [whole.made.root / file.path for file in whole.made.files])
        self._buffer = memoryview(bytearray(COMPARE_BYTES))

    def take(self, item: Sequence[Step]) -> None:
        for step in item:
            self._worker.run(step, self._check)
        self._worker.finish(self._check)

    def _check(self, file: int, offset: int, content: memoryview, rows: Rows | None) -> None:
        if rows is None:
            self._whole.check(self._targets, self._buffer, file, offset, content)
            return
        for number in range(rows.count):
            row = content[number * rows.pitch : number * rows.pitch + rows.nbytes]
            self._whole.check(self._targets, self._buffer, file, offset + number * rows.stride, row)

    def close(self) -> None:
        self._worker.close()
        self._targets.close()


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
