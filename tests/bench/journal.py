"""What the journal costs: pack with it and without, both waiting for the disk, whole processes in turn.

    python tests/bench/journal.py FOLDER [PAIRS [LAYERS]]

Without, the same program notes nothing while it works, and syncs everything once at the end. Fails where the journal
costs more than a twentieth.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench import sources
from tests.bench.timing import MOECONV, compile_moeconv, in_turn, quartiles, warm

LIMIT = 1.05
_WITHOUT = """
import sys
from moeconv import writer
writer.Writer.journal = lambda self, tasks, done: None
from moeconv.cli import main
main()
"""


def main() -> None:
    """Prints medians of both, and of the ratios of pairs."""
    folder = Path(sys.argv[1])
    pairs = int(sys.argv[2]) if len(sys.argv) > 2 else 9
    layers = int(sys.argv[3]) if len(sys.argv) > 3 else 4
    compile_moeconv()
    source, output = folder / "qwen3", folder / "output"
    nbytes = sources.write(source, sources.qwen3(layers), sources.QWEN3_30B_A3B)
    warm(source)
    arguments = ["pack", str(source), str(output)]
    commands = {"with": [MOECONV, *arguments], "without": [sys.executable, "-c", _WITHOUT, *arguments]}
    times: dict[str, list[float]] = {"with": [], "without": []}
    for name, run in in_turn(commands, output, pairs):
        times[name].append(run.seconds)
    low, middle, high = quartiles([a / b for a, b in zip(times["with"], times["without"], strict=True)])
    own, other = (statistics.median(times[name]) for name in ("with", "without"))
    print(
        f"pack of {nbytes / 1e9:.2f} GB with a journal {own:.2f} s, without {other:.2f} s, "
        f"ratio {middle:.3f} ({low:.3f} to {high:.3f}, {pairs} pairs)"
    )
    if middle > LIMIT:
        raise SystemExit(f"the journal costs more than {LIMIT - 1:.0%}")


if __name__ == "__main__":
    main()
