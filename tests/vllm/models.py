"""Tiny models with random weights, each saved by transformers in the layout in which its family is published.

Sizes are such that no two axes of an expert can be taken for each other, unless they are equal in the release too:
hidden 64, expert 96, gate and up 192; or four times as much, which is made of whole blocks and groups of 128.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

EXPERTS = 8
_EVERY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Where a dense layer's inner size and an expert's are two settings.
_TWO_SIZES = {"intermediate_size": 160, "moe_intermediate_size": 96}
_LATENT_ATTENTION = {
    "num_key_value_heads": 2,
    "kv_lora_rank": 512,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
}
_LINEAR_ATTENTION = {
    "head_dim": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 32,
}
_GROUPS = {"n_group": 2, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5}
_SHARED = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1}
_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
_VISION_TOKENS = {
    "image_token_id": 250,
    "video_token_id": 251,
    "vision_start_token_id": 252,
    "vision_end_token_id": 253,
}
_LOCAL = {"num_local_experts": EXPERTS, "intermediate_size": 96}

# What config.json says, by model_type, beside `_EVERY`.
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {**_TWO_SIZES, "num_experts": EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**_TWO_SIZES, "num_experts": EXPERTS, "head_dim": 32},
    "qwen3_next": {**_TWO_SIZES, **_LINEAR_ATTENTION, "num_experts": EXPERTS},
    "olmoe": {"num_experts": EXPERTS, "intermediate_size": 96},
    "flex_olmo": {"num_experts": EXPERTS, "intermediate_size": 96},
    "glm4_moe": {**_TWO_SIZES, **_SHARED, "head_dim": 32},
    "glm4_moe_lite": {**_TWO_SIZES, **_SHARED, **_LATENT_ATTENTION},
    "deepseek_v2": {
        **_TWO_SIZES,
        **_SHARED,
        **_LATENT_ATTENTION,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
    },
    "deepseek_v3": {**_TWO_SIZES, **_SHARED, **_LATENT_ATTENTION, **_GROUPS, "topk_method": "noaux_tc"},
    "dots1": {**_TWO_SIZES, **_SHARED, "head_dim": 32},
    "exaone_moe": {**_TWO_SIZES, "num_experts": EXPERTS, "head_dim": 32, "first_k_dense_replace": 1},
    "afmoe": {
        **_TWO_SIZES,
        "num_experts": EXPERTS,
        "head_dim": 32,
        "num_dense_layers": 1,
        "score_func": "softmax",
        "route_norm": False,
        "n_group": 1,
        "topk_group": 1,
    },
    "ernie4_5_moe": {**_TWO_SIZES, "moe_num_experts": EXPERTS, "moe_k": 2, "moe_num_shared_experts": 1},
    "hunyuan_v1_moe": {"num_experts": EXPERTS, "moe_topk": 2, "intermediate_size": 96, "head_dim": 32},
    "mixtral": {**_LOCAL, "head_dim": 32},
    "minimax_m2": {**_LOCAL, "head_dim": 32, "rotary_dim": 16, "scoring_func": "softmax", "use_routing_bias": True},
    "phimoe": {**_LOCAL, "attention_bias": True, "lm_head_bias": True},
    "granitemoe": {**_LOCAL, "attention_multiplier": 0.18},
    "granitemoeshared": {**_LOCAL, "attention_multiplier": 0.18, "shared_intermediate_size": 32},
    "granitemoehybrid": {
        **_LOCAL,
        "attention_multiplier": 0.18,
        "shared_intermediate_size": 32,
        "layer_types": ["attention", "attention"],
    },
    "lfm2_moe": {
        **_TWO_SIZES,
        "num_experts": EXPERTS,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
        "tie_word_embeddings": True,
    },
    # Square as released, where no shape tells vLLM that a matrix is the other way round.
    "gpt_oss": {"num_local_experts": EXPERTS, "intermediate_size": 64, "head_dim": 32, "sliding_window": 128},
    "llama4_text": {**_LOCAL, "head_dim": 32, "intermediate_size_mlp": 160, "num_experts_per_tok": 1},
    "qwen3_5_moe_text": {**_TWO_SIZES, **_LINEAR_ATTENTION, "num_experts": EXPERTS},
    "cohere2_moe": {"num_experts": EXPERTS, "intermediate_size": 96, "head_dim": 32, "tie_word_embeddings": True},
    "solar_open": {"moe_intermediate_size": 96, "n_routed_experts": EXPERTS, "head_dim": 32},
    "gemma4_text": {
        **_TWO_SIZES,
        "num_experts": EXPERTS,
        "top_k_experts": 2,
        "enable_moe_block": True,
        "head_dim": 32,
        "tie_word_embeddings": True,
        "vocab_size_per_layer_input": 256,
        "hidden_size_per_layer_input": 0,
    },
    "granitemoe_swa": {**_LOCAL, "attention_multiplier": 0.18, "shared_intermediate_size": 32},
    "llama4": {
        "text_config": {**_LOCAL, "head_dim": 32, "intermediate_size_mlp": 160, "num_experts_per_tok": 1},
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "vision_output_dim": 32,
            "image_size": 28,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        "boi_token_index": 248,
        "eoi_token_index": 249,
        "image_token_index": 250,
    },
    "qwen3_vl_moe": {
        "text_config": {**_TWO_SIZES, "num_experts": EXPERTS, "head_dim": 32, "norm_topk_prob": True},
        "vision_config": {**_VISION, "deepstack_visual_indexes": [0]},
        **_VISION_TOKENS,
    },
    "qwen3_5_moe": {
        "text_config": {**_TWO_SIZES, **_LINEAR_ATTENTION, "num_experts": EXPERTS},
        "vision_config": _VISION,
        **_VISION_TOKENS,
    },
}

# What is four times as large in a wide model.
_WIDER = {
    "hidden_size",
    "intermediate_size",
    "intermediate_size_mlp",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "head_dim",
    "q_lora_rank",
    "out_hidden_size",
}
# Where the published config.json names another class than the one in transformers, and vLLM goes by that name.
_PUBLISHED_ARCHITECTURE = {"phimoe": "PhiMoEForCausalLM"}
# Families whose class in vLLM prepares pictures too, which takes a torchvision that can be imported.
WITH_PICTURES = {"llama4", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_vl_moe"}
# Families that transformers saves with the last two axes of the experts' tensors the other way round.
_PUBLISHED_TRANSPOSED = {"qwen3_vl_moe"}


def _values(name: str, shape: torch.Size, spread: float) -> torch.Tensor:
    """Normal values that depend on the name alone."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _fill(model: torch.nn.Module) -> None:
    """Values so large that every part of the model has a say in the next token."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "A_log" in name or "inv_freq" in name or not tensor.is_floating_point():
            continue
        if tensor.ndim >= 2:
            tensor.copy_(_values(name, tensor.shape, min(0.2, 1.6 / tensor.shape[-1] ** 0.5)))
        else:
            tensor.copy_(_values(name, tensor.shape, 0.1) + (0 if name.endswith("bias") else 1))


@torch.no_grad()
def _exchange_experts(model: torch.nn.Module) -> None:
    """Give every expert the weights of the expert before it; routers stay as they are."""
    for name, tensor in model.named_parameters():
        if ".experts." in name or "put_linear" in name:
            tensor.copy_(tensor.roll(tensor.shape[0] // EXPERTS, 0))


def _sized(settings: dict[str, Any], wide: bool) -> dict[str, Any]:
    return {
        key: _sized(value, wide) if isinstance(value, dict) else 4 * value if wide and key in _WIDER else value
        for key, value in settings.items()
    }


def build(model_type: str, folder: Path, *, exchanged: bool = False, wide: bool = False) -> None:
    """Write a checkpoint; `exchanged` is the same model with its experts in another order, `wide` a larger one."""
    settings = SETTINGS[model_type]
    if "text_config" in settings:
        settings = {**settings, "text_config": {**_EVERY, **settings["text_config"]}}
        auto_class = transformers.AutoModelForImageTextToText
    else:
        settings = {**_EVERY, **settings}
        auto_class = transformers.AutoModelForCausalLM
    model = auto_class.from_config(
        transformers.AutoConfig.for_model(model_type, **_sized(settings, wide)), dtype=torch.bfloat16
    )
    _fill(model)
    if exchanged:
        _exchange_experts(model)
    model.save_pretrained(folder)
    if model_type in _PUBLISHED_ARCHITECTURE:
        path = folder / "config.json"
        settings = {**json.loads(path.read_text()), "architectures": [_PUBLISHED_ARCHITECTURE[model_type]]}
        path.write_text(json.dumps(settings, indent=2))
    if model_type in _PUBLISHED_TRANSPOSED:
        path = folder / "model.safetensors"
        tensors = {
            name: tensor.mT.contiguous() if ".experts." in name else tensor for name, tensor in load_file(path).items()
        }
        save_file(tensors, path, {"format": "pt"})
