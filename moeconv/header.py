"""The safetensors header, read with bounds and written with alignment.

A file is 8 bytes (length N of the header, little endian), N bytes of JSON, then the tensors' bytes:

    {"__metadata__": {...}, "NAME": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}

The reader here trusts nothing: a file may lie about any of it, and JSON with a repeated key is read by
most parsers without a word (the last one wins). What it accepts, the safetensors library accepts.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import accumulate
from math import prod
from operator import itemgetter
from typing import Any

from moeconv.errors import Problem
from moeconv.tensors import DTYPE_BITS, Shape, Spec, specs_of

#: The safetensors library refuses longer headers too (safetensors 0.8, MAX_HEADER_SIZE).
MAX_HEADER_BYTES = 100_000_000
#: Data starts at a multiple of this in small files, and in files of `LARGE_FILE_BYTES` or more.
#: Page caches hold aligned writes in large folios: 4 GB written at 256 KiB boundaries took 0.76 of the time.
DATA_ALIGNMENT = 4096
LARGE_DATA_ALIGNMENT = 256 << 10
LARGE_FILE_BYTES = 256 << 20
#: No JSON of a checkpoint is nested as deeply: config.json has about five levels.
MAX_DEPTH = 64
#: A name of a model has at most about 150 characters.
MAX_NAME_CHARS = 500
_FREE_BRACKETS = 100_000
_BYTES_A_BRACKET = 16
_MAX_USUAL_METADATA = 1_000_000
_MARKS = re.compile(rb'\\.|["\[\]{}]', re.DOTALL)
_DAMAGED = "The file is damaged or no safetensors file: download or write it again."


class HeaderError(ValueError):
    """A header that cannot be trusted; the text says why, without the file's name."""


class _RepeatedKeyError(ValueError):
    pass


def read_json(text: bytes, strings: Callable[[Any], int] | None = None) -> Any:
    """Parse JSON that must not repeat a key.

    Args:
        text: the JSON.
        strings: for JSON of a known form, the number of strings that it holds, -1 for another form. Text without
            escapes that has two quotes for each repeats no key, which is known several times as fast.

    Raises:
        HeaderError: not JSON, nested too deeply, with a repeated key, or with text that is not Unicode.
    """
    _check_brackets(text)
    try:
        decoded = text.decode("utf-8")
        if strings is not None and "\\" not in decoded:
            parsed = json.loads(decoded)
            if decoded.count('"') == 2 * strings(parsed):
                return parsed
        parsed = json.loads(decoded, object_pairs_hook=_unique)
        if "\\u" in decoded:  # an escape can spell half a character, which could not be written again
            json.dumps(parsed, ensure_ascii=False).encode()
        return parsed
    except _RepeatedKeyError as error:
        raise HeaderError(f"the key {str(error)!r} stands there twice") from None
    except UnicodeDecodeError:
        raise HeaderError("not UTF-8 text") from None
    except UnicodeEncodeError:
        raise HeaderError("text that is not Unicode") from None
    except RecursionError:
        raise HeaderError("JSON nested too deeply") from None
    except ValueError as error:
        raise HeaderError(f"not JSON: {error}") from None


def _check_brackets(text: bytes) -> None:
    """Refuse JSON that ends parsers by its depth, or takes thirty times its bytes as empty lists and objects.

    A tensor has three brackets and at least fifty bytes.

    Raises:
        HeaderError: such JSON.
    """
    if text.count(b"{") + text.count(b"[") <= MAX_DEPTH:
        return
    allowed = _FREE_BRACKETS + len(text) // _BYTES_A_BRACKET
    depth = seen = 0
    is_inside = False
    for found in _MARKS.finditer(text):
        mark = found[0]
        if mark == b'"':
            is_inside = not is_inside
        elif is_inside or len(mark) > 1:
            continue
        elif mark in b"{[":
            depth, seen = depth + 1, seen + 1
            if depth > MAX_DEPTH:
                raise HeaderError("JSON nested too deeply")
            if seen > allowed:
                raise HeaderError(f"{len(text):,} bytes of JSON hold more than {allowed:,} lists and objects")
        else:
            depth -= 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RepeatedKeyError(key[:200])
            seen.add(key)
    return result


def header_length(first8: bytes, file_nbytes: int) -> int:
    """Length of the JSON, checked against the file's size.

    Raises:
        HeaderError: impossible length.
    """
    (length,) = struct.unpack("<Q", first8)
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"the header claims {length:,} bytes; at most {MAX_HEADER_BYTES:,} are allowed")
    if length > file_nbytes - 8:
        raise HeaderError(f"the header claims {length:,} bytes; the file has {file_nbytes:,}")
    return int(length)


def parse_header(text: bytes, data_nbytes: int) -> tuple[dict[str, str], list[tuple[Spec, int]]]:
    """Metadata, and each tensor with the offset of its bytes in the data part.

    Args:
        text: the JSON.
        data_nbytes: bytes behind it in the file.

    Raises:
        HeaderError: naming the first tensor that is wrong.
    """
    if not text.startswith(b"{"):
        raise HeaderError("the header does not begin with {")
    usual = _usual_header(text, data_nbytes)
    if usual is not None:
        return usual
    parsed = read_json(text)
    metadata = parsed.pop("__metadata__", {})
    if not _is_text_to_text(metadata):
        raise HeaderError("__metadata__ is not a mapping of text to text")
    known: dict[tuple[str, Shape], int] = {}
    placed = [_entry(name, entry, known) for name, entry in parsed.items()]
    placed.sort(key=_BY_PLACE)
    at = 0
    for begin, end, spec in placed:
        if begin != at:
            what = "overlaps the tensor before it" if begin < at else f"leaves a hole of {begin - at:,} bytes before it"
            raise HeaderError(f"{spec.name!r} at data offset {begin:,} {what}")
        at = end
    if at != data_nbytes:
        what = "the file is truncated" if at > data_nbytes else "bytes follow that belong to no tensor"
        raise HeaderError(f"the tensors take {at:,} bytes and the file holds {data_nbytes:,}: {what}")
    return metadata, [(spec, begin) for begin, _, spec in placed]


def _usual_header(text: bytes, data_nbytes: int) -> tuple[dict[str, str], list[tuple[Spec, int]]] | None:
    """What `parse_header` gives for a sound header as writers of safetensors spell it; None for any other.

    Those put metadata first, then tensors in the order of their bytes, need no escapes, and have ten quotes a tensor.
    Taken apart at the quotes, whole columns are compared at once, in a quarter of the time that JSON and checks of
    each entry take.
    """
    if b"\\" in text or not text.isascii():
        return None
    decoded = text.decode().rstrip(" ")
    metadata: Any = {}
    begin = decoded.find("{", 1)
    if decoded[:begin] in ('{"__metadata__":', '{"__metadata__": '):
        try:
            metadata, end = _UNIQUE.raw_decode(decoded[: begin + _MAX_USUAL_METADATA], begin)
        except (ValueError, RecursionError):
            return None
        decoded = "{" + decoded[end:].removeprefix(",").removeprefix(" ") if decoded[end : end + 1] == "," else ""
    pieces = decoded.split('"')
    if len(pieces) < 11 or len(pieces) % 10 != 1:
        return None
    colon, comma = (": ", ", ") if pieces[2:3] == [": {"] else (":", ",")
    names, dtypes, sizes = pieces[1::10], pieces[5::10], pieces[8::10]
    try:
        kinds = {kind: _kind(*kind, colon, comma) for kind in set(zip(dtypes, sizes, strict=True))}
    except ValueError:
        return None
    found = [kinds[kind] for kind in zip(dtypes, sizes, strict=True)]
    ends = list(accumulate([nbytes for _, _, nbytes in found]))
    begins = [0, *ends[:-1]]
    offsets = [f"{colon}[{begin}{comma}{end}]}}{comma}" for begin, end in zip(begins, ends, strict=True)]
    is_sound = (
        _is_text_to_text(metadata)
        and pieces[0] == "{"
        and all(set(pieces[at::10]) == {word} for at, word in ((2, colon + "{"), (3, "dtype"), (4, colon)))
        and all(set(pieces[at::10]) == {word} for at, word in ((6, comma), (7, "shape"), (9, "data_offsets")))
        and pieces[10:-1:10] == offsets[:-1]
        and pieces[-1] == offsets[-1].removesuffix(comma) + "}"
        and ends[-1] == data_nbytes
        and len({*names, "", "__metadata__"}) == len(names) + 2
        and (joined := "".join(names)).isprintable()
        and "{}" not in joined
        and max(map(len, names)) <= MAX_NAME_CHARS
    )
    if not is_sound:
        return None
    specs = specs_of(names, [dtype for dtype, _, _ in found], [shape for _, shape, _ in found])
    return metadata, list(zip(specs, begins, strict=True))


def _kind(dtype: str, sizes: str, colon: str, comma: str) -> tuple[str, Shape, int]:
    """Dtype, shape and bytes of tensors whose sizes are written so.

    Raises:
        ValueError: not as `_usual_header` wants them.
    """
    shape = tuple(int(size) for size in sizes[len(colon) + 1 : -len(comma) - 1].split(comma) if size)
    usual = f"{colon}[{comma.join(map(str, shape))}]{comma}"
    if dtype not in DTYPE_BITS or sizes != usual or not _are_sizes(list(shape)):
        raise HeaderError(sizes)
    return dtype, shape, _nbytes("", dtype, shape)


def _is_text_to_text(metadata: Any) -> bool:
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def _entry(name: str, entry: Any, known: dict[tuple[str, Shape], int]) -> tuple[int, int, Spec]:
    """Begin, end and spec of a tensor. `known` has the bytes of dtypes and shapes that were checked before."""
    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        raise HeaderError(f"{name[:200]!r} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise HeaderError(f"{name[:200]!r} has the unknown dtype {str(dtype)[:50]!r}; known: {', '.join(DTYPE_BITS)}")
    if not _are_sizes(shape):
        raise HeaderError(f"{name[:200]!r} has the shape {str(shape)[:100]}; sizes are whole numbers from 0 to 2^63")
    if (
        type(offsets) is not list
        or list(map(type, offsets)) != _TWO_INTEGERS
        or not 0 <= offsets[0] <= offsets[1] < _END
    ):
        raise HeaderError(
            f"{name[:200]!r} has the data_offsets {str(offsets)[:100]}; two whole numbers are needed, begin and end"
        )
    kind = dtype, tuple(shape)
    nbytes = known.get(kind)
    if nbytes is None:
        nbytes = known[kind] = _nbytes(name, *kind)
    if offsets[1] - offsets[0] != nbytes:
        raise HeaderError(
            f"{name[:200]!r} {dtype} {shape} needs {nbytes:,} bytes; data_offsets give {offsets[1] - offsets[0]:,}"
        )
    if not name or not name.isprintable():
        raise HeaderError(f"the tensor name {name[:200]!r} has control characters")
    if len(name) > MAX_NAME_CHARS or "{}" in name:
        why = (
            "has {} in it, which stands for numbers here"
            if len(name) <= MAX_NAME_CHARS
            else f"has {len(name):,} letters"
        )
        raise HeaderError(f"the tensor name {name[:200]!r} {why}")
    return offsets[0], offsets[1], Spec(name, *kind)


_UNIQUE = json.JSONDecoder(object_pairs_hook=_unique)
_ENTRY = {"dtype", "shape", "data_offsets"}
_TWO_INTEGERS = [int, int]
_BY_PLACE = itemgetter(0, 1)
_END = 1 << 63


def _nbytes(name: str, dtype: str, shape: Shape) -> int:
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or prod(size or 1 for size in shape) * DTYPE_BITS[dtype] >> 64:  # the library counts bits in 64 bits
        raise HeaderError(f"{name[:200]!r} {dtype} {list(shape)} has no possible size in bytes")
    return bits // 8


def _are_sizes(values: Any) -> bool:
    if type(values) is not list or len(values) > 32:
        return False
    for value in values:  # noqa: SIM110, all() takes twice as long and this runs for every tensor
        if type(value) is not int or not 0 <= value < _END:
            return False
    return True


def header_problem(path: str, error: HeaderError) -> Problem:
    """The problem to show for a file with a bad header."""
    return Problem(f"{path}: {error}", _DAMAGED)


def build_header(specs: Iterable[Spec], metadata: Mapping[str, str]) -> tuple[bytes, list[int], int]:
    """The head of a file that holds `specs` in this order, the tensors' offsets in the file, and the file's size.

    The JSON is padded with spaces so that data starts at an aligned place (see `DATA_ALIGNMENT`).
    """
    entries = (
        [f'"__metadata__":{json.dumps(dict(metadata), separators=(",", ":"), ensure_ascii=False)}'] if metadata else []
    )
    at = 0
    starts: list[int] = []
    for name, dtype, shape in specs:
        nbytes, kind = _kind_text(dtype, shape)
        starts.append(at)
        text = json.dumps(name, ensure_ascii=False) if '"' in name or "\\" in name else f'"{name}"'
        entries.append(f"{text}{kind}{at},{(at := at + nbytes)}]}}")
    content = f"{{{','.join(entries)}}}".encode()
    content += b" " * (-(8 + len(content)) % (LARGE_DATA_ALIGNMENT if at >= LARGE_FILE_BYTES else DATA_ALIGNMENT))
    head = struct.pack("<Q", len(content)) + content
    return head, [len(head) + start for start in starts], len(head) + at


@cache
def _kind_text(dtype: str, shape: Shape) -> tuple[int, str]:
    """Bytes of a tensor, and what stands between its name and its offsets."""
    sizes = ",".join(map(str, shape))
    return Spec("", dtype, shape).nbytes, f':{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":['


def stored_nbytes(specs: Iterable[Spec]) -> int:
    """More bytes than tensors and their entries take in a file, whatever their places and letters."""
    return sum([_stored_nbytes(dtype, shape) + 4 * len(name) for name, dtype, shape in specs])


@cache
def _stored_nbytes(dtype: str, shape: Shape) -> int:
    return Spec("", dtype, shape).nbytes + 100 + 21 * len(shape)


def head_nbytes(metadata: Mapping[str, str], file_nbytes: int) -> int:
    """The most bytes of a head without its tensors, in a file of at most so many bytes."""
    alignment = LARGE_DATA_ALIGNMENT if file_nbytes >= LARGE_FILE_BYTES else DATA_ALIGNMENT
    return 8 + len(json.dumps({"__metadata__": metadata}, ensure_ascii=False).encode()) + alignment


def in_file_order(specs: Sequence[Spec]) -> list[Spec]:
    """Specs as they must follow each other in a file: wider dtypes first, so that every tensor is aligned.

    Within a dtype, tensors whose sizes are multiples of a larger power of two come first, so that one odd
    small tensor does not move all that follow off the page boundaries.
    """
    return sorted(specs, key=lambda spec: _order(spec.dtype, spec.shape))


@cache  # a model has few shapes
def _order(dtype: str, shape: Shape) -> tuple[int, int]:
    """Bits of an element and the largest power of two that divides the size, up to an alignment; both descending."""
    nbytes = Spec("", dtype, shape).nbytes
    return -DTYPE_BITS[dtype], -(min(nbytes & -nbytes, LARGE_DATA_ALIGNMENT) or LARGE_DATA_ALIGNMENT)
