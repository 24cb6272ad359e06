"""Reading recipes: YAML to a checked `Recipe`, with errors that name the line and the nearest known word."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from moeconv.dims import Dim, DimSyntaxError, parse_dim, parse_shape
from moeconv.errors import Problem, RecipeError
from moeconv.names import Pattern, PatternError
from moeconv.ops import Concat, Expression, Interleave, Part, ShapeError, Transpose, parts_of
from moeconv.recipe import LAYOUTS, Component, Recipe, Rule, stored_shape
from moeconv.tensors import Shape
from moeconv.yamldoc import MAX_CHARS, Yaml, nearest, read_yaml

_KEYS = ("about", "extends", "model_types", "config", "dims", "optional", "forms", "decoded", "keep", "layouts")
_OPS = ("concat", "interleave", "transpose")
#: Lines of a layout; what reads a recipe holds each line against all others.
MAX_RULES = 200
#: Stands in a proposed recipe wherever headers do not tell, until a person has written what it is.
UNDECIDED = "DECIDE"
_TABLES = ("engines", "forms", "quantize", "unsupported")
_DEFAULT_SCOPES = (".", "text_config")


def shipped_folder() -> Path:
    """Where the recipes that come with moeconv lie: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def shipped_names() -> list[str]:
    """Names of the recipes that come with moeconv (the tables `engines`, `forms` and `quantize` are none)."""
    return sorted(path.stem for path in shipped_folder().glob("*.yaml") if path.stem not in _TABLES)


def load_shipped(word: str = "") -> list[Recipe]:
    """All recipes that come with moeconv; with a `word`, only those whose text holds it, to save time."""
    folder = shipped_folder()
    texts = ((name, *_read(folder / f"{name}.yaml")) for name in shipped_names())
    return [parse_recipe(text, name, str(path)) for name, text, path in texts if word in text]


def load_recipe(name_or_path: str) -> Recipe:
    """Load a shipped recipe by name or a user's by path.

    Raises:
        RecipeError: no such recipe, or it does not hold together.
    """
    text, path = recipe_text(name_or_path)
    return parse_recipe(text, path.stem, str(path))


def recipe_text(name_or_path: str) -> tuple[str, Path]:
    """A recipe's file, unchecked, and its path.

    Raises:
        RecipeError: no such recipe, or not a readable text file.
    """
    path = shipped_folder() / f"{name_or_path}.yaml" if name_or_path in shipped_names() else Path(name_or_path)
    if not os.path.isfile(path):
        raise RecipeError(
            f"there is no recipe {name_or_path!r}, neither shipped nor as a file",
            nearest(name_or_path, shipped_names()),
        )
    return _read(path)


def _read(path: Path) -> tuple[str, Path]:
    try:
        nbytes = path.stat().st_size
        if nbytes > 4 * MAX_CHARS:
            raise RecipeError(f"{path} has {nbytes:,} bytes: it is no recipe", "Give a recipe's file.")
        return path.read_text(encoding="utf-8"), path
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}", "Give a readable UTF-8 file.") from None


def parse_recipe(text: str, name: str, source: str) -> Recipe:
    """Read a recipe from its text.

    Args:
        text: YAML.
        name: the recipe's name.
        source: how messages name the file.

    Raises:
        RecipeError: with file, line and the nearest known word.
    """
    return _Reader(name, source).read(text)


class _Reader:
    """Collects what a file says, on top of what the file that it extends says."""

    def __init__(self, name: str, source: str, extended_by: tuple[str, ...] = ()) -> None:
        self.name = name
        self.source = source
        self.extended_by = extended_by
        self.about = ""
        self.model_types: tuple[str, ...] = ()
        self.scopes: tuple[str, ...] = _DEFAULT_SCOPES
        self.dims: dict[str, tuple[str, ...]] = {}
        self.optional: tuple[str, ...] = ()
        self.forms: tuple[str, ...] = ()
        self.decoded = ""
        self.keep: tuple[str, ...] = ()
        self.aliases: dict[str, str] = {}
        self.rules: dict[str, list[Rule]] = {}
        self.text = ""
        self.base: _Reader | None = None

    def collect(self, text: str) -> Yaml:
        self.text = text
        root = read_yaml(text, self.source)
        _refuse_undecided(root)
        entries = {key.text(): (key, value) for key, value in root.items()}
        for word, (key, _) in entries.items():
            if word not in _KEYS:
                raise key.error(f"unknown key {word!r}.", nearest(word, _KEYS))
        if "extends" in entries:
            self._extend(entries["extends"][1])
        if "about" in entries:
            self.about = entries["about"][1].text()
        if "model_types" in entries:
            self.model_types = tuple(entries["model_types"][1].texts())
        if "config" in entries:
            self.scopes = tuple(entries["config"][1].texts())
        if "dims" in entries:
            for symbol, keys in entries["dims"][1].items():
                try:
                    is_symbol = parse_dim(symbol.text()).symbol == symbol.text()
                except DimSyntaxError:
                    is_symbol = False
                if not is_symbol:
                    raise symbol.error(f"{symbol.text()!r} is not a symbol", "Symbols start with a capital: E, I, H.")
                self.dims[symbol.text()] = tuple(keys.texts())
        if "optional" in entries:
            self.optional = tuple(entries["optional"][1].texts())
        if "forms" in entries:
            self.forms = tuple(entries["forms"][1].texts())
        if "decoded" in entries:
            self.decoded = entries["decoded"][1].text()
            if self.decoded not in shipped_names():
                raise entries["decoded"][1].error(
                    f"{self.decoded!r} is no shipped recipe", nearest(self.decoded, shipped_names())
                )
        if "keep" in entries:
            self.keep += tuple(entries["keep"][1].texts())
        if "layouts" in entries:
            for layout, value in entries["layouts"][1].items():
                self._layout(layout, value)
        return root

    def _extend(self, value: Yaml) -> None:
        name = value.text()
        if name in self.extended_by or name == self.name:
            raise value.error(f"{name!r} extends itself", "Remove the circle.")
        if name not in shipped_names():
            raise value.error(f"extends the unknown recipe {name!r}", nearest(name, shipped_names()))
        path = shipped_folder() / f"{name}.yaml"
        base = _Reader(name, str(path), (*self.extended_by, self.name))
        base.collect(path.read_text(encoding="utf-8"))
        self.base = base
        self.scopes, self.dims, self.optional = base.scopes, base.dims, base.optional
        self.forms, self.decoded, self.keep = base.forms, base.decoded, base.keep
        self.aliases, self.rules = base.aliases, base.rules

    def _layout(self, key: Yaml, value: Yaml) -> None:
        layout = key.text()
        if layout not in LAYOUTS:
            raise key.error(f"unknown layout {layout!r}.", nearest(layout, LAYOUTS))
        if not value.is_mapping:
            if value.text() not in LAYOUTS or value.text() == layout:
                others = [other for other in LAYOUTS if other != layout]
                raise value.error(f"layout {layout!r} cannot be {value.text()!r}", nearest(value.text(), others))
            self.aliases[layout] = value.text()
            self.rules.pop(layout, None)
            return
        self.aliases.pop(layout, None)
        lines = list(value.items())
        if len(lines) > MAX_RULES:
            raise key.error(f"{len(lines):,} lines are too many for a layout", "Most families have less than ten.")
        rules = [_rule(tensor, made_of) for tensor, made_of in lines]
        said = {part for rule in rules for part in parts_of(rule.value)}
        inherited = [rule for rule in self.rules.get(layout, []) if not said & set(parts_of(rule.value))]
        self.rules[layout] = inherited + rules

    def read(self, text: str) -> Recipe:
        root = self.collect(text)
        for layout, target in self.aliases.items():
            if target not in self.rules:
                raise root.error(f"layout {layout!r} is {target!r}, which the recipe lacks", "Describe that layout.")
        if sum(map(bool, self.rules.values())) < 2:
            raise root.error("fewer than two layouts are described", "Describe what to convert from and to.")
        claims, ids = self._parts(root)
        components = self._components(root)
        recipe = Recipe(
            self.name, self.about, self.model_types, self.scopes, self.dims, frozenset(self.optional), self.forms,
            self.decoded, self.keep, self.aliases, components, claims, ids,
            self.text if self.base is None else _rendered(self),
        )  # fmt: skip
        for part in self.optional:
            if part not in claims:
                raise root.error(f"optional part {part!r} stands in no layout", nearest(part, claims))
        _rehearse(recipe, root)
        return recipe

    def _parts(self, root: Yaml) -> tuple[dict[str, tuple[Dim, ...]], dict[str, Pattern]]:
        """Shape claim of each part, from the rule where it stands alone, and the expert hole that counts it."""
        claims: dict[str, tuple[Dim, ...]] = {}
        ids: dict[str, Pattern] = {}
        every = [rule for rules in self.rules.values() for rule in rules]
        for rule in every:
            if rule.pattern.ids is not None:
                ids.update((part, rule.pattern) for part in parts_of(rule.value))
        for rule in sorted(every, key=lambda rule: rule.pattern.ids is None):  # one expert's own tensor says it best
            if isinstance(rule.value, Part):
                is_stacked = rule.pattern.ids is None and rule.value.name in ids
                claims.setdefault(rule.value.name, rule.claim[1:] if is_stacked else rule.claim)
        for rule in every:
            for part in parts_of(rule.value):
                if part not in claims:
                    raise root.error(
                        f"part {part!r} has no tensor of its own in any layout, so its shape is unknown",
                        f'Add a line such as "... [I, H]": {part} to one layout.',
                    )
        return claims, ids

    def _components(self, root: Yaml) -> tuple[Component, ...]:
        groups: list[set[str]] = []
        order: list[str] = []
        for layout, rules in self.rules.items():
            named = [part for rule in rules for part in parts_of(rule.value)]
            if len(named) != len(set(named)):
                twice = sorted({part for part in named if named.count(part) > 1})
                raise root.error(f"layout {layout!r} holds {', '.join(twice)} twice", "Name each part once a layout.")
            order += [part for part in named if part not in order]
            for rule in rules:
                joined = set(parts_of(rule.value))
                touching = [group for group in groups if group & joined]
                groups = [group for group in groups if not group & joined] + [joined.union(*touching)]
        for layout, rules in self.rules.items():
            missing = set(order) - {part for rule in rules for part in parts_of(rule.value)}
            if missing:
                raise root.error(
                    f"layout {layout!r} does not say where {', '.join(sorted(missing))} is stored",
                    "Every layout holds every part; add the lines.",
                )
        groups = _with_same_block(groups, self.rules)
        return tuple(
            Component(
                tuple(part for part in order if part in group),
                {
                    layout: tuple(r for r in rules if set(parts_of(r.value)) <= group)
                    for layout, rules in self.rules.items()
                },
            )
            for group in sorted(groups, key=lambda group: min(order.index(part) for part in group))
        )


def _refuse_undecided(root: Yaml) -> None:
    """A recipe in which something is left to decide is none."""
    undecided = [node for node in root.scalars() if node.text() == UNDECIDED]
    if undecided:
        remedy = f"Write in place of {UNDECIDED} what the model's code says; comments above the line give the choices."
        raise RecipeError.of([Problem(f"{node.where}: not decided yet", remedy) for node in undecided])


def _with_same_block(groups: list[set[str]], rules: Mapping[str, Iterable[Rule]]) -> list[set[str]]:
    """Join groups of expert parts that share the place of their expert hole: gate+up and down are one family.

    Parts of one expert must have the same ids and the same layout, even where no tensor holds both.
    """
    stems: dict[str, str] = {}
    for layout_rules in rules.values():
        for rule in layout_rules:
            if rule.pattern.ids is not None:
                place_of = f"{rule.pattern.lead}|{rule.pattern.before}|{rule.pattern.ids.start}|{rule.pattern.ids.stop}"
                for part in parts_of(rule.value):
                    stems[part] = place_of
    joined: dict[str, set[str]] = {}
    alone: list[set[str]] = []
    for group in groups:
        stem: str | None = next((stems[part] for part in sorted(group) if part in stems), None)
        if stem is None:
            alone.append(group)
        else:
            joined.setdefault(stem, set()).update(group)
    return [*joined.values(), *alone]


def _rule(key: Yaml, value: Yaml) -> Rule:
    text = key.text()
    name, bracket, shape = text.partition(" [")
    if not bracket:
        raise key.error(f"{text!r} has no shape", 'Write "NAME [E, 2*I, H]".')
    try:
        pattern, claim = Pattern.parse(name.strip()), parse_shape("[" + shape)
    except (PatternError, DimSyntaxError) as error:
        raise key.error(str(error), 'Write "{block}.mlp.experts.{expert}.up_proj.weight [I, H]".') from None
    pad: Dim | None = None
    if value.is_mapping:
        entries = {k.text(): v for k, v in value.items()}
        if "pad" in entries:
            try:
                pad = parse_dim(entries["pad"].text())
            except DimSyntaxError as error:
                raise value.error(str(error), "Write how many experts are added, such as Z.") from None
            if pattern.ids is not None:
                raise value.error("pad is for a tensor that holds all experts, and this one holds one", "Remove pad.")
    return Rule(pattern, claim, _expression(value, is_top=True), pad, key.where)


def _expression(value: Yaml, *, is_top: bool = False) -> Expression:
    if not value.is_mapping:
        return Part(value.text())
    entries = {key.text(): (key, item) for key, item in value.items()}
    words = [word for word in entries if word in _OPS]
    for word, (key, _) in entries.items():
        if word not in (*_OPS, "axis") and not (is_top and word == "pad"):
            raise key.error(f"unknown op {word!r}.", nearest(word, _OPS))
    if len(words) != 1:
        raise value.error("expected one op", f"Known: {', '.join(_OPS)}.")
    item = entries[words[0]][1]
    axis = entries["axis"][1].integer() if "axis" in entries else 0
    if axis not in (0, -1):
        raise entries["axis"][1].error(
            f"axis {axis} is not allowed", "Use 0 (first) or -1 (last) of one expert's part."
        )
    if words[0] == "transpose":
        if "axis" in entries:
            raise entries["axis"][0].error("transpose has no axis", "It exchanges the last two axes.")
        return Transpose(_expression(item))
    children = tuple(_expression(child) for child in item.sequence())
    if len(children) < 2:
        raise item.error(f"{words[0]} needs two parts or more", "Write [gate, up].")
    return Concat(children, axis) if words[0] == "concat" else Interleave(children, axis)


def _rendered(reader: _Reader) -> str:
    """A file that says what the reader collected, without `extends`."""
    lines = [f"about: {quoted(reader.about)}", f"model_types: {_listed(reader.model_types)}"]
    lines.append(f"config: {_listed(reader.scopes)}")
    lines.append("dims:")
    lines += [f"  {symbol}: {_listed(keys)}" for symbol, keys in reader.dims.items()]
    lines.append(f"optional: {_listed(reader.optional)}")
    lines.append(f"forms: {_listed(reader.forms)}")
    lines += [f"decoded: {quoted(reader.decoded)}"] if reader.decoded else []
    lines.append(f"keep: {_listed(reader.keep)}")
    lines.append("layouts:")
    for layout, rules in reader.rules.items():
        lines.append(f"  {layout}:")
        for rule in rules:
            value = _worded(rule.value)
            if rule.pad is not None:
                value = f"{value[:-1]}, pad: {rule.pad}}}"
            lines.append(f"    {quoted(f'{rule.pattern} [{chr(44).join(map(str, rule.claim))}]')}: {value}")
    lines += [f"  {layout}: {target}" for layout, target in reader.aliases.items()]
    return "\n".join(lines) + "\n"


def _listed(words: Iterable[str]) -> str:
    return f"[{', '.join(map(quoted, words))}]"


def quoted(text: str) -> str:
    """Text as YAML, whatever stands in it."""
    return '"' + printable(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def printable(text: str) -> str:
    """Text on one line: what cannot be seen is written as YAML escapes it."""
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)


def _worded(value: Expression) -> str:
    if isinstance(value, Part):
        return quoted(value.name)
    if isinstance(value, Transpose):
        return f"{{transpose: {_worded(value.child)}}}"
    word = "concat" if isinstance(value, Concat) else "interleave"
    return f"{{{word}: [{', '.join(_worded(child) for child in value.children)}], axis: {value.axis}}}"


def _rehearse(recipe: Recipe, root: Yaml) -> None:
    """Give every symbol a size of its own and see whether all claims of all layouts agree."""
    symbols = sorted(
        {
            s
            for c in recipe.components
            for rules in c.rules.values()
            for r in rules
            for d in r.claim
            for s in d.symbols()
        }
        | {s for p in recipe.part_ids.values() if p.ids for d in (p.ids.start, p.ids.stop) for s in d.symbols()}
    )
    sizes = dict(zip(symbols, (4096 * prime for prime in (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)), strict=False))
    if len(sizes) < len(symbols):
        raise root.error(f"more than {len(sizes)} symbols", "Split the recipe.")
    shapes: dict[str, Shape] = {}
    for part, claim in recipe.part_claims.items():
        values = [dim.value(sizes) for dim in claim]
        shapes[part] = tuple(value for value in values if value is not None)
    for component in recipe.components:
        for rules in component.rules.values():
            for rule in rules:
                _rehearse_rule(rule, recipe, shapes, sizes)


def _rehearse_rule(rule: Rule, recipe: Recipe, shapes: Mapping[str, Shape], sizes: Mapping[str, int]) -> None:
    count = None
    if rule.pattern.ids is None:
        counts = {_count(recipe.part_ids.get(part), sizes) for part in parts_of(rule.value)}
        if len(counts) != 1:
            raise RecipeError(f"{rule.where}: joins parts of different numbers of experts", "Split the line.")
        count = counts.pop()
    try:
        shape = stored_shape(rule, recipe, shapes, count, (rule.pad.value(sizes) or 0) if rule.pad else 0)
    except ShapeError as error:
        raise RecipeError(f"{rule.where}: {error}", "Correct the op, its axis or a shape.") from None
    claimed = tuple(dim.value(sizes) for dim in rule.claim)
    if claimed != shape:
        raise RecipeError(
            f"{rule.where}: [{', '.join(map(str, rule.claim))}] is not the shape of what it is made of",
            "Correct the shape, the op or its axis: stacked tensors begin with the number of experts.",
        )


def _count(pattern: Pattern | None, sizes: Mapping[str, int]) -> int | None:
    if pattern is None or pattern.ids is None:
        return None
    stop, start = pattern.ids.stop.value(sizes), pattern.ids.start.value(sizes)
    return None if stop is None or start is None else stop - start
