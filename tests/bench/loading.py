"""What a model takes on disk and in memory: BF16, bitsandbytes as transformers does it, and NF4 of moeconv.

    python tests/bench/loading.py FOLDER

A Qwen3-MoE model of random weights, 64 experts a layer, is loaded by transformers on the CPU and runs 64 tokens, each
time in a process of its own. Memory is the largest resident set of loading and running, less what was resident before,
that is with all libraries imported. Pages of weight files that are mapped count as soon as they were used.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.timing import MOECONV, compile_moeconv

SIZES = {
    "vocab_size": 1024, "hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 128, "num_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": 512,
    "intermediate_size": 512, "max_position_embeddings": 256,
}  # fmt: skip
MAKE = """
import json, sys, torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
torch.manual_seed(0)
config = Qwen3MoeConfig(**json.loads(sys.argv[2]), dtype="bfloat16")
Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(sys.argv[1])
"""
LOAD = """
import json, sys, torch, bitsandbytes
from pathlib import Path
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging
import moeconv.transformers
logging.set_verbosity_error()
folder, how, saved = sys.argv[1:]

def resident(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1e3

own = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")} if how == "bnb" else {}
torch.ones(8) @ torch.ones(8, 8)
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **own)
with torch.no_grad():
    model(torch.arange(64)[None])
peak = resident("VmHWM") - before
if saved:
    model.save_pretrained(saved)
print(json.dumps(peak))
"""


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


def measure(folder: Path, how: str, saved: str = "") -> float:
    """Megabytes that loading and running take."""
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder), how, saved], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Make the model, then one line for each."""
    folder = Path(sys.argv[1]) / "loading"
    shutil.rmtree(folder, ignore_errors=True)
    compile_moeconv()
    source, packed, saved = folder / "bf16", folder / "nf4", folder / "bitsandbytes"
    subprocess.run([sys.executable, "-c", MAKE, str(source), json.dumps(SIZES)], check=True, capture_output=True)
    for name, options in (("nf4", ()), ("nf4-double", ("--double-quant",))):
        command = [MOECONV, "quantize", str(source), str(folder / name), "--format", "nf4", *options, "--no-fsync"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    print(f"{'':40}{'disk':>10}{'memory':>10}")
    rows = [("BF16", source, ""), ("bitsandbytes, load_in_4bit", source, "bnb"), ("moeconv nf4", packed, "")]
    rows.append(("moeconv nf4 --double-quant", folder / "nf4-double", ""))
    for what, where, how in rows:
        peak = measure(where, how, str(saved) if how else "")
        print(f"{what:40}{megabytes(saved if how else where):7.0f} MB{peak:7.0f} MB", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
