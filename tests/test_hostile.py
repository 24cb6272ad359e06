"""Input that is broken or means harm, given to commands: a message, little memory, little time, and nothing touched."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from moeconv.checkpoint import open_checkpoint
from moeconv.names import collapse
from moeconv.origin import fingerprint_of, origin_of
from moeconv.plan import Options, plan
from moeconv.selection import select_recipe
from moeconv.targets import is_target
from tests.commands import Result, refused, run, succeeds, tree
from tests.folders import CONFIG, Tensor, experts_layout, finite, tensor, write_file, write_folder

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
#: Address space of a command that may not need more: Python and all of moeconv but torch take a quarter of it.
ROOM = 160 << 20
#: No command may take longer over a folder of a few megabytes. Most take a tenth of a second.
SECONDS = 20
#: What is not taken for text by a terminal, or makes text look like other text.
UNSEEN = "\x1b[31m\x07\x7f\x9b2J\u202e\u2066\u200b\n\r\x00".replace("\x00", "")
RULES = "quantize:\n  - {match: '*', format: fp8_dynamic}\n"


def doors(source: Path) -> dict[str, list[object]]:
    """Command lines that read a folder, by what they are called."""
    target = source.parent / "target"
    return {
        "inspect": ["inspect", source],
        "verify": ["verify", source],
        "new": ["recipes", "new", source],
        "plan pack": ["plan", "pack", source],
        "plan quantize": ["plan", "quantize", source, "--format", "fp8_dynamic"],
        "plan dequantize": ["plan", "dequantize", source],
        "pack": ["pack", source, target, "--no-fsync"],
        "quantize": ["quantize", source, target, "--format", "w8a8", "--no-fsync"],
    }


DOORS = list(doors(Path()))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "source", finite(experts_layout(layers=1)), {**CONFIG, "num_hidden_layers": 1}, 2)


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    began = time.process_time()
    yield
    assert time.process_time() - began < SECONDS


def answers(*arguments: object) -> Result:
    """A command that may do its work or refuse, but says so in words."""
    result = run(*arguments)
    assert result.code in (0, 1, 2), result
    assert result.code == 0 or "\n  -> " in result.err or (arguments[0] == "verify" and result.out)
    assert "Traceback" not in result.err
    return result


def bounded(*arguments: object, room: int = ROOM) -> Result:
    """A command in a process of its own that gets no more memory, nor more time, than the bounds above."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "moeconv", *map(str, arguments)], capture_output=True, text=True, timeout=4 * SECONDS,
        preexec_fn=limit, env=environment, check=False, errors="backslashreplace",
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "ran out of memory" not in done.stderr
    return Result(done.returncode, done.stdout, done.stderr)


def refused_within_bounds(source: Path, door: str) -> str:
    result = bounded(*doors(source)[door])
    assert result.code == 1, result
    assert "\n  -> " in result.err
    assert sorted(source.parent.iterdir()) == [source]
    return result.err


def with_header(source: Path, text: bytes, claims: int | None = None, content: bytes = b"") -> None:
    """A single weight file with that header, in place of what was there."""
    for path in source.glob("model*"):
        path.unlink()
    (source / "model.safetensors").write_bytes(
        struct.pack("<Q", len(text) if claims is None else claims) + text + content
    )


def with_names(
    source: Path, names: Iterator[str] | list[str], shape: Callable[[int], list[int]] = lambda _: [0]
) -> None:
    entries = {
        name: {"dtype": "F32", "shape": shape(number), "data_offsets": [0, 0]} for number, name in enumerate(names)
    }
    with_header(source, json.dumps(entries).encode())


def renamed_file(source: Path, name: str) -> None:
    """The first weight file under another name, which the index names too."""
    (source / SHARD).rename(source / name)
    index = (source / INDEX).read_text()
    (source / INDEX).write_text(index.replace(json.dumps(SHARD), json.dumps(name)))


# Headers and JSON


@pytest.mark.parametrize("claims", [(1 << 63) - 1, 1 << 63, (1 << 64) - 1, 100_000_001, 99_999_999])
def test_a_header_of_impossible_length_is_never_read(source: Path, claims: int) -> None:
    with_header(source, b"{}", claims)
    for door in ("inspect", "verify", "plan quantize", "quantize"):
        message = refused(*doors(source)[door], within=source.parent)
        assert f"the header claims {claims:,} bytes" in message


def test_a_file_of_terabytes_that_is_one_hole_is_refused(source: Path) -> None:
    with_header(source, b"{}", 10_000_000)
    os.truncate(source / "model.safetensors", 1 << 42)
    assert "not JSON" in refused_within_bounds(source, "inspect")


def place_json(source: Path, where: str, text: bytes) -> None:
    if where in ("tensor", "metadata"):
        with_header(source, b'{"%s":' % (b"a" if where == "tensor" else b"__metadata__") + text + b"}")
    elif where == "index":
        (source / INDEX).write_bytes(b'{"metadata":{},"weight_map":{"a":' + text + b"}}")
    else:
        (source / where).write_bytes(b'{"a":' + text + b"}")


PLACES = ["tensor", "metadata", "index", "config.json", "moeconv.json"]
BOMBS = {
    "empty lists": (b"[" + b"[]," * 130_000 + b"0]", "lists and objects"),
    "small objects": (b"[" + b'{"a":0},' * 220_000 + b"0]", "lists and objects"),
    "deep lists": (b"[" * 200_000, "JSON nested too deeply"),
    "deep objects": (b'{"a":' * 50_000, "JSON nested too deeply"),
    "brackets behind text": (rb'["\"[[[\\",' + b"[]," * 130_000 + b"0]", "lists and objects"),
}


@pytest.mark.parametrize(
    ("where", "bomb"), [*(("tensor", bomb) for bomb in BOMBS), *((where, "empty lists") for where in PLACES[1:])]
)
def test_json_of_brackets_is_refused_before_it_is_built(source: Path, where: str, bomb: str) -> None:
    text, says = BOMBS[bomb]
    place_json(source, where, text)
    assert says in refused("inspect", source, within=source)


@pytest.mark.parametrize("where", ["metadata", "index"])
def test_json_that_would_fill_the_memory_does_not(source: Path, where: str) -> None:
    place_json(source, where, b"[" + b"{}," * 2_000_000 + b"0]")
    assert "lists and objects" in refused_within_bounds(source, "inspect")


def test_brackets_in_text_are_text(source: Path) -> None:
    """As many as one likes, escaped and not: of a chat template, say."""
    for text in ("[{" * 200_000, '\\"[' * 200_000, "\\\\" + "{" * 200_000):
        (source / "config.json").write_text(json.dumps({**CONFIG, "about": text}))
        succeeds("inspect", source)


@pytest.mark.parametrize("depth", [63, 64, 900, 980, 5000])
@pytest.mark.parametrize("kind", ["[]", "{}"])
def test_no_depth_of_json_ends_in_a_traceback(source: Path, depth: int, kind: str) -> None:
    deep = "[" * depth + "]" * depth if kind == "[]" else '{"model_type":' * depth + "1" + "}" * depth
    rest = json.dumps(CONFIG)[1:]
    for key in ("text_config", "quantization_config", "torch_dtype"):
        (source / "config.json").write_text(f'{{"{key}": {deep}, {rest}')
        answers("inspect", source)
        answers("plan", "quantize", source, "--format", "fp8_dynamic")
    with_header(source, b'{"a":{"dtype":"U8","shape":%s,"data_offsets":[0,4]}}' % deep.encode(), None, bytes(4))
    refused("inspect", source, within=source)


# Names


NAMES = {
    "a number of 5000 digits": ["model.layers." + "9" * 5000 + ".x"],
    "many numbers": [f"{n}." + "1." * 240 + "x" for n in range(5)] + ["1." * 240 + f"{n}.x" for n in range(5)],
    "a name of a megabyte": ["a" * 1_000_000],
    "a hole": ["model.layers.{}.mlp.experts.0.gate_proj.weight", "model.layers.1.mlp.experts.0.gate_proj.weight"],
    "a hole of a recipe": ["{block}.mlp.experts.{expert}.gate_proj.weight", "a.{0}", "a.1"],
    "experts without order": [f"model.layers.{n}.mlp.experts.{n * 7919 % 2003}.gate_proj.weight" for n in range(2000)],
    "experts that are words": [f"model.layers.0.mlp.experts.x{n}.gate_proj.weight" for n in range(3000)],
    "ids that are far apart": [f"model.layers.0.mlp.experts.{n}.gate_proj.weight" for n in (0, 999_999_999)],
    "dots": [".", "..", "...", ".weight", "weight.", "a..b.weight"],
}


@pytest.mark.parametrize("names", NAMES)
def test_names_of_any_kind_are_answered_in_time(source: Path, names: str) -> None:
    with_names(source, NAMES[names])
    for door in ("inspect", "plan quantize", "new"):
        answers(*doors(source)[door])


@pytest.mark.parametrize("says", ["holds {}", "has 1,000,000 letters"])
def test_a_name_that_no_model_has_is_refused(source: Path, says: str) -> None:
    with_names(source, ["a.{}.b"] if "{}" in says else ["a" * 1_000_000])
    message = refused("pack", source, source.parent / "target", within=source.parent)
    assert "the tensor name 'a" in message
    assert says.replace("holds", "has") in message


def test_names_without_order_are_collapsed_in_time() -> None:
    names = [f"a.{n}.b.{n * 7919 % 30011}" for n in range(30_000)]
    assert sorted(collapse(names)) == sorted(names)


def test_as_many_shapes_as_tensors_are_answered_in_time(source: Path) -> None:
    words = ("gate_proj.weight", "gate_proj.weight_scale_inv")
    names = [f"model.layers.{n // 128}.mlp.experts.{n // 2 % 64}.{words[n % 2]}" for n in range(10_000)]
    with_names(source, names, lambda number: [number, 0])
    answers("inspect", source)


def shown_in_words(text: str) -> None:
    """Nothing that a terminal could take for a command, but ends of lines."""
    odd = sorted({c for c in text if not c.isprintable() and c != "\n"})
    assert not odd, [hex(ord(c)) for c in odd]
    assert "FORGED" not in [line.strip() for line in text.split("\n")]


@pytest.mark.parametrize("door", ["inspect", "verify", "new", "plan pack", "plan quantize", "pack"])
def test_no_name_reaches_the_terminal_as_anything_but_text(source: Path, door: str) -> None:
    """Of tensors, files that are missing, damaged, left out or carried over, and words of config.json."""
    odd = f"x{UNSEEN}FORGED\n"
    seen = []
    (source / f"{odd}.bin").write_bytes(b"weights of another kind")
    (source / f"{odd}.txt").write_bytes(b"text")
    config = {**CONFIG, "architectures": [odd], "quantization_config": {"quant_method": odd}, odd: odd}
    for model_type in ("qwen3_moe", odd):
        (source / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
        seen.append(answers(*doors(source)[door]))
        (source / "config.json").write_text(json.dumps({**CONFIG, "model_type": model_type, "architectures": odd}))
        seen.append(answers(*doors(source)[door]))
    renamed_file(source, f"{odd}.safetensors")
    seen.append(answers(*doors(source)[door], *(["--overwrite"] if door in ("pack", "quantize") else [])))
    (source / f"{odd}.safetensors").write_bytes(b"damaged")
    seen.append(answers(*doors(source)[door]))
    (source / f"{odd}.safetensors").unlink()
    seen.append(answers(*doors(source)[door]))
    assert f"{'x' + UNSEEN[:5]!r}"[1:-1] in seen[-1].err
    (source / f"{odd}link").symlink_to("absent")
    seen.append(answers(*doors(source)[door]))
    for result in seen:
        shown_in_words(result.out)
        shown_in_words(result.err)


@pytest.mark.parametrize("door", ["inspect", "plan pack", "plan quantize", "verify"])
def test_json_for_programs_holds_odd_names_as_escapes(source: Path, door: str) -> None:
    odd = f"x{UNSEEN}\U000e0041FORGED\n"
    (source / f"{odd}.bin").write_bytes(b"weights of another kind")
    (source / "config.json").write_text(json.dumps({**CONFIG, "architectures": [odd]}))
    result = answers(*doors(source)[door], "--json")
    shown_in_words(result.out)
    if door == "inspect":
        assert json.loads(result.out)["architectures"] == [odd]
        assert json.loads(result.out)["left_out"][0]["path"] == f"{odd}.bin"


@pytest.mark.parametrize("odd", ["\x1b[2J", "\u202e", "\x9b", "\u2028", "\x7f"])
def test_a_tensor_name_that_no_terminal_shows_is_refused_and_shown(source: Path, odd: str) -> None:
    with_names(source, [f"model.{odd}.weight"])
    message = refused("pack", source, source.parent / "target", within=source.parent)
    assert f"the tensor name {f'model.{odd}.weight'!r} has control characters" in message
    shown_in_words(message)


def test_a_message_is_never_longer_than_a_person_reads(source: Path) -> None:
    (source / "config.json").write_text(json.dumps({**CONFIG, "model_type": "y" * 1_000_000}))
    for door in DOORS:
        assert len(answers(*doors(source)[door]).err) < 100_000


# Index


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("place", ["../outside.safetensors", "/dev/zero", "{tmp}/outside.safetensors", "a/../../b"])
def test_an_index_leads_to_no_file_outside(source: Path, door: str, place: str) -> None:
    write_file(source.parent / "outside.safetensors", {"lm_head.weight": tensor((7, 10))})
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = place.format(tmp=source.parent)
    (source / INDEX).write_text(json.dumps(index))
    message = refused(*doors(source)[door], within=source.parent)
    assert "which is no file name here" in message


def test_an_index_of_many_files_that_are_missing_is_answered_in_time(source: Path) -> None:
    weight_map = {f"x{number}": f"{number}.safetensors" for number in range(30_000)}
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert "30,000 problems" in refused("inspect", source, within=source)


# What is no file


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # such a path has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_fifo(path: Path) -> None:
    os.mkfifo(path.parent.parent / "elsewhere")
    path.symlink_to("../elsewhere")


KINDS = [fifo, unix_socket, device, link_to_fifo]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", [INDEX, SHARD, "config.json", "moeconv.json", "tokenizer.json"])
def test_what_is_no_file_is_refused_and_not_waited_for(source: Path, name: str, kind: Callable[[Path], object]) -> None:
    (source / name).unlink(missing_ok=True)
    kind(source / name)
    for door in ("inspect", "verify", "plan quantize", "quantize"):
        result = run(*doors(source)[door])
        assert result.code == 1
        assert f"{source / name} cannot be read or is no regular file" in result.err
        assert not (source.parent / "target").exists()


@pytest.mark.parametrize("name", [INDEX, SHARD, "config.json", "moeconv.json"])
def test_a_folder_in_place_of_a_file_is_as_good_as_none(source: Path, name: str) -> None:
    (source / name).unlink(missing_ok=True)
    (source / name).mkdir()
    for door in ("inspect", "verify", "pack"):
        answers(*doors(source)[door])


@pytest.mark.parametrize("kind", [fifo, unix_socket, device, link_to_fifo, Path.mkdir], ids=lambda k: k.__name__)
def test_a_recipe_that_is_no_file_is_refused(source: Path, kind: Callable[[Path], object]) -> None:
    path = source.parent / "work" / "recipe.yaml"
    path.parent.mkdir()
    kind(path)
    for arguments in (
        ["recipes", "check", path],
        ["recipes", "show", path],
        ["plan", "pack", source, "--recipe", path],
    ):
        result = run(*arguments)
        assert result.code == 1
        assert f"there is no recipe {str(path)!r}" in result.err


def test_a_recipe_of_terabytes_is_not_read(source: Path) -> None:
    path = source.parent / "recipe.yaml"
    path.write_text("about: x\n")
    os.truncate(path, 1 << 40)
    for arguments in (
        ["recipes", "check", path],
        ["recipes", "show", path],
        ["plan", "pack", source, "--recipe", path],
    ):
        result = bounded(*arguments)
        assert result.code == 1
        assert "1,099,511,627,776 bytes" in result.err


def test_pickles_are_never_opened(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither are other weights: a device in their place would be an error to whoever opens them."""
    evil = b"cos\nsystem\n(S'touch evil'\ntR."
    for name in ("pytorch_model.bin", "model.pt", "optimizer.pth", "x.ckpt", "training_args.bin"):
        (source / name).write_bytes(evil)
        (source / name).chmod(0)
    opened: list[str] = []
    real = os.open

    def watched(path: Any, *arguments: Any, **named: Any) -> int:
        opened.append(os.fspath(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "open", watched)
    for door, arguments in doors(source).items():
        if door not in ("plan dequantize", "quantize"):
            succeeds(*arguments)
    assert any(path.endswith(".safetensors") for path in opened)
    assert not [path for path in opened if path.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    assert not (source / "evil").exists()


# Recipes

TEXTS = {
    "aliases": "a: &a [x, x, x, x]\n"
    + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in pairwise("abcdefghijklm")),
    "code": "about: !!python/object/apply:os.system ['touch {evil}']\n",
    "code in rules": "quantize: !!python/object/new:subprocess.check_output [[touch, '{evil}']]\n",
    "a module": "!!python/module:antigravity\n",
    "depth": "[" * 100_000,
    "length": "# x\n" * 500_000,
    "lines": "layouts:\n  experts:\n"
    + "".join(f'    "{{{{block}}}}.{{{{expert}}}}.p{n} [I]": p{n}\n' for n in range(5_000)),
    "an escape": 'about: "\\e[2J"\nlayouts: {{"\\e[31m": x}}\n',
    "an endless number": "quantize:\n  - {{match: '*', format: w4a16, group_size: " + "9" * 5000 + "}}\n",
    "a number": "quantize:\n  - {{match: '*', format: w4a16, group_size: " + "8" * 4000 + "}}\n",
    "no text": "\udcff",
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_recipe_is_data_and_nothing_else(source: Path, text: str) -> None:
    path = source.parent / "recipe.yaml"
    content = TEXTS[text].replace("{{", "{").replace("}}", "}").replace("{evil}", str(source.parent / "evil"))
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    for arguments in (
        ["recipes", "check", path],
        ["plan", "pack", source, "--recipe", path],
        ["quantize", source, source.parent / "target", "--recipe", path],
    ):
        result = answers(*arguments)
        assert result.code in (1, 2)
        shown_in_words(result.err)
        assert len(result.err) < 30_000
        assert not (source.parent / "evil").exists()
        assert not (source.parent / "target").exists()


def test_a_recipe_in_a_manifest_is_read_with_the_same_care(source: Path) -> None:
    for text in ("a: &a [x]\nb: *a", "!!python/module:antigravity", "\udc80", "[" * 100_000):
        manifest = {"recipe": {"name": "x\x1b[2J", "text": text}}
        (source / "moeconv.json").write_text(json.dumps(manifest))
        for door in ("verify", "plan pack", "inspect"):
            shown_in_words(refused(*doors(source)[door], within=source.parent))


def test_an_empty_pattern_names_nothing(source: Path) -> None:
    recipe = source.parent / "recipe.yaml"
    recipe.write_text("extends: gate_up_down\nkeep: ['', '*']\n")
    answers("plan", "quantize", source, "--recipe", recipe, "--format", "fp8_dynamic")


# Links


def test_files_behind_links_are_read_and_become_files(source: Path) -> None:
    blobs = source.parent / "blobs"
    blobs.mkdir()
    for path in list(source.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(f"../blobs/{path.name}")
    before = tree(blobs)
    succeeds("pack", source, source.parent / "target")
    assert not [path for path in (source.parent / "target").rglob("*") if path.is_symlink()]
    assert tree(blobs) == before


def unfinished(source: Path) -> Path:
    """A run that was cut short behind its first task, as its journal tells."""
    succeeds("pack", source, source.parent / "target", "--no-fsync", "--max-shard-size", "1KB")
    partial = source.parent / "target.partial"
    (source.parent / "target").rename(partial)
    checkpoint = open_checkpoint(source)
    made = plan(checkpoint, select_recipe(checkpoint), "packed", Options(max_shard_nbytes=1000))
    lines = [{"fingerprint": fingerprint_of(origin_of(made))}, {"done": [made.tasks[0].id], "fsync": True}]
    (partial / ".moeconv-journal").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return partial


@pytest.mark.parametrize("name", ["journal", "weights", "folder", "second name"])
def test_nothing_is_written_through_links_in_an_unfinished_run(source: Path, name: str) -> None:
    (source / "code").mkdir()
    (source / "code" / "x.py").write_text("print()")
    partial = unfinished(source)
    outside = source.parent / "outside"
    path = {"journal": partial / ".moeconv-journal", "folder": partial / "code"}.get(
        name, min(partial.glob("model-*.safetensors"))
    )
    path.rename(outside)
    if name == "second name":
        os.link(outside, path)
    else:
        path.symlink_to("../outside")
    for file in [outside, *outside.rglob("*")] if outside.is_dir() else [outside]:
        os.utime(file, (1, 1))
    before, times = tree(source.parent)["outside" if outside.is_file() else "outside/x.py"], outside.stat().st_mtime_ns
    result = answers("pack", source, source.parent / "target", "--no-fsync", "--max-shard-size", "1KB")
    assert tree(source.parent)["outside" if outside.is_file() else "outside/x.py"] == before
    assert outside.stat().st_mtime_ns == times
    assert (result.code == 1) == (name == "journal")
    if result.code == 0:
        assert not [path for path in (source.parent / "target").rglob("*") if path.is_symlink()]
        succeeds("verify", source.parent / "target", "--against", source)


def test_an_unfinished_run_without_links_is_finished(source: Path) -> None:
    partial = unfinished(source)
    first = min(partial.glob("model-*.safetensors"))
    before = first.stat().st_ino
    succeeds("pack", source, source.parent / "target", "--no-fsync", "--max-shard-size", "1KB")
    assert (source.parent / "target" / first.name).stat().st_ino == before


JOURNALS = {
    "deep": b"[" * 1_000_000,
    "brackets": b'{"done": [' + b"[]," * 300_000 + b"0]}\n",
    "no list": b'{"fingerprint": {"a": [1]}, "done": {"a": 1}}\n',
    "numbers": b'{"fingerprint": 1e999, "done": [1, null]}\n',
    "bytes": bytes(range(256)) * 100,
    "many lines": b"{}\n" * 50_000,
}


@pytest.mark.parametrize("journal", JOURNALS)
def test_a_journal_of_any_content_is_not_believed(source: Path, journal: str) -> None:
    partial = unfinished(source)
    (partial / ".moeconv-journal").write_bytes(JOURNALS[journal])
    answers("pack", source, source.parent / "target", "--no-fsync", "--max-shard-size", "1KB", "--overwrite")
    succeeds("verify", source.parent / "target", "--against", source)


# What config.json and states of 4-bit tensors say


def test_an_expression_in_a_config_cannot_take_for_ever(source: Path) -> None:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    groups = {
        f"group_{n}": {"targets": [target, "re:" + ".*" * 30 + "x"], "weights": weights}
        for n, target in enumerate(["re:(a+)+$", r"re:(?:\w+\.?)*\d$", "re:(x*)*y", "re:[", r"re:(a)\1"])
    }
    config = {**CONFIG, "quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}
    names = [f"model.{'a' * 60}.{word}" for word in ("weight_packed", "weight_scale", "weight_shape")]
    with_names(source, names)
    (source / "config.json").write_text(json.dumps(config))
    for door in ("inspect", "plan quantize", "plan dequantize", "plan pack"):
        answers(*doors(source)[door])


TARGETS = [
    r".*self_attn.*", r"^(?:.*\.)?layers\.\d+\.mlp\.experts\.\d+\.(gate|up)_proj$", r".*(q|k|v)_proj",
    r"model\.layers\.(?!0\.)[0-9]+.*", r".*(?<!shared_)experts.*", r"[^.]+\.layers\.[1-9]\d?\..*",
    r"\w+\.\S*?\.[a-z_]{2,9}$", r"(?:a|ab)(?:c|bcd)(d*)", r"x*?y{2,3}\Z", r"[\D\-.]+\d", r"a*|b", "", "(", r"[^\d.]+$",
]  # fmt: skip
MODULES = [
    "model.layers.3.self_attn.q_proj", "model.layers.0.mlp.experts.11.gate_proj", "model.layers.1.mlp.shared_experts.x",
    "lm_head", "abcd", "abcdd", "xxyy", "xyyyy", "model.layers.12.x", "", "b",
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_names_what_python_says(target: str) -> None:
    for module in MODULES:
        try:
            wanted = re.match(target, module) is not None
        except re.error:
            wanted = False
        assert is_target(f"re:{target}", module) == wanted, module


@pytest.mark.parametrize(
    "said",
    [
        {"shape": [10**4000, 10**4000]},
        {"shape": [1 << 62, 4]},
        {"shape": [1] * 40},
        {"shape": [True, 2]},
        {"shape": {"a": 1}},
        {"nested_offset": 10**400, "nested_blocksize": 256, "nested_dtype": "float32"},
        {"nested_offset": float("nan"), "nested_blocksize": 256, "nested_dtype": "float32"},
        {"nested_offset": [1], "nested_blocksize": 256, "nested_dtype": "float32"},
        {"dtype": ["bfloat16"]},
        {"blocksize": 1e999},
        {"quant_type": {}},
    ],
    ids=lambda said: str(said)[:40],
)
def test_a_state_that_lies_is_a_problem_with_words(source: Path, said: dict[str, object]) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 32], **said}).encode()
    write_file(
        source / SHARD.replace("2.", "2b."),
        {name: tensor((1024, 1), "U8"), f"{name}.quant_state.bitsandbytes__nf4": Tensor("U8", (len(state),), state)},
    )
    for path in source.glob("model-*.safetensors"):
        path.rename(source / "model.safetensors") if "2b" in path.name else path.unlink()
    (source / INDEX).unlink()
    shown = answers("inspect", source).out
    assert f"{name}: " in shown
    assert "its state" in shown or "its scales" in shown or "is no state" in shown
    for door in ("plan quantize", "plan dequantize", "plan pack", "verify"):
        answers(*doors(source)[door])
