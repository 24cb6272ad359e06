"""The result of a verification, as people and programs read it."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

from moeconv.engines import Reading
from moeconv.errors import Problem
from moeconv.explain import size
from moeconv.likeness import Likeness, decibels

SCHEMA_VERSION = 1


class Summary(NamedTuple):
    """What matrices of one format lost.

    Attributes:
        format: its name, or the dtype of matrices in full precision.
        matrices: so many.
        relative_error: root of the sum of squared differences by that of the source's squares.
        worst: the one of largest relative error.
    """

    format: str
    matrices: int
    relative_error: float
    worst: Likeness

    @classmethod
    def of(cls, name: str, found: Sequence[Likeness]) -> Summary:
        """Of all matrices of a format."""
        lost, squares = sum(item.lost for item in found), sum(item.squares for item in found)
        return cls(name, len(found), sqrt(lost / squares), max(found, key=lambda item: item.relative_error))

    def json(self) -> dict[str, Any]:
        """For programs; a signal without noise has no `snr_db`."""
        snr = decibels(self.relative_error)
        return {
            "format": self.format,
            "matrices": self.matrices,
            "relative_error": round(self.relative_error, 6),
            "snr_db": None if snr is None else round(snr, 2),
            "worst": {
                "name": self.worst.pair.name,
                "relative_error": round(self.worst.relative_error, 6),
                "limit": round(self.worst.limit, 6),
            },
        }

    def __str__(self) -> str:
        snr = decibels(self.relative_error)
        noise = "the same numbers" if snr is None else f"relative error {self.relative_error:.4f} ({snr:.1f} dB)"
        worst = f", worst {self.worst.relative_error:.4f}: {self.worst.pair.name}" if snr is not None else ""
        return f"  {self.format:<14} {self.matrices:>8,} matrices  {noise}{worst}"


class Report(NamedTuple):
    """Result of a verification.

    Attributes:
        tensors: tensors that headers name.
        problems: what is off; empty for a good folder.
        readings: which engines read it.
        notes: what else is to be known.
        by: how it was compared with the source: `bytes` or `values`; empty without one.
        compared_nbytes: bytes compared with the source.
        looked_nbytes: bytes of which numbers were looked at or compared, and
        of_nbytes: of so many.
        matrices: compared by value, and
        of_matrices: of so many.
        formats: what each format lost, compared by value.
    """

    tensors: int
    problems: tuple[Problem, ...]
    readings: tuple[Reading, ...] = ()
    notes: tuple[str, ...] = ()
    by: str = ""
    compared_nbytes: int = 0
    looked_nbytes: int = 0
    of_nbytes: int = 0
    matrices: int = 0
    of_matrices: int = 0
    formats: tuple[Summary, ...] = ()

    def json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "schema_version": SCHEMA_VERSION,
            "ok": not self.problems,
            "tensors": self.tensors,
            "compared_by": self.by or None,
            "compared_bytes": self.compared_nbytes,
            "looked_at": {
                "bytes": self.looked_nbytes,
                "of_bytes": self.of_nbytes,
                "matrices": self.matrices,
                "of_matrices": self.of_matrices,
            },
            "formats": [summary.json() for summary in self.formats],
            "engines": [reading._asdict() for reading in self.readings],
            "notes": list(self.notes),
            "problems": [{"message": problem.message, "remedy": problem.remedy} for problem in self.problems],
        }


def report_text(report: Report, folder: Path, against: Path | None) -> str:
    """What was found right."""
    said = [f"{folder}: {report.tensors:,} tensors", "structure right"]
    part = f" of {size(report.of_nbytes)}" if report.looked_nbytes < report.of_nbytes else ""
    if report.by == "bytes":
        said.append(f"{size(report.compared_nbytes)}{part} equal byte for byte to {against}")
    elif report.by == "values":
        most = f" of {report.of_matrices:,}" if report.matrices < report.of_matrices else ""
        said.append(f"{report.matrices:,}{most} tensors like those of {against}, as far as rounding goes")
    elif report.of_nbytes:
        said.append(f"{size(report.looked_nbytes)}{part} of numbers sound")
    return "\n".join([", ".join(said), *map(str, report.formats)])
