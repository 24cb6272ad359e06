"""The few bytes of tensors that planning reads, and no others: scales of whole matrices, states of 4-bit tensors."""

from __future__ import annotations

from moeconv.checkpoint import Checkpoint, StoredTensor
from moeconv.errors import CheckpointError
from moeconv.files import Files, OpenFiles
from moeconv.tensors import Spec

#: Planning reads of tensors of so many bytes at most: they outlive a source that is deleted (`consumption`).
MAX_PLANNED_BYTES = 8 << 10


class SmallTensors:
    """What planning reads of tensors: a few bytes, that decide how others are read. A context manager.

    Args:
        source: the checkpoint.
        files: door to the file system.
    """

    def __init__(self, source: Checkpoint, files: Files | None = None) -> None:
        self._opened = OpenFiles(files or Files(), source.weight_paths)

    def read(self, tensor: StoredTensor) -> bytes:
        """All bytes of a tensor."""
        return self.read_in(tensor.spec, tensor.file, tensor.offset, tensor.spec.nbytes)

    def read_in(self, whole: Spec, file: int, offset: int, nbytes: int) -> bytes:
        """`nbytes` bytes from byte `offset` of a file on, which lie in the tensor `whole`.

        Raises:
            CheckpointError: it has more than `MAX_PLANNED_BYTES`, or the file cannot be read.
        """
        if whole.nbytes > MAX_PLANNED_BYTES:
            raise CheckpointError(
                f"{whole} has {whole.nbytes:,} bytes, where at most {MAX_PLANNED_BYTES:,} are expected",
                "Start from the checkpoint in full precision.",
            )
        content = bytearray(nbytes)
        self._opened[file].read_into(memoryview(content), offset)
        return bytes(content)

    def __enter__(self) -> SmallTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()
