"""What moeconv.json tells of a folder: where it comes from, what it holds, and what it lost."""

import hashlib
import json
import math
import platform
import struct
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeconv.checkpoint import open_checkpoint
from moeconv.executor import execute
from moeconv.formats import FORMATS
from moeconv.plan import Options
from moeconv.quantize import plan_quantize
from moeconv.scheme import build_scheme
from moeconv.selection import select_recipe
from tests.commands import succeeds
from tests.faults import DyingFiles, Killed
from tests.folders import CONFIG, experts_layout, write_folder

HIDDEN, INNER, EXPERTS, LAYERS = 256, 128, 8, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of weights that look like weights, in two files."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    parts: list[dict[str, torch.Tensor]] = [{}, {}]
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        found = {f"{block}.mlp.gate.weight": (EXPERTS, HIDDEN), f"{block}.self_attn.o_proj.weight": (HIDDEN, HIDDEN)}
        found |= {f"{block}.self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkv"}
        for expert in range(EXPERTS):
            for part, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
                found[f"{block}.mlp.experts.{expert}.{part}_proj.weight"] = shape
        for name, shape in found.items():
            parts[layer > 0][name] = (torch.randn(shape) * 0.02).bfloat16()
    index: dict[str, Any] = {"weight_map": {}}
    for number, part in enumerate(parts):
        save_file(part, folder / f"model-{number + 1}.safetensors")
        index["weight_map"] |= dict.fromkeys(part, f"model-{number + 1}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"num_experts": EXPERTS, "num_hidden_layers": LAYERS, "hidden_size": HIDDEN}
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config, "moe_intermediate_size": INNER}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def manifest_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "moeconv.json").read_text())
    return content


def header_sha256(path: Path) -> str:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return hashlib.sha256(content[: 8 + length]).hexdigest()


@pytest.mark.parametrize("option", [[], ["--hash"]], ids=["", "hash"])
def test_every_file_is_listed(model: Path, tmp_path: Path, option: list[str]) -> None:
    result = succeeds("quantize", model, tmp_path / "x", "--format", "fp8", "--max-shard-size", "900kB", *option)
    manifest = manifest_of(tmp_path / "x")
    listed = {item["path"]: item for item in manifest["files"]}
    assert listed.keys() == {path.name for path in (tmp_path / "x").iterdir()} - {"moeconv.json"}
    assert len(listed) > 4
    for name, item in listed.items():
        path = tmp_path / "x" / name
        assert item["bytes"] == path.stat().st_size
        if path.suffix == ".safetensors":
            assert item["header_sha256"] == header_sha256(path)
        if option:
            assert item["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert ("sha256" in item) == bool(option)
    assert ("s for sha256" in result.out) == bool(option)
    for file in manifest["source"]["files"]:
        assert file["header_sha256"] == header_sha256(model / file["path"])


def test_tool_libraries_command_and_recipe_are_told(model: Path, tmp_path: Path) -> None:
    succeeds("quantize", model, tmp_path / "x", "--format", "w8a16")
    manifest = manifest_of(tmp_path / "x")
    assert manifest["libraries"] == {
        "python": platform.python_version(), "numpy": version("numpy"), "torch": version("torch")
    }  # fmt: skip
    assert manifest["command"] == ["quantize", str(model), str(tmp_path / "x"), "--format", "w8a16"]
    assert manifest["recipe"]["text"] == succeeds("recipes", "show", manifest["recipe"]["name"]).out
    assert manifest["devices"] == ["cpu"]
    succeeds("pack", model, tmp_path / "y")
    assert manifest_of(tmp_path / "y")["libraries"].keys() == {"python"}


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "int8"])
def test_what_a_format_loses_is_what_decoding_shows(model: Path, tmp_path: Path, name: str) -> None:
    succeeds("quantize", model, tmp_path / "x", "--format", name)
    errors = manifest_of(tmp_path / "x")["errors"]
    said = errors[name]
    is_packed = name in ("nf4", "fp4")  # gate and up of an expert are one matrix then
    assert said["matrices"] == LAYERS * (EXPERTS * (2 if is_packed else 3) + 4)
    assert said["kept_codes"] == 0
    assert 2 <= said["sampled"] <= said["matrices"]
    succeeds("dequantize", tmp_path / "x", tmp_path / "y", "--dtype", "float32")
    succeeds("unpack", tmp_path / "y", tmp_path / "z") if is_packed else (tmp_path / "y").rename(tmp_path / "z")
    before = {key: item for path in model.glob("*.safetensors") for key, item in load_file(path).items()}
    after = {key: item for path in (tmp_path / "z").glob("*.safetensors") for key, item in load_file(path).items()}
    keys = [key for key in before if "_proj" in key]
    difference = sum(float((before[key].float() - after[key].float()).double().square().sum()) for key in keys)
    norm = sum(float(before[key].double().square().sum()) for key in keys)
    assert said["relative_error"] == pytest.approx((difference / norm) ** 0.5, rel=0.1)
    assert said["snr_db"] == pytest.approx(-20 * math.log10(said["relative_error"]), abs=0.01)
    assert said["worst"]["relative_error"] >= said["relative_error"]


def test_codes_that_are_kept_lose_nothing_and_are_told(model: Path, tmp_path: Path) -> None:
    succeeds("quantize", model, tmp_path / "x", "--format", "fp8")
    succeeds("quantize", tmp_path / "x", tmp_path / "y", "--format", "fp8")
    assert manifest_of(tmp_path / "y")["errors"]["fp8"] == {"matrices": 84, "kept_codes": 84, "sampled": 0}


@pytest.mark.parametrize("name", ["w4a16", "nf4", "nvfp4a16"])
def test_runs_of_one_plan_write_the_same_bytes_whatever_happens_to_them(
    model: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeconv.tasks.TASK_BYTES", 30_000)

    def run(target: Path, jobs: int, memory: int | None, **how: Any) -> None:
        checkpoint = open_checkpoint(model)
        scheme, _ = build_scheme(name, {}, None, (), (), None, False)
        options = Options(jobs=jobs, max_memory=memory, max_shard_nbytes=500_000)
        made = plan_quantize(checkpoint, select_recipe(checkpoint), scheme, options)
        execute(made, target, ["test"], **how)

    run(tmp_path / "plain", 1, None)
    run(tmp_path / "small", 2, 410_000_000)
    for number in (60, 120):  # some tasks are journalled then
        with pytest.raises(Killed):
            run(tmp_path / "cut", 2, None, files=DyingFiles(number))
    run(tmp_path / "cut", 1, None)
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    assert json.loads(wanted["moeconv.json"])["errors"][name]["sampled"]
    for other in ("small", "cut"):
        assert {path.name: path.read_bytes() for path in (tmp_path / other).iterdir()} == wanted


def test_repository_and_revision_of_a_download_are_told(tmp_path: Path) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    blobs = write_folder(tmp_path / "blobs", experts_layout(), CONFIG, 1)
    snapshot = tmp_path / "models--some-org--a--b" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    succeeds("pack", snapshot, tmp_path / "x")
    source = manifest_of(tmp_path / "x")["source"]
    assert (source["id"], source["revision"]) == ("some-org/a/b", revision)
    note = blobs / ".cache" / "huggingface" / "download" / "config.json.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{revision}\netag\n1700000000.0\n")
    succeeds("pack", blobs, tmp_path / "y")
    source = manifest_of(tmp_path / "y")["source"]
    assert (source["id"], source["revision"]) == (None, revision)
    note.write_text("no revision")
    succeeds("pack", blobs, tmp_path / "z")
    assert manifest_of(tmp_path / "z")["source"]["revision"] is None


def test_looking_at_what_is_lost_changes_nothing_of_it(model: Path, tmp_path: Path) -> None:
    """Nor of float32 sources, whose tiles are looked at where they lie."""
    wide = tmp_path / "wide"
    wide.mkdir()
    for path in model.iterdir():
        if path.suffix == ".safetensors":
            save_file({name: item.float() for name, item in load_file(path).items()}, wide / path.name)
        else:
            (wide / path.name).write_bytes(path.read_bytes())
    for source in (model, wide):
        made: list[dict[str, bytes]] = []
        for sampled in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                if not sampled:
                    patch.setattr("moeconv.quantize.sampled_matrices", lambda kinds: frozenset())
                target = tmp_path / f"{source.name}-{sampled}"
                succeeds("quantize", source, target, "--format", "fp8_block")
            made.append({path.name: path.read_bytes() for path in target.glob("*.safetensors")})
            assert bool(manifest_of(target)["errors"]["fp8_block"]["sampled"]) == sampled
        assert made[0] == made[1]
