"""Where matrices are encoded and decoded: a CPU core, or a GPU behind pinned memory and a stream.

A worker has one lane of its device. It fills a staging buffer, submits it with what is to be computed, and goes on to
read the next tile; it waits for a job only when it needs the result, or the staging buffer that the job reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moeconv.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: What runs on the device: tensors there in, tensors there out. Shapes of the result depend on shapes alone.
Compute = Callable[[Sequence["Tensor"]], Sequence["Tensor"]]
#: glibc maps blocks that are larger than any freed so far anew each time, and their pages are cleared again; up to 32
#: MiB. Freeing one of this size first leaves a fifth of the page faults of a run.
_REUSED_NBYTES = (32 << 20) - (64 << 10)


class Job(Protocol):
    """Work in progress."""

    def wait(self) -> Sequence[Tensor]:
        """The results, in host memory; they are valid until the lane gets `depth` more jobs."""


class Lane(ABC):
    """One worker's way to the device. For one thread.

    Attributes:
        depth: jobs that may be under way before the oldest must be waited for.
    """

    depth: int = 1

    @abstractmethod
    def staging(self, nbytes: int) -> Tensor:
        """Host memory, uint8 [nbytes], from which the device can read."""

    @abstractmethod
    def submit(self, inputs: Sequence[Tensor], compute: Compute) -> Job:
        """Begin to compute from tensors in staging memory, which must not change before the job is done."""


class Device(ABC):
    """Makes lanes; `name` is what `--device` calls it."""

    name: str

    @abstractmethod
    def lane(self) -> Lane:
        """A lane for the calling thread."""


class _Done:
    def __init__(self, results: Sequence[Tensor]) -> None:
        self._results = results

    def wait(self) -> Sequence[Tensor]:
        return self._results


class _CpuLane(Lane):
    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)  # of this thread: tiles run side by side, one a worker
        torch.empty(_REUSED_NBYTES, dtype=torch.uint8)

    def staging(self, nbytes: int) -> Tensor:
        import torch

        return torch.empty(nbytes, dtype=torch.uint8)

    def submit(self, inputs: Sequence[Tensor], compute: Compute) -> Job:
        return _Done(compute(inputs))


class CpuDevice(Device):
    """The core that the worker runs on; a job is done when it is submitted."""

    name = "cpu"

    def lane(self) -> Lane:
        return _CpuLane()


class _CudaJob:
    def __init__(self, results: Sequence[Tensor], done: torch.cuda.Event) -> None:
        self._results = results
        self._done = done

    def wait(self) -> Sequence[Tensor]:
        self._done.synchronize()
        return self._results


class _CudaLane(Lane):
    """A stream. Memory that a job frees serves the next one, because the stream does them in order."""

    depth = 2

    def __init__(self, device: str) -> None:
        import torch

        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def staging(self, nbytes: int) -> Tensor:
        import torch

        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def submit(self, inputs: Sequence[Tensor], compute: Compute) -> Job:
        import torch

        with torch.cuda.stream(self._stream):
            made = compute([tensor.to(self._device, non_blocking=True) for tensor in inputs])
            results = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in made]
            for result, tensor in zip(results, made, strict=True):
                result.copy_(tensor, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        return _CudaJob(results, done)


class CudaDevice(Device):
    """A GPU by its name, `cuda:0`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def lane(self) -> Lane:
        return _CudaLane(self.name)


def find_devices(text: str) -> tuple[str, ...]:
    """The devices that `--device` names: `auto` is the first GPU that torch can use, else the CPU.

    Raises:
        UsageError: a word that names no device, or a GPU that torch cannot use.
    """
    if text == "auto" and not Path("/dev/nvidiactl").exists():
        return ("cpu",)  # without the second that importing torch takes
    if text == "cpu":
        return ("cpu",)
    names = [name.strip() for name in text.split(",")]
    if text != "auto" and not all(name.removeprefix("cuda:").isdecimal() or name == "cuda" for name in names):
        raise UsageError(f"--device {text!r} names no device", "Write cpu, cuda, or a list such as cuda:0,cuda:1.")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "auto":
        return ("cuda:0",) if count else ("cpu",)
    found = tuple(dict.fromkeys("cuda:0" if name == "cuda" else name for name in names))
    missing = [name for name in found if int(name.removeprefix("cuda:")) >= count]
    if missing:
        raise UsageError(
            f"--device {text}: torch {torch.__version__} can use {count} GPUs",
            "Install a torch build for your GPU, or take --device cpu.",
        )
    return found


def make_device(name: str) -> Device:
    """A device from its name in a plan."""
    return CpuDevice() if name == "cpu" else CudaDevice(name)
