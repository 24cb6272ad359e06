"""The largest published models as folders without data: every name and shape, in files that are holes behind headers.

Sizes are those that the models are published with; names outside the experts are the usual ones of their families.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.folders import WIDTH

Entry = tuple[str, str, tuple[int, ...]]
SHARD_BYTES = 5_000_000_000


def write(folder: Path, name: str) -> Path:
    """Write one of `FLAGSHIPS` below a folder."""
    config, tensors = FLAGSHIPS[name]
    folder = folder / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return write_headers(folder, list(tensors()))


def write_headers(folder: Path, entries: list[Entry]) -> Path:
    """Write weight files and an index for tensors, without data."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        nbytes = _nbytes(entry)
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += nbytes
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for entry in shard:
            tensor, dtype, shape = entry
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + _nbytes(entry)]}
            weight_map[tensor] = file
            at += _nbytes(entry)
        text = json.dumps(header).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / file, 8 + len(text) + at)
    index = {"metadata": {"total_size": sum(map(_nbytes, entries))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _nbytes(entry: Entry) -> int:
    count = WIDTH[entry[1]]
    for size in entry[2]:
        count *= size
    return count


def bf16(name: str, *shape: int) -> Iterator[Entry]:
    yield f"{name}.weight", "BF16", shape


def fp8(name: str, rows: int, columns: int) -> Iterator[Entry]:
    yield f"{name}.weight", "F8_E4M3", (rows, columns)
    yield f"{name}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))


def int4(name: str, rows: int, columns: int) -> Iterator[Entry]:
    """compressed-tensors in groups of 32."""
    yield f"{name}.weight_packed", "I32", (rows, columns // 8)
    yield f"{name}.weight_scale", "BF16", (rows, columns // 32)
    yield f"{name}.weight_shape", "I64", (2,)


Linear = Callable[[str, int, int], Iterator[Entry]]


def attention(block: str, linear: Linear, hidden: int, heads: int, key_values: int, size: int) -> Iterator[Entry]:
    yield from linear(f"{block}.self_attn.q_proj", heads * size, hidden)
    yield from linear(f"{block}.self_attn.k_proj", key_values * size, hidden)
    yield from linear(f"{block}.self_attn.v_proj", key_values * size, hidden)
    yield from linear(f"{block}.self_attn.o_proj", hidden, heads * size)
    yield from bf16(f"{block}.input_layernorm", hidden)
    yield from bf16(f"{block}.post_attention_layernorm", hidden)


def latent_attention(block: str, linear: Linear, hidden: int, heads: int) -> Iterator[Entry]:
    yield from linear(f"{block}.self_attn.q_a_proj", 1536, hidden)
    yield from linear(f"{block}.self_attn.q_b_proj", heads * 192, 1536)
    yield from linear(f"{block}.self_attn.kv_a_proj_with_mqa", 576, hidden)
    yield from linear(f"{block}.self_attn.kv_b_proj", heads * 256, 512)
    yield from linear(f"{block}.self_attn.o_proj", hidden, heads * 128)
    for norm, size in (("self_attn.q_a_layernorm", 1536), ("self_attn.kv_a_layernorm", 512)):
        yield from bf16(f"{block}.{norm}", size)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield from bf16(f"{block}.{norm}", hidden)


def gated(stem: str, linear: Linear, hidden: int, inner: int, names: tuple[str, str, str]) -> Iterator[Entry]:
    gate, up, down = names
    yield from linear(f"{stem}.{gate}", inner, hidden)
    yield from linear(f"{stem}.{up}", inner, hidden)
    yield from linear(f"{stem}.{down}", hidden, inner)


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def deepseek(
    linear: Linear, of_experts: Linear, layers: int, experts: int, hidden: int, inner: int, dense: int,
    dense_inner: int, heads: int, vocabulary: int, further: int,
) -> Iterator[Entry]:  # fmt: skip
    """DeepSeek-V3 and what is built like it; `further` layers predict further tokens."""
    yield from bf16("model.embed_tokens", vocabulary, hidden)
    for layer in range(layers + further):
        block = f"model.layers.{layer}"
        yield from latent_attention(block, linear, hidden, heads)
        if layer < dense:
            yield from gated(f"{block}.mlp", linear, hidden, dense_inner, PROJECTIONS)
            continue
        yield from bf16(f"{block}.mlp.gate", experts, hidden)
        yield f"{block}.mlp.gate.e_score_correction_bias", "F32", (experts,)
        yield from gated(f"{block}.mlp.shared_experts", linear, hidden, inner, PROJECTIONS)
        for expert in range(experts):
            yield from gated(f"{block}.mlp.experts.{expert}", of_experts, hidden, inner, PROJECTIONS)
        if layer >= layers:
            yield from bf16(f"{block}.eh_proj", hidden, 2 * hidden)
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield from bf16(f"{block}.{norm}", hidden)
    yield from bf16("model.norm", hidden)
    yield from bf16("lm_head", vocabulary, hidden)


def qwen3_235b() -> Iterator[Entry]:
    yield from bf16("model.embed_tokens", 151936, 4096)
    for layer in range(94):
        block = f"model.layers.{layer}"
        yield from attention(block, bf16, 4096, 64, 4, 128)
        yield from bf16(f"{block}.mlp.gate", 128, 4096)
        for expert in range(128):
            yield from gated(f"{block}.mlp.experts.{expert}", bf16, 4096, 1536, PROJECTIONS)
    yield from bf16("model.norm", 4096)
    yield from bf16("lm_head", 151936, 4096)


def qwen3_5_397b() -> Iterator[Entry]:
    """Published packed."""
    yield from bf16("model.language_model.embed_tokens", 248320, 4096)
    for layer in range(60):
        block = f"model.language_model.layers.{layer}"
        yield from attention(block, bf16, 4096, 32, 2, 256)
        yield from bf16(f"{block}.mlp.gate", 512, 4096)
        yield f"{block}.mlp.experts.gate_up_proj", "BF16", (512, 2048, 4096)
        yield f"{block}.mlp.experts.down_proj", "BF16", (512, 4096, 1024)
        yield from gated(f"{block}.mlp.shared_expert", bf16, 4096, 1024, PROJECTIONS)
        yield from bf16(f"{block}.mlp.shared_expert_gate", 1, 4096)
    yield from bf16("model.language_model.norm", 4096)
    yield from bf16("lm_head", 248320, 4096)


def gpt_oss_120b() -> Iterator[Entry]:
    """MXFP4 as published."""
    yield from bf16("model.embed_tokens", 201088, 2880)
    for layer in range(36):
        block = f"model.layers.{layer}"
        yield from attention(block, bf16, 2880, 64, 8, 64)
        yield f"{block}.mlp.router.weight", "BF16", (128, 2880)
        yield f"{block}.mlp.router.bias", "BF16", (128,)
        for part, rows in (("gate_up_proj", 5760), ("down_proj", 2880)):
            yield f"{block}.mlp.experts.{part}_blocks", "U8", (128, rows, 90, 16)
            yield f"{block}.mlp.experts.{part}_scales", "U8", (128, rows, 90)
            yield f"{block}.mlp.experts.{part}_bias", "BF16", (128, rows)
    yield from bf16("model.norm", 2880)
    yield from bf16("lm_head", 201088, 2880)


def maverick() -> Iterator[Entry]:
    """Llama 4 Maverick: packed and transposed, in every other layer."""
    yield from bf16("language_model.model.embed_tokens", 202048, 5120)
    for layer in range(48):
        block = f"language_model.model.layers.{layer}"
        yield from attention(block, bf16, 5120, 40, 8, 128)
        if layer % 2 == 0:
            yield from gated(f"{block}.feed_forward", bf16, 5120, 16384, PROJECTIONS)
            continue
        yield from bf16(f"{block}.feed_forward.router", 128, 5120)
        yield f"{block}.feed_forward.experts.gate_up_proj", "BF16", (128, 5120, 16384)
        yield f"{block}.feed_forward.experts.down_proj", "BF16", (128, 8192, 5120)
        yield from gated(f"{block}.feed_forward.shared_expert", bf16, 5120, 8192, PROJECTIONS)
    yield from bf16("language_model.model.norm", 5120)
    yield from bf16("language_model.lm_head", 202048, 5120)


def minimax_m2() -> Iterator[Entry]:
    """Native FP8."""
    yield from bf16("model.embed_tokens", 200064, 3072)
    for layer in range(62):
        block = f"model.layers.{layer}"
        yield from attention(block, fp8, 3072, 48, 8, 128)
        yield from bf16(f"{block}.block_sparse_moe.gate", 256, 3072)
        yield f"{block}.block_sparse_moe.e_score_correction_bias", "F32", (256,)
        for expert in range(256):
            yield from gated(f"{block}.block_sparse_moe.experts.{expert}", fp8, 3072, 1536, ("w1", "w3", "w2"))
    yield from bf16("model.norm", 3072)
    yield from bf16("lm_head", 200064, 3072)


BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
GROUPS = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*self_attn.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
                "dynamic": False,
            },
        },
    },
}  # fmt: skip


def _deepseek_config(model_type: str, layers: int, experts: int, hidden: int, inner: int, dense: int) -> dict[str, Any]:
    return {
        "model_type": model_type, "num_hidden_layers": layers, "n_routed_experts": experts, "hidden_size": hidden,
        "moe_intermediate_size": inner, "first_k_dense_replace": dense, "torch_dtype": "bfloat16",
    }  # fmt: skip


FLAGSHIPS: dict[str, tuple[dict[str, Any], Callable[[], Iterator[Entry]]]] = {
    "deepseek-v3-fp8": (
        {**_deepseek_config("deepseek_v3", 61, 256, 7168, 2048, 3), "quantization_config": BLOCKS},
        lambda: deepseek(fp8, fp8, 61, 256, 7168, 2048, 3, 18432, 128, 129280, 1),
    ),
    "kimi-k2-int4": (
        {**_deepseek_config("kimi_k2", 61, 384, 7168, 2048, 1), "quantization_config": GROUPS},
        lambda: deepseek(bf16, int4, 61, 384, 7168, 2048, 1, 18432, 64, 163840, 0),
    ),
    "qwen3-235b": (
        {"model_type": "qwen3_moe", "num_experts": 128, "hidden_size": 4096, "moe_intermediate_size": 1536,
         "intermediate_size": 12288, "num_hidden_layers": 94, "torch_dtype": "bfloat16"},
        qwen3_235b,
    ),
    "glm-5": (
        _deepseek_config("glm_moe_dsa", 78, 256, 6144, 2048, 3),
        lambda: deepseek(bf16, bf16, 78, 256, 6144, 2048, 3, 12288, 64, 154880, 1),
    ),
    "gpt-oss-120b": (
        {"model_type": "gpt_oss", "num_local_experts": 128, "hidden_size": 2880, "intermediate_size": 2880,
         "num_hidden_layers": 36, "torch_dtype": "bfloat16",
         "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}},
        gpt_oss_120b,
    ),
    "llama4-maverick": (
        {"model_type": "llama4", "torch_dtype": "bfloat16",
         "text_config": {"model_type": "llama4_text", "num_local_experts": 128, "hidden_size": 5120,
                         "intermediate_size": 8192, "intermediate_size_mlp": 16384, "num_hidden_layers": 48}},
        maverick,
    ),
    "qwen3.5-397b": (
        {"model_type": "qwen3_5_moe", "dtype": "bfloat16",
         "text_config": {"model_type": "qwen3_5_moe_text", "num_experts": 512, "hidden_size": 4096,
                         "moe_intermediate_size": 1024, "num_hidden_layers": 60}},
        qwen3_5_397b,
    ),
    "minimax-m2": (
        {"model_type": "minimax_m2", "num_local_experts": 256, "hidden_size": 3072, "intermediate_size": 1536,
         "num_hidden_layers": 62, "torch_dtype": "bfloat16", "quantization_config": BLOCKS},
        minimax_m2,
    ),
}  # fmt: skip
