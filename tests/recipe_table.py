"""The table of all recipes in `recipes/README.md`, made from the recipes: `python -m tests.recipe_table` writes it."""

from __future__ import annotations

from pathlib import Path

from moeconv.engines import engines, entries
from moeconv.forms import load_forms, movable_forms
from moeconv.recipe import Recipe
from moeconv.recipe_file import load_shipped, shipped_folder

README = Path(__file__).parents[1] / "recipes" / "README.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


def table() -> str:
    """One line for each recipe."""
    lines = [
        "| recipe | published | packed | one by one | forms of `forms.yaml` | engines | `model_type` |",
        "|---|---|---|---|---|---|---|",
    ]
    for recipe in load_shipped():
        cells = (
            recipe.name, "packed" if recipe.layout("hub") == "packed" else "one by one"
            if recipe.layout("hub") == "experts" else "in a layout of its own",
            _names(recipe, "packed"), _names(recipe, "experts"), _forms(recipe), _engines(recipe),
            ", ".join(recipe.model_types),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _names(recipe: Recipe, layout: str) -> str:
    """What stands behind the block in the names of experts' tensors."""
    names: dict[str, None] = {}
    for component in recipe.components:
        if any(part in recipe.part_ids for part in component.parts):
            for rule in component.rules.get(recipe.layout(layout), ()):
                names[f"{rule.pattern.before}{'*' + rule.pattern.after if rule.pattern.ids else ''}"] = None
    heads = {name.rpartition("experts.")[0] for name in names}
    short = [name.removeprefix(f"{head}experts.").removeprefix("*.") for head in heads for name in names]
    if len(heads) == 1 and all(f"experts.{'*.' if '*.' in name else ''}" in name for name in names):
        return ", ".join(f"`{name.removesuffix('.weight')}`" for name in short)
    return ", ".join(f"`{name}`" for name in names) or "no"


def _forms(recipe: Recipe) -> str:
    movable = movable_forms(recipe)
    others = [form.name for form in load_forms() if form.name not in movable]
    if not others:
        return "all"
    return f"all but {', '.join(others)}" if len(others) < len(movable) else ", ".join(movable) or "none"


def _engines(recipe: Recipe) -> str:
    """How many of the model types an engine was seen to read, of those tried, for each layout."""
    said = []
    for engine in engines():
        for layout in recipe.layouts:
            own = [e for e in entries() if e.engine == engine and e.layout == layout and not (e.forms or e.when)]
            read, tried = (
                {name for e in own if e.reads in reads for name in e.model_types & set(recipe.model_types)}
                for reads in (("yes",), ("yes", "no"))
            )
            if tried:
                said.append(f"{engine} {layout} {len(read)} of {len(tried)}")
    return ", ".join(said) or "not tried"


def with_table(text: str) -> str:
    """The text of a README with the table in its place."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{README}: {len(load_shipped())} recipes of {shipped_folder()}")
