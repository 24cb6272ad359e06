"""Commands that change the layout: pack, unpack and convert."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moeconv.commands import app, begin, open_source, plan_app, show_or_run, show_plan
from moeconv.options import (
    Command,
    ConsumeOption,
    Destination,
    DryRunOption,
    HashOption,
    IncludeOption,
    JobsOption,
    JsonOption,
    LayoutOption,
    MemoryOption,
    NoFsyncOption,
    OptionalDestination,
    OverwriteOption,
    RecipeOption,
    RestartOption,
    RunOptions,
    ShardOption,
    Source,
    ToOption,
    YesOption,
    check_layouts,
    run_options,
)  # fmt: skip

if TYPE_CHECKING:
    from moeconv.plan import Plan


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
    destination: Path | None = None,
) -> Plan:
    """The plan of a change of layout; what was in layout `undo` before the folder was made stays in it."""
    from moeconv.manifest import kept_blocks
    from moeconv.relayout import plan_layout

    check_layouts(to, layout)
    checkpoint, found, options = open_source(
        source, recipe, layout, include, max_shard_size, jobs, max_memory, destination=destination
    )
    stay = kept_blocks(checkpoint.manifest, undo) if undo is not None else ()
    return plan_layout(checkpoint, found, to, options._replace(stay=stay))


def _convert(
    source: Path, destination: Path, to: str, recipe: str | None, layout: str | None, include: list[str] | None,
    max_shard_size: str, jobs: int | None, max_memory: str | None, how: RunOptions, *, undo: str | None = None,
) -> None:  # fmt: skip
    if not begin(source, destination, how):
        return
    made = _make_plan(
        source, to, recipe, layout, include, max_shard_size, jobs, max_memory, undo=undo, destination=destination
    )  # fmt: skip
    show_or_run(made, destination, how)


@app.command(cls=Command)
def pack(
    source: Source, destination: Destination, recipe: RecipeOption = None, layout: LayoutOption = None,
    include: IncludeOption = None, max_shard_size: ShardOption = "5GB", jobs: JobsOption = None,
    max_memory: MemoryOption = None, as_json: JsonOption = False, dry_run: DryRunOption = False,
    no_fsync: NoFsyncOption = False, overwrite: OverwriteOption = False, restart: RestartOption = False,
    hashes: HashOption = False, consume_source: ConsumeOption = False, yes: YesOption = False,
) -> None:  # fmt: skip
    """Store all experts of a layer in one tensor, as transformers v5 holds them."""
    _convert(
        source, destination, "packed", recipe, layout, include, max_shard_size, jobs, max_memory,
        run_options(as_json, dry_run, no_fsync, overwrite, restart, hashes, consume_source, yes),
    )  # fmt: skip


@app.command(cls=Command)
def unpack(
    source: Source, destination: Destination, recipe: RecipeOption = None, layout: LayoutOption = None,
    include: IncludeOption = None, max_shard_size: ShardOption = "5GB", jobs: JobsOption = None,
    max_memory: MemoryOption = None, as_json: JsonOption = False, dry_run: DryRunOption = False,
    no_fsync: NoFsyncOption = False, overwrite: OverwriteOption = False, restart: RestartOption = False,
    hashes: HashOption = False, consume_source: ConsumeOption = False, yes: YesOption = False,
) -> None:  # fmt: skip
    """Store every expert's matrices as tensors of their own."""
    _convert(
        source, destination, "experts", recipe, layout, include, max_shard_size, jobs, max_memory,
        run_options(as_json, dry_run, no_fsync, overwrite, restart, hashes, consume_source, yes), undo="packed",
    )  # fmt: skip


@app.command(cls=Command)
def convert(
    source: Source, destination: Destination, to: ToOption, recipe: RecipeOption = None, layout: LayoutOption = None,
    include: IncludeOption = None, max_shard_size: ShardOption = "5GB", jobs: JobsOption = None,
    max_memory: MemoryOption = None, as_json: JsonOption = False, dry_run: DryRunOption = False,
    no_fsync: NoFsyncOption = False, overwrite: OverwriteOption = False, restart: RestartOption = False,
    hashes: HashOption = False, consume_source: ConsumeOption = False, yes: YesOption = False,
) -> None:  # fmt: skip
    """Convert to a layout by name; `hub` is the form in which the family is published."""
    _convert(
        source, destination, to, recipe, layout, include, max_shard_size, jobs, max_memory,
        run_options(as_json, dry_run, no_fsync, overwrite, restart, hashes, consume_source, yes),
    )  # fmt: skip


def _plan(
    source: Path, destination: Path | None, to: str, recipe: str | None, layout: str | None,
    include: list[str] | None, max_shard_size: str, jobs: int | None, max_memory: str | None, as_json: bool, *,
    undo: str | None = None,
) -> None:  # fmt: skip
    made = _make_plan(source, to, recipe, layout, include, max_shard_size, jobs, max_memory, undo=undo)
    show_plan(made, destination or source.resolve().parent, as_json=as_json)


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
