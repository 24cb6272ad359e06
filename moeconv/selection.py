"""Which recipe a checkpoint needs: the user's, the one it was made with, or the one for its model_type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from moeconv.checkpoint import Checkpoint
from moeconv.errors import PlanError
from moeconv.forms import with_forms
from moeconv.layouts import Found, find_units
from moeconv.manifest import recipe_of
from moeconv.names import holes, template_of
from moeconv.recipe import Recipe
from moeconv.recipe_file import load_recipe, load_shipped, shipped_folder
from moeconv.units import layout_lines
from moeconv.yamldoc import read_yaml


def select_recipe(source: Checkpoint, given: str | None = None, layout: str | None = None) -> Recipe:
    """The recipe to use, with the forms in which the checkpoint may hold quantized experts.

    Args:
        source: the checkpoint.
        given: `--recipe`, a shipped name or a path; wins over everything.
        layout: `--layout`, to tell apart recipes of one model_type.

    Raises:
        PlanError: none, with those that would fit.
        RecipeError: the given one does not exist or hold together.
    """
    return with_forms(_select(source, given, layout), source)


def _select(source: Checkpoint, given: str | None, layout: str | None) -> Recipe:
    if given is not None:
        return load_recipe(given)
    made_with = recipe_of(source.manifest)
    if made_with is not None:
        return made_with
    for model_type in model_types(source.config):
        named = [recipe for recipe in load_shipped(model_type) if model_type in recipe.model_types]
        if len(named) == 1:
            return named[0]
        if named:
            return max(named, key=lambda recipe: _fit(find_units(source, recipe, _known(recipe, layout))))
    for model_type in model_types(source.config):
        if model_type in _unsupported():
            raise PlanError(
                f"{source.root}: experts of {model_type} cannot be packed: {_unsupported()[model_type]}",
                "Load the folder as it is; moeconv has nothing to do with it.",
            )
    names = fitting(sample_of(source), source, layout=layout)
    types = ", ".join(model_types(source.config)) or "nothing"
    raise PlanError(
        f"no recipe is for the model_type of {source.root} (config.json says {types})",
        f"Names and shapes fit {' and '.join(names)}: if the model computes like that, add --recipe NAME."
        if names
        else f"Write a recipe for it (`moeconv recipes new {source.root}` proposes one) and give it with --recipe.",
    )


@cache
def _unsupported() -> dict[str, str]:
    """Why the experts of some families cannot be packed, by `model_type`: `recipes/unsupported.yaml`."""
    path = shipped_folder() / "unsupported.yaml"
    root = {key.text(): value for key, value in read_yaml(path.read_text(encoding="utf-8"), str(path)).items()}
    entries = [{key.text(): value for key, value in item.items()} for item in root["families"].sequence()]
    return {name: entry["why"].text() for entry in entries for name in entry["model_types"].texts()}


def fitting(*held: Checkpoint, layout: str | None = None) -> list[str]:
    """Names of the shipped recipes that names and shapes fit, of those published like that where there are any.

    Args:
        held: the checkpoint; before it, what rules most recipes out in less time, such as a sample.
        layout: `--layout`.
    """
    clean: dict[str, tuple[Recipe, Found]] = {}
    for recipe in load_shipped():
        for source in held:
            formed = with_forms(recipe, source)
            found = find_units(source, formed, _known(recipe, layout))
            if not _is_clean(found):
                break
        else:
            clean[recipe.name] = formed, found
    published = [name for name, (recipe, found) in clean.items() if _is_published(found, recipe)]
    return published or list(clean)


def sample_of(source: Checkpoint) -> Checkpoint:
    """The checkpoint with one block of each kind: those behind the first number of names that hold the same tensors."""
    blocks: dict[tuple[str, int], list[tuple[str, str]]] = {}
    kept: set[str] = set()
    for name in source.tensors:
        before, number, tail = next(holes(name), (name, 0, ""))
        blocks.setdefault((before, number), []).append((name, tail))
    kinds: set[tuple[str, int, frozenset[str]]] = set()
    for (before, _), names in blocks.items():
        kind = before, len(names), frozenset(template_of(tail) for _, tail in names)
        if kind not in kinds:
            kinds.add(kind)
            kept.update(name for name, _ in names)
    return source._replace(tensors={name: tensor for name, tensor in source.tensors.items() if name in kept})


def _is_published(found: Found, recipe: Recipe) -> bool:
    """The experts are stored as the recipe's families are published, not in another of its layouts."""
    hub = recipe.layout("hub")
    return all(layout_lines(u.component, u.layout) == layout_lines(u.component, hub) for u in found.units)


def _known(recipe: Recipe, layout: str | None) -> str | None:
    return layout if layout in recipe.layouts else None


def _is_clean(found: Found) -> bool:
    return bool(found.units) and not found.problems


def _fit(found: Found) -> tuple[bool, int, int]:
    return _is_clean(found), len(found.units), -len(found.problems)


def model_types(config: Mapping[str, Any]) -> list[str]:
    """Every `model_type` of config.json, the top one first, then those of nested configs."""
    return list(dict.fromkeys(_types(config)))


def _types(config: Mapping[str, Any]) -> Iterator[str]:
    value = config.get("model_type")
    if isinstance(value, str) and value:
        yield value
    for nested in config.values():
        if isinstance(nested, Mapping):
            yield from _types(nested)
