"""What a matrix that is not the source's is instead: another part's, another expert's, its own the other way round."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from moeconv.errors import Problem
from moeconv.likeness import Likeness, Likenesses
from moeconv.looking import Look, Reader
from moeconv.matching import Held, Place
from moeconv.moves import Fill
from moeconv.names import collapse, natural_key
from moeconv.plan import Memory

if TYPE_CHECKING:
    from torch import Tensor

#: Rows that are compared at first, and the relative error below which two matrices are the same: what is not has 1.4,
#: and formats of four bits lose 0.1 to 0.2.
_ROWS, _SAME = 16, 0.5
#: Matrices whose place is looked for among all experts; each may cost a look at all of its layer.
_MOST_SEARCHED = 64
#: All others are asked for their neighbours, up to so many.
_MOST_ASKED = 4096
_REMEDY = "Convert again, with a converter that keeps experts, projections and axes where they belong."


class Diagnosis:
    """Says of matrices that are off what they hold.

    Args:
        likenesses: the comparison, with its two folders.
        source: matrices of the source.
        memory: what a thread may take.
    """

    def __init__(self, likenesses: Likenesses, source: Held, memory: Memory) -> None:
        self._source = source
        self._memory = memory
        files = likenesses.files
        self._readers = [Reader(files, folder, memory) for folder in (likenesses.source, likenesses.made)]
        self._by_place = {place: key for key, place in source.places.items()}
        self._experts: Mapping[tuple[str, str], list[int]] = defaultdict(list)
        self._parts: Mapping[str, list[str]] = defaultdict(list)
        for place in source.places.values():
            self._experts[place.block, place.part].append(place.expert)
            if place.part not in self._parts[place.block]:
                self._parts[place.block].append(place.part)
        self._searched = self._asked = 0

    def close(self) -> None:
        """Close all files."""
        for reader in self._readers:
            reader.close()

    def problems(self, wrong: Sequence[Likeness]) -> list[Problem]:
        """One problem for all matrices that went the same way, names collapsed."""
        said: dict[str, list[str]] = {}
        for likeness in sorted(wrong, key=lambda item: natural_key(item.pair.name)):
            said.setdefault(self._what(likeness), []).append(likeness.pair.name)
        return [Problem(f"{line} {what}", _REMEDY) for what, names in said.items() for line in collapse(names)]

    def _what(self, likeness: Likeness) -> str:
        if 2 * likeness.wrong_blocks < likeness.blocks:
            return _of_blocks(likeness)
        for what, fill, is_transposed in self._candidates(likeness):
            if self._is_same(likeness.pair.made, fill, is_transposed=is_transposed):
                return what
        return _of_blocks(likeness)

    def _candidates(self, likeness: Likeness) -> Iterator[tuple[str, Fill, bool]]:
        """What it may hold, with words for it; the likeliest first."""
        key, own = likeness.pair.key, likeness.pair.source
        place = self._source.places.get(key)
        self._asked += 1
        if self._asked > _MOST_ASKED:
            return
        if len(own.block) == 2 and own.block[0] == own.block[1]:
            yield "holds the transpose of what the source has: its axes are exchanged", own, True
        if place is None:
            return
        for part in self._parts[place.block]:
            other = self._fill(place._replace(part=part))
            if part != place.part and other is not None and other.block == own.block:
                yield f"holds {part} of the source: {place.part} and {part} are exchanged", other, False
        self._searched += 1
        if self._searched > _MOST_SEARCHED:
            return
        for expert in self._experts[place.block, place.part]:
            if expert != place.expert and (other := self._fill(place._replace(expert=expert))) is not None:
                yield f"holds expert {expert} of the source, not expert {place.expert}", other, False
        for part in self._parts[place.block]:
            for expert in self._experts[place.block, part]:
                other = self._fill(place._replace(part=part, expert=expert))
                if part != place.part and expert != place.expert and other and other.block == own.block:
                    yield f"holds {part} of expert {expert} of the source", other, False

    def _fill(self, place: Place) -> Fill | None:
        key = self._by_place.get(place)
        return self._source.fills[key] if key is not None else None

    def _is_same(self, made: Fill, wanted: Fill, *, is_transposed: bool) -> bool:
        look = Look.at(wanted, made)
        rows = min(look.matrices[0].shape[0], -(-_ROWS // look.rows) * look.rows)
        if rows * look.matrices[0].shape[1] > max(self._memory.tile_elements, look.rows * look.matrices[0].shape[1]):
            rows = look.rows
        found = self._readers[1].floats(look.matrices[1], 0, rows)
        if not is_transposed:
            return _is_near(self._readers[0].floats(look.matrices[0], 0, rows), found)
        lost = total = 0.0
        for first, last in look.tiles(self._memory.tile_elements):
            columns = self._readers[0].floats(look.matrices[0], first, last)[:, :rows].T
            lost += float((columns - found[:, first:last]).square().sum())
            total += float(columns.square().sum())
        return lost < _SAME * _SAME * total


def _is_near(wanted: Tensor, found: Tensor) -> bool:
    lost, total = float((wanted - found).square().sum()), float(wanted.square().sum())
    return lost < _SAME * _SAME * total


def _of_blocks(likeness: Likeness) -> str:
    """How much is off, and where it begins."""
    made = likeness.format
    if not likeness.expected or likeness.first_wrong is None:
        return f"({made}) is not what the source has"
    row, column = likeness.first_wrong
    what = (
        f"({made}) is not what the source has, further off than {made} rounds, in {likeness.wrong_blocks:,} of "
        f"{likeness.blocks:,} blocks that share a scale, the first at row {row:,}, column {column:,}"
    )
    if abs(likeness.factor - 1) > 0.05:
        what += f": as if that had the scale of another block, {likeness.factor:.3g} times what it should be"
    return what
