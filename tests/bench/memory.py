"""Peak memory of whole processes, for models of different sizes: it must not grow with model, shard or tensor.

    python tests/bench/memory.py FOLDER

Prints the peak of pack, unpack, quantize and dequantize, interpreter and libraries included, and what the plan said;
fails where a run needs more than its plan, or more than its limit: 150 MB plus 4 KB for each tensor name where bytes
only move, 700 MB where torch encodes. A process without children has its peak RSS; where there are several, the
sum of their proportional set sizes is sampled, which counts once what they share.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench import sources
from tests.bench.timing import MOECONV
from tests.processes import children

SAMPLE_SECONDS = 0.03
LIMIT_BYTES, LIMIT_NAME_BYTES, LIMIT_ENCODING_BYTES = 150_000_000, 4_000, 700_000_000


def peak_of(command: list[str]) -> int:
    """Bytes that a command which must succeed holds at most, with its children."""
    most = 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        below = children(process.pid)
        if below:
            most = max(most, sum(proportional_bytes(number) for number in (process.pid, *below)))
        time.sleep(SAMPLE_SECONDS)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return most or usage.ru_maxrss * 1024


def proportional_bytes(process: int) -> int:
    """PSS of a process; 0 where it has just ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def measure(what: str, command: str, source: Path, output: Path, *options: str) -> None:
    """Run a command, print its peak, and fail where it is too much."""
    shutil.rmtree(output, ignore_errors=True)
    planned = json.loads(subprocess.check_output([MOECONV, "plan", command, str(source), "--json", *options]))
    names = sum(file["tensors"] for file in planned["files"])
    names = max(names, sum(group["tensors_in"] for group in planned["groups"]))
    peak = peak_of([MOECONV, command, str(source), str(output), "--no-fsync", *options])
    print(
        f"{what:<34} {planned['bytes_in'] / 1e9:5.2f} GB {names:6,} names   "
        f"peak {peak / 1e6:6.1f} MB   planned {planned['peak_memory_bytes'] / 1e6:6.1f} MB",
        flush=True,
    )
    limit = LIMIT_ENCODING_BYTES if command.endswith("quantize") else LIMIT_BYTES + LIMIT_NAME_BYTES * names
    if peak > min(limit, planned["peak_memory_bytes"]):
        raise SystemExit("more than allowed")


def main() -> None:
    """Two sizes of one model, one shard or many, and tensors of 1.3 GB that are transposed."""
    folder = Path(sys.argv[1])
    output = folder / "output"
    for layers in (1, 4):
        source, packed = folder / f"qwen3-{layers}", folder / f"qwen3-{layers}-packed"
        sources.write(source, sources.qwen3(layers), sources.QWEN3_30B_A3B)
        subprocess.run([MOECONV, "pack", str(source), str(packed)], check=True, stdout=subprocess.DEVNULL)
        measure(f"pack, {layers} layers", "pack", source, output)
        measure(f"pack, {layers} layers, small shards", "pack", source, output, "--max-shard-size", "300MB")
        measure(f"unpack, {layers} layers", "unpack", packed, output)
        for name in ("fp8", "w8a8", "w4a16", "w4a16_asym", "nvfp4a16"):
            measure(f"quantize {name}, {layers} layers", "quantize", source, output, "--format", name)
        quantized = output.rename(folder / "quantized")
        measure(f"dequantize, {layers} layers", "dequantize", quantized, output)
        shutil.rmtree(quantized)
        shutil.rmtree(source)
        shutil.rmtree(packed)
    for experts in (1, 4):
        source, unpacked = folder / f"llama4-{experts}", folder / f"llama4-{experts}-unpacked"
        config = json.loads(json.dumps(sources.LLAMA4_SCOUT))
        config["text_config"]["num_local_experts"] = experts
        sources.write(source, sources.llama4(1, experts), config)
        measure(f"unpack, transposed, {experts} experts", "unpack", source, output)
        subprocess.run([MOECONV, "unpack", str(source), str(unpacked)], check=True, stdout=subprocess.DEVNULL)
        measure(f"pack, transposed, {experts} experts", "pack", unpacked, output)
        measure(f"pack, {experts} experts, 110 MB", "pack", unpacked, output, "--max-memory", "110MB")
        shutil.rmtree(source)
        shutil.rmtree(unpacked)
    shutil.rmtree(output)


if __name__ == "__main__":
    main()
