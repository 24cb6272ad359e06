"""Every format against the libraries that define it: transformers for `fp8`, compressed-tensors for the others."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")
pytest.importorskip("transformers")

from compressed_tensors.compressors.format import infer_module_format  # type: ignore[import-untyped]
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # type: ignore[import-untyped]
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme  # type: ignore[import-untyped]
from torch import Tensor
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from moeconv.formats import FLOATS, FORMATS, Format, format_name, make_format
from tests.commands import BITSANDBYTES
from tests.compressed import (
    PRESETS,
    compressor_of,
    in_float32,
    reference_compressed,
    reference_decompressed,
    reference_parameters,
    settings_of,
    squared_error,
)
from tests.meter import Meter

TORCH_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8,
}  # fmt: skip
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


class Choice(NamedTuple):
    """A format with options, and the columns that a block or group of it has."""

    name: str
    options: dict[str, Any]
    columns: int = 128

    def __str__(self) -> str:
        return " ".join((self.name, *(f"{key}={value}" for key, value in self.options.items())))

    def make(self) -> Format:
        return make_format(self.name, self.options)

    def scheme(self) -> QuantizationScheme:
        """From the preset, not from what the format says of itself."""
        scheme = preset_name_to_scheme(PRESETS[self.name], ["Linear"])
        if "group_size" in self.options:
            scheme.weights.group_size = self.options["group_size"]
        return scheme


FINE_GRAINED = [Choice("fp8", {}), Choice("fp8", {"ue8m0": True})]
PACKED = [
    Choice("w4a16", {}), Choice("w4a16", {"group_size": 32}, 32), Choice("w4a16", {"group_size": 12}, 12),
    Choice("w8a16", {}), Choice("w8a16", {"group_size": 6}, 6),
    Choice("w4a16_asym", {}), Choice("w4a16_asym", {"group_size": 12}, 12),
]  # fmt: skip
COMPRESSED = [Choice("fp8_dynamic", {}), Choice("fp8_block", {}), Choice("w8a8", {}), *PACKED]
SEARCHED = [
    *(Choice(name, {"search": "mse"}) for name in ("w4a16", "w8a16", "w4a16_asym")),
    Choice("w4a16_asym", {"group_size": 6, "search": "mse"}, 6),
    Choice("w4a16", {"search": "full_range"}), Choice("w8a16", {"search": "full_range", "group_size": 32}, 32),
    *(Choice(name, {"search": search}, 16) for name in ("nvfp4a16", "modelopt_nvfp4")
      for search in ("four_over_six", "mse")),
    Choice("mxfp4a16", {"search": "mse"}, 32),
]  # fmt: skip
MX = [Choice("mxfp4a16", {}, 32), Choice("mxfp8a16", {}, 32)]
NVFP4 = [Choice("nvfp4a16", {}, 16), Choice("modelopt_nvfp4", {}, 16)]
EVERY = [*FINE_GRAINED, *COMPRESSED, *SEARCHED, *MX, *NVFP4]

of_fine_grained = pytest.mark.parametrize("choice", FINE_GRAINED, ids=str)
of_compressed = pytest.mark.parametrize("choice", COMPRESSED, ids=str)
of_every = pytest.mark.parametrize("choice", EVERY, ids=str)
of_dtypes = pytest.mark.parametrize("dtype", FLOATS)


def shapes_of(choice: Choice) -> list[tuple[int, int]]:
    """Square, tall, wide and odd shapes, as far as the format has them."""
    if choice.name == "fp8":
        return [(128, 128), (256, 256), (384, 128), (128, 384)]
    if choice.name in ("fp8_dynamic", "fp8_block", "w8a8"):
        return [(1, 1), (1, 300), (3, 129), (127, 128), (129, 127), (128, 128), (576, 130)]
    size = choice.columns
    return [(1, size), (1, 6 * size), (3, 3 * size), (127, size), (129, 2 * size), (128, 128 // size * size),
            (576, size)]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other at every small step take several times as long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gaussian(shape: tuple[int, int], seed: int) -> Tensor:
    made: Tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made


def sources(shape: tuple[int, int], dtype: str) -> dict[str, Tensor]:
    """Matrices of one shape that a format may meet, by what is special about them."""
    kind = TORCH_DTYPES[dtype]
    limits = torch.finfo(kind)
    base = gaussian(shape, 1) * 0.02
    cells = gaussian((-(-shape[0] // 128), -(-shape[1] // 6)), 2)
    # One random number for 128 rows and 6 columns: zeros for whole rows of groups, blocks and parts of them.
    areas = cells.repeat_interleave(128, 0).repeat_interleave(6, 1)[: shape[0], : shape[1]]
    bits = torch.randint(-(1 << 31), 1 << 31, shape, generator=torch.Generator().manual_seed(3))
    random_bits = bits.to(BITS[kind]).view(kind)
    signs = gaussian(shape, 4).sign()
    outlier = base.clone()
    outlier[-1, -1] = -3e4
    rows = torch.arange(shape[0])[:, None]
    made = {
        "gaussian": base,
        "zeros": torch.zeros(shape),
        "negative zeros": -torch.zeros(shape),
        "zeros of both signs among numbers": torch.where(areas > 0, base, base.sign() * 0.0),
        "zero rows": base * (rows % 3 == 1),
        "all positive": base.abs(),
        "all negative": -base.abs(),
        "one outlier": outlier,
        "largest finite": signs * limits.max,
        "largest positive": torch.full(shape, limits.max),
        "smallest subnormals": (signs * limits.smallest_normal * limits.eps).to(kind),
        "subnormals": torch.where(areas > 0, signs * limits.smallest_normal * gaussian(shape, 5).abs() / 8, 0.0),
        # A scale that is itself the smallest subnormal stands for up to half as much again: quotients out of range.
        "few smallest subnormals": torch.fmod(base * 1e6, 660).trunc() * limits.smallest_normal * limits.eps,
        "small": gaussian(shape, 6) * limits.smallest_normal * 300,
        "every magnitude": gaussian(shape, 7) * torch.exp2(areas * 30 if dtype != "F16" else areas * 5),
        # Multiples of a half of a power of two: quotients lie on the borders between codes.
        "ties": torch.randint(-15, 16, shape, generator=torch.Generator().manual_seed(8)) / 2.0,
        "random bits": torch.where(random_bits.isfinite(), random_bits, 0),
    }
    return {name: matrix.to(kind) for name, matrix in made.items()}


def encoded(choice: Choice, matrix: Tensor, dtype: str) -> dict[str, Tensor]:
    """Parts that have rows, by suffix."""
    made = choice.make()
    parts = [part for part in made.parts(tuple(matrix.shape), dtype) if part.rows]
    return {part.suffix: tensor for part, tensor in zip(parts, made.encode(matrix, peak_of(matrix)), strict=True)}


def peak_of(matrix: Tensor) -> float:
    """Largest magnitude of the finite values."""
    return float(matrix.nan_to_num(0.0, 0.0, 0.0).abs().amax())


def raw(tensor: Tensor) -> Tensor:
    """Its bytes, by way of a copy: an axis of size 1 may have a stride that no view accepts."""
    return tensor.reshape(-1, *tensor.shape[1:]).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def assert_same(ours: Tensor, reference: Tensor, what: str) -> None:
    """The same dtype, shape and bytes."""
    assert ours.dtype == reference.dtype, what
    assert ours.shape == reference.shape, what
    assert ours.reshape(-1, *ours.shape[1:]).view(torch.uint8).is_contiguous(), (
        what
    )  # which includes the strides of axes of size 1
    differing = int((raw(ours) != raw(reference)).sum())
    assert not differing, f"{what}: {differing} of {ours.nbytes} bytes differ"


# --- transformers


def transformers_fp8(matrix: Tensor, ue8m0: bool) -> dict[str, Tensor]:
    config = FineGrainedFP8Config(weight_block_size=(128, 128), scale_fmt="ue8m0" if ue8m0 else "float")
    made: dict[str, Tensor] = Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"weight": matrix})  # type: ignore[no-untyped-call, arg-type]
    lost = made["weight_scale_inv"].float() == 0
    if lost.any():  # 448 / amax overflowed: transformers multiplies by infinity, which is the one thing not to repeat
        inside = lost.repeat_interleave(128, 0).repeat_interleave(128, 1)
        made["weight_scale_inv"] = torch.where(lost, 1.0, made["weight_scale_inv"])
        codes = torch.where(
            inside, matrix.float().to(torch.float8_e4m3fn).view(torch.uint8), made["weight"].view(torch.uint8)
        )
        made["weight"] = codes.view(torch.float8_e4m3fn)
    return made


def test_small_values_never_become_nan() -> None:
    for name, matrix in sources((256, 256), "F32").items():
        for ue8m0 in (False, True):
            ours = encoded(Choice("fp8", {"ue8m0": ue8m0}), matrix, "F32")
            assert torch.isfinite(ours["weight"].float()).all() == torch.isfinite(matrix).all(), name
            assert (ours["weight_scale_inv"] > 0).all(), name


@of_fine_grained
@of_dtypes
def test_fp8_is_that_of_transformers(choice: Choice, dtype: str) -> None:
    for shape in shapes_of(choice):
        for name, matrix in sources(shape, dtype).items():
            reference = transformers_fp8(matrix, "ue8m0" in choice.options)
            ours = encoded(choice, matrix, dtype)
            assert ours.keys() == reference.keys()
            for suffix in ours:
                # transformers holds ue8m0 scales as E8M0, moeconv stores the same powers of two as F32.
                expected = reference[suffix]
                expected = expected.float() if suffix == "weight_scale_inv" else expected
                assert_same(ours[suffix], expected, f"{name} {shape} {suffix}")
            # An independent multiply: one scale for each element, by index.
            scale = reference["weight_scale_inv"].float()
            rows, columns = torch.arange(shape[0]) // 128, torch.arange(shape[1]) // 128
            product = reference["weight"].float() * scale[rows][:, columns]
            assert_same(choice.make().decode(ours, shape[1]), product, f"{name} {shape} decoded")


def test_every_power_of_two_that_a_scale_can_be_is_exact() -> None:
    """The largest magnitude of block j is 448 * 2^j, or the float above or below it: rounding up is decided there."""
    exponents = torch.arange(-126, 119)
    edges = 448.0 * torch.exp2(exponents.double()).float()
    for amax in (edges, edges.nextafter(torch.tensor(0.0)), edges.nextafter(torch.tensor(torch.inf))):
        matrix = torch.zeros(128, 128 * len(exponents))
        matrix[5, 7::128] = amax
        ours = encoded(Choice("fp8", {"ue8m0": True}), matrix, "F32")["weight_scale_inv"]
        reference = transformers_fp8(matrix, ue8m0=True)["weight_scale_inv"]
        assert_same(ours, reference.float(), "scales")
        assert (torch.frexp(ours).mantissa == 0.5).all()


# --- compressed-tensors


@of_compressed
@of_dtypes
def test_parts_are_those_of_compressed_tensors(choice: Choice, dtype: str) -> None:
    scheme = choice.scheme()
    for shape in shapes_of(choice):
        for name, matrix in sources(shape, dtype).items():
            ours = encoded(choice, matrix, dtype)
            reference = in_float32(scheme, matrix)
            for suffix, tensor in ours.items():
                assert_same(tensor, reference[suffix], f"{name} {shape} {suffix}")
            decoded = choice.make().decode(ours, shape[1])
            assert_same(decoded, reference_decompressed(scheme, reference), f"{name} {shape} decoded")


@of_compressed
@of_dtypes
def test_error_is_at_most_that_of_division_in_the_dtype_of_the_weights(choice: Choice, dtype: str) -> None:
    scheme = choice.scheme()
    differing = 0
    for shape in shapes_of(choice):
        for name, matrix in sources(shape, dtype).items():
            ours = encoded(choice, matrix, dtype)
            reference = reference_compressed(scheme, matrix, reference_parameters(scheme, matrix))
            codes = next(iter(ours))
            differing += int((raw(ours[codes]) != raw(reference[codes])).sum())
            error = squared_error(choice.make().decode(ours, shape[1]), matrix)
            theirs = squared_error(reference_decompressed(scheme, reference), matrix)
            assert error <= theirs or not theirs < torch.inf, f"{name} {shape}: {error} > {theirs}"
    assert (differing > 0) == (dtype != "F32")  # the two divisions do differ, or nothing is compared


@of_compressed
@of_dtypes
def test_names_dtypes_and_shapes_are_those_of_the_compressor(choice: Choice, dtype: str) -> None:
    scheme = choice.scheme()
    for shape in shapes_of(choice):
        matrix = gaussian(shape, 9).to(TORCH_DTYPES[dtype])
        reference = reference_compressed(scheme, matrix, reference_parameters(scheme, matrix))
        made = choice.make()
        parts = made.parts(shape, dtype)
        assert {part.suffix: (TORCH_DTYPES[part.dtype], part.shape) for part in parts} == {
            suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in reference.items()
        }
        assert {part.suffix for part in parts} == set(compressor_of(scheme).compression_param_names(scheme))
        for part in parts:
            if not part.rows:
                assert made.constant(part, shape, dtype) == reference[part.suffix].numpy().tobytes()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 33])
def test_codes_and_zero_points_are_packed_as_compressed_tensors_packs(bits: int, rows: int) -> None:
    """Every code at every place of a word, along columns and along rows."""
    from moeconv.formats.integers import _packed, _unpacked

    low = -(1 << bits - 1)
    codes = torch.arange(rows)[:, None] + torch.arange(300)
    codes = (codes % (1 << bits) + low).to(torch.int8)
    along_columns, along_rows = _packed(codes, bits), _packed(codes.T, bits).T
    assert_same(along_columns, pack_to_int32(codes, bits), "columns")
    assert_same(along_rows.contiguous(), pack_to_int32(codes, bits, packed_dim=0), "rows")
    assert_same(_unpacked(along_columns, bits)[:, :300].contiguous(), codes, "columns back")
    assert_same(_unpacked(along_rows.T, bits).T[:rows].contiguous(), codes, "rows back")


@of_compressed
def test_settings_are_those_of_the_preset(choice: Choice) -> None:
    ours, preset = QuantizationScheme(**choice.make().settings(), targets=["Linear"]), choice.scheme()
    assert settings_of(ours) == settings_of(preset)
    assert ours.format == infer_module_format(torch.nn.Linear, preset).value


@of_fine_grained
def test_settings_of_fp8_are_a_config_of_transformers(choice: Choice) -> None:
    made = choice.make()
    config = FineGrainedFP8Config.from_dict({"quant_method": made.quant_method, **made.settings()})  # type: ignore[no-untyped-call]
    assert tuple(config.weight_block_size) == (128, 128)
    assert config.activation_scheme == "dynamic"
    assert config.scale_fmt == ("ue8m0" if "ue8m0" in choice.options else "float")


# --- tiles


@of_every
@of_dtypes
def test_tiles_have_the_bytes_of_the_whole(choice: Choice, dtype: str) -> None:
    made = choice.make()
    for count in {"fp8": (256, 384), "fp8_block": (129, 300)}.get(choice.name, (19, 70)):
        shape = (count, 3 * choice.columns if choice.name != "fp8_block" else 300)
        # A tile's place in memory must not matter either, so tiles are views of the whole.
        matrix = sources(shape, dtype)["every magnitude"]
        parts = [part for part in made.parts(shape, dtype) if part.rows]
        peak = peak_of(matrix)
        whole = made.encode(matrix, peak)
        decoded = made.decode(dict(zip([part.suffix for part in parts], whole, strict=True)), shape[1])
        for step in {made.row_multiple, 2 * made.row_multiple, 5 * made.row_multiple}:
            tiles = [made.encode(matrix[first : first + step], peak) for first in range(0, count, step)]
            for number, part in enumerate(parts):
                if part.rows == count:  # of the whole matrix: every tile has it
                    assert all(torch.equal(raw(tile[number]), raw(whole[number])) for tile in tiles), part.suffix
                    continue
                joined = torch.cat([raw(tile[number]) for tile in tiles])
                assert_same(joined, raw(whole[number]), f"{part.suffix} in tiles of {step} rows")
            for first in range(0, count, step):
                last = min(first + step, count)
                rows_of_parts = {
                    part.suffix: tensor[first // part.rows : -(-last // part.rows)] if tensor.dim() else tensor
                    for part, tensor in zip(parts, whole, strict=True)
                }
                assert_same(made.decode(rows_of_parts, shape[1]), decoded[first:last], f"decoded rows {first}-{last}")


@of_every
@of_dtypes
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_parts_are_what_encode_returns_whatever_the_values(choice: Choice, dtype: str, device: str) -> None:
    made = choice.make()
    shapes = shapes_of(choice) if device == "cpu" else shapes_of(choice)[-1:]  # meta operations are slow
    for shape in shapes:
        tile = gaussian(shape, 10).to(TORCH_DTYPES[dtype]).to(device)
        parts = made.parts(shape, dtype)
        with_rows = [part for part in parts if part.rows]
        tensors = made.encode(tile, 0.1)
        assert [(TORCH_DTYPES[part.dtype], part.shape) for part in with_rows] == [
            (tensor.dtype, tuple(tensor.shape)) for tensor in tensors
        ]
        assert [tensor.device.type for tensor in tensors] == [device] * len(tensors)
        by_rows = [part for part in with_rows if not made.shares_scale or part.shape not in ((), (1,))]
        assert [part.shape[0] for part in by_rows] == [-(-shape[0] // part.rows) for part in by_rows]
        assert all(made.row_multiple % part.rows == 0 for part in by_rows)
        by_suffix = {part.suffix: tensor for part, tensor in zip(with_rows, tensors, strict=True)}
        decoded = made.decode(by_suffix, shape[1])
        assert (decoded.dtype, decoded.shape, decoded.device.type) == (torch.float32, shape, device)


def test_the_meter_sees_what_is_made_and_what_is_freed() -> None:
    source = torch.zeros(1000)
    with Meter(source) as meter:
        first = source + 1  # 8000 bytes live
        second = first.view(10, 100) * 2  # 12000, a view has none of its own
        del first
        second = second.mul_(2).to(torch.int8)  # 9000: the float goes when the name does
        assert sum(meter.sizes.values()) == 5000
    assert meter.peak == 12000


@of_every
@of_dtypes
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_live_bytes_stay_within_what_the_format_states(choice: Choice, dtype: str, device: str) -> None:
    """On "meta" as on a GPU, where a tile is not cut into strips."""
    made = choice.make()
    for shape in [(512, 512), (64, 4096), (129, 2040), (2048, 132)]:
        if made.refusal(shape, dtype) is not None:
            continue
        tile = gaussian(shape, 11).to(TORCH_DTYPES[dtype]).to(device)
        with Meter(tile) as meter:
            tensors = made.encode(tile, 0.1)
        assert meter.peak <= made.live_nbytes * tile.numel(), f"encode {shape}"
        suffixes = [part.suffix for part in made.parts(shape, dtype) if part.rows]
        parts = dict(zip(suffixes, tensors, strict=True))
        with Meter(*tensors) as meter:
            made.decode(parts, shape[1])
        assert meter.peak <= made.live_nbytes * tile.numel(), f"decode {shape}"


# --- the search for a scale


@pytest.mark.parametrize("searched", SEARCHED, ids=str)
@of_dtypes
def test_a_searched_scale_is_never_worse(searched: Choice, dtype: str) -> None:
    options = {key: value for key, value in searched.options.items() if key != "search"}
    choice = Choice(searched.name, options, searched.columns)
    lower = 0
    for shape in shapes_of(choice)[:4]:
        for name, matrix in sources(shape, dtype).items():
            plain = choice.make().decode(encoded(choice, matrix, dtype), shape[1])
            best = choice.make().decode(encoded(searched, matrix, dtype), shape[1])
            if dtype == "F32" and peak_of(matrix) > 1e18:
                continue  # the square of its error is beyond float32, in which errors are compared
            error, before = squared_error(best, matrix), squared_error(plain, matrix)
            # Errors are compared in float32 for the choice and in float64 here: a draw may go either way.
            assert error <= before * (1 + 1e-6) or not before < torch.inf, f"{name} {shape}"
            lower += error < before
    assert lower


@of_dtypes
def test_the_search_lowers_the_error(dtype: str) -> None:
    """Of Gaussian numbers, as the table in the README has it."""
    matrix = gaussian((512, 1024), 12).to(TORCH_DTYPES[dtype])

    def error(name: str, **options: Any) -> float:
        choice = Choice(name, options)
        decoded = choice.make().decode(encoded(choice, matrix, dtype), matrix.shape[1])
        return float((decoded - matrix.float()).norm() / matrix.float().norm())

    assert error("w4a16", search="mse") < 0.93 * error("w4a16")
    assert error("w4a16", search="full_range") < 0.885 * error("w4a16")
    assert error("w4a16_asym", search="mse") < 0.96 * error("w4a16_asym")
    for name in ("nvfp4a16", "modelopt_nvfp4"):
        assert error(name, search="four_over_six") < 0.92 * error(name)
        assert error(name, search="mse") < 0.86 * error(name)
    assert error("mxfp4a16", search="mse") < 0.998 * error("mxfp4a16")


# --- what cannot be encoded


@of_every
@of_dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_shows_in_a_scale(choice: Choice, dtype: str, value: float) -> None:
    """In one scale, which says where: among numbers and as the only one that is not zero."""
    for place, others in (((0, 0), 0.02), ((130, 250), 0.02), ((130, 250), 0.0), ((255, 255), 0.0)):
        matrix = gaussian((256, 256 // choice.columns * choice.columns), 13) * others
        matrix[place[0], place[1] % matrix.shape[1]] = value
        parts = encoded(choice, matrix.to(TORCH_DTYPES[dtype]), dtype)
        scale = next(part for suffix, part in parts.items() if suffix.startswith("weight_scale"))
        scale = scale.view(torch.float8_e8m0fnu).float() if scale.dtype == torch.uint8 else scale.float()
        assert scale.isfinite().logical_not().sum() == 1, f"{place} among {others}"


@of_every
def test_what_does_not_fit_is_refused(choice: Choice) -> None:
    made = choice.make()
    for dtype in FLOATS:
        assert all(made.refusal(shape, dtype) is None for shape in shapes_of(choice))
    fits = shapes_of(choice)[-1]
    for dtype in ("F64", "F8_E4M3", "I8", "I32", "U8", "BOOL"):
        assert dtype in (made.refusal(fits, dtype) or "")
    for shape in [(128,), (2, *fits), (), (0, 128), (128, 0)]:
        assert str(list(shape)) in (made.refusal(shape, "BF16") or "")
    if choice.name == "fp8":
        for shape in [(576, 128), (128, 192), (1, 128)]:
            assert str(list(shape)) in (made.refusal(shape, "BF16") or "")
    if choice.columns != 128 or choice.name in ("w4a16", "w8a16", "w4a16_asym"):
        for columns in (choice.columns + 1, choice.columns - 1, choice.columns // 2):
            assert str(columns) in (made.refusal((128, columns), "BF16") or "")


def test_every_format_is_tested() -> None:
    assert {choice.name for choice in EVERY} == FORMATS.keys() - BITSANDBYTES
    assert {(choice.name, option) for choice in EVERY for option in choice.options} == {
        (name, option) for name, (_, options) in FORMATS.items() for option in options if name not in BITSANDBYTES
    }
    assert all(choice.make().name == choice.name for choice in EVERY)
    assert format_name(" W4A16-asym\n") == "w4a16_asym"
