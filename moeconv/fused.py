"""Matrices that engines fuse, and whose stored scales are of no use once they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moeconv.checkpoint import Checkpoint
from moeconv.small_tensors import SmallTensors
from moeconv.transcodes import whole_scale

_WEIGHT = ".weight"


def torn_matrices(source: Checkpoint, partners: Callable[[str], Sequence[str]]) -> set[str]:
    """Names of matrices whose scale for the whole differs from that of what engines fuse with them.

    What is stored is right for each, and wrong for all but one of them once an engine has fused them. These few numbers
    are the one content of tensors that a plan looks at.

    Args:
        source: with every quantized matrix as one tensor (`decoded_view`).
        partners: the modules that engines fuse with a module, itself included.
    """
    scales: dict[str, bytes] = {}
    with SmallTensors(source) as contents:
        for name, tensor in source.tensors.items():
            place = whole_scale(tensor.encoded, tensor.spec.shape) if tensor.encoded is not None else None
            if place is not None:
                scales[name.removesuffix(_WEIGHT)] = contents.read_in(*place, 4)
    return {
        module + _WEIGHT
        for module in scales
        if len({scales[partner] for partner in partners(module) if partner in scales}) > 1
    }
