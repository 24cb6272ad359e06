"""Tiny models of every family that transformers knows and a recipe is for, and their published form on disk."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

HIDDEN, INNER, EXPERTS = 48, 40, 12

#: Small values for what config classes call their sizes. A name that a class lacks is not passed.
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": HIDDEN, "d_model": HIDDEN, "intermediate_size": 56, "moe_intermediate_size": INNER,
    "ffn_hidden_size": 56, "expert_ffn_hidden_size": INNER, "intermediate_size_mlp": 72, "dense_intermediate_size": 56,
    "shared_expert_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24, "shared_intermediate_size": 24,
    "share_expert_dim": 24, "num_hidden_layers": 2, "n_layers": 2, "num_layers": 2, "depth": 2,
    "num_attention_heads": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 4, "head_dim": 12, "kv_channels": 12,
    "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "moe_num_experts": EXPERTS,
    "num_experts_per_tok": 3, "num_experts_per_token": 3, "moe_topk": 3, "moe_k": 3, "moe_top_k": 3, "top_k_experts": 3,
    "n_group": 1, "topk_group": 1, "num_expert_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "num_shared_experts": 1, "moe_num_shared_experts": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 12, "index_n_heads": 2, "index_head_dim": 16,
    "index_topk": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 12,
    "linear_value_head_dim": 12, "mamba_num_heads": 4, "mamba_head_dim": 24, "mamba_n_heads": 4, "mamba_d_head": 24,
    "mamba_d_state": 8, "ssm_state_size": 8, "mamba_n_groups": 1, "n_groups": 1, "mamba_dt_rank": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "out_hidden_size": HIDDEN,
    "image_size": 28, "patch_size": 14, "num_position_embeddings": 16, "zero_expert_num": 3,
    "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 0, "projector_hidden_size": HIDDEN,
}  # fmt: skip

#: What single config classes need besides.
SPECIAL: dict[str, dict[str, Any]] = {
    "Ernie4_5_VLMoeTextConfig": {"moe_intermediate_size": [INNER, 24], "head_dim": 128},
    "DbrxConfig": {
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": INNER, "moe_num_experts": EXPERTS},
        "attn_config": {"kv_n_heads": 4, "rope_theta": 10000.0, "clip_qkv": 8.0},
    },
    "Dots3NoteVisionConfig": {"pyramid_num_routed": [4, 11], "adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
    "Dots3NoteAudioConfig": {"adapter_input_size": HIDDEN, "adapter_output_size": HIDDEN},
    "BeamConfig": {"mlp_layer_types": ["dense", "sparse"]},
    "Step3p7TextConfig": {"mlp_layer_types": ["dense", "sparse"]},
    "FlintConfig": {"mlp_only_layers": [0]},
    "Gemma4TextConfig": {"enable_moe_block": True},
    "Glm5NextTextConfig": {"index_topk": 16, "qk_rope_head_dim": 0, "mlp_layer_types": ["dense", "sparse"]},
    "ZayaConfig": {"num_experts_per_tok": 1},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "NemotronHConfig": {"layers_block_type": ["moe", "full_attention", "moe"], "num_hidden_layers": ...},
}

#: Recipes name these, and no tiny model of them is built here: why.
NOT_BUILT = {
    "bailing_moe": "code on the Hub only",
    "bailing_moe_v2": "code on the Hub only",
    "deepseek": "code on the Hub only",
    "kimi_k2": "code on the Hub only; transformers loads it as deepseek_v3",
    "kimi_k25": "its vision tower has no small form",
    "deepseek_ocr2": "its vision tower has no small form",
    "mistral_large4": "its vision tower has no small form; mistral_large4_text is tested",
    "nemotron_h_omni": "its towers have no small form; nemotron_h is tested",
    "muse_spark": "its vision tower has no small form; muse_spark_text is tested",
    "inkling2": "its vision tower has no small form; inkling2_text is tested",
    "inkling_mm_model": "needs scipy; inkling_text is tested",
    "nemo_speechlm": "its speech encoder has no small form",
    "qwen3_omni_moe": "a pipeline of models; qwen3_omni_moe_thinker is tested",
    "ernie4_5_moe_vl": "an older name of ernie4_5_vl_moe",
    "qwen3_omni_moe_talker_text": "a part of qwen3_omni_moe_talker",
    "qwen3_omni_moe_text": "a part of qwen3_omni_moe_thinker",
    "qwen3_omni_moe_talker": "a part of qwen3_omni_moe",
    "diffusion_gemma_text": "a part of diffusion_gemma",
    "step3p5": "a part of step3p7",
    "ernie4_5_vl_moe_text": "a part of ernie4_5_vl_moe",
}


def config_of(model_type: str, sizes: dict[str, Any] | None = None) -> PreTrainedConfig:
    return _tiny(CONFIG_MAPPING[model_type], SIZES | (sizes or {}))


def _tiny(cls: type[PreTrainedConfig], sizes: dict[str, Any]) -> PreTrainedConfig:
    names: set[str] = set()
    for base in cls.__mro__:
        names |= set(getattr(base, "__annotations__", {}))
    names |= set(inspect.signature(cls.__init__).parameters)
    aliases = dict(getattr(cls, "attribute_map", {}) or {})
    chosen = {name: value for name, value in sizes.items() if name in names | set(aliases)}
    for alias, name in aliases.items():
        if alias in chosen and name in chosen:
            del chosen[alias]
    for name, sub in (getattr(cls, "sub_configs", {}) or {}).items():
        if isinstance(sub, type) and sub.__name__ != "AutoConfig":
            chosen[name] = _tiny(sub, sizes)
    chosen.update(SPECIAL.get(cls.__name__, {}))
    chosen = {name: value for name, value in chosen.items() if value is not ...}
    return cls(**chosen)


def build(model_type: str, seed: int = 0, sizes: dict[str, Any] | None = None) -> PreTrainedModel:
    """A model with random parameters in bfloat16; `sizes` replace those of `SIZES`."""
    config = config_of(model_type, sizes)
    cls = model_class(model_type)
    torch.manual_seed(seed)
    model = cls._from_config(config, dtype=torch.bfloat16).eval()  # what must stay float32 stays so
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model


def model_class(model_type: str) -> type[PreTrainedModel]:
    """The class with the language-model head where there is one."""
    from transformers.models.auto import modeling_auto

    for mapping in ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"):
        name = getattr(modeling_auto, mapping).get(model_type)
        if name:
            return getattr(transformers, name)
    name = MODEL_MAPPING_NAMES[model_type]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def save_published(model: PreTrainedModel, folder: Path, max_shard_size: str = "60KB") -> None:
    """Write a model as its family is published, which is not always what `save_pretrained` writes."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    reshape = _RESHAPES.get(model.config.model_type)
    if reshape is None:
        return
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    _save_shards(reshape(tensors, model), folder)


def _save_shards(tensors: dict[str, torch.Tensor], folder: Path, shards: int = 4) -> None:
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[number::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map.update((name, file) for name in part)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _transposed(tensors: dict[str, torch.Tensor], _: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: t.transpose(1, 2) if ".mlp.experts." in name else t for name, t in tensors.items()}


def _packed(tensors: dict[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    held = {name: t for name, t in model.state_dict().items() if ".mlp.experts." in name}
    assert held
    return {name: t for name, t in tensors.items() if ".mlp.experts." not in name} | held


def _real_experts_only(tensors: dict[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {
        name: t
        for name, t in tensors.items()
        if ".experts." not in name or int(name.split(".experts.")[1].split(".")[0]) < model.config.n_routed_experts
    }


_RESHAPES = {
    "qwen3_vl_moe": _transposed,
    "qwen3_vl_moe_text": _transposed,
    "qwen3_5_moe": _packed,
    "qwen3_5_moe_text": _packed,
    "qwen4_exp": _packed,
    "qwen4_exp_text": _packed,
    "longcat_flash": _real_experts_only,
}
