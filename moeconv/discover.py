"""Which tensors of an unknown checkpoint are experts, and what each of their matrices may be.

Experts are found by structure: numbered siblings, or tensors with one more axis, in many blocks, that are projections
into an inner size and out of it, and that a name, a router or a count in config.json says are experts. What a matrix
may be is every reading that names and shapes allow: more than one where headers do not tell.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby, permutations, product
from math import prod
from typing import Any, NamedTuple

from moeconv.forms import full_precision
from moeconv.names import holes, template_of
from moeconv.tensors import Shape

_MAX_TAILS = 40

#: What words of names usually mean, the first that is found.
_USUAL = {
    "gate_up": r"gate_(and_)?up|up_gate|w13|w1_w3",
    "down": r"down|w2|wo|fc2|output|out|4h_to_h",
    "gate": r"gate|w1|wi_0",
    "up": r"up|w3|v1|wi_1",
    "in": r"fc1|input|in|wi|h_to_4h",
}
#: Keys of config.json that tell what a size is, and those that do not though they look like it.
_TELLING = {
    "E": (
        r"expert|routed",
        r"zero|tok|top|shared|group|activ|used|layer|freq|step|size|dim|hidden|inter|capacity|coef",
    ),
    "I": (r"intermediate|inner|ffn|mlp|expert.*(size|dim)|moe.*(size|dim)", r"shared|layer|dense|ffn_config"),
    "H": (r"hidden|d_model|n_embd|embed|width|latent|^dim$", r"ffn|inter|inner|layer|head|act|drop"),
}


class Key(NamedTuple):
    """An entry of config.json that holds sizes."""

    scope: str
    name: str
    values: frozenset[int]

    def tells(self, symbol: str) -> bool:
        word, other = _TELLING[symbol]
        return bool(re.search(word, self.name.lower())) and not re.search(other, self.name.lower())


class Block(NamedTuple):
    """Experts of one block: how many, and by tail of name the tensors of one expert in full precision."""

    experts: int
    shapes: Mapping[str, Shape]


class Stack(NamedTuple):
    """Experts of one sort.

    Attributes:
        stem: literal words between `{block}.` and the expert's id or the tail; ends with a dot unless empty.
        stored: `one by one`, `stacked`, or `folded` into the first axis.
        blocks: by name of the block.
        ids: what the expert hole runs over where not all ids are of this sort, such as `:E`.
    """

    stem: str
    stored: str
    blocks: Mapping[str, Block]
    ids: str = ""

    @property
    def shapes(self) -> dict[str, Shape]:
        """Tensors of one expert in the first block that has each."""
        return {tail: shape for block in reversed(list(self.blocks.values())) for tail, shape in block.shapes.items()}

    @property
    def weights(self) -> int:
        """Number of elements."""
        return sum(block.experts * prod(shape) for block in self.blocks.values() for shape in block.shapes.values())

    @property
    def matrices(self) -> dict[str, Shape]:
        return {tail: shape for tail, shape in self.shapes.items() if len(shape) == 2}


class Reading(NamedTuple):
    """What each matrix may be, by tail: its role, and whether it is stored [in, out]; and how a fused one is joined."""

    roles: Mapping[str, tuple[str, bool]]
    inner: int
    hidden: int
    is_interleaved: bool = False

    @property
    def order(self) -> list[str]:
        """Role of each matrix."""
        return [role for role, _ in self.roles.values()]

    @property
    def flips(self) -> int:
        """How many matrices are stored [in, out]."""
        return sum(is_flipped for _, is_flipped in self.roles.values())


# What may be experts


def sizes_of(config: Mapping[str, Any], scope: str = "") -> Iterator[Key]:
    """All sizes that config.json holds."""
    for name, value in config.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            continue  # a recipe could not name it
        if isinstance(value, Mapping):
            yield from sizes_of(value, f"{scope}.{name}" if scope else name)
        sizes = {v for v in (value if isinstance(value, list) else [value]) if type(v) is int and v > 1}
        if sizes:
            yield Key(scope or ".", name, frozenset(sizes))


def _values(keys: Sequence[Key], symbol: str) -> set[int]:
    return {value for key in keys if key.tells(symbol) for value in key.values}


def _one_by_one(shapes: Mapping[str, Shape], likely: Collection[int]) -> Iterator[Stack]:
    """Numbered siblings, for every integer of every name."""
    found: dict[str, dict[str, dict[int, dict[str, Shape]]]] = {}
    templates: dict[str, str] = {}
    for name, shape in shapes.items():
        for before, number, tail in holes(name):
            if before and tail:
                template = templates.get(before) or templates.setdefault(before, template_of(before))
                siblings = found.setdefault(template, {}).setdefault(before, {})
                siblings.setdefault(number, {})[tail] = shape
    for template, every in found.items():
        blocks = {block: ids for block, ids in every.items() if len(ids) > 1}
        if not blocks or max(len(tails) for ids in blocks.values() for tails in ids.values()) > _MAX_TAILS:
            continue  # a layer
        alike = [[list(run) for _, run in groupby(sorted(ids), key=ids.__getitem__)] for ids in blocks.values()]
        are_two_sorts = all(len(runs) == 2 and len(runs[0]) == len(runs[1]) > 1 for runs in alike)
        for sort, ids in enumerate((":E", ":E..2*E") if are_two_sorts else ("",)):
            made = {}
            for (block, siblings), runs in zip(blocks.items(), alike, strict=True):
                usual = siblings[(runs[sort] if are_two_sorts else max(runs, key=len))[0]]
                count = (max(siblings) + 1) // (2 if are_two_sorts else 1)
                made[block] = Block(count, full_precision(usual, likely))
            yield _stack(template, "one by one", made, ids)


def _stacked(shapes: Mapping[str, Shape], likely: Collection[int], counts: Collection[int]) -> Iterator[Stack]:
    """Tensors that lie side by side and have one more axis, or experts below each other in the first."""
    parents: dict[str, dict[str, Shape]] = {}
    for name, shape in full_precision(shapes, likely).items():
        parent = re.sub(r"\.(weight|bias)$", "", name).rpartition(".")[0]
        if parent:
            parents.setdefault(f"{parent}.", {})[name[len(parent) :]] = shape
    made: dict[tuple[str, str], dict[str, Block]] = {}
    for parent, tails in parents.items():
        stacks = {tail: shape for tail, shape in tails.items() if len(shape) == 3}
        template = template_of(parent)
        if any(len(shape) > 3 for shape in tails.values()):
            continue  # codes in groups: not the axes of a matrix
        if len(stacks) > 1:
            (count, _), *_ = Counter(shape[0] for shape in stacks.values()).most_common()
            words = tuple(tail.removesuffix(".weight") for tail, shape in stacks.items() if shape[0] == count)
            own = {t: s[1:] for t, s in tails.items() if s and s[0] == count and t.startswith(words)}
            made.setdefault((template, "stacked"), {})[parent] = Block(count, own)
        elif "expert" in template and not stacks:
            flat = {tail: shape for tail, shape in tails.items() if len(shape) == 2}
            count = max((n for n in counts if all(s[0] % n == 0 and s[0] > n for s in flat.values())), default=0)
            if flat and count:
                folded = {tail: (shape[0] // count, shape[1]) for tail, shape in flat.items()}
                made.setdefault((template, "folded"), {})[parent] = Block(count, folded)
    for (template, stored), blocks in made.items():
        yield _stack(template, stored, blocks)


def _stack(template: str, stored: str, blocks: Mapping[str, Block], ids: str = "") -> Stack:
    """A stack, with the words behind the last number of its names as stem, or behind the first word."""
    _, hole, behind = template.rpartition("{}.")
    stem = behind if hole else template.partition(".")[2]
    return Stack(stem, stored, {block.removesuffix(stem)[:-1]: held for block, held in blocks.items()}, ids)


def _evidence(stack: Stack, reading: Reading, shapes: Mapping[str, Shape], keys: Sequence[Key]) -> int:
    """How much says that a stack is experts: their names, a count in config.json, a router beside them."""
    if "share" in stack.stem:
        return 0  # shared experts are no routed ones
    block, held = next(iter(stack.blocks.items()))
    router = {held.experts, reading.hidden}
    return (
        8 * ("expert" in stack.stem)
        + 4 * ("moe" in stack.stem)
        + 2 * (held.experts in _values(keys, "E"))
        + any(set(s) == router and len(s) == 2 and n.startswith(f"{block}.") for n, s in shapes.items())
    )


def _merged(stacks: Sequence[Stack]) -> list[Stack]:
    """Stacks of the same names, such as those of main layers and of layers that predict further tokens, as one."""
    made: list[Stack] = []
    joined: list[dict[str, Block]] = []
    numbers: dict[tuple[str, str, frozenset[str], str], int] = {}
    for stack in sorted(stacks, key=lambda stack: len(stack.stem)):
        kind = stack.stored, stack.ids, frozenset(stack.matrices)
        words = stack.stem.split(".")
        ends = [(*kind, ".".join(words[at:])) for at in range(len(words))]
        shorter = [numbers[end] for end in ends if end in numbers]
        if not shorter:
            numbers[ends[0]] = len(made)
            made.append(stack)
            joined.append(dict(stack.blocks))
            continue
        number = min(shorter)
        more = stack.stem[: len(stack.stem) - len(made[number].stem)]
        joined[number] |= {f"{block}.{more}".rstrip("."): held for block, held in stack.blocks.items()}
    return [stack._replace(blocks=blocks) for stack, blocks in zip(made, joined, strict=True)]


# What each matrix may be


def _usual(tail: str) -> str:
    word = re.sub(r"[._]weight$", "", tail).rpartition(".")[2].lower()
    return next((role for role, p in _USUAL.items() if re.search(rf"(?<![a-z0-9])({p})s?(?![a-z0-9])", word)), "")


def _readings(stack: Stack, keys: Sequence[Key]) -> list[Reading]:
    """Everything that names and shapes of an expert's two or three matrices allow; usual names rule others out."""
    matrices = stack.matrices
    if len(matrices) not in (2, 3):
        return []
    every: list[tuple[bool, bool, Reading]] = []  # not all in one orientation; against usual names
    for roles in (("gate", "up", "down"),) if len(matrices) == 3 else (("gate_up", "down"), ("up", "down")):
        for order in permutations(roles):
            is_usual = all(_may_be(_usual(tail), role, len(roles)) for tail, role in zip(matrices, order, strict=True))
            for flips in product((False, True), repeat=len(order)):
                reading = _reading(matrices, order, flips)
                if reading:
                    every.append((len(set(flips)) > 1, not is_usual, reading))
    if any(reading.hidden in _values(keys, "H") for *_, reading in every):
        every = [item for item in every if item[2].hidden in _values(keys, "H")]
    best = min((item[:2] for item in every), default=(True, True))
    if all(best):
        return []
    orders = [reading.order for *why, reading in every if (*why,) == best]
    kept = [reading for _, unusual, reading in every if unusual == best[1] and reading.order in orders]
    if stack.stored == "one by one":  # matrices of a linear layer, [out, in] unless sizes say otherwise
        fewest = min(reading.flips for reading in kept)
        kept = [reading for reading in kept if reading.flips == fewest]
    kept.sort(key=lambda reading: reading.flips)
    if "gate_up" in kept[0].order:
        kept = [reading._replace(is_interleaved=joined) for reading in kept for joined in (False, True)]
    return kept


def _may_be(usual: str, role: str, count: int) -> bool:
    if role == "down" or usual == "down":
        return role == "down" and usual in ("down", "")
    return usual in (role, "in", "") or count == 2


def _reading(matrices: Mapping[str, Shape], roles: Sequence[str], flips: Sequence[bool]) -> Reading | None:
    out_in = [shape[::-1] if flip else shape for shape, flip in zip(matrices.values(), flips, strict=True)]
    hidden, inner = out_in[roles.index("down")]
    if min(hidden, inner) < 2:
        return None
    wanted = {"down": (hidden, inner), "gate_up": (2 * inner, hidden)}
    if any(shape != wanted.get(role, (inner, hidden)) for role, shape in zip(roles, out_in, strict=True)):
        return None
    return Reading(dict(zip(matrices, zip(roles, flips, strict=True), strict=True)), inner, hidden)


def find_experts(
    shapes: Mapping[str, Shape], keys: Sequence[Key]
) -> tuple[list[tuple[Stack, list[Reading]]], list[Stack]]:
    """Stacks of experts, those with most weights first, with all that their matrices may be; and what is like them.

    Args:
        shapes: the tensors as they are stored.
        keys: what config.json says.
    """
    likely = {value for key in keys for value in key.values}
    found = _likely(_one_by_one(shapes, likely), shapes, keys)
    own = tuple(f"{block}.{stack.stem}" for stack, *_ in found for block in stack.blocks)
    rest = {name: shape for name, shape in shapes.items() if not name.startswith(own)}
    found += _likely(_stacked(rest, likely, _values(keys, "E")), shapes, keys)
    found.sort(key=lambda item: -item[0].weights)
    if not any("expert" in stack.stem for stack, *_ in found):
        return [(stack, readings) for stack, readings, _ in found], []
    # Beside experts that are called so, a number or a router alone says too little of others.
    taken = [item[:2] for item in found if item[2] > (3 if item[0].stored == "one by one" else 1)]
    return taken, [stack for stack, readings, _ in found if (stack, readings) not in taken]


def _likely(
    stacks: Iterator[Stack], shapes: Mapping[str, Shape], keys: Sequence[Key]
) -> list[tuple[Stack, list[Reading], int]]:
    """Stacks that can be read and that something says are experts, and how much; of nested ones the likelier."""
    rated = [
        (stack, readings, evidence)
        for stack in _merged(list(stacks))
        if (readings := _readings(stack, keys)) and (evidence := _evidence(stack, readings[0], shapes, keys))
    ]
    kept: list[tuple[Stack, list[Reading], int]] = []
    for item in sorted(rated, key=lambda item: (-item[2], -len(item[0].stem), -len(item[0].blocks))):
        if not any(_is_nested(item[0], other) or _is_nested(other, item[0]) for other, *_ in kept):
            kept.append(item)
    return kept


def _is_nested(inner: Stack, outer: Stack) -> bool:
    """Whether tensors of one stack stand below the numbers of another."""
    start = f"{next(iter(outer.blocks))}.{outer.stem}"
    return any(name != start and name.startswith(start) for name in (f"{b}.{inner.stem}" for b in inner.blocks))
