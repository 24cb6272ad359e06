"""How long moeconv takes against a plain copy of the same folder: whole processes, run in turn, medians of pairs.

    python tests/bench/speed.py FOLDER [PAIRS [LAYERS]]

Before every run its output is removed and the disk synced; the source is in the page cache. Prints one line
for each command: median seconds, median of the pairwise ratios, and their quartiles. `with fsync` is held
against `cp` followed by `sync -f`.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench import sources
from tests.bench.timing import MOECONV, compile_moeconv, in_turn, quartiles, warm


def compare(what: str, ours: list[str], copy: list[str], source: Path, output: Path, pairs: int) -> None:
    """Run the two in turn and print their ratio."""
    warm(source)
    times: dict[str, list[float]] = {"ours": [], "copy": []}
    for name, one in in_turn({"ours": ours, "copy": copy}, output, pairs):
        times[name].append(one.seconds)
    own, other = times.values()
    low, middle, high = quartiles([a / b for a, b in zip(own, other, strict=True)])
    print(
        f"{what:<24} {statistics.median(own):6.2f} s   copy {statistics.median(other):6.2f} s   "
        f"ratio {middle:.2f} ({low:.2f} to {high:.2f}, {pairs} pairs)",
        flush=True,
    )


def quantize(folder: Path, pairs: int) -> None:
    """Quantize against a copy of the source, without fsync."""
    source = folder / "qwen3"
    copy = ["cp", "-r", "--reflink=never", str(source), str(folder / "output")]
    for name in ("fp8", "fp8_dynamic", "fp8_block", "w8a8", "w4a16", "w4a16_asym"):
        ours = [MOECONV, "quantize", str(source), str(folder / "output"), "--format", name, "--no-fsync"]
        compare(f"quantize {name}", ours, copy, source, folder / "output", pairs)


def main() -> None:
    """Pack and unpack, without and with fsync; quantize."""
    folder = Path(sys.argv[1])
    compile_moeconv()
    pairs = int(sys.argv[2]) if len(sys.argv) > 2 else 9
    layers = int(sys.argv[3]) if len(sys.argv) > 3 else 4
    source, packed, output = folder / "qwen3", folder / "qwen3-packed", folder / "output"
    nbytes = sources.write(source, sources.qwen3(layers), sources.QWEN3_30B_A3B)
    print(f"{nbytes / 1e9:.2f} GB of Qwen3-30B-A3B matrix sizes, {os.cpu_count()} cores")
    for what, start in (("pack", source), ("unpack", packed)):
        for mode, options in (("--no-fsync", ["--no-fsync"]), ("with fsync", [])):
            ours = [MOECONV, what, str(start), str(output), *options]
            copy = ["cp", "-r", "--reflink=never", str(start), str(output)]
            if not options:
                copy = ["sh", "-c", f"cp -r '{start}' '{output}' && sync -f '{output}'"]
            if start is packed and not packed.exists():
                subprocess.run([MOECONV, "pack", str(source), str(packed)], check=True, stdout=subprocess.DEVNULL)
            compare(f"{what} {mode}", ours, copy, start, output, pairs)
    quantize(folder, pairs)


if __name__ == "__main__":
    main()
