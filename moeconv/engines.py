"""Which inference engine reads which layout of which family: data from `recipes/engines.yaml`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

from moeconv.recipe import Recipe
from moeconv.recipe_file import shipped_folder
from moeconv.tensors import Shape
from moeconv.yamldoc import Yaml, nearest, read_yaml

#: What `when` can say: a matrix of an expert is square, so that no shape tells its axes apart; experts have several
#: formats; some are quantized and some are not.
MIXED, KEPT = "mixed experts", "kept experts"
_WHEN = ("square experts", MIXED, KEPT)
_KEYS = ("engine", "layout", "forms", "formats", "model_types", "when", "reads", "why")


class Reading(NamedTuple):
    """Whether an engine reads a result: `reads` is yes, no or unknown; `why` how that is known."""

    engine: str
    reads: str
    why: str


class _Entry(NamedTuple):
    engine: str
    layout: str
    forms: frozenset[str]
    formats: frozenset[str]
    model_types: frozenset[str]  # empty for all that no other entry names
    when: str  # empty, or what a checkpoint must be for the entry to speak of it
    reads: str
    why: str


@cache
def _entries() -> tuple[tuple[str, ...], tuple[_Entry, ...]]:
    path = shipped_folder() / "engines.yaml"
    root = {key.text(): value for key, value in read_yaml(path.read_text(encoding="utf-8"), str(path)).items()}
    known = tuple(f"{name.text()} {version.text()}" for name, version in root["engines"].items())
    return known, tuple(_entry(item) for item in root["entries"].sequence())


def _entry(item: Yaml) -> _Entry:
    values = {}
    for key, value in item.items():
        if key.text() not in _KEYS:
            raise key.error(f"unknown key {key.text()!r}", nearest(key.text(), _KEYS))
        values[key.text()] = value
    when = values.get("when")
    if when is not None and when.text() not in _WHEN:
        raise when.error(f"{when.text()!r} is no condition", nearest(when.text(), _WHEN))
    return _Entry(
        values["engine"].text(), values["layout"].text() if "layout" in values else "",
        frozenset(values["forms"].texts() if "forms" in values else ()),
        frozenset(values["formats"].texts() if "formats" in values else ()),
        frozenset(values["model_types"].texts() if "model_types" in values else ()),
        values["when"].text() if "when" in values else "", values["reads"].text(), values["why"].text(),
    )  # fmt: skip


def engines() -> tuple[str, ...]:
    """Names of the engines that the table knows."""
    return tuple(engine.split()[0] for engine in _entries()[0])


def entries() -> tuple[_Entry, ...]:
    """All entries of the table, for the tests that hold them."""
    return _entries()[1]


def model_type_of(config: Mapping[str, Any]) -> str:
    """`model_type` of config.json, or an empty text."""
    value = config.get("model_type")
    return value if isinstance(value, str) else ""


def readings(
    recipe: Recipe, config: Mapping[str, Any], layout: str, experts: Iterable[Shape] = (), forms: Collection[str] = ()
) -> tuple[Reading, ...]:
    """What each known engine makes of a family's checkpoint in a layout.

    Args:
        recipe: of the family.
        config: config.json.
        layout: the layout.
        experts: shapes of the experts' tensors.
        forms: how quantized experts are stored where they are not one by one (then see `format_readings`).
    """
    known, table = _entries()
    model_type = model_type_of(config)
    wanted = {layout, recipe.layout(layout)} | {
        name for name in recipe.aliases if recipe.layout(name) == recipe.layout(layout)
    }
    has_square = any(len(shape) > 1 and shape[-1] == shape[-2] for shape in experts)
    result = []
    for engine in known:
        fitting = [e for e in table if e.engine == engine.split()[0] and e.layout in wanted and set(forms) <= e.forms]
        fitting = [e for e in fitting if bool(e.forms) == bool(forms)]
        about = [e for e in fitting if model_type in e.model_types and (has_square or not e.when)]
        entry = next((e for e in about if e.when), about[0] if about else None)
        result.append(Reading(engine, entry.reads, entry.why) if entry else Reading(engine, "unknown", "not tried"))
    return tuple(result)


def format_readings(
    config: Mapping[str, Any], formats: Collection[str], conditions: Collection[str] = ()
) -> tuple[Reading, ...]:
    """What each known engine makes of a family's checkpoint quantized in these formats: the worst of them.

    Args:
        config: config.json.
        formats: their names.
        conditions: `MIXED` or `KEPT`, where experts are so.
    """
    known, table = _entries()
    model_type = model_type_of(config)
    result = []
    for engine in known:
        found = [
            next(
                (
                    Reading(engine, entry.reads, entry.why)
                    for entry in table
                    if entry.engine == engine.split()[0]
                    and name in entry.formats
                    and (model_type in entry.model_types or not entry.model_types)
                    and entry.when == when
                ),
                Reading(engine, "unknown", "not tried"),
            )
            for name in formats
            for when in ("", *conditions)
        ]
        result.append(min(found, key=lambda reading: ("no", "unknown", "yes").index(reading.reads)))
    return tuple(result)
