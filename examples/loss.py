"""What quantizing costs a trained model: its loss on held-out text, in every format that `moeconv quantize` writes.

    python examples/loss.py [FOLDER]

Random weights say little about a quantizer: only a trained model has experts that differ,
and something to unlearn. So a byte-level Qwen3-MoE model (four layers of 16 experts, two for each byte, 6.8 million
weights) is trained first, in float32 from a fixed seed, and saved in BF16; FOLDER, build/loss by default, keeps it for
the next run. The text is on every machine: modules at the top level of Python's own library in the order of their
names, every tenth of them held out. Another version of Python or torch, or another CPU, gives slightly other figures.

A loss is the mean over 256 evenly spaced windows of 256 held-out bytes, in nats a byte, computed in float32. Each
format is decoded by `moeconv dequantize` and, where the engine table says that transformers reads it, by transformers,
which must arrive at the same parameters. Of `fp8_dynamic`, transformers rounds the inputs of linear layers to FP8 too.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Linear8bitLt
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy, one_hot
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.utils import logging

import moeconv.transformers  # reads nf4 and fp4
from moeconv.engines import format_readings
from moeconv.formats import FORMATS

FOLDER = Path(__file__).parents[1] / "build" / "loss"
# Every matrix is made of whole blocks of 128 x 128, so that every format can have it.
CONFIG = {
    "vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True,
    "router_aux_loss_coef": 0.0, "max_position_embeddings": 256,
}  # fmt: skip
TRAINING = {"seed": 0, "steps": 600, "batch": 8, "rate": 3e-3, "warmup": 50, "weight_decay": 0.1, "balance": 0.01}
WINDOW, WINDOWS = 256, 256
#: What is tried of each option that a format can take.
OPTIONS = {
    "ue8m0": ("--ue8m0",), "group_size": ("--group-size", "32"), "double_quant": ("--double-quant",),
    "experts": ("--experts", "per-expert"),
}  # fmt: skip
#: What a format cannot do without.
NEEDED = {"int8": ("--experts", "keep")}
#: Sizes that formats are chosen for, as shares of the source's, and what is chosen from.
TARGETS = (0.33, 0.42, 0.55)
TARGET_FORMATS = ("fp8_dynamic", "w8a16", "w4a16", "mxfp4a16", "nvfp4a16")


#: Changes gate and up, and down, of the experts of a layer in place.
Damage = Callable[[Tensor, Tensor], object]


class Variant(NamedTuple):
    """A format with options, as typed."""

    name: str
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((self.name, *self.options))


class Measured(NamedTuple):
    """What a variant costs and saves.

    Attributes:
        losses: of each window, with the weights that `moeconv dequantize` makes.
        read_losses: the same with the quantized folder as transformers reads it; None where it does not.
        bits: for each quantized weight, scales included.
        size: of all tensors, as a share of the source's.
    """

    losses: Tensor
    read_losses: Tensor | None
    bits: float
    size: float


def variants() -> Iterator[Variant]:
    """Every format, with and without each of its options."""
    for name, (_, takes) in FORMATS.items():
        tried = [((), *_tried(option, words)) for option, words in takes.items()]
        for chosen in product(*tried):
            yield Variant(name, sum(chosen, NEEDED.get(name, ())))


def _tried(option: str, words: object) -> list[tuple[str, ...]]:
    """Values of an option that are not its default, as typed."""
    return [("--scale", word) for word in words[1:]] if option == "search" else [OPTIONS[option]]


@cache
def texts() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and held-out bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    kept = [file for at, file in enumerate(files) if at % 10], files[::10]
    train, held_out = (torch.tensor(list(b"".join(file.read_bytes() for file in part))) for part in kept)
    return train, held_out


def unigram_entropy() -> float:
    """The loss of a model that knows nothing but how often each byte occurs in the held-out text."""
    share = torch.bincount(texts()[1]) / len(texts()[1])
    return float(torch.special.entr(share).sum())


def trained(folder: Path = FOLDER) -> Path:
    """The trained model in BF16; made where `folder` has none of this recipe and text."""
    text = hashlib.sha256(bytes(texts()[0].tolist())).hexdigest()
    recipe = json.dumps([CONFIG, TRAINING, WINDOW, text, inspect.getsource(train)], indent=2)
    done = folder / "trained.json"
    if not done.exists() or done.read_text() != recipe:
        done.unlink(missing_ok=True)
        shutil.rmtree(folder / "bf16", ignore_errors=True)
        train().to(torch.bfloat16).save_pretrained(folder / "bf16")
        done.write_text(recipe)
    return folder / "bf16"


def train() -> Module:
    """AdamW with warm-up and a cosine, on windows from random places; the routers' balance is part of the loss."""
    steps, warmup, text = TRAINING["steps"], TRAINING["warmup"], texts()[0]
    torch.manual_seed(TRAINING["seed"])
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**CONFIG), dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), TRAINING["rate"], betas=(0.9, 0.95), weight_decay=TRAINING["weight_decay"], fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.51 + 0.49 * math.cos(math.pi * step / steps))
    )
    start = time.monotonic()
    for step in range(steps):
        places = torch.randint(len(text) - WINDOW, (TRAINING["batch"],))
        windows = text[places[:, None] + torch.arange(WINDOW)]
        made = model(input_ids=windows, labels=windows, output_router_logits=True)
        loss = made.loss + TRAINING["balance"] * sum(map(imbalance, made.router_logits))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"step {step + 1} of {steps}: {made.loss:.3f}, {time.monotonic() - start:.0f} s", file=sys.stderr)
    return model


def imbalance(router_logits: Tensor) -> Tensor:
    """1 where all experts of a layer are used alike, more otherwise. That of transformers is one for all layers."""
    count = router_logits.shape[1]
    used = one_hot(router_logits.topk(CONFIG["num_experts_per_tok"]).indices, count).float().mean((0, 1))
    return count * (used * router_logits.softmax(1).mean(0)).sum()


def load(folder: Path) -> Module:
    """A model as transformers reads it: weights as in BF16, arithmetic in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        model(texts()[1][None, :WINDOW])  # some formats are decoded when they are first used
    return Module.float(model)  # its own `float` refuses quantized models


def value(model: Module, name: str) -> Tensor:
    """A parameter, decoded where the model holds it quantized."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    found = getattr(module, leaf)
    if getattr(found, "quant_state", None) is not None:
        return dequantize_4bit(found.data, found.quant_state).float()
    if isinstance(module, Linear8bitLt) and leaf == "weight":
        return int8_vectorwise_dequant(found.data, module.state.SCB).bfloat16().float()
    return found.float()


def _windows() -> Tensor:
    held_out = texts()[1]
    places = torch.linspace(0, len(held_out) - WINDOW, WINDOWS).long()
    return held_out[places[:, None] + torch.arange(WINDOW)]


@torch.no_grad()
def losses(model: Module) -> Tensor:
    """The mean loss of each held-out window."""
    return torch.cat(
        [
            cross_entropy(model(some).logits[:, :-1].mT, some[:, 1:], reduction="none").mean(1)
            for some in _windows().split(16)
        ]
    )


@torch.no_grad()
def expert_shares(model: Module) -> Tensor:
    """Which share of the held-out bytes each expert sees, [layers, experts]."""
    routers = model(_windows()[::8], output_router_logits=True).router_logits
    chosen = [router.topk(CONFIG["num_experts_per_tok"]).indices.flatten() for router in routers]
    return torch.stack([torch.bincount(ids, minlength=CONFIG["num_experts"]) / len(ids) for ids in chosen])


def difference(one: Tensor, other: Tensor) -> tuple[float, float]:
    """How much larger `one` is in the mean over windows, and the standard error of that."""
    apart = one - other
    return float(apart.mean()), float(apart.std() / len(apart) ** 0.5)


def measure(variant: Variant, source: Path) -> Measured:
    """Quantize the trained model, decode it, and compute its losses.

    Raises:
        RuntimeError: transformers arrives at other parameters than moeconv.
    """
    made, back = source.parent / "quantized", source.parent / "dequantized"
    for folder in (made, back):  # what an earlier moeconv made would count as done
        shutil.rmtree(folder, ignore_errors=True)
    moeconv("quantize", source, made, "--format", variant.name, *variant.options)
    moeconv("dequantize", made, back)
    model = load(back)
    engines = format_readings({"model_type": Qwen3MoeConfig.model_type}, [variant.name])
    reads = {engine.engine.split()[0]: engine.reads for engine in engines}
    read_losses = None
    if reads["transformers"] == "yes" and "per-expert" not in variant.options:
        reader = load(made)
        other = [name for name, item in model.named_parameters() if not torch.equal(value(reader, name), item)]
        if other:
            raise RuntimeError(f"{variant}: transformers reads other values of {', '.join(other)}")
        read_losses = losses(reader)
    return Measured(losses(model), read_losses, *_sizes(source, made))


def measure_target(share: float, source: Path) -> tuple[Tensor, int, Path]:
    """Quantize to a share of the size of the source: losses, the target, and the folder that was made."""
    target = int(share * sum(path.stat().st_size for path in source.iterdir()))
    made = source.parent / f"target-{share}"
    for path in (made, made.with_name(f"{made.name}.recipe.yaml"), made.with_name(f"{made.name}.back")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    moeconv("quantize", source, made, "--target-size", target, "--formats", ",".join(TARGET_FORMATS))
    back = made.with_name(f"{made.name}.back")
    moeconv("dequantize", made, back)
    return losses(load(back)), target, made


def _sizes(source: Path, made: Path) -> tuple[float, float]:
    """Bits of a quantized weight with what belongs to it, and bytes of all tensors as a share of the source's."""
    before, after = load_file(source / "model.safetensors"), load_file(made / "model.safetensors")
    kept = {name for name, item in before.items() if name in after and after[name].dtype == item.dtype}
    weights = sum(item.numel() for name, item in before.items() if name not in kept)
    nbytes = sum(item.nbytes for name, item in after.items() if name not in kept)
    sizes = [sum(item.nbytes for item in tensors.values()) for tensors in (after, before)]
    return 8 * nbytes / weights, sizes[0] / sizes[1]


def moeconv(*arguments: object) -> None:
    """Run a command as a user would; what it says is shown only where it fails."""
    words = [sys.executable, "-m", "moeconv", *map(str, arguments), "--no-fsync"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{done.stderr}")


def _by_group(change: Callable[[Tensor, Tensor], Tensor]) -> Damage:
    """Damage groups of 128 columns [groups, 128], of which it is told the largest magnitudes [groups, 1]."""

    def damage(*experts: Tensor) -> None:
        for stacked in experts:
            groups = stacked.view(-1, 128)
            groups.copy_(change(groups, groups.abs().amax(1, keepdim=True)))

    return damage


#: What a wrong converter would do to experts, by changing gate and up [E, 2*I, H] and down [E, H, I] in place.
MIXED_UP: dict[str, Damage] = {
    "each expert in the place of the next": lambda gate_up, down: (
        gate_up.copy_(gate_up.roll(1, 0)), down.copy_(down.roll(1, 0))
    ),
    "down of each expert beside gate and up of the next": lambda gate_up, down: down.copy_(down.roll(1, 0)),
    "gate and up exchanged": lambda gate_up, down: gate_up.copy_(gate_up.roll(gate_up.shape[1] // 2, 1)),
    "neighbouring columns exchanged": _by_group(lambda groups, _: groups.unflatten(1, (-1, 2)).flip(2).flatten(1)),
}  # fmt: skip
#: What a wrong quantizer would do to them.
WRONG_VALUES: dict[str, Damage] = {
    "each group with the scale of the next": _by_group(lambda groups, amax: groups * (amax.roll(-1, 0) / amax)),
    "a zero point of 4 bits off by one": _by_group(lambda groups, amax: groups + amax / 7.5),
    "the outer half of each range cut off": _by_group(lambda groups, amax: groups.clamp(-amax / 2, amax / 2)),
    "rounded to 2 bits": _by_group(lambda groups, amax: (groups / amax * 1.5).round().clamp(-2, 1) * amax / 1.5),
}


@torch.no_grad()
def damaged(source: Path, damage: Damage, layers: slice = slice(None)) -> Module:
    """The trained model with its experts damaged in some layers."""
    model = load(source)
    for layer in model.model.layers[layers]:
        damage(layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj)
    return model


def main() -> None:
    """Train or find the model, then the table, a line at a time."""
    logging.set_verbosity_error()
    source = trained(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
    plain = losses(load(source))
    shares = expert_shares(load(source))
    print(f"BF16: {plain.mean():.4f} nats a byte; bytes at random by their frequency: {unigram_entropy():.4f}")
    print(f"an expert sees {shares.min():.1%} to {shares.max():.1%} of the bytes of its layer\n")
    print(f"{'format':40}{'bits':>7}{'size':>8}{'loss':>10}{'+-':>9}{'transformers':>15}")
    for variant in variants():
        found = measure(variant, source)
        more, error = difference(found.losses, plain)
        read = f"{difference(found.read_losses, plain)[0]:+.5f}" if found.read_losses is not None else "-"
        print(f"{variant!s:40}{found.bits:7.3f}{found.size:8.1%}{more:+10.5f}{error:9.5f}{read:>15}", flush=True)
    print(f"\nchosen to fit, from {', '.join(TARGET_FORMATS)}:")
    for share in TARGETS:
        chosen, target, made = measure_target(share, source)
        more, error = difference(chosen, plain)
        size = sum(path.stat().st_size for path in made.iterdir()) / target * share
        print(f"{f'at most {share:.0%}':47}{size:8.1%}{more:+10.5f}{error:9.5f}", flush=True)
    print("\nfor comparison, the experts of all layers, or of the first, damaged:")
    for about, damage in {**MIXED_UP, **WRONG_VALUES}.items():
        every, first = (
            difference(losses(damaged(source, damage, layers)), plain)[0] for layers in (slice(None), slice(1))
        )
        print(f"{about:56}{every:+10.4f}{first:+10.4f}", flush=True)


if __name__ == "__main__":
    main()
