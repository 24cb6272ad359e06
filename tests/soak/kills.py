"""Kills running commands at random moments, again and again, and holds what comes out against undisturbed runs.

    python tests/soak/kills.py FOLDER [ROUNDS [LAYERS [SEED [COMMAND]]]]

A round is one command that is killed (SIGKILL) until a run gets to its end. Before each kill the processes are stopped
and what they have written is read from /proc, so that it is known what the next run has to repeat: at most 256 MB, or
5 s of work. Prints a line for each round, and sums.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench import sources
from tests.bench.timing import MOECONV
from tests.processes import children

MOST_BYTES, MOST_SECONDS = 256_000_000, 5.0
COMMANDS: dict[str, Sequence[str]] = {
    "pack": ("pack",),
    "pack, no fsync": ("pack", "--no-fsync"),
    "unpack": ("unpack",),
    "quantize fp8": ("quantize", "--format", "fp8"),
    "quantize w4a16": ("quantize", "--format", "w4a16"),
    "quantize nvfp4a16": ("quantize", "--format", "nvfp4a16"),
    "quantize nf4, double": ("quantize", "--format", "nf4", "--double-quant"),
    "pack, source consumed": ("pack", "--consume-source", "--yes"),
}


class Killed(NamedTuple):
    """A run that was killed: seconds it ran, bytes it wrote to weight files, and bytes journalled in the end."""

    seconds: float
    written: int
    journalled: int


def sums(folder: Path) -> dict[str, str]:
    """sha256 of every file; of moeconv.json without its command, which names the folders."""
    found = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes() if path.name == "moeconv.json" else b""
        if content:
            manifest = {**json.loads(content), "command": None, "consumed_source": None}
            manifest["source"] = {**manifest["source"], "path": None}
            found[path.name] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
            continue
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def task_sizes(command: Sequence[str], source: Path, target: Path) -> dict[str, int]:
    """Bytes of each task of a command's plan, by the ids that the journal has."""
    code = (
        "import json, sys; from moeconv import executor, commands\n"
        "def show(plan, *_, **__): json.dump({t.id: t.nbytes for t in plan.tasks}, sys.stdout); sys.exit(0)\n"
        "commands.run = show\n"
        "sys.argv[1:1] = []\n"
        "from moeconv.cli import app; app()"
    )
    arguments = [command[0], str(source), str(target), *command[1:]]
    return json.loads(subprocess.check_output([sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL))


def written_by(process: int) -> int:
    """Bytes that a process and those below it gave to write calls."""
    total = 0
    for number in (process, *children(process)):
        try:
            lines = Path(f"/proc/{number}/io").read_text().splitlines()
        except OSError:
            continue
        total += next(int(line.split()[1]) for line in lines if line.startswith("wchar:"))
    return total


def journalled(target: Path, sizes: dict[str, int]) -> int:
    """Bytes of all tasks that the journal of an unfinished run names."""
    path = target.with_name(target.name + ".partial") / ".moeconv-journal"
    total = 0
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            total += sum(sizes[id_] for id_ in json.loads(line).get("done", []))
        except ValueError:
            break
    return total


def run_and_kill(arguments: Sequence[str], after: float, target: Path, sizes: dict[str, int]) -> Killed | None:
    """Run a command and kill it; None where it came to its end before."""
    began = time.monotonic()
    running = subprocess.Popen([MOECONV, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        running.wait(after)
    except subprocess.TimeoutExpired:
        below = (running.pid, *children(running.pid))
        for number in below:
            try:
                os.kill(number, signal.SIGSTOP)
            except ProcessLookupError:
                continue
        written = written_by(running.pid)
        running.kill()
        running.wait()
        return Killed(time.monotonic() - began, written, journalled(target, sizes))
    if running.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed with {running.returncode}")
    return None


def survive(what: str, source: Path, wanted: dict[str, str], target: Path, longest: float, dice: random.Random) -> int:
    """One round; how many kills it survived."""
    command = COMMANDS[what]
    own = source
    if "--consume-source" in command:  # which deletes it
        own = target.with_name("consumed")
        shutil.rmtree(own, ignore_errors=True)
        shutil.copytree(source, own)
    arguments = [command[0], str(own), str(target), *command[1:]]
    sizes = task_sizes(command, own, target)
    kills, most, longest_work, before = 0, 0, 0.0, 0
    while (killed := run_and_kill(arguments, dice.uniform(longest / 20, longest), target, sizes)) is not None:
        kills += 1
        # All writes count, also those of headers and of the journal; what consumed sources leave comes on top.
        repeated = max(0, before + killed.written - killed.journalled)
        seconds = killed.seconds * min(1.0, repeated / max(1, killed.written))
        if repeated > MOST_BYTES and seconds > MOST_SECONDS:
            raise SystemExit(f"{what}: {repeated:,} bytes have to be repeated after {killed}")
        if repeated > MOST_BYTES:
            longest_work = max(longest_work, seconds)
        else:
            most = max(most, repeated)
        before = killed.journalled
        if target.exists():
            raise SystemExit(f"{what}: {target} was there before it was complete") if sums(target) != wanted else None
    if sums(target) != wanted:
        raise SystemExit(f"{what}: {target} is not what an undisturbed run makes")
    left = [path.name for path in target.parent.iterdir() if path.name.startswith(target.name + ".")]
    if left:
        raise SystemExit(f"{what}: {left} is left over")
    shutil.rmtree(target)
    if own != source:
        shutil.rmtree(own)
    more = f", or {longest_work:.1f} s" if longest_work else ""
    print(f"{what:<24} {kills:3} kills, at most {most / 1e6:.0f} MB to repeat{more}", flush=True)
    return kills


def main() -> None:
    """Undisturbed runs first, then rounds over all commands."""
    folder = Path(sys.argv[1])
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    layers = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    seed = int(sys.argv[4]) if len(sys.argv) > 4 else random.randrange(1 << 30)
    dice = random.Random(seed)
    source, packed, target = folder / "soak", folder / "soak-packed", folder / "soak-target"
    nbytes = sources.write(source, sources.qwen3(layers), sources.QWEN3_30B_A3B)
    if not packed.exists():
        subprocess.run([MOECONV, "pack", str(source), str(packed)], check=True, stdout=subprocess.DEVNULL)
    kills = 0
    chosen = sys.argv[5:] or list(COMMANDS)
    for what in chosen:
        command = COMMANDS[what]
        own = packed if command[0] == "unpack" else source
        shutil.rmtree(target, ignore_errors=True)
        began = time.monotonic()
        plain = [word for word in command[1:] if word not in ("--consume-source", "--yes")]
        subprocess.run([MOECONV, command[0], str(own), str(target), *plain], check=True, stdout=subprocess.DEVNULL)
        longest = max(0.5, 0.9 * (time.monotonic() - began))
        wanted = sums(target)
        shutil.rmtree(target)
        kills += sum(survive(what, own, wanted, target, longest, dice) for _ in range(rounds))
    print(f"{kills} kills of {len(chosen) * rounds} runs over {nbytes / 1e9:.2f} GB survived (seed {seed})")


if __name__ == "__main__":
    main()
