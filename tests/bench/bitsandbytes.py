"""How long NF4 takes against `bitsandbytes.functional.quantize_4bit` on the CPU: whole processes, run in turn.

    python tests/bench/bitsandbytes.py FOLDER [PAIRS [LAYERS]]

The other process does what a script for it does: fuses the experts of a layer, quantizes each parameter, and saves each
layer's tensors. Both use all cores, neither waits for the disk, and codes, scales and states must be the same bytes.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench import sources
from tests.bench.timing import MOECONV, Run, compile_moeconv, in_turn, quartiles, warm

SCRIPT = r"""
import json, sys
from pathlib import Path
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors import safe_open
from safetensors.torch import save_file

source, output = map(Path, sys.argv[1:])
output.mkdir()
files = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
opened = {file: safe_open(source / file, "pt") for file in set(files.values())}
tensor = lambda name: opened[files[name]].get_tensor(name)


def packed(name, value):
    codes, state = quantize_4bit(value, quant_type="nf4")
    return {name: codes} | {f"{name}.{word}": item.clone() for word, item in state.as_dict(packed=True).items()}


layers = sorted({name.split(".")[2] for name in files if ".layers." in name}, key=int)
for layer in layers:
    block, made = f"model.layers.{layer}", {}
    own = [name for name in files if name.startswith(f"{block}.")]
    count = len({name.split(".")[5] for name in own if ".experts." in name})
    experts = lambda part: [tensor(f"{block}.mlp.experts.{expert}.{part}.weight") for expert in range(count)]
    gate_up = torch.stack([torch.cat(pair) for pair in zip(experts("gate_proj"), experts("up_proj"))])
    made |= packed(f"{block}.mlp.experts.gate_up_proj", gate_up)
    del gate_up
    made |= packed(f"{block}.mlp.experts.down_proj", torch.stack(experts("down_proj")))
    for name in own:
        if ".experts." not in name:
            made |= packed(name, tensor(name)) if "_proj.weight" in name else {name: tensor(name)}
    save_file(made, output / f"layer-{layer}.safetensors", {"format": "pt"})
save_file({name: tensor(name) for name in files if ".layers." not in name}, output / "rest.safetensors")
"""


def stored(folder: Path) -> dict[str, bytes]:
    """Content of what 4-bit tensors are made of, but for their codes the beginning alone."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118, it is no mapping
                if name.endswith((".absmax", ".bitsandbytes__nf4", "experts.down_proj")):
                    part = file.get_slice(name)
                    found[name] = part[: min(1000, part.get_shape()[0])].tobytes()
    return found


def main() -> None:
    """2.7 GB unless LAYERS says otherwise."""
    folder = Path(sys.argv[1])
    pairs = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    layers = int(sys.argv[3]) if len(sys.argv) > 3 else 2
    compile_moeconv()
    source, output = folder / f"qwen3-{layers}-layers", folder / "output"
    nbytes = sources.write(source, sources.qwen3(layers), sources.QWEN3_30B_A3B)
    print(f"{nbytes / 1e9:.2f} GB of Qwen3-30B-A3B matrix sizes, {os.cpu_count()} cores")
    commands = {
        "moeconv": [MOECONV, "quantize", str(source), str(output), "--format", "nf4", "--no-fsync"],
        "bitsandbytes": [sys.executable, "-c", SCRIPT, str(source), str(output)],
    }
    warm(source)
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    written: dict[str, dict[str, bytes]] = {}
    for name, one in in_turn(commands, output, pairs):
        runs[name].append(one)
        written[name] = stored(output)
    if written["moeconv"] != written["bitsandbytes"]:
        raise SystemExit("the two do not write the same")
    own, other = runs["moeconv"], runs["bitsandbytes"]
    low, middle, high = quartiles([b.seconds / a.seconds for a, b in zip(own, other, strict=True)])
    medians = [statistics.median(one.seconds for one in both) for both in (own, other)]
    peaks = [max(one.peak_bytes for one in both) / 1e6 for both in (own, other)]
    print(
        f"nf4  moeconv {medians[0]:.2f} s {peaks[0]:,.0f} MB   bitsandbytes {medians[1]:.2f} s {peaks[1]:,.0f} MB   "
        f"{middle:.1f} times as fast ({low:.1f} to {high:.1f}, {pairs} pairs)"
    )


if __name__ == "__main__":
    main()
