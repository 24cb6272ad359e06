import pytest

from moeconv.errors import RecipeError
from moeconv.yamldoc import MAX_CHARS, nearest, read_yaml

BOMB = "a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\nd: [*c, *c, *c]\n"
REFUSED = [
    pytest.param(BOMB, "r.yaml:1: anchors, aliases and tags are not allowed", id="alias bomb"),
    pytest.param("a: 1\nb: &x 2\n", "r.yaml:2: anchors, aliases and tags", id="anchor"),
    pytest.param("a: 1\n<<: *a\n", "r.yaml:2: ", id="merge key"),
    pytest.param("a: !!python/object/apply:os.system [true]\n", "r.yaml:1: anchors, aliases and tags", id="object"),
    pytest.param("about: x\nb: !!python/name:os.system\n", "r.yaml:2: anchors, aliases and tags", id="python name"),
    pytest.param("a: !!str 1\n", "r.yaml:1: anchors, aliases and tags", id="harmless tag"),
    pytest.param("- a\n- !x b\n", "r.yaml:2: anchors, aliases and tags", id="tag of ones own"),
    pytest.param("a: [1, 2\nb: 3\n", "r.yaml:2: ", id="open bracket"),
    pytest.param("a: 1\n  b: 2\n", "r.yaml:2: mapping values are not allowed", id="indentation"),
    pytest.param("a: 1\n\tb: 2\n", "r.yaml:2: ", id="tab"),
    pytest.param("a: 1\n---\nb: 2\n", "r.yaml", id="two documents"),
    pytest.param("a: \x00\n", "r.yaml", id="control character"),
    pytest.param("", "r.yaml: the file is empty", id="empty"),
    pytest.param("# nothing but a comment\n", "r.yaml: the file is empty", id="only a comment"),
    pytest.param("x" * (MAX_CHARS + 1), "r.yaml: 1,000,001 characters is too long", id="too long"),
    pytest.param("[" * 60 + "]" * 60, "r.yaml:1: nested too deeply", id="deep"),
    pytest.param("[" * 400_000, "r.yaml:1: nested too deeply", id="so deep that a parser could crash"),
    pytest.param("- " * 400_000 + "x", "r.yaml:1: nested too deeply", id="deep blocks"),
    pytest.param("\n" + "{a: " * 200_000, "r.yaml:2: nested too deeply", id="deep mappings"),
]


@pytest.mark.parametrize(("text", "says"), REFUSED)
def test_yaml_that_could_surprise_is_refused(text: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_yaml(text, "r.yaml")
    assert str(caught.value).startswith(says)
    assert "\n  -> " in str(caught.value)


def test_a_repeated_key_is_refused_with_its_line() -> None:
    root = read_yaml("a: 1\nb: 2\na: 3\n", "r.yaml")
    with pytest.raises(RecipeError, match=r"^r\.yaml:3: 'a' stands here twice\n"):
        list(root.items())


def test_scalars_are_text_as_it_is_written() -> None:
    root = read_yaml('a: yes\nb: 1_0\nc: 2024-01-01\nd: "x: y"\ne: null\n', "r.yaml")
    assert {key.text(): value.text() for key, value in root.items()} == {
        "a": "yes", "b": "1_0", "c": "2024-01-01", "d": "x: y", "e": "null",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "call", "says"),
    [
        ("a: [1]", "text", "r.yaml:1: expected a single value"),
        ("a: 1", "sequence", "r.yaml:1: expected a list"),
        ("a: 1", "items", "r.yaml:1: expected a mapping"),
        ("a: one", "integer", "r.yaml:1: 'one' is not a whole number"),
        ("a: 1.5", "integer", "r.yaml:1: '1.5' is not a whole number"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_its_line(text: str, call: str, says: str) -> None:
    ((_, value),) = read_yaml(text, "r.yaml").items()
    with pytest.raises(RecipeError) as caught:
        list(getattr(value, call)())
    assert str(caught.value).startswith(says)


def test_the_nearest_known_word_is_proposed() -> None:
    assert nearest("concatt", ["interleave", "concat"]) == "Did you mean 'concat'? Known: concat, interleave."
    assert nearest("zzz", ["interleave", "concat"]) == "Known: concat, interleave."
