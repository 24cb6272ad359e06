"""Steps in groups that are run, made durable and journalled together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from moeconv.steps import Content, Copy, Decode, Rearrange, Step, Transcode, Zeros

#: A task moves about this many bytes; larger steps are cut. All tasks at hand are lost when a run dies.
TASK_BYTES = 16 << 20


class Task(NamedTuple):
    """Steps that are done and journalled together. `id` is the same in every run of the same plan."""

    id: str
    steps: tuple[Step, ...]
    nbytes: int


def source_files(task: Task) -> set[int]:
    """Numbers of all source files that a task reads."""
    found: set[int] = set()
    for step in task.steps:
        if isinstance(step, Copy):
            found.add(step.source_file)
        elif isinstance(step, Rearrange):
            found.update(piece.source_file for piece in step.pieces)
        elif isinstance(step, Transcode):
            for matrix in (step.matrix, *step.sharing):
                source = matrix.source
                if isinstance(source, Rearrange):
                    found.update(piece.source_file for piece in source.pieces)
                else:
                    decodes = [source] if isinstance(source, Decode) else [strand.decode for strand in source.strands]
                    found.update(part.file for decode in decodes for part in decode.parts)
    return found


def tasks_of(steps: Sequence[Step], target_names: Sequence[str]) -> tuple[Task, ...]:
    """Group steps into tasks of about `TASK_BYTES`, in the order of their targets.

    Args:
        steps: in any order.
        target_names: names of the target files, for the ids.
    """
    ordered = sorted(steps, key=lambda step: (step.target_file, step.target_offset))
    tasks: list[Task] = []
    group: list[Step] = []
    size = 0

    def close() -> None:
        nonlocal group, size
        if group:
            first = group[0]
            tasks.append(Task(f"{target_names[first.target_file]}@{first.target_offset}", tuple(group), size))
        group, size = [], 0

    for step in _joined(ordered):
        for piece in _cut(step):
            if group and (size + piece.nbytes > TASK_BYTES or group[0].target_file != piece.target_file):
                close()
            group.append(piece)
            size += piece.nbytes
    close()
    return tuple(tasks)


def _joined(steps: Sequence[Step]) -> Iterator[Step]:
    """Neighbouring copies that are neighbours in the source too become one; empty ones go."""
    last: Copy | None = None
    for step in steps:
        if isinstance(step, Copy):
            if step.nbytes == 0:
                continue
            if (
                last is not None
                and (last.source_file, last.target_file) == (step.source_file, step.target_file)
                and last.source_offset + last.nbytes == step.source_offset
                and last.target_offset + last.nbytes == step.target_offset
            ):
                last = Copy(
                    last.source_file,
                    last.source_offset,
                    last.target_file,
                    last.target_offset,
                    last.nbytes + step.nbytes,
                )
                continue
        if last is not None:
            yield last
        last = step if isinstance(step, Copy) else None
        if last is None and step.nbytes:
            yield step
    if last is not None:
        yield last


def _cut(step: Step) -> Iterator[Step]:
    if step.nbytes <= TASK_BYTES:
        yield step
    elif isinstance(step, Copy):
        for at in range(0, step.nbytes, TASK_BYTES):
            yield Copy(
                step.source_file, step.source_offset + at, step.target_file, step.target_offset + at,
                min(TASK_BYTES, step.nbytes - at),
            )  # fmt: skip
    elif isinstance(step, Zeros):
        for at in range(0, step.nbytes, TASK_BYTES):
            yield Zeros(step.target_file, step.target_offset + at, min(TASK_BYTES, step.nbytes - at))
    elif isinstance(step, Transcode):
        rows = max(1, TASK_BYTES // max(1, step.row_nbytes) // step.row_multiple) * step.row_multiple
        for first in range(step.first, step.last, rows):
            yield step._replace(first=first, last=min(first + rows, step.last))
    elif isinstance(step, Content):
        yield step
    else:
        rows = max(1, TASK_BYTES // step.row_nbytes)
        for first in range(step.first, step.last, rows):
            yield Rearrange(
                step.target_file, step.block_offset, step.block, step.item_nbytes,
                first, min(first + rows, step.last), step.pieces,
            )  # fmt: skip
