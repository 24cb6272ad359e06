"""What `verify` sees in the numbers of a folder without the source that it was made from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.commands import refused, succeeds
from tests.folders import Tensor, Tensors, read_folder, write_folder
from tests.weights import config_of, stored, weights

SIZE = 128
BLOCK = "model.layers.0.mlp.experts"
FORMATS = ("fp8", "w8a8", "w4a16", "w4a16_asym", "nvfp4a16", "mxfp4a16", "nf4")
DTYPES = {
    "BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8, "I8": torch.int8,
    "I32": torch.int32,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = config_of(SIZE, num_hidden_layers=1, num_experts=2)
    return write_folder(
        tmp_path_factory.mktemp("sound") / "source", weights(SIZE, seed=3, layers=1, experts=2), config, 1
    )


@pytest.fixture(scope="module", params=FORMATS)
def good(request: pytest.FixtureRequest, source: Path) -> Path:
    made = source.parent / str(request.param)
    succeeds("quantize", source, made, "--format", request.param, "--no-fsync")
    return made


def changed(folder: Path, tmp_path: Path, change: Callable[[Tensors], object]) -> Path:
    made = tmp_path / "wrong"
    shutil.copytree(folder, made)
    tensors = read_folder(made)
    change(tensors)
    config = (made / "config.json").read_bytes()
    for path in made.glob("*.safetensors*"):
        path.unlink()
    write_folder(made, tensors, None, 1)
    (made / "config.json").write_bytes(config)
    return made


def part(tensors: Tensors, *ends: str) -> str:
    """A tensor of experts whose name ends in one of these ways."""
    return next(name for end in ends for name in sorted(tensors) if ".experts." in name and name.endswith(end))


SCALES = ("weight_scale_inv", "weight_scale", "absmax")
CODES = ("down_proj.weight_packed", "down_proj.weight", "down_proj")


def edit(tensors: Tensors, name: str, change: Callable[[torch.Tensor], object]) -> None:
    before = tensors[name]
    values = torch.frombuffer(bytearray(before.content), dtype=DTYPES[before.dtype])
    change(values)
    tensors[name] = before._replace(content=values.view(torch.uint8).numpy().tobytes())
    assert tensors[name] != before


def said(folder: Path, tmp_path: Path) -> str:
    return refused("verify", folder, within=tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", f"{BLOCK}.1.up_proj.weight", "lm_head.weight"])
def test_a_number_that_is_not_finite_is_named(source: Path, tmp_path: Path, name: str, value: float) -> None:
    made = changed(source, tmp_path, lambda tensors: edit(tensors, name, lambda v: v[-1:].fill_(value)))
    assert f"{name} holds NaN or infinite numbers" in said(made, tmp_path)
    assert "--against SRC" in said(made, tmp_path)


def test_what_the_source_has_itself_is_no_fault_of_the_result(source: Path, tmp_path: Path) -> None:
    odd = changed(source, tmp_path, lambda t: edit(t, "model.norm.weight", lambda v: v[3:4].fill_(torch.nan)))
    succeeds("pack", odd, tmp_path / "packed")
    succeeds("verify", tmp_path / "packed", "--against", odd)
    succeeds("verify", tmp_path / "packed", "--against", odd, "--compare", "values")
    assert "model.norm.weight holds NaN" in said(tmp_path / "packed", tmp_path)


def test_a_scale_of_nan_is_named(good: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        is_exponent = tensors[part(tensors, *SCALES)].dtype == "U8"
        edit(tensors, part(tensors, *SCALES), lambda v: v[-1:].fill_(255 if is_exponent else torch.nan))

    assert "has scales that are NaN or infinite" in said(changed(good, tmp_path, change), tmp_path)


def test_a_scale_of_zero_is_named(good: Path, tmp_path: Path) -> None:
    if good.name == "mxfp4a16":
        pytest.skip("its scales are never zero")
    made = changed(good, tmp_path, lambda t: edit(t, part(t, *SCALES), lambda v: v[-1:].zero_()))
    assert "has scales of zero where codes are not zero" in said(made, tmp_path)


def test_codes_that_are_all_at_the_end_are_named(good: Path, tmp_path: Path) -> None:
    if good.name == "w4a16_asym":
        pytest.skip("its codes reach both ends by design")
    ends = {"fp8": 448.0, "w8a8": 127, "w4a16": -1, "nvfp4a16": 0x77, "mxfp4a16": 0x77, "nf4": 0xFF}
    made = changed(good, tmp_path, lambda t: edit(t, part(t, *CODES), lambda v: v.fill_(ends[good.name])))
    assert "has most of its codes at the largest magnitude" in said(made, tmp_path)


def test_an_expert_of_zeros_is_named(good: Path, tmp_path: Path) -> None:
    zero = {"w4a16": 0x88888888 - (1 << 32), "w4a16_asym": 0x88888888 - (1 << 32), "nf4": 0x77}.get(good.name, 0)

    def change(tensors: Tensors) -> None:
        edit(tensors, part(tensors, *CODES), lambda v: v.fill_(zero))
        for name in [name for name in tensors if good.name == "w4a16_asym" and name.endswith("zero_point")]:
            edit(tensors, name, lambda v: v.fill_(zero))

    assert "numbers are zero" in said(changed(good, tmp_path, change), tmp_path)


@pytest.mark.parametrize("layout", ["experts", "packed"])
def test_an_expert_of_zeros_in_full_precision_is_named(source: Path, tmp_path: Path, layout: str) -> None:
    folder = source
    if layout == "packed":
        succeeds("pack", source, tmp_path / "packed")
        folder = tmp_path / "packed"
    name = f"{BLOCK}.1.down_proj.weight" if layout == "experts" else f"{BLOCK}.down_proj"
    made = changed(folder, tmp_path, lambda t: edit(t, name, lambda v: v[-SIZE * SIZE :].zero_()))
    where = f"{name}: all of the expert's numbers" if layout == "experts" else f"{name}: all numbers of expert 1"
    assert where in said(made, tmp_path)


def test_scales_that_are_all_alike_are_named(source: Path, good: Path, tmp_path: Path) -> None:
    if good.name in ("fp8", "w4a16_asym", "w4a16"):
        pytest.skip("too few scales in so small a matrix, or codes that tell nothing")
    assert "has one and the same scale everywhere" in said(changed(good, tmp_path, _alike), tmp_path)


def _alike(tensors: Tensors) -> None:
    """One scale everywhere, and one block whose codes are small."""
    edit(tensors, part(tensors, *SCALES), lambda v: v.fill_(v[0].item()))
    name = part(tensors, *SCALES)
    codes = part(tensors, *(f"{name.rpartition('.')[0]}{end}" for end in (".weight_packed", ".weight", "")))
    small = {"I8": 3, "U8": 0x66 if codes.endswith("_proj") else 0x11}[tensors[codes].dtype]
    edit(tensors, codes, lambda v: v[:SIZE].fill_(small))


def test_ones_and_zeros_of_other_dtypes_are_left_alone(tmp_path: Path) -> None:
    """Ids and masks are no numbers to be finite, and a norm of ones is no constant scale."""
    tensors = weights(SIZE, seed=3, layers=1, experts=2)
    tensors["model.layers.0.mlp.gate.tid2eid"] = Tensor("I64", (4,), bytes(32))
    tensors["model.layers.0.mask"] = Tensor("BOOL", (4,), b"\1\0\1\0")
    tensors["model.layers.0.mlp.gate.e_score_correction_bias"] = stored(torch.zeros(2), torch.float32)
    folder = write_folder(tmp_path / "source", tensors, config_of(SIZE, num_hidden_layers=1, num_experts=2), 1)
    succeeds("verify", folder)
