"""What must hold for all inputs."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from moeconv.checkpoint import open_checkpoint
from moeconv.device import CpuDevice
from moeconv.executor import execute
from moeconv.files import Files, Rows
from moeconv.names import Pattern, collapse
from moeconv.ops import place
from moeconv.plan import Options, Plan, plan
from moeconv.recipe import LAYOUTS
from moeconv.recipe_file import parse_recipe
from moeconv.selection import select_recipe
from moeconv.steps import Rearrange
from moeconv.tasks import Task
from moeconv.tiles import rows_of, tiles_of
from moeconv.verify import Request, verify_folder
from moeconv.worker import Worker
from tests.folders import read_folder, write_folder
from tests.strategies import Case, cases, views

MANY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
FEWER = settings(MANY, max_examples=25)


@contextmanager
def folder_of(case: Case) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as root:
        yield write_folder(Path(root) / "source", case.tensors, case.config, case.shards)


def plan_of(source: Path, layout: str, **options: object) -> Plan:
    checkpoint = open_checkpoint(source)
    return plan(checkpoint, select_recipe(checkpoint), layout, Options(**options))  # type: ignore[arg-type]


def convert(source: Path, layout: str, **options: object) -> Path:
    target = source.parent / f"{source.name}-{layout}"
    execute(plan_of(source, layout, **options), target, ["test"], fsync=False)
    return target


@MANY
@given(cases(), st.sampled_from(LAYOUTS), st.integers(1, 4000), st.integers(1, 4000))
def test_every_way_there_and_back_gives_every_byte_back(case: Case, layout: str, first: int, second: int) -> None:
    with folder_of(case) as source:
        there = convert(source, layout, max_shard_nbytes=first)
        assert not verify_folder(open_checkpoint(there), Request(source)).problems
        back = convert(there, "experts", max_shard_nbytes=second)
        assert read_folder(back) == case.tensors
        again = convert(back, layout, max_shard_nbytes=first)
        assert read_folder(again) == read_folder(there)


@MANY
@given(cases(), st.sampled_from(LAYOUTS), st.integers(1, 4000))
def test_every_output_byte_is_written_exactly_once(case: Case, layout: str, shard: int) -> None:
    with folder_of(case) as source:
        made = plan_of(source, layout, max_shard_nbytes=shard)
        written = [numpy.zeros(file.nbytes, numpy.int64) for file in made.files]
        for file, counts in zip(made.files, written, strict=True):
            counts[: len(file.head)] += 1
        paths = [made.source.root / file.path for file in made.source.files]
        worker = Worker(Files(), paths, made.memory, CpuDevice())

        def sink(number: int, offset: int, content: memoryview, rows: Rows | None) -> None:
            if rows is None:
                written[number][offset : offset + len(content)] += 1
                return
            for row in range(rows.count):
                at = offset + row * rows.stride
                written[number][at : at + rows.nbytes] += 1

        for task in made.tasks:
            for step in task.steps:
                worker.run(step, sink)
        worker.close()
        assert all((counts == 1).all() for counts in written)
        assert len({task.id for task in made.tasks}) == len(made.tasks)


@FEWER
@given(cases(), st.sampled_from(LAYOUTS), st.integers(1, 5), st.integers(1, 64), st.randoms())
def test_output_does_not_depend_on_jobs_buffer_or_order(
    case: Case, layout: str, jobs: int, buffer: int, random: object
) -> None:
    with folder_of(case) as source:
        one = plan_of(source, layout, jobs=1, max_shard_nbytes=700)
        execute(one, source.parent / "one", ["test"], fsync=False)
        tasks: list[Task] = [
            task._replace(id=f"{task.id}/{number}", steps=(step,), nbytes=step.nbytes)
            for task in one.tasks
            for number, step in enumerate(task.steps)
        ]
        random.shuffle(tasks)  # type: ignore[attr-defined]
        memory = one.memory._replace(jobs=jobs, buffer=192 + buffer * 64)
        other = dataclasses.replace(one, make_tasks=lambda: tuple(tasks), memory=memory)
        execute(other, source.parent / "other", ["test"], fsync=False)
        for path in (source.parent / "one").iterdir():
            assert path.read_bytes() == (source.parent / "other" / path.name).read_bytes()


@FEWER
@given(cases(), st.sampled_from(LAYOUTS), st.integers(1, 4000))
def test_the_official_reader_agrees(case: Case, layout: str, shard: int) -> None:
    with folder_of(case) as source:
        made = convert(source, layout, max_shard_nbytes=shard)
        tensors = read_folder(made)
        seen = set()
        for path in made.glob("*.safetensors"):
            with safe_open(path, framework="numpy") as file:
                assert file.metadata() == {"format": "pt"}
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    assert (part.get_dtype(), tuple(part.get_shape())) == tensors[name][:2]
                    seen.add(name)
        assert seen == tensors.keys()
        index = made / "model.safetensors.index.json"
        if index.exists():
            content = json.loads(index.read_text())
            assert content["metadata"]["total_size"] == sum(len(item.content) for item in tensors.values())
            assert content["weight_map"].keys() == tensors.keys()


@MANY
@given(views())
def test_places_of_parts_are_what_numpy_says(case: tuple[str, dict[str, tuple[int, ...]]]) -> None:
    value, shapes = case
    letters = ", ".join("IJK"[: len(shapes["gate"])])
    recipe_text = f"""
layouts:
  experts:
    "{{block}}.{{expert}}.gate [{letters}]": gate
    "{{block}}.{{expert}}.up [{letters}]": up
  packed:
    "{{block}}.both [{_claim(value, len(shapes["gate"]))}]": {value}
"""
    recipe = parse_recipe(recipe_text, "test", "test.yaml")
    expression = recipe.components[0].rules["packed"][0].value
    block, found = place(expression, shapes)
    count = prod(shapes["gate"])
    gate = numpy.arange(count).reshape(shapes["gate"])
    up = gate + count
    axis = -1 if "-1" in value else 0
    both = numpy.concatenate([gate, up], axis)
    if "interleave" in value:
        along = axis % gate.ndim
        both = numpy.stack([gate, up], along + 1).reshape(both.shape)
    if "transpose" in value:
        both = numpy.swapaxes(both, -1, -2)
    assert block == both.shape
    for part, wanted in (("gate", gate), ("up", up)):
        view = found[part]
        for index in numpy.ndindex(*view.shape):
            at = [0] * len(block)
            for axis_of, position in zip(view.axes, index, strict=True):
                at[axis_of.of] = axis_of.start + axis_of.step * position
            assert both[tuple(at)] == wanted[index]


def _claim(value: str, rank: int) -> str:
    letters = list("IJK"[:rank])
    letters[-1 if "-1" in value else 0] = f"2*{letters[-1 if '-1' in value else 0]}"
    if "transpose" in value:
        letters[-1], letters[-2] = letters[-2], letters[-1]
    return ", ".join(["E", *letters])


@MANY
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    st.integers(1, 200),
    st.data(),
)
def test_tiles_cover_a_block_once_and_rows_their_elements(
    block: tuple[int, ...], nbytes: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, block[0] - 1))
    last = data.draw(st.integers(first + 1, block[0]))
    step = Rearrange(0, 0, block, 2, first, last, ())
    seen = numpy.zeros(prod(block), int)
    for ranges in tiles_of(step, nbytes):
        assert prod(stop - start for start, stop in ranges) * 2 <= max(2, nbytes)
        for joined in (True, False):
            elements = [
                begin + row * stride + column
                for begin, count, stride, length in rows_of([(a, b, 1) for a, b in ranges], block, joined=joined)
                for row in range(count)
                for column in range(length)
            ]
            wanted = numpy.arange(prod(block)).reshape(block)[tuple(slice(a, b) for a, b in ranges)].ravel()
            assert elements == list(wanted)
        seen[elements] += 1
    assert (seen.reshape(block)[first:last] == 1).all()
    assert seen.sum() == (last - first) * prod(block[1:])


@MANY
@given(st.text("ab.0123456789", max_size=30), st.text("abc.", min_size=1, max_size=8))
def test_matching_and_filling_are_inverses(name: str, end: str) -> None:
    try:
        pattern = Pattern.parse("{block}.x.{expert}." + end.strip("."))
    except ValueError:
        return
    match = pattern.match(name)
    if match:
        assert pattern.fill(*match) == name
    assert pattern.match(pattern.fill("a.3", 17)) == ("a.3", 17)


@MANY
@given(st.sets(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=30))
def test_collapsed_names_name_exactly_the_names(pairs: set[tuple[int, int]]) -> None:
    names = [f"a.{first}.b.{second}.c" for first, second in sorted(pairs)]
    assert sorted(_expanded(collapse(names))) == sorted(names)


def _expanded(lines: list[str]) -> list[str]:
    result = list(lines)
    while any("{" in line for line in result):
        line = next(line for line in result if "{" in line)
        result.remove(line)
        head, _, rest = line.partition("{")
        inner, _, tail = rest.partition("}")
        for run in inner.split(","):
            first, _, last = run.partition("..")
            result += [f"{head}{number}{tail}" for number in range(int(first), int(last or first) + 1)]
    return result
