"""Checkpoints with real matrix sizes and random bytes, written without moeconv and without torch."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

#: High bytes of BF16 numbers of either sign between 2^-7 and 2^-5: no NaN, nothing that overflows.
_WEIGHT_LIKE = bytes(byte & 0x80 | 0x3C for byte in range(256))
SHARD_BYTES = 1_000_000_000
Shapes = dict[str, tuple[int, ...]]

QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
    "moe_intermediate_size": 768, "num_experts": 128, "vocab_size": 32000,
}  # fmt: skip
LLAMA4_SCOUT: dict[str, Any] = {
    "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4",
    "text_config": {
        "model_type": "llama4_text", "hidden_size": 5120, "intermediate_size": 8192, "num_local_experts": 4,
    },
}  # fmt: skip


def qwen3(layers: int) -> Shapes:
    """Tensors of Qwen3-30B-A3B, `layers` of its 48 layers and a smaller vocabulary (BF16)."""
    hidden, inner = 2048, 768
    shapes: Shapes = {"model.embed_tokens.weight": (32000, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        shapes |= {
            f"{block}.input_layernorm.weight": (hidden,),
            f"{block}.post_attention_layernorm.weight": (hidden,),
            f"{block}.self_attn.q_proj.weight": (4096, hidden),
            f"{block}.self_attn.k_proj.weight": (512, hidden),
            f"{block}.self_attn.v_proj.weight": (512, hidden),
            f"{block}.self_attn.o_proj.weight": (hidden, 4096),
            f"{block}.self_attn.q_norm.weight": (128,),
            f"{block}.self_attn.k_norm.weight": (128,),
            f"{block}.mlp.gate.weight": (128, hidden),
        }
        for expert in range(128):
            prefix = f"{block}.mlp.experts.{expert}"
            shapes |= {
                f"{prefix}.gate_proj.weight": (inner, hidden),
                f"{prefix}.up_proj.weight": (inner, hidden),
                f"{prefix}.down_proj.weight": (hidden, inner),
            }
    shapes["lm_head.weight"] = (32000, hidden)
    return shapes


def llama4(layers: int, experts: int = 4) -> Shapes:
    """Experts of Llama 4, packed and transposed: one expert's gate_up_proj alone has 168 MB (BF16)."""
    hidden, inner = 5120, 8192
    shapes: Shapes = {}
    for layer in range(layers):
        block = f"language_model.model.layers.{layer}.feed_forward"
        shapes[f"{block}.router.weight"] = (experts, hidden)
        shapes[f"{block}.experts.gate_up_proj"] = (experts, hidden, 2 * inner)
        shapes[f"{block}.experts.down_proj"] = (experts, inner, hidden)
    return shapes


def write(folder: Path, shapes: Shapes, config: dict[str, Any]) -> int:
    """Write a sharded checkpoint; bytes of its tensors. A finished one is left as it is."""
    total = sum(_nbytes(shape) for shape in shapes.values())
    if (folder / "config.json").exists():
        return total
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Shapes] = [{}]
    size = 0
    for name, shape in shapes.items():
        if shards[-1] and size + _nbytes(shape) > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += _nbytes(shape)
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, shard)
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return total


def _nbytes(shape: tuple[int, ...]) -> int:
    count = 2
    for size in shape:
        count *= size
    return count


def _write_file(path: Path, shapes: Shapes) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + _nbytes(shape)]}
        at += _nbytes(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while at > 0:
            block = bytearray(os.urandom(min(at, 1 << 20)))  # small: a child process inherits its parent's peak RSS
            block[1::2] = block[1::2].translate(_WEIGHT_LIKE)
            file.write(block)
            at -= len(block)
