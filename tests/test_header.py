import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from moeconv.header import HeaderError, _usual_header, build_header, in_file_order, parse_header
from moeconv.tensors import DTYPE_BITS, Spec
from tests.commands import refused_source, succeeds
from tests.folders import CONFIG, Tensor, experts_layout, pack_by_hand, read_folder, tensor, write_folder


def entry(begin: Any, end: Any, shape: Any, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def weight_file(header: dict[str, Any] | bytes, content: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def source_with(folder: Path, content: bytes) -> Path:
    source = write_folder(folder / "source", experts_layout(layers=1), CONFIG, 0)
    (source / "model.safetensors").write_bytes(content)
    return source


A = entry(0, 4, [4])
TWICE = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}'
TWO_DTYPES = b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}'
LIES = [
    pytest.param({"a": A, "b": entry(2, 6, [4])}, 6, "'b' at data offset 2 overlaps", id="overlap"),
    pytest.param({"a": A, "b": A}, 4, "'b' at data offset 0 overlaps", id="two tensors in one place"),
    pytest.param({"a": A, "b": entry(6, 10, [4])}, 10, "'b' at data offset 6 leaves a hole of 2 bytes", id="hole"),
    pytest.param({"a": entry(2, 6, [4])}, 6, "'a' at data offset 2 leaves a hole of 2 bytes", id="hole at the start"),
    pytest.param({"a": entry(-1, 3, [4])}, 4, "'a' has the data_offsets [-1, 3]", id="negative offset"),
    pytest.param({"a": entry(4, 0, [4])}, 4, "'a' has the data_offsets [4, 0]", id="offsets exchanged"),
    pytest.param({"a": entry(0, 4.0, [4])}, 4, "'a' has the data_offsets [0, 4.0]", id="offset with a fraction"),
    pytest.param({"a": entry(False, 4, [4])}, 4, "'a' has the data_offsets", id="offset that is a truth value"),
    pytest.param({"a": {**A, "data_offsets": [0, 2, 4]}}, 4, "'a' has the data_offsets", id="three offsets"),
    pytest.param({"a": {**A, "data_offsets": 4}}, 4, "'a' has the data_offsets 4", id="one offset"),
    pytest.param({"a": entry(0, 1 << 63, [1 << 62, 2])}, 4, "'a' has the data_offsets", id="offset beyond 63 bits"),
    pytest.param({"a": entry(0, 4, [5])}, 4, "'a' U8 [5] needs 5 bytes; data_offsets give 4", id="shape too large"),
    pytest.param({"a": entry(0, 4, [1 << 63])}, 4, "'a' has the shape", id="size beyond 63 bits"),
    pytest.param({"a": entry(0, 4, [-4])}, 4, "'a' has the shape [-4]", id="negative size"),
    pytest.param({"a": entry(0, 4, ["4"])}, 4, "'a' has the shape ['4']", id="size that is text"),
    pytest.param({"a": entry(0, 4, 4)}, 4, "'a' has the shape 4", id="shape that is a number"),
    pytest.param({"a": entry(0, 1, [1] * 33)}, 1, "'a' has the shape", id="33 axes"),
    pytest.param({"a": entry(0, 0, [1 << 32, 1 << 32])}, 0, "no possible size", id="size that is zero in 64 bits"),
    pytest.param({"a": entry(0, 8, [1 << 62, 1 << 62], "I64")}, 8, "no possible size", id="overflowing shape"),
    pytest.param({"a": entry(0, 1, [3], "F4")}, 1, "no possible size", id="half a byte"),
    pytest.param({"a": entry(0, 4, [4], "Q8")}, 4, "'a' has the unknown dtype 'Q8'; known: F64", id="unknown dtype"),
    pytest.param({"a": entry(0, 4, [4], None)}, 4, "'a' has the unknown dtype 'None'", id="no dtype"),
    pytest.param({"a": {"dtype": "U8", "shape": [4]}}, 4, "exactly dtype, shape and data_offsets", id="no offsets"),
    pytest.param({"a": {**A, "scale": 2}}, 4, "exactly dtype, shape and data_offsets", id="unknown key of a tensor"),
    pytest.param({"a": [0, 4]}, 4, "exactly dtype, shape and data_offsets", id="tensor that is a list"),
    pytest.param({"a\n  -> Run": A}, 4, r"'a\n  -> Run' has control characters", id="name that looks like a message"),
    pytest.param({"": A}, 4, "the tensor name ''", id="empty name"),
    pytest.param({"\ud800": A}, 4, "text that is not Unicode", id="name that is no text"),
    pytest.param({"a": A, "__metadata__": {"by": "\udfff"}}, 4, "not Unicode", id="metadata that is no text"),
    pytest.param({"a": A, "__metadata__": {"epoch": 3}}, 4, "__metadata__ is not a mapping of text", id="number there"),
    pytest.param({"a": A, "__metadata__": "pt"}, 4, "__metadata__ is not a mapping of text", id="metadata as text"),
    pytest.param({"a": A}, 3, "take 4 bytes and the file holds 3: the file is truncated", id="truncated"),
    pytest.param({"a": A}, 9, "take 4 bytes and the file holds 9: bytes follow", id="bytes behind the last tensor"),
    pytest.param({}, 1, "take 0 bytes and the file holds 1", id="bytes without a tensor"),
    pytest.param(TWICE, 8, "the key 'a' stands there twice", id="tensor named twice"),
    pytest.param(TWO_DTYPES, 4, "the key 'dtype' stands there twice", id="two dtypes"),
    pytest.param(b'{"__metadata__":{"a":"1","a":"2"}}', 0, "the key 'a' stands there twice", id="metadata twice"),
    pytest.param(b'[{"a": 1}]', 0, "does not begin with {", id="a list"),
    pytest.param(b' {"a": 1}', 0, "does not begin with {", id="space before the JSON"),
    pytest.param(b"{} {}", 0, "not JSON", id="two objects"),
    pytest.param(b'{"a": ', 0, "not JSON", id="JSON cut short"),
    pytest.param(b'{"\xff": 1}', 0, "not UTF-8 text", id="bytes that are no text"),
    pytest.param(b'{"a":' + b"[" * 99_999, 0, "JSON nested too deeply", id="nested deeply"),
    pytest.param(b'{"a":' + b"9" * 5000 + b"}", 0, "not JSON", id="a number of 5000 digits"),
]


@pytest.mark.parametrize(("header", "nbytes", "says"), LIES)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: dict[str, Any] | bytes, nbytes: int, says: str) -> None:
    source = source_with(tmp_path, weight_file(header, bytes(nbytes)))
    message = refused_source(source)
    assert f"{source / 'model.safetensors'}: " in message
    assert says in message


HTML = b"<!DOCTYPE html><html><body>404: not found</body></html>"
NO_WEIGHTS = [
    pytest.param(b"", "0 bytes are no safetensors file", id="empty file"),
    pytest.param(b"1234567", "7 bytes are no safetensors file", id="seven bytes"),
    pytest.param(bytes(8), "does not begin with {", id="header of no bytes"),
    pytest.param(bytes(100), "does not begin with {", id="zeros"),
    pytest.param(random.Random(1).randbytes(10_000), "the header claims", id="random bytes"),
    pytest.param(struct.pack("<Q", 1 << 62) + b"{}", f"the header claims {1 << 62:,} bytes", id="header of 2^62 bytes"),
    pytest.param(struct.pack("<Q", 90_000_000) + b"{}", "90,000,000 bytes; the file has 10", id="header too long"),
    pytest.param(HTML, "the header claims", id="a web page"),
]


@pytest.mark.parametrize(("content", "says"), NO_WEIGHTS)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    source = source_with(tmp_path, content)
    message = refused_source(source)
    assert f"{source / 'model.safetensors'}: " in message
    assert says in message


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    source = write_folder(tmp_path / "source", experts_layout(), CONFIG, 3)
    path = source / "model-00002-of-00003.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert str(path) in refused_source(source)


NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 8, 12, -1, 1 << 31, 1 << 32, 1 << 62, 1 << 63, 1 << 64, 1.0, True, None, "1"])
SOUND = st.lists(st.tuples(st.sampled_from(list(DTYPE_BITS)), st.lists(st.integers(0, 3), max_size=3)), max_size=4)


def placed(tensors: list[tuple[str, list[int]]]) -> tuple[dict[str, Any], int]:
    """A header without a lie, unless some tensor has no whole number of bytes."""
    at, header = 0, {}
    for number, (dtype, shape) in enumerate(tensors):
        nbytes = Spec("", dtype, tuple(shape)).nbytes
        header[f"t{number}"] = entry(at, at + nbytes, shape, dtype)
        at += nbytes
    return header, at


def accepted_by_the_library(content: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    try:
        read = deserialize(content)
    except (SafetensorError, OverflowError):
        return None
    return {name: (item["dtype"], list(item["shape"]), bytes(item["data"])) for name, item in read}


def agree(header: dict[str, Any], content: bytes) -> bool:
    """What moeconv accepts, the official library accepts, and both see the same tensors."""
    text = json.dumps(header).encode()
    try:
        _, tensors = parse_header(text, len(content))
    except HeaderError:
        return False
    ours = {spec.name: (spec.dtype, list(spec.shape), content[begin : begin + spec.nbytes]) for spec, begin in tensors}
    theirs = accepted_by_the_library(weight_file(text, content))
    assert theirs is not None
    assert {name: item[1:] for name, item in theirs.items()} == {name: item[1:] for name, item in ours.items()}
    return True


CHANGES = st.one_of(
    st.tuples(st.just("dtype"), st.sampled_from([*DTYPE_BITS, "F12", "bf16", None])),
    st.tuples(st.just("shape"), st.lists(NUMBERS, max_size=3)),
    st.tuples(st.just("data_offsets"), st.lists(NUMBERS, min_size=1, max_size=3)),
    st.tuples(st.sampled_from(["", "scale"]), NUMBERS),
)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(SOUND, st.lists(st.tuples(st.integers(0, 3), CHANGES), max_size=2), st.integers(-1, 1))
def test_whatever_is_accepted_the_safetensors_library_accepts_too(
    tensors: list[tuple[str, list[int]]], changes: list[tuple[int, tuple[str, Any]]], more: int
) -> None:
    header, nbytes = placed(tensors)
    for number, (key, value) in changes:
        header.setdefault(f"t{number}", {})[key] = value
    agree(header, bytes(max(0, nbytes + more)))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(SOUND)
def test_a_header_without_a_lie_is_read_as_the_library_reads_it(tensors: list[tuple[str, list[int]]]) -> None:
    header, nbytes = placed(tensors)
    content = bytes(range(256)) * (nbytes // 256 + 1)
    is_sound = all(Spec("", dtype, tuple(shape)).nbytes * 8 == _bits(dtype, shape) for dtype, shape in tensors)
    assert agree(header, content[:nbytes]) == is_sound


def _bits(dtype: str, shape: list[int]) -> int:
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
    return bits


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(SOUND, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_what_is_written_the_safetensors_library_reads(
    tensors: list[tuple[str, list[int]]], metadata: dict[str, str]
) -> None:
    specs = [
        Spec(f"t{number}", dtype, tuple(shape))
        for number, (dtype, shape) in enumerate(tensors)
        if _bits(dtype, shape) % 8 == 0
    ]
    ordered = in_file_order(specs)
    head, starts, nbytes = build_header(ordered, metadata)
    assert nbytes == len(head) + sum(spec.nbytes for spec in ordered)
    content = random.Random(0).randbytes(sum(spec.nbytes for spec in specs))
    read = accepted_by_the_library(head + content)
    assert read is not None
    assert read.keys() == {spec.name for spec in specs}
    for spec, start in zip(ordered, starts, strict=True):
        begin = start - len(head)
        assert read[spec.name][1:] == (list(spec.shape), content[begin : begin + spec.nbytes])


def test_every_tensor_is_aligned_to_its_elements() -> None:
    specs = [Spec(f"{dtype}{size}", dtype, (size,)) for dtype in DTYPE_BITS for size in (1, 3, 4, 64) if size % 4 == 0]
    random.Random(3).shuffle(specs)
    ordered = in_file_order(specs)
    head, starts, _ = build_header(ordered, {})
    assert len(head) % 4096 == 0
    assert not [s for s, at in zip(ordered, starts, strict=True) if at % max(1, DTYPE_BITS[s.dtype] // 8)]


def test_a_header_is_written_as_the_format_says() -> None:
    head, starts, _ = build_header([Spec("w", "BF16", (2, 3)), Spec("s", "U8", ())], {"format": "pt"})
    text = (
        b'{"__metadata__":{"format":"pt"},"w":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
        b'"s":{"dtype":"U8","shape":[],"data_offsets":[12,13]}}'
    )
    assert head == struct.pack("<Q", 4096 - 8) + text.ljust(4096 - 8)
    assert starts == [4096, 4108]


def test_scalars_and_empty_tensors_pass_through(tmp_path: Path) -> None:
    tensors = experts_layout(layers=1)
    tensors |= {"model.scale": tensor((), "F32"), "model.nothing": Tensor("BF16", (0, 5), b"")}
    source = write_folder(tmp_path / "source", tensors, CONFIG, 2)
    succeeds("pack", source, tmp_path / "target")
    assert read_folder(tmp_path / "target") == pack_by_hand(tensors)


SPELLINGS = st.sampled_from([(",", ":"), (", ", ": "), (",", ": "), (", ", ":"), (" ,", ":")])


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(
    SOUND,
    SPELLINGS,
    st.sampled_from([None, {}, {"format": "pt"}, {"a": '{"dtype":"U8"'}, {"ä": "\\"}, 5, {"a": 5}]),
    st.integers(0, 2),
    st.lists(
        st.tuples(st.integers(0, 400), st.sampled_from(["", '"', ",", " ", "0", "9", "{", "}", "]", "\n"])), max_size=2
    ),
)
def test_the_usual_spelling_is_read_as_any_other(
    tensors: list[tuple[str, list[int]]],
    spelling: tuple[str, str],
    metadata: Any,
    spaces: int,
    edits: list[tuple[int, str]],
) -> None:
    """Read column by column where that is possible, and entry by entry; edited at random places."""
    header, nbytes = placed(tensors)
    text = json.dumps({**({} if metadata is None else {"__metadata__": metadata}), **header}, separators=spelling)
    for at, character in edits:
        text = text[:at] + character + text[at + 1 :]
    encoded = (text + " " * spaces).encode()
    usual = _usual_header(encoded, nbytes)
    if usual is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moeconv.header._usual_header", lambda text, nbytes: None)
        assert parse_header(encoded, nbytes) == usual


def test_the_header_that_writers_of_safetensors_spell_takes_the_short_way() -> None:
    header, nbytes = placed([("BF16", [2, 3]), ("F32", []), ("U8", [0])])
    for separators in ((",", ":"), (", ", ": ")):
        for metadata in ({}, {"__metadata__": {"format": "pt"}}):
            text = json.dumps({**metadata, **header}, separators=separators).encode()
            assert _usual_header(text + b"  ", nbytes) is not None
            assert _usual_header(text, nbytes + 1) is None
