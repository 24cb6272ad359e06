"""moeconv/ERRORS.md has every message of the source, and no other."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from moeconv import errors
from tests.messages import PACKAGE, REASON, WARNING, Message, key_of, read_messages, words_of

CATALOGUE = PACKAGE / "ERRORS.md"
#: Messages without words of their own: where the words come from. All that is moeconv's has entries by itself.
PASSED_ON = {
    ("moeconv/checkpoint.py", "<>: <>"): "HeaderError, of config.json, the index or moeconv.json",
    ("moeconv/choices.py", "<>: <>"): "a format's `refusal` or `expert_refusal`",
    ("moeconv/diagnosis.py", "<> <>"): "`_candidates`: what a matrix holds instead",
    ("moeconv/likeness.py", "<>: <>"): "FormatError",
    ("moeconv/soundness.py", "<> <>"): "`faults` of what was counted",
    ("moeconv/soundness.py", "<>"): "FormatError, with the names of the matrices in front",
    ("moeconv/soundness.py", "<>: <>"): "FormatError",
    ("moeconv/structure.py", "<>"): "`_of_blocks`",
    ("moeconv/encoded.py", "<>: <>"): "`_format_of` and `_column_format`",
    ("moeconv/header.py", "<>"): "never shown: `_usual_header` catches the one, `read_json` words the other",
    ("moeconv/header.py", "<>: <>"): "HeaderError, of a weight file",
    ("moeconv/names.py", "<>: <>"): "DimSyntaxError",
    ("moeconv/recipe_file.py", "<>"): "PatternError, DimSyntaxError",
    ("moeconv/recipe_file.py", "<>: <>"): "ShapeError",
    ("moeconv/scheme.py", "<>: <>"): "UsageError of `parse_format`, with file and line in front",
    ("moeconv/targets.py", "<>"): "never shown: an expression with something that is not known matches nothing",
    ("moeconv/states.py", "<>: <>"): "`read_state` and `_state`",
    ("moeconv/transformers.py", "<>: <>"): "`read_state`",
    ("moeconv/yamldoc.py", "<>: <>"): "the YAML parser; the catalogue has an entry for all it may say",
}
#: The entry for what others say.
FOREIGN = "`<file>:<line>: <what the YAML parser says>`"
CLASSES = {name for name, value in vars(errors).items() if isinstance(value, type) and name.endswith("Error")}
SECTIONS = (CLASSES - {"MoeconvError"}) | {"ImportError", "Warnings"}


class Entry(NamedTuple):
    """A template of the catalogue, with what stands below it and the class whose section it is in."""

    template: str
    line: int
    section: str
    meaning: str
    actions: tuple[str, ...]

    @property
    def where(self) -> str:
        return f"moeconv/{CATALOGUE.name}:{self.line}"


def read_entries(text: str) -> list[Entry]:
    """Headings of level 4 are templates; several in a row share what follows: sentences, then a list of what to do."""
    entries: list[Entry] = []
    section = ""
    templates: list[tuple[str, int]] = []
    body: list[str] = []

    def close() -> None:
        meaning, *actions = re.split(r"^- ", "\n".join(body).strip(), flags=re.MULTILINE)
        entries.extend(Entry(text, at, section, meaning.strip(), tuple(actions)) for text, at in templates)
        templates.clear()
        body.clear()

    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("#"):
            body.append(line)
            continue
        if not line.startswith("#### ") or "".join(body).strip():
            close()
        if heading := re.fullmatch(r"#### (`+)(.+?)\1", line):
            templates.append((heading[2].strip(), number))
        elif line.startswith("## "):
            section = line.removeprefix("## ")
        body.clear()
    close()
    return entries


@cache
def entries() -> list[Entry]:
    return read_entries(CATALOGUE.read_text(encoding="utf-8"))


@cache
def everything() -> list[Message]:
    return read_messages()


def messages() -> list[Message]:
    return [message for message in everything() if not message.is_passed_on]


def absent(found: list[Message], listed: list[Entry]) -> list[str]:
    """Messages without an entry, each as a line to paste."""
    known = {key_of(entry.template) for entry in listed}
    return [f"{m.where}: no entry in moeconv/ERRORS.md for\n#### `{m.template}`" for m in found if m.key not in known]


def stale(found: list[Message], listed: list[Entry]) -> list[str]:
    """Entries that no code can raise."""
    said = {message.key for message in found} | {key_of(FOREIGN.strip("`"))}
    return [f"{e.where}: nothing says `{e.template}` any more" for e in listed if key_of(e.template) not in said]


def test_every_message_has_an_entry() -> None:
    missing = absent(messages(), entries())
    assert not missing, "\n" + "\n".join(missing)


def test_every_entry_is_a_message() -> None:
    left = stale(messages(), entries())
    assert not left, "\n" + "\n".join(left)


def test_a_message_has_one_entry() -> None:
    lines: dict[str, list[str]] = {}
    for entry in entries():
        lines.setdefault(key_of(entry.template), []).append(entry.where)
    assert not [places for places in lines.values() if len(places) > 1]


def test_entries_stand_in_the_section_of_their_class() -> None:
    """Of a Problem or a reason the class is not known where it is made; of what a class is called with it is."""
    made_by: dict[str, set[str]] = {}
    for message in messages():
        made_by.setdefault(message.key, set()).add({WARNING: "Warnings"}.get(message.made_by, message.made_by))
    for entry in entries():
        makers = made_by.get(key_of(entry.template), {entry.section})
        assert entry.section in SECTIONS, entry.where
        assert entry.section in makers or not makers <= SECTIONS, f"{entry.where}: made as {', '.join(makers)}"


def test_entries_say_what_is_meant_and_what_to_do() -> None:
    assert not [entry.where for entry in entries() if len(words_of(entry.meaning)) < 4 or not all(entry.actions)]
    assert not [entry.where for entry in entries() if not entry.actions]


def test_what_is_passed_on_is_known() -> None:
    """A message that is all holes has its words from another message, or from somewhere that this test cannot see."""
    found = {
        (message.where.partition(":")[0], message.key): message.where
        for message in everything()
        if message.is_passed_on and message.made_by not in (REASON, WARNING)
    }
    new = [f"{where}: {key[1]!r}" for key, where in found.items() if key not in PASSED_ON]
    assert not new, f"add them to PASSED_ON, and what makes their words to DETOURS or TELLERS of messages.py: {new}"
    assert set(PASSED_ON) <= set(found)


SOURCE = """
class Problem(NamedTuple):
    message: str
    remedy: str

_WHAT = {"a": "it is made of wood", "b": "it is made of stone"}

class LostError(ValueError):
    pass

class PlanError(Exception):
    pass

class Finder:
    def _wrong(self, trials, message: str, remedy: str) -> None:
        self.problems.append(Problem(f"{self.block}: {message}", remedy))

    def find(self, shapes):
        if shapes:
            self._wrong(shapes, f"{shapes!r} are not " "known", "Look again.")
        what = "it is too large" if shapes > 3 else f"it has {shapes} corners"
        raise PlanError(f"of {self.name:>5} {what}" + (f", said by {self.who}" if self.who else ""), "Cut it.")

    def why(self) -> str | None:
        what = "not this one"
        what = "nobody asked for it"
        if self.other:
            what = "or for another"
        return what

def all_of_them():
    raise LostError(str(_WHAT))
    return [Problem(f"because {what}", "Burn it.") for key, what in _WHAT.items()]

class Diagnosis:
    def told(self):
        yield "it fell from the table", 3
        self.whole.note(3, f"it fell from {self.chair}")

    def how(self) -> str | None:
        what = "it broke"
        what += " in the end"
        return what

def some_warnings():
    lines = [f"{count:,} were left behind" for count in ()]
    lines.append(f"nobody is looking in the {PLACE}")
    return [*lines, "it is getting late"]
"""


def test_messages_are_found_however_they_are_made(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "finder.py").write_text(SOURCE)
    (package / "names.py").write_text('PLACE = "cellar"')
    found = read_messages(package, {"self.whole.note": 1}, frozenset({"told"}))
    assert {(message.key, message.made_by) for message in found if not message.is_passed_on} == {
        ("<> are not known", "_wrong"),
        ("of <> it is too large, said by <>", "PlanError"),
        ("of <> it is too large", "PlanError"),
        ("of <> it has <> corners, said by <>", "PlanError"),
        ("of <> it has <> corners", "PlanError"),
        ("nobody asked for it", REASON),
        ("or for another", REASON),
        ("because it is made of wood", "Problem"),
        ("because it is made of stone", "Problem"),
        ("it fell from the table", REASON),
        ("it fell from <>", "self.whole.note"),
        ("it broke", REASON),
        ("<> in the end", REASON),
        ("<> were left behind", WARNING),
        ("nobody is looking in the cellar", WARNING),
        ("it is getting late", WARNING),
    }
    assert ("<>", "LostError") in {(message.key, message.made_by) for message in found}
    line = SOURCE.splitlines().index('    lines.append(f"nobody is looking in the {PLACE}")') + 1
    assert f"package/finder.py:{line}" in {message.where for message in found}


def test_entries_are_read() -> None:
    head = "## PlanError\n\n### One\n\nWords.\n\n#### `<file> is gone`\n#### ``see `other` ``\n"
    text = head + "It is.\n- Go.\n- Or\n  stay.\n"
    first, second = read_entries(text)
    assert (first.template, first.line, first.section) == ("<file> is gone", 7, "PlanError")
    assert (second.template, second.meaning, second.actions) == ("see `other`", "It is.", ("Go.\n", "Or\n  stay."))
    assert first.actions == second.actions


def test_what_is_absent_or_stale_is_named_with_its_place() -> None:
    found = [Message("<path> is gone", "PlanError", "moeconv/x.py:7")]
    listed = read_entries("## PlanError\n#### `<file> is here`\nIt is there.\n- Go.\n")
    assert absent(found, listed) == ["moeconv/x.py:7: no entry in moeconv/ERRORS.md for\n#### `<path> is gone`"]
    assert stale(found, listed) == ["moeconv/ERRORS.md:2: nothing says `<file> is here` any more"]
    assert not absent(found, read_entries("#### `<file> is gone`\n"))
