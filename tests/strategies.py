"""All Hypothesis strategies: checkpoints of random families, sizes, dtypes and shardings."""

from __future__ import annotations

from typing import Any, NamedTuple

from hypothesis import strategies as st

from tests.folders import Tensor, Tensors, tensor

SIZES = st.integers(1, 7)


class Family(NamedTuple):
    """How a test writes one family's experts: model_type, config keys and tensor names by layout."""

    model_type: str
    expert: dict[str, str]
    experts_key: str = "num_experts"
    inner_key: str = "moe_intermediate_size"


PER_EXPERT = {
    "gate": "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
    "up": "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
    "down": "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
}
FAMILIES = (
    Family("qwen3_moe", PER_EXPERT),
    Family("qwen3_vl_moe", PER_EXPERT),
    Family(
        "mixtral",
        {
            "gate": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
            "up": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
            "down": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
            "router": "model.layers.{layer}.block_sparse_moe.gate.weight",
        },
        "num_local_experts",
        "intermediate_size",
    ),
    Family(
        "gpt_oss",
        PER_EXPERT | {f"{p}_bias": name.replace(".weight", ".bias") for p, name in PER_EXPERT.items()},
        "num_local_experts",
        "intermediate_size",
    ),
    Family(
        "llama4_text",
        {part: name.replace(".mlp.", ".feed_forward.") for part, name in PER_EXPERT.items()},
        "num_local_experts",
        "intermediate_size",
    ),
    Family(
        "dbrx",
        {p: n.replace("model.layers", "transformer.blocks").replace(".mlp.", ".ffn.") for p, n in PER_EXPERT.items()},
        "moe_num_experts",
        "ffn_hidden_size",
    ),
)


class Case(NamedTuple):
    """A checkpoint in the layout `experts`, its config, and the number of shards (0: a single file)."""

    family: Family
    tensors: Tensors
    config: dict[str, Any]
    shards: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    family = draw(st.sampled_from(FAMILIES))
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    inner, hidden = draw(SIZES), draw(SIZES)
    dtype = draw(st.sampled_from(["BF16", "F32", "F16", "F8_E4M3", "F64"]))
    made: Tensors = {"model.embed.weight": tensor((3, hidden), "F32", "embed")}
    shapes = {
        "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner), "router": (experts, hidden),
        "gate_bias": (inner,), "up_bias": (inner,), "down_bias": (hidden,),
    }  # fmt: skip
    for layer in range(layers):
        for part, name in family.expert.items():
            for expert in range(experts) if "{expert}" in name else range(1):
                full = name.format(layer=layer, expert=expert)
                made[full] = tensor(shapes[part], dtype, full)
    made["scalar"] = Tensor("F32", (), b"abcd")
    made["nothing"] = Tensor("BF16", (0, 3), b"")
    order = draw(st.permutations(list(made))) if draw(st.booleans()) else list(made)
    config = {
        "model_type": family.model_type, family.experts_key: experts, family.inner_key: inner,
        "hidden_size": hidden, "d_model": hidden,
    }  # fmt: skip
    shards = draw(st.integers(0, min(5, len(order))))
    return Case(family, {name: made[name] for name in order}, config, shards)


@st.composite
def views(draw: st.DrawFn) -> tuple[str, dict[str, tuple[int, ...]]]:
    """A recipe value over gate and up, and the shapes of the parts."""
    rank = draw(st.integers(1, 3))
    shape = tuple(draw(st.lists(SIZES, min_size=rank, max_size=rank)))
    word = draw(st.sampled_from(["concat", "interleave"]))
    axis = draw(st.sampled_from([0, -1]))
    value = f"{{{word}: [gate, up], axis: {axis}}}"
    if rank > 1 and draw(st.booleans()):
        value = f"{{transpose: {value}}}"
    return value, {"gate": shape, "up": shape}
