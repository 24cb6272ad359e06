"""Runs a plan: a thread for each runner of tasks, one that makes their results durable, and nothing decided here."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from moeconv.checkpoint import WeightFile
from moeconv.device import Device, make_device
from moeconv.errors import CheckpointError
from moeconv.files import Files, FileStat
from moeconv.manifest import build_manifest
from moeconv.plan import Plan
from moeconv.pool import Places, Pool, Runner, ThreadRunner
from moeconv.steps import Task, Transcode
from moeconv.writer import Writer

#: A run that dies repeats at most what was not journalled: this many bytes or seconds of work, plus the tasks at hand.
#: Without fsync only the seconds count: a journal whose content is on its way to the disk, behind gigabytes of data,
#: cannot be removed before it is there, which held up runs of 2 s by another 0.3 to 0.9 s.
JOURNAL_BYTES = 128 << 20
JOURNAL_SECONDS = 3.0
_POLL_SECONDS = 0.2

#: Called now and then from the main thread with bytes done and bytes in all.
Progress = Callable[[int, int], None]


class Outcome(NamedTuple):
    """What a run did: `is_new` is False where the destination was finished before."""

    is_new: bool
    nbytes: int
    resumed_nbytes: int
    seconds: float


def execute(
    plan: Plan,
    destination: Path,
    command: Sequence[str],
    *,
    files: Files | None = None,
    fsync: bool = True,
    overwrite: bool = False,
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
        progress: told how far the run is.
        devices: in place of those that the plan names.
        pool: processes that encode, in place of threads.

    Raises:
        OutputError: the destination cannot be written or is something else.
        CheckpointError: the source cannot be read or changed during the run.
    """
    began = time.monotonic()
    files = files or Files()
    writer = Writer(plan, destination, files, fsync=fsync, overwrite=overwrite)
    if writer.is_finished():
        return Outcome(False, 0, 0, time.monotonic() - began)
    try:
        done = writer.open()
        tasks = [task for task in plan.tasks if task.id not in done]
        devices = devices or [make_device(name) for name in plan.options.devices]
        run = _Run(plan, writer, files, tasks, devices, pool, progress)
        run.start()
        try:
            manifest = build_manifest(plan, command)  # while the threads work
        finally:
            run.wait()
        _check_unchanged(plan, files)
        writer.finish(manifest)
    finally:
        writer.close()
    nbytes = sum(task.nbytes for task in tasks)
    resumed = sum(task.nbytes for task in plan.tasks) - nbytes
    return Outcome(True, nbytes, resumed, time.monotonic() - began)


def _check_unchanged(plan: Plan, files: Files) -> None:
    read: tuple[WeightFile | FileStat, ...] = (*plan.source.files, *plan.source.sidecars)
    for file in read:
        now = files.stat(plan.source.root / file.path)
        if (now.nbytes, now.mtime_ns) != (file.nbytes, file.mtime_ns):
            raise CheckpointError(
                f"{plan.source.root / file.path} changed while it was read",
                "Nothing was published. Let the source rest, then run again with --overwrite.",
            )


class _Queue:
    """Tasks by target file. File systems let one thread at a time write to a file, so each worker gets its own."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.lanes: dict[int, deque[Task]] = {}
        for task in tasks:
            self.lanes.setdefault(task.steps[0].target_file, deque()).append(task)
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
        pool: Pool | None, progress: Progress | None,
    ) -> None:  # fmt: skip
        self.plan = plan
        self.writer = writer
        self.files = files
        self.tasks = tasks
        self.devices = devices
        self.pool = pool
        self.progress = progress
        self.lock = threading.Lock()
        self.wake = threading.Condition(self.lock)
        self.queue = _Queue(self.tasks)
        self.done_nbytes = 0
        self.pending: list[Task] = []
        self.failure: BaseException | None = None
        self.stopped = False
        self.working = 0
        self.threads: list[threading.Thread] = []

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
        sources = tuple(self.plan.source.root / file.path for file in self.plan.source.files)
        places = Places(sources, self.writer.targets, self.plan.memory)
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
            while True:
                with self.lock:
                    task = None if self.stopped else self.queue.take(lane)
                if task is None:
                    return
                lane = task.steps[0].target_file
                runner.run(task)
                with self.lock:
                    self.pending.append(task)
                    self.wake.notify_all()
        finally:
            runner.close()
            with self.lock:
                self.working -= 1
                self.wake.notify_all()

    def _journal_tasks(self) -> None:
        batch: list[Task] = []
        began = time.monotonic()
        while True:
            with self.lock:
                self.wake.wait_for(lambda: self.working == 0 or self.pending, timeout=JOURNAL_SECONDS)
                finished, self.pending = self.pending, []
                is_last = self.working == 0
            batch += finished
            is_large = self.writer.fsync and sum(task.nbytes for task in batch) >= JOURNAL_BYTES
            if batch and (is_last or is_large or time.monotonic() - began >= JOURNAL_SECONDS):
                self.writer.journal(batch)
                batch, began = [], time.monotonic()
            if is_last:
                return
