"""Whole processes, run in turn: their time and the most memory they held."""

from __future__ import annotations

import compileall
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

MOECONV = str(Path(sys.executable).with_name("moeconv"))


class Run(NamedTuple):
    """Wall time of a process, and its peak RSS, interpreter and libraries included."""

    seconds: float
    peak_bytes: int


def run(command: Sequence[str]) -> Run:
    """Run a command that must succeed."""
    with tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{errors.read().decode(errors='replace')}")
    return Run(seconds, usage.ru_maxrss * 1024)


def in_turn(commands: Mapping[str, Sequence[str]], output: Path, rounds: int) -> Iterator[tuple[str, Run]]:
    """Run commands that write `output`, each from a clean and quiet disk, every other round in reverse.

    Yields:
        The command's name and its run, while its output is there.
    """
    for number in range(rounds):
        for name in commands if number % 2 else reversed(commands):
            shutil.rmtree(output, ignore_errors=True)
            os.sync()
            yield name, run(commands[name])
    shutil.rmtree(output)


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile; one value is all three."""
    return statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3


def warm(folder: Path) -> None:
    """Bring a folder into the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            while file.read(16 << 20):
                pass


def compile_moeconv() -> None:
    """As in an installed package."""
    compileall.compile_dir(Path(__file__).parents[2] / "moeconv", quiet=1)
