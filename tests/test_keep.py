"""What is quantized by default, in every family: linear layers of the language model and all experts, nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moeconv.checkpoint import open_checkpoint
from moeconv.plan import Plan
from moeconv.quantize import plan_quantize
from moeconv.scheme import build_scheme
from moeconv.selection import select_recipe
from tests.families import config_of, model_class
from tests.flagships import write_headers
from tests.test_families import MODEL_TYPES

#: Parts of a model that no quantization should touch, by the names of their classes.
KEPT_CLASSES = re.compile(
    r"Router|Gate(?!d)|TopK|Vision|Visual|Audio|Sound|Indexer|Compressor|Conv|Mamba|SSM|GatedDelta|Embedding"
    r"|Norm|Projector|SelfConditioning"
)
#: And by the names of single layers.
KEPT_NAMES = re.compile(
    r"router|norm|embed|lm_head|shared_expert_gate|latent|q_a_proj|kv_a_proj|kv_b_proj|wq_a|wkv|conv|mtp|bias"
)


def stored(name: str) -> str:
    """As files have it where a model calls it otherwise."""
    return name.replace("model.vision_tower.blocks.", "vision_encoder.blocks.")


def plan_of(model_type: str, folder: Path) -> tuple[torch.nn.Module, Plan]:
    """A model on no device, and the plan for a folder of headers that has its parameters."""
    config = config_of(model_type)
    with torch.device("meta"):
        model = model_class(model_type)._from_config(config, dtype=torch.bfloat16)
    config.save_pretrained(folder)
    write_headers(folder, [(stored(name), "BF16", tuple(item.shape)) for name, item in model.state_dict().items()])
    checkpoint = open_checkpoint(folder)
    scheme, _ = build_scheme("fp8_dynamic", {}, None, [], [], None, False)
    return model, plan_quantize(checkpoint, select_recipe(checkpoint), scheme)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_all_experts_and_only_linear_layers_are_quantized(model_type: str, tmp_path: Path) -> None:
    model, plan = plan_of(model_type, tmp_path)
    quantized = [value for value in plan.values if value.format]
    taken = {move.source.spec.name for value in quantized for move in value.fill.moves}
    experts = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if re.search(r"Experts?$|ExpertGLU$", type(module).__name__)
        for name, item in module.named_parameters()
        if item.dim() > 1 and not re.search(r"bias|norm", name) and "shared" not in path
    }
    experts = set(map(stored, experts))
    assert experts
    assert experts <= taken, sorted(experts - taken)
    for name in sorted(taken - experts):
        path = name.removesuffix(".weight")
        words = path.split(".")
        parents = [type(model.get_submodule(".".join(words[:at]))).__name__ for at in range(1, len(words))]
        assert isinstance(model.get_submodule(path), torch.nn.Linear), name
        parts = [parent for parent in parents if not re.search(r"Layer$|Model$|ModuleList$", parent)]
        assert not [part for part in parts if KEPT_CLASSES.search(part)], (name, parts)
        assert not KEPT_NAMES.search(name), name
