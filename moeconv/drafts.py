"""Experts that were discovered in the words of recipes: symbols, parts, and the lines of every layout.

The source's own names are one layout. The others are written as most models have them: one tensor for each expert and
projection, and one for all experts with gate and up joined.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from moeconv.discover import Reading, Stack
from moeconv.ops import Concat, Expression, Interleave, Part, Transpose
from moeconv.recipe_file import quoted
from moeconv.tensors import Shape

#: Roles of matrices, in the order of lines.
ROLES = ("gate", "up", "gate_up", "down", "other")


class Line(NamedTuple):
    """A line of a layout."""

    name: str
    claim: tuple[str, ...]
    value: Expression

    @property
    def key(self) -> str:
        return quoted(f"{self.name} [{', '.join(self.claim)}]")

    @property
    def made_of(self) -> str:
        return _written(self.value)


class _Part(NamedTuple):
    """A part of an expert: what it belongs to (`gate`), what it is there (`bias`; empty for the matrix), its shape."""

    role: str
    suffix: str
    claim: tuple[str, ...]


def _written(value: Expression) -> str:
    if isinstance(value, Part):
        return value.name
    if isinstance(value, Transpose):
        return f"{{transpose: {_written(value.child)}}}"
    return f"{{{type(value).__name__.lower()}: [{', '.join(map(_written, value.children))}]}}"


class Experts(NamedTuple):
    """A stack, what it may be, and how the recipe calls it.

    Attributes:
        symbols: for E, I and H.
        number: behind names of parts; empty for the first stack.
        lead: what names begin with before `{block}`.
        home: words before the expert's id in the layouts that the source is not in.
    """

    stack: Stack
    readings: Sequence[Reading]
    symbols: Mapping[str, str]
    number: str
    lead: str
    home: str

    def part(self, role: str, suffix: str) -> str:
        return "_".join(filter(None, (role, suffix, self.number)))

    @property
    def hole(self) -> str:
        """The expert hole as it stands in names."""
        count = self.symbols["E"]
        ids = self.stack.ids.replace("E", count) or (f":{count}" if count != "E" else "")
        return f"{{expert{ids}}}"

    def pattern(self, tail: str) -> str:
        """Name of a tensor of the source."""
        behind = f"{self.hole}{tail}" if self.stack.stored == "one by one" else tail[1:]
        return f"{self.lead}{{block}}.{self.stack.stem}{behind}"

    def owned(self, reading: Reading) -> Iterator[tuple[str, str, str, bool]]:
        """Each tail, the role of the matrix that it belongs to, what it is there, whether it is stored [in, out]."""
        words = sorted(((re.sub(r"[._]weight$", "", tail), tail) for tail in reading.roles), key=lambda w: -len(w[0]))
        for tail in self.stack.shapes:
            word, matrix = next((found for found in words if tail.startswith(found[0])), ("", ""))
            role, is_flipped = reading.roles.get(matrix, ("", False))
            rest = "" if tail == matrix else re.sub(r"\W+", "_", tail[len(word) :], flags=re.ASCII).strip("_")
            yield tail, role or "other", rest, is_flipped

    def claim(self, role: str, suffix: str, shape: Shape, reading: Reading) -> tuple[str, ...]:
        """Shape of a part as symbols."""
        inner, hidden = self.symbols["I"], self.symbols["H"]
        out_in = {"down": (hidden, inner), "gate_up": (f"2*{inner}", hidden)}.get(role, (inner, hidden))
        if not suffix:
            return out_in
        sizes = {2 * reading.inner: f"2*{inner}", reading.hidden: hidden, reading.inner: inner}
        own = {"down": reading.hidden, "gate_up": 2 * reading.inner}.get(role, reading.inner)
        return tuple(out_in[0] if size == own else sizes.get(size, str(size)) for size in shape)

    def parts(self, reading: Reading) -> list[_Part]:
        found = []
        for tail, role, suffix, _ in self.owned(reading):
            claim = self.claim(role, suffix, self.stack.shapes[tail], reading)
            is_joined = role == "gate_up" and suffix in ("", "bias")
            found += [
                _Part(one, suffix, (self.symbols["I"], *claim[1:]) if is_joined else claim)
                for one in (("gate", "up") if is_joined else (role,))
            ]
        return sorted(found, key=lambda part: (ROLES.index(part.role), part.suffix))

    def source(self, reading: Reading) -> list[Line]:
        """The tensors as they are stored."""
        lines: list[tuple[int, Line]] = []
        order = {tail: ROLES.index(role) for tail, role, *_ in self.owned(self.readings[0])}  # the same in all readings
        count = self.symbols["E"]
        for tail, role, suffix, is_flipped in self.owned(reading):
            claim = self.claim(role, suffix, self.stack.shapes[tail], reading)
            value: Expression = Part(self.part(role, suffix))
            if role == "gate_up" and suffix in ("", "bias"):
                join = Interleave if reading.is_interleaved else Concat
                value = join((Part(self.part("gate", suffix)), Part(self.part("up", suffix))))
            if is_flipped and not suffix:
                claim, value = claim[::-1], Transpose(value)
            if self.stack.stored == "stacked":
                claim = (count, *claim)
            elif self.stack.stored == "folded":
                claim = (f"{count}*{claim[0]}", *claim[1:])
            lines.append((order[tail], Line(self.pattern(tail), claim, value)))
        return [line for _, line in sorted(lines, key=lambda item: item[0])]

    def unpacked(self, parts: Sequence[_Part]) -> list[Line]:
        """One tensor for each expert and part."""
        start = f"{self.lead}{{block}}.{self.home}{self.hole}"
        return [
            Line(f"{start}.{p.role}_proj.{p.suffix or 'weight'}", p.claim, Part(self.part(p.role, p.suffix)))
            for p in parts
        ]

    def packed(self, parts: Sequence[_Part]) -> list[Line]:
        """One tensor for all experts, gate and up joined."""
        lines = []
        for part in parts:
            other = _Part("up", part.suffix, part.claim)
            is_joined = part.role == "gate" and part.suffix in ("", "bias") and other in parts
            if part.role == "up" and part._replace(role="gate") in parts and part.suffix in ("", "bias"):
                continue
            role = "gate_up" if is_joined else part.role
            value: Expression = Part(self.part(part.role, part.suffix))
            if is_joined:
                value = Concat((value, Part(self.part("up", part.suffix))))
            claim = (f"2*{part.claim[0]}", *part.claim[1:]) if is_joined else part.claim
            name = "_".join(filter(None, (f"{role}_proj", part.suffix)))
            lines.append(Line(f"{self.lead}{{block}}.{self.home}{name}", (self.symbols["E"], *claim), value))
        return lines

    def layouts(self, reading: Reading) -> dict[str, list[Line]]:
        """All three layouts; the source is the one that it looks like, else `hub`."""
        parts, source = self.parts(reading), self.source(reading)
        unpacked, packed = self.unpacked(parts), self.packed(parts)
        if self.stack.stored == "one by one" and "gate_up" not in reading.order and not reading.flips:
            return {"experts": source, "packed": packed, "hub": source}
        if self.stack.stored == "stacked" and {line.name for line in source} == {line.name for line in packed}:
            return {"experts": unpacked, "packed": source, "hub": source}
        return {"experts": unpacked, "packed": packed, "hub": source}

    @property
    def variants(self) -> list[dict[str, list[Line]]]:
        return [self.layouts(reading) for reading in self.readings]

    def sizes(self) -> dict[str, set[int]]:
        """Values of E, I and H in all blocks; none of the last two where readings do not agree on them."""
        down, is_flipped = next((tail, f) for tail, (role, f) in self.readings[0].roles.items() if role == "down")
        stored = [block.shapes[down] for block in self.stack.blocks.values() if down in block.shapes]
        shapes = [shape[::-1] if is_flipped else shape for shape in stored]
        agreed = len({(reading.inner, reading.hidden) for reading in self.readings}) == 1
        found = {"I": {inner for _, inner in shapes}, "H": {hidden for hidden, _ in shapes}} if agreed else {}
        return {"E": {block.experts for block in self.stack.blocks.values()}, "I": set(), "H": set(), **found}


def _home(stem: str) -> str:
    """Words before the id of an expert: up to those that say so, else `experts` behind the others."""
    words = stem.split(".")[:-1]
    named = [number for number, word in enumerate(words) if "expert" in word]
    return ".".join(words[: named[-1] + 1] if named else [*words, "experts"]) + "."


class Sort(NamedTuple):
    """Experts of one sort in the recipe: what holds them, in one way or two, and every choice of its lines."""

    held: Sequence[Experts]
    variants: Sequence[Mapping[str, Sequence[Line]]]


def drafted(found: Sequence[tuple[Stack, list[Reading]]]) -> tuple[list[Sort], dict[str, set[int]]]:
    """Stacks with symbols, names of parts and names of tensors; and the values of the symbols.

    Args:
        found: each stack with all that its matrices may be, the most important first.
    """
    values: dict[str, set[int]] = {}
    sorts: list[Sort] = []
    for stack, readings in found:
        number = str(len(sorts) + 1) if sorts else ""
        experts = Experts(stack, readings, {}, number, "", _home(stack.stem))
        symbols = {}
        for symbol, sizes in experts.sizes().items():
            same = (s for s in values if s[0] == symbol and values[s] == sizes)
            symbols[symbol] = next(same, f"{symbol}{number}")
            values[symbols[symbol]] = sizes
        experts = experts._replace(symbols=symbols)
        rivals = [at for at, sort in enumerate(sorts) if sort.held[0].home == experts.home]
        both = [(at, made) for at in rivals if (made := _as_one(sorts[at], experts))]
        if both:
            sorts[both[0][0]] = both[0][1]
            continue
        if rivals:
            others = [_led(sorts[at].held[0], [stack]) for at in rivals]
            experts = _led(experts, [sorts[at].held[0].stack for at in rivals])
            if experts.lead and all(
                other.lead and len(sorts[at].held) == 1 for at, other in zip(rivals, others, strict=True)
            ):
                for at, other in zip(rivals, others, strict=True):
                    sorts[at] = Sort([other], other.variants)
            else:
                experts = experts._replace(home=f"{experts.home[:-1]}_{number}.")
        sorts.append(Sort([experts], experts.variants))
    return sorts, values


def _as_one(sort: Sort, experts: Experts) -> Sort | None:
    """Experts that some blocks hold one by one and others packed, as one sort."""
    experts = experts._replace(number=sort.held[0].number)
    both = sorted([sort.held[0], experts], key=lambda experts: experts.stack.stored == "stacked")
    if [item.stack.stored for item in both] != ["one by one", "stacked"] or both[0].symbols != both[1].symbols:
        return None
    single, packed = both[0].variants[0], both[1].variants
    if single["hub"] is not single["experts"] or any(variant["hub"] is not variant["packed"] for variant in packed):
        return None
    if {line.made_of for line in packed[0]["experts"]} != {line.made_of for line in single["experts"]}:
        return None
    return Sort(both, [{**variant, "experts": single["experts"]} for variant in packed])


def _led(experts: Experts, others: Sequence[Stack]) -> Experts:
    """Experts with a beginning of names that others lack, where there is one, so that patterns tell them apart."""
    word, dot, stem = experts.stack.stem.partition(".")
    if stem and any("." not in block for block in experts.stack.blocks):  # nothing would be left for {block}
        blocks = {f"{block}{dot}{word}": held for block, held in experts.stack.blocks.items()}
        experts = experts._replace(stack=experts.stack._replace(stem=stem, blocks=blocks), home=_home(stem))
    mine, theirs = (
        [block.split(".") for stack in stacks for block in stack.blocks] for stacks in ([experts.stack], others)
    )
    for length in range(1, min(map(len, mine))):
        lead = mine[0][:length]
        if all(words[:length] == lead for words in mine) and not any(words[:length] == lead for words in theirs):
            return experts._replace(lead=".".join(lead) + ".")
    return experts
