"""MXFP4, MXFP8 and NVFP4 against compressed-tensors, and NVFP4 of ModelOpt against its formula by table."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")

from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme  # type: ignore[import-untyped]
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam  # type: ignore[import-untyped]
from safetensors.torch import load_file
from torch import Tensor

from moeconv.formats import FLOATS, make_format
from tests.compressed import compressor_of, settings_of
from tests.golden.sources import MATRICES, matrix_of
from tests.test_formats import TORCH_DTYPES, Choice, assert_same, encoded, gaussian, peak_of, sources

of_dtypes = pytest.mark.parametrize("dtype", FLOATS)
PRESETS = {"mxfp4a16": "MXFP4A16", "mxfp8a16": "MXFP8A16", "nvfp4a16": "NVFP4A16"}
COLUMNS = {"mxfp4a16": 32, "mxfp8a16": 32, "nvfp4a16": 16}
SHAPES = [(1, 32), (3, 96), (127, 64), (130, 256)]
MX = ("mxfp4a16", "mxfp8a16")


def reference(name: str, matrix: Tensor, factor: Tensor | None = None) -> dict[str, Tensor]:
    """What compressed-tensors makes of a matrix, with its division in float32 as on a GPU."""
    scheme: QuantizationScheme = preset_name_to_scheme(PRESETS[name], ["Linear"])
    groups = matrix.reshape(len(matrix), -1, COLUMNS[name])
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights, global_scale=factor)
    parts = {"weight": matrix.float(), "weight_scale": scale.float()}
    if factor is not None:
        parts["weight_global_scale"] = factor
    made: dict[str, Tensor] = compressor_of(scheme).compress(parts, scheme)
    return made


@pytest.mark.parametrize("name", MX)
@of_dtypes
def test_mx_is_that_of_compressed_tensors(name: str, dtype: str) -> None:
    for shape in SHAPES:
        for about, matrix in sources(shape, dtype).items():
            ours, expected = encoded(Choice(name, {}, 32), matrix, dtype), reference(name, matrix)
            most = matrix.float().reshape(shape[0], -1, 32).abs().amax(-1)
            is_large = most >= 1.75 * 2.0**127  # their nearest code would stand for infinity: they are refused
            if dtype == "F16":  # it takes groups below the normal numbers for zeros, and the largest for infinite
                is_small = (most > 0) & (most < torch.finfo(torch.float16).smallest_normal)
                is_other = is_small | (most >= 1.75 * 2.0**15)
                exact = reference(name, matrix.float())
                expected = {key: mixed(is_other, exact[key], expected[key]) for key in expected}
            assert ours.keys() == expected.keys()
            for suffix in ours:
                same = mixed(is_large, ours[suffix], expected[suffix])
                assert_same(ours[suffix], same, f"{about} {shape} {suffix}")
            decoded = make_format(name, {}).decode(ours, shape[1]).reshape(shape[0], -1, 32)
            error = (decoded - matrix.float().reshape(shape[0], -1, 32)).abs().amax(-1)
            assert (error <= most / 4).logical_or(most < 2**-120).logical_or(is_large).all(), about
            if is_large.any():
                assert (ours["weight_scale"][is_large] == 255).all(), about


def mixed(groups: Tensor, there: Tensor, elsewhere: Tensor) -> Tensor:
    """Bytes of one tensor where `groups` [rows, groups] says so, and of another elsewhere."""
    one, other = there.view(torch.uint8), elsewhere.view(torch.uint8)
    mask = groups.repeat_interleave(other.shape[1] // groups.shape[1], 1)
    return torch.where(mask, one, other).view(elsewhere.dtype)


@of_dtypes
def test_nvfp4_is_that_of_compressed_tensors(dtype: str) -> None:
    for shape in SHAPES:
        for about, matrix in sources(shape, dtype).items():
            for peak in (peak_of(matrix), 1.5 * peak_of(matrix)):  # of another matrix that shares the scale
                largest = torch.tensor(peak).clamp(max=torch.finfo(matrix.dtype).max).to(matrix.dtype)
                factor = generate_gparam(-largest, largest)
                if dtype == "F16" and bool((2688 / largest.float()) > 65504):  # it takes 1 where half has no room
                    factor = generate_gparam(-largest.float(), largest.float())
                made = make_format("nvfp4a16", {})
                parts = [part.suffix for part in made.parts(shape, dtype)]
                ours = dict(zip(parts, made.encode(matrix, float(largest)), strict=True))
                expected = reference("nvfp4a16", matrix, factor)
                assert ours.keys() == expected.keys()
                for suffix in ours:
                    assert_same(ours[suffix], expected[suffix], f"{about} {shape} {peak} {suffix}")


GOLDEN = load_file(Path(__file__).parent / "golden" / "modelopt.safetensors")


@pytest.mark.parametrize("kind", MATRICES)
@of_dtypes
def test_nvfp4_is_that_of_modelopt(kind: str, dtype: str) -> None:
    matrix = matrix_of(kind, dtype)
    ours = encoded(Choice("modelopt_nvfp4", {}, 16), matrix, dtype)
    for suffix, part in ours.items():
        assert_same(part, GOLDEN[f"{dtype}/{kind}/{suffix}"], f"{kind} {suffix}")


NUMBERS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
#: The largest magnitude that has each code but the last, and whether the border itself still has it: ties are even.
BORDERS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
STAYS = torch.tensor([True, False, True, False, True, False, True])


def codes_by_table(quotients: Tensor) -> Tensor:
    """Codes of E2M1, by comparing with every border."""
    magnitudes = quotients.abs()[..., None]
    above = torch.where(STAYS, magnitudes > BORDERS, magnitudes >= BORDERS).sum(-1)
    return (above + 8 * (quotients < 0)).to(torch.uint8)


@of_dtypes
def test_nvfp4_of_modelopt_is_its_formula(dtype: str) -> None:
    for shape in SHAPES:
        for about, matrix in sources(shape, dtype).items():
            peak = torch.tensor(peak_of(matrix))
            factor = peak / (6 * 448)
            if factor == 0:
                continue  # it divides by zero; see the next test
            most = matrix.float().reshape(shape[0], -1, 16).abs().amax(-1)
            scales = torch.where(most / (6 * factor) == 0, 1.0, most / (6 * factor)).clamp(2**-9, 448)
            stored = scales.to(torch.float8_e4m3fn)
            steps = (stored.float() * factor).repeat_interleave(16, 1)
            codes = codes_by_table(matrix.float() / steps)
            ours = encoded(Choice("modelopt_nvfp4", {}, 16), matrix, dtype)
            assert_same(ours["weight_scale_2"], factor, about)
            if factor >= torch.finfo(torch.float32).smallest_normal:
                assert_same(ours["weight_scale"], stored, f"{about} {shape}")
                assert_same(ours["weight"], codes[:, ::2] | codes[:, 1::2] << 4, f"{about} {shape}")


@pytest.mark.parametrize("name", ["nvfp4a16", "modelopt_nvfp4"])
@of_dtypes
def test_a_matrix_of_zeros_is_zero_and_finite(name: str, dtype: str) -> None:
    choice = Choice(name, {}, 16)
    ours = encoded(choice, torch.zeros((4, 64), dtype=TORCH_DTYPES[dtype]), dtype)
    assert all(bool(part.float().isfinite().all()) for part in ours.values())
    assert bool((choice.make().decode(ours, 64) == 0).all())


@pytest.mark.parametrize("name", PRESETS)
def test_settings_are_those_of_the_preset(name: str) -> None:
    preset = preset_name_to_scheme(PRESETS[name], ["Linear"])
    ours = QuantizationScheme(**make_format(name, {}).settings(), targets=["Linear"])
    assert settings_of(ours) == settings_of(preset)


def test_every_border_between_codes_is_where_it_belongs() -> None:
    """The border, and the floats above and below it, of both signs, in groups whose scale is one."""
    near = torch.cat([BORDERS, BORDERS.nextafter(torch.tensor(0.0)), BORDERS.nextafter(torch.tensor(9.0))])
    tiny = torch.tensor([0.0, -0.0, 1e-45, 2**-126, 2**-149, 5.999, 6.0])
    quotients = torch.cat([near, -near, tiny, -tiny])
    matrix = torch.zeros(len(quotients), 32)
    matrix[:, 0], matrix[:, 1] = 6.0, quotients
    ours = encoded(Choice("mxfp4a16", {}, 32), matrix, "F32")
    assert (ours["weight_scale"] == 127).all()
    assert_same(ours["weight_packed"][:, 0] >> 4, codes_by_table(quotients), "codes")


@pytest.mark.parametrize(("name", "most"), [("mxfp4a16", 0.135), ("nvfp4a16", 0.11), ("modelopt_nvfp4", 0.11)])
def test_the_error_is_that_of_four_bits(name: str, most: float) -> None:
    matrix = gaussian((256, 512), 3) * 0.02
    choice = Choice(name, {}, 16)
    decoded = choice.make().decode(encoded(choice, matrix, "F32"), 512)
    assert most * 0.8 < float((decoded - matrix).norm() / matrix.norm()) < most
