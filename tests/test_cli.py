import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from moeconv import __version__
from moeconv.cli import app
from moeconv.options import parse_size
from tests.commands import Result, refused, run, succeeds, tree
from tests.folders import CONFIG, experts_layout, pack_by_hand, read_folder, write_folder

CONVERSIONS = [["pack"], ["unpack"], ["convert", "--to", "packed"]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "source", experts_layout(), CONFIG, 3)


def process(*arguments: object, **how: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moeconv", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **how)  # type: ignore[call-overload, no-any-return]


def usage_error(*arguments: object, within: Path) -> str:
    """A command that cannot be right, whatever the files hold."""
    before = tree(within)
    result = run(*arguments)
    assert result.code == 2, result
    assert result.out == ""
    assert tree(within) == before
    return result.err


# Wrong command lines


@pytest.mark.parametrize(
    "size", ["0", "0GB", "-1", "-5GB", "", "GB", "five", "5 G B", "1e9", "5XB", "0.1", "9" * 400, "∞"]
)
@pytest.mark.parametrize("option", ["--max-shard-size", "--max-memory"])
def test_a_size_that_is_none_is_refused(source: Path, option: str, size: str) -> None:
    message = usage_error("pack", source, source.parent / "target", f"{option}={size}", within=source.parent)
    assert f"moeconv: {option} {size!r} is not a size\n  -> Write a number with a unit" in message


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1000000", 10**6), ("5GB", 5 * 10**9), ("5 gb", 5 * 10**9), ("1.5GB", 15 * 10**8), ("512MiB", 512 << 20),
        ("1k", 1000), ("1KiB", 1024), ("2T", 2 * 10**12), ("7B", 7), (" 3 MB ", 3 * 10**6),
    ],
)  # fmt: skip
def test_a_size_is_read_with_its_unit(text: str, nbytes: int) -> None:
    assert parse_size(text, "--x") == nbytes


def test_too_little_memory_is_refused_and_the_least_that_works_is_named(source: Path) -> None:
    target = source.parent / "target"
    message = usage_error("pack", source, target, "--max-memory", "1MB", within=source.parent)
    assert "--max-memory 1,000,000 is less than this conversion needs" in message
    least = message.split("--max-memory ")[-1].split(".")[0]
    number = int(least.removesuffix("MB"))
    assert "least" in usage_error("pack", source, target, "--max-memory", f"{number - 1}MB", within=source.parent)
    succeeds("pack", source, target, "--max-memory", least)
    assert read_folder(target) == pack_by_hand(experts_layout())


@pytest.mark.parametrize("option", ["--to", "--layout"])
def test_an_unknown_layout_is_refused(source: Path, option: str) -> None:
    target = source.parent / "target"
    arguments = ["convert", source, target, "--to", "packed", option, "square"]
    message = usage_error(*arguments, within=source.parent)
    assert f"{option} 'square' is no layout\n  -> Known: hub, packed, experts." in message


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_an_unknown_layout_is_refused_where_it_is_only_looked_at(source: Path, command: str) -> None:
    assert "--layout 'square' is no layout" in usage_error(command, source, "--layout", "square", within=source.parent)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pack"], "Missing argument 'SRC'"),
        (["pack", "a"], "Missing argument 'DST'"),
        (["pack", "a", "b", "c"], "unexpected extra argument"),
        (["convert", "a", "b"], "Missing option '--to'"),
        (["plan", "pack"], "Missing argument 'SRC'"),
        (["plan", "convert", "a"], "Missing option '--to'"),
        (["verify"], "Missing argument 'DST'"),
        (["inspect"], "Missing argument 'SRC'"),
        (["recipes", "show"], "Missing argument 'NAME'"),
        (["packk", "a", "b"], "No such command 'packk'"),
        (["plan", "verify"], "No such command 'verify'"),
        (["pack", "a", "b", "--jbos", "2"], "No such option: --jbos"),
        (["pack", "a", "b", "--jobs", "two"], "Invalid value for '--jobs'"),
        (["pack", "a", "b", "--jobs", "0"], "Invalid value for '--jobs'"),
        (["pack", "a", "b", "--recipe"], "Option '--recipe' requires an argument"),
    ],
    ids=" ".join,
)
def test_a_command_line_that_cannot_be_right_exits_with_2(tmp_path: Path, arguments: list[str], says: str) -> None:
    assert says in usage_error(*arguments, within=tmp_path)


def test_a_layout_that_the_recipe_lacks_is_refused(source: Path) -> None:
    (source.parent / "r.yaml").write_text(
        "about: x\nmodel_types: [qwen3_moe]\ndims: {E: num_experts, I: moe_intermediate_size, H: hidden_size}\n"
        'layouts:\n  experts:\n    "{block}.mlp.experts.{expert}.down_proj.weight [H, I]": down\n'
        '  packed:\n    "{block}.mlp.experts.down_proj [E, H, I]": down\n'
    )
    arguments = ["convert", source, source.parent / "t", "--to", "hub", "--recipe", source.parent / "r.yaml"]
    message = usage_error(*arguments, within=source.parent)
    assert "recipe r has no layout 'hub'\n  -> It has: packed, experts." in message


def test_an_unknown_recipe_is_refused(source: Path) -> None:
    for name in ("gate_up_dwon", "absent.yaml", "x" * 300, str(source), ""):
        for command in (["pack", source, source.parent / "target"], ["inspect", source], ["verify", source]):
            message = refused(*command, f"--recipe={name}", within=source.parent)
            assert f"there is no recipe {name!r}, neither shipped nor as a file\n" in message
            assert ("-> Did you mean 'gate_up_down'?" in message) == (name == "gate_up_dwon")


# Showing


@pytest.mark.parametrize("command", CONVERSIONS, ids=lambda command: command[0])
@pytest.mark.parametrize("json_option", [[], ["--json"]], ids=["text", "json"])
def test_a_dry_run_shows_the_plan_and_writes_nothing(source: Path, command: list[str], json_option: list[str]) -> None:
    before = tree(source.parent)
    name, *to = command
    result = succeeds(name, source, source.parent / "target", *to, "--dry-run", *json_option)
    assert tree(source.parent) == before
    planned = succeeds("plan", name, source, source.parent / "target", *to, *json_option)
    assert without_free_space(result) == without_free_space(planned)


def without_free_space(result: Result) -> list[str]:
    return [line for line in result.out.splitlines() if "free" not in line]


def test_a_plan_as_json_counts_every_byte(source: Path) -> None:
    (source / "tokenizer.json").write_text("{}")
    target = source.parent / "target"
    planned = json.loads(succeeds("plan", "pack", source, "--json", "--max-shard-size", "1kB").out)
    succeeds("pack", source, target, "--max-shard-size", "1kB")
    packed, files = pack_by_hand(experts_layout()), tree(target)
    assert planned["schema_version"] == 1
    assert (planned["model_type"], planned["recipe"], planned["layout"]) == ("qwen3_moe", "gate_up_down", "packed")
    assert planned["bytes_in"] == planned["bytes_out"] == sum(len(item.content) for item in packed.values()) == 3520
    assert {file["path"]: file["bytes"] for file in planned["files"]} == {
        name: len(content) for name, content in files.items() if name.endswith(".safetensors")
    }
    assert sum(file["tensors"] for file in planned["files"]) == len(packed)
    assert {file["path"]: file["bytes"] for file in planned["sidecars"]} == {
        name: len(files[name]) for name in ("config.json", "tokenizer.json")
    }
    merged, copied = planned["groups"]
    assert (merged["what"], merged["tensors_in"], merged["tensors_out"]) == ("merged", 24, 4)
    assert (merged["bytes_in"], merged["bytes_out"]) == (2880, 2880)
    assert merged["from"] == [
        f"model.layers.{{0..1}}.mlp.experts.{{0..3}}.{part}_proj.weight" for part in ("gate", "up", "down")
    ]
    assert (copied["what"], copied["tensors_in"], copied["bytes_out"]) == ("copied", 6, 640)
    assert planned["disk"]["needed_bytes"] == sum(len(files[name]) for name in files if name != "moeconv.json")


def test_a_plan_as_text_says_what_becomes_of_every_tensor(source: Path) -> None:
    text = succeeds("plan", "pack", source).out
    for says in (
        f"{source}  (qwen3_moe, recipe gate_up_down)  ->  packed",
        "merged          24 ->       4 tensors",
        "from model.layers.{0..1}.mlp.experts.{0..3}.gate_proj.weight",
        "to   model.layers.{0..1}.mlp.experts.gate_up_proj",
        "copied           6 ->       6 tensors",
        "3.52 kB in 3 files -> 3.52 kB in 1 file",
    ):
        assert says in text


@pytest.mark.parametrize("command", ["inspect", "plan pack", "recipes list"])
def test_json_is_all_that_is_printed(source: Path, command: str) -> None:
    arguments = command.split() + ([] if "recipes" in command else [str(source)])
    result = succeeds(*arguments, "--json")
    assert json.loads(result.out)["schema_version"] == 1
    assert result.err == ""


def test_a_run_as_json_counts_what_it_did(source: Path) -> None:
    (source / "model.gguf").write_text("")
    result = succeeds("pack", source, source.parent / "target", "--json")
    report = json.loads(result.out)
    seconds = report.pop("seconds")
    assert seconds >= 0
    assert report == {
        "schema_version": 1,
        "destination": str(source.parent / "target"),
        "layout": "packed",
        "recipe": "gate_up_down",
        "up_to_date": False,
        "tensors": 10,
        "bytes": (source.parent / "target" / "model.safetensors").stat().st_size,
        "resumed_bytes": 0,
        "warnings": ["left out: model.gguf (0 bytes): weights in another format"],
    }
    assert result.err == "moeconv: warning: left out: model.gguf (0 bytes): weights in another format\n"


def test_inspect_as_json_describes_the_experts(source: Path) -> None:
    report = json.loads(succeeds("inspect", source, "--json").out)
    assert (report["model_type"], report["recipe"], report["tensors"], report["bytes"]) == (
        "qwen3_moe", "gate_up_down", 30, 3520,
    )  # fmt: skip
    (experts,) = report["experts"]
    assert experts["blocks"] == ["model.layers.{0..1}"]
    assert (experts["layout"], experts["parts"], experts["tensors"]) == ("experts", ["gate", "up", "down"], 24)
    assert experts["sizes"] == {"E": 4, "I": 6, "H": 10}
    assert report["expert_bytes"] == experts["bytes"] == 2880
    assert report["bytes_by_dtype"] == {"BF16": 3200, "F32": 320}
    assert report["made_by_moeconv"] is False


def test_inspect_names_what_would_stop_a_conversion(source: Path) -> None:
    (source / "config.json").write_text(json.dumps({**CONFIG, "num_experts": 5}))
    problem = "model.layers.0: mlp.experts.{expert}.gate_proj.weight has 4 of 5 experts; missing: 4"
    assert f"  problem    {problem}\n" in succeeds("inspect", source).out


def test_inspect_works_without_a_recipe(source: Path) -> None:
    (source / "config.json").write_text(json.dumps({"model_type": "never_seen"}))
    assert "recipe     none" in succeeds("inspect", source).out
    assert json.loads(succeeds("inspect", source, "--json").out)["experts"] == []


def test_a_layer_in_another_layout_is_shown_on_its_own(source: Path) -> None:
    tensors = experts_layout(layers=3)
    mixed = {
        **{name: item for name, item in tensors.items() if ".layers.1.mlp.experts" not in name},
        **{name: item for name, item in pack_by_hand(tensors).items() if ".layers.1.mlp.experts" in name},
    }
    folder = write_folder(source.parent / "mixed", mixed, CONFIG, 1)
    experts = json.loads(succeeds("inspect", folder, "--json").out)["experts"]
    shown = {(group["layout"], *group["blocks"]) for group in experts}
    assert shown == {("experts", "model.layers.{0,2}"), ("packed", "model.layers.1")}


# Recipes


def test_every_shipped_recipe_can_be_listed_shown_and_checked() -> None:
    listed = json.loads(succeeds("recipes", "list", "--json").out)["recipes"]
    text = succeeds("recipes", "list").out
    assert len(listed) > 3
    for recipe in listed:
        assert recipe["about"] in text
        assert recipe["model_types"]
        assert "layouts:" in succeeds("recipes", "show", recipe["name"]).out
        assert "layouts " in succeeds("recipes", "check", recipe["name"]).out


def test_what_recipes_show_prints_is_a_recipe_of_ones_own(source: Path) -> None:
    path = source.parent / "mine.yaml"
    path.write_text(succeeds("recipes", "show", "gate_up_down").out)
    assert "mine.yaml: layouts hub, packed, experts; parts gate, up, down" in succeeds("recipes", "check", path).out
    succeeds("pack", source, source.parent / "target", "--recipe", path)
    assert read_folder(source.parent / "target") == pack_by_hand(experts_layout())


# The process around it


def test_the_console_script_and_the_module_are_the_same_program(source: Path) -> None:
    script = Path(sys.executable).parent / "moeconv"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == process("--version").stdout == f"moeconv {__version__}\n"


def test_a_refusal_goes_to_stderr_with_exit_code_1(source: Path) -> None:
    (source / "model-00002-of-00003.safetensors").unlink()
    done = process("pack", source, source.parent / "target")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"moeconv: {source}/model-00002-of-00003.safetensors is missing")
    assert "\n  -> Download model-00002-of-00003.safetensors again.\n" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_conversion_ends_with_exit_code_0_and_one_line(source: Path) -> None:
    done = process("pack", source, source.parent / "target")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{source.parent}/target: 30 tensors -> 10, 3.52 kB in 1 file, ")
    assert done.stdout.count("\n") == 1


def test_a_reader_that_goes_away_is_no_reason_for_a_traceback(source: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        command = [sys.executable, "-m", "moeconv", "recipes", "list"]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_an_error(source: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "moeconv", "inspect", str(source)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "\n  -> " in done.stderr
    assert "Traceback" not in done.stderr


def shell(line: str, within: Path) -> subprocess.CompletedProcess[str]:
    line = line.replace("moeconv", f"{sys.executable} -m moeconv")
    return subprocess.run(["sh", "-c", line], cwd=within, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams_change_nothing_but_what_is_seen(source: Path, closed: str) -> None:
    (source / "model.gguf").write_text("")
    done = shell(f"moeconv pack source target {closed}", source.parent)
    assert done.returncode == 0
    assert ("30 tensors -> 10" in done.stdout) == (">&-" not in closed.replace("2>&-", ""))
    assert done.stderr == "" if "2>&-" in closed else done.stderr.startswith("moeconv: warning: left out: model.gguf")
    assert read_folder(source.parent / "target") == pack_by_hand(experts_layout())
    refusal = shell(f"moeconv pack absent other {closed}", source.parent)
    assert (refusal.returncode, refusal.stdout) == (1, "")
    assert refusal.stderr == "" if "2>&-" in closed else refusal.stderr.startswith("moeconv: absent is not a folder")


def test_names_that_are_not_utf_8_are_no_reason_for_a_traceback(source: Path) -> None:
    try:
        (source / os.fsdecode(b"a\xff.bin")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    odd = source.rename(source.parent / os.fsdecode(b"n\xff"))
    middle, target = source.parent / os.fsdecode(b"m\xfe"), source.parent / "target"
    for arguments in (["inspect", odd], ["plan", "pack", odd], ["pack", odd, middle], ["unpack", middle, target]):
        for option in ([], ["--json"]):
            done = process(*arguments, *option)
            assert done.returncode == 0, done
            assert not option or json.loads(done.stdout)["schema_version"] == 1
    assert process("pack", odd, middle).stdout == f"{source.parent}/m\\udcfe: already up to date\n"
    manifest = json.loads((middle / "moeconv.json").read_text())
    assert manifest["source"]["path"] == str(odd)
    assert manifest["source"]["left_out"][0]["path"] == os.fsdecode(b"a\xff.bin")
    history = json.loads((target / "moeconv.json").read_text())["history"]
    assert history[0]["source"] == manifest["source"]
    done = process("pack", odd / "absent", target)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)


def test_neither_torch_nor_transformers_is_imported(source: Path) -> None:
    """Nor anything else that is heavy: a conversion starts at once."""
    code = (
        "import sys\n"
        f"sys.argv = ['moeconv', 'pack', {str(source)!r}, {str(source.parent / 'target')!r}]\n"
        "from moeconv.cli import app\n"
        "from moeconv.process import guarded\n"
        "assert guarded(app) == 0\n"
        "heavy = {'torch', 'transformers', 'safetensors', 'huggingface_hub', 'bitsandbytes', 'numpy', 'rich'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# Documentation

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def words_of_the_command_line() -> set[str]:
    """Every command with its groups, and every option."""
    words: set[str] = set()
    pending = [("moeconv", typer.main.get_command(app))]
    while pending:
        name, command = pending.pop()
        words |= {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        commands = getattr(command, "commands", {})
        pending += [(f"{name} {inner}", commands[inner]) for inner in commands]
        if not commands:
            words.add(name)
    return words


@pytest.mark.skipif(len(README) < 500, reason="README.md is not written yet")
@pytest.mark.parametrize("word", sorted(words_of_the_command_line()))
def test_every_command_and_option_stands_in_the_readme(word: str) -> None:
    assert word in README


def test_every_command_and_option_has_a_help_text() -> None:
    pending = [typer.main.get_command(app)]
    while pending:
        command = pending.pop()
        assert command.help
        assert not [p.name for p in command.params if p.name != "help" and not getattr(p, "help", None)]
        pending += getattr(command, "commands", {}).values()
    assert "Exit codes: 0" in succeeds("--help").out


def test_unpack_gives_a_source_of_mixed_layouts_back(tmp_path: Path) -> None:
    """Layers one tensor an expert, an MTP module packed: so they come back, and `convert` brings all into one."""
    main = experts_layout()
    mtp = {f"mtp.layers.0{name[14:]}": item for name, item in main.items() if name.startswith("model.layers.0.mlp")}
    mixed = {**main, **pack_by_hand(mtp)}
    assert len(mixed) > len(main)
    source = write_folder(tmp_path / "source", mixed, CONFIG, 3)
    packed, back, experts = tmp_path / "packed", tmp_path / "back", tmp_path / "experts"
    succeeds("pack", source, packed)
    assert read_folder(packed) == pack_by_hand({**main, **mtp})
    succeeds("unpack", packed, back)
    assert read_folder(back) == mixed
    succeeds("convert", packed, experts, "--to", "experts")
    assert read_folder(experts) == {**main, **mtp}
    for made, origin in ((packed, source), (back, packed), (experts, packed)):
        succeeds("verify", made, "--against", origin)
