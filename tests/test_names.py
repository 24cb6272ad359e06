import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeconv.names import Pattern, PatternError, collapse, gaps, natural_key, ranges, template_of

EXPERT = "{block}.mlp.experts.{expert}.up_proj.weight"


@pytest.mark.parametrize(
    ("pattern", "name", "match"),
    [
        (EXPERT, "model.layers.3.mlp.experts.12.up_proj.weight", ("model.layers.3", 12)),
        (EXPERT, "a.mlp.experts.0.up_proj.weight", ("a", 0)),
        (EXPERT, "mlp.experts.0.up_proj.weight", None),
        (EXPERT, ".mlp.experts.0.up_proj.weight", None),
        (EXPERT, "a.mlp.experts.012.up_proj.weight", None),
        (EXPERT, "a.mlp.experts.+1.up_proj.weight", None),
        (EXPERT, "a.mlp.experts.1_0.up_proj.weight", None),
        (EXPERT, "a.mlp.experts.².up_proj.weight", None),
        (EXPERT, "a.mlp.experts.٣.up_proj.weight", None),
        (EXPERT, "a.mlp.experts..up_proj.weight", None),
        (EXPERT, "a.mlp.experts.1.up_proj.weight_scale", None),
        (EXPERT, "a.mlp.experts.1.x.up_proj.weight", None),
        (EXPERT, "a.xmlp.experts.1.up_proj.weight", None),
        (EXPERT, f"a.mlp.experts.{'9' * 30}.up_proj.weight", None),
        ("{block}.experts.down", "layer.1.experts.down", ("layer.1", 0)),
        ("{block}.experts.down", "experts.down", None),
        ("{block}.experts.down", "layer.experts.down.x", None),
        ("{block}.experts.down", "layerexperts.down", None),
        ("visual.{block}.{expert}.up", "visual.blocks.1.7.up", ("blocks.1", 7)),
        ("visual.{block}.{expert}.up", "blocks.1.7.up", None),
        ("visual.{block}.{expert}.up", "visual.7.up", None),
        ("visual.{block}.up", "a.visual.blocks.up", None),
        ("{block}.{expert}", "a.5", ("a", 5)),
        ("{block}.{expert}", "5", None),
    ],
)
def test_a_pattern_matches_names_of_its_kind_only(pattern: str, name: str, match: tuple[str, int] | None) -> None:
    assert Pattern.parse(pattern).match(name) == match


BLOCKS = st.lists(st.sampled_from(["model", "layers", "0", "17", "experts", "mlp"]), min_size=1, max_size=4)
MIDDLES = st.lists(st.sampled_from(["mlp", "experts", "0", "{expert}", "w"]), min_size=1, max_size=4).filter(
    lambda parts: parts.count("{expert}") < 2
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.sampled_from([[], ["visual"], ["a", "0"]]), BLOCKS, MIDDLES, st.integers(0, 10**6))
def test_what_a_pattern_fills_it_matches_and_back(
    lead: list[str], block: list[str], parts: list[str], expert: int
) -> None:
    pattern = Pattern.parse(".".join([*lead, "{block}", *parts]))
    name = pattern.fill(".".join(block), expert)
    match = pattern.match(name)
    assert match is not None
    assert match == (".".join(block), expert if "{expert}" in parts else 0)
    assert pattern.fill(*match) == name
    assert template_of(name).endswith(pattern.template_end)


@pytest.mark.parametrize(
    "text",
    [
        "mlp.experts", "{block}", "{block}.", "{block}.{layer}.x", "{block}.a{expert}.b", "{block}.{expert}b",
        "{block}.{expert}.{expert}", "{block}.a..b", "{block}.a b", "{block}.{expert:}x", "{block}.{expert:e}.x",
        "{block}.{expert:E..}.x", "{block}.{expert:E...F}.x", "{block}.{block}.x", "{block}.{.x", "{expert}.x",
        "x{block}.y", "x..{block}.y", ".{block}.y", "x y.{block}.z", "{expert}.{block}.x",
    ],
)  # fmt: skip
def test_what_is_no_pattern_is_refused_and_quoted(text: str) -> None:
    with pytest.raises(PatternError) as caught:
        Pattern.parse(text)
    assert repr(text) in str(caught.value)


def test_natural_order_counts() -> None:
    wanted = ["9", "10", "a", "a.02.b", "a.2", "a.2.b", "a.10.b", "a.b", "a9", "a10", "b.1"]
    assert sorted(wanted[5:] + wanted[:5], key=natural_key) == wanted


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.text("a.019²٣x", max_size=8), max_size=6, unique=True), st.randoms(use_true_random=False))
def test_natural_order_is_the_same_from_every_start(names: list[str], random: object) -> None:
    shuffled = list(names)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert sorted(names, key=natural_key) == sorted(shuffled, key=natural_key)


def _by_definition(name: str) -> list[list[tuple[int, int, str]]]:
    """Segments, each of numbers (by value, then as written) and of text, which comes behind numbers."""
    parts = [re.findall("[0-9]{1,18}|[^0-9]+", segment) for segment in name.split(".")]
    return [[(0, int(p), p) if p[0] in "0123456789" else (1, 0, p) for p in segment] for segment in parts]


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(st.lists(st.text("a.019²٣x-_ ", max_size=9) | st.text("a.01", min_size=15, max_size=40), max_size=8))
def test_natural_order_is_that_of_its_definition(names: list[str]) -> None:
    assert sorted(names, key=natural_key) == sorted(names, key=_by_definition)


def test_natural_order_bears_numbers_of_any_length() -> None:
    assert sorted(["9" * 6000, "1"], key=natural_key) == ["1", "9" * 6000]


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.sets(st.integers(0, 30)), st.integers(0, 20), st.integers(0, 20))
def test_ranges_and_gaps_name_every_number_once(numbers: set[int], start: int, count: int) -> None:
    def spelled(text: str) -> list[int]:
        found: list[int] = []
        for run in text.split(",") if text else []:
            first, _, last = run.partition("..")
            found += range(int(first), int(last or first) + 1)
        return found

    assert spelled(ranges(numbers)) == sorted(numbers)
    assert spelled(gaps(numbers, start, start + count)) == [n for n in range(start, start + count) if n not in numbers]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.sets(st.tuples(st.sampled_from(["w", "v"]), st.integers(0, 4), st.integers(0, 4)), max_size=20))
def test_collapsed_names_stand_for_exactly_those_names(rows: set[tuple[str, int, int]]) -> None:
    names = {f"layers.{layer}.e.{expert}.{part}" for part, layer, expert in rows}
    assert sorted(name for line in collapse(sorted(names)) for name in expanded(line)) == sorted(names)


def expanded(line: str) -> list[str]:
    before, brace, rest = line.partition("{")
    if not brace:
        return [line]
    inner, _, after = rest.partition("}")
    numbers: list[int] = []
    for run in inner.split(","):
        first, _, last = run.partition("..")
        numbers += range(int(first), int(last or first) + 1)
    return [name for number in numbers for name in expanded(f"{before}{number}{after}")]


def test_names_are_collapsed_to_one_line_where_all_are_there() -> None:
    names = [f"layers.{layer}.experts.{expert}.w" for layer in range(48) for expert in range(128)]
    assert collapse(names) == ["layers.{0..47}.experts.{0..127}.w"]
    names.remove("layers.7.experts.5.w")
    assert collapse(names) == ["layers.{0..6,8..47}.experts.{0..127}.w", "layers.7.experts.{0..4,6..127}.w"]
