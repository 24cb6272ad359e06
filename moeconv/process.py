"""The process around a command: streams, signals, and errors that become a message and an exit code."""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NoReturn

from moeconv.errors import MoeconvError, shown

if TYPE_CHECKING:
    from moeconv.pool import Pool

INTERRUPTED = 130

_is_own = False


def run_process(command: Callable[[], None]) -> NoReturn:
    """Run the whole command line, and end the process with its exit code."""
    global _is_own
    _is_own = True
    signal.signal(signal.SIGTERM, _interrupt)
    _complete_streams()
    gc.disable()  # a short life with many small objects and no cycles: collecting only costs
    code = guarded(command)
    sys.stderr.flush()
    os._exit(code)  # everything is closed and flushed: taking the interpreter apart would only cost time


def start_pool(jobs: int | None, device: str, dry_run: bool = False) -> AbstractContextManager[Pool | None]:
    """Processes that encode, where that is done on the CPU; they import torch while the plan is made.

    None in a process that does more than run the command line, and so may have threads already.
    """
    from moeconv.device import find_devices
    from moeconv.plan import default_jobs
    from moeconv.pool import Pool, can_fork

    if dry_run or not _is_own or find_devices(device) != ("cpu",) or not can_fork():
        return nullcontext()
    return Pool(default_jobs(jobs))


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _complete_streams() -> None:
    """Give closed streams a place to write to, and take their numbers: a weight file must not become number 2."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.open(os.devnull, os.O_RDWR), "w"), errors="replace"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that are not UTF-8; in JSON these are escapes


def guarded(command: Callable[[], None]) -> int:
    """Run a command and flush what it printed; expected errors become a message on stderr, and an exit code."""
    try:
        try:
            command()
        finally:
            sys.stdout.flush()
    except MoeconvError as error:
        print(f"moeconv: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # what nobody has worded: a full disk behind stdout, a path that no system call takes
        print(f"moeconv: {shown(str(error))}\n  -> Check that path and its disk, then run again.", file=sys.stderr)
        return 1
    except MemoryError:
        print(
            "moeconv: the process ran out of memory\n  -> Free memory or raise its limit, then run again.",
            file=sys.stderr,
        )
        return 1
    except SystemExit as error:  # how typer ends: usage errors, --help, and an interrupt
        if error.code == INTERRUPTED:
            print("moeconv: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return error.code if isinstance(error.code, int) else 1
    return 0
