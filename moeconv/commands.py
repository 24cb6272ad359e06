"""What commands share: the applications, opening a checkpoint, showing and running a plan.

Results go to stdout, the rest to stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moeconv.options import Group, RunOptions, check_layouts, parse_size

if TYPE_CHECKING:
    from moeconv.checkpoint import Checkpoint
    from moeconv.executor import Outcome
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


def open_source(
    source: Path, recipe: str | None, layout: str | None, include: Sequence[str] | None, max_shard_size: str,
    jobs: int | None, max_memory: str | None, device: str = "cpu", max_vram: str | None = None,
    destination: Path | None = None,
) -> tuple[Checkpoint, Recipe, Options]:  # fmt: skip
    """The checkpoint, its recipe, and the options of every command that writes.

    Of weight files that an unfinished run to `destination` has deleted, it is known what planning has to know.
    """
    from moeconv.checkpoint import CONSUMED, open_checkpoint
    from moeconv.destination import partial_of
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
    stand_ins = partial_of(destination) / CONSUMED if destination else None
    checkpoint = open_checkpoint(source, include=options.include, stand_ins=stand_ins)
    return checkpoint, select_recipe(checkpoint, recipe, layout), options


def show_plan(made: Plan, destination: Path, *, as_json: bool, consumes: bool = False) -> None:
    """Print a plan as text or JSON, with the disk space that a destination has."""
    from moeconv.consumption import peak_disk
    from moeconv.explain import disk_of, plan_json, plan_text
    from moeconv.files import Files

    disk = peak_disk(made, destination, Files()) if consumes else disk_of(made, destination)
    print_json(plan_json(made, disk)) if as_json else print(plan_text(made, disk))


def begin(source: Path, destination: Path, how: RunOptions) -> bool:
    """Whether there is something to do, before the source is opened.

    Raises:
        OutputError: a destination that cannot be.
    """
    from moeconv.destination import check_destination, has_consumed
    from moeconv.files import Files

    check_destination(source, destination)
    if how.dry_run or not has_consumed(source, destination, sys.argv[1:], Files()):
        return True
    if how.as_json:
        print_json({"schema_version": 1, "destination": str(destination), "up_to_date": True})
    else:
        print(f"{destination}: already up to date; the weights of {source} are consumed")
    return False


def execute_shown(made: Plan, destination: Path, how: RunOptions, pool: Pool | None = None) -> Outcome:
    """Run a plan and show how far it is."""
    from moeconv.executor import execute
    from moeconv.progress import Progress

    with Progress() as progress:
        return execute(
            made, destination, sys.argv[1:], fsync=how.fsync, overwrite=how.overwrite, restart=how.restart,
            consume_source=how.consume_source, hashes=how.hashes, progress=progress.show, pool=pool,
        )  # fmt: skip


def run(made: Plan, destination: Path, how: RunOptions, pool: Pool | None = None) -> None:
    """Run a plan and say what was done."""
    from moeconv.errors import shown
    from moeconv.explain import count, size

    for warning in made.warnings:
        print(f"moeconv: warning: {shown(warning)}", file=sys.stderr)
    outcome = execute_shown(made, destination, how, pool)
    if how.as_json:
        print_json(
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
                **({"hash_seconds": round(outcome.hash_seconds, 3)} if how.hashes else {}),
                "warnings": list(made.warnings),
            }
        )
    elif outcome.is_new:
        seconds = outcome.seconds - outcome.hash_seconds
        rate = outcome.nbytes / max(seconds, 1e-9)
        tensors = sum(len(file.specs) for file in made.files)
        resumed = f", {size(outcome.resumed_nbytes)} of it from an earlier run" if outcome.resumed_nbytes else ""
        hashed = f", and {outcome.hash_seconds:.1f} s for sha256" if how.hashes else ""
        print(
            f"{destination}: {len(made.source.tensors):,} tensors -> {tensors:,}, "
            f"{size(outcome.nbytes + outcome.resumed_nbytes)} in {count(made.files, 'file')}, "
            f"{seconds:.1f} s ({size(int(rate))}/s){resumed}{hashed}"
        )
    else:
        print(f"{destination}: already up to date")


def show_or_run(made: Plan, destination: Path, how: RunOptions, pool: Pool | None = None) -> None:
    """Print a plan where that is wanted, else run it."""
    if how.dry_run:
        show_plan(made, destination, as_json=how.as_json, consumes=how.consume_source)
    else:
        run(made, destination, how, pool)


def print_json(content: dict[str, Any]) -> None:
    """Print JSON for programs; what a terminal would not show as it is stands there as JSON escapes it."""
    import json

    text = json.dumps(content, indent=2, ensure_ascii=False)
    if not text.replace("\n", "").isprintable():
        text = "".join([c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text])
    print(text)
