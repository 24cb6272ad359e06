"""YAML as recipes use it: plain data with line numbers, and nothing that can surprise.

Anchors, aliases, tags and repeated keys are refused: a recipe is data that a person reads, and the first
two can make a small file expand without bound. Nothing is ever constructed but text, lists and mappings.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import yaml

from moeconv.errors import RecipeError

MAX_CHARS = 1_000_000
MAX_DEPTH = 50
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Yaml(NamedTuple):
    """A YAML node and the file it came from (`source`, for messages)."""

    node: yaml.Node
    source: str

    @property
    def where(self) -> str:
        """`FILE:LINE`, for the start of a message."""
        return f"{self.source}:{self.node.start_mark.line + 1}"

    def error(self, message: str, remedy: str) -> RecipeError:
        """A RecipeError that begins with file and line."""
        return RecipeError(f"{self.where}: {message}", remedy)

    @property
    def is_mapping(self) -> bool:
        return isinstance(self.node, yaml.MappingNode)

    def text(self) -> str:
        """A scalar as written."""
        if not isinstance(self.node, yaml.ScalarNode):
            raise self.error("expected a single value", "Write one word or number here.")
        return str(self.node.value)

    def integer(self) -> int:
        """A scalar that is a whole number."""
        try:
            return int(self.text())
        except ValueError:
            raise self.error(f"{self.text()!r} is not a whole number", "Write a number such as 0 or -1.") from None

    def items(self) -> Iterator[tuple[Yaml, Yaml]]:
        """Keys and values of a mapping, in order; a repeated key is an error."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.error("expected a mapping", "Write `key: value` lines here.")
        seen: set[str] = set()
        for key_node, value_node in self.node.value:
            key = Yaml(key_node, self.source)
            if key.text() in seen:
                raise key.error(f"{key.text()!r} stands here twice", "Keep one of the two.")
            seen.add(key.text())
            yield key, Yaml(value_node, self.source)

    def scalars(self) -> Iterator[Yaml]:
        """Every scalar in and below this node, keys included."""
        pending = [self.node]
        while pending:
            node = pending.pop()
            if isinstance(node, yaml.ScalarNode):
                yield Yaml(node, self.source)
            elif isinstance(node, yaml.MappingNode):
                pending += [inner for pair in reversed(node.value) for inner in reversed(pair)]
            else:
                pending += reversed(node.value)

    def sequence(self) -> list[Yaml]:
        """Items of a list."""
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.error("expected a list", "Write [a, b] here.")
        return [Yaml(node, self.source) for node in self.node.value]

    def texts(self) -> list[str]:
        """A list of scalars; a single scalar counts as a list of one."""
        return [self.text()] if isinstance(self.node, yaml.ScalarNode) else [item.text() for item in self.sequence()]


def read_yaml(text: str, source: str) -> Yaml:
    """Parse one YAML document.

    Args:
        text: the document.
        source: how messages name it, usually the file's path.

    Raises:
        RecipeError: not YAML, or YAML with anchors, aliases, tags, more than `MAX_CHARS` characters or more
            than `MAX_DEPTH` levels.
    """
    if len(text) > MAX_CHARS:
        raise RecipeError(f"{source}: {len(text):,} characters is too long for a recipe", "Split it.")
    if any("\ud800" <= character <= "\udfff" for character in text):  # as manifests have bytes that are no text
        raise RecipeError(f"{source}: not UTF-8 text", "Write it again.")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_LOADER):
            line = event.start_mark.line + 1 if event.start_mark else 0
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:  # the parser in C would run out of stack and take the process with it
                raise _too_deep(f"{source}:{line}")
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
                raise RecipeError(f"{source}:{line}: anchors, aliases and tags are not allowed", "Write the value out.")
        node = yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        if "nesting depth" in problem:  # libyaml 0.2.6 looks ahead and has a limit of its own
            raise _too_deep(f"{source}{at}") from None
        raise RecipeError(f"{source}{at}: {problem}", "Correct the YAML syntax there.") from None
    if node is None:
        raise RecipeError(f"{source}: the file is empty", "See `moeconv recipes show NAME` for a complete one.")
    return Yaml(node, source)


def _too_deep(where: str) -> RecipeError:
    return RecipeError(f"{where}: nested too deeply", "A recipe needs about four levels.")


def nearest(word: str, known: Collection[str]) -> str:
    """A remedy for an unknown word: the nearest known one, and all of them."""
    close = difflib.get_close_matches(word, list(known), n=1)
    listing = f"Known: {', '.join(sorted(known))}."
    return f"Did you mean {close[0]!r}? {listing}" if close else listing
