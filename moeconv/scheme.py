"""Which matrix gets which format, and why.

A scheme is ordered rules; the first that names a matrix decides. What no rule names is kept where it is listed as
never to be quantized or is no linear layer that engines know, and gets the default format otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase, translate
from typing import Any, NamedTuple

from moeconv.errors import Problem, RecipeError, UsageError
from moeconv.formats import FAMILY_FORMATS, FORMATS, Format, format_name, make_format
from moeconv.recipe_file import recipe_text, shipped_folder
from moeconv.yamldoc import Yaml, nearest, read_yaml

_KEYS = ("about", "extends", "quantize")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class FormatRule(NamedTuple):
    """Matrices whose name or module name fits `pattern` get `format`, or are kept where it is None.

    `where` says where the rule comes from, for messages.
    """

    pattern: str
    format: Format | None
    where: str

    def names(self, module: str) -> bool:
        return fnmatchcase(module, self.pattern) or fnmatchcase(f"{module}.weight", self.pattern)


class Scheme(NamedTuple):
    """A whole quantization, as the user asked for it.

    Attributes:
        rules: in order, the first that fits decides.
        default: format of experts and other linear layers that no rule names; None to keep them.
        only: patterns; nothing else is quantized. Empty for no limit.
        dtype: float32 matrices are rounded to this dtype before; None to take them as they are.
        allow_nonfinite: NaN and infinities count as zero.
        text: what decides, for fingerprint and manifest.
        keeps_experts: experts stay as they are, whatever else is said.
    """

    rules: tuple[FormatRule, ...]
    default: Format | None
    only: tuple[str, ...]
    dtype: str | None
    allow_nonfinite: bool
    text: str
    keeps_experts: bool = False


class Decision(NamedTuple):
    """The format of a matrix, None to keep it; why; and whether the user named it."""

    format: Format | None
    why: str
    is_named: bool = False


class Defaults(NamedTuple):
    """`recipes/quantize.yaml`."""

    keep: tuple[str, ...]
    linear: frozenset[str]
    together: tuple[tuple[str, ...], ...]


def load_defaults() -> Defaults:
    """What is quantized where the user says nothing."""
    path = shipped_folder() / "quantize.yaml"
    root = {key.text(): value for key, value in read_yaml(path.read_text(encoding="utf-8"), str(path)).items()}
    return Defaults(
        tuple(root["keep"].texts()),
        frozenset(root["linear"].texts()),
        tuple(tuple(item.texts()) for item in root["together"].sequence()),
    )


def parse_format(name: str, options: Mapping[str, Any], where: str) -> Format:
    """A format from its name and options as typed.

    Raises:
        UsageError: unknown, or an option that the format does not take.
    """
    known = format_name(name)
    every = {**FORMATS, **FAMILY_FORMATS}
    if known not in every:
        raise UsageError(f"{where} {name!r} is no format", nearest(known, every))
    takes = every[known][1]
    options = {
        option: format_name(value)
        if isinstance(every[known][1].get(option), tuple) and isinstance(value, str)
        else value
        for option, value in options.items()
    }
    for option, value in options.items():
        if option not in takes:
            own = ", ".join(option_as_given(other, where) for other in takes)
            remedy = f"It takes {own}." if takes else "It takes no options."
            raise UsageError(f"{where} {name} takes no {option_as_given(option, where)}", remedy)
        words = takes[option]
        if isinstance(words, tuple) and value not in words:
            what = "no way to choose scales" if option == "search" else f"unknown for {option_as_given(option, where)}"
            raise UsageError(f"{where} {name}: {value!r} is {what}", f"Known: {', '.join(words)}.")
        if option == "group_size" and (not isinstance(value, int) or value < 8 or value % 8):
            raise UsageError(f"{where} {name}: a group of {value} columns cannot be packed", "Take 32, 64 or 128.")
    return make_format(known, dict(options))


def option_as_given(option: str, where: str) -> str:
    """An option of a format as it is written on the command line, where it stands there, else as in a recipe."""
    return f"--{'scale' if option == 'search' else option.replace('_', '-')}" if where.startswith("--") else option


def read_rules(text: str, source: str) -> tuple[tuple[FormatRule, ...], str | None] | None:
    """Rules of a user's recipe: `quantize:` with a list of `{match: PATTERN, format: NAME, OPTION: VALUE}`.

    Returns:
        The rules, and the recipe of the layouts where `extends:` names one; None for a recipe of layouts.

    Raises:
        RecipeError: with the line that is wrong.
    """
    root = read_yaml(text, source)
    rules: list[FormatRule] = []
    extends: str | None = None
    if not root.is_mapping or all(key.text() != "quantize" for key, _ in root.items()):
        return None
    for key, value in root.items():
        if key.text() not in _KEYS:
            raise key.error(f"unknown key {key.text()!r}", nearest(key.text(), _KEYS))
        if key.text() == "quantize":
            rules += [_rule(item) for item in value.sequence()]
        if key.text() == "extends":
            extends = value.text()
    if not rules:
        raise root.error("there are no rules", "Write `quantize:` and below it lines of {match: ..., format: ...}.")
    return tuple(rules), extends


def _rule(item: Yaml) -> FormatRule:
    values = {key.text(): (key, value) for key, value in item.items()}
    for needed in ("match", "format"):
        if needed not in values:
            raise item.error(f"a rule needs {needed!r}", "Write {match: PATTERN, format: NAME or keep}.")
    pattern, name = values.pop("match")[1].text(), values.pop("format")[1].text()
    if format_name(name) == "keep":
        for key, _ in values.values():
            raise key.error(f"keep takes no {key.text()}", "Remove it.")
        return FormatRule(pattern, None, item.where)
    options: dict[str, Any] = {}
    for word, (_, value) in values.items():
        kind = FORMATS.get(format_name(name), (None, {}))[1].get(word)
        if kind is bool:
            if value.text() not in ("true", "false"):
                raise value.error(f"{word} is true or false", "Write one of them.")
            options[word] = value.text() == "true"
        else:
            options[word] = value.integer() if kind is int else value.text()
    try:
        made = parse_format(name, options, "format")
    except UsageError as error:
        raise RecipeError(f"{item.where}: {error.problems[0].message}", error.problems[0].remedy) from None
    return FormatRule(pattern, made, item.where)


def build_scheme(
    name: str | None, options: Mapping[str, Any], recipe: str | None, ignore: Sequence[str], only: Sequence[str],
    dtype: str | None, allow_nonfinite: bool, keeps_experts: bool = False,
) -> tuple[Scheme, str | None]:  # fmt: skip
    """A scheme from the command line, and the recipe of the layouts where one is named.

    Args:
        name: `--format`.
        options: of that format.
        recipe: `--recipe`: a file with rules, or a recipe of layouts.
        ignore: patterns to keep, before all rules.
        only: patterns outside of which nothing is quantized.
        dtype: for float32 matrices, a safetensors name.
        allow_nonfinite: NaN and infinities count as zero.
        keeps_experts: experts stay as they are.

    Raises:
        UsageError: neither a format nor rules, or a format or option that does not exist.
        RecipeError: rules that cannot be read.
    """
    text, layouts = "", recipe
    if recipe is not None:
        content, path = recipe_text(recipe)
        read = read_rules(content, str(path))
        if read is not None:
            text, layouts = content, read[1]
    if name is None and not text:
        known = ", ".join({**FORMATS, **FAMILY_FORMATS})
        raise UsageError("neither --format nor --recipe says what to quantize to", f"Formats: {known}.")
    if name is None and options:
        raise UsageError("options of a format without --format", "Write them into the recipe, or add --format.")
    said = {
        "format": name and format_name(name), "options": dict(options), "rules": text, "ignore": list(ignore),
        "only": list(only), "dtype": dtype, "allow_nonfinite": allow_nonfinite,
        **({"keeps_experts": True} if keeps_experts else {}),
    }  # fmt: skip
    return scheme_of(said, recipe or ""), layouts


def scheme_of(said: Mapping[str, Any], where: str = "rules") -> Scheme:
    """A scheme from what `Scheme.text` holds, which is how a manifest keeps it.

    Args:
        said: the content.
        where: where rules come from, for messages.

    Raises:
        UsageError: a format or option that does not exist.
        RecipeError: rules that cannot be read.
    """
    if not _is_sensible(said):
        raise RecipeError(f"{where}: moeconv.json says nothing sensible about formats", "Convert again.")
    rules = [FormatRule(pattern, None, "--ignore") for pattern in said["ignore"]]
    read = read_rules(said["rules"], where) if said["rules"] else None
    rules += read[0] if read else ()
    name = said["format"]
    default = parse_format(name, said["options"], "--format") if name is not None else None
    return Scheme(
        tuple(rules), default, tuple(said["only"]), said["dtype"], said["allow_nonfinite"],
        json.dumps(said, sort_keys=True), bool(said.get("keeps_experts")),
    )  # fmt: skip


def _is_sensible(said: Mapping[str, Any]) -> bool:
    """Whether everything is there and of its kind; the words themselves are checked where they are used."""
    lists, options = [said.get("ignore"), said.get("only")], said.get("options")
    return (
        all(isinstance(words, Sequence) and all(isinstance(word, str) for word in words) for words in lists)
        and isinstance(said.get("rules"), str)
        and isinstance(options, Mapping)
        and all(isinstance(value, str | int) for value in options.values())
        and all(said.get(key) is None or isinstance(said[key], str) for key in ("format", "dtype"))
        and isinstance(said.get("allow_nonfinite"), bool)
    )


class _Patterns:
    """Patterns asked for tens of thousands of names that fit none. Most are the end of a name, or a word of it."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = patterns = [pattern for pattern in patterns if pattern]
        self._ends = tuple(pattern[1:] for pattern in patterns if _is_plain(pattern[1:]) and pattern[0] == "*")
        self._words = [p[1:-1] for p in patterns if p[0] == p[-1] == "*" and _is_plain(p[1:-1])]
        others = [p for p in patterns if p[1:] not in self._ends and p[1:-1] not in self._words]
        self._others = re.compile("|".join(map(translate, others)) or r"\b\B")

    def first(self, name: str) -> str | None:
        """The first pattern that fits a name."""
        if (
            name.endswith(self._ends)
            or any(word in name for word in self._words)
            or self._others.match(name) is not None
        ):
            return next((pattern for pattern in self._patterns if fnmatchcase(name, pattern)), None)
        return None


def _is_plain(text: str) -> bool:
    return bool(text) and not set("*?[") & set(text)


class Decider:
    """Decides matrix by matrix, and knows in the end which rules decided nothing."""

    def __init__(self, scheme: Scheme, keep: Sequence[str], layers: int | None) -> None:
        self._scheme = scheme
        defaults = load_defaults()
        self._linear = defaults.linear
        self._together = defaults.together
        self._keep = _Patterns((*defaults.keep, *keep))
        self._layers = layers
        self._used: set[FormatRule | str] = set()

    def decide(self, module: str, *, is_expert: bool) -> Decision:
        """The format of `module`'s matrix.

        Args:
            module: its name without `.weight`.
            is_expert: it is a part of an expert.
        """
        scheme = self._scheme
        if is_expert and scheme.keeps_experts:
            return Decision(None, "kept by --experts keep", True)
        for rule in scheme.rules:
            if rule.names(module):
                self._used.add(rule)
                what = f"rule {rule.pattern!r} ({rule.where})"
                if rule.format is None or self._is_wanted(module):
                    return Decision(rule.format, what, True)
        if not self._is_wanted(module):
            return Decision(None, "not named by --only", True)
        if is_expert:
            return Decision(scheme.default, "expert")
        layer = _LAYER.search(module)
        if layer and self._layers is not None and int(layer[1]) >= self._layers:
            return Decision(None, f"layer {layer[1]} is beyond the model's {self._layers} (it predicts further tokens)")
        if scheme.default is not None and scheme.default.experts_only:
            return Decision(None, f"only experts can be {scheme.default.name}")
        kept = self.kept(module)
        if kept is not None:
            return Decision(None, f"kept by default: {kept}")
        if module.rsplit(".", 1)[-1] in self._linear:
            return Decision(scheme.default, "linear layer")
        return Decision(None, "not known as a linear layer that engines quantize")

    def _is_wanted(self, module: str) -> bool:
        if not self._scheme.only:
            return True
        fits = [pattern for pattern in self._scheme.only if FormatRule(pattern, None, "").names(module)]
        self._used.update(fits)
        return bool(fits)

    def kept(self, module: str) -> str | None:
        """The pattern by which a module that is no expert is kept by default."""
        return self._keep.first(module)

    def partners(self, module: str) -> list[str]:
        """Modules that engines fuse with this one, itself included."""
        head, _, last = module.rpartition(".")
        return [f"{head}.{name}" for group in self._together if last in group for name in group]

    def unused(self) -> list[Problem]:
        """Rules and patterns that named no matrix."""
        problems = [
            Problem(f"{rule.where}: {rule.pattern!r} names no matrix", "Correct the pattern, or remove the rule.")
            for rule in self._scheme.rules
            if rule not in self._used
        ]
        problems += [
            Problem(f"--only {pattern!r} names no matrix", "Correct it: patterns are whole names with * for any text.")
            for pattern in self._scheme.only
            if pattern not in self._used
        ]
        return problems
