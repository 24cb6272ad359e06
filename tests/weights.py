"""Small checkpoints with weights as models have them: blocks of different size, some with outliers."""

from __future__ import annotations

import torch
from torch import Tensor as Matrix

from tests.folders import Tensor, Tensors

LAYERS, EXPERTS = 2, 4


def config_of(size: int, **own: object) -> dict[str, object]:
    return {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": EXPERTS,
        "moe_intermediate_size": size, "hidden_size": size, "num_hidden_layers": LAYERS, "vocab_size": 32,
        "tie_word_embeddings": False, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": size // 2, **own,
    }  # fmt: skip


def matrix(shape: tuple[int, int], kind: str, generator: torch.Generator) -> Matrix:
    """Gaussian, or Student's t with five degrees of freedom; blocks of 128 x 16 differ by a factor of up to 16."""
    made = torch.randn(shape, generator=generator)
    if kind == "student":
        made /= (torch.randn((5, *shape), generator=generator).square().mean(0)).sqrt()
    rows, columns = (-(-size // step) for size, step in zip(shape, (128, 16), strict=True))
    sizes = 2 ** (4 * torch.rand((rows, columns), generator=generator) - 2)
    return made * 0.02 * sizes.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(16, 1)[:, : shape[1]]


def stored(made: Matrix, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    name = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}[dtype]
    return Tensor(name, tuple(made.shape), made.to(dtype).contiguous().view(torch.uint8).numpy().tobytes())


def weights(
    size: int, kind: str = "gaussian", seed: int = 0, layers: int = LAYERS, experts: int = EXPERTS
) -> Tensors:  # fmt: skip
    """Matrices of a model whose experts are square, so that no shape tells an axis from the other."""
    generator = torch.Generator().manual_seed(seed)

    def of(rows: int) -> Tensor:
        return stored(matrix((rows, size), kind, generator))

    made = {
        "model.embed_tokens.weight": of(32),
        "lm_head.weight": of(32),
        "model.norm.weight": stored(torch.ones(size)),
    }
    for layer in range(layers):
        block = f"model.layers.{layer}"
        made[f"{block}.input_layernorm.weight"] = stored(torch.ones(size))
        made[f"{block}.post_attention_layernorm.weight"] = stored(torch.ones(size))
        for part in "qkvo":
            made[f"{block}.self_attn.{part}_proj.weight"] = of(size)
        made[f"{block}.mlp.gate.weight"] = of(experts)
        for expert in range(experts):
            for part in ("gate", "up", "down"):
                made[f"{block}.mlp.experts.{expert}.{part}_proj.weight"] = of(size)
    return made


def transposed(tensor: Tensor) -> Tensor:
    """A square BF16 matrix with its axes exchanged."""
    content = torch.frombuffer(bytearray(tensor.content), dtype=torch.bfloat16).view(tensor.shape)
    return stored(content.T)
