"""Small checkpoint folders written by hand, and folders read back, both without moeconv."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

WIDTH = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "U8": 1,
    "I8": 1,
    "BOOL": 1,
}


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    content: bytes


Tensors = dict[str, Tensor]


def tensor(shape: Sequence[int], dtype: str = "BF16", seed: object = 0) -> Tensor:
    count = WIDTH[dtype]
    for size in shape:
        count *= size
    return Tensor(dtype, tuple(shape), random.Random(str(seed)).randbytes(count))


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, item in tensors.items():
        entries[name] = {
            "dtype": item.dtype,
            "shape": list(item.shape),
            "data_offsets": [at, at + len(item.content)],
        }
        at += len(item.content)
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for item in tensors.values():
            file.write(item.content)


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, shards: int = 1
) -> Path:
    """A checkpoint of `shards` files (0: a single file without index), tensors dealt out in runs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {}))
    names = list(tensors)
    if shards == 0:
        write_file(folder / "model.safetensors", tensors, {"format": "pt"})
        return folder
    size = -(-len(names) // shards)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        part = names[number * size : (number + 1) * size]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        write_file(folder / file, {name: tensors[name] for name in part}, {"format": "pt"})
        weight_map.update((name, file) for name in part)
    total = sum(len(item.content) for item in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_folder(folder: Path) -> Tensors:
    """Every tensor of every safetensors file of a folder."""
    result: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            assert name not in result
            result[name] = Tensor(entry["dtype"], tuple(entry["shape"]), content[begin:end])
    return result


CONFIG = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "moe_intermediate_size": 6,
    "hidden_size": 10,
    "num_hidden_layers": 2,
}


def experts_layout(layers: int = 2, experts: int = 4, inner: int = 6, hidden: int = 10, dtype: str = "BF16") -> Tensors:
    """A tiny model with gate/up/down tensors for each expert, as Qwen3-MoE is published."""
    made: Tensors = {"model.embed_tokens.weight": tensor((7, hidden), dtype, "embed")}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        made[f"{block}.input_layernorm.weight"] = tensor((hidden,), dtype, f"{layer}norm")
        made[f"{block}.mlp.gate.weight"] = tensor((experts, hidden), "F32", f"{layer}router")
        for expert in range(experts):
            for part, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
                name = f"{block}.mlp.experts.{expert}.{part}_proj.weight"
                made[name] = tensor(shape, dtype, name)
    made["lm_head.weight"] = tensor((7, hidden), dtype, "head")
    return made


def finite(tensors: Tensors) -> Tensors:
    """The same with BF16 numbers between 2^-7 and 2^-5 and their negatives: random bytes hold NaN now and then."""
    high = bytes(byte & 0x80 | 0x3C for byte in range(256))
    made = dict(tensors)
    for name, item in tensors.items():
        if item.dtype == "BF16":
            content = bytearray(item.content)
            content[1::2] = content[1::2].translate(high)
            made[name] = item._replace(content=bytes(content))
        elif item.dtype == "F32":
            content = bytearray(item.content)
            content[3::4] = content[3::4].translate(high)
            made[name] = item._replace(content=bytes(content))
    return made


def pack_by_hand(tensors: Tensors) -> Tensors:
    """What packing the result of `experts_layout` must give."""
    made: Tensors = {name: item for name, item in tensors.items() if ".experts." not in name}
    blocks = sorted({name.split(".experts.")[0] for name in tensors if ".experts." in name})
    for block in blocks:
        start = f"{block}.experts."
        count = len({name.removeprefix(start).split(".")[0] for name in tensors if name.startswith(start)})

        def part(expert: int, which: str, block: str = block) -> Tensor:
            return tensors[f"{block}.experts.{expert}.{which}_proj.weight"]

        gate, down = part(0, "gate"), part(0, "down")
        made[f"{block}.experts.gate_up_proj"] = Tensor(
            gate.dtype,
            (count, 2 * gate.shape[0], gate.shape[1]),
            b"".join(part(e, "gate").content + part(e, "up").content for e in range(count)),
        )
        made[f"{block}.experts.down_proj"] = Tensor(
            down.dtype, (count, *down.shape), b"".join(part(e, "down").content for e in range(count))
        )
    return made
