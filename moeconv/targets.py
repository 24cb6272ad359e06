"""Names of modules as config.json's targets mean them: `Linear`, a name, or `re:` and a regular expression.

Expressions come from files that anybody may have made, and Python's matcher takes for ever over some of a few letters,
such as `(a+)+$`. Here all ends that a piece of an expression can have are one set of positions, so that time grows with
the length of name and expression alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib import import_module
from typing import Any

#: What `re` itself parses with.
_syntax: Any = import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

_IN_CATEGORY: dict[str, Callable[[str], bool]] = {
    "DIGIT": str.isdecimal,
    "SPACE": str.isspace,
    "WORD": lambda character: character.isalnum() or character == "_",
}


class _UnknownError(ValueError):
    """A construct that is not known here: references to groups, flags, bounds of words."""


@lru_cache(maxsize=1 << 10)
def is_target(target: str, module: str) -> bool:
    """Whether a target names a module; an expression that cannot be read names none."""
    if not target.startswith("re:"):
        return target in (module, "Linear")
    try:
        parsed = _syntax.parse(target[3:])
        if parsed.state.flags & ~re.UNICODE:
            raise _UnknownError
        return bool(_ends(parsed, {0}, module))
    except (re.error, _UnknownError, RecursionError, OverflowError):
        return False


def _ends(pattern: Iterable[Any], starts: set[int], text: str) -> set[int]:
    """Where matches of a pattern end that begin at any of these positions."""
    for op, value in pattern:
        if not starts:
            break
        starts = _after(str(op), value, starts, text)
    return starts


def _after(op: str, value: Any, starts: set[int], text: str) -> set[int]:
    if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
        return {at + 1 for at in starts if at < len(text) and _is_one(op, value, text[at])}
    if op == "BRANCH":
        return set().union(*(_ends(branch, starts, text) for branch in value[1]))
    if op == "SUBPATTERN" and not value[1] and not value[2]:
        return _ends(value[3], starts, text)
    if op in ("MAX_REPEAT", "MIN_REPEAT"):
        least, most, inner = value
        return _repeated(least, most, inner, starts, text)
    if op == "AT":
        place = {"AT_BEGINNING": {0}, "AT_BEGINNING_STRING": {0}, "AT_END": {len(text)}, "AT_END_STRING": {len(text)}}
        if str(value) in place:
            return starts & place[str(value)]
    if op in ("ASSERT", "ASSERT_NOT"):
        direction, inner = value
        fits = {at for at in starts if _looks(direction, inner, at, text)}
        return fits if op == "ASSERT" else starts - fits
    raise _UnknownError(op)


def _looks(direction: int, inner: Any, at: int, text: str) -> bool:
    if direction > 0:
        return bool(_ends(inner, {at}, text))
    return any(at in _ends(inner, {begin}, text) for begin in range(at + 1))


def _repeated(least: int, most: int, inner: Any, starts: set[int], text: str) -> set[int]:
    for _ in range(int(least)):
        before, starts = starts, _ends(inner, starts, text)
        if starts in (set(), before):  # nothing more will come, or the same again and again
            break
    found, new, count = set(starts), starts, int(least)
    while new and count < int(most):
        new = _ends(inner, new, text) - found
        found |= new
        count += 1
    return found


def _is_one(op: str, value: Any, character: str) -> bool:
    if op == "ANY":
        return character != "\n"
    if op != "IN":
        return (ord(character) == value) is (op == "LITERAL")
    is_negated = str(value[0][0]) == "NEGATE"
    return any(_is_in(str(kind), said, character) for kind, said in value[is_negated:]) is not is_negated


def _is_in(kind: str, said: Any, character: str) -> bool:
    if kind == "RANGE":
        return bool(said[0] <= ord(character) <= said[1])
    if kind == "CATEGORY":
        _, *negation, name = str(said).split("_")
        return _IN_CATEGORY[name](character) is not bool(negation)
    return bool(ord(character) == said)
