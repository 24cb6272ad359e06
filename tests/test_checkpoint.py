import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import refused, refused_source, run, succeeds, tree
from tests.folders import (
    CONFIG,
    Tensors,
    experts_layout,
    pack_by_hand,
    read_folder,
    tensor,
    write_file,
    write_folder,
)

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"


@pytest.fixture
def tensors() -> Tensors:
    return experts_layout()


@pytest.fixture
def source(tmp_path: Path, tensors: Tensors) -> Path:
    return write_folder(tmp_path / "source", tensors, CONFIG, 3)


def change_index(source: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((source / INDEX).read_text())
    change(index)
    (source / INDEX).write_text(json.dumps(index))


def metadata_of(path: Path) -> dict[str, str]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return dict(json.loads(content[8 : 8 + length])["__metadata__"])


# The index


def test_a_missing_shard_is_named_with_the_number_of_its_tensors(source: Path) -> None:
    (source / SECOND).unlink()
    message = refused_source(source)
    assert f"{source / SECOND} is missing; the index places 10 tensors there" in message
    assert f"-> Download {SECOND} again" in message


def test_all_missing_and_damaged_shards_are_named_at_once(source: Path) -> None:
    (source / "model-00001-of-00003.safetensors").unlink()
    (source / SECOND).write_bytes(b"")
    (source / "model-00003-of-00003.safetensors").write_bytes(b"not weights")
    message = refused_source(source)
    assert "model-00001-of-00003.safetensors is missing" in message
    assert f"{SECOND}: 0 bytes" in message
    assert "model-00003-of-00003.safetensors: the header claims" in message
    assert "3 problems" in message


@pytest.mark.parametrize("place", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b", "a\0b", 3])
def test_an_index_that_leaves_the_folder_is_refused(source: Path, place: object) -> None:
    name = "lm_head.weight"
    write_file(source.parent / "x.safetensors", {name: tensor((7, 10))})
    change_index(source, lambda index: index["weight_map"].update({name: place}))
    message = refused_source(source)
    assert f"{source / INDEX} places '{name}' in {str(place)!r}, which is no file name here" in message


def test_an_index_that_names_an_absent_tensor_is_refused(source: Path) -> None:
    change_index(source, lambda index: index["weight_map"].update({"model.norm.weight": SECOND}))
    assert f"{source / SECOND} lacks 'model.norm.weight', which the index places there" in refused_source(source)


def test_an_index_that_names_the_wrong_file_is_refused(source: Path) -> None:
    change_index(source, lambda index: index["weight_map"].update({"lm_head.weight": SECOND}))
    assert f"{source / SECOND} lacks 'lm_head.weight'" in refused_source(source)


def test_a_tensor_that_the_index_does_not_name_is_refused(source: Path) -> None:
    change_index(source, lambda index: index["weight_map"].pop("lm_head.weight"))
    message = refused_source(source)
    assert "model-00003-of-00003.safetensors holds 'lm_head.weight', which the index does not name" in message


def test_a_tensor_in_two_files_is_refused(source: Path, tensors: Tensors) -> None:
    extra = {name: tensors[name] for name in ("lm_head.weight", "model.embed_tokens.weight")}
    write_file(source / "model-00004-of-00003.safetensors", extra)
    change_index(source, lambda i: i["weight_map"].update({"lm_head.weight": "model-00004-of-00003.safetensors"}))
    message = refused_source(source)
    assert "'lm_head.weight' is in model-00003-of-00003.safetensors and again in model-00004" in message
    assert "'model.embed_tokens.weight' is in model-00001-of-00003.safetensors and again in model-00004" in message


@pytest.mark.parametrize("content", ["{}", "null", "[]", '"weights"', '{"weight_map": {}}', '{"weight_map": ["a"]}'])
@pytest.mark.parametrize("command", ["pack", "inspect"])
def test_an_index_without_a_weight_map_is_refused(source: Path, content: str, command: str) -> None:
    (source / INDEX).write_text(content)
    arguments = [source, source.parent / "target"] if command == "pack" else [source]
    assert str(source / INDEX) in refused(command, *arguments, within=source.parent)


@pytest.mark.parametrize("total_size", ["Infinity", "NaN", "1e999", '"3520"', "null", "[]", "-1"])
def test_a_senseless_total_size_does_not_stop_a_conversion(source: Path, tensors: Tensors, total_size: str) -> None:
    text = (source / INDEX).read_text().replace('"total_size": 3520', f'"total_size": {total_size}')
    assert total_size in text
    (source / INDEX).write_text(text)
    succeeds("pack", source, source.parent / "target")
    assert read_folder(source.parent / "target") == pack_by_hand(tensors)


# JSON


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' stands there twice"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' stands there twice"),
        ('{"a": 1', "not JSON"),
        ("", "not JSON"),
        ("<html>404</html>", "not JSON"),
        ("[" * 200_000, "nested too deeply"),
        ("[1, 2]", "is not a JSON object"),
        ("null", "is not a JSON object"),
        ('{"a": "\\ud800"}', "text that is not Unicode"),
        (b'{"a": "\xff"}', "not UTF-8 text"),
    ],
    ids=["key twice", "inner key twice", "cut short", "empty", "web page", "deep", "list", "null", "half", "bytes"],
)
def test_a_damaged_json_file_is_refused(source: Path, name: str, content: str | bytes, says: str) -> None:
    (source / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused_source(source)
    assert str(source / name) in message
    assert says in message


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": 3},
        {"architectures": ["A", 4, None]},
        {"architectures": "Qwen3MoeForCausalLM"},
        {"quantization_config": []},
        {"text_config": [1]},
        {"text_config": None},
        {"num_experts": [4, 4]},
        {"num_experts": True, "num_local_experts": 4},
        {"hidden_size": "10"},
        {"hidden_size": 10.0},
        {"torch_dtype": {"model_type": "qwen3_moe"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_an_odd_config_does_not_confuse_what_looks_at_it(source: Path, config: dict[str, Any], command: str) -> None:
    (source / "config.json").write_text(json.dumps({**CONFIG, **config}))
    succeeds(*([command] if command == "inspect" else [command, "pack"]), source)


# Folders


@pytest.mark.parametrize("files", [[], ["config.json"], ["pytorch_model.bin"], ["a.gguf", "README.md"]])
def test_a_folder_without_safetensors_files_is_refused(tmp_path: Path, files: list[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in files:
        (source / name).write_text("{}")
    message = refused_source(source)
    assert f"{source} holds no safetensors file" in message
    for name in files:
        assert (f"It has {name}; moeconv reads safetensors only" in message) == name.endswith((".bin", ".gguf"))


def test_several_weight_files_without_an_index_are_refused(source: Path) -> None:
    (source / INDEX).unlink()
    assert f"{source} has 3 safetensors files and no {INDEX}" in refused_source(source)


def test_a_source_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for source in ("file", "absent", "loop", "x" * 300):
        assert f"{tmp_path / source} is not a folder" in refused_source(tmp_path / source)


def test_a_dangling_link_is_refused(source: Path) -> None:
    (source / "tokenizer.json").symlink_to("../../blobs/absent")
    assert f"{source / 'tokenizer.json'} cannot be read or is no regular file" in refused_source(source)


def test_a_named_pipe_is_refused_and_not_waited_for(source: Path) -> None:
    os.mkfifo(source / "pipe.json")
    message = refused("pack", source, source.parent / "target", within=source / "none")
    assert f"{source / 'pipe.json'} cannot be read or is no regular file" in message


@pytest.mark.parametrize("name", ["code", "code/inner"])
def test_a_link_to_a_folder_is_refused_as_what_it_is(source: Path, name: str) -> None:
    (source / name).parent.mkdir(exist_ok=True)
    (source.parent / "elsewhere").mkdir()
    (source / name).symlink_to(source.parent / "elsewhere")
    message = refused_source(source)
    assert f"{source / name} is a link to a folder, and moeconv does not follow those\n  -> Put the folder" in message


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4997582480\n"


@pytest.mark.parametrize("name", [SECOND, "tokenizer.model", "code/x.py", "config.json", INDEX])
def test_a_pointer_of_git_lfs_is_refused(source: Path, name: str) -> None:
    (source / "code").mkdir()
    (source / name).write_text(POINTER)
    message = refused_source(source)
    assert f"{source / name} is a Git LFS pointer; the file itself was not downloaded\n" in message
    assert f"-> Run `git lfs pull` in {source}." in message
    assert message.count("Git LFS pointer") == 1
    assert "header" not in message


def test_a_pointer_of_git_lfs_that_is_left_out_does_no_harm(source: Path) -> None:
    (source / "pytorch_model.bin").write_text(POINTER)
    assert "left out: pytorch_model.bin" in succeeds("pack", source, source.parent / "target").err


@pytest.mark.parametrize("command", ["pack", "inspect", "verify"])
def test_an_unfinished_run_is_no_source(source: Path, command: str) -> None:
    (source / ".moeconv-journal").write_text("")
    arguments = [source, source.parent / "target"] if command == "pack" else [source]
    message = refused(command, *arguments, within=source.parent)
    assert f"{source} is an unfinished run of moeconv" in message
    assert "Finish it with the command that began it" in message


def test_one_weight_file_is_found_by_any_name(tmp_path: Path, tensors: Tensors) -> None:
    source = write_folder(tmp_path / "source", tensors, CONFIG, 0)
    (source / "model.safetensors").rename(source / "weights.safetensors")
    succeeds("pack", source, tmp_path / "target")
    assert read_folder(tmp_path / "target") == pack_by_hand(tensors)


# What lies beside the weights


STRAYS = ["consolidated.safetensors", "mtp.safetensors", "pytorch_model.bin", "original/", "model.gguf"]


def with_strays(source: Path) -> Path:
    (source / "original").mkdir()
    for name in STRAYS:
        (source / name.replace("/", "/x.pth")).write_bytes(b"weights of another kind")
    write_file(source / "mtp.safetensors", {f"mtp.{name}": item for name, item in experts_layout(layers=1).items()})
    return source


def test_stray_weight_files_are_named_and_left_out(source: Path, tensors: Tensors) -> None:
    target = source.parent / "target"
    result = succeeds("pack", with_strays(source), target)
    assert read_folder(target) == pack_by_hand(tensors)
    assert tree(target).keys() == {"config.json", "model.safetensors", "moeconv.json"}
    manifest = json.loads((target / "moeconv.json").read_text())
    planned = json.loads(succeeds("plan", "pack", source, "--json").out)
    for name in STRAYS:
        assert f"left out: {name} " in result.err
        assert name in [item["path"] for item in manifest["source"]["left_out"]]
        assert name in [item["path"] for item in planned["left_out"]]


def test_a_folder_that_is_left_out_is_named_once_and_may_hold_anything(source: Path) -> None:
    for name in (".cache/huggingface/download", ".git/objects", "original"):
        (source / name).mkdir(parents=True)
        (source / name / "a").write_bytes(b"12345")
        (source / name / "b").write_bytes(b"12345")
        (source / name / "dangling").symlink_to("absent")
        (source / name / "folder").symlink_to("..")
    os.mkfifo(source / ".git" / "pipe")
    result = succeeds("pack", source, source.parent / "target")
    assert sorted(result.err.splitlines()) == [
        "moeconv: warning: left out: .cache/ (10 bytes): download cache, 2 files",
        "moeconv: warning: left out: .git/ (10 bytes): version control, 2 files",
        "moeconv: warning: left out: original/ (10 bytes): the publisher's own format, 2 files",
    ]
    assert tree(source.parent / "target").keys() == {"config.json", "model.safetensors", "moeconv.json"}


def test_a_link_in_place_of_a_folder_that_is_left_out_is_named_too(source: Path) -> None:
    (source / "original").symlink_to("..")
    result = succeeds("pack", source, source.parent / "target")
    assert result.err == "moeconv: warning: left out: original/ (0 bytes): the publisher's own format, 0 files\n"


def test_the_only_index_is_not_called_one_of_other_weights(source: Path, tensors: Tensors) -> None:
    (source / INDEX).rename(source / "weights.safetensors.index.json")
    result = succeeds("pack", source, source.parent / "target")
    assert result.err == ""
    assert tree(source.parent / "target").keys() == {"config.json", "model.safetensors", "moeconv.json"}
    assert read_folder(source.parent / "target") == pack_by_hand(tensors)


def test_an_included_file_is_converted_too(source: Path, tensors: Tensors) -> None:
    target = source.parent / "target"
    extra = {f"mtp.{name}": item for name, item in experts_layout(layers=1).items()}
    result = succeeds("pack", with_strays(source), target, "--include", "mtp.safetensors")
    packed = {name.removeprefix("mtp."): item for name, item in extra.items()}
    wanted = pack_by_hand(tensors) | {f"mtp.{name}": item for name, item in pack_by_hand(packed).items()}
    assert read_folder(target) == wanted
    assert "mtp.safetensors" not in result.err
    assert "consolidated.safetensors" in result.err


@pytest.mark.parametrize("name", ["absent.safetensors", "pytorch_model.bin", "../x.safetensors", "config.json"])
def test_an_include_that_is_no_weight_file_of_the_folder_is_refused(source: Path, name: str) -> None:
    write_file(source.parent / "x.safetensors", {"x": tensor((2,))})
    with_strays(source)
    assert f"--include {name}: no such safetensors file in {source}" in refused_source(source, "--include", name)


def test_an_included_file_that_repeats_a_tensor_is_refused(source: Path, tensors: Tensors) -> None:
    write_file(source / "more.safetensors", {"lm_head.weight": tensors["lm_head.weight"]})
    message = refused_source(source, "--include", "more.safetensors")
    assert "'lm_head.weight' is in model-00003-of-00003.safetensors and again in more.safetensors" in message


SIDECARS = {
    "tokenizer.json": b'{"a": 1, "a": 2}',
    "chat_template.jinja": "{{ 'é' }}\r\n".encode(),
    "LICENSE": b"do what you want",
    "code/modeling_x.py": b"import os",
    "code/deep/er/weights.txt": bytes(range(256)),
    "empty.txt": b"",
    ".gitattributes": b"*.safetensors filter=lfs",
    "big.json": b"x" * 3_000_000,
}


def test_all_other_files_are_carried_over_byte_for_byte(source: Path) -> None:
    for name, content in SIDECARS.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    target = source.parent / "target"
    succeeds("pack", source, target)
    found = tree(target)
    assert {name: found[name] for name in SIDECARS} == SIDECARS
    assert found["config.json"] == (source / "config.json").read_bytes()
    assert found.keys() == SIDECARS.keys() | {"config.json", "model.safetensors", "moeconv.json"}


def test_a_hugging_face_cache_snapshot_becomes_a_folder_of_regular_files(tmp_path: Path, tensors: Tensors) -> None:
    plain = write_folder(tmp_path / "plain", tensors, CONFIG, 3)
    (plain / "tokenizer.json").write_text("{}")
    snapshot = tmp_path / "models--x" / "snapshots" / "0123abcd"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in plain.iterdir():
        blob = hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blobs / blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob)
    before = tree(tmp_path / "models--x")
    succeeds("pack", snapshot, tmp_path / "target")
    assert read_folder(tmp_path / "target") == pack_by_hand(tensors)
    assert (tmp_path / "target" / "tokenizer.json").read_text() == "{}"
    assert not [path for path in (tmp_path / "target").rglob("*") if path.is_symlink() or not path.is_file()]
    assert tree(tmp_path / "models--x") == before


# What the result says of itself


def test_metadata_of_the_source_stands_in_every_target_file(source: Path, tensors: Tensors) -> None:
    name = "model.embed_tokens.weight"
    write_file(source / "x.safetensors", {name: tensors.pop(name)}, {"format": "pt", "epoch": "é\u2028"})
    for number in (1, 2, 3):
        (source / f"model-0000{number}-of-00003.safetensors").unlink()
    write_file(source / "y.safetensors", tensors, {"format": "np", "by": "hand"})
    place = dict.fromkeys(tensors, "y.safetensors") | {name: "x.safetensors"}
    change_index(source, lambda index: index.update(weight_map=place))
    result = succeeds("pack", source, source.parent / "target", "--max-shard-size", "1kB")
    written = sorted((source.parent / "target").glob("*.safetensors"))
    assert len(written) > 3
    for path in written:
        assert metadata_of(path) == {"format": "pt", "epoch": "é\u2028", "by": "hand"}
    assert "__metadata__ key 'format' differs between source files" in result.err


def test_the_index_names_every_tensor_and_their_bytes(source: Path, tensors: Tensors) -> None:
    target = source.parent / "target"
    succeeds("pack", source, target, "--max-shard-size", "700")
    index = json.loads((target / INDEX).read_text())
    wanted = pack_by_hand(tensors)
    assert index["metadata"]["total_size"] == sum(len(item.content) for item in wanted.values())
    assert index["weight_map"].keys() == wanted.keys()
    assert set(index["weight_map"].values()) == {path.name for path in target.glob("*.safetensors")}
    for name, file in index["weight_map"].items():
        assert f'"{name}"'.encode() in (target / file).read_bytes()


def test_a_single_weight_file_has_no_index(source: Path) -> None:
    succeeds("pack", source, source.parent / "target")
    assert not (source.parent / "target" / INDEX).exists()


def test_a_source_is_never_changed(source: Path) -> None:
    before = tree(source)
    succeeds("pack", source, source.parent / "target")
    run("pack", source, source.parent / "target", "--overwrite", "--max-shard-size", "1kB")
    assert tree(source) == before


def test_what_else_the_index_says_is_carried_over(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", experts_layout(), CONFIG, 3)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"] |= {"total_parameters": 1234, "total_size": index["metadata"]["total_size"]}
    path.write_text(json.dumps(index))
    succeeds("pack", source, tmp_path / "packed", "--max-shard-size", "1kB")
    written = json.loads((tmp_path / "packed" / "model.safetensors.index.json").read_text())
    assert written["metadata"] == index["metadata"]
