"""`moeconv quantize` against what llm-compressor's `model_free_ptq` wrote, see golden/make_llmcompressor.py.

All bytes are equal but those of codes of BF16 and F16 matrices. On a CPU llm-compressor divides in the dtype of the
weights, so its quotients are rounded twice; moeconv divides in float32, as llm-compressor itself does on a GPU.
compressed-tensors' own code shows that there is no other reason: with the one division it makes llm-compressor's
bytes, with the other those of moeconv.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")

from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme  # type: ignore[import-untyped]
from compressed_tensors.utils import match_name  # type: ignore[import-untyped]
from safetensors.torch import load_file, save_file

from tests.commands import succeeds
from tests.compressed import (
    PRESETS,
    in_float32,
    reference_compressed,
    reference_decompressed,
    reference_parameters,
    settings_of,
)
from tests.folders import Tensors, read_folder, write_folder
from tests.golden.sources import SOURCES, config_of, fingerprint, tensors_of

GOLDEN = Path(__file__).parent / "golden"
REFERENCE: dict[str, Any] = json.loads((GOLDEN / "llmcompressor.json").read_text())
PARTS = read_folder(GOLDEN)
#: Bytes of codes that differ: 1 to 7 % in BF16, 0.2 to 1.1 % in F16.
DIFFERING = {
    "bf16/FP8_DYNAMIC": 4096, "bf16/FP8_BLOCK": 3942, "bf16/W8A8": 16630, "bf16/W4A16": 1586, "bf16/W8A16": 18852,
    "bf16/W4A16_ASYM": 1832, "f16/FP8_DYNAMIC": 594, "f16/FP8_BLOCK": 659, "f16/W8A8": 2779, "f16/W4A16": 632,
    "f16/W8A16": 3006, "f16/W4A16_ASYM": 293, "f32/FP8_DYNAMIC": 0, "f32/FP8_BLOCK": 0, "f32/W8A8": 0, "f32/W4A16": 0,
    "f32/W8A16": 0, "f32/W4A16_ASYM": 0, "bf16-edges/FP8_DYNAMIC": 2128, "bf16-edges/W8A8": 8786,
}  # fmt: skip
of_runs = pytest.mark.parametrize("run", DIFFERING)


def source_of(run: str) -> Tensors:
    return tensors_of(SOURCES[run.split("/")[0]])


def quantized(folder: Path, run: str) -> tuple[Path, Path]:
    """A run's source, and what moeconv makes of it."""
    name, preset = run.split("/")
    source = write_folder(folder / "source", source_of(run), config_of(SOURCES[name]), shards=0)
    succeeds("quantize", source, folder / "made", "--format", preset)
    return source, folder / "made"


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> Tensors:
    """As a reader finds them on disk."""
    folder.mkdir()
    save_file({name: item.contiguous() for name, item in tensors.items()}, folder / "model.safetensors")
    return read_folder(folder)


def squared_errors(decoded: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Of each row; infinite where the largest of all numbers are decoded to infinity, which the format does."""
    return (decoded.double() - matrix.double()).square().sum(1)


def test_golden_vectors_are_complete() -> None:
    assert set(REFERENCE["codes"]) == set(DIFFERING)
    assert {run.split("/")[1] for run in DIFFERING} == set(PRESETS.values()) == set(REFERENCE["quantization_configs"])
    for name, source in SOURCES.items():
        made = {key: fingerprint(item) for key, item in tensors_of(source).items()}
        assert made == REFERENCE["sources"][name], "a source that llm-compressor has not seen"


@of_runs
def test_names_dtypes_shapes_scales_and_zero_points_are_those_of_llmcompressor(run: str, tmp_path: Path) -> None:
    source, codes = source_of(run), REFERENCE["codes"][run]
    parts = {key.removeprefix(f"{run}/"): item for key, item in PARTS.items() if key.startswith(f"{run}/")}
    kept = source.keys() - {key.removesuffix("_packed") for key in codes}
    ours = read_folder(quantized(tmp_path, run)[1])
    assert set(ours) == {*codes, *parts, *kept}
    for key, item in ours.items():
        if key in codes:
            assert fingerprint(item).rpartition(" ")[0] == codes[key].rpartition(" ")[0], key
        else:
            assert item == (parts[key] if key in parts else source[key]), key


@of_runs
def test_codes_differ_from_those_of_llmcompressor_only_by_the_division(run: str, tmp_path: Path) -> None:
    codes, scheme = REFERENCE["codes"][run], preset_name_to_scheme(run.split("/")[1], ["Linear"])
    source, made = quantized(tmp_path, run)
    matrices, found = load_file(source / "model.safetensors"), load_file(made / "model.safetensors")
    twice_rounded, in_single = {}, {}
    for key in codes:
        head, matrix = key.rpartition(".")[0], matrices[key.removesuffix("_packed")]
        reference = reference_compressed(scheme, matrix, reference_parameters(scheme, matrix))
        twice_rounded |= {f"{head}.{suffix}": item for suffix, item in reference.items()}
        in_single |= {f"{head}.{suffix}": item for suffix, item in in_float32(scheme, matrix).items()}
        ours = reference_decompressed(scheme, {suffix: found[f"{head}.{suffix}"] for suffix in reference})
        theirs = reference_decompressed(scheme, reference)
        assert (squared_errors(ours, matrix) <= squared_errors(theirs, matrix)).all(), key
    theirs_stored, ours_stored = stored(tmp_path / "theirs", twice_rounded), read_folder(made)
    assert {key: fingerprint(theirs_stored[key]) for key in codes} == codes
    assert {key: ours_stored[key] for key in in_single} == stored(tmp_path / "ours", in_single)
    pairs = [pair for key in codes for pair in zip(ours_stored[key].content, theirs_stored[key].content, strict=True)]
    assert sum(a != b for a, b in pairs) == DIFFERING[run]


@pytest.mark.parametrize("preset", REFERENCE["quantization_configs"])
def test_engines_read_the_same_from_both_configs(preset: str, tmp_path: Path) -> None:
    modules = [key.removesuffix(".weight") for key in source_of("bf16") if "norm" not in key]
    _, made = quantized(tmp_path, f"bf16/{preset}")
    mine = json.loads((made / "config.json").read_text())["quantization_config"]
    readings = []
    for config in (mine, REFERENCE["quantization_configs"][preset]):
        parsed = QuantizationConfig.model_validate(config)
        groups = [(set(group.targets), group.format, settings_of(group)) for group in parsed.config_groups.values()]
        ignored = {module for module in modules if any(match_name(module, pattern) for pattern in parsed.ignore)}
        readings.append(
            (config["quant_method"], parsed.format, parsed.quantization_status, parsed.kv_cache_scheme, groups, ignored)
        )
    assert readings[0] == readings[1]
