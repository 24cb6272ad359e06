"""Make a small checkpoint of real layout, pack it, verify it, unpack it again, and show what happened.

The checkpoint has the names, the sharding and the files of a published Qwen3-MoE model, with small
matrices of random numbers: nothing is downloaded.
"""

import json
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

HERE = Path("build/demo")
LAYERS, EXPERTS, HIDDEN, INNER, VOCAB = 4, 32, 256, 128, 1000
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": HIDDEN,
    "moe_intermediate_size": INNER, "intermediate_size": 512, "num_hidden_layers": LAYERS, "num_experts": EXPERTS,
    "num_experts_per_tok": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
    "vocab_size": VOCAB, "torch_dtype": "bfloat16",
}  # fmt: skip


def shapes() -> dict[str, list[int]]:
    """Every tensor of the model, in the order in which such models are saved."""
    made = {"model.embed_tokens.weight": [VOCAB, HIDDEN]}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        made[f"{block}.input_layernorm.weight"] = [HIDDEN]
        made[f"{block}.post_attention_layernorm.weight"] = [HIDDEN]
        for name, rows in (("q", 256), ("k", 64), ("v", 64)):
            made[f"{block}.self_attn.{name}_proj.weight"] = [rows, HIDDEN]
        made[f"{block}.self_attn.o_proj.weight"] = [HIDDEN, 256]
        made[f"{block}.self_attn.q_norm.weight"] = [32]
        made[f"{block}.self_attn.k_norm.weight"] = [32]
        made[f"{block}.mlp.gate.weight"] = [EXPERTS, HIDDEN]
        for expert in range(EXPERTS):
            made[f"{block}.mlp.experts.{expert}.gate_proj.weight"] = [INNER, HIDDEN]
            made[f"{block}.mlp.experts.{expert}.up_proj.weight"] = [INNER, HIDDEN]
            made[f"{block}.mlp.experts.{expert}.down_proj.weight"] = [HIDDEN, INNER]
    made["model.norm.weight"] = [HIDDEN]
    made["lm_head.weight"] = [VOCAB, HIDDEN]
    return made


def write_checkpoint(folder: Path, shards: int = 3) -> None:
    """Three shards with an index, config.json and a tokenizer file; experts of a layer straddle shards."""
    folder.mkdir(parents=True)
    tensors = list(shapes().items())
    size = -(-len(tensors) // shards)
    weight_map: dict[str, str] = {}
    total = 0
    numbers = random.Random(0)
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in tensors[shard * size : (shard + 1) * size]:
            nbytes = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + nbytes]}
            weight_map[name] = file
            at += nbytes
        text = json.dumps(header).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + numbers.randbytes(at))
        total += at
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 4096}))


def moeconv(*arguments: object) -> None:
    """Run a command as a user would, and show it."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ moeconv {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "moeconv", *words], check=True)


def main() -> None:
    """The tour."""
    shutil.rmtree(HERE, ignore_errors=True)
    source, packed, again = HERE / "tiny-qwen3-moe", HERE / "packed", HERE / "unpacked"
    write_checkpoint(source)
    print(f"Made {source}: {LAYERS} layers of {EXPERTS} experts, as published on the Hub.")
    moeconv("inspect", source)
    moeconv("plan", "pack", source)
    moeconv("pack", source, packed)
    moeconv("verify", packed, "--against", source)
    moeconv("unpack", packed, again)
    moeconv("verify", again, "--against", source)
    moeconv("pack", source, packed)
    print(f"\nEverything is in {HERE}/; `{Path(sys.executable).parent}/moeconv --help` shows the commands.")


if __name__ == "__main__":
    main()
