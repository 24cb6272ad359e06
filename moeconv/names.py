"""Tensor names: patterns with holes, natural order, and short ways to show many names.

A `Pattern` such as `{block}.mlp.experts.{expert}.up_proj.weight` matches and makes names. `{block}` is
whatever stands before (`model.layers.3`), behind a literal beginning where one is written (`visual.{block}.mlp`);
`{expert}` is one canonical integer between dots, so that matching and filling are exact inverses. There are
no regular expressions in recipes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from moeconv.dims import Dim, DimSyntaxError, parse_dim

BLOCK = "{block}"
#: What `is_integer` accepts, as a whole segment of a name.
_INTEGER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]{0,8})(?![^.])")
_DIGITS = re.compile(r"([0-9]{1,18})")
#: Names with more numbers than any model's are not folded.
_MOST_COLUMNS = 16
_HOLE = re.compile(r"\{expert(?::([^}]*))?\}")


class PatternError(ValueError):
    """A pattern that cannot be read; the text quotes it."""


def is_integer(segment: str) -> bool:
    """A canonical integer: ASCII digits without leading zeros, short enough to be an index."""
    return segment.isdigit() and segment.isascii() and len(segment) < 10 and (segment[0] != "0" or len(segment) == 1)


def split_name(name: str) -> tuple[str, tuple[int, ...]]:
    """The name with every canonical integer between dots replaced by `{}`, and those integers."""
    middle = name.find(".", len(name) // 2)
    if middle < 0:
        return _split(name)
    head, integers = _split(name[:middle])
    tail, more = _split(name[middle + 1 :])
    return f"{head}.{tail}", integers + more


def template_of(name: str) -> str:
    """The first of what `split_name` gives."""
    return split_name(name)[0]


def holes(name: str) -> Iterator[tuple[str, int, str]]:
    """Each canonical integer between dots, with what stands before it and behind it."""
    return ((name[: found.start()], int(found[0]), name[found.end() :]) for found in _INTEGER.finditer(name))


def natural_key(name: str) -> str:
    """Sort key, segment by segment, under which `layers.2` comes before `layers.10`.

    A text, which sorts three times as fast as the tuples that it stands for: the end of a segment (0) comes before a
    number (1, its digits with leading zeros, then as written), a number before text (2).
    """
    middle = name.find(".", len(name) // 2)
    return _natural(name) if middle < 0 else _natural(name[:middle]) + _natural(name[middle + 1 :])


# A model's hundred thousand names have some thousand first and last halves.
@lru_cache(maxsize=1 << 16)
def _split(name: str) -> tuple[str, tuple[int, ...]]:
    return _INTEGER.sub("{}", name), tuple(map(int, _INTEGER.findall(name)))


@lru_cache(maxsize=1 << 16)
def _natural(name: str) -> str:
    segments = [_DIGITS.split(segment) for segment in name.split(".")]  # text and digits in turn
    return "".join(
        "".join(f"\1{part:0>18}{part}" if turn % 2 else f"\2{part}" for turn, part in enumerate(parts) if part) + "\0"
        for parts in segments
    )


@dataclass(frozen=True, slots=True)
class IdRange:
    """Expert ids of a pattern: from `start` (included) to `stop` (excluded), as sizes."""

    start: Dim
    stop: Dim


@dataclass(frozen=True, slots=True)
class Pattern:
    """A tensor name with holes.

    Attributes:
        text: as written.
        lead: what every name begins with, before the block; usually empty.
        before: segments between `{block}` and the expert hole; all segments where there is no such hole.
        after: segments behind the expert hole.
        ids: what the expert hole runs over; None for a pattern without one.
    """

    text: str
    lead: str
    before: str
    after: str
    ids: IdRange | None

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read a pattern.

        Raises:
            PatternError: not a pattern.
        """
        lead, hole_of_block, rest = text.partition(BLOCK + ".")
        if not hole_of_block or (lead and not lead.endswith(".")) or "{" in lead:
            raise PatternError(f"{text!r} does not start with {BLOCK}. or with LITERAL.{BLOCK}.")
        holes = list(_HOLE.finditer(rest))
        literal = lead + _HOLE.sub("0", rest)
        if "{" in literal or "}" in literal:
            raise PatternError(f"{text!r} has an unknown hole; known: {{block}}, {{expert}}, {{expert:FROM..TO}}")
        if not literal or any(not segment for segment in literal.split(".")) or any(c.isspace() for c in literal):
            raise PatternError(f"{text!r} is not a tensor name")
        if len(holes) > 1:
            raise PatternError(f"{text!r} has more than one {{expert}}")
        if not holes:
            return cls(text, lead, rest, "", None)
        hole = holes[0]
        before, after = rest[: hole.start()], rest[hole.end() :]
        if (before and not before.endswith(".")) or (after and not after.startswith(".")):
            raise PatternError(f"{text!r}: {{expert}} must stand alone between dots")
        return cls(text, lead, before, after, _id_range(hole[1], text))

    def fill(self, block: str, expert: int) -> str:
        """The name for a block and an expert id as it stands in the file (ignored without an expert hole)."""
        if self.ids is None:
            return f"{self.lead}{block}.{self.before}"
        return f"{self.lead}{block}.{self.before}{expert}{self.after}"

    def match(self, name: str) -> tuple[str, int] | None:
        """Block and expert id (0 without an expert hole) of a name that `fill` would make, else None."""
        if self.lead:
            if not name.startswith(self.lead):
                return None
            name = name[len(self.lead) :]
        if self.ids is None:
            block = name.removesuffix("." + self.before)
            return (block, 0) if block != name and block else None
        head = name.removesuffix(self.after) if self.after else name
        if self.after and head == name:
            return None
        front, dot, expert = head.rpartition(".")
        if not dot or not is_integer(expert):
            return None
        block = (front + ".").removesuffix("." + self.before)
        return (block, int(expert)) if block and block != front + "." else None

    @property
    def template_end(self) -> str:
        """How the template (see `template_of`) of every matching name ends."""
        inner = self.before if self.ids is None else f"{self.before}0{self.after}"
        return "." + template_of(inner)

    @property
    def expert_integer(self) -> int | None:
        """Which of the integers (see `split_name`) of every matching name is the id, counted from the last (-1)."""
        return None if self.ids is None else -1 - len(split_name(self.after)[1])

    def __str__(self) -> str:
        return self.text


def _id_range(text: str | None, pattern: str) -> IdRange:
    """`{expert}` runs over 0..E-1, `{expert:V}` over 0..V-1, `{expert:E..2*E}` over E..2E-1."""
    start, _, stop = (text or "E").rpartition("..")
    try:
        return IdRange(parse_dim(start or "0"), parse_dim(stop))
    except DimSyntaxError as error:
        raise PatternError(f"{pattern!r}: {error}") from None


def ranges(numbers: Iterable[int]) -> str:
    """`0..3,7` for {0, 1, 2, 3, 7}."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}..{last}" for first, last in runs)


def gaps(numbers: Iterable[int], start: int, stop: int) -> str:
    """The numbers from `start` to `stop` (excluded) that are not there, as `ranges` shows them; empty for none."""
    edges = [start - 1, *sorted({number for number in numbers if start <= number < stop}), stop]
    runs = [(left + 1, right - 1) for left, right in pairwise(edges) if right - left > 1]
    return ",".join(str(first) if first == last else f"{first}..{last}" for first, last in runs)


def collapse(names: Sequence[str]) -> list[str]:
    """The names with runs of integers folded: `layers.{0..47}.mlp.experts.{0..127}.up_proj.weight`.

    Each template (see `template_of`) gives one line for each set of numbers that is a full product of its
    columns; other sets are listed by their columns only where that stays true, name by name otherwise.
    """
    groups: dict[str, set[tuple[int, ...]]] = {}
    for name in names:
        template, integers = split_name(name)
        groups.setdefault(template, set()).add(integers)
    return collapse_rows(groups)


def collapse_rows(groups: Mapping[str, set[tuple[int, ...]]]) -> list[str]:
    """As `collapse`, for the templates and integers of names."""
    return [line for template, rows in groups.items() for line in _folded(template, rows)]


def _folded(template: str, rows: set[tuple[int, ...]]) -> list[str]:
    if len(next(iter(rows))) > _MOST_COLUMNS:
        return [_numbered(template, list(map(str, row))) for row in sorted(rows)]
    columns = [sorted(set(column)) for column in zip(*rows, strict=True)]
    size = 1
    for column in columns:
        size *= len(column)
    if size == len(rows):
        shown = [str(c[0]) if len(c) == 1 else "{" + ranges(c) + "}" for c in columns]
        return [_numbered(template, shown)]
    behind: dict[int, set[tuple[int, ...]]] = {}
    for row in sorted(rows):
        behind.setdefault(row[0], set()).add(row[1:])
    split: dict[frozenset[tuple[int, ...]], set[int]] = {}
    for first, tails in behind.items():
        split.setdefault(frozenset(tails), set()).add(first)
    lines: list[str] = []
    for rest, firsts in split.items():
        shown_first = "{" + ranges(firsts) + "}" if len(firsts) > 1 else str(next(iter(firsts)))
        lines += _folded(_numbered(template, [shown_first]), set(rest))
    return lines


def _numbered(template: str, shown: Sequence[str]) -> str:
    for text in shown:
        template = template.replace("{}", text, 1)
    return template
