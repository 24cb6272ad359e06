"""Worker processes of real commands: same bytes as threads, and nothing left over however a run ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moeconv.errors import RunError
from moeconv.plan import Memory
from moeconv.pool import Places, ProcessRunner, _Channel
from tests.bench import sources
from tests.commands import succeeds, tree
from tests.processes import children

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads encode")

CONFIG = {**sources.QWEN3_30B_A3B, "hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 48}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """38 MB; searching for scales takes a second or two."""
    folder = tmp_path_factory.mktemp("pool") / "source"
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(64, 512).bfloat16()}
    for expert in range(48):
        for part, shape in (("gate", (256, 512)), ("up", (256, 512)), ("down", (512, 256))):
            name = f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight"
            tensors[name] = torch.randn(shape).bfloat16()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, folder / "model.safetensors")
    return folder


def command(source: Path, target: Path, *options: str) -> list[str]:
    arguments = ["quantize", str(source), str(target), "--format", "w4a16", "--max-shard-size", "1MB", *options]
    return [sys.executable, "-m", "moeconv", *arguments]


def slow(source: Path, target: Path) -> list[str]:
    return command(source, target, "--scale", "mse", "--jobs", "2")


def has_data(path: Path) -> bool:
    content = path.read_bytes()
    return any(content[8 + int.from_bytes(content[:8], "little") :])


def begun(line: list[str], target: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A run that has written something, and its workers, which are stopped: it cannot be over before a test acts."""
    running = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    partial = target.with_name(f"{target.name}.partial")
    workers: list[int] = []
    while len(workers) < 2 or not any(has_data(path) for path in partial.glob("*.safetensors")):
        assert running.poll() is None, running.communicate()
        workers = workers if len(workers) == 2 else children(running.pid)
        time.sleep(0.005)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    return running, workers


def resume(workers: list[int]) -> None:
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGCONT)


def gone(processes: list[int]) -> bool:
    """Whether they end within the next seconds; a process that nobody has waited for is no more, too."""
    for _ in range(100):
        states = [path.read_text() for number in processes if (path := Path(f"/proc/{number}/stat")).exists()]
        if all(state.rpartition(")")[2].split()[0] == "Z" for state in states):
            return True
        time.sleep(0.05)
    return False


def weights(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in tree(folder).items() if name != "moeconv.json"}


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, bytes]:
    """What threads make."""
    target = source.with_name("threads")
    succeeds(*slow(source, target)[3:])
    return weights(target)


@pytest.mark.parametrize("jobs", ["1", "2", "5", "100000"])
def test_processes_write_what_threads_write(source: Path, tmp_path: Path, jobs: str) -> None:
    target = tmp_path / "target"
    done = subprocess.run(command(source, target, "--jobs", jobs), capture_output=True, text=True, check=True)
    assert done.stderr == ""
    succeeds(*command(source, tmp_path / "threads", "--jobs", jobs)[3:])
    assert weights(target) == weights(tmp_path / "threads")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_run_and_the_same_command_finishes(
    source: Path, tmp_path: Path, expected: dict[str, bytes], sent: signal.Signals
) -> None:
    target = tmp_path / "target"
    running, workers = begun(slow(source, target), target)
    running.send_signal(sent)
    if sent != signal.SIGKILL:  # which ends them as they are
        time.sleep(0.5)
        resume(workers)
    out, err = running.communicate(timeout=60)
    assert gone(workers)
    assert not target.exists(), "the run was too fast to be interrupted"
    assert "Traceback" not in out + err
    assert running.returncode == (130 if sent != signal.SIGKILL else -signal.SIGKILL)
    subprocess.run(slow(source, target), check=True, stdout=subprocess.DEVNULL)
    assert weights(target) == expected


@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_is_killed_ends_the_run_with_an_error(
    source: Path, tmp_path: Path, expected: dict[str, bytes], victim: int
) -> None:
    target = tmp_path / "target"
    running, workers = begun(slow(source, target), target)
    os.kill(workers[victim], signal.SIGKILL)
    resume(workers)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (1, "")
    assert "moeconv: a worker process was killed" in err  # behind lines of progress, where all is slow
    assert "\n  -> " in err
    assert gone(workers)
    assert not target.exists()
    subprocess.run(slow(source, target), check=True, stdout=subprocess.DEVNULL)
    assert weights(target) == expected


def test_a_worker_that_died_before_it_had_work_is_an_error(source: Path) -> None:
    """As of memory, while it imported torch: nobody reads what it is sent."""
    (reading, writing), (replies, other) = os.pipe(), os.pipe()
    os.close(reading)
    os.close(other)
    with pytest.raises(RunError, match="a worker process was killed"):
        ProcessRunner(_Channel(replies, writing), Places((source,), (), Memory(0, 0, 1, 0)), lambda nbytes: None)


def test_an_interrupt_of_the_whole_group_is_left_to_the_parent(source: Path, tmp_path: Path) -> None:
    """As a terminal sends it on Ctrl-C."""
    target = tmp_path / "target"
    line = [sys.executable, "-c", "import os, sys; os.setsid(); os.execv(sys.argv[1], sys.argv[1:])"]
    running, workers = begun([*line, *slow(source, target)], target)
    os.killpg(running.pid, signal.SIGINT)
    time.sleep(0.5)
    resume(workers)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err == "moeconv: interrupted; the same command goes on where it stopped\n"
    assert gone(workers)


def test_what_a_worker_finds_wrong_is_said_once(source: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    broken = tmp_path / "broken"
    broken.mkdir()
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.experts.7.up_proj.weight"
    tensors[name][3, 4] = torch.inf
    save_file(tensors, broken / "model.safetensors")
    (broken / "config.json").write_bytes((source / "config.json").read_bytes())
    done = subprocess.run(command(broken, tmp_path / "target"), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"moeconv: {name} holds NaN or infinite values in rows 0 to ")
    assert done.stderr.count("\n") == 2


def test_a_broken_torch_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libtorch_cpu.so: bad ELF')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    line = command(source, tmp_path / "target")
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith("moeconv: torch cannot be imported: libtorch_cpu.so: bad ELF\n  -> ")


def test_a_plan_that_fails_leaves_no_process(source: Path, tmp_path: Path) -> None:
    """It fails while the first worker still imports torch."""
    line = command(source, tmp_path / "target", "--ignore", "no.such.tensor")
    running = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    workers: list[int] = []
    while running.poll() is None:
        workers += children(running.pid)
        time.sleep(0.005)
    assert running.returncode == 1
    assert workers
    assert gone(workers)
