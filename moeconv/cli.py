"""The command line: commands that look, and all others, whose modules are imported in the order of the help.

Exit codes: 0 done or already up to date, 1 cannot, 2 the command line is wrong, 130 interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeconv import __version__, cli_layouts, cli_quantize
from moeconv.commands import app, print_json, recipes_app
from moeconv.options import Command, JobsOption, JsonOption, LayoutOption, RecipeOption, Source, check_layouts
from moeconv.process import run_process

__all__ = ["app", "cli_layouts", "cli_quantize", "main"]


@app.command(cls=Command)
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DST", help="Folder to check.")],
    against: Annotated[
        Path | None, typer.Option("--against", help="The folder it was made from.", metavar="SRC")
    ] = None,
    recipe: RecipeOption = None,
    layout: LayoutOption = None,
    jobs: JobsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a folder's structure, and with --against every byte. Exit code 1 names what is off."""
    from moeconv.checkpoint import open_checkpoint
    from moeconv.errors import VerifyError
    from moeconv.explain import size
    from moeconv.verify import verify_folder

    check_layouts(None, layout)
    report = verify_folder(open_checkpoint(folder), against, recipe, layout, jobs)
    if as_json:
        print_json(report.json())
        if report.problems:
            raise typer.Exit(1)
        return
    if report.problems:
        raise VerifyError.of(report.problems)
    compared = f", {size(report.compared_nbytes)} equal byte for byte to {against}" if against else ""
    print(f"{folder}: {report.tensors:,} tensors, structure right{compared}")


@app.command(cls=Command)
def inspect(
    source: Source, recipe: RecipeOption = None, layout: LayoutOption = None, as_json: JsonOption = False
) -> None:
    """Show family, layout by layer range, experts, dtypes, quantization and sizes."""
    from moeconv.checkpoint import open_checkpoint
    from moeconv.errors import PlanError
    from moeconv.inspect import inspect_json, inspect_text
    from moeconv.selection import select_recipe

    check_layouts(None, layout)
    checkpoint = open_checkpoint(source)
    try:
        found = select_recipe(checkpoint, recipe, layout)
    except PlanError:
        found = None  # a family without a recipe can still be looked at
    report = inspect_json(checkpoint, found, layout)
    print_json(report) if as_json else print(inspect_text(report))


@recipes_app.command("list", cls=Command)
def recipes_list(as_json: JsonOption = False) -> None:
    """All shipped recipes."""
    from moeconv.recipe_file import load_shipped

    recipes = load_shipped()
    if as_json:
        listed = [{"name": r.name, "about": r.about, "model_types": list(r.model_types)} for r in recipes]
        print_json({"schema_version": 1, "recipes": listed})
        return
    for recipe in recipes:
        print(f"{recipe.name}\n    {recipe.about}\n    for {', '.join(recipe.model_types)}")


@recipes_app.command("show", cls=Command)
def recipes_show(name: Annotated[str, typer.Argument(metavar="NAME", help="Recipe name or file.")]) -> None:
    """Print a recipe's file."""
    from moeconv.recipe_file import recipe_text

    print(recipe_text(name)[0], end="")


@recipes_app.command("new", cls=Command)
def recipes_new(source: Source) -> None:
    """Propose a recipe for an unknown checkpoint from its headers; DECIDE stands where they do not tell."""
    from moeconv.checkpoint import open_checkpoint
    from moeconv.propose import propose

    print(propose(open_checkpoint(source)), end="")


@recipes_app.command("check", cls=Command)
def recipes_check(file: Annotated[str, typer.Argument(metavar="FILE", help="Recipe file or name.")]) -> None:
    """Check a recipe file: words, shapes, and that its layouts agree with each other."""
    from moeconv.forms import check_forms
    from moeconv.recipe_file import load_recipe

    recipe = load_recipe(file)
    check_forms(recipe)
    parts = ", ".join(part for component in recipe.components for part in component.parts)
    print(f"{file}: layouts {', '.join(recipe.layouts)}; parts {parts}")


def _print_version(value: bool) -> None:
    if value:
        print(f"moeconv {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    run_process(app)
