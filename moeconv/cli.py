"""The command line. Everything that is printed is printed here; results go to stdout, the rest to stderr.

Exit codes: 0 done or already up to date, 1 cannot, 2 the command line is wrong, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeconv import __version__
from moeconv.options import (
    Command,
    DecodedDtypeOption,
    Destination,
    DeviceOption,
    DryRunOption,
    DtypeOption,
    FormatOption,
    Group,
    GroupOption,
    IgnoreOption,
    IncludeOption,
    JobsOption,
    JsonOption,
    LayoutOption,
    MemoryOption,
    NoFsyncOption,
    NonfiniteOption,
    OnlyOption,
    OptionalDestination,
    OverwriteOption,
    RecipeOption,
    ScaleOption,
    ShardOption,
    Source,
    ToOption,
    Ue8m0Option,
    VramOption,
    check_layouts,
    parse_dtype,
    parse_size,
)  # fmt: skip
from moeconv.process import run_process, start_pool

if TYPE_CHECKING:
    from moeconv.checkpoint import Checkpoint
    from moeconv.plan import Options, Plan
    from moeconv.pool import Pool
    from moeconv.recipe import Recipe


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help needs no rich: half the start-up time
    help="Convert Mixture-of-Experts checkpoints, file to file. Memory stays small whatever the model's size.",
    epilog="Exit codes: 0 done or already up to date, 1 cannot, 2 wrong command line, 130 interrupted.",
)
plan_app = typer.Typer(
    cls=Group, no_args_is_help=True, rich_markup_mode=None, help="Show what a command would do, from headers alone."
)
recipes_app = typer.Typer(
    cls=Group, no_args_is_help=True, rich_markup_mode=None, help="List, show, propose and check recipes."
)
app.add_typer(plan_app, name="plan")
app.add_typer(recipes_app, name="recipes")


def _make_plan(
    source: Path,
    to: str,
    recipe: str | None,
    layout: str | None,
    include: Sequence[str] | None,
    max_shard_size: str,
    jobs: int | None,
    max_memory: str | None,
    *,
    undo: str | None = None,
) -> Plan:
    """The plan of a change of layout; what was in layout `undo` before the folder was made stays in it."""
    from moeconv.manifest import kept_blocks
    from moeconv.plan import plan

    check_layouts(to, layout)
    checkpoint, found, options = _open(source, recipe, layout, include, max_shard_size, jobs, max_memory)
    stay = kept_blocks(checkpoint.manifest, undo) if undo is not None else ()
    return plan(checkpoint, found, to, options._replace(stay=stay))


def _open(
    source: Path, recipe: str | None, layout: str | None, include: Sequence[str] | None, max_shard_size: str,
    jobs: int | None, max_memory: str | None, device: str = "cpu", max_vram: str | None = None,
) -> tuple[Checkpoint, Recipe, Options]:  # fmt: skip
    """The checkpoint, its recipe, and the options of every command that writes."""
    from moeconv.checkpoint import open_checkpoint
    from moeconv.device import find_devices
    from moeconv.errors import UsageError
    from moeconv.plan import Options
    from moeconv.selection import select_recipe

    check_layouts(None, layout)
    if max_vram is not None and device == "cpu":
        raise UsageError("--max-vram bounds the memory of GPUs, and --device cpu takes none", "Leave one of them out.")
    options = Options(
        max_shard_nbytes=parse_size(max_shard_size, "--max-shard-size"),
        jobs=jobs,
        max_memory=parse_size(max_memory, "--max-memory") if max_memory is not None else None,
        devices=find_devices(device),
        max_vram=parse_size(max_vram, "--max-vram") if max_vram is not None else None,
        layout=layout,
        include=tuple(include or ()),
    )
    checkpoint = open_checkpoint(source, include=options.include)
    return checkpoint, select_recipe(checkpoint, recipe, layout), options


def _show_plan(made: Plan, destination: Path, *, as_json: bool) -> None:
    from moeconv.explain import disk_of, plan_json, plan_text

    disk = disk_of(made, destination)
    _print_json(plan_json(made, disk)) if as_json else print(plan_text(made, disk))


def _run(
    made: Plan, destination: Path, *, fsync: bool, overwrite: bool, as_json: bool, pool: Pool | None = None
) -> None:  # fmt: skip
    from moeconv.executor import execute
    from moeconv.explain import count, size
    from moeconv.progress import Progress

    for warning in made.warnings:
        print(f"moeconv: warning: {warning}", file=sys.stderr)
    with Progress() as progress:
        outcome = execute(
            made, destination, sys.argv[1:], fsync=fsync, overwrite=overwrite, progress=progress.show, pool=pool
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


def _show_or_run(
    made: Plan, destination: Path, as_json: bool, dry_run: bool, no_fsync: bool, overwrite: bool,
    pool: Pool | None = None,
) -> None:  # fmt: skip
    if dry_run:
        _show_plan(made, destination, as_json=as_json)
    else:
        _run(made, destination, fsync=not no_fsync, overwrite=overwrite, as_json=as_json, pool=pool)


def _convert(
    source: Path, destination: Path, to: str, recipe: str | None, layout: str | None, include: list[str] | None,
    max_shard_size: str, jobs: int | None, max_memory: str | None, as_json: bool, dry_run: bool, no_fsync: bool,
    overwrite: bool, *, undo: str | None = None,
) -> None:  # fmt: skip
    from moeconv.writer import check_destination

    check_destination(source, destination)
    made = _make_plan(source, to, recipe, layout, include, max_shard_size, jobs, max_memory, undo=undo)
    _show_or_run(made, destination, as_json, dry_run, no_fsync, overwrite)


@app.command(cls=Command)
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


@app.command(cls=Command)
def unpack(
    source: Source, destination: Destination, recipe: RecipeOption = None, layout: LayoutOption = None,
    include: IncludeOption = None, max_shard_size: ShardOption = "5GB", jobs: JobsOption = None,
    max_memory: MemoryOption = None, as_json: JsonOption = False, dry_run: DryRunOption = False,
    no_fsync: NoFsyncOption = False, overwrite: OverwriteOption = False,
) -> None:  # fmt: skip
    """Store every expert's matrices as tensors of their own."""
    _convert(
        source, destination, "experts", recipe, layout, include, max_shard_size, jobs, max_memory, as_json, dry_run,
        no_fsync, overwrite, undo="packed",
    )  # fmt: skip


@app.command(cls=Command)
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


def _plan_quantize(
    source: Path, recipe: str | None, layout: str | None, include: Sequence[str] | None, max_shard_size: str,
    jobs: int | None, max_memory: str | None, format_: str | None, ignore: Sequence[str] | None,
    only: Sequence[str] | None, group_size: int | None, scale: str | None, ue8m0: bool, dtype: str | None,
    allow_nonfinite: bool, device: str, max_vram: str | None,
) -> Plan:  # fmt: skip
    from moeconv.quantize import plan_quantize
    from moeconv.scheme import build_scheme

    wanted = {"group_size": group_size, "search": scale, "ue8m0": ue8m0 or None}
    scheme, recipe = build_scheme(
        format_, {name: value for name, value in wanted.items() if value is not None}, recipe, tuple(ignore or ()),
        tuple(only or ()), parse_dtype(dtype), allow_nonfinite,
    )  # fmt: skip
    checkpoint, found, options = _open(
        source, recipe, layout, include, max_shard_size, jobs, max_memory, device, max_vram
    )  # fmt: skip
    return plan_quantize(checkpoint, found, scheme, options)


def _plan_dequantize(
    source: Path, recipe: str | None, layout: str | None, include: Sequence[str] | None, max_shard_size: str,
    jobs: int | None, max_memory: str | None, dtype: str | None, device: str, max_vram: str | None,
) -> Plan:  # fmt: skip
    from moeconv.quantize import plan_dequantize

    checkpoint, found, options = _open(
        source, recipe, layout, include, max_shard_size, jobs, max_memory, device, max_vram
    )  # fmt: skip
    return plan_dequantize(checkpoint, found, parse_dtype(dtype), options)


@app.command(cls=Command)
def quantize(
    source: Source, destination: Destination, format_: FormatOption = None,
    ignore: IgnoreOption = None, only: OnlyOption = None, group_size: GroupOption = None, scale: ScaleOption = None,
    ue8m0: Ue8m0Option = False, dtype: DtypeOption = None, allow_nonfinite: NonfiniteOption = False,
    recipe: RecipeOption = None, layout: LayoutOption = None, include: IncludeOption = None,
    max_shard_size: ShardOption = "5GB", jobs: JobsOption = None, max_memory: MemoryOption = None,
    device: DeviceOption = "auto", max_vram: VramOption = None, as_json: JsonOption = False,
    dry_run: DryRunOption = False, no_fsync: NoFsyncOption = False, overwrite: OverwriteOption = False,
) -> None:  # fmt: skip
    """Store matrices with fewer bits: experts and linear layers, unless rules say otherwise."""
    from moeconv.writer import check_destination

    check_destination(source, destination)
    with start_pool(jobs, device, dry_run) as pool:
        made = _plan_quantize(
            source, recipe, layout, include, max_shard_size, jobs, max_memory, format_, ignore, only, group_size,
            scale, ue8m0, dtype, allow_nonfinite, device, max_vram,
        )  # fmt: skip
        _show_or_run(made, destination, as_json, dry_run, no_fsync, overwrite, pool)


@app.command(cls=Command)
def dequantize(
    source: Source, destination: Destination, dtype: DecodedDtypeOption = None, recipe: RecipeOption = None,
    layout: LayoutOption = None, include: IncludeOption = None, max_shard_size: ShardOption = "5GB",
    jobs: JobsOption = None, max_memory: MemoryOption = None, device: DeviceOption = "auto",
    max_vram: VramOption = None, as_json: JsonOption = False, dry_run: DryRunOption = False,
    no_fsync: NoFsyncOption = False, overwrite: OverwriteOption = False,
) -> None:  # fmt: skip
    """Decode quantized matrices to full precision; experts that share a tensor are written one by one."""
    from moeconv.writer import check_destination

    check_destination(source, destination)
    with start_pool(jobs, device, dry_run) as pool:
        made = _plan_dequantize(
            source, recipe, layout, include, max_shard_size, jobs, max_memory, dtype, device, max_vram
        )  # fmt: skip
        _show_or_run(made, destination, as_json, dry_run, no_fsync, overwrite, pool)


def _plan(
    source: Path, destination: Path | None, to: str, recipe: str | None, layout: str | None,
    include: list[str] | None, max_shard_size: str, jobs: int | None, max_memory: str | None, as_json: bool, *,
    undo: str | None = None,
) -> None:  # fmt: skip
    made = _make_plan(source, to, recipe, layout, include, max_shard_size, jobs, max_memory, undo=undo)
    _show_plan(made, destination or source.resolve().parent, as_json=as_json)


@plan_app.command("pack", cls=Command)
def plan_pack(
    source: Source, destination: OptionalDestination = None, recipe: RecipeOption = None, layout: LayoutOption = None,
    include: IncludeOption = None, max_shard_size: ShardOption = "5GB", jobs: JobsOption = None,
    max_memory: MemoryOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """What `moeconv pack` would do."""
    _plan(source, destination, "packed", recipe, layout, include, max_shard_size, jobs, max_memory, as_json)


@plan_app.command("unpack", cls=Command)
def plan_unpack(
    source: Source, destination: OptionalDestination = None, recipe: RecipeOption = None, layout: LayoutOption = None,
    include: IncludeOption = None, max_shard_size: ShardOption = "5GB", jobs: JobsOption = None,
    max_memory: MemoryOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """What `moeconv unpack` would do."""
    _plan(
        source, destination, "experts", recipe, layout, include, max_shard_size, jobs, max_memory, as_json,
        undo="packed",
    )  # fmt: skip


@plan_app.command("convert", cls=Command)
def plan_convert(
    source: Source, to: ToOption, destination: OptionalDestination = None, recipe: RecipeOption = None,
    layout: LayoutOption = None, include: IncludeOption = None, max_shard_size: ShardOption = "5GB",
    jobs: JobsOption = None, max_memory: MemoryOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """What `moeconv convert` would do."""
    _plan(source, destination, to, recipe, layout, include, max_shard_size, jobs, max_memory, as_json)


@plan_app.command("quantize", cls=Command)
def plan_quantize_command(
    source: Source, destination: OptionalDestination = None, format_: FormatOption = None,
    ignore: IgnoreOption = None, only: OnlyOption = None, group_size: GroupOption = None, scale: ScaleOption = None,
    ue8m0: Ue8m0Option = False, dtype: DtypeOption = None, allow_nonfinite: NonfiniteOption = False,
    recipe: RecipeOption = None, layout: LayoutOption = None, include: IncludeOption = None,
    max_shard_size: ShardOption = "5GB", jobs: JobsOption = None, max_memory: MemoryOption = None,
    device: DeviceOption = "auto", max_vram: VramOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """What `moeconv quantize` would do."""
    made = _plan_quantize(
        source, recipe, layout, include, max_shard_size, jobs, max_memory, format_, ignore, only, group_size,
        scale, ue8m0, dtype, allow_nonfinite, device, max_vram,
    )  # fmt: skip
    _show_plan(made, destination or source.resolve().parent, as_json=as_json)


@plan_app.command("dequantize", cls=Command)
def plan_dequantize_command(
    source: Source, destination: OptionalDestination = None, dtype: DecodedDtypeOption = None,
    recipe: RecipeOption = None, layout: LayoutOption = None, include: IncludeOption = None,
    max_shard_size: ShardOption = "5GB", jobs: JobsOption = None, max_memory: MemoryOption = None,
    device: DeviceOption = "auto", max_vram: VramOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """What `moeconv dequantize` would do."""
    made = _plan_dequantize(
        source, recipe, layout, include, max_shard_size, jobs, max_memory, dtype, device, max_vram
    )  # fmt: skip
    _show_plan(made, destination or source.resolve().parent, as_json=as_json)


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
        _print_json(report.json())
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
    _print_json(report) if as_json else print(inspect_text(report))


@recipes_app.command("list", cls=Command)
def recipes_list(as_json: JsonOption = False) -> None:
    """All shipped recipes."""
    from moeconv.recipe_file import load_shipped

    recipes = load_shipped()
    if as_json:
        listed = [{"name": r.name, "about": r.about, "model_types": list(r.model_types)} for r in recipes]
        _print_json({"schema_version": 1, "recipes": listed})
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


def _print_json(content: dict[str, Any]) -> None:
    import json

    print(json.dumps(content, indent=2, ensure_ascii=False))


def main() -> None:
    """Entry point of the console script."""
    run_process(app)
