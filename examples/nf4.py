"""Make a small mixture of experts, store it in NF4 with moeconv, load it with transformers, and let it speak.

Its parameters are random, so the tokens mean nothing; sizes and memory are what a trained model of that shape has.
Nothing is downloaded. Needs `pip install 'moeconv[transformers]'`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import moeconv.transformers  # noqa: F401 - lets from_pretrained load what moeconv writes

HERE = Path("build/nf4")
SIZES = {
    "vocab_size": 1000, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 256,
}  # fmt: skip


def parameter_bytes(model: PreTrainedModel) -> int:
    """Bytes of all that a model holds; of packed parameters codes, scales and the rest of their states."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def file_bytes(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> None:
    """The tour."""
    disable_progress_bar()
    shutil.rmtree(HERE, ignore_errors=True)
    source, packed = HERE / "bf16", HERE / "nf4"
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", **SIZES)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(source)

    command = ["moeconv", "quantize", str(source), str(packed), "--format", "nf4"]
    print(f"$ {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", *command], check=True)

    prompt = torch.tensor([[1, 2, 3, 5, 8, 13]])
    for folder in (source, packed):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokens = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
        print(f"\n{folder.name}: {file_bytes(folder) / 1e6:.1f} MB on disk")
        print(f"{folder.name}: {parameter_bytes(model) / 1e6:.1f} MB in memory")
        print(f"{folder.name}: tokens {tokens[0, prompt.shape[1] :].tolist()}")


if __name__ == "__main__":
    main()
