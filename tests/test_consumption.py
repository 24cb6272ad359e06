"""Sources that are deleted while they are converted: nothing of them may ever be lost."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from moeconv.checkpoint import CONSUMED, JOURNAL, open_checkpoint
from moeconv.consumption import peak_disk
from moeconv.destination import partial_of
from moeconv.errors import CheckpointError, OutputError
from moeconv.executor import Outcome, execute
from moeconv.files import Files, WriteFile
from moeconv.plan import Options, Plan, plan
from moeconv.quantize import plan_dequantize
from moeconv.selection import select_recipe
from moeconv.steps import Copy
from tests.commands import refused, run, succeeds, tree
from tests.faults import DyingFiles, FailingFiles, FullDisk, Killed, PowerLossFiles
from tests.folders import CONFIG, experts_layout, finite, pack_by_hand, read_folder, tensor, write_file, write_folder

#: `make soak`: every moment, not some of them.
SOAK = bool(os.environ.get("MOECONV_SOAK"))
SIZES = Options(max_shard_nbytes=1500, jobs=2)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "source", experts_layout(), CONFIG, 5)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def make_plan(source: Path, target: Path, options: Options = SIZES) -> Plan:
    checkpoint = open_checkpoint(source, stand_ins=partial_of(target) / CONSUMED)
    return plan(checkpoint, select_recipe(checkpoint), "packed", options)


def consume(source: Path, target: Path, files: Files | None = None, **how: Any) -> Outcome:
    return execute(make_plan(source, target), target, ["test"], files=files, consume_source=True, **how)


def weights_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def made(target: Path) -> dict[str, bytes]:
    return {name: content for name, content in tree(target).items() if name not in ("moeconv.json", JOURNAL)}


# What it does


def test_nothing_but_the_weights_of_the_source_is_deleted(source: Path) -> None:
    target, before = source.parent / "target", tree(source)
    succeeds("pack", source, target, "--consume-source", "--yes")
    assert read_folder(target) == pack_by_hand(experts_layout())
    assert tree(source) == {name: item for name, item in before.items() if not name.endswith(".safetensors")}
    assert {path.name for path in source.parent.iterdir()} == {"source", "target"}
    assert not (target / CONSUMED).exists()
    assert json.loads((target / "moeconv.json").read_text())["consumed_source"] is True


def test_the_same_command_once_more_is_up_to_date(source: Path) -> None:
    command = ("pack", source, source.parent / "target", "--consume-source", "--yes")
    succeeds(*command)
    assert "already up to date" in succeeds(*command).out
    assert json.loads(succeeds(*command, "--json").out)["up_to_date"]
    (source.parent / "link").symlink_to(source)
    others = ("pack", source.parent / "link", f"{source.parent}/target/", "--jobs", "1")
    assert "already up to date" in succeeds(*others).out
    message = refused("pack", source, source.parent / "target", "--max-shard-size", "1kB", within=source.parent)
    assert f"{source}/model-00001-of-00005.safetensors is missing" in message


@pytest.mark.parametrize("damage", ["shorter", "gone"])
def test_a_damaged_result_of_a_consumed_source_is_not_up_to_date(source: Path, damage: str) -> None:
    command = ("pack", source, source.parent / "target", "--consume-source", "--yes")
    succeeds(*command)
    path = source.parent / "target" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1]) if damage == "shorter" else path.unlink()
    assert f"{path} is missing or was changed" in refused(*command, within=source.parent)


def test_a_plan_of_it_deletes_nothing(source: Path) -> None:
    before = tree(source.parent)
    shown = succeeds("pack", source, source.parent / "target", "--consume-source", "--dry-run", "--json").out
    needed = peak_disk(make_plan(source, source.parent / "target", Options()), source.parent, Files()).needed
    assert json.loads(shown)["disk"]["needed_bytes"] == needed
    assert tree(source.parent) == before


def test_a_file_that_nothing_of_the_result_is_made_from_goes_too(source: Path) -> None:
    """As static scales for activations are, which no format keeps."""
    folder, target = source.parent / "w8a8", source.parent / "target"
    succeeds("quantize", quantizable(source), folder, "--format", "w8a8")
    tensors = read_folder(folder)
    scales = {name: item for name, item in tensors.items() if name.endswith("mlp.experts.0.up_proj.weight_scale")}
    write_file(
        folder / "model-static.safetensors",
        {name.replace("weight_scale", "input_scale"): tensor((1,), "F32", name) for name in scales},
    )
    again = write_folder(source.parent / "again", tensors, json.loads((folder / "config.json").read_text()), 3)
    shutil.copy(folder / "model-static.safetensors", again)
    index = json.loads((again / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {name.replace("weight_scale", "input_scale"): "model-static.safetensors" for name in scales}
    del index["metadata"]
    (again / "model.safetensors.index.json").write_text(json.dumps(index))
    succeeds("dequantize", again, target, "--consume-source", "--yes")
    assert not weights_of(again)
    succeeds("dequantize", folder, source.parent / "wanted")
    assert read_folder(target) == read_folder(source.parent / "wanted")


def quantizable(source: Path) -> Path:
    """A source whose values are finite."""
    tensors = finite(experts_layout(experts=4, inner=32, hidden=64))
    config = {**CONFIG, "moe_intermediate_size": 32, "hidden_size": 64}
    return write_folder(source.parent / "quantizable", tensors, config, 4)


# What it refuses


def test_it_asks_for_yes(source: Path) -> None:
    message = refused("pack", source, source.parent / "target", "--consume-source", within=source.parent, code=2)
    assert "say so with --yes" in message


@pytest.mark.parametrize("option", ["--no-fsync", "--target-size=1MB"])
def test_it_cannot_go_with_what_contradicts_it(source: Path, option: str) -> None:
    more = ["--formats", "w4a16"] if "size" in option else []
    arguments = (source, source.parent / "target", "--consume-source", "--yes", option, *more)
    assert "--consume-source" in refused("quantize", *arguments, within=source.parent, code=2)


def test_yes_without_it_is_refused(source: Path) -> None:
    refused("pack", source, source.parent / "target", "--yes", within=source.parent, code=2)


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_files_that_have_other_names_are_not_deleted(source: Path, kind: str) -> None:
    path, other = source / "model-00002-of-00005.safetensors", source.parent / "blob"
    path.rename(other)
    path.symlink_to(other) if kind == "symbolic" else path.hardlink_to(other)
    command = ("pack", source, source.parent / "target", "--consume-source", "--yes")
    message = refused(*command, within=source.parent)
    assert str(path) in message
    assert "leave out --consume-source" in message.lower() or "Remove the other names" in message


class WatchedDisk(FullDisk):
    """Knows how much more lay on it than before, at most: what was written, less what was deleted."""

    def __init__(self, source: Path, free: int) -> None:
        super().__init__(free)
        self.source = source
        self.held = self.most = 0

    def open_write(self, path: Path) -> WriteFile:
        return _Counted(path, super().open_write(path)._fd, self)

    def create(self, path: Path, nbytes: int, *, reserve: bool = True) -> WriteFile:
        return _Counted(path, super().create(path, nbytes, reserve=reserve)._fd, self)

    def remove_file(self, path: Path) -> None:
        if path.parent == self.source:
            self.held -= path.stat().st_size
        super().remove_file(path)


class _Counted(WriteFile):
    def __init__(self, path: Path, fd: int, disk: WatchedDisk) -> None:
        super().__init__(path, fd)
        self.disk = disk

    def _pwrite(self, buffer: memoryview | bytes, offset: int) -> int:
        self.disk.held += len(buffer)
        self.disk.most = max(self.disk.most, self.disk.held)
        return super()._pwrite(buffer, offset)


class OtherDisk(Files):
    """The source lies on a disk of its own: deleting it frees nothing here."""

    def disk_number(self, path: Path) -> int:
        return int(path.name == "many")


def test_a_disk_too_small_for_both_is_enough(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeconv.consumption.LAG_BYTES", 20_000)
    monkeypatch.setattr("moeconv.executor.LAG_BYTES", 20_000)
    monkeypatch.setattr("moeconv.tasks.TASK_BYTES", 10_000)
    monkeypatch.setattr("moeconv.consumption.MAX_PLANNED_BYTES", 500)  # else the tensors here are small ones
    target = source.parent / "target"
    tensors = experts_layout(layers=20, inner=64, hidden=96)
    config = {**CONFIG, "num_hidden_layers": 20, "moe_intermediate_size": 64, "hidden_size": 96}
    many = write_folder(source.parent / "many", tensors, config, 20)
    wanted = make_plan(many, target, Options(jobs=1, max_shard_nbytes=200_000))
    needed = peak_disk(wanted, target, Files()).needed
    assert needed < wanted.output_nbytes * 0.6
    assert peak_disk(wanted, target, OtherDisk()).needed >= wanted.output_nbytes
    with pytest.raises(OutputError, match="bytes\\) free"):
        execute(wanted, target, ["test"], files=FullDisk(needed - 1), consume_source=True)
    assert len(weights_of(many)) == 20
    disk = WatchedDisk(many, needed)
    execute(wanted, target, ["test"], files=disk, consume_source=True)
    assert read_folder(target) == pack_by_hand(tensors)
    assert disk.most <= needed


# What it never does


def test_a_file_goes_only_when_every_task_that_reads_it_is_journalled(source: Path) -> None:
    target = source.parent / "target"
    wanted = make_plan(source, target)
    seen: list[str] = []

    class Watching(Files):
        def remove_file(self, path: Path) -> None:
            if path.parent == source and path.suffix == ".safetensors":
                journal = [json.loads(line) for line in (partial_of(target) / JOURNAL).read_text().splitlines()]
                done = {id_ for line in journal for id_ in line.get("done", [])}
                assert all(line.get("checked") and line["fsync"] for line in journal if "done" in line)
                number = [file.path for file in wanted.source.files].index(path.name)
                readers = {
                    task.id
                    for task in wanted.tasks
                    for step in task.steps
                    if isinstance(step, Copy) and step.source_file == number
                }
                assert readers
                assert readers <= done
                assert (partial_of(target) / CONSUMED / path.name).stat().st_size == path.stat().st_size
                seen.append(path.name)
            super().remove_file(path)

    execute(wanted, target, ["test"], files=Watching(), consume_source=True)
    assert len(seen) == 5


class Forgetful(Files):
    """A disk that loses what was written at one place, once it is synced."""

    def create(self, path: Path, nbytes: int, *, reserve: bool = True) -> WriteFile:
        return _Forgetting(path, super().create(path, nbytes, reserve=reserve)._fd)

    def open_write(self, path: Path) -> WriteFile:
        return _Forgetting(path, super().open_write(path)._fd)


class _Forgetting(WriteFile):
    def sync(self) -> None:
        super().sync()
        if self.path.name.startswith("model-00002-of-"):
            os.pwrite(self._fd, b"\x55" * 8, 4096 + 64)


def test_bytes_that_the_disk_does_not_keep_stop_the_run_before_their_source_is_deleted(source: Path) -> None:
    target, before = source.parent / "target", tree(source)
    with pytest.raises(OutputError, match="does not hold what was written to it, near byte"):
        consume(source, target, Forgetful())
    assert not target.exists()
    assert read_folder(source).items() <= experts_layout().items()
    consume(source, target)
    assert read_folder(target) == pack_by_hand(experts_layout())
    assert len(before) > len(tree(source))


def test_a_source_file_that_changed_is_not_deleted(source: Path) -> None:
    target, path = source.parent / "target", source / "model-00003-of-00005.safetensors"

    class Meddling(Files):
        def boot_id(self) -> str:
            os.utime(path, ns=(7, 7))
            return super().boot_id()

    with pytest.raises(CheckpointError, match="changed while it was read"):
        consume(source, target, Meddling())
    assert path.exists()
    assert not target.exists()


@pytest.mark.parametrize("loss", ["death", "power", "power, names survive"])
def test_a_run_that_dies_anywhere_loses_nothing(source: Path, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeconv.executor.JOURNAL_SECONDS", 0.0)
    fresh = source.rename(source.parent / "fresh")
    resumed = deaths = 0
    for number in range(1, 2000, 1 if SOAK else 17):
        target = source.parent / f"target{number}"
        shutil.copytree(fresh, source)  # with the times of its files
        files = DyingFiles(number) if loss == "death" else PowerLossFiles(number, keeps_names="names" in loss)
        try:
            consume(source, target, files)
        except Killed:
            deaths += 1
            if isinstance(files, PowerLossFiles):
                files.lose()
        else:
            break
        if target.exists():  # it died behind its last rename
            assert read_folder(target) == pack_by_hand(experts_layout()), number
        else:
            resumed += consume(source, target).resumed_nbytes
            assert read_folder(target) == pack_by_hand(experts_layout()), number
            assert not weights_of(source), number
            assert not partial_of(target).exists(), number
        shutil.rmtree(source)
        shutil.rmtree(target)
    assert deaths > (100 if SOAK else 10)
    assert resumed


@pytest.mark.parametrize("keeps_names", [True, False])
def test_a_run_that_did_not_wait_for_the_disk_can_be_followed_by_one_that_consumes(
    source: Path, keeps_names: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that the first one wrote or named is sure to be there, until the second one has seen to it."""
    monkeypatch.setattr("moeconv.executor.JOURNAL_SECONDS", 0.0)
    fresh = source.rename(source.parent / "fresh")
    first, deaths = 50, 0
    for number in range(1, 400, 1 if SOAK else 9):
        target = source.parent / f"deep{number}" / "target"
        shutil.copytree(fresh, source)
        files = PowerLossFiles(first, keeps_names=keeps_names)
        with pytest.raises(Killed):
            execute(make_plan(source, target), target, ["test"], files=files, fsync=False)
        files.left = number
        try:
            consume(source, target, files)
        except Killed:
            deaths += 1
        else:
            break
        files.lose()
        if not target.exists():
            consume(source, target)
        assert read_folder(target) == pack_by_hand(experts_layout()), number
        shutil.rmtree(source)
    assert deaths > 5


def test_small_weight_files_are_consumed_and_planned_again(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeconv.executor.JOURNAL_SECONDS", 0.0)
    small = write_folder(source.parent / "small", experts_layout(), CONFIG, 15)
    assert min(path.stat().st_size for path in small.glob("*.safetensors")) < 1024
    target = source.parent / "target"
    with pytest.raises(OutputError):
        consume(small, target, FailingFiles("remove", 8))
    assert 0 < len(weights_of(small)) < 15
    consume(small, target)
    assert read_folder(target) == pack_by_hand(experts_layout())


def test_what_planning_reads_of_tensors_outlives_them(tmp_path: Path, source: Path) -> None:
    """States of 4-bit tensors decide how others are decoded."""
    folder, target = tmp_path / "nf4", tmp_path / "target"
    succeeds("quantize", quantizable(source), folder, "--format", "nf4", "--max-shard-size", "9kB")
    kept = shutil.copytree(folder, tmp_path / "kept")
    assert len(weights_of(folder)) > 2
    deaths = 0
    for number in range(40, 2000, 1 if SOAK else 41):
        checkpoint = open_checkpoint(folder)
        wanted = plan_dequantize(checkpoint, select_recipe(checkpoint), None, Options(jobs=1, max_shard_nbytes=15000))
        try:
            execute(wanted, target, ["test"], files=DyingFiles(number), consume_source=True)
        except Killed:
            deaths += 1
        else:
            break
        if not target.exists():
            checkpoint = open_checkpoint(folder, stand_ins=partial_of(target) / CONSUMED)
            again = plan_dequantize(
                checkpoint, select_recipe(checkpoint), None, Options(jobs=1, max_shard_nbytes=15000)
            )
            assert [task.id for task in again.tasks] == [task.id for task in wanted.tasks]
            execute(again, target, ["test"], consume_source=True)
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        result = read_folder(target)
        shutil.rmtree(target)
        succeeds("dequantize", kept, target)
        assert result == read_folder(target), number
        shutil.rmtree(target)
    assert deaths > 2


# An unfinished run that holds the only copy


def halfway(source: Path, target: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moeconv.executor.JOURNAL_SECONDS", 0.0)
        with pytest.raises(OutputError):
            consume(source, target, FailingFiles("remove", 3))
    assert weights_of(partial_of(target) / CONSUMED)
    assert weights_of(source)


def test_a_plain_run_goes_on_where_a_consuming_one_stopped(source: Path) -> None:
    target = source.parent / "target"
    halfway(source, target)
    left = weights_of(source)
    succeeds("pack", source, target, "--max-shard-size", "1500")
    assert read_folder(target) == pack_by_hand(experts_layout())
    assert weights_of(source) == left


def test_a_run_that_has_consumed_is_not_finished_without_waiting_for_the_disk(source: Path) -> None:
    target = source.parent / "target"
    halfway(source, target)
    command = ("pack", source, target, "--max-shard-size", "1500", "--no-fsync")
    assert "--no-fsync could lose it" in refused(*command, within=source.parent)


def test_an_unfinished_run_that_was_copied_goes_on(source: Path) -> None:
    """With other times of its files, and beside a tokenizer that was written again."""
    target, moved = source.parent / "target", source.parent / "moved"
    halfway(source, target)
    for path in partial_of(target).rglob("*"):
        os.utime(path, ns=(3, 3))
    os.utime(source / "tokenizer.json", ns=(5, 5))
    partial_of(target).rename(partial_of(moved))
    consume(source, moved)
    assert read_folder(moved) == pack_by_hand(experts_layout())


def test_with_all_of_the_source_back_a_run_can_begin_anew(source: Path) -> None:
    target = source.parent / "target"
    kept = shutil.copytree(source, source.parent / "kept")
    halfway(source, target)
    for path in kept.glob("*.safetensors"):
        shutil.copyfile(path, source / path.name)
    command = ("pack", source, target, "--max-shard-size", "1500")
    assert "changed in the source (time of its last change)" in refused(*command, within=source.parent)
    succeeds(*command, "--restart")
    assert read_folder(target) == pack_by_hand(experts_layout())


@pytest.mark.parametrize("options", [["--restart"], ["--overwrite", "--max-shard-size", "2000"]])
def test_the_only_copy_is_never_discarded(source: Path, options: list[str]) -> None:
    target = source.parent / "target"
    halfway(source, target)
    message = refused("pack", source, target, *options, within=source.parent)
    assert f"{partial_of(target)} holds the only copy of what" in message


@pytest.mark.parametrize("keep", [0, 1])
def test_a_journal_that_lost_lines_makes_no_zeros_of_what_is_gone(source: Path, keep: int) -> None:
    target = source.parent / "target"
    halfway(source, target)
    path = partial_of(target) / JOURNAL
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:keep]))
    result = run("pack", source, target, "--max-shard-size", "1500")
    assert result.code == 1
    assert "holds the only copy of what" in result.err or "the journal does not say" in result.err
    assert not target.exists()
