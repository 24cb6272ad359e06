"""Sizes as recipes write them: `I`, `2*I`, `E+Z`, `H/32`, `ceil(I/128)`.

A claim such as `[E, 2*I, H]` is checked against a tensor's shape, and binds the symbols that it names
alone (or multiplied by a number). Division must come out even; `ceil` rounds up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_TOKEN = re.compile(r"\s*(?:(\d+)|(ceil\b)|([A-Z][A-Za-z0-9_]*)|([-+*/()]))")


class DimSyntaxError(ValueError):
    """A size that cannot be read; the text quotes it."""


@dataclass(frozen=True, slots=True)
class Dim:
    """A size: a number, a symbol, or `op` over `args` (ops: + * / ceil, the last rounds a division up).

    `text` is how the recipe writes it.
    """

    text: str
    op: str
    args: tuple[Dim, ...] = ()
    number: int = 0
    symbol: str = ""

    def symbols(self) -> frozenset[str]:
        """Symbols that the size depends on."""
        if self.symbol:
            return frozenset((self.symbol,))
        return frozenset(symbol for arg in self.args for symbol in arg.symbols())

    def value(self, known: Mapping[str, int]) -> int | None:
        """The size in elements, or None where a symbol is unknown or a division does not come out even."""
        if self.op == "number":
            return self.number
        if self.op == "symbol":
            return known.get(self.symbol)
        left, right = (arg.value(known) for arg in self.args)
        if left is None or right is None:
            return None
        if self.op == "+":
            return left + right
        if self.op == "*":
            return left * right
        if right == 0 or (self.op == "/" and left % right):
            return None
        return -(-left // right)

    def solve(self, size: int, known: Mapping[str, int]) -> tuple[str, int] | None:
        """The one unknown symbol and the value that makes this size equal `size`, where that is decided."""
        if self.op == "symbol" and self.symbol not in known:
            return self.symbol, size
        if self.op not in ("+", "*", "/"):
            return None
        left, right = self.args
        for unknown, other in ((left, right), (right, left)):
            value = other.value(known)
            if value is None or unknown.value(known) is not None:
                continue
            if self.op == "+":
                return unknown.solve(size - value, known)
            if self.op == "*" and value > 0 and size % value == 0:
                return unknown.solve(size // value, known)
            if self.op == "/" and unknown is left:
                return unknown.solve(size * value, known)
            if self.op == "/" and size > 0 and value % size == 0:
                return unknown.solve(value // size, known)
        return None

    def replace(self, sizes: Mapping[str, Dim]) -> Dim:
        """This size with others in place of symbols."""
        if self.symbol:
            return sizes.get(self.symbol, self)
        if not self.args:
            return self
        left, right = (arg.replace(sizes) for arg in self.args)
        text = f"{left.operand}{'/' if self.op == 'ceil' else self.op}{right.operand}"
        return Dim(f"ceil({text})" if self.op == "ceil" else text, self.op, (left, right))

    @property
    def operand(self) -> str:
        """The text as it stands beside an operator."""
        return self.text if not self.args or self.op == "ceil" else f"({self.text})"

    def __str__(self) -> str:
        return self.text


def parse_dim(text: str) -> Dim:
    """Read one size.

    Raises:
        DimSyntaxError: not a size.
    """
    return _Parser(text).parse()


def parse_shape(text: str) -> tuple[Dim, ...]:
    """Read a shape claim such as `[E, 2*I, H]`; `[]` is the shape of a scalar.

    Raises:
        DimSyntaxError: not a shape.
    """
    stripped = text.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        raise DimSyntaxError(f"{text!r} is not a shape such as [E, 2*I, H]")
    inner = stripped[1:-1].strip()
    return tuple(parse_dim(part) for part in inner.split(",")) if inner else ()


class _Parser:
    """Recursive descent over `sum := product (+ product)*`, `product := atom ((*|/) atom)*`."""

    def __init__(self, text: str) -> None:
        self.text = text.strip()
        if len(self.text) > 200:
            raise DimSyntaxError(f"{self.text[:50]!r}... is too long for a size")
        self.tokens: list[str] = []
        position = 0
        while position < len(self.text):
            match = _TOKEN.match(self.text, position)
            if match is None:
                raise DimSyntaxError(f"{self.text!r}: cannot read {self.text[position:]!r}")
            self.tokens.append(match[0].strip())
            position = match.end()

    def parse(self) -> Dim:
        result = self._sum()
        if self.tokens:
            raise DimSyntaxError(f"{self.text!r}: cannot read {self.tokens[0]!r}")
        return result

    def _take(self, *wanted: str) -> str:
        if self.tokens and self.tokens[0] in wanted:
            return self.tokens.pop(0)
        return ""

    def _sum(self) -> Dim:
        left = self._product()
        while self._take("+"):
            right = self._product()
            left = Dim(f"{left}+{right}", "+", (left, right))
        return left

    def _product(self) -> Dim:
        left = self._atom()
        while op := self._take("*", "/"):
            right = self._atom()
            left = Dim(f"{left}{op}{right}", op, (left, right))
        return left

    def _atom(self) -> Dim:
        if not self.tokens:
            raise DimSyntaxError(f"{self.text!r} ends too early")
        token = self.tokens.pop(0)
        if token.isdigit():
            return Dim(token, "number", number=int(token))
        if token == "ceil":
            if not self._take("("):
                raise DimSyntaxError(f"{self.text!r}: ceil needs ( )")
            inner = self._sum()
            if not self._take(")") or inner.op != "/":
                raise DimSyntaxError(f"{self.text!r}: ceil is written ceil(a/b)")
            return Dim(f"ceil({inner})", "ceil", inner.args)
        if token == "(":
            inner = self._sum()
            if not self._take(")"):
                raise DimSyntaxError(f"{self.text!r}: a ( is not closed")
            return Dim(f"({inner})", inner.op, inner.args, inner.number, inner.symbol)
        if token[0].isupper():
            return Dim(token, "symbol", symbol=token)
        raise DimSyntaxError(f"{self.text!r}: cannot read {token!r}")
