"""The command line. Everything that is printed is printed here; results go to stdout, the rest to stderr.

Exit codes: 0 done or already up to date, 1 cannot, 2 the command line is wrong, 130 interrupted.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import typer.core

from moeconv import __version__
from moeconv.errors import MoeconvError, UsageError

if TYPE_CHECKING:
    from moeconv.plan import Plan


class _Plain:
    """Converts what the command line gives for text, paths and lists of text; the rest it leaves to typer.

    typer checks values with pydantic, whose import takes 0.15 s, a third of what a command needs to start.
    """

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        if value is None:
            return () if param.multiple else None
        annotation = param.type_descriptor.annotation
        if annotation is str:
            return value
        if annotation is Path:
            return Path(value)
        if annotation == list[str]:
            return list(value)
        param._runtime_param = None  # typer makes its own
        return param.get_runtime_param().coerce(value, param=param, ctx=ctx)


class _Command(typer.core.TyperCommand):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _convert_plainly(self.params)


class _Group(typer.core.TyperGroup):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _convert_plainly(self.params)


def _convert_plainly(params: Sequence[Any]) -> None:
    for param in params:
        param._runtime_param = _Plain()  # a typer that does not know the attribute converts as ever


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help needs no rich: half the start-up time
    help="Convert Mixture-of-Experts checkpoints, file to file. Memory stays small whatever the model's size.",
    epilog="Exit codes: 0 done or already up to date, 1 cannot, 2 wrong command line, 130 interrupted.",
)
plan_app = typer.Typer(
    cls=_Group, no_args_is_help=True, rich_markup_mode=None, help="Show what a command would do, from headers alone."
)
recipes_app = typer.Typer(cls=_Group, no_args_is_help=True, rich_markup_mode=None, help="List, show and check recipes.")
app.add_typer(plan_app, name="plan")
app.add_typer(recipes_app, name="recipes")

INTERRUPTED = 130
_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}B": size for unit, size in _UNITS.items() if len(unit) == 1 and unit != "B"}
_UNITS |= {f"{unit}iB": 1024**power for power, unit in enumerate("KMGT", 1)}

Source = Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint folder: config.json and *.safetensors.")]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="Folder to make; it exists only when it is complete.")]
OptionalDestination = Annotated[
    Path | None, typer.Argument(metavar="[DST]", help="Where it would be written, to measure free space there.")
]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", help="Shipped recipe by name, or a file.", metavar="NAME|FILE")
]
LayoutOption = Annotated[
    str | None, typer.Option("--layout", help="Layout of SRC, where shapes do not tell.", metavar="hub|packed|experts")
]
ToOption = Annotated[str, typer.Option("--to", help="Layout to convert to.", metavar="hub|packed|experts")]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--include", help="A safetensors file in SRC that no index names but that belongs to the model. Repeatable."
    ),
]
ShardOption = Annotated[
    str, typer.Option("--max-shard-size", help="Largest weight file, unless one tensor is larger.", metavar="SIZE")
]
JobsOption = Annotated[int | None, typer.Option("--jobs", min=1, help="Threads. Default: one a core, at most 8.")]
MemoryOption = Annotated[
    str | None, typer.Option("--max-memory", help="Most host memory to use, such as 500MB.", metavar="SIZE")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
NoFsyncOption = Annotated[
    bool, typer.Option("--no-fsync", help="Do not wait for the disk: a power loss may damage a finished DST.")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace a DST that moeconv made, or discard an unfinished run.")
]


def parse_size(text: str, option: str) -> int:
    """Bytes of `5GB`, `512MiB` or `1000000`.

    Raises:
        UsageError: not a size above zero.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", text)
    unit = next((unit for unit in _UNITS if match and unit.lower() == match[2].lower()), None)
    nbytes = int(float(match[1]) * _UNITS[unit]) if match and unit is not None else 0
    if nbytes <= 0:
        raise UsageError(f"{option} {text!r} is not a size", "Write a number with a unit: 500MB, 4GiB.")
    return nbytes


def _check_layouts(to: str | None, layout: str | None) -> None:
    from moeconv.recipe import LAYOUTS

    for option, value in (("--to", to), ("--layout", layout)):
        if value is not None and value not in LAYOUTS:
            raise UsageError(f"{option} {value!r} is no layout", f"Known: {', '.join(LAYOUTS)}.")


def _make_plan(
    source: Path,
    to: str,
    recipe: str | None,
    layout: str | None,
    include: Sequence[str] | None,
    max_shard_size: str,
    jobs: int | None,
    max_memory: str | None,
) -> Plan:
    from moeconv.checkpoint import open_checkpoint
    from moeconv.plan import Options, plan
    from moeconv.selection import select_recipe

    _check_layouts(to, layout)
    options = Options(
        max_shard_nbytes=parse_size(max_shard_size, "--max-shard-size"),
        jobs=jobs,
        max_memory=parse_size(max_memory, "--max-memory") if max_memory is not None else None,
        layout=layout,
        include=tuple(include or ()),
    )
    checkpoint = open_checkpoint(source, include=options.include)
    return plan(checkpoint, select_recipe(checkpoint, recipe, layout), to, options)


def _show_plan(made: Plan, destination: Path, *, as_json: bool) -> None:
    from moeconv.explain import disk_of, plan_json, plan_text

    disk = disk_of(made, destination)
    _print_json(plan_json(made, disk)) if as_json else print(plan_text(made, disk))


def _run(made: Plan, destination: Path, *, fsync: bool, overwrite: bool, as_json: bool) -> None:
    from moeconv.executor import execute
    from moeconv.explain import count, size
    from moeconv.progress import Progress

    for warning in made.warnings:
        print(f"moeconv: warning: {warning}", file=sys.stderr)
    with Progress() as progress:
        outcome = execute(
            made, destination, sys.argv[1:], fsync=fsync, overwrite=overwrite, progress=progress.show
        )  # fmt: skip
    if as_json:
        _print_json(
            {
                "schema_version": 1,
                "destination": str(destination),
                "layout": made.layout,
                "recipe": made.recipe.name,
                "up_to_date": not outcome.is_new,
                "tensors": sum(len(file.specs) for file in made.files),
                "bytes": sum(file.nbytes for file in made.files),
                "resumed_bytes": outcome.resumed_nbytes,
                "seconds": round(outcome.seconds, 3),
                "warnings": list(made.warnings),
            }
        )
    elif outcome.is_new:
        rate = outcome.nbytes / max(outcome.seconds, 1e-9)
        tensors = sum(len(file.specs) for file in made.files)
        resumed = f", {size(outcome.resumed_nbytes)} of it from an earlier run" if outcome.resumed_nbytes else ""
        print(
            f"{destination}: {len(made.source.tensors):,} tensors -> {tensors:,}, "
            f"{size(outcome.nbytes + outcome.resumed_nbytes)} in {count(made.files, 'file')}, "
            f"{outcome.seconds:.1f} s ({size(int(rate))}/s){resumed}"
        )
    else:
        print(f"{destination}: already up to date")


def _convert(
    source: Path, destination: Path, to: str, recipe: str | None, layout: str | None, include: list[str] | None,
    max_shard_size: str, jobs: int | None, max_memory: str | None, as_json: bool, dry_run: bool, no_fsync: bool,
    overwrite: bool,
) -> None:  # fmt: skip
    from moeconv.writer import check_destination

    check_destination(source, destination)
    made = _make_plan(source, to, recipe, layout, include, max_shard_size, jobs, max_memory)
    if dry_run:
        _show_plan(made, destination, as_json=as_json)
    else:
        _run(made, destination, fsync=not no_fsync, overwrite=overwrite, as_json=as_json)


@app.command(cls=_Command)
def pack(
    source: Source, destination: Destination, recipe: RecipeOption = None, layout: LayoutOption = None,
    include: IncludeOption = None, max_shard_size: ShardOption = "5GB", jobs: JobsOption = None,
    max_memory: MemoryOption = None, as_json: JsonOption = False, dry_run: DryRunOption = False,
    no_fsync: NoFsyncOption = False, overwrite: OverwriteOption = False,
) -> None:  # fmt: skip
    """Store all experts of a layer in one tensor, as transformers v5 holds them."""
    _convert(
        source, destination, "packed", recipe, layout, include, max_shard_size, jobs, max_memory, as_json, dry_run,
        no_fsync, overwrite,
    )  # fmt: skip


@app.command(cls=_Command)
def unpack(
    source: Source, destination: Destination, recipe: RecipeOption = None, layout: LayoutOption = None,
    include: IncludeOption = None, max_shard_size: ShardOption = "5GB", jobs: JobsOption = None,
    max_memory: MemoryOption = None, as_json: JsonOption = False, dry_run: DryRunOption = False,
    no_fsync: NoFsyncOption = False, overwrite: OverwriteOption = False,
) -> None:  # fmt: skip
    """Store every expert's matrices as tensors of their own."""
    _convert(
        source, destination, "experts", recipe, layout, include, max_shard_size, jobs, max_memory, as_json, dry_run,
        no_fsync, overwrite,
    )  # fmt: skip


@app.command(cls=_Command)
def convert(
    source: Source, destination: Destination, to: ToOption, recipe: RecipeOption = None, layout: LayoutOption = None,
    include: IncludeOption = None, max_shard_size: ShardOption = "5GB", jobs: JobsOption = None,
    max_memory: MemoryOption = None, as_json: JsonOption = False, dry_run: DryRunOption = False,
    no_fsync: NoFsyncOption = False, overwrite: OverwriteOption = False,
) -> None:  # fmt: skip
    """Convert to a layout by name; `hub` is the form in which the family is published."""
    _convert(
        source, destination, to, recipe, layout, include, max_shard_size, jobs, max_memory, as_json, dry_run,
        no_fsync, overwrite,
    )  # fmt: skip


def _plan(
    source: Path, destination: Path | None, to: str, recipe: str | None, layout: str | None,
    include: list[str] | None, max_shard_size: str, jobs: int | None, max_memory: str | None, as_json: bool,
) -> None:  # fmt: skip
    made = _make_plan(source, to, recipe, layout, include, max_shard_size, jobs, max_memory)
    _show_plan(made, destination or source.resolve().parent, as_json=as_json)


@plan_app.command("pack", cls=_Command)
def plan_pack(
    source: Source, destination: OptionalDestination = None, recipe: RecipeOption = None, layout: LayoutOption = None,
    include: IncludeOption = None, max_shard_size: ShardOption = "5GB", jobs: JobsOption = None,
    max_memory: MemoryOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """What `moeconv pack` would do."""
    _plan(source, destination, "packed", recipe, layout, include, max_shard_size, jobs, max_memory, as_json)


@plan_app.command("unpack", cls=_Command)
def plan_unpack(
    source: Source, destination: OptionalDestination = None, recipe: RecipeOption = None, layout: LayoutOption = None,
    include: IncludeOption = None, max_shard_size: ShardOption = "5GB", jobs: JobsOption = None,
    max_memory: MemoryOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """What `moeconv unpack` would do."""
    _plan(source, destination, "experts", recipe, layout, include, max_shard_size, jobs, max_memory, as_json)


@plan_app.command("convert", cls=_Command)
def plan_convert(
    source: Source, to: ToOption, destination: OptionalDestination = None, recipe: RecipeOption = None,
    layout: LayoutOption = None, include: IncludeOption = None, max_shard_size: ShardOption = "5GB",
    jobs: JobsOption = None, max_memory: MemoryOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """What `moeconv convert` would do."""
    _plan(source, destination, to, recipe, layout, include, max_shard_size, jobs, max_memory, as_json)


@app.command(cls=_Command)
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

    _check_layouts(None, layout)
    report = verify_folder(open_checkpoint(folder), against, recipe, layout, jobs)
    if as_json:
        _print_json(report.json())
        if report.problems:
            raise typer.Exit(1)
        return
    if report.problems:
        raise VerifyError.of(report.problems)
    compared = f", {size(report.compared_nbytes)} equal byte for byte to {against}" if against else ""
    print(f"{folder}: {report.tensors:,} tensors, structure right{compared}")


@app.command(cls=_Command)
def inspect(
    source: Source, recipe: RecipeOption = None, layout: LayoutOption = None, as_json: JsonOption = False
) -> None:
    """Show family, layout by layer range, experts, dtypes, quantization and sizes."""
    from moeconv.checkpoint import open_checkpoint
    from moeconv.errors import PlanError
    from moeconv.inspect import inspect_json, inspect_text
    from moeconv.selection import select_recipe

    _check_layouts(None, layout)
    checkpoint = open_checkpoint(source)
    try:
        found = select_recipe(checkpoint, recipe, layout)
    except PlanError:
        found = None  # a family without a recipe can still be looked at
    report = inspect_json(checkpoint, found, layout)
    _print_json(report) if as_json else print(inspect_text(report))


@recipes_app.command("list", cls=_Command)
def recipes_list(as_json: JsonOption = False) -> None:
    """All shipped recipes."""
    from moeconv.recipe_file import load_shipped

    recipes = load_shipped()
    if as_json:
        _print_json(
            {
                "schema_version": 1,
                "recipes": [{"name": r.name, "about": r.about, "model_types": list(r.model_types)} for r in recipes],
            }
        )
        return
    for recipe in recipes:
        print(f"{recipe.name}\n    {recipe.about}\n    for {', '.join(recipe.model_types)}")


@recipes_app.command("show", cls=_Command)
def recipes_show(name: Annotated[str, typer.Argument(metavar="NAME", help="Recipe name or file.")]) -> None:
    """Print a recipe's file."""
    from moeconv.recipe_file import recipe_text

    print(recipe_text(name)[0], end="")


@recipes_app.command("check", cls=_Command)
def recipes_check(file: Annotated[str, typer.Argument(metavar="FILE", help="Recipe file or name.")]) -> None:
    """Check a recipe file: words, shapes, and that its layouts agree with each other."""
    from moeconv.recipe_file import load_recipe

    recipe = load_recipe(file)
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


def _print_json(content: dict[str, Any]) -> None:
    import json

    print(json.dumps(content, indent=2, ensure_ascii=False))


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, _interrupt)
    gc.disable()  # a short life with many small objects and no cycles: collecting only costs
    code = _guarded(lambda: _flushed(app))
    sys.stderr.flush()
    os._exit(code)  # everything is closed and flushed: taking the interpreter apart would only cost time


def _guarded(run: Callable[[], None]) -> int:
    try:
        run()
    except MoeconvError as error:
        print(f"moeconv: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # what nobody has worded: a full disk behind stdout, a path that no system call takes
        print(f"moeconv: {error}\n  -> Check that path and its disk, then run again.", file=sys.stderr)
        return 1
    except SystemExit as error:  # how typer ends: usage errors, --help, and an interrupt
        if error.code == INTERRUPTED:
            print("moeconv: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return error.code if isinstance(error.code, int) else 1
    return 0


def _flushed(run: Callable[[], None]) -> None:
    try:
        run()
    finally:
        sys.stdout.flush()
