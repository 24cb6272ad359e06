import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeconv.dims import Dim, DimSyntaxError, parse_dim, parse_shape

SIZES = {"E": 8, "I": 96, "H": 640}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7), ("I", 96), ("2*I", 192), ("I*2", 192), ("E+2", 10), ("2+3*4", 14), ("(2+3)*4", 20), ("H/32", 20),
        ("H/I", None), ("ceil(H/I)", 7), ("ceil(I/128)", 1), ("2*ceil(I/64)", 4), ("E*2*I", 1536), ("H/2/5", 64),
        ("Z", None), ("2*Z", None), ("I/0", None), ("ceil(I/0)", None), (" E + I ", 104), ("((E))", 8),
    ],
)  # fmt: skip
def test_a_size_has_the_value_of_arithmetic(text: str, value: int | None) -> None:
    assert parse_dim(text).value(SIZES) == value


@pytest.mark.parametrize(
    "text",
    ["", " ", "2*", "*2", "e", "2I", "I I", "I-1", "I**2", "(I", "I)", "ceil(I)", "ceil I/2", "ceil(I/2", "1.5", "I%2",
     "{E}", "²", "(" * 150, "(" * 5000 + "I" + ")" * 5000, "9" * 5000, "I+" * 5000 + "I"],
)  # fmt: skip
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(DimSyntaxError):
        parse_dim(text)


@pytest.mark.parametrize("text", ["", "E", "[E", "E]", "[E,]", "[,E]", "[E I]", "(E, I)", "[[E]]"])
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(DimSyntaxError):
        parse_shape(text)


def test_a_shape_is_its_sizes() -> None:
    assert [dim.value(SIZES) for dim in parse_shape("[E, 2*I, ceil(H/128)]")] == [8, 192, 5]
    assert parse_shape("[]") == ()


SYMBOLS = st.sampled_from(["E", "I", "H"])
DIMS = st.recursive(
    st.one_of(SYMBOLS, st.integers(1, 9).map(str)),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "*", "/"]), inner).map(lambda parts: f"({''.join(parts)})"),
        st.tuples(inner, inner).map(lambda parts: f"ceil({parts[0]}/{parts[1]})"),
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(DIMS, st.fixed_dictionaries({name: st.integers(1, 500) for name in "EIH"}))
def test_solving_for_a_symbol_gives_back_its_value(text: str, sizes: dict[str, int]) -> None:
    dim = parse_dim(text)
    value = dim.value(sizes)
    assert parse_dim(str(dim)).value(sizes) == value  # as it is written, it is read
    for symbol in dim.symbols():
        known = {name: size for name, size in sizes.items() if name != symbol}
        solved = dim.solve(value, known) if value is not None else None
        if solved is not None:
            assert solved == (symbol, sizes[symbol])


def test_a_size_that_fits_no_whole_number_is_not_solved() -> None:
    assert parse_dim("2*I").solve(7, {}) is None
    assert parse_dim("2*I").solve(8, {}) == ("I", 4)
    assert parse_dim("E*I").solve(8, {}) is None
    assert parse_dim("H/32").solve(3, {}) == ("H", 96)
    assert isinstance(parse_dim("I"), Dim)
