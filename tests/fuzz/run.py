"""Runs fuzz targets with atheris: `python tests/fuzz/run.py SECONDS [TARGET...]`.

Each target begins with its seeds, in build/fuzz/TARGET, where what it learned stays for the next time, and what it
found as well. The last line of a target tells executions and findings.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

TARGETS = ("header", "index", "recipe", "config", "state", "manifest")
ROOT = Path(__file__).parent.parent.parent
#: Bounds for one input, and for the process.
INPUT_SECONDS = 10
RSS_MB = 2048


def fuzz(name: str, arguments: list[str]) -> None:
    """Runs in a process of its own; libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["moeconv", "json", "yaml"]):
        target = importlib.import_module(f"tests.fuzz.fuzz_{name}")
    corpus = Path(arguments[-1])
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup([name, f"-max_len={target.MAX_LEN}", *arguments], target.one_input)
    atheris.Fuzz()


def watched(name: str, seconds: int) -> bool:
    """Run a target for so long; whether nothing was found."""
    folder = ROOT / "build" / "fuzz" / name
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    command = [
        sys.executable, "-m", "tests.fuzz.run", "--one", name, f"-max_total_time={seconds}",
        f"-timeout={INPUT_SECONDS}", f"-rss_limit_mb={RSS_MB}",
        f"-artifact_prefix={folder}/", "-print_final_stats=1", str(corpus),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    peak = re.search(r"stat::peak_rss_mb:\s*(\d+)", done.stderr)
    found = sorted(set(folder.iterdir()) - before)
    if done.returncode or found:
        print(done.stderr[-5000:])
    print(
        f"{name}: {int(executed[1]) if executed else 0:,} executions in {seconds} s, "
        f"{peak[1] if peak else '?'} MB, findings: {', '.join(map(str, found)) or done.returncode or 'none'}",
        flush=True,
    )
    return not found and done.returncode == 0


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        fuzz(sys.argv[2], sys.argv[3:])
    else:
        results = [watched(name, int(sys.argv[1])) for name in sys.argv[2:] or TARGETS]
        sys.exit(not all(results))
