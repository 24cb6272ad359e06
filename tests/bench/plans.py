"""Time and memory of plans for the largest models, from files that are holes behind headers.

    python tests/bench/plans.py FOLDER

Prints seconds and peak RSS of `moeconv plan` for each model and command; fails where a plan needs more than 500 MB.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.timing import MOECONV
from tests.flagships import FLAGSHIPS, write

COMMANDS = (("pack",), ("unpack",), ("quantize", "--format", "fp8_dynamic"), ("dequantize",))
LIMIT_BYTES = 500_000_000
#: Plans that are refused because there is nothing to do.
FULL_PRECISION = {"qwen3-235b", "glm-5", "llama4-maverick", "qwen3.5-397b"}


def measure(source: Path, command: tuple[str, ...]) -> tuple[float, int]:
    """Seconds and bytes that a plan takes."""
    begin = time.monotonic()
    process = subprocess.Popen(
        [MOECONV, "plan", command[0], str(source), *command[1:]], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if status and not (command[0] == "dequantize" and source.name in FULL_PRECISION):
        raise SystemExit(f"{source.name} {command[0]} failed: {said.decode()}")
    return seconds, usage.ru_maxrss * 1024


def main(folder: Path) -> None:
    print(f"{'':18}" + "".join(f"{command[0]:>18}" for command in COMMANDS))
    most = 0
    for name in FLAGSHIPS:
        source = write(folder, name)
        cells = [measure(source, command) for command in COMMANDS]
        most = max(most, *(nbytes for _, nbytes in cells))
        print(f"{name:18}" + "".join(f"{seconds:9.1f} s {nbytes / 1e6:4.0f} MB" for seconds, nbytes in cells))
        shutil.rmtree(source)
    if most > LIMIT_BYTES:
        raise SystemExit(f"a plan took {most:,} bytes; {LIMIT_BYTES:,} are allowed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
