"""The messages of moeconv, read from its source: what a user can meet, as templates with `<holes>` for what varies.

A text is a message where it is given as the `message` of a `Problem`, of an error or of a function that makes one;
where a function of the type `... | str` returns it, which is how reasons travel; and where it is a line of warnings.
Names, conditions and sums are followed as far as the function and its module have them. All else becomes a hole.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parent.parent / "moeconv"
#: Calls that take a part of a message where no rule here follows it, with the argument that has it.
DETOURS = {
    "self._refused.setdefault": 0,
    "self._whole.note": 0,
}  # why a matrix cannot have a format: `choices` sorts matrices by it
#: Functions of other types than `... | str` whose texts become a part of a message: returned, yielded, or the first in
#: a tuple.
TELLERS = frozenset({"_of_blocks", "_candidates", "faults"})
REASON, WARNING = "reason", "warning"
_HOLE = re.compile(r"<[^<>]*>")
_WARNINGS = re.compile(r"(^|_)(warnings|notes)$")
#: Not worth the name of a hole.
_DULL = {"self", "str", "len", "list", "join", "sorted", "min", "max", "type", "next", "iter", "map", "size"}

#: Classes of what is not looked into, of statements, and of nodes that may give a name a value or make a message. Sets,
#: because the nodes of a package are a hundred thousand.
_LEAVES = frozenset((
    str, int, float, bool, bytes, type(None), ast.Name, ast.Constant, ast.arguments, ast.alias, ast.Load, ast.Store,
    *ast.operator.__subclasses__(), *ast.cmpop.__subclasses__(), *ast.boolop.__subclasses__(),
))  # fmt: skip
_STATEMENTS = frozenset(ast.stmt.__subclasses__())
_NOTED = frozenset((
    ast.Call, ast.Return, ast.Yield, ast.List, ast.ListComp, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr,
    ast.comprehension,
))  # fmt: skip

#: Where a statement stands: for each block around it, the block and the number of the statement in it.
Place = tuple[tuple[int, int], ...]


class Message(NamedTuple):
    """A message, where it is made, and by what: a class of errors, `Problem`, a function, or one of the words above."""

    template: str
    made_by: str
    where: str

    @property
    def key(self) -> str:
        return key_of(self.template)

    @property
    def is_passed_on(self) -> bool:
        """It has no words of its own."""
        return not words_of(self.template)


def key_of(template: str) -> str:
    """What templates have in common that differ in nothing but their holes, of which `<file>:<line>` is one."""
    return " ".join(re.sub("<>([:.]?<>)+", "<>", _HOLE.sub("<>", template)).split())


def words_of(template: str) -> list[str]:
    """Words that a user can search for."""
    return re.findall(r"[^\W\d_]{2,}", _HOLE.sub(" ", template))


def read_messages(
    package: Path = PACKAGE, detours: Mapping[str, int] = DETOURS, tellers: frozenset[str] = TELLERS
) -> list[Message]:
    """All messages of a package."""
    paths = sorted(package.rglob("*.py"))
    modules = [_Module(str(path.relative_to(package.parent)), path.read_text(encoding="utf-8")) for path in paths]
    sinks = {"ImportError": 0, **detours, **{f".{name.rpartition('.')[2]}": 0 for name in detours}}
    for module in modules:
        sinks.update(module.sinks())
    constants = {name: given for module in modules for name, given in module.constants()}
    return [message for module in modules for message in module.messages(sinks, tellers, constants)]


class _Given(NamedTuple):
    """What a name is given, and where."""

    value: ast.expr
    line: int
    place: Place


class _Function:
    """A function, or a module outside of its functions: its nodes with their places, and what each name is given."""

    def __init__(self, node: ast.AST) -> None:
        self.node = node
        self.nodes: list[tuple[ast.AST, Place]] = []
        self.given: dict[str, list[_Given]] = {}

    def add(self, node: ast.AST, place: Place) -> None:
        self.nodes.append((node, place))
        for name, value in _bound_by(node):
            given = _Given(value, value.lineno, place)
            if isinstance(node, ast.comprehension):  # which stands behind what it binds a name for
                given = given._replace(line=0)
            elif isinstance(node, ast.AugAssign):  # what was given before counts as well
                given = given._replace(place=())
            self.given.setdefault(name, []).append(given)

    @property
    def message_at(self) -> int | None:
        """Which argument of a call is the function's `message`."""
        if not isinstance(self.node, ast.FunctionDef):
            return None
        names = [argument.arg for argument in self.node.args.args if argument.arg not in ("self", "cls")]
        return names.index("message") if "message" in names else None

    def texts(self, sinks: Mapping[str, int], tellers: frozenset[str]) -> Iterator[tuple[ast.expr, Place, str]]:
        """Expressions that are messages, their places, and what makes them."""
        function = self.node if isinstance(self.node, ast.FunctionDef) else None
        tells = function is not None and (function.name in tellers or _may_be_text(function.returns))
        warns = function is not None and _WARNINGS.search(function.name) is not None
        for node, place in self.nodes:
            match node:
                case ast.Call(func=func, args=args) if (name := _sink(func, sinks)) and len(args) > sinks[name]:
                    yield args[sinks[name]], place, name
                case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="append"), args=[text]):
                    if warns or _WARNINGS.search(name):
                        yield text, place, WARNING
                case ast.List(elts=texts) if warns:
                    yield from ((text, place, WARNING) for text in texts)
                case ast.ListComp(elt=text) if warns:
                    yield text, place, WARNING
                case ast.Return(value=ast.expr() as text) | ast.Yield(value=ast.expr() as text) if tells:
                    yield text.elts[0] if isinstance(text, ast.Tuple) else text, place, REASON


def _may_be_text(returns: ast.expr | None) -> bool:
    """`... | str` or `str | None`."""
    if not isinstance(returns, ast.BinOp):
        return False
    return any(isinstance(side, ast.Name) and side.id == "str" for side in (returns.left, returns.right))


def _sink(func: ast.expr, sinks: Mapping[str, int]) -> str | None:
    match func:
        case ast.Name(id=name) | ast.Attribute(attr=name) if name in sinks:
            return name
        case ast.Attribute(attr=attr) if f".{attr}" in sinks:  # the end of a detour
            return name if (name := ast.unparse(func)) in sinks else None
    return None


def _bound_by(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Names that a node gives a value, and the value; of a loop over the items of a table, all values of the table."""
    match node:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            yield name, value
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
            yield name, value
        case ast.NamedExpr(target=ast.Name(id=name), value=value):
            yield name, value
        case ast.AugAssign(target=ast.Name(id=name), op=ast.Add() as op, value=value):
            yield name, ast.copy_location(ast.BinOp(ast.Name(name), op, value), value)
        case ast.comprehension(
            target=ast.Tuple(elts=[_, ast.Name(id=name)]),
            iter=ast.Call(func=ast.Attribute(value=ast.Name() as table, attr="items")),
        ):
            yield name, table


class _Module:
    """A file: its classes and functions. Their nodes are found in one walk, which takes most of the time."""

    def __init__(self, path: str, text: str) -> None:
        tree = ast.parse(text)
        self.path = path
        self.classes: list[ast.ClassDef] = []
        self.functions = [_Function(tree)]
        pending: list[tuple[ast.AST, Place, _Function]] = [(tree, (), self.functions[0])]
        while pending:
            parent, place, function = pending.pop()
            for field in parent._fields:
                value = getattr(parent, field)
                for number, child in enumerate(value) if value.__class__ is list else ((0, value),):
                    kind = child.__class__
                    if kind in _LEAVES:
                        continue
                    inner, owner = place, function
                    if kind is ast.FunctionDef:
                        inner, owner = (), _Function(child)
                        self.functions.append(owner)
                    elif kind in _STATEMENTS:
                        inner = (*place, (id(value), number))
                    if kind is ast.ClassDef:
                        self.classes.append(child)
                    elif kind in _NOTED:
                        function.add(child, inner)
                    pending.append((child, inner, owner))

    def sinks(self) -> dict[str, int]:
        """What takes a message here, and which argument that is: classes of errors, and functions that make them."""
        makers = [(function.node, function.message_at) for function in self.functions]
        found = {node.name: at for node, at in makers if isinstance(node, ast.FunctionDef) and at is not None}
        found.pop("__init__", None)  # its class is there
        for cls in self.classes:
            fields = [n.target.id for n in cls.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
            if cls.name.endswith("Error") or "message" in fields:
                found[cls.name] = fields.index("message") if "message" in fields else 0
        return found

    def constants(self) -> Iterator[tuple[str, list[_Given]]]:
        """Names in capitals that other modules may import."""
        return ((name, given) for name, given in self.functions[0].given.items() if name.isupper() and name[0] != "_")

    def messages(
        self, sinks: Mapping[str, int], tellers: frozenset[str], constants: Mapping[str, list[_Given]]
    ) -> Iterator[Message]:
        outside = {**constants, **self.functions[0].given}
        for function in self.functions:
            if function.message_at is not None:
                continue  # it passes on what it is given
            for node, place, made_by in function.texts(sinks, tellers):
                for text in _Texts(function.given, outside, node.lineno, place).of(node):
                    message = " ".join(text.partition("\n")[0].split())
                    yield Message(message, made_by, f"{self.path}:{node.lineno}")


class _Texts:
    """The texts that an expression may stand for, at a place in a function."""

    def __init__(
        self, given: Mapping[str, list[_Given]], outside: Mapping[str, list[_Given]], line: int, place: Place
    ) -> None:
        self._given = given
        self._outside = outside
        self._line = line
        self._place = place
        self._open: set[str] = set()

    def of(self, node: ast.expr) -> list[str]:
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=values):
                found = [""]
                for value in values:
                    found = [front + text for front in found for text in self.of(value)]
                return found
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return [front + text for front in self.of(left) for text in self.of(right)]
            case ast.IfExp(body=body, orelse=orelse):
                return _told([*self.of(body), *self.of(orelse)], node)
            case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
                return self.of(value)
            case ast.FormattedValue(value=value):
                return [_hole(value)]
            case ast.Dict(values=values):
                return _told([text for value in values for text in self.of(value)], node)
            case ast.Name(id=name) if isinstance(constant := self._constant(name), ast.Constant):
                return self.of(constant)
            case ast.Name(id=name) if name not in self._open:
                self._open.add(name)
                found = [text for value in self._values(name) for text in self.of(value)]
                self._open.discard(name)
                return _told(found, node)
        return [_hole(node)]

    def _constant(self, name: str) -> ast.expr | None:
        """What a module gives a name once."""
        given = () if name in self._given else self._outside.get(name, ())
        return given[0].value if len(given) == 1 else None

    def _values(self, name: str) -> list[ast.expr]:
        """What a name may have been given when the place is reached."""
        if name not in self._given:
            return [given.value for given in self._outside.get(name, ())]
        before = sorted((g for g in self._given[name] if g.line <= self._line), key=lambda given: given.line)
        sure = [number for number, given in enumerate(before) if _is_passed(given.place, self._place)]
        return [given.value for given in before[sure[-1] if sure else 0 :]]


def _is_passed(place: Place, later: Place) -> bool:
    """Whoever gets to `later` was at `place`: at a statement of a block around it, in front of it or itself."""
    if not place or len(later) < len(place):
        return False
    *outer, (block, number) = place
    return later[: len(outer)] == tuple(outer) and later[len(outer)][0] == block and later[len(outer)][1] >= number


def _told(texts: list[str], node: ast.expr) -> list[str]:
    """Alternatives where each is made of words or empty; else a hole."""
    found = list(dict.fromkeys(texts))
    return found if found and all(len(words_of(text)) > 1 or not text for text in found) else [_hole(node)]


def _hole(node: ast.expr) -> str:
    words = [
        n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute)
    ]
    return f"<{next((word.strip('_').lower() for word in words if word not in _DULL), 'text')}>"
