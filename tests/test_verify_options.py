"""`verify`: how much it looks at, what it tells programs, which memory it takes, and how it compares."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moeconv.sample import Sample, parse_sample
from tests.commands import refused, run, succeeds
from tests.folders import read_folder, write_folder
from tests.weights import config_of, weights

SIZE = 128


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("options") / "source", weights(SIZE, seed=4), config_of(SIZE), 1)


@pytest.fixture(scope="module")
def made(source: Path) -> Path:
    succeeds("quantize", source, source.parent / "made", "--format", "w4a16", "--no-fsync")
    return source.parent / "made"


NAMED = [
    (f"model.layers.{a}.experts.{b}.{part}", (a, b)) for a in range(48) for b in range(128) for part in ("up", "down")
]


def test_a_sample_is_spread_over_layers_and_experts() -> None:
    found = Sample(480).of(NAMED)
    assert len(found) == 480
    layers, experts = ([item[axis] for item in found] for axis in (0, 1))
    assert all(4 <= layers.count(layer) <= 16 for layer in range(48))
    assert all(1 <= experts.count(expert) <= 8 for expert in range(128))


def test_a_sample_is_the_same_every_time_but_for_its_seed() -> None:
    assert Sample(50).of(NAMED) == Sample(50).of(NAMED) == Sample(50).of(NAMED[:])
    assert Sample(50).of(NAMED) != Sample(50, seed=1).of(NAMED)
    assert set(Sample(50).of(NAMED)) == set(Sample(50).of(NAMED[::-1]))


@pytest.mark.parametrize(
    ("text", "count"), [("1", 1), ("500", 500), ("1%", 123), ("0.01%", 2), ("100%", 12288), ("99999", 12288)]
)
def test_a_sample_is_as_large_as_it_is_said(text: str, count: int) -> None:
    assert len(parse_sample(text).of(NAMED)) == count


@pytest.mark.parametrize("text", ["0", "0%", "101%", "-1", "some", "1.5", ""])
def test_a_sample_that_makes_no_sense_is_refused(made: Path, text: str) -> None:
    assert "is neither a number of matrices nor a share" in refused(
        "verify", made, f"--sample={text}", within=made, code=2
    )


@pytest.mark.parametrize("options", [["--sample", "3"], ["--sample", "10%", "--seed", "7"]])
@pytest.mark.parametrize("by", [None, "bytes", "values"])
def test_a_sample_says_how_much_it_looked_at(source: Path, made: Path, options: list[str], by: str | None) -> None:
    against = ["--against", source, "--compare", by] if by else []
    report = json.loads(succeeds("verify", made, *against, *options, "--json").out)
    looked = report["looked_at"]
    assert 0 < looked["bytes"] < looked["of_bytes"] / 3
    if by == "values":
        assert 3 <= looked["matrices"] < looked["of_matrices"] / 5
    text = succeeds("verify", made, *against, *options).out
    assert " of " in text


def test_a_sample_finds_what_lies_in_it(source: Path, made: Path, tmp_path: Path) -> None:
    """A fault in every matrix of experts."""
    tensors = {
        name: item._replace(content=item.content[::-1]) if name.endswith("weight_packed") else item
        for name, item in read_folder(made).items()
    }
    folder = tmp_path / "wrong"
    shutil.copytree(made, folder)
    config, manifest = (made / "config.json").read_bytes(), (made / "moeconv.json").read_bytes()
    write_folder(folder, tensors, None, 1)
    for path in folder.glob("*.safetensors"):
        if path.name == "model.safetensors":
            path.unlink()
    (folder / "config.json").write_bytes(config)
    (folder / "moeconv.json").write_bytes(manifest)
    for by in ("bytes", "values"):
        assert run("verify", folder, "--against", source, "--compare", by, "--sample", "20%").code == 1


def test_the_json_of_a_comparison_by_value(source: Path, made: Path) -> None:
    report = json.loads(succeeds("verify", made, "--against", source, "--compare", "values", "--json").out)
    assert list(report) == [
        "schema_version", "ok", "tensors", "compared_by", "compared_bytes", "looked_at", "formats", "engines", "notes",
        "problems",
    ]  # fmt: skip
    plain, packed = report["formats"]
    assert (plain["format"], plain["relative_error"], plain["snr_db"]) == ("BF16", 0, None)
    assert (packed["format"], packed["matrices"]) == ("w4a16", 32)
    assert 0.05 < packed["relative_error"] <= packed["worst"]["relative_error"] < packed["worst"]["limit"] < 0.5
    assert 14 < packed["snr_db"] < 26
    assert packed["worst"]["name"].startswith("model.layers.")
    assert {engine["reads"] for engine in report["engines"]} <= {"yes", "no", "unknown"}
    text = succeeds("verify", made, "--against", source, "--compare", "values").out
    assert "w4a16" in text
    assert packed["worst"]["name"] in text


def told(made: Path, tmp_path: Path, devices: list[str]) -> Path:
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    manifest = json.loads((folder / "moeconv.json").read_text())
    assert manifest["devices"] == ["cpu"]
    (folder / "moeconv.json").write_text(json.dumps({**manifest, "devices": devices}))
    return folder


def test_what_a_gpu_encoded_is_compared_by_value_where_there_is_none(source: Path, made: Path, tmp_path: Path) -> None:
    folder = told(made, tmp_path, ["cuda:0"])
    result = succeeds("verify", folder, "--against", source, "--device", "cpu")
    assert "compared by value: it was encoded on cuda" in result.err
    assert "tensors like those of" in result.out
    assert (
        "byte for byte" in succeeds("verify", folder, "--against", source, "--device", "cpu", "--compare", "bytes").out
    )


def test_the_folder_of_another_tool_is_compared_by_value(source: Path, made: Path, tmp_path: Path) -> None:
    folder = told(made, tmp_path, ["cpu"])
    (folder / "moeconv.json").unlink()
    (folder / "tokenizer.json").write_text("{}")
    result = succeeds("verify", folder, "--against", source)
    assert "another tool made it, w4a16 of full precision" in result.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--compare", "values"], "--compare without --against"),
        (["--against", ".", "--compare", "names"], "'names' is no way to compare"),
        (["--max-memory", "1MB"], "--max-memory 1,000,000 is less than it takes"),
    ],
)
def test_options_that_cannot_be_right_are_refused(made: Path, options: list[str], says: str) -> None:
    assert says in refused("verify", made, *options, within=made, code=2)


MEASURED = """
import re, sys
from pathlib import Path
from moeconv.cli import app
from moeconv.process import guarded
sys.argv = ["moeconv", *sys.argv[1:]]
code = guarded(app)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1], file=sys.stderr)
sys.exit(code)
"""


def peak(*arguments: object) -> int:
    """Largest resident set of a process that runs a command."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done
    return int(done.stderr.split()[-1]) << 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_memory_is_that_of_tiles_not_of_matrices(tmp_path: Path) -> None:
    """Matrices of 6 MB, and some that are 49 times smaller."""
    peaks = []
    for size in (256, 1792):
        config = config_of(size, num_hidden_layers=1, num_experts=1)
        folder = write_folder(tmp_path / f"{size}", weights(size, layers=1, experts=1), config, 1)
        succeeds("quantize", folder, tmp_path / f"{size}-made", "--format", "fp8", "--no-fsync")
        made = tmp_path / f"{size}-made"
        peaks.append(peak("verify", made, "--against", folder, "--compare", "values", "--jobs", "1"))
    assert peaks[1] < peaks[0] + (96 << 20), peaks  # all of a matrix, decoded on both sides, would be 180 MB
    assert peaks[1] < 420 << 20
