"""`quantize --target-size`: what is chosen fits, loses least, and is an ordinary recipe."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from moeconv.errors import PlanError
from moeconv.formats import Probe, make_format
from moeconv.scheme import read_rules
from moeconv.sizing import Component, Option, choose
from tests.commands import refused, run, succeeds
from tests.meter import Meter
from tests.test_quantize import EVERY, FAMILIES, config_of, decoded, folder_tensors, sources

__all__ = ["sources"]  # a fixture

FORMATS = ("fp8_dynamic", "w8a16", "w4a16", "mxfp4a16")


def parts_of(module: str) -> tuple[str, str]:
    """What is decided together, and the projection."""
    experts = re.fullmatch(r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.\d+\.(\w+)", module)
    return (experts[1], experts[2]) if experts else (module.rpartition(".")[0], module.rpartition(".")[2])


def summed_error(source: Path, made: Path) -> float:
    """By definition: over parts and projections, squared difference by squares of the weights."""
    before, after = folder_tensors(source), decoded(made)
    squares: dict[tuple[str, str], list[float]] = {}
    for name, matrix in before.items():
        if matrix.dim() == 2:
            pair = squares.setdefault(parts_of(name.removesuffix(".weight")), [0.0, 0.0])
            pair[0] += float((after[name].double() - matrix.double()).square().sum())
            pair[1] += float(matrix.double().square().sum())
    return sum(error / norm for error, norm in squares.values())


def nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.fixture(scope="module")
def uniform(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Every format for the whole model."""
    folder = tmp_path_factory.mktemp("uniform")
    for model_type, name in itertools.product(("qwen3_moe", "deepseek_v3"), FORMATS):
        succeeds("quantize", sources[model_type], folder / model_type / name, "--format", name, "--no-fsync")
    return {
        model_type: {name: folder / model_type / name for name in FORMATS}
        for model_type in ("qwen3_moe", "deepseek_v3")
    }


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.98])
def test_the_choice_fits_and_no_uniform_one_loses_less(
    sources: dict[str, Path], uniform: dict[str, dict[str, Path]], tmp_path: Path, model_type: str, share: float
) -> None:
    sizes = {name: nbytes(folder) for name, folder in uniform[model_type].items()}
    whole = nbytes(sources[model_type])
    target = int(min(sizes.values()) + share * (whole - min(sizes.values())))
    made = tmp_path / "made"
    succeeds("quantize", sources[model_type], made, "--target-size", target, "--formats", ",".join(FORMATS))
    assert nbytes(made) <= target
    error = summed_error(sources[model_type], made)
    recipe = (tmp_path / "made.recipe.yaml").read_text()
    assert float(re.search(r"summed error (\S+)", recipe)[1]) == pytest.approx(error, rel=1e-3, abs=1e-9)  # type: ignore[index]
    for name, folder in uniform[model_type].items():
        if sizes[name] <= target:
            assert error <= summed_error(sources[model_type], folder) * (1 + 1e-9), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "made.recipe.yaml"]
    # What is kept by default is not touched by rules for its neighbours.
    before, after = folder_tensors(sources[model_type]), folder_tensors(made)
    for name in before:
        if any(word in name for word in ("q_a_proj", "kv_", "norm", "embed", "lm_head", "mlp.gate.")):
            assert torch.equal(before[name], after[name]), name


def test_the_recipe_makes_the_same_again(sources: dict[str, Path], tmp_path: Path) -> None:
    target = nbytes(sources["mixtral"]) // 2
    options = ("--target-size", target, "--formats", "w4a16,w8a16,nvfp4a16", "--group-size", 32, "--scale", "mse")
    shown = run("quantize", sources["mixtral"], tmp_path / "made", *options, "--dry-run")
    assert shown.code == 0
    assert "w8a16" in shown.out
    assert not (tmp_path / "made").exists()
    assert (tmp_path / "made.measured").exists()
    succeeds("quantize", sources["mixtral"], tmp_path / "made", *options)
    recipe = tmp_path / "made.recipe.yaml"
    assert "group_size: 32, search: mse" in recipe.read_text()
    again = succeeds("quantize", sources["mixtral"], tmp_path / "made", "--recipe", recipe)
    assert "already up to date" in again.out
    succeeds("quantize", sources["mixtral"], tmp_path / "other", "--recipe", recipe)
    first, second = folder_tensors(tmp_path / "made"), folder_tensors(tmp_path / "other")
    assert all(torch.equal(first[name].view(torch.uint8), item.view(torch.uint8)) for name, item in second.items())
    assert "already up to date" in succeeds("quantize", sources["mixtral"], tmp_path / "made", *options).out
    succeeds("verify", tmp_path / "made", "--against", sources["mixtral"])


def test_a_recipe_that_was_edited_is_not_lost(sources: dict[str, Path], tmp_path: Path) -> None:
    options = ("--target-size", nbytes(sources["mixtral"]) // 2, "--formats", "w4a16,w8a16")
    succeeds("quantize", sources["mixtral"], tmp_path / "made", *options)
    recipe = tmp_path / "made.recipe.yaml"
    recipe.write_text(recipe.read_text() + "# mine\n")
    result = run("quantize", sources["mixtral"], tmp_path / "made", *options)
    assert result.code == 1
    assert "another recipe than the one chosen now" in result.err
    assert recipe.read_text().endswith("# mine\n")
    succeeds("quantize", sources["mixtral"], tmp_path / "made", *options, "--overwrite")
    assert "# mine" not in recipe.read_text()


def test_a_quantized_source_keeps_its_codes_where_that_is_chosen(sources: dict[str, Path], tmp_path: Path) -> None:
    """Its own format costs no error there, so nothing else is chosen for its size."""
    succeeds("quantize", sources["qwen3_moe"], tmp_path / "first", "--format", "w4a16")
    target = int(nbytes(tmp_path / "first") * 1.1)
    succeeds("quantize", tmp_path / "first", tmp_path / "made", "--target-size", target, "--formats", "w4a16,mxfp4a16")
    rules = read_rules((tmp_path / "made.recipe.yaml").read_text(), "")
    assert rules is not None
    assert {rule.format.name for rule in rules[0] if rule.format} == {"w4a16"}
    first, made = folder_tensors(tmp_path / "first"), folder_tensors(tmp_path / "made")
    assert all(torch.equal(first[name], item) for name, item in made.items() if name.endswith("packed"))


def test_what_is_ignored_is_kept(sources: dict[str, Path], tmp_path: Path) -> None:
    options = ("--formats", "w4a16", "--ignore", "*.layers.0.*")
    message = run("quantize", sources["mixtral"], tmp_path / "made", "--target-size", "1GB", *options).err
    assert "the model fits 1 GB as it is" in message
    target = int(nbytes(sources["mixtral"]) * 0.8)
    succeeds("quantize", sources["mixtral"], tmp_path / "made", "--target-size", target, *options)
    assert not any(".layers.0." in name for name in folder_tensors(tmp_path / "made") if "packed" in name)
    rules = (tmp_path / "made.recipe.yaml").read_text().partition("# To make")[0]
    assert "layers.0." not in rules


def test_fp8_is_taken_in_the_form_that_can_be_mixed(sources: dict[str, Path], tmp_path: Path) -> None:
    target = nbytes(sources["mixtral"]) // 2
    options = ("--target-size", target, "--formats", "fp8,w4a16")
    result = succeeds("quantize", sources["mixtral"], tmp_path / "made", *options)
    assert "fp8_dynamic is taken" in result.err
    assert config_of(tmp_path / "made")["quantization_config"]["quant_method"] == "compressed-tensors"


def test_options_of_formats_are_written_as_recipes_have_them(sources: dict[str, Path], tmp_path: Path) -> None:
    target = int(nbytes(sources["mixtral"]) * 0.8)
    options = ("--target-size", target, "--formats", "fp8", "--ue8m0")
    succeeds("quantize", sources["mixtral"], tmp_path / "made", *options)
    assert "ue8m0: true" in (tmp_path / "made.recipe.yaml").read_text()
    options = ("--target-size", target, "--formats", "w4a16", "--formats", "nvfp4a16", "--scale", "four_over_six")
    succeeds("quantize", sources["mixtral"], tmp_path / "other", *options)


@pytest.mark.parametrize("share", [0.1, 0.35, 0.5, 0.75])
def test_many_files_do_not_make_it_larger_and_the_command_can_be_repeated(
    sources: dict[str, Path], uniform: dict[str, dict[str, Path]], tmp_path: Path, share: float
) -> None:
    least = nbytes(uniform["qwen3_moe"]["mxfp4a16"])
    target = int(least * 1.02 + share * (nbytes(sources["qwen3_moe"]) - least))
    options = ("--target-size", target, "--formats", ",".join(FORMATS), "--max-shard-size", "100kB")
    assert run("quantize", sources["qwen3_moe"], tmp_path / "made", *options, "--dry-run").code == 0
    succeeds("quantize", sources["qwen3_moe"], tmp_path / "made", *options)
    assert len(list((tmp_path / "made").glob("*.safetensors"))) > 5
    assert nbytes(tmp_path / "made") <= target
    assert "already up to date" in succeeds("quantize", sources["qwen3_moe"], tmp_path / "made", *options).out
    recipe = tmp_path / "made.recipe.yaml"
    (words,) = re.findall("# To make the same again, give --recipe together with (.*)", recipe.read_text())
    again = succeeds("quantize", sources["qwen3_moe"], tmp_path / "made", "--recipe", recipe, *words.split())
    assert "already up to date" in again.out


@pytest.mark.parametrize("name", ["w4a16", "nvfp4a16", "fp8_dynamic"])
def test_a_size_that_one_format_makes_can_be_had_to_the_byte(
    sources: dict[str, Path], tmp_path: Path, name: str
) -> None:
    succeeds("quantize", sources["mixtral"], tmp_path / "one", "--format", name)
    # Only the manifests differ: rules are longer than a name, and each command has words of its own.
    spare = 3000
    target = nbytes(tmp_path / "one") + spare
    succeeds("quantize", sources["mixtral"], tmp_path / "made", "--target-size", target, "--formats", name)
    assert nbytes(tmp_path / "made") <= target
    one, made = folder_tensors(tmp_path / "one"), folder_tensors(tmp_path / "made")
    assert one.keys() == made.keys()


def test_scales_that_do_not_fit_together_are_measured_as_they_are_encoded(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    succeeds("quantize", sources["mixtral"], tmp_path / "first", "--format", "nvfp4a16")
    tensors = folder_tensors(tmp_path / "first")
    for name in [name for name in tensors if name.endswith("w1.weight_global_scale")]:
        tensors[name] = tensors[name] * 0.7
    for path in (tmp_path / "first").glob("*.safetensors*"):
        path.unlink()
    (tmp_path / "first" / "moeconv.json").unlink()
    save_file(tensors, tmp_path / "first" / "model.safetensors")
    target = nbytes(tmp_path / "first") + 30_000
    options = ("--target-size", target, "--formats", "nvfp4a16")
    result = succeeds("quantize", tmp_path / "first", tmp_path / "made", *options)
    assert "they are encoded anew" in result.err
    assert float(re.search(r"summed error (\S+)", (tmp_path / "made.recipe.yaml").read_text())[1]) > 1e-4  # type: ignore[index]


def test_what_stands_in_the_way_is_found_before_anything_is_measured(sources: dict[str, Path], tmp_path: Path) -> None:
    options = ("--target-size", nbytes(sources["mixtral"]) // 2, "--formats", "w4a16,w8a16")
    (tmp_path / "made").mkdir()
    assert "moeconv did not make it" in run("quantize", sources["mixtral"], tmp_path / "made", *options).err
    (tmp_path / "other.recipe.yaml").write_bytes(b"\xff\xfe")
    assert "exists and is no recipe" in run("quantize", sources["mixtral"], tmp_path / "other", *options).err
    small = ("--target-size", "100kB", "--formats", "w4a16")
    assert "the smallest folder" in run("quantize", sources["mixtral"], tmp_path / "small", *small).err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "other.recipe.yaml"]


WRONG = [
    pytest.param(("--target-size", "1MB"), 2, "--target-size and --formats go together", id="no formats"),
    pytest.param(("--formats", "w4a16"), 2, "--target-size and --formats go together", id="no size"),
    pytest.param(("--target-size", "9MB", "--formats", "w4a16", "--format", "fp8"), 2, "without --format", id="both"),
    pytest.param(("--target-size", "9MB", "--formats", "w3a16"), 2, "'w3a16' is no format", id="unknown"),
    pytest.param(("--target-size", "9MB", "--formats", " , "), 2, "--formats names no format", id="none"),
    pytest.param(("--target-size", "9MB", "--formats", "w8a8,fp8_block", "--scale", "mse"), 2,
                 "none of w8a8, fp8_block takes --scale mse", id="option that none takes"),
    pytest.param(("--target-size", "9MB", "--formats", "modelopt_nvfp4,w8a8"), 2, "cannot stand beside", id="alone"),
    pytest.param(("--target-size", "9MB", "--formats", "nf4"), 2, "not quantized one by one", id="packed"),
    pytest.param(("--target-size", "9MB", "--formats", "w8a8", "--experts", "keep"), 2, "go with --format", id="keep"),
    pytest.param(("--target-size", "big", "--formats", "w4a16"), 2, "'big'", id="no size that can be read"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "code", "says"), WRONG)
def test_a_command_line_that_cannot_be_right(
    sources: dict[str, Path], tmp_path: Path, options: tuple[str, ...], code: int, says: str
) -> None:
    assert says in refused("quantize", sources["mixtral"], tmp_path / "made", *options, within=tmp_path, code=code)


def test_a_size_that_nothing_fits_names_the_least(sources: dict[str, Path], tmp_path: Path) -> None:
    result = run("quantize", sources["mixtral"], tmp_path / "made", "--target-size", "200kB", "--formats", "w4a16")
    assert result.code == 1
    assert "the smallest folder that these formats can make is" in result.err
    assert not (tmp_path / "made").exists()


# --- the choice


def component(sizes: Sequence[int], errors: Sequence[float]) -> Component:
    formats = [make_format("w4a16", {"group_size": 8 * (number + 1)}) for number in range(len(sizes))]
    return Component(
        (), (), tuple(Option(made, *pair) for made, pair in zip(formats, zip(sizes, errors, strict=True), strict=True))
    )


def least(parts: Sequence[Component], room: int) -> float:
    """By trying everything."""
    every = itertools.product(*(part.options for part in parts))
    return min(sum(o.error for o in options) for options in every if sum(o.nbytes for o in options) <= room)


@pytest.mark.parametrize("seed", range(60))
def test_the_choice_is_the_best_there_is(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 6)
    parts = []
    for _ in range(count):
        sizes = sorted(draw.sample(range(1, 4000), 3))
        parts.append(component(sizes, sorted((draw.random() for _ in sizes), reverse=True)))
    smallest, largest = (sum(pick(o.nbytes for o in part.options) for part in parts) for pick in (min, max))
    for room in {smallest, largest, draw.randint(smallest, largest), draw.randint(smallest, largest)}:
        chosen = choose(parts, room)
        assert sum(option.nbytes for option in chosen) <= room
        assert all(option in part.options for part, option in zip(parts, chosen, strict=True))
        assert sum(option.error for option in chosen) == pytest.approx(least(parts, room))
    with pytest.raises(PlanError, match="the smallest that these formats can make"):
        choose(parts, smallest - 1)


def test_a_choice_for_a_thousand_large_parts_is_quick_and_nearly_full() -> None:
    draw = random.Random(1)
    parts = []
    for _ in range(1000):
        size = draw.randint(10**8, 10**10)
        parts.append(component([size // 4, size // 2, size], [0.012, 0.0007 * draw.uniform(0.5, 2), 0.0]))
    room = sum(part.options[0].nbytes for part in parts) * 3 // 2
    chosen = choose(parts, room)
    used = sum(option.nbytes for option in chosen)
    assert 0.999 * room < used <= room


@pytest.mark.parametrize("names", [("fp8_dynamic",), ("nvfp4a16", "w4a16_asym"), tuple(FORMATS)], ids=str)
def test_measuring_holds_no_more_than_it_says(names: tuple[str, ...]) -> None:
    probe = Probe([make_format(name, {}) for name in names])
    matrix = torch.randn(512, 1024, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    with Meter(matrix) as used:
        errors, norms = probe.encode(matrix, float(matrix.abs().max()))
    assert used.peak <= probe.live_nbytes * matrix.numel()
    assert [tuple(errors.shape), tuple(norms.shape)] == [part.shape for part in probe.parts((512, 1024), "BF16")]
    assert torch.allclose(norms.sum(), matrix.double().square().sum())


def test_a_format_that_cannot_have_a_matrix_is_not_chosen_for_it(tmp_path: Path) -> None:
    """Experts of 192 columns are made of no whole groups of 128: they are kept, or get the other format."""
    config = {**FAMILIES["mixtral"], **EVERY, "intermediate_size": 192, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("mixtral", **config))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    target = int(nbytes(tmp_path / "source") * 0.6)
    options = ("--target-size", target, "--formats", "w4a16,fp8_dynamic")
    succeeds("quantize", tmp_path / "source", tmp_path / "made", *options)
    made = folder_tensors(tmp_path / "made")
    experts = {item.dtype for name, item in made.items() if ".experts." in name and "scale" not in name}
    assert experts == {torch.float8_e4m3fn}
