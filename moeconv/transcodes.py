"""From a matrix and its format to steps: where rows are read, where the rows of every part go."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import gcd, lcm, prod

from moeconv.checkpoint import Encoded, Inside, StoredTensor
from moeconv.formats import Decoder, GroupFp4, StoredPart
from moeconv.moves import as_rows, copy_of
from moeconv.shards import Places
from moeconv.steps import Content, Decode, Matrix, Part, Step, Transcode, rearrangement, steps_of
from moeconv.tensors import DTYPE_BITS, Shape, Spec
from moeconv.values import Value, matrix_shape, parts_of

#: Places for steps that are looked at and not run.
ANYWHERE: Places = defaultdict(lambda: (0, 0))


def value_steps(
    value: Value, places: Places, allow_nonfinite: bool, sharing: Sequence[Value] = (), is_sampled: bool = False
) -> Iterator[Step]:
    """The steps that make all tensors of a value.

    Args:
        value: what to make.
        places: of the target tensors.
        allow_nonfinite: NaN and infinities count as zero.
        sharing: all values that share a scale with it, itself included.
        is_sampled: its first rows are decoded again, to tell what encoding loses.
    """
    fill, fate, stored = value.fill, value.fate, value.source
    if stored is not None and fate.keeps == "bytes":
        for tensor in stored.parts.values():
            yield from steps_of(copy_of(tensor), places[tensor.spec.name])
        return
    if value.is_plain:
        yield from steps_of(fill, places[fill.target.name])
        return
    matrix = _matrix(value)
    targets = []
    for number, (spec, part) in enumerate(zip(value.specs, fate.parts, strict=True)):
        inside = value.inside[number] if value.inside else None
        place = places[inside.whole.name if inside else spec.name]
        if part is None:
            part = StoredPart("", spec.dtype, spec.shape, 1, values=1)
        if inside:
            targets.append(_within(_part(part, spec, *place), spec, inside))
        elif part.values:
            targets.append(_flat(part, spec, *place, fill.at, matrix.shape))
        elif part.rows:
            targets.append(_part(part, spec, *place))
        elif fill.at == 0:
            assert fate.format is not None
            yield Content(*place, fate.format.constant(part, fill.target.shape, fate.dtype))
    formats = [fate.format, *(other.fate.decoder for other in (*sharing, value))]
    multiple = lcm(*(made.row_multiple * _rows(made, matrix.shape[1]) for made in formats if made is not None))
    written = sum(part.nbytes(0, matrix.shape[0]) for part in targets)
    yield Transcode(
        matrix, fate.format and fate.format.bound(fill.target.shape, fate.dtype), tuple(targets), multiple,
        max(1, written // matrix.shape[0]), 0, matrix.shape[0], allow_nonfinite,
        tuple(_matrix(other) for other in sharing), fate.keeps == "codes", min(multiple, matrix.shape[0]) * is_sampled,
    )  # fmt: skip


def _rows(made: Decoder, columns: int) -> int:
    """Rows between two of which a block ends."""
    return made.block // gcd(made.block, columns)


def whole_scale(stored: Encoded, shape: Shape) -> tuple[Spec, int, int] | None:
    """Where the float32 lies that scales a whole matrix, where there is one: its tensor, file number, byte offset."""
    if not isinstance(stored.format, GroupFp4) or not stored.format.whole:
        return None
    part = next(part for part in _decode(stored, shape).parts if part.suffix == stored.format.whole)
    tensor = stored.parts[stored.format.whole]
    return tensor.inside.whole if tensor.inside else tensor.spec, part.file, part.offset


def _matrix(value: Value) -> Matrix:
    """What is encoded: a matrix, or all of a stack one behind the other."""
    fill, stored, shape = value.fill, value.source, matrix_shape(value.fill)
    if stored is not None:
        (move,) = fill.moves
        at = move.source_at + (move.route.run[0] if move.route.run else 0)
        return Matrix(fill.target.name, shape, value.fate.dtype, _decode(stored, shape, at), fill.target.dtype)
    if len(fill.block) > 2:
        fill = as_rows(fill)
    return Matrix(fill.target.name, shape, value.fate.dtype, rearrangement(fill, 0, 0), fill.target.dtype)


def _decode(stored: Encoded, shape: Shape, at: int = 0) -> Decode:
    """A stored matrix, or of a tensor whose values follow each other those from number `at` on."""
    parts = [
        _flat(part, tensor.spec, tensor.file, tensor.offset, at, shape) if part.values else _source(part, tensor)
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


def _flat(part: StoredPart, spec: Spec, file: int, offset: int, at: int, shape: Shape) -> Part:
    """Where the elements lie that stand for a matrix whose first value is number `at`."""
    item = DTYPE_BITS[spec.dtype] // 8
    size = -(-prod(shape) // part.values)
    begin = offset + at // part.values * item
    return Part(part.suffix, spec.dtype, file, begin, item, size, part.rows, values=part.values, columns=shape[1])


def _part(part: StoredPart, spec: Spec, file: int, offset: int) -> Part:
    if not spec.shape or (len(spec.shape) < 2 and part.rows != 1):
        return Part(part.suffix, spec.dtype, file, offset, spec.nbytes, 1, part.rows)
    if part.is_across:
        runs, size = spec.shape
        pitch = spec.nbytes // runs
        return Part(part.suffix, spec.dtype, file, offset, pitch // size, size, part.rows, pitch, runs)
    size = spec.shape[0]
    return Part(part.suffix, spec.dtype, file, offset, spec.nbytes // max(1, size), size, part.rows)
