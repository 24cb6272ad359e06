import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moeconv.checkpoint import open_checkpoint
from moeconv.errors import MoeconvError, OutputError
from moeconv.executor import Outcome, execute
from moeconv.files import Files
from moeconv.plan import Options, Plan, plan
from moeconv.recipe_file import load_recipe
from tests.commands import refused, succeeds, tree
from tests.faults import CHANGES, CountingFiles, DyingFiles, FailingFiles, FullDisk, Killed, PowerLossFiles
from tests.folders import CONFIG, experts_layout, read_folder, tensor, write_folder

JOURNAL = ".moeconv-journal"
MANIFEST = "moeconv.json"
RECIPE = load_recipe("gate_up_down")
SIZES = Options(max_shard_nbytes=1500, jobs=2)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "source", experts_layout(), CONFIG, 3)
    (folder / "tokenizer.json").write_text('{"model": 1}')
    (folder / "code").mkdir()
    (folder / "code" / "modeling.py").write_text("import os")
    return folder


def make_plan(source: Path, options: Options = SIZES) -> Plan:
    return plan(open_checkpoint(source), RECIPE, "packed", options)


def convert(source: Path, target: Path, files: Files | None = None, **how: Any) -> Outcome:
    return execute(make_plan(source), target, ["test"], files=files, **how)


def undisturbed(source: Path) -> dict[str, bytes]:
    """What a run that nothing disturbs makes of the source, in a folder of its own."""
    target = source.parent / "undisturbed" / "target"
    if not target.exists():
        convert(source, target)
    return weights_and_sidecars(target)


def weights_and_sidecars(target: Path) -> dict[str, bytes]:
    return {name: content for name, content in tree(target).items() if name != MANIFEST}


def is_right(source: Path, target: Path) -> bool:
    """All is there; the journal may still lie in it."""
    found = weights_and_sidecars(target)
    found.pop(JOURNAL, None)
    return found == undisturbed(source) and (target / MANIFEST).is_file()


def is_complete(source: Path, target: Path) -> bool:
    return weights_and_sidecars(target) == undisturbed(source) and (target / MANIFEST).is_file()


# Where a destination may be


@pytest.mark.parametrize("target", ["source", "source/sub", ".", "source/../source", "link", "link/x"])
def test_a_destination_in_or_around_the_source_is_refused(source: Path, target: str) -> None:
    (source.parent / "link").symlink_to(source)
    destination = source.parent / target
    message = refused("pack", source, destination, within=source.parent)
    assert f"the destination {destination} and the source {source} lie in one another" in message


@pytest.mark.parametrize("target", [".", "..", "/", "sub/.."])
def test_a_destination_without_a_name_of_its_own_is_refused(
    source: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source.parent / "elsewhere" / "sub").mkdir(parents=True)
    monkeypatch.chdir(source.parent / "elsewhere" / "sub")
    refused("pack", source, target, within=source.parent)


@pytest.mark.parametrize("content", [{}, {"a.txt": "x"}, {MANIFEST: "{}"}, {MANIFEST: "no JSON"}, {MANIFEST: "[]"}])
@pytest.mark.parametrize("option", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_a_folder_that_moeconv_did_not_make_is_never_touched(
    source: Path, content: dict[str, str], option: list[str]
) -> None:
    target = source.parent / "target"
    target.mkdir()
    for name, text in content.items():
        (target / name).write_text(text)
    message = refused("pack", source, target, *option, within=source.parent)
    assert f"{target} exists and moeconv did not make it" in message


@pytest.mark.parametrize("kind", ["file", "dangling link", "link to a file"])
@pytest.mark.parametrize("option", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_a_destination_that_is_a_file_is_refused(source: Path, kind: str, option: list[str]) -> None:
    target, other = source.parent / "target", source.parent / "other"
    if kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(other)
        if kind == "link to a file":
            other.write_text("mine")
    says = "exists and moeconv did not make it" if kind == "file" else "is a symbolic link"
    assert f"{target} {says}" in refused("pack", source, target, *option, within=source.parent)


@pytest.mark.parametrize("name", ["target", "target.partial", "target.replaced"])
@pytest.mark.parametrize("option", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_a_destination_that_is_a_link_to_a_folder_is_refused(source: Path, name: str, option: list[str]) -> None:
    succeeds("unpack", source, source.parent / "elsewhere")
    (source.parent / name).symlink_to("elsewhere")
    message = refused("pack", source, source.parent / "target", *option, within=source.parent)
    assert f"{source.parent / name} is a symbolic link" in message


@pytest.mark.parametrize("ending", [".partial", ".replaced"])
@pytest.mark.parametrize("below", ["", "sub"])
def test_a_source_where_a_run_would_work_is_refused(source: Path, ending: str, below: str) -> None:
    taken = source.parent / f"target{ending}"
    (taken / below).parent.mkdir(exist_ok=True)
    source = source.rename(taken / below)
    message = refused("pack", source, taken.with_name("target"), "--overwrite", within=taken.parent)
    assert f"{taken}, which a run to {taken.with_name('target')} makes anew, and the source {source}" in message


def test_a_destination_below_a_file_is_refused(source: Path) -> None:
    (source.parent / "file").write_text("mine")
    message = refused("pack", source, source.parent / "file" / "target", within=source.parent)
    assert "file/target.partial cannot be written: Not a directory" in message


def test_a_destination_with_too_long_a_name_is_refused(source: Path) -> None:
    message = refused("pack", source, source.parent / ("x" * 300), within=source.parent)
    assert "cannot be written: File name too long" in message


class SyncedFolders(Files):
    """Notes which folders were synced after their last new name."""

    def __init__(self) -> None:
        self.synced: list[Path] = []

    def sync_folder(self, path: Path, *, is_ours: bool = True) -> None:
        self.synced.append(path)
        super().sync_folder(path, is_ours=is_ours)


@pytest.mark.parametrize("fsync", [True, False])
def test_parents_of_the_destination_are_made_and_would_survive_a_power_loss(source: Path, fsync: bool) -> None:
    (source / "code" / "deep" / "er").mkdir(parents=True)
    (source / "code" / "deep" / "er" / "x.py").write_text("")
    target, files = source.parent / "a" / "b" / "target", SyncedFolders()
    convert(source, target, files, fsync=fsync)
    assert is_complete(source, target)
    partial = target.with_name("target.partial")
    inner = {partial, partial / "code", partial / "code" / "deep", partial / "code" / "deep" / "er"}
    assert set(files.synced) == (({source.parent, source.parent / "a", target.parent} | inner) if fsync else set())


@pytest.mark.parametrize("mode", [0o755, 0o644, 0o600, 0o444])
def test_other_files_keep_their_permissions(source: Path, mode: int) -> None:
    (source / "run.sh").write_text("#!/bin/sh")
    (source / "run.sh").chmod(mode)
    convert(source, source.parent / "target")
    assert (source.parent / "target" / "run.sh").stat().st_mode & 0o7777 == mode


# A destination that exists


def test_a_finished_destination_is_left_alone_and_exit_code_is_0(source: Path) -> None:
    target = source.parent / "target"
    succeeds("pack", source, target)
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    assert succeeds("pack", source, target).out == f"{target}: already up to date\n"
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before
    assert json.loads(succeeds("pack", source, target, "--json").out)["up_to_date"] is True


@pytest.mark.parametrize("change", ["removed", "shorter", "other header"])
def test_a_finished_destination_that_somebody_damaged_is_not_up_to_date(source: Path, change: str) -> None:
    target = source.parent / "target"
    succeeds("pack", source, target)
    wanted, path = weights_and_sidecars(target), target / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if change != "removed":
        path.write_bytes(content[:-1] if change == "shorter" else b"\1" + content[1:])
    message = refused("pack", source, target, within=source.parent)
    assert f"{path} is missing or was changed since moeconv made it\n  -> Make the folder anew" in message
    succeeds("pack", source, target, "--overwrite")
    assert weights_and_sidecars(target) == wanted


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "tokenizer.json", "code/modeling.py", "config.json"])
@pytest.mark.parametrize("change", ["removed", "longer", "a folder"])
def test_any_damaged_file_of_a_finished_destination_is_found(source: Path, name: str, change: str) -> None:
    target = source.parent / "target"
    convert(source, target)
    (target / name).unlink()
    if change == "longer":
        (target / name).write_bytes(undisturbed(source)[name] + b" ")
    elif change == "a folder":
        (target / name).mkdir()
    with pytest.raises(OutputError) as caught:
        convert(source, target)
    assert f"{target / name} is missing or was changed since moeconv made it" in str(caught.value)
    convert(source, target, overwrite=True)
    assert is_complete(source, target)


def test_an_index_of_the_same_size_with_other_content_is_found(source: Path) -> None:
    target = source.parent / "target"
    convert(source, target)
    index = target / "model.safetensors.index.json"
    index.write_bytes(index.read_bytes().replace(b"3520", b"3521"))
    with pytest.raises(OutputError, match="was changed since moeconv made it"):
        convert(source, target)


def test_a_config_that_the_plan_changes_is_what_a_finished_destination_must_hold(source: Path) -> None:
    target, made = source.parent / "target", replace(make_plan(source), contents={"config.json": b'{"changed": 1}'})
    assert execute(made, target, ["test"]).is_new
    assert not execute(made, target, ["test"]).is_new
    (target / "config.json").write_bytes(b'{"changed": 2}')
    with pytest.raises(OutputError, match="was changed since moeconv made it"):
        execute(made, target, ["test"])


def touched(source: Path) -> None:
    os.utime(source / "model-00001-of-00003.safetensors", ns=(1, 1))


def retokenized(source: Path) -> None:
    (source / "tokenizer.json").write_text('{"model": 2}')


def retrained(source: Path) -> None:
    tensors = {**experts_layout(), "lm_head.weight": tensor((8, 10))}
    write_folder(source, tensors, CONFIG, 3)


OTHER_PLANS = [
    pytest.param("unpack", [], None, "layout packed, not experts", id="layout"),
    pytest.param("pack", ["--max-shard-size", "1kB"], None, "--max-shard-size 5000000000, not 1000", id="option"),
    pytest.param(
        "pack",
        [],
        touched,
        "model-00001-of-00003.safetensors changed in the source (time of its last change)",
        id="time of a file",
    ),
    pytest.param("pack", [], retokenized, "tokenizer.json changed in the source (content)", id="other file"),
    pytest.param(
        "pack", [], retrained, "model-00003-of-00003.safetensors changed in the source (size, header,", id="header"
    ),
]


@pytest.mark.parametrize(("command", "options", "change", "says"), OTHER_PLANS)
def test_a_destination_of_another_plan_is_kept_unless_overwritten(
    source: Path, command: str, options: list[str], change: Any, says: str
) -> None:
    target = source.parent / "target"
    succeeds("pack", source, target)
    if change:
        change(source)
    message = refused(command, source, target, *options, within=source.parent)
    assert f"{target} exists and was made by another plan: " in message
    assert says in message
    assert "--overwrite" in message
    succeeds(command, source, target, *options, "--overwrite")
    succeeds(command, source, source.parent / "fresh", *options)
    assert weights_and_sidecars(target) == weights_and_sidecars(source.parent / "fresh")
    assert succeeds(command, source, target, *options).out == f"{target}: already up to date\n"
    assert {path.name for path in source.parent.iterdir()} == {"source", "target", "fresh"}


@pytest.mark.parametrize("key", ["source", "recipe", "tool"])
@pytest.mark.parametrize("value", [None, "text", [1], {"files": [3], "text": 1}, {"files": 3}])
def test_a_manifest_that_somebody_changed_is_no_reason_to_break(source: Path, key: str, value: object) -> None:
    target = source.parent / "target"
    succeeds("pack", source, target)
    manifest = json.loads((target / MANIFEST).read_text())
    (target / MANIFEST).write_text(json.dumps({**manifest, "fingerprint": "0" * 64, key: value}))
    assert "was made by another plan" in refused("pack", source, target, within=source.parent)


def test_a_failing_overwrite_keeps_the_old_folder(source: Path) -> None:
    target = source.parent / "target"
    succeeds("unpack", source, target)
    before = tree(target)
    with pytest.raises(OutputError):
        convert(source, target, FailingFiles("write", 5, errno.ENOSPC), overwrite=True)
    assert tree(target) == before
    convert(source, target, overwrite=True)
    assert is_complete(source, target)


# A full disk


def test_too_little_free_space_is_found_before_anything_is_written(source: Path) -> None:
    made = make_plan(source)
    target = source.parent / "target"
    before = tree(source.parent)
    with pytest.raises(OutputError) as caught:
        execute(made, target, ["test"], files=FullDisk(made.output_nbytes - 1))
    message = str(caught.value)
    assert f"{target} needs " in message
    assert f"({made.output_nbytes:,} bytes)" in message
    assert f"({made.output_nbytes - 1:,} bytes) free" in message
    assert "\n  -> " in message
    assert tree(source.parent) == before
    execute(made, target, ["test"], files=FullDisk(made.output_nbytes))
    assert sum(len(content) for content in weights_and_sidecars(target).values()) == made.output_nbytes


@pytest.mark.parametrize("kind", ["create", "write", "sync"])
def test_a_disk_that_fills_up_is_reported_and_the_run_can_go_on(source: Path, kind: str) -> None:
    target = source.parent / "target"
    with pytest.raises(OutputError) as caught:
        convert(source, target, FailingFiles(kind, 6, errno.ENOSPC))
    assert f"cannot be written: {os.strerror(errno.ENOSPC)}\n  -> " in str(caught.value)
    assert not target.exists()
    convert(source, target)
    assert is_complete(source, target)


# Failures of single calls

CALLS = ["read", "folder", "create", "write", "sync", "rename", "remove", "sync_folder"]


def call_counts(source: Path, *, overwrite: bool = False) -> dict[str, int]:
    files, target = CountingFiles(), source.parent / "counted"
    if overwrite:
        shutil.copytree(source.parent / "old", target)
    convert(source, target, files, overwrite=overwrite)
    return files.calls


@pytest.mark.parametrize("kind", CALLS)
def test_no_failing_call_leaves_a_destination_that_is_not_complete(source: Path, kind: str) -> None:
    count = call_counts(source)[kind]
    assert count
    for number in range(1, count + 1):
        target = source.parent / f"target{number}"
        files = FailingFiles(kind, number)
        try:
            convert(source, target, files)
        except MoeconvError as error:
            message = str(error)
        else:
            pytest.fail(f"the failure of {kind} {number} was swallowed")
        assert str(source.parent) in message
        assert "\n  -> " in message
        assert not target.exists() or is_right(source, target)
        convert(source, target)
        assert is_complete(source, target)
        assert {path.name for path in source.parent.glob(f"target{number}*")} == {target.name}


# Death at any moment


@pytest.mark.parametrize("fsync", [True, False], ids=["fsync", "no fsync"])
def test_a_run_that_dies_anywhere_is_finished_by_the_next(source: Path, fsync: bool) -> None:
    for number in range(1, 1000):
        target = source.parent / f"target{number}"
        try:
            convert(source, target, DyingFiles(number), fsync=fsync)
        except Killed:
            assert not target.exists() or is_right(source, target)
        else:
            break
        convert(source, target, fsync=fsync)
        assert is_complete(source, target), number
        assert {path.name for path in source.parent.glob(f"target{number}*")} == {target.name}, number
    assert number > 30


def test_a_run_that_dies_again_and_again_is_finished_in_the_end(source: Path) -> None:
    target = source.parent / "target"
    for number in range(1, 1000):
        try:
            convert(source, target, DyingFiles(number))
        except Killed:
            assert not target.exists() or is_right(source, target)
        else:
            break
    assert is_complete(source, target)
    assert {path.name for path in source.parent.glob("target*")} == {"target"}


def test_a_run_that_dies_while_it_clears_up_is_finished_by_the_next(source: Path) -> None:
    for number in range(1, 12):
        target = source.parent / f"target{number}"
        for deadly in (DyingFiles(7), DyingFiles(number)):  # the first dies before anything is done
            with pytest.raises(Killed):
                convert(source, target, deadly)
        convert(source, target)
        assert is_complete(source, target), number


def test_an_overwrite_that_dies_anywhere_leaves_the_old_or_the_new_folder(source: Path) -> None:
    succeeds("unpack", source, source.parent / "old")
    old = weights_and_sidecars(source.parent / "old")
    calls = call_counts(source, overwrite=True)
    count = sum(calls[kind] for kind in CHANGES)
    deaths = 0
    for number in range(count - 12, count + 3):  # the order of syncing differs a little from run to run
        target = source.parent / f"target{number}"
        shutil.copytree(source.parent / "old", target)
        try:
            convert(source, target, DyingFiles(number), overwrite=True)
        except Killed:
            deaths += 1
            survivors = list(source.parent.glob(f"target{number}*"))
            assert old in [weights_and_sidecars(path) for path in survivors] or is_right(source, target), number
        convert(source, target, overwrite=True)
        assert is_complete(source, target), number
        assert not list(source.parent.glob(f"{target.name}.*")), number
    assert deaths >= 12


def test_what_a_dead_run_had_replaced_is_removed_by_the_next(source: Path) -> None:
    target, replaced = source.parent / "target", source.parent / "target.replaced"
    succeeds("unpack", source, target)
    with pytest.raises(Killed):
        convert(source, target, DyingFiles(2, {"rename"}), overwrite=True)
    assert replaced.is_dir()
    assert not target.exists()
    shutil.copytree(replaced, source.parent / "kept")
    convert(source, target)
    assert is_complete(source, target)
    assert not replaced.exists()
    (source.parent / "kept").rename(replaced)
    for name in ("packed", "experts"):
        made = plan(open_checkpoint(source), RECIPE, name, Options())
        execute(made, target, ["test"], overwrite=True)
    assert not replaced.exists()


@pytest.mark.parametrize("content", [None, {"notes.txt": "mine"}, {MANIFEST: "{}"}], ids=str)
@pytest.mark.parametrize("is_there", [False, True])
def test_a_replaced_folder_that_moeconv_did_not_make_is_refused_at_the_start(
    source: Path, content: dict[str, str] | None, is_there: bool
) -> None:
    target, replaced = source.parent / "target", source.parent / "target.replaced"
    if is_there:
        succeeds("unpack", source, target)
    if content is None:
        replaced.write_text("mine")
    for name, text in (content or {}).items():
        replaced.mkdir()
        (replaced / name).write_text(text)
    message = refused("pack", source, target, "--overwrite", within=source.parent)
    assert f"{replaced} exists and moeconv did not make it" in message


@pytest.mark.parametrize(
    ("kept", "keeps_names"),
    [(0, False), (0, True), (1, True), (1, False)],
    ids=["nothing unsynced survives", "names survive", "names and headers survive", "headers survive"],
)
def test_a_power_loss_at_any_moment_costs_no_byte(source: Path, kept: int, keeps_names: bool) -> None:
    class Rebooted(Files):
        def boot_id(self) -> str:
            return "after the power loss"

    resumed = 0
    for number in range(1, 1000):
        target = source.parent / f"target{number}"
        files = PowerLossFiles(number, kept, keeps_names=keeps_names)
        try:
            convert(source, target, files)
        except Killed:
            files.lose()
            assert not target.exists() or is_right(source, target), number
        else:
            break
        resumed += convert(source, target, Rebooted()).resumed_nbytes
        assert is_complete(source, target), number
    files.lose()
    assert is_right(source, target)  # the journal may have come back
    assert not convert(source, target).is_new
    assert is_complete(source, target)
    assert resumed


def test_without_fsync_nothing_is_resumed_after_a_restart_of_the_machine(source: Path) -> None:
    class Booted(Files):
        def __init__(self, boot: str) -> None:
            self.boot = boot

        def boot_id(self) -> str:
            return self.boot

    class First(DyingFiles, Booted):
        def __init__(self) -> None:
            DyingFiles.__init__(self, 1, {"rename"})
            self.boot = "first"

    resumed = []
    for name in ("first", "second"):
        target = source.parent / name
        with pytest.raises(Killed):
            convert(source, target, First(), fsync=False)
        resumed.append(convert(source, target, Booted(name), fsync=False).resumed_nbytes)
        assert is_complete(source, target)
    assert resumed == [3520, 0]


def test_what_a_run_without_fsync_did_is_not_trusted_beneath_an_older_line_with_fsync(source: Path) -> None:
    class Rebooted(Files):
        def boot_id(self) -> str:
            return "after the power loss"

    target, options = source.parent / "target", Options(max_shard_nbytes=1500, jobs=1)

    def run(files: Files, fsync: bool) -> Outcome:
        made = plan(open_checkpoint(source), RECIPE, "packed", options)
        return execute(made, target, ["test"], files=files, fsync=fsync)

    with pytest.raises(OutputError):
        run(FailingFiles("write", 15), True)  # after the first of the four files
    without = PowerLossFiles(1)
    without.kinds = {"rename"}
    with pytest.raises(Killed):
        run(without, False)
    journal = (target.with_name("target.partial") / JOURNAL).read_text().splitlines()
    assert [json.loads(line).get("fsync") for line in journal] == [None, True, False]
    del without.unsynced[target.with_name("target.partial") / JOURNAL]  # it came to the disk before the data
    without.lose()
    outcome = run(Rebooted(), True)
    assert is_complete(source, target)
    assert 0 < outcome.resumed_nbytes < 3520


def test_what_was_done_is_not_done_again(source: Path) -> None:
    target = source.parent / "target"
    with pytest.raises(Killed):
        convert(source, target, DyingFiles(1, {"rename"}))
    files = CountingFiles()
    outcome = convert(source, target, files)
    assert (outcome.nbytes, outcome.resumed_nbytes) == (0, 3520)
    assert is_complete(source, target)


# What an earlier run left


def killed_halfway(source: Path) -> Path:
    target = source.parent / "target"
    with pytest.raises(Killed):
        convert(source, target, DyingFiles(1, {"rename"}))
    assert not target.exists()
    return target


def test_a_partial_folder_without_a_journal_is_not_ours_to_remove(source: Path) -> None:
    partial = source.parent / "target.partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    for option in ([], ["--overwrite"]):
        message = refused("pack", source, source.parent / "target", *option, within=source.parent)
        assert f"{partial} exists and has no journal: it is no unfinished run of moeconv" in message


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_a_partial_that_is_no_folder_is_refused(source: Path, kind: str) -> None:
    partial = source.parent / "target.partial"
    partial.write_text("mine") if kind == "file" else partial.symlink_to("absent")
    assert str(partial) in refused("pack", source, source.parent / "target", within=source.parent)


def test_an_empty_partial_folder_is_used(source: Path) -> None:
    (source.parent / "target.partial").mkdir()
    convert(source, source.parent / "target")
    assert is_complete(source, source.parent / "target")


@pytest.mark.parametrize("option", ["--overwrite", "--restart"])
def test_an_unfinished_run_of_another_plan_is_kept_unless_discarded(source: Path, option: str) -> None:
    target = killed_halfway(source)
    message = refused("unpack", source, target, within=source.parent)
    assert f"{target}.partial is an unfinished run of another plan: layout packed, not experts" in message
    assert "--restart" in message
    succeeds("unpack", source, target, option)
    assert read_folder(target) == experts_layout()
    assert not (source.parent / "target.partial").exists()


@pytest.mark.parametrize(
    "journal",
    [b"", b"{", b"\0" * 100, b"no JSON\n", b"3\n", b"{}\n", b'{"fingerprint": 1}\n[]\n', b"\xff\n", b"\n\n"],
    ids=repr,
)
def test_a_damaged_journal_is_not_trusted(source: Path, journal: bytes) -> None:
    target = killed_halfway(source)
    path = source.parent / "target.partial" / JOURNAL
    path.write_bytes(journal)
    options = ["--overwrite"] if b"fingerprint" in journal else []
    result = succeeds("pack", source, target, "--max-shard-size", "1500", *options)
    assert "earlier run" not in result.out
    assert is_complete(source, target)


@pytest.mark.parametrize("tail", [b'{"done": ["mo', b"\0\0", b'{"done": 3}\n', b"[]\n", b'{"done": [[]]}\n', b"{\n"])
def test_a_journal_with_a_damaged_end_gives_no_wrong_bytes(source: Path, tail: bytes) -> None:
    target = killed_halfway(source)
    path = source.parent / "target.partial" / JOURNAL
    path.write_bytes(path.read_bytes() + tail)
    succeeds("pack", source, target, "--max-shard-size", "1500")
    assert is_complete(source, target)


@pytest.mark.parametrize("change", ["shorter", "longer", "removed", "other header"])
def test_a_changed_file_of_an_unfinished_run_is_written_anew(source: Path, change: str) -> None:
    target = killed_halfway(source)
    path = sorted((source.parent / "target.partial").glob("*.safetensors"))[1]
    content = path.read_bytes()
    if change == "removed":
        path.unlink()
    else:
        changed = {"shorter": content[:-1], "longer": content + b"x", "other header": b"\1" + content[1:]}
        path.write_bytes(changed[change])
    convert(source, target)
    assert is_complete(source, target)


def test_a_source_that_changed_since_the_interruption_is_another_plan(source: Path) -> None:
    target = killed_halfway(source)
    os.utime(source / "model-00002-of-00003.safetensors", ns=(5, 5))
    assert "unfinished run of another plan" in refused(
        "pack", source, target, "--max-shard-size", "1500", within=source.parent
    )


def test_restart_begins_anew_where_the_same_command_would_go_on(source: Path) -> None:
    target = killed_halfway(source)
    assert "earlier run" not in succeeds("pack", source, target, "--max-shard-size", "1500", "--restart").out
    assert is_complete(source, target)


def test_restart_does_not_replace_a_finished_destination(source: Path) -> None:
    target = source.parent / "target"
    succeeds("unpack", source, target)
    assert "made by another plan" in refused("pack", source, target, "--restart", within=source.parent)


def test_a_second_run_beside_a_living_one_is_refused(source: Path) -> None:
    target = killed_halfway(source)
    with (source.parent / "target.partial" / JOURNAL).open("rb") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        for option in ([], ["--overwrite"]):
            message = refused("pack", source, target, "--max-shard-size", "1500", *option, within=source.parent)
            assert f"another run is at work in {target}.partial" in message
    convert(source, target)
    assert is_complete(source, target)


# A source that changes under the run


class MeddlingFiles(Files):
    """Something changes a source file right before the first target file is opened for writing."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.content = path, content

    def boot_id(self) -> str:
        self.path.write_bytes(self.content)
        os.utime(self.path, ns=(7, 7))
        return super().boot_id()


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("share", [0.5, 1, 2])
def test_a_source_that_changes_during_the_run_publishes_nothing(source: Path, name: str, share: float) -> None:
    content = (source / name).read_bytes()
    changed = (content * 2)[: int(len(content) * share) - 1] + b"!"
    with pytest.raises(MoeconvError) as caught:
        convert(source, source.parent / "target", MeddlingFiles(source / name, changed))
    assert str(source / name) in str(caught.value)
    assert not (source.parent / "target").exists()


class Intruder(Files):
    """Somebody makes a folder of the destination's name right before the run ends."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def sync_folder(self, path: Path, *, is_ours: bool = True) -> None:
        self.target.mkdir(exist_ok=True)
        (self.target / "notes.txt").write_text("mine")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_destination_that_appears_during_the_run_is_never_replaced(source: Path, overwrite: bool) -> None:
    target = source.parent / "target"
    with pytest.raises(OutputError, match="exists and moeconv did not make it"):
        convert(source, target, Intruder(target), overwrite=overwrite)
    assert tree(target) == {"notes.txt": b"mine"}
    target.rename(source.parent / "notes")
    assert convert(source, target).resumed_nbytes == 3520
    assert is_complete(source, target)


# Real processes

INTERLEAVED = """\
about: rows of gate and up in turn
model_types: [test_moe]
dims: {E: num_experts, I: moe_intermediate_size, H: hidden_size}
layouts:
  packed:
    "{block}.gate_up [E, 2*I, H]": {interleave: [gate, up]}
  experts:
    "{block}.{expert}.gate [I, H]": gate
    "{block}.{expert}.up [I, H]": up
"""
ROWS = 6000


@pytest.fixture
def slow_command(tmp_path: Path) -> list[str]:
    """A conversion of 0.4 MB that takes about a second: every row of two elements is read on its own."""
    (tmp_path / "r.yaml").write_text(INTERLEAVED)
    config = {"num_experts": 8, "moe_intermediate_size": ROWS, "hidden_size": 2}
    tensors = {"layer.gate_up": tensor((8, 2 * ROWS, 2))}
    source = write_folder(tmp_path / "source", tensors, config, 1)
    arguments = ["unpack", str(source), str(tmp_path / "target"), "--recipe", str(tmp_path / "r.yaml")]
    return [sys.executable, "-m", "moeconv", *arguments, "--max-shard-size", "25kB", "--jobs", "2"]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_is_finished_by_the_same_command(slow_command: list[str], sent: signal.Signals) -> None:
    target = Path(slow_command[5])
    running = subprocess.Popen(slow_command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def begun() -> int:
        return sum(any(path.read_bytes()[4096:]) for path in target.with_name("target.partial").glob("*.safetensors"))

    while begun() < 3:  # two workers: one has finished a file
        assert running.poll() is None
        time.sleep(0.005)
    running.send_signal(sent)
    out, err = running.communicate(timeout=60)
    assert not target.exists(), "the run was too fast to be interrupted"
    assert out == ""
    if sent != signal.SIGKILL:
        assert running.returncode == 130
        assert err == "moeconv: interrupted; the same command goes on where it stopped\n"
    done = subprocess.run(slow_command, capture_output=True, text=True, check=True)
    if sent != signal.SIGKILL:
        assert "of it from an earlier run" in done.stdout
    subprocess.run([*slow_command[:5], str(target.with_name("fresh")), *slow_command[6:]], check=True)
    assert weights_and_sidecars(target) == weights_and_sidecars(target.with_name("fresh"))
    assert len(read_folder(target)) == 16


def test_of_two_runs_at_the_same_time_only_one_makes_the_destination(slow_command: list[str]) -> None:
    runs = [subprocess.Popen(slow_command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [(*run.communicate(timeout=60), run.returncode) for run in runs]
    (made,) = [end for end in ends if " tensors -> 16" in end[0]]
    (other,) = [end for end in ends if end is not made]
    assert made[1:] == ("", 0)
    if other[2]:
        assert "\n  -> " in other[1]
        assert "Traceback" not in other[1]
    else:  # it came too late even to meet the first
        assert "already up to date" in other[0]
    assert len(read_folder(Path(slow_command[5]))) == 16
    assert not Path(slow_command[5] + ".partial").exists()
