"""A part of many things to look at, the same in every run and spread over layers and experts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from math import ceil
from typing import NamedTuple, TypeVar

from moeconv.errors import UsageError
from moeconv.names import natural_key, split_name

#: The fraction of which multiples are spread most evenly.
_GOLDEN = 0.6180339887498949
T = TypeVar("T")


class Sample(NamedTuple):
    """How much to look at.

    Attributes:
        most: so many; None for
        share: this part of all.
        seed: another one chooses others.
    """

    most: int | None
    share: float = 1.0
    seed: int = 0

    def of(self, named: Sequence[tuple[str, T]]) -> list[T]:
        """What is chosen, at least one, in the order given.

        Names that differ in integers alone (layers, experts) are chosen at even distances, those of different kinds in
        turn.
        """
        wanted = self.most if self.most is not None else ceil(len(named) * self.share - 1e-9)
        if wanted >= len(named):
            return [item for _, item in named]
        places = sorted(range(len(named)), key=lambda number: natural_key(named[number][0]))
        seen: dict[str, int] = {}
        keys = []
        for number in places:
            kind = split_name(named[number][0])[0]
            turn = seen[kind] = seen.get(kind, 0) + 1
            keys.append(((turn * _GOLDEN + _offset(kind, self.seed)) % 1.0, number))
        chosen = {number for _, number in sorted(keys)[: max(1, wanted)]}
        return [item for number, (_, item) in enumerate(named) if number in chosen]


def _offset(kind: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed} {kind}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / (1 << 48)


def parse_sample(text: str, seed: int = 0) -> Sample:
    """A sample as typed: a number such as 500, or a share such as 5% or 0.5%.

    Raises:
        UsageError: neither.
    """
    found = re.fullmatch(r"(\d{1,9})|(\d{1,3}(?:\.\d{1,6})?)\s*%", text.strip())
    if found and found[1] and int(found[1]):
        return Sample(int(found[1]), seed=seed)
    if found and found[2] and 0 < float(found[2]) <= 100:
        return Sample(None, float(found[2]) / 100, seed)
    raise UsageError(
        f"--sample {text!r} is neither a number of matrices nor a share of them", "Write a number such as 500, or 5%."
    )


def chosen(sample: Sample | None, named: Iterable[tuple[str, T]]) -> list[T]:
    """What is looked at: all without a sample."""
    listed = list(named)
    return [item for _, item in listed] if sample is None else sample.of(listed)
