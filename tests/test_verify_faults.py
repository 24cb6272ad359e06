"""Seven ways in which a conversion goes wrong without a word, each caught and named, by bytes and by values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.commands import refused, run, succeeds
from tests.folders import Tensor, Tensors, read_folder, write_folder
from tests.weights import EXPERTS, config_of, transposed, weights

SIZE = 256
BLOCK = "model.layers.0.mlp.experts"
#: How a good folder is made, step by step, and how it holds experts.
WAYS: dict[str, tuple[list[tuple[str, ...]], str]] = {
    "packed": ([("pack",)], "packed"),
    "experts": ([("pack",), ("unpack",)], "experts"),
    "fp8": ([("quantize", "--format", "fp8")], "experts"),
    "fp8 packed": ([("quantize", "--format", "fp8"), ("pack",)], "packed"),
    "w4a16": ([("quantize", "--format", "w4a16")], "experts"),
    "nvfp4a16": ([("quantize", "--format", "nvfp4a16")], "experts"),
    "nf4": ([("quantize", "--format", "nf4")], "packed"),
}
QUANTIZED = [way for way in WAYS if way not in ("packed", "experts")]
BY = ["bytes", "values"]


class Made(NamedTuple):
    """A good folder, one from a source with transposed experts, and what both were made from."""

    source: Path
    good: Path
    other: Path
    layout: str


def convert(source: Path, way: str, root: Path) -> tuple[Path, Path]:
    """The last folder, and the one that it was made from."""
    for number, (command, *options) in enumerate(WAYS[way][0]):
        target = root / f"{source.name}-{number}"
        succeeds(command, source, target, *options, "--no-fsync")
        source, before = target, source
    return source, before


@pytest.fixture(scope="module", params=list(WAYS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    way = request.param
    root = tmp_path_factory.mktemp("made")
    tensors = weights(SIZE, layers=1)
    source = write_folder(root / "source", tensors, config_of(SIZE, num_hidden_layers=1), 1)
    turned = {name: transposed(item) if ".experts." in name else item for name, item in tensors.items()}
    good, before = convert(source, way, root)
    other, _ = convert(write_folder(root / "turned", turned, config_of(SIZE, num_hidden_layers=1), 1), way, root)
    return Made(before, good, other, WAYS[way][1])


def regions(tensors: Tensors, layout: str, expert: int, part: str) -> dict[str, tuple[str, int, int]]:
    """Where the codes, scales and all else of one part of an expert lie: by suffix name, first and last byte."""
    if layout == "experts":
        start = f"{BLOCK}.{expert}.{part}_proj."
        return {
            name.removeprefix(start): (name, 0, len(t.content)) for name, t in tensors.items() if name.startswith(start)
        }
    start = f"{BLOCK}.{'down' if part == 'down' else 'gate_up'}_proj"
    count = EXPERTS * (1 if part == "down" else 2)
    number = expert * (1 if part == "down" else 2) + (part == "up")
    found = {}
    for name, item in tensors.items():
        if name.startswith(start) and "quant_" not in name:
            size = len(item.content) // count
            found[name.removeprefix(start)] = (name, number * size, (number + 1) * size)
    return found


def put(tensors: Tensors, name: str, first: int, content: bytes) -> None:
    before = tensors[name]
    tensors[name] = before._replace(content=before.content[:first] + content + before.content[first + len(content) :])


def exchange(tensors: Tensors, layout: str, one: tuple[int, str], other: tuple[int, str]) -> None:
    ours, theirs = regions(tensors, layout, *one), regions(tensors, layout, *other)
    assert ours.keys() == theirs.keys()
    for suffix, (name, first, last) in ours.items():
        name_2, first_2, last_2 = theirs[suffix]
        mine, its = tensors[name].content[first:last], tensors[name_2].content[first_2:last_2]
        put(tensors, name, first, its)
        put(tensors, name_2, first_2, mine)


def rewritten(made: Made, tmp_path: Path, change: Callable[[Tensors], object]) -> Path:
    """A copy of the good folder with its tensors changed, in a single file; its manifest tells of no files."""
    folder = tmp_path / "wrong"
    shutil.copytree(made.good, folder)
    tensors = read_folder(folder)
    before = dict(tensors)
    change(tensors)
    assert tensors != before
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    config, manifest = (folder / "config.json").read_bytes(), json.loads((folder / "moeconv.json").read_text())
    write_folder(folder, tensors, None, 1)
    (folder / "config.json").write_bytes(config)
    (folder / "moeconv.json").write_text(json.dumps({**manifest, "files": []}))
    return folder


def said(folder: Path, made: Made, by: str) -> str:
    return refused("verify", folder, "--against", made.source, "--compare", by, within=folder)


@pytest.mark.parametrize("by", BY)
def test_a_good_folder_is_good(made: Made, by: str) -> None:
    report = json.loads(succeeds("verify", made.good, "--against", made.source, "--compare", by, "--json").out)
    assert report["compared_by"] == by
    assert report["looked_at"]["bytes"] == report["looked_at"]["of_bytes"] > 0 or by == "values"
    succeeds("verify", made.good)


@pytest.mark.parametrize("by", BY)
def test_gate_and_up_exchanged(made: Made, tmp_path: Path, by: str) -> None:
    folder = rewritten(made, tmp_path, lambda tensors: exchange(tensors, made.layout, (2, "gate"), (2, "up")))
    message = said(folder, made, by)
    assert f"{BLOCK}.2.gate_proj.weight holds up of the source: gate and up are exchanged" in message
    assert f"{BLOCK}.2.up_proj.weight holds gate of the source: up and gate are exchanged" in message


@pytest.mark.parametrize("by", BY)
def test_two_experts_exchanged(made: Made, tmp_path: Path, by: str) -> None:
    folder = rewritten(made, tmp_path, lambda tensors: exchange(tensors, made.layout, (1, "down"), (3, "down")))
    message = said(folder, made, by)
    assert f"{BLOCK}.1.down_proj.weight holds expert 3 of the source, not expert 1" in message
    assert f"{BLOCK}.3.down_proj.weight holds expert 1 of the source, not expert 3" in message


@pytest.mark.parametrize("by", BY)
def test_a_wrong_axis(made: Made, tmp_path: Path, by: str) -> None:
    """Square matrices, so that no shape tells."""
    turned = read_folder(made.other)

    def change(tensors: Tensors) -> None:
        for name, first, last in regions(tensors, made.layout, 0, "down").values():
            put(tensors, name, first, turned[name].content[first:last])

    message = said(rewritten(made, tmp_path, change), made, by)
    assert f"{BLOCK}.0.down_proj.weight holds the transpose of what the source has" in message


def flip(tensors: Tensors, layout: str) -> str:
    """Flip the lowest bit of a code, or of a number in full precision; the name of the tensor."""
    name, first, _ = max(regions(tensors, layout, 1, "up").values(), key=lambda region: region[2] - region[1])
    put(tensors, name, first + 100, bytes([tensors[name].content[first + 100] ^ 1]))
    return name


def test_one_flipped_bit(made: Made, tmp_path: Path) -> None:
    changed: list[str] = []
    folder = rewritten(made, tmp_path, lambda tensors: changed.append(flip(tensors, made.layout)))
    assert f"{changed[0]} " in said(folder, made, "bytes")


def test_the_lowest_bit_of_a_code_cannot_be_seen_by_value(made: Made, tmp_path: Path) -> None:
    """It is what rounding may do. Numbers that are stored as they were are compared bit for bit."""
    folder = rewritten(made, tmp_path, lambda tensors: flip(tensors, made.layout))
    result = run("verify", folder, "--against", made.source, "--compare", "values")
    assert result.code == (0 if is_quantized(made.good) else 1), result


def is_quantized(folder: Path) -> bool:
    return "quantization_config" in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("by", BY)
def test_the_scale_of_another_block(made: Made, tmp_path: Path, by: str) -> None:
    if not is_quantized(made.good):
        pytest.skip("it has no scales")

    def change(tensors: Tensors) -> None:
        found = regions(tensors, made.layout, 1, "up")
        name, first, last = next(
            found[suffix]
            for suffix in found
            if suffix.endswith(("scale", "scale_inv", "absmax")) and "global" not in suffix
        )
        width = {"F32": 4, "BF16": 2, "F8_E4M3": 1}[tensors[name].dtype]
        dtype = {4: torch.float32, 2: torch.bfloat16, 1: torch.float8_e4m3fn}[width]
        scales = torch.frombuffer(bytearray(tensors[name].content[first:last]), dtype=dtype)
        low, high = int(scales.float().argmin()), int(scales.float().argmax())
        bits = scales.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[width])
        bits[[low, high]] = bits[[high, low]].clone()
        put(tensors, name, first, scales.view(torch.uint8).numpy().tobytes())

    message = said(rewritten(made, tmp_path, change), made, by)
    assert f"{BLOCK}.1.up_proj.weight " in message
    assert "as if that had the scale of another block" in message


@pytest.mark.parametrize("by", [None, *BY])
def test_a_missing_expert(made: Made, tmp_path: Path, by: str | None) -> None:
    def change(tensors: Tensors) -> None:
        for name, first, _ in regions(tensors, made.layout, EXPERTS - 1, "down").values():
            before = tensors[name]
            if made.layout == "experts":
                del tensors[name]
            else:
                rows = before.shape[0] // EXPERTS * (EXPERTS - 1)
                tensors[name] = Tensor(before.dtype, (rows, *before.shape[1:]), before.content[:first])

    folder = rewritten(made, tmp_path, change)
    options = [] if by is None else ["--against", made.source, "--compare", by]
    message = refused("verify", folder, *options, within=tmp_path)
    assert "down_proj" in message
    assert any(word in message for word in ("missing: 3", "in the files", "should be", "claims", "is missing"))


@pytest.mark.parametrize("by", [None, *BY])
def test_a_stale_config(made: Made, tmp_path: Path, by: str | None) -> None:
    """Of a folder that is quantized in another way, or not."""
    folder = tmp_path / "wrong"
    shutil.copytree(made.good, folder)
    config = json.loads((folder / "config.json").read_text())
    if config.pop("quantization_config", None) is None:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    options = [] if by is None else ["--against", made.source, "--compare", by]
    message = refused("verify", folder, *options, within=tmp_path)
    is_said = (
        "has no quantization_config"
        if is_quantized(made.good)
        else "says that the model is quantized (fp8), and no tensor is"
    )
    assert is_said in message
