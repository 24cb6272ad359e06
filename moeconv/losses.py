"""What encoding loses, as a run sees it: squared errors of some rows of some matrices, summed up for `moeconv.json`.

To decode all that was encoded would take half as long again. So a plan names some matrices of each kind, of which the
worker decodes the first rows (`Transcode.sampled`): a few, then one in sixteen or less, and a sixty-fourth of what it
encodes at most. The numbers are the same in every run of a plan, whatever its tiles and jobs, cut short or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil, fsum, gcd, isfinite, lcm, log10, sqrt
from typing import Any, NamedTuple

from moeconv.formats import Probe
from moeconv.plan import Plan
from moeconv.values import Value, matrix_shape

#: Of what is encoded, so much at most is decoded again, of one matrix in so many; and of the first few of each kind:
#: for rows of a few thousand numbers a hundred calls to torch cost more than their work.
_SHARE, _DISTANCE, _FIRST = 1 / 64, 16, 4


class Loss(NamedTuple):
    """Of the rows that were looked at of one matrix.

    Attributes:
        format: its name.
        matrix: its name in full precision.
        error: sum of squared differences.
        norm: sum of squares.
    """

    format: str
    matrix: str
    error: float
    norm: float

    @property
    def relative(self) -> float:
        """||decoded - w|| / ||w||; 0 for a matrix of zeros, which every format keeps."""
        return sqrt(self.error / self.norm) if self.norm else 0.0


def read_loss(item: Any) -> Loss | None:
    """A loss as the journal holds it; None for what no run wrote."""
    if not isinstance(item, list) or list(map(type, item)) != [str, str, float, float]:
        return None
    return Loss(*item) if isfinite(item[2]) and isfinite(item[3]) else None


def sampled_matrices(kinds: Iterable[Sequence[Value]]) -> frozenset[tuple[str, int]]:
    """Which matrices are looked at: of each kind the first, then every n-th; by name, and place in a joint tensor."""
    found: set[tuple[str, int]] = set()
    for kind in kinds:
        made, fill = kind[0].format, kind[0].fill
        if made is None or kind[0].fate.keeps or isinstance(made, Probe):
            continue
        rows, columns = matrix_shape(fill)
        share = lcm(made.row_multiple, made.block // gcd(made.block, columns)) / rows
        distance = max(_DISTANCE, ceil(min(1.0, share) / _SHARE))
        taken = [*kind[:_FIRST], *kind[distance::distance]]
        found.update((value.fill.target.name, value.fill.at) for value in taken)
    return frozenset(found)


def summary_of(plan: Plan, losses: Iterable[Loss]) -> dict[str, Any]:
    """What each format cost, for `moeconv.json`.

    Args:
        plan: what was done.
        losses: of all its tasks, in any order.

    Returns:
        For each format: how many matrices have it, how many of them `kept_codes` that they had, how many were
        `sampled`, the `relative_error` ||decoded - w|| / ||w|| over all that was sampled, the same as `snr_db`, and
        the matrix that has the largest.
    """
    matrices: dict[str, list[int]] = {}
    for value in plan.values:
        if value.format is not None and not isinstance(value.format, Probe):
            counts = matrices.setdefault(value.format.name, [0, 0])
            counts[0] += 1
            counts[1] += bool(value.fate.keeps)
    ordered = sorted(losses)
    return {
        name: {"matrices": count, "kept_codes": kept, **_figures([loss for loss in ordered if loss.format == name])}
        for name, (count, kept) in sorted(matrices.items())
    }


def _figures(losses: Sequence[Loss]) -> dict[str, Any]:
    if not losses:
        return {"sampled": 0}
    whole = Loss("", "", fsum(loss.error for loss in losses), fsum(loss.norm for loss in losses))
    worst = max(losses, key=lambda loss: loss.relative)
    return {
        "sampled": len(losses),
        "relative_error": _rounded(whole.relative),
        "snr_db": round(-20 * log10(whole.relative), 2) if whole.relative else None,
        "worst": {"matrix": worst.matrix, "relative_error": _rounded(worst.relative)},
    }


def _rounded(value: float) -> float:
    """To four digits, which devices that add in another order have in common."""
    return float(f"{value:.3e}")
