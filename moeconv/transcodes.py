"""From a matrix and its format to steps: where rows are read, where the rows of every part go."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import lcm, prod

from moeconv.checkpoint import Encoded, Inside, StoredTensor
from moeconv.formats import GroupFp4, StoredPart
from moeconv.moves import copy_of
from moeconv.shards import Places
from moeconv.steps import Content, Decode, Matrix, Part, Rearrange, Step, Transcode, rearrangement, steps_of
from moeconv.tensors import DTYPE_BITS, Shape, Spec
from moeconv.values import Value, parts_of

#: Places for steps that are looked at and not run.
ANYWHERE: Places = defaultdict(lambda: (0, 0))


def value_steps(value: Value, places: Places, allow_nonfinite: bool, sharing: Sequence[Value] = ()) -> Iterator[Step]:
    """The steps that make all tensors of a value.

    Args:
        value: what to make.
        places: of the target tensors.
        allow_nonfinite: NaN and infinities count as zero.
        sharing: all values that share a scale with it, itself included.
    """
    fill, fate, stored = value.fill, value.fate, value.source
    if stored is not None and fate.keeps == "bytes":
        for tensor in stored.parts.values():
            yield from steps_of(copy_of(tensor), places[tensor.spec.name])
        return
    if value.is_plain:
        yield from steps_of(fill, places[fill.target.name])
        return
    shape = fill.target.shape
    targets = []
    for number, (spec, part) in enumerate(zip(value.specs, fate.parts, strict=True)):
        inside = value.inside[number] if value.inside else None
        place = places[inside.whole.name if inside else spec.name]
        if inside and part:
            targets.append(_within(_part(part, spec, *place), spec, inside))
        elif part is None:
            targets.append(_part(StoredPart("", spec.dtype, shape, 1), spec, *place))
        elif part.rows:
            targets.append(_part(part, spec, *place))
        else:
            assert fate.format is not None
            yield Content(*place, fate.format.constant(part, shape))
    read = [decoder.row_multiple for other in (*sharing, value) if (decoder := other.fate.decoder) is not None]
    multiple = lcm(fate.format.row_multiple if fate.format is not None else 1, *read)
    written = sum(spec.nbytes for spec in value.specs)
    yield Transcode(
        _matrix(value), fate.format, tuple(targets), multiple, max(1, written // shape[0]), 0, shape[0],
        allow_nonfinite, tuple(_matrix(other) for other in sharing), fate.keeps == "codes",
    )  # fmt: skip


def whole_scale(stored: Encoded, shape: Shape) -> tuple[int, int] | None:
    """File number and byte offset of the float32 that scales a whole matrix, where there is one."""
    if not isinstance(stored.format, GroupFp4) or not stored.format.whole:
        return None
    part = next(part for part in _decode(stored, shape).parts if part.suffix == stored.format.whole)
    return part.file, part.offset


def _matrix(value: Value) -> Matrix:
    target, stored = value.fill.target, value.source
    read: Rearrange | Decode = rearrangement(value.fill, 0, 0) if stored is None else _decode(stored, target.shape)
    return Matrix(target.name, target.shape, value.fate.dtype, read, target.dtype)


def _decode(stored: Encoded, shape: Shape) -> Decode:
    parts = [
        _source(part, tensor)
        for part in parts_of(stored.format, shape, "BF16")
        if part.rows and (tensor := stored.parts.get(part.suffix)) is not None
    ]
    return Decode(stored.format, tuple(parts))


def _source(part: StoredPart, tensor: StoredTensor) -> Part:
    """Where rows of a part are read: one after another, or evenly spaced in a larger tensor."""
    spec = tensor.spec
    found = _part(part, spec, tensor.file, tensor.offset)
    return found if tensor.inside is None else _within(found, spec, tensor.inside)


def _within(part: Part, spec: Spec, inside: Inside) -> Part:
    """A part whose offset is that of the tensor in which it lies."""
    view, item = inside.view, DTYPE_BITS[spec.dtype] // 8
    if not view.axes:  # a number
        return part._replace(offset=part.offset + inside.at * item)
    stride = view.axes[0].step * prod(view.block[1:]) * item
    return part._replace(offset=part.offset + (inside.at + view.first) * item, stride=stride)


def _part(part: StoredPart, spec: Spec, file: int, offset: int) -> Part:
    if not spec.shape or (len(spec.shape) < 2 and part.rows != 1):
        return Part(part.suffix, spec.dtype, file, offset, spec.nbytes, 1, part.rows)
    if part.is_across:
        runs, size = spec.shape
        pitch = spec.nbytes // runs
        return Part(part.suffix, spec.dtype, file, offset, pitch // size, size, part.rows, pitch, runs)
    size = spec.shape[0]
    return Part(part.suffix, spec.dtype, file, offset, spec.nbytes // max(1, size), size, part.rows)
