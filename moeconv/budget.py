"""Memory of a run that encodes or decodes: tile size and threads that fit the budgets of host and GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moeconv.errors import UsageError
from moeconv.plan import BASELINE_BYTES, COPY_BUFFER_BYTES, TORCH_BYTES, Memory, Options
from moeconv.steps import (
    Decode,
    Matrix,
    Rearrange,
    Step,
    Transcode,
    Woven,
    staged_nbytes,
    strand_rows,
    strip_rows,
    tile_rows,
    whole_run,
)
from moeconv.tensors import DTYPE_BITS, Shape

#: Elements of a tile on a CPU, the first that the budget allows. Each costs some hundred calls, small and large ones
#: alike: a quarter of the largest takes a seventh more time.
CPU_TILE_ELEMENTS = tuple(1 << bits for bits in range(21, 15, -1))
#: The same for a GPU, where a tile must be worth a few launches of kernels (not measured yet).
GPU_TILE_ELEMENTS = tuple(1 << bits for bits in range(23, 15, -1))
#: Jobs of a lane of a GPU: one computes while the next is read (`device`).
GPU_DEPTH = 2
#: What the allocator of a GPU adds by rounding (not measured yet).
GPU_ROUNDING = 1.5
#: What a CUDA context adds to the host's peak (not measured yet).
CUDA_BYTES = 1 << 30
#: What all workers on CPUs take together by default, if the smallest tiles allow: a run then stays below 700 MB beside
#: the names, however many cores there are.
ALL_WORKERS_BYTES = 300 << 20
#: What a worker process on a CPU does not share with the others (`pool`; measured, `tests/bench/memory.py`).
PROCESS_BYTES = 24 << 20
#: Room for each row that is read apart from the others (`worker`), and copies of a tile that rearranging needs.
_GAP_NBYTES = 64
_REARRANGED_COPIES = 2


class _Needs(NamedTuple):
    """Bytes for one worker: its buffer, a staging buffer, everything else on the host, and on its device.

    `strip` is that part of everything else which holds a strip of a woven matrix.
    """

    buffer: int
    staging: int
    scratch: int
    device: int
    strip: int = 0


def transcoding_memory(steps: Sequence[Step], names: int, jobs: int, options: Options) -> Memory:
    """What the run needs at most.

    Args:
        steps: of the plan, one of each kind at least.
        names: bytes for the names of all tensors.
        jobs: workers that are wanted.
        options: threads, budgets and devices.

    Raises:
        UsageError: a budget that is too small, with the least that works.
    """
    transcodes = list({_kind(step): step for step in steps if isinstance(step, Transcode)}.values())
    on_gpu = options.devices != ("cpu",) and bool(transcodes)
    baseline = BASELINE_BYTES + (TORCH_BYTES if transcodes else 0) + (CUDA_BYTES if on_gpu else 0)
    sharing = -(-jobs // len(options.devices))  # workers of one device
    tiles = GPU_TILE_ELEMENTS if on_gpu else CPU_TILE_ELEMENTS
    room = None if options.max_memory is None else options.max_memory - baseline - names
    wanted = room if room is not None or on_gpu else ALL_WORKERS_BYTES
    for tile in tiles:  # the largest one that all workers can have, or the smallest with fewer workers
        needs = _needs(transcodes, tile, on_gpu)
        host = needs.buffer + needs.scratch
        if (wanted is None or jobs * host <= wanted) and (
            not on_gpu or options.max_vram is None or sharing * needs.device <= options.max_vram
        ):
            break
    if room is not None:
        _require("--max-memory", options.max_memory or 0, baseline + names + host)
        jobs = min(jobs, room // host)
    if on_gpu and options.max_vram is not None:
        _require("--max-vram", options.max_vram, needs.device)
        jobs = min(jobs, options.max_vram // needs.device * len(options.devices))
    on_device = -(-jobs // len(options.devices)) * needs.device if on_gpu else 0
    return Memory(baseline, names, jobs, needs.buffer, needs.scratch, needs.staging, tile, on_device, needs.strip)


def _require(option: str, given: int, least: int) -> None:
    if given < least:
        raise UsageError(
            f"{option} {given:,} is less than this conversion needs",
            f"The least that works is {least:,} bytes: {option} {-(-least // 1_000_000)}MB.",
        )


def _kind(step: Transcode) -> tuple[object, ...]:
    """Steps of one kind need the same."""
    how = [
        whole_run(matrix.source) is None
        if isinstance(matrix.source, Rearrange)
        else tuple((id(decode.format), shape) for decode, shape in _decoded(matrix))
        for matrix in _matrices(step)
    ]
    return step.matrix.shape, step.row_multiple, step.matrix.source_dtype, id(step.encoder), *how


def _matrices(step: Transcode) -> tuple[Matrix, ...]:
    """All that a step reads."""
    return step.sharing or (step.matrix,)


def _decoded(matrix: Matrix) -> list[tuple[Decode, Shape]]:
    """The quantized matrices that a matrix is made of."""
    if isinstance(matrix.source, Woven):
        return [(strand.decode, strand.shape) for strand in matrix.source.strands]
    return [(matrix.source, matrix.shape)] if isinstance(matrix.source, Decode) else []


def _needs(transcodes: Sequence[Transcode], tile: int, on_gpu: bool) -> _Needs:
    depth = GPU_DEPTH if on_gpu else 1
    needs = _Needs(COPY_BUFFER_BYTES, 0, 0, 0)
    for step in transcodes:
        rows = tile_rows(step, tile)
        matrices = _matrices(step)
        elements = rows * step.matrix.shape[1]
        woven = [matrix.source for matrix in matrices if isinstance(matrix.source, Woven)]
        decoders = [matrix.source.format for matrix in matrices if isinstance(matrix.source, Decode)]
        live = elements * max([8, *(format_.live_nbytes for format_ in (step.encoder, *decoders) if format_)])
        if step.encoder is not None:  # beside a tile its first rows, encoded and decoded: see `Transcode.sampled`
            first = min(rows, step.row_multiple) * step.matrix.shape[1]
            live = max(live, elements * DTYPE_BITS[step.matrix.dtype] // 8 + first * step.encoder.live_nbytes)
        staging = max(staged_nbytes(matrix.source, 0, rows) for matrix in matrices)
        strands = [strand for source in woven for strand in source.strands]
        for strand in strands:  # decoded before what is woven of them is encoded
            count = strand_rows(strand, tile)
            live = max(live, count * strand.shape[1] * strand.decode.format.live_nbytes)
            staging = max(staging, staged_nbytes(strand.decode, 0, count))
        strip = max((staged_nbytes(source, 0, strip_rows(step, tile)) for source in woven), default=0)
        buffer = 0
        for matrix in matrices:
            if isinstance(matrix.source, Rearrange) and whole_run(matrix.source) is None:
                item = DTYPE_BITS[matrix.source_dtype] // 8
                gaps = _GAP_NBYTES * sum(step.matrix.shape)
                buffer = max(buffer, elements * item * _REARRANGED_COPIES + gaps)
        results = rows * step.row_nbytes * depth if on_gpu else live + PROCESS_BYTES
        needs = _Needs(
            max(needs.buffer, buffer), max(needs.staging, staging),
            max(needs.scratch, depth * staging + results + strip), max(needs.device, int(live * GPU_ROUNDING)),
            max(needs.strip, strip),
        )  # fmt: skip
    return needs
