"""What a folder says of itself in config.json and moeconv.json, against its headers."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import refused, run, succeeds
from tests.folders import Tensors, read_folder, write_folder
from tests.weights import config_of, weights

SIZE = 128


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = config_of(SIZE, num_experts=2)
    return write_folder(tmp_path_factory.mktemp("claims") / "source", weights(SIZE, seed=9, experts=2), config, 2)


def made_of(source: Path, *command: str) -> Path:
    made = source.parent / "-".join(command)
    if not made.exists():
        succeeds(command[0], source, made, *command[1:], "--no-fsync")
    return made


def copied(folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], name: str = "config.json") -> Path:
    """A copy of a folder with one JSON file changed."""
    made = tmp_path / "changed"
    shutil.copytree(folder, made)
    said = json.loads((made / name).read_text())
    before = json.dumps(said)
    change(said)
    assert json.dumps(said) != before
    (made / name).write_text(json.dumps(said))
    return made


def wrong(folder: Path, tmp_path: Path) -> str:
    """What is said without a look at numbers; the same is said with it."""
    message = refused("verify", folder, "--structure", within=tmp_path)
    assert set(message.splitlines()) <= set(refused("verify", folder, within=tmp_path).splitlines())
    return message


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("num_hidden_layers", 3, "there are 3 layers; model.layers.{0..1} are there, missing: 2"),
        ("num_hidden_layers", 1, "there are 1 layers; the tensors have model.layers.{1} beyond them"),
        ("num_experts", 3, "has 2 of 3 experts; missing: 2"),
        ("moe_intermediate_size", 64, "I is 128 in the files and 64 in config.json"),
        ("hidden_size", 96, "H is 128 in the files and 96 in config.json"),
        ("vocab_size", 33, "model.embed_tokens.weight BF16 [32, 128] has 32 rows; "),
    ],
)  # fmt: skip
def test_a_size_that_is_not_the_tensors_is_named(source: Path, tmp_path: Path, key: str, value: int, says: str) -> None:
    assert says in wrong(copied(source, tmp_path, lambda config: config.update({key: value})), tmp_path)


def test_layers_beyond_the_last_may_predict_further_tokens(source: Path, tmp_path: Path) -> None:
    more = {"num_hidden_layers": 1, "num_nextn_predict_layers": 1}
    succeeds("verify", copied(source, tmp_path, lambda config: config.update(more)), "--structure")


@pytest.mark.parametrize("is_tied", [False, True])
def test_an_output_layer_is_there_or_the_embedding(source: Path, tmp_path: Path, is_tied: bool) -> None:
    tensors = read_folder(source)
    del tensors["lm_head.weight"]
    folder = write_folder(tmp_path / "a", tensors, config_of(SIZE, num_experts=2, tie_word_embeddings=is_tied), 1)
    if is_tied:
        succeeds("verify", folder)
    else:
        assert "and there is no lm_head.weight" in wrong(folder, tmp_path)


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize("command", [("pack",), ("dequantize",)])
def test_a_config_of_quantized_weights_beside_others_is_stale(
    source: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    made = made_of(source if command[0] == "pack" else made_of(source, "quantize", "--format", "fp8"), *command)
    folder = copied(made, tmp_path, lambda config: config.update({"quantization_config": FP8}))
    assert "says that the model is quantized (fp8), and no tensor is" in wrong(folder, tmp_path)


@pytest.mark.parametrize(
    "name", ["fp8", "fp8_dynamic", "w8a8", "w4a16", "nvfp4a16", "mxfp4a16", "modelopt_nvfp4", "nf4"]
)
def test_quantized_weights_beside_a_config_without_a_word_are_named(source: Path, tmp_path: Path, name: str) -> None:
    made = made_of(source, "quantize", "--format", name)
    folder = copied(made, tmp_path, lambda config: config.pop("quantization_config"))
    (folder / "hf_quant_config.json").unlink(missing_ok=True)
    assert "has no quantization_config" in wrong(folder, tmp_path)


def weights_of(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    return found


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("fp8_dynamic", lambda c: c["quantization_config"].update(quant_method="modelopt"),
         "says quant_method 'modelopt'"),
        ("fp8", lambda c: c["quantization_config"].update(quant_method="compressed-tensors"), "is fp8, which is 'fp8'"),
        ("w8a8", lambda c: weights_of(c).update(num_bits=4), "says num_bits 4 of model.layers.0.mlp.experts.0."),
        ("w8a8", lambda c: weights_of(c).update(type="float"), "says type float of"),
        ("w4a16", lambda c: weights_of(c).update(num_bits=8), "its tensors are of no known form"),
        ("nvfp4a16", lambda c: weights_of(c).update(num_bits=8), "says num_bits 8 of"),
        ("mxfp4a16", lambda c: weights_of(c).update(group_size=16), "says group_size 16 of"),
        ("w4a16", lambda c: c["quantization_config"]["ignore"].append("model.layers.1.self_attn.q_proj"),
         "model.layers.1.self_attn.q_proj is w4a16, and"),
        ("fp8", lambda c: c["quantization_config"]["modules_to_not_convert"].append("model.layers.1.self_attn.q_proj"),
         "lists it among modules that are not quantized"),
    ],
)  # fmt: skip
def test_a_config_of_another_format_is_named(
    source: Path, tmp_path: Path, name: str, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    made = made_of(source, "quantize", "--format", name)
    assert says in wrong(copied(made, tmp_path, change), tmp_path)


def test_the_config_of_another_folder_is_named(source: Path, tmp_path: Path) -> None:
    made, other = (made_of(source, "quantize", "--format", name) for name in ("fp8", "w4a16"))
    folder = tmp_path / "changed"
    shutil.copytree(made, folder)
    shutil.copy(other / "config.json", folder)
    assert "says quant_method 'compressed-tensors'" in wrong(folder, tmp_path)
    shutil.copy(other / "moeconv.json", folder)
    assert "says that the folder is w4a16; its matrices are fp8" in wrong(folder, tmp_path)


def with_files(made: Path, tmp_path: Path, **own: Any) -> Path:
    """A copy whose moeconv.json tells of its files; `own` replaces what it says of the first weight file."""
    files = []
    for path in sorted(made.iterdir()):
        if path.name == "moeconv.json":
            continue
        content = path.read_bytes()
        entry: dict[str, Any] = {
            "path": path.name,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        if path.suffix == ".safetensors":
            length = int.from_bytes(content[:8], "little")
            entry["header_sha256"] = hashlib.sha256(content[: 8 + length]).hexdigest()
            if not any("header_sha256" in other for other in files):
                entry |= own
        files.append(entry)
    return copied(made, tmp_path, lambda manifest: manifest.update(files=files), "moeconv.json")


def test_what_the_manifest_says_of_files_is_checked(source: Path, tmp_path: Path) -> None:
    made = made_of(source, "quantize", "--format", "fp8")
    succeeds("verify", with_files(made, tmp_path / "right"))
    for number, (own, says) in enumerate([
        ({"bytes": 5}, "moeconv.json says 5"),
        ({"header_sha256": "0" * 64}, "its header is not the one that"),
        ({"path": "absent.safetensors"}, "absent.safetensors is missing; "),
    ]):  # fmt: skip
        assert says in wrong(with_files(made, tmp_path / str(number), **own), tmp_path)


def test_one_flipped_bit_is_seen_by_a_sha256(source: Path, tmp_path: Path) -> None:
    folder = with_files(made_of(source, "quantize", "--format", "fp8"), tmp_path)
    path = next(folder.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    succeeds("verify", folder, "--structure")
    message = refused("verify", folder, within=tmp_path)
    assert f"{path} is not the file that was written: its sha256 is not the one in moeconv.json" in message


@pytest.mark.parametrize(("change", "says"), [(8, "leaves a hole"), (-8, "overlaps")])
def test_holes_and_overlaps_are_named(source: Path, tmp_path: Path, change: int, says: str) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(source, folder)
    path = sorted(folder.glob("*.safetensors"))[0]
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])[1]
    header[name]["data_offsets"] = [header[name]["data_offsets"][0] + change, header[name]["data_offsets"][1] + change]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    assert says in refused("verify", folder, within=tmp_path)


def test_a_part_of_a_matrix_that_is_missing_is_named(source: Path, tmp_path: Path) -> None:
    made = made_of(source, "quantize", "--format", "w4a16")

    def without(ends: str) -> Tensors:
        return {name: item for name, item in read_folder(made).items() if not name.endswith(ends)}

    config = json.loads((made / "config.json").read_text())
    folder = write_folder(tmp_path / "a", without("experts.1.up_proj.weight_scale"), config, 1)
    assert "model.layers.{0..1}.mlp.experts.1.up_proj" in wrong(folder, tmp_path)


def test_all_that_is_wrong_is_named_at_once(source: Path, tmp_path: Path) -> None:
    folder = copied(source, tmp_path, lambda config: config.update(num_hidden_layers=3, vocab_size=5))
    report = json.loads(run("verify", folder, "--json").out)
    assert [("layers" in p["message"], "vocab_size" in p["message"]) for p in report["problems"]] == [
        (True, False), (False, True)
    ]  # fmt: skip
