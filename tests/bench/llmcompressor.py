"""How long quantizing takes against llm-compressor's `model_free_ptq`: whole processes, run in turn on the same CPU.

    python tests/bench/llmcompressor.py FOLDER PYTHON_WITH_LLMCOMPRESSOR [PAIRS [LAYERS [FORMAT,FORMAT]]]

llm-compressor runs with one worker and with two, and the better median counts. Neither waits for the disk, both
use all cores, and both must write the same tensors. Prints one line for each format: median seconds and
largest peak RSS of both, the ratio of the medians, and the quartiles of the pairwise ratios.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench import sources
from tests.bench.timing import MOECONV, Run, compile_moeconv, in_turn, quartiles, warm

PRESETS = {
    "fp8_dynamic": "FP8_DYNAMIC", "fp8_block": "FP8_BLOCK", "w8a8": "W8A8", "w4a16": "W4A16", "nvfp4a16": "NVFP4A16",
    "mxfp4a16": "MXFP4A16",
}  # fmt: skip
PTQ = r"""
import sys
from llmcompressor.entrypoints.model_free import model_free_ptq
source, output, preset, workers = sys.argv[1:]
ignore = ["lm_head", "model.embed_tokens", r"re:.*mlp\.gate$"]
model_free_ptq(source, output, scheme=preset, ignore=ignore, max_workers=int(workers), device="cpu")
"""


def stored(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every tensor of a folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        found |= {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
    return found


def median(runs: list[Run]) -> float:
    return statistics.median(one.seconds for one in runs)


def compare(name: str, source: Path, output: Path, python: str, pairs: int) -> None:
    """Quantize with both and print how they did."""
    commands = {"moeconv": [MOECONV, "quantize", str(source), str(output), "--format", name, "--no-fsync"]}
    for workers in ("1", "2"):
        commands[workers] = [python, "-c", PTQ, str(source), str(output), PRESETS[name], workers]
    runs: dict[str, list[Run]] = {command: [] for command in commands}
    written = {}
    warm(source)
    for command, one in in_turn(commands, output, pairs):
        runs[command].append(one)
        written[command] = stored(output)
    if not written["moeconv"] == written["1"] == written["2"]:
        raise SystemExit(f"{name}: the two do not write the same tensors")
    own = runs.pop("moeconv")
    workers, other = min(runs.items(), key=lambda item: median(item[1]))
    low, _, high = quartiles([a.seconds / b.seconds for a, b in zip(own, other, strict=True)])
    own_peak, other_peak = (max(one.peak_bytes for one in both) / 1e6 for both in (own, other))
    print(
        f"{name:<12} {median(own):6.2f} s {own_peak:6,.0f} MB   "
        f"llm-compressor {median(other):6.2f} s {other_peak:6,.0f} MB (workers: {workers})   "
        f"ratio {median(own) / median(other):.2f} ({low:.2f} to {high:.2f}, {pairs} pairs)",
        flush=True,
    )


def main() -> None:
    """Formats that both write, on 2.7 GB unless LAYERS says otherwise."""
    folder, python = Path(sys.argv[1]), sys.argv[2]
    pairs = int(sys.argv[3]) if len(sys.argv) > 3 else 9
    layers = int(sys.argv[4]) if len(sys.argv) > 4 else 2
    compile_moeconv()
    source = folder / f"qwen3-{layers}-layers"
    nbytes = sources.write(source, sources.qwen3(layers), sources.QWEN3_30B_A3B)
    print(f"{nbytes / 1e9:.2f} GB of Qwen3-30B-A3B matrix sizes, {os.cpu_count()} cores")
    for name in sys.argv[5].split(",") if len(sys.argv) > 5 else PRESETS:
        compare(name, source, folder / "output", python, pairs)


if __name__ == "__main__":
    main()
