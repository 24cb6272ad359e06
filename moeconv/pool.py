"""Who runs the tasks: threads of this process, or processes of their own.

Encoding is many short calls to torch, and between two of them a thread needs Python's lock: on two cores, two threads
encoded 1.4 times as fast as one, two processes 1.96 times. So commands that encode on a CPU start processes. The first
one is forked before the plan is made, imports torch meanwhile (1 to 2 s, as much as copying gigabytes), and forks the
others, which share what it holds. They know nothing of the plan: what to do comes task by task.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn

from moeconv.device import CpuDevice, Device
from moeconv.errors import OutputError, RunError
from moeconv.files import Files, Rows, WriteFile
from moeconv.journal import Done
from moeconv.plan import Memory
from moeconv.tasks import Task
from moeconv.transcoder import Sink
from moeconv.worker import Worker

if TYPE_CHECKING:
    from typing_extensions import Self

#: Each takes four file descriptors, of which systems often give a process 1024, and some tens of megabytes.
MAX_PROCESSES = 64
#: A worker process says how far it is whenever it has written this many bytes.
_REPORT_BYTES = 32 << 20
_CHECK_BYTES = 256 << 10
_PR_SET_PDEATHSIG = 1

#: Called with the bytes that were written since the last call.
Wrote = Callable[[int], None]


class Places(NamedTuple):
    """What a worker must know of a run.

    Attributes:
        sources: source files by number.
        targets: target files by number.
        memory: what it may take.
        checks: read what was written once more, from the disk, and compare it with what the source makes.
    """

    sources: tuple[Path, ...]
    targets: tuple[Path, ...]
    memory: Memory
    checks: bool = False


class Runner(ABC):
    """Runs tasks one after another. For one thread at a time."""

    @abstractmethod
    def run(self, task: Task) -> Done:
        """Run a task to its end."""

    @abstractmethod
    def close(self) -> None:
        """Give back files and buffers."""


class ThreadRunner(Runner):
    """Runs tasks on the calling thread.

    Args:
        files: door to the file system.
        places: files and memory.
        device: where matrices are encoded.
        wrote: told what was written.
    """

    def __init__(self, files: Files, places: Places, device: Device, wrote: Wrote) -> None:
        self._files = files
        self._targets = places.targets
        self._checks = places.checks
        self._worker = Worker(files, places.sources, places.memory, device)
        self._wrote = wrote

    def run(self, task: Task) -> Done:
        path = self._targets[task.steps[0].target_file]
        target = self._files.open_write(path)
        try:
            self._pass(task, self._sink(target))
            losses = tuple(self._worker.take_losses())
            if self._checks:
                target.sync()
                self._check(task, path)
        finally:
            target.close()
        return Done(task.id, tuple(list(loss) for loss in losses), self._checks)

    def _pass(self, task: Task, sink: Sink) -> None:
        for step in task.steps:
            self._worker.run(step, sink)
        self._worker.finish(sink)

    def _check(self, task: Task, path: Path) -> None:
        """Make all bytes of a task once more, and hold them against what the disk has."""
        written = self._files.open_read(path)
        buffer = memoryview(bytearray(_CHECK_BYTES))

        def compare(_: int, offset: int, content: memoryview, rows: Rows | None) -> None:
            rows = rows or Rows(1, len(content), len(content), len(content))
            for number in range(rows.count):
                begin = number * rows.pitch
                for at in range(0, rows.nbytes, _CHECK_BYTES):
                    found = buffer[: min(_CHECK_BYTES, rows.nbytes - at)]
                    written.read_into(found, offset + number * rows.stride + at)
                    if bytes(found) != bytes(content[begin + at : begin + at + len(found)]):
                        raise OutputError(
                            f"{path} does not hold what was written to it, near byte {offset + at:,}",
                            "The disk or its memory is failing: no source file of these bytes was deleted.",
                        )

        try:
            written.forget()
            self._pass(task, compare)
            self._worker.take_losses()
        finally:
            written.close()

    def _sink(self, target: WriteFile) -> Sink:
        def write(_: int, offset: int, content: memoryview, rows: Rows | None) -> None:
            if rows is None:
                target.write_at(content, offset)
            else:
                target.write_rows(content, offset, rows)
            self._wrote(len(content))

        return write

    def close(self) -> None:
        self._worker.close()


class ProcessRunner(Runner):
    """Has tasks run by a process of the pool, and waits for it.

    Args:
        channel: the parent's end of the channel to it.
        places: files and memory.
        wrote: told what was written.
    """

    def __init__(self, channel: _Channel, places: Places, wrote: Wrote) -> None:
        self._channel = channel
        self._wrote = wrote
        with _noticing_death():
            self._channel.send(places)

    def run(self, task: Task) -> Done:
        with _noticing_death():
            self._channel.send(task)
        while True:
            with _noticing_death():
                reply = self._channel.receive()
            if isinstance(reply, Done):
                return reply
            if isinstance(reply, _Failure):
                raise reply.error from RuntimeError(reply.trace)
            self._wrote(reply)

    def close(self) -> None:
        """Nothing: a process ends with the pool. The first one takes those that it forked with it."""


@contextmanager
def _noticing_death() -> Iterator[None]:
    """While talking to a process that may be gone."""
    try:
        yield
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        raise RunError(
            "a worker process was killed: most likely the system ran out of memory",
            "Run the same command again, with a lower --jobs or --max-memory; it goes on where it stopped.",
        ) from None


class _Failure(NamedTuple):
    """What a worker process could not do; `trace` says where, which an exception does not carry to another process."""

    error: Exception
    trace: str


class _Channel:
    """Two pipes, seen from one of their ends: pickled objects go out and come in."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading: BinaryIO = os.fdopen(reading, "rb")
        self._writing: BinaryIO = os.fdopen(writing, "wb")

    def send(self, item: Any) -> None:
        pickle.dump(item, self._writing, pickle.HIGHEST_PROTOCOL)
        self._writing.flush()

    def receive(self) -> Any:
        return pickle.load(self._reading)

    def close(self) -> None:
        self._reading.close()
        with suppress(BrokenPipeError):  # what was not flushed has no reader any more
            self._writing.close()


class Pool:
    """Processes that encode on the CPU. To be made while this process has one thread; a context manager.

    Args:
        count: how many; no more than `MAX_PROCESSES` are made.
    """

    def __init__(self, count: int) -> None:
        count = min(count, MAX_PROCESSES)
        ends = [(*os.pipe(), *os.pipe()) for _ in range(count)]  # read and write end of tasks, and of replies
        parent = os.getpid()
        self._process = os.fork()
        if self._process == 0:
            _be_first_worker(ends, parent)
        self._channels = []
        for tasks_read, tasks_write, replies_read, replies_write in ends:
            os.close(tasks_read)
            os.close(replies_write)
            self._channels.append(_Channel(replies_read, tasks_write))

    def runners(self, count: int, places: Places, wrote: Wrote) -> Sequence[Runner]:
        """As many runners, or one for each process where there are fewer, for one run after another."""
        return [ProcessRunner(channel, places, wrote) for channel in self._channels[:count]]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.kill(self._process, signal.SIGKILL)  # it rests, or still imports; its children go with it
        os.waitpid(self._process, 0)
        for channel in self._channels:
            channel.close()


def can_fork() -> bool:
    """Whether processes can be forked here that never outlive this one: Linux, before torch has started threads."""
    return sys.platform == "linux" and "torch" not in sys.modules


def _be_first_worker(ends: Sequence[tuple[int, int, int, int]], parent: int) -> NoReturn:
    """In the forked process: import what encoding needs, fork the other workers, and work."""
    try:
        _die_with(parent)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for _, tasks_write, replies_read, _ in ends:  # else nobody would see the other side's end
            os.close(tasks_write)
            os.close(replies_read)
        failure = _import_torch()
        first = os.getpid()
        own = 0
        for number in range(1, len(ends)):
            if os.fork() == 0:
                _die_with(first)
                own = number
                break
        for number, (tasks_read, _, _, replies_write) in enumerate(ends):
            if number != own:
                os.close(tasks_read)
                os.close(replies_write)
        _serve(_Channel(ends[own][0], ends[own][3]), failure)
    finally:
        os._exit(0)  # nothing of the parent's is flushed or cleaned up twice


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, in whatever way."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os._exit(0)


def _import_torch() -> _Failure | None:
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # plug-ins for other devices: a CPU is what we want
    try:
        import torch  # noqa: F401
    except Exception as error:
        remedy = "Install torch anew (pip install --force-reinstall torch), then run again."
        return _failure(RunError(f"torch cannot be imported: {error}", remedy))
    return None


def _serve(channel: _Channel, failure: _Failure | None) -> None:
    """Run tasks as they come, until the parent closes the channel."""
    unreported = 0

    def wrote(nbytes: int) -> None:
        nonlocal unreported
        unreported += nbytes
        if unreported >= _REPORT_BYTES:
            channel.send(unreported)
            unreported = 0

    try:
        runner: ThreadRunner | None = None
        while True:
            task = channel.receive()
            if isinstance(task, Places):  # of a run that begins
                if runner is not None:
                    runner.close()
                runner = ThreadRunner(Files(), task, CpuDevice(), wrote)
                continue
            assert runner is not None
            reply: Done | _Failure
            try:
                reply = failure or runner.run(task)
            except Exception as error:
                reply = _failure(error)
            channel.send(unreported)
            unreported = 0
            channel.send(reply)
    except (EOFError, BrokenPipeError):
        return


def _failure(error: Exception) -> _Failure:
    """An error in a form that can be sent."""
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(str(error))
    return _Failure(error, trace)
