"""Runs a plan: a thread for each runner of tasks, one that makes their results durable, and nothing decided here."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from moeconv.checkpoint import CONSUMED, TIME_SUFFIX, WeightFile
from moeconv.consumption import LAG_BYTES, Consumption
from moeconv.device import Device, make_device
from moeconv.errors import CheckpointError, OutputError
from moeconv.files import Files, FileStat
from moeconv.journal import Done
from moeconv.losses import read_loss
from moeconv.manifest import build_manifest, manifest_bytes
from moeconv.plan import Plan
from moeconv.pool import Places, Pool, Runner, ThreadRunner
from moeconv.steps import Transcode
from moeconv.tasks import Task, source_files
from moeconv.writer import Writer

#: A run that dies repeats what was not journalled. It is journalled after this many bytes or seconds.
#: Without fsync only the seconds count: a journal whose content is on its way to the disk, behind gigabytes of data,
#: cannot be removed before it is there, which held up runs of 2 s by another 0.3 to 0.9 s.
JOURNAL_BYTES = 128 << 20
JOURNAL_SECONDS = 3.0
#: No task is begun while as much as this is not journalled, and the oldest of it for `JOURNAL_SECONDS`: where the disk
#: is slow to make things durable, a run that dies repeats no more than it.
AT_RISK_BYTES = 224 << 20
_POLL_SECONDS = 0.2

#: Called now and then from the main thread with bytes done and bytes in all.
Progress = Callable[[int, int], None]


class Outcome(NamedTuple):
    """What a run did: `is_new` is False where the destination was finished before."""

    is_new: bool
    nbytes: int
    resumed_nbytes: int
    seconds: float
    hash_seconds: float = 0.0


def execute(
    plan: Plan,
    destination: Path,
    command: Sequence[str],
    *,
    files: Files | None = None,
    fsync: bool = True,
    overwrite: bool = False,
    restart: bool = False,
    consume_source: bool = False,
    hashes: bool = False,
    progress: Progress | None = None,
    devices: Sequence[Device] = (),
    pool: Pool | None = None,
) -> Outcome:
    """Make `destination` from a plan.

    Args:
        plan: what to do.
        destination: folder that will exist in the end; its parent is made if needed.
        command: command line for the manifest.
        files: door to the file system.
        fsync: survive a power loss; without, only the death of the process.
        overwrite: replace a finished folder of another plan, discard an unfinished one.
        restart: discard an unfinished run, whatever made it.
        consume_source: delete each weight file of the source when nothing needs it any more; goes with `fsync`.
        hashes: note the sha256 of every file in the manifest.
        progress: told how far the run is.
        devices: in place of those that the plan names.
        pool: processes that encode, in place of threads.

    Raises:
        OutputError: the destination cannot be written or is something else.
        CheckpointError: the source cannot be read or changed during the run.
    """
    began = time.monotonic()
    files = files or Files()
    assert fsync or not consume_source
    writer = Writer(
        plan, destination, files, fsync=fsync, overwrite=overwrite, restart=restart, consumes=consume_source
    )  # fmt: skip
    if writer.is_finished():
        return Outcome(False, 0, 0, time.monotonic() - began)
    try:
        done = writer.open()
        tasks = [task for task in plan.tasks if task.id not in done]
        _check_there(plan, tasks)
        consumption = Consumption(plan, writer.partial, files, tasks) if consume_source else None
        devices = devices or [make_device(name) for name in plan.options.devices]
        run = _Run(plan, writer, files, tasks, devices, pool, progress, consumption)
        run.start()
        consumed = consume_source or bool(plan.source.stand_ins)
        try:
            manifest = build_manifest(plan, writer.origin, command, consumed)  # while the threads work
        finally:
            run.wait()
        _check_unchanged(plan, files, run.present_files())
        writer.write_others()
        hashing = time.monotonic()
        sums = _sums(writer, files, plan.memory.jobs) if hashes else {}
        hash_seconds = time.monotonic() - hashing if hashes else 0.0
        losses = [loss for found in (*done.values(), *run.done) for item in found.losses if (loss := read_loss(item))]
        if consumption:
            consumption.end()
        writer.finish(manifest_bytes(manifest, plan, losses, sums))
    finally:
        writer.close()
    nbytes = sum(task.nbytes for task in tasks)
    resumed = sum(task.nbytes for task in plan.tasks) - nbytes
    return Outcome(True, nbytes, resumed, time.monotonic() - began, hash_seconds)


def _sums(writer: Writer, files: Files, jobs: int) -> dict[str, str]:
    """sha256 of every file of the result, by path."""
    paths = writer.paths()
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(paths, pool.map(lambda path: files.sha256(writer.partial / path), paths), strict=True))


def _check_there(plan: Plan, tasks: Sequence[Task]) -> None:
    """Nothing that is still to be read may have been deleted by an earlier run."""
    gone = {number for number, file in enumerate(plan.source.files) if file.path in plan.source.stand_ins}
    missing = sorted({number for task in tasks for number in source_files(task)} & gone) if gone else []
    if missing:
        raise OutputError(
            f"{plan.source.files[missing[0]].path} of {plan.source.root} was deleted by --consume-source, and the "
            "journal does not say that all that it held was written",
            "The journal is damaged. Restore that file in SRC with the time that it had (the number in "
            f"{CONSUMED}/{plan.source.files[missing[0]].path}{TIME_SUFFIX}), then run the same command.",
        )


def _check_unchanged(plan: Plan, files: Files, numbers: Iterable[int]) -> None:
    """Refuse where some weight files of the source, or any other file, changed since it was planned."""
    source, paths = plan.source, plan.source.weight_paths
    read: list[tuple[Path, WeightFile | FileStat]] = [(paths[number], source.files[number]) for number in numbers]
    read += [(source.root / entry.path, entry) for entry in source.sidecars]
    for path, file in read:
        now = files.stat(path)
        if (now.nbytes, now.mtime_ns) != (file.nbytes, file.mtime_ns):
            raise CheckpointError(
                f"{path} changed while it was read",
                "Nothing was published. Let the source rest, then run again; --restart begins anew.",
            )


class _Queue:
    """Tasks by target file. File systems let one thread at a time write to a file, so each worker gets its own.

    Args:
        tasks: in the order of the plan.
        in_order: keep to that order, for all workers together.
    """

    def __init__(self, tasks: Sequence[Task], in_order: bool) -> None:
        self.lanes: dict[int, deque[Task]] = {}
        for task in tasks:
            self.lanes.setdefault(0 if in_order else task.steps[0].target_file, deque()).append(task)
        self.workers: Counter[int] = Counter()

    def take(self, lane: int | None) -> Task | None:
        """The next task for a worker whose last target file was `lane`; None when there is no more."""
        if lane is not None and lane not in self.lanes:
            lane = None
        if lane is None:
            if not self.lanes:
                return None
            lane = min(self.lanes, key=lambda file: (self.workers[file], file))
            self.workers[lane] += 1
        task = self.lanes[lane].popleft()
        if not self.lanes[lane]:
            del self.lanes[lane]
        return task


class _Run:
    def __init__(
        self, plan: Plan, writer: Writer, files: Files, tasks: Sequence[Task], devices: Sequence[Device],
        pool: Pool | None, progress: Progress | None, consumption: Consumption | None,
    ) -> None:  # fmt: skip
        self.plan = plan
        self.writer = writer
        self.files = files
        self.tasks = tasks
        self.devices = devices
        self.pool = pool
        self.progress = progress
        self.consumption = consumption
        self.lock = threading.Lock()
        self.wake = threading.Condition(self.lock)
        self.queue = _Queue(self.tasks, in_order=consumption is not None)
        self.done_nbytes = 0
        self.begun: dict[str, tuple[float, int]] = {}  # when tasks that are not journalled were begun, and their bytes
        self.pending: list[tuple[Task, Done]] = []
        self.done: list[Done] = []
        self.failure: BaseException | None = None
        self.stopped = False
        self.working = 0
        self.threads: list[threading.Thread] = []

    def present_files(self) -> list[int]:
        """Numbers of the source's weight files that are still there."""
        source = self.plan.source
        there = [number for number, file in enumerate(source.files) if file.path not in source.stand_ins]
        return [number for number in there if not (self.consumption and self.consumption.has_consumed(number))]

    def start(self) -> None:
        """Set the threads to work. `wait` must follow."""
        jobs = min(self.plan.memory.jobs, max(1, len(self.tasks)))
        runners = self._runners(jobs)
        self.working = len(runners)
        for runner in runners:
            self.threads.append(threading.Thread(target=self._guarded, args=(partial(self._take_tasks, runner),)))
        self.threads.append(threading.Thread(target=self._guarded, args=(self._journal_tasks,)))
        for thread in self.threads:
            thread.start()

    def _runners(self, jobs: int) -> Sequence[Runner]:
        checks = self.consumption is not None
        places = Places(self.plan.source.weight_paths, self.writer.targets, self.plan.memory, checks)
        if self.pool and any(isinstance(step, Transcode) for task in self.tasks for step in task.steps):
            return self.pool.runners(jobs, places, self._wrote)
        return [
            ThreadRunner(self.files, places, self.devices[number % len(self.devices)], self._wrote)
            for number in range(jobs)
        ]

    def _wrote(self, nbytes: int) -> None:
        self.done_nbytes += nbytes  # only shown: a lost update does no harm

    def wait(self) -> None:
        """Until all tasks are done; the first failure stops the others and is raised."""
        total = sum(task.nbytes for task in self.tasks)
        try:
            for thread in self.threads:
                while thread.is_alive():
                    thread.join(_POLL_SECONDS)
                    if self.progress:
                        self.progress(self.done_nbytes, total)
        finally:
            self._stop()  # an interrupt: the tasks at hand are finished and journalled, no new one begins
            for thread in self.threads:
                thread.join()
        if self.failure is not None:
            raise self.failure

    def _stop(self) -> None:
        with self.lock:
            self.stopped = True
            self.wake.notify_all()

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # carried to the main thread, which raises it
            with self.lock:
                self.failure = self.failure or error
            self._stop()

    def _take_tasks(self, runner: Runner) -> None:
        lane: int | None = None
        try:
            while (task := self._next_task(lane)) is not None:
                lane = task.steps[0].target_file
                done = runner.run(task)
                with self.lock:
                    self.pending.append((task, done))
                    self.wake.notify_all()
        finally:
            runner.close()
            with self.lock:
                self.working -= 1
                self.wake.notify_all()

    def _next_task(self, lane: int | None) -> Task | None:
        """The next task, once the journal has caught up; None when there is no more."""
        with self.lock:
            while not self.stopped and self._is_behind():
                self.wake.notify_all()
                self.wake.wait(_POLL_SECONDS)
            task = None if self.stopped else self.queue.take(lane)
            if task is not None:
                self.begun[task.id] = time.monotonic(), task.nbytes
            return task

    def _is_behind(self) -> bool:
        """Too much would be lost if the process died now, or is kept that could be deleted."""
        at_risk = sum(nbytes for _, nbytes in self.begun.values())
        if self.consumption and at_risk >= LAG_BYTES:
            return True
        if at_risk < AT_RISK_BYTES:
            return False
        return time.monotonic() - min(began for began, _ in self.begun.values()) > JOURNAL_SECONDS

    def _journal_tasks(self) -> None:
        batch: list[tuple[Task, Done]] = []
        began = time.monotonic()
        if self.consumption:
            self.consumption.begin()
        while True:
            with self.lock:
                self.wake.wait_for(lambda: self.working == 0 or self.pending, timeout=JOURNAL_SECONDS)
                finished, self.pending = self.pending, []
                is_last = self.working == 0
                is_due = is_last or self._is_behind() or time.monotonic() - began >= JOURNAL_SECONDS
            batch += finished
            is_large = self.writer.fsync and sum(task.nbytes for task, _ in batch) >= JOURNAL_BYTES
            if batch and (is_due or is_large):
                self._journal_batch(batch)
                batch, began = [], time.monotonic()
            if is_last:
                return

    def _journal_batch(self, batch: Sequence[tuple[Task, Done]]) -> None:
        tasks = [task for task, _ in batch]
        read = {number for task in tasks for number in source_files(task)}
        _check_unchanged(self.plan, self.files, sorted(read.intersection(self.present_files())))
        self.writer.journal(tasks, [done for _, done in batch])
        if self.consumption:
            self.consumption.note(tasks)
        with self.lock:
            self.done += [done for _, done in batch]
            for task in tasks:
                del self.begun[task.id]
            self.wake.notify_all()
