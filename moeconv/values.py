"""What becomes of each tensor of a quantization: its format, the tensors it is written to, and why.

A model has some hundred thousand matrices of few kinds. What is the same for all of a kind is one `Fate`, decided once,
and what is asked of all matrices is asked of fates (`alike`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from math import prod
from typing import NamedTuple

from moeconv.checkpoint import Encoded, Inside
from moeconv.formats import FLOATS, Decoder, Format, StoredPart
from moeconv.moves import Fill, is_woven
from moeconv.scheme import Decision
from moeconv.tensors import Shape, Spec

WEIGHT = ".weight"


class Fate(NamedTuple):
    """What becomes of all matrices, or other tensors, of one kind.

    Attributes:
        format: what they are encoded in; None for as they are, or decoded.
        decoder: the format in which they are stored; None for full precision.
        why: one phrase.
        dtype: in which they go to their encoder, or are written.
        keeps: `bytes` where the source's tensors are copied, `runs` where what stands for the matrix is copied from
            one tensor into another, `codes` where values are taken, not decoded.
        parts: what the tensors that they become are to the format; None for a plain tensor.
        nbytes: of one in full precision, or of what is copied.
        is_expert: they are matrices of experts, or stacks of such.
        is_piece: each is one of several pieces of a target tensor.
    """

    format: Format | None
    decoder: Decoder | None
    why: str
    dtype: str
    keeps: str
    parts: tuple[StoredPart | None, ...]
    nbytes: int
    is_expert: bool
    is_piece: bool


class Value(NamedTuple):
    """One target of a quantization: a fill, and what it is written as.

    Attributes:
        fill: the matrix or other tensor in full precision, or as stored where it is copied.
        fate: see `Fate`.
        specs: the tensors it becomes, in the order of `Fate.parts`.
        inside: where each part lies in a tensor that holds those of several matrices; empty where it has its own.
    """

    fill: Fill
    fate: Fate
    specs: tuple[Spec, ...]
    inside: tuple[Inside, ...] = ()

    @property
    def format(self) -> Format | None:
        """What it is encoded in; None for as it is, or decoded."""
        return self.fate.format

    @property
    def targets(self) -> tuple[Spec, ...]:
        """The tensors that it is written to."""
        return tuple([inside.whole for inside in self.inside]) if self.inside else self.specs

    @property
    def source(self) -> Encoded | None:
        """How the source stores it, where that is quantized, row by row."""
        return None if is_woven(self.fill) else _origin(self.fill)

    @property
    def is_plain(self) -> bool:
        """Its bytes are moved and not changed."""
        return self.fate.format is None and self.fate.decoder is None


#: Values with one fate.
Kind = Sequence[Value]


class Fates:
    """Makes values, with one fate for all that are of one kind.

    Args:
        dtype: float32 matrices are rounded to this dtype before they are encoded; None to take them as they are.
        allow_nonfinite: NaN and infinities count as zero, which codes that are kept cannot be made to.
    """

    def __init__(self, dtype: str | None, allow_nonfinite: bool) -> None:
        self._dtype = dtype
        self._allow_nonfinite = allow_nonfinite
        self._known: dict[tuple[object, ...], Fate] = {}

    def dtype(self, dtype: str) -> str:
        """The dtype in which a matrix goes to its encoder."""
        return self._dtype if self._dtype is not None and dtype == "F32" else dtype

    def value(
        self, fill: Fill, decision: Decision, *, is_expert: bool, is_torn: bool = False, keeps: str | None = None
    ) -> Value:  # fmt: skip
        """What becomes of a fill.

        Args:
            fill: the matrix or other tensor.
            decision: its format.
            is_expert: it is a part of an expert.
            is_torn: what is stored is of no use to engines, though it may be of the right format (`fused`).
            keeps: what is kept of a quantized one (`Fate.keeps`), where that is decided already.
        """
        name, dtype, shape = spec = fill.target
        origin, woven = _origin(fill), is_woven(fill)
        stored = None if woven else origin
        how = None if origin is None else (id(origin.format), woven, *origin.parts)
        is_layer = name.endswith(WEIGHT)
        key = (dtype, shape, fill.block, id(decision.format), decision.why, how, is_layer, is_expert, is_torn, keeps)
        fate = self._known.get(key)
        if fate is None:
            fate = self._known[key] = self._fate(fill, decision, origin, is_expert, is_torn or woven, keeps)
        if fate.format is None:
            return Value(fill, fate, (spec,))
        if fate.keeps == "bytes" and stored is not None:
            return Value(fill, fate, tuple([tensor.spec for tensor in stored.parts.values()]))
        if not is_layer:
            return Value(
                fill, fate, tuple([Spec(part_name(name, p.suffix), p.dtype, p.shape) for p in fate.parts if p])
            )
        head = name.removesuffix("weight")
        return Value(fill, fate, tuple([Spec(head + p.suffix, p.dtype, p.shape) for p in fate.parts if p]))

    def _fate(
        self, fill: Fill, decision: Decision, stored: Encoded | None, is_expert: bool, is_torn: bool, keeps: str | None
    ) -> Fate:  # fmt: skip
        spec, made = fill.target, decision.format
        dtype = self.dtype(spec.dtype)
        if keeps is None:
            keeps = "" if is_torn else kept(stored, made, dtype)
        if keeps == "codes" and self._allow_nonfinite:
            keeps = ""
        why = decision.why
        parts: tuple[StoredPart | None, ...] = (None,)
        if made is None:
            why = why if stored is None else f"decoded from {stored.format.name}"
        elif stored is not None and keeps == "bytes":
            why, parts = f"{made.name} already; copied byte for byte", (None,) * len(stored.parts)
        else:
            why = f"{stored.format.name} with the same codes" if stored is not None and keeps == "codes" else why
            parts = parts_of(made, spec.shape, dtype)
        return Fate(
            made, stored.format if stored is not None else None, why, dtype, keeps, parts,
            spec._replace(shape=fill.block).nbytes, is_expert and (is_matrix(spec) or is_stack(spec)),
            fill.block != spec.shape,
        )  # fmt: skip


def _origin(fill: Fill) -> Encoded | None:
    """How the source stores the first of what fills it, where that is quantized."""
    return fill.moves[0].source.encoded if fill.moves else None


def alike(values: Iterable[Value]) -> list[list[Value]]:
    """Values with one fate together."""
    groups: dict[int, list[Value]] = {}
    for value in values:
        groups.setdefault(id(value.fate), []).append(value)
    return list(groups.values())


def targets_together(values: Sequence[Value], kinds: Sequence[Kind]) -> list[tuple[Spec, ...]]:
    """Target tensors that go into one file together, each once also where several matrices lie in it."""
    if any(kind[0].fate.is_piece or any(value.inside for value in kind) for kind in kinds):
        return list(dict.fromkeys(value.targets for value in values))
    return [value.specs for value in values]


def nbytes_of(kinds: Iterable[Sequence[Value]]) -> int:
    """Bytes in full precision of values that `alike` has put together."""
    return sum(kind[0].fate.nbytes * len(kind) for kind in kinds)


def matrix_shape(fill: Fill) -> tuple[int, int]:
    """Rows and columns of what is encoded or decoded: a matrix, or all of a stack one behind the other."""
    return prod(fill.block[:-1]), fill.block[-1]


def part_name(name: str, suffix: str) -> str:
    """The name of a part of a matrix: beside `X.weight` or, where that is a parameter `NAME`, behind it.

    `suffix` is that of a matrix of its own, such as `weight_scale` or `weight.absmax`.
    """
    if name.endswith(WEIGHT):
        return name.removesuffix("weight") + suffix
    return name + suffix.removeprefix("weight")


def is_layer(spec: Spec) -> bool:
    """A tensor that engines may hold in a linear layer."""
    return len(spec.shape) == 2 and spec.name.endswith(WEIGHT)


def is_matrix(spec: Spec) -> bool:
    """One that can be quantized."""
    return is_layer(spec) and spec.dtype in FLOATS


def is_stack(spec: Spec) -> bool:
    """Several matrices in one tensor."""
    return len(spec.shape) == 3 and spec.dtype in FLOATS


def is_same(one: Decoder | None, other: Decoder | None) -> bool:
    """Readers are told the same of both, and find the same names; how scales were chosen does not matter to them."""
    if one is other:
        return True
    if type(one) is not type(other) or not isinstance(one, Format) or not isinstance(other, Format):
        return False
    return one.settings() == other.settings() and _names(one) == _names(other)


def kept(stored: Encoded | None, made: Format | None, dtype: str) -> str:
    """What of a stored matrix can be kept in a format, as `Fate.keeps` has it."""
    if stored is None or made is None:
        return ""
    if is_same(stored.format, made) and not made.layout_recipe:
        return "bytes"
    return "codes" if made.takes(stored.format, dtype) else ""


@cache
def _names(made: Decoder) -> tuple[str, ...]:
    return tuple(part.suffix for part in made.parts((1 << 10, 1 << 10), "BF16"))


@cache  # a model has few shapes
def parts_of(made: Decoder, shape: Shape, dtype: str) -> tuple[StoredPart, ...]:
    """The tensors that a matrix becomes."""
    return made.parts(shape, dtype)
