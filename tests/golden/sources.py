"""Tiny checkpoints in the layout of Qwen3-MoE that hold what a format may meet, the same bytes with every library.

Numbers come from SHAKE-128 and exact arithmetic in float64, so neither a version of torch nor its seed matters.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch

from tests.folders import Tensor, Tensors


class Source(NamedTuple):
    """A checkpoint to make.

    Formats with groups need `hidden` and `inner` to be multiples of 128.
    """

    dtype: str
    hidden: int
    inner: int


SOURCES = {
    "bf16": Source("BF16", 256, 128),
    "f16": Source("F16", 256, 128),
    "f32": Source("F32", 256, 128),
    "bf16-edges": Source("BF16", 200, 72),
}
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def config_of(source: Source) -> dict[str, object]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": source.hidden,
        "moe_intermediate_size": source.inner, "num_experts": 2, "num_hidden_layers": 1,
    }  # fmt: skip


def fingerprint(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(tensor.content).hexdigest()}"


def tensors_of(source: Source) -> Tensors:
    """Names in the order of the file; each quantized matrix has a kind of content of its own."""
    hidden, inner = source.hidden, source.inner
    block, kinds = "model.layers.0", {
        "self_attn.q_proj": ("normal", (129, hidden)),
        "self_attn.k_proj": ("rows", (9, hidden)),
        "self_attn.v_proj": ("ties", (9, hidden)),
        "self_attn.o_proj": ("zero blocks", (hidden, inner)),
        "mlp.gate": ("normal", (2, hidden)),
        "mlp.experts.0.gate_proj": ("magnitudes", (inner, hidden)),
        "mlp.experts.0.up_proj": ("subnormal", (inner, hidden)),
        "mlp.experts.0.down_proj": ("normal", (hidden, inner)),
        "mlp.experts.1.gate_proj": ("zero rows", (inner, hidden)),
        "mlp.experts.1.up_proj": ("zeros", (inner, hidden)),
        "mlp.experts.1.down_proj": ("one-sided", (hidden, inner)),
    }  # fmt: skip
    shapes = {f"{block}.{name}.weight": kind_and_shape for name, kind_and_shape in kinds.items()}
    shapes |= {
        "model.embed_tokens.weight": ("normal", (7, hidden)),
        f"{block}.input_layernorm.weight": ("normal", (1, hidden)),
        "lm_head.weight": ("normal", (7, hidden)),
    }
    made = {}
    for name, (kind, shape) in shapes.items():
        matrix = _matrix(kind, name, shape, torch.finfo(TORCH_DTYPES[source.dtype])).to(TORCH_DTYPES[source.dtype])
        content = bytes(matrix.view(torch.uint8).flatten().tolist())
        made[name] = Tensor(source.dtype, shape[1:] if "norm" in name else shape, content)
    return made


#: Kinds of matrices that can be had for themselves.
MATRICES = ("normal", "ties", "magnitudes", "zero blocks", "zero rows", "one-sided")


def matrix_of(kind: str, dtype: str) -> torch.Tensor:
    """A matrix [72, 256] of one kind."""
    return _matrix(kind, kind, (72, 256), torch.finfo(TORCH_DTYPES[dtype])).to(TORCH_DTYPES[dtype])


def _normal(seed: str, shape: tuple[int, int]) -> torch.Tensor:
    """Nearly Gaussian, of standard deviation 0.018: sums of four whole numbers, so exact."""
    content = bytearray(hashlib.shake_128(seed.encode()).digest(8 * shape[0] * shape[1]))
    return (torch.frombuffer(content, dtype=torch.int16).view(*shape, 4).double().sum(-1) + 2) * 2.0**-21


def _matrix(kind: str, seed: str, shape: tuple[int, int], limits: torch.finfo) -> torch.Tensor:
    normal = _normal(seed, shape)
    whole, rows = (normal * 2**21).round(), torch.arange(shape[0])[:, None]
    least = limits.smallest_normal * limits.eps
    if kind == "rows":
        choices = [
            normal * 0.0,  # zeros of both signs
            -torch.zeros(shape),
            normal.sign() * limits.max / 2,  # their range is the largest that a zero point allows
            torch.full(shape, limits.max),
            torch.full(shape, -limits.max),
            normal.sign() * least,
            torch.fmod(whole, 660) * least,  # quotients by a scale that is itself subnormal leave the range
            torch.where(torch.arange(shape[1]) == 5, -3e4, normal),
            normal.abs(),
        ]
        return torch.stack([choice[row] for row, choice in enumerate(choices)])
    if kind == "ties":  # quotients lie on the borders between codes
        return torch.fmod(whole, 16) / 2
    if kind == "magnitudes":  # another power of two for each 8 rows of each group
        powers = 9 if limits.bits == 16 and limits.max < 1e5 else 110
        areas = torch.fmod(whole[::8, ::128], powers + 1).repeat_interleave(8, 0).repeat_interleave(128, 1)
        return normal * torch.exp2(areas[: shape[0], : shape[1]])
    if kind == "subnormal":  # and a little more, so that some scales are subnormal numbers and some would be zero
        return torch.fmod(whole, 64) * torch.exp2(rows % 8) * least
    if kind == "zero blocks":
        return normal * ((rows >= 128) | (torch.arange(shape[1]) >= 128))
    if kind == "zero rows":
        return normal * (rows % 3 == 1)
    if kind == "zeros":
        return torch.zeros(shape)
    if kind == "one-sided":
        return normal.abs() * torch.where(rows % 2 == 1, 1, -1)
    return normal
