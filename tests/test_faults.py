"""Every call to the file system fails once, in every way, in runs that copy and in runs that encode."""

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeconv.checkpoint import JOURNAL, open_checkpoint
from moeconv.errors import MoeconvError
from moeconv.executor import execute
from moeconv.files import Files, ReadFile, WriteFile
from moeconv.plan import Options, Plan, plan
from moeconv.quantize import plan_quantize
from moeconv.scheme import build_scheme
from moeconv.selection import select_recipe
from tests.commands import succeeds, tree
from tests.faults import CountingFiles, DyingFiles, FailingFiles, Killed
from tests.folders import CONFIG, experts_layout, finite, pack_by_hand, read_folder, write_folder

SOAK = bool(os.environ.get("MOECONV_SOAK"))
KINDS = ["read", "folder", "create", "write", "sync", "rename", "remove", "sync_folder"]
ERRORS = [errno.EIO, errno.ENOSPC, errno.EINTR, errno.EACCES, errno.ESTALE]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tensors = finite(experts_layout(experts=4, inner=32, hidden=64))
    config = {**CONFIG, "moe_intermediate_size": 32, "hidden_size": 64}
    return write_folder(folder, tensors, config, 3)


def pack_plan(source: Path) -> Plan:
    checkpoint = open_checkpoint(source)
    return plan(checkpoint, select_recipe(checkpoint), "packed", Options(max_shard_nbytes=30_000, jobs=2))


def quantize_plan(source: Path, name: str, **options: Any) -> Plan:
    checkpoint = open_checkpoint(source)
    scheme, _ = build_scheme(name, options, None, (), (), None, False)
    return plan_quantize(checkpoint, select_recipe(checkpoint), scheme, Options(max_shard_nbytes=12_000, jobs=2))


PLANS: dict[str, Callable[[Path], Plan]] = {
    "pack": pack_plan,
    "fp8_dynamic": lambda source: quantize_plan(source, "fp8_dynamic"),
    "nf4": lambda source: quantize_plan(source, "nf4"),
}


@pytest.fixture(scope="module")
def wanted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What runs make that nothing disturbs."""
    folder = tmp_path_factory.mktemp("wanted")
    for name, made in PLANS.items():
        execute(made(source), folder / name, ["test"])
    return {name: tree(folder / name) for name in PLANS}


@pytest.mark.parametrize("what", PLANS)
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_call_fails_the_next_run_ends_with_the_same_bytes(
    source: Path, wanted: dict[str, dict[str, bytes]], tmp_path: Path, what: str, kind: str
) -> None:
    counting = CountingFiles()
    execute(PLANS[what](source), tmp_path / "counted", ["test"], files=counting)
    count = counting.calls[kind]
    assert count
    step = 1 if SOAK else max(1, count // (20 if what == "pack" else 4))
    for number in range(1, count + 1, step):
        for code in ERRORS if SOAK or number == 1 else [ERRORS[number % len(ERRORS)]]:
            target = tmp_path / f"{number}-{code}"
            with pytest.raises(MoeconvError) as caught:
                execute(PLANS[what](source), target, ["test"], files=FailingFiles(kind, number, code))
            assert os.strerror(code) in str(caught.value)
            assert "\n  -> " in str(caught.value)
            found = {name: item for name, item in tree(target).items() if name != JOURNAL} if target.exists() else None
            assert found in (None, wanted[what])
            execute(PLANS[what](source), target, ["test"])
            assert tree(target) == wanted[what], (kind, number, code)


@pytest.mark.parametrize("what", PLANS)
def test_a_process_that_dies_at_any_call_is_followed_by_one_that_ends_with_the_same_bytes(
    source: Path, wanted: dict[str, dict[str, bytes]], tmp_path: Path, what: str
) -> None:
    deaths = 0
    for number in range(1, 5000, 1 if SOAK else 29):
        target = tmp_path / str(number)
        try:
            execute(PLANS[what](source), target, ["test"], files=DyingFiles(number, (*KINDS, "remove_tree")))
        except Killed:
            deaths += 1
        else:
            break
        execute(PLANS[what](source), target, ["test"])
        assert tree(target) == wanted[what], number
    assert deaths > 3


class ShortFiles(Files):
    """Every read and write moves a few bytes only, as calls that a signal interrupts do."""

    def open_read(self, path: Path) -> ReadFile:
        return _ShortRead(path, super().open_read(path)._fd)

    def create(self, path: Path, nbytes: int, *, reserve: bool = True) -> WriteFile:
        return _ShortWrite(path, super().create(path, nbytes, reserve=reserve)._fd)

    def open_write(self, path: Path) -> WriteFile:
        return _ShortWrite(path, super().open_write(path)._fd)


class _ShortRead(ReadFile):
    def _pread(self, buffer: memoryview, offset: int) -> int:
        return super()._pread(buffer[: max(1, len(buffer) // 3)], offset)


class _ShortWrite(WriteFile):
    def _pwrite(self, buffer: memoryview | bytes, offset: int) -> int:
        return super()._pwrite(buffer[: max(1, len(buffer) // 3)], offset)


@pytest.mark.parametrize("what", PLANS)
def test_short_reads_and_writes_change_nothing(
    source: Path, wanted: dict[str, dict[str, bytes]], tmp_path: Path, what: str
) -> None:
    execute(PLANS[what](source), tmp_path / "x", ["test"], files=ShortFiles())
    assert tree(tmp_path / "x") == wanted[what]


# File systems that are not like a local disk


class _AppendOnly(WriteFile):
    code = errno.EINVAL

    def _pwrite(self, buffer: memoryview | bytes, offset: int) -> int:
        if offset != os.lseek(self._fd, 0, os.SEEK_CUR):
            raise OSError(self.code, os.strerror(self.code))
        return os.write(self._fd, buffer)


class AppendOnlyFiles(Files):
    """Mounts of object stores: files can be written from their beginning to their end."""

    def create(self, path: Path, nbytes: int, *, reserve: bool = True) -> WriteFile:
        return _AppendOnly(path, super().create(path, nbytes, reserve=reserve)._fd)


class SilentFiles(Files):
    """Worse ones: what is written in the middle is put at the end, without a word."""

    def create(self, path: Path, nbytes: int, *, reserve: bool = True) -> WriteFile:
        return _Silent(path, super().create(path, nbytes, reserve=reserve)._fd)


class _Silent(WriteFile):
    def _pwrite(self, buffer: memoryview | bytes, offset: int) -> int:
        return os.write(self._fd, buffer)


class NoSizeFiles(Files):
    """Files have the size that was written, and no other."""

    def create(self, path: Path, nbytes: int, *, reserve: bool = True) -> WriteFile:
        if nbytes:
            from moeconv.files import _fail_writing

            _fail_writing(OSError(errno.EPERM, os.strerror(errno.EPERM)), path)
        return super().create(path, nbytes, reserve=reserve)


@pytest.mark.parametrize("files", [AppendOnlyFiles, SilentFiles, NoSizeFiles])
def test_file_systems_without_random_writes_are_noticed_at_the_first_write(
    source: Path, tmp_path: Path, files: type[Files]
) -> None:
    made = pack_plan(source)
    with pytest.raises(MoeconvError) as caught:
        execute(made, tmp_path / "x", ["test"], files=files())
    message = str(caught.value)
    assert f"{tmp_path}/x.partial is on a file system (" in message
    assert "that cannot write in the middle of a file" in message
    assert "(unknown)" not in message
    assert "\n  -> Write to a local disk" in message
    weights = [path for path in (tmp_path / "x.partial").iterdir() if path.suffix == ".safetensors"]
    assert not weights


def test_the_source_needs_no_permission_to_write(tmp_path: Path) -> None:
    """Nothing is opened for writing there, and no time is changed: a shim tells, since root may write anywhere."""
    folder = write_folder(tmp_path / "source", experts_layout(), CONFIG, 2)
    opened: list[tuple[Path, int]] = []
    open_before = os.open

    def watched(path: Any, flags: int, *more: Any, **named: Any) -> int:
        opened.append((Path(path), flags))
        return open_before(path, flags, *more, **named)

    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat() for path in (*folder.iterdir(), folder)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", watched)
        succeeds("pack", folder, tmp_path / "target", "--hash")
    inside = [flags for path, flags in opened if path.is_relative_to(folder)]
    assert inside
    assert all(flags & os.O_ACCMODE == os.O_RDONLY for flags in inside)
    for path, stat in before.items():
        now = path.stat()
        assert (now.st_mode, now.st_size, now.st_mtime_ns) == (stat.st_mode, stat.st_size, stat.st_mtime_ns)
    assert read_folder(tmp_path / "target") == pack_by_hand(experts_layout())


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_what_is_made_has_the_modes_that_the_user_wants(tmp_path: Path, mask: int, file: int, folder: int) -> None:
    source = write_folder(tmp_path / "source", experts_layout(), CONFIG, 2)
    before = os.umask(mask)
    try:
        succeeds("pack", source, tmp_path / "target", "--max-shard-size", "2kB")
    finally:
        os.umask(before)
    assert (tmp_path / "target").stat().st_mode & 0o7777 == folder
    made = {path.name: path.stat().st_mode & 0o7777 for path in (tmp_path / "target").iterdir()}
    assert {mode for name, mode in made.items() if name != "config.json"} == {file}


# What a dead run repeats


class SlowDisk(Files):
    """Syncing takes long, and the work of a run that died now can be counted."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.lock = threading.Lock()
        self.written: list[tuple[float, int]] = []
        self.journalled = 0
        self.most: list[tuple[int, float]] = []

    def create(self, path: Path, nbytes: int, *, reserve: bool = True) -> WriteFile:
        return _SlowWrite(path, super().create(path, nbytes, reserve=reserve)._fd, self)

    def open_write(self, path: Path) -> WriteFile:
        return _SlowWrite(path, super().open_write(path)._fd, self)

    def wrote(self, nbytes: int) -> None:
        with self.lock:
            self.written.append((time.monotonic(), nbytes))
            self.look()

    def look(self) -> None:
        """Bytes of work that is not journalled, and how long ago the oldest of it was done."""
        at_risk = sum(nbytes for _, nbytes in self.written) - self.journalled
        at, oldest = 0, time.monotonic()
        for when, nbytes in self.written:
            at += nbytes
            if at > self.journalled:
                oldest = when
                break
        self.most.append((at_risk, time.monotonic() - oldest))


class _SlowWrite(WriteFile):
    def __init__(self, path: Path, fd: int, disk: SlowDisk) -> None:
        super().__init__(path, fd)
        self.disk = disk

    def _pwrite(self, buffer: memoryview | bytes, offset: int) -> int:
        if self.path.name == JOURNAL:
            count = len(json.loads(bytes(buffer)).get("done", []))
            with self.disk.lock:
                self.disk.journalled += count * TASK
        elif self.path.suffix == ".safetensors" and offset:
            time.sleep(0.002)
            self.disk.wrote(len(buffer))
        return super()._pwrite(buffer, offset)

    def _fsync(self) -> None:
        if self.path.suffix == ".safetensors":
            time.sleep(self.disk.seconds)
        super()._fsync()


TASK = 4096


@pytest.mark.parametrize("fsync", [True, False])
@pytest.mark.parametrize("seconds", [0.0, 0.4])
def test_a_run_that_dies_repeats_few_bytes_or_few_seconds(
    tmp_path: Path, seconds: float, fsync: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With smaller numbers than a run has: 10 tasks or 0.2 s for 128 MB or 3 s; however slow the disk is."""
    monkeypatch.setattr("moeconv.tasks.TASK_BYTES", TASK)
    monkeypatch.setattr("moeconv.executor.JOURNAL_BYTES", 10 * TASK)
    monkeypatch.setattr("moeconv.executor.AT_RISK_BYTES", 18 * TASK)
    monkeypatch.setattr("moeconv.executor.JOURNAL_SECONDS", 0.2)
    monkeypatch.setattr("moeconv.executor._POLL_SECONDS", 0.02)
    tensors = experts_layout(layers=4, experts=8, inner=64, hidden=128)
    config = {**CONFIG, "num_hidden_layers": 4, "num_experts": 8, "moe_intermediate_size": 64, "hidden_size": 128}
    source = write_folder(tmp_path / "source", tensors, config, 1)
    checkpoint = open_checkpoint(source)
    made = plan(checkpoint, select_recipe(checkpoint), "packed", Options(jobs=2))
    assert len(made.tasks) > 300
    disk = SlowDisk(seconds)
    execute(made, tmp_path / "target", ["test"], files=disk, fsync=fsync)
    assert read_folder(tmp_path / "target") == pack_by_hand(tensors)
    # In a run: 256 MB or 5 s. The tasks at hand, and what a slow sync lets through before it counts, come on top.
    assert all(nbytes <= 20 * TASK or age <= 0.2 + 0.13 for nbytes, age in disk.most)
    assert max(nbytes for nbytes, _ in disk.most) > 2 * TASK
