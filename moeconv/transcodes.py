"""From a matrix and its format to steps: where rows are read, where the rows of every part go."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import lcm, prod

from moeconv.checkpoint import Encoded, Inside, StoredTensor
from moeconv.formats import Decoder, GroupFp4, StoredPart
from moeconv.moves import Fill, Move, Route, as_rows, copy_of, is_woven
from moeconv.shards import Places
from moeconv.steps import (
    Content,
    Copy,
    Decode,
    Matrix,
    Part,
    Rearrange,
    Step,
    Strand,
    Transcode,
    Woven,
    rearrangement,
    steps_of,
    whole_rows,
)
from moeconv.tensors import DTYPE_BITS, Axis, Shape, Spec, View
from moeconv.values import Fate, Value, matrix_shape, parts_of

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
    if stored is not None and fate.keeps == "runs":
        yield from _runs(value, stored, places)
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
    formats = [fate.format, *(other.fate.decoder for other in (*sharing, value) if not is_woven(other.fill))]
    multiple = lcm(*(made.row_multiple * whole_rows(made, matrix.shape[1]) for made in formats if made is not None))
    written = sum(part.nbytes(0, matrix.shape[0]) for part in targets)
    yield Transcode(
        matrix, fate.format and fate.format.bound(fill.target.shape, fate.dtype), tuple(targets), multiple,
        max(1, written // matrix.shape[0]), 0, matrix.shape[0], allow_nonfinite,
        tuple(_matrix(other) for other in sharing), fate.keeps == "codes", min(multiple, matrix.shape[0]) * is_sampled,
    )  # fmt: skip


def _runs(value: Value, stored: Encoded, places: Places) -> Iterator[Step]:
    """Copies of the codes and scales that stand for a matrix, and once for a tensor what is said of the whole of it."""
    fill, made = value.fill, value.fate.format
    (move,) = fill.moves
    assert made is not None
    assert move.route.run is not None
    at, shape = move.source_at + move.route.run[0], matrix_shape(fill)
    for spec, part in zip(value.specs, value.fate.parts, strict=True):
        assert part is not None
        file, offset = places[spec.name]
        if part.values:
            tensor = stored.parts[part.suffix]
            origin = _flat(part, tensor.spec, tensor.file, tensor.offset, at, shape)
            goal = _flat(part, spec, file, offset, fill.at, shape)
            yield Copy(origin.file, origin.offset, file, goal.offset, goal.size * goal.row_nbytes)
        elif fill.at == 0 and part.suffix in made.tables:
            tensor = stored.parts[part.suffix]
            yield Copy(tensor.file, tensor.offset, file, offset, spec.nbytes)
        elif fill.at == 0:
            yield Content(file, offset, made.constant(part, fill.target.shape, value.fate.dtype))


def stored_matrix(fill: Fill) -> Matrix:
    """What a fill is made from, to be read or decoded as it is; a vector is a matrix of one row."""
    if len(fill.block) == 1:
        moves = [move._replace(route=_as_row(move.route)) for move in fill.moves]
        fill = fill._replace(block=(1, *fill.block), moves=tuple(moves))
    stored = fill.moves[0].source.encoded
    return _matrix(Value(fill, Fate(None, stored and stored.format, "", "F32", "", (None,), 0, False, False), ()))


def _as_row(route: Route) -> Route:
    views = [
        View((1, *v.block), (1, *v.shape), (Axis(0, 0, 1), *(axis._replace(of=axis.of + 1) for axis in v.axes)))
        for v in (route.source, route.target)
    ]
    return Route.between(*views)


def rows_between_blocks(made: Decoder | None, columns: int) -> int:
    """Rows of a matrix of so many columns at multiples of which it can be cut."""
    return 1 if made is None else lcm(made.row_multiple, whole_rows(made, columns))


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
    whole = fill.target.shape
    expert_rows, at_row = (whole[1], fill.at // whole[2]) if len(whole) == 3 else (None, 0)
    if is_woven(fill):
        # Decoded to float16 nothing would tell what is too large for it from what is not finite in the source.
        dtype = "F32" if value.fate.dtype == "F16" else fill.target.dtype
        woven = Woven(shape, DTYPE_BITS[dtype] // 8, tuple(map(_strand, fill.moves)))
        return Matrix(fill.target.name, shape, value.fate.dtype, woven, dtype, expert_rows, at_row)
    if stored is not None:
        (move,) = fill.moves
        at = move.source_at + (move.route.run[0] if move.route.run else 0)
        source: Rearrange | Decode = _decode(stored, shape, at)
    else:
        source = rearrangement(as_rows(fill) if len(fill.block) > 2 else fill, 0, 0)
    return Matrix(fill.target.name, shape, value.fate.dtype, source, fill.target.dtype, expert_rows, at_row)


def _strand(move: Move) -> Strand:
    """A quantized matrix of which a fill takes rows and columns."""
    rows, columns = move.route.source.block
    assert move.source.encoded is not None
    decode = _decode(move.source.encoded, (rows, columns), move.source_at)
    return Strand(decode, (rows, columns), move.route.source, move.route.target)


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
