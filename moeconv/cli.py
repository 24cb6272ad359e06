"""The command line: commands that look, and all others, whose modules are imported in the order of the help.

Exit codes: 0 done or already up to date, 1 cannot, 2 the command line is wrong, 130 interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moeconv import __version__, cli_layouts, cli_quantize
from moeconv.commands import app, print_json, recipes_app
from moeconv.options import (
    AgainstOption,
    Command,
    CompareOption,
    DeviceOption,
    JobsOption,
    JsonOption,
    LayoutOption,
    MemoryOption,
    RecipeOption,
    SampleOption,
    SeedOption,
    Source,
    StructureOption,
    check_layouts,
    parse_comparison,
    parse_size,
)
from moeconv.process import run_process

__all__ = ["app", "cli_layouts", "cli_quantize", "main"]


@app.command(cls=Command)
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DST", help="Folder to check.")],
    against: AgainstOption = None, by: CompareOption = None, structure: StructureOption = False,
    sample: SampleOption = None, seed: SeedOption = 0, recipe: RecipeOption = None, layout: LayoutOption = None,
    jobs: JobsOption = None, max_memory: MemoryOption = None, device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Check a folder: its structure, all of its numbers, and with --against that they are those of SRC.

    Headers, config.json and moeconv.json take a second whatever the size (--structure stops there). Then every byte of
    DST is read once and decoded, 30 to 50 MB/s a core: an hour for a terabyte on eight; --sample 1% spreads a hundredth
    of that over layers and experts. --against reads SRC as well, and encodes it again. Exit code 1 names what is off.
    """
    from moeconv.checkpoint import open_checkpoint
    from moeconv.errors import VerifyError
    from moeconv.report import report_text
    from moeconv.sample import parse_sample
    from moeconv.verify import Request, verify_folder

    check_layouts(None, layout)
    request = Request(
        against, recipe, layout, parse_comparison(by, against), device, jobs,
        parse_size(max_memory, "--max-memory") if max_memory is not None else None,
        parse_sample(sample, seed) if sample is not None else None, structure,
    )  # fmt: skip
    report = verify_folder(open_checkpoint(folder), request)
    if as_json:
        print_json(report.json())
        if report.problems:
            raise typer.Exit(1)
        return
    for note in report.notes:
        print(f"moeconv: note: {note}", file=sys.stderr)
    if report.problems:
        raise VerifyError.of(report.problems)
    print(report_text(report, folder, against))


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
    from moeconv.errors import escaped
    from moeconv.recipe_file import recipe_text

    print("\n".join(map(escaped, recipe_text(name)[0].split("\n"))), end="")


@recipes_app.command("new", cls=Command)
def recipes_new(source: Source) -> None:
    """Propose a recipe for an unknown checkpoint from its headers; DECIDE stands where they do not tell."""
    from moeconv.checkpoint import open_checkpoint
    from moeconv.errors import escaped
    from moeconv.propose import propose

    print("\n".join(map(escaped, propose(open_checkpoint(source)).split("\n"))), end="")


@recipes_app.command("check", cls=Command)
def recipes_check(file: Annotated[str, typer.Argument(metavar="FILE", help="Recipe file or name.")]) -> None:
    """Check a recipe file: words, shapes, and that its layouts agree with each other."""
    from moeconv.errors import shown
    from moeconv.forms import check_forms
    from moeconv.recipe_file import load_recipe

    recipe = load_recipe(file)
    check_forms(recipe)
    parts = ", ".join(part for component in recipe.components for part in component.parts)
    print(shown(f"{file}: layouts {', '.join(recipe.layouts)}; parts {parts}"))


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
