"""Commands that change values: quantize and dequantize."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moeconv.commands import app, begin, execute_shown, open_source, plan_app, show_or_run, show_plan
from moeconv.options import (
    Command,
    ConsumeOption,
    DecodedDtypeOption,
    Destination,
    DeviceOption,
    DoubleOption,
    DryRunOption,
    DtypeOption,
    ExpertsOption,
    FormatOption,
    FormatsOption,
    GroupOption,
    HashOption,
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
    RestartOption,
    RunOptions,
    ScaleOption,
    ShardOption,
    Source,
    TargetOption,
    Ue8m0Option,
    VramOption,
    YesOption,
    parse_dtype,
    parse_size,
    run_options,
)  # fmt: skip
from moeconv.process import start_pool

if TYPE_CHECKING:
    from moeconv.plan import Plan
    from moeconv.pool import Pool


def _plan_quantize(
    source: Path, recipe: str | None, layout: str | None, include: Sequence[str] | None, max_shard_size: str,
    jobs: int | None, max_memory: str | None, format_: str | None, ignore: Sequence[str] | None,
    only: Sequence[str] | None, group_size: int | None, scale: str | None, ue8m0: bool, double_quant: bool,
    experts: str | None, dtype: str | None, allow_nonfinite: bool, device: str, max_vram: str | None,
    destination: Path | None = None,
) -> Plan:  # fmt: skip
    from moeconv.quantize import plan_quantize
    from moeconv.scheme import build_scheme

    wanted = {
        "group_size": group_size, "search": scale, "ue8m0": ue8m0 or None, "double_quant": double_quant or None,
        "experts": None if experts == "keep" else experts,
    }  # fmt: skip
    scheme, recipe = build_scheme(
        format_, {name: value for name, value in wanted.items() if value is not None}, recipe, tuple(ignore or ()),
        tuple(only or ()), parse_dtype(dtype), allow_nonfinite, experts == "keep",
    )  # fmt: skip
    checkpoint, found, options = open_source(
        source, recipe, layout, include, max_shard_size, jobs, max_memory, device, max_vram, destination
    )  # fmt: skip
    return plan_quantize(checkpoint, found, scheme, options)


def _plan_dequantize(
    source: Path, recipe: str | None, layout: str | None, include: Sequence[str] | None, max_shard_size: str,
    jobs: int | None, max_memory: str | None, dtype: str | None, device: str, max_vram: str | None,
    destination: Path | None = None,
) -> Plan:  # fmt: skip
    from moeconv.quantize import plan_dequantize

    checkpoint, found, options = open_source(
        source, recipe, layout, include, max_shard_size, jobs, max_memory, device, max_vram, destination
    )  # fmt: skip
    return plan_dequantize(checkpoint, found, parse_dtype(dtype), options)


def _plan_for_size(
    source: Path, destination: Path, recipe: str | None, layout: str | None, include: Sequence[str] | None,
    max_shard_size: str, jobs: int | None, max_memory: str | None, target_size: str, formats: Sequence[str],
    ignore: Sequence[str] | None, only: Sequence[str] | None, group_size: int | None, scale: str | None,
    ue8m0: bool, dtype: str | None, allow_nonfinite: bool, device: str, max_vram: str | None, how: RunOptions,
    pool: Pool | None,
) -> tuple[Plan, Path]:  # fmt: skip
    """The plan, and the folder of the measurement, which is of no use once DST is there."""
    from moeconv.target import Wanted, parse_formats, plan_for_size

    given = {"group_size": group_size, "search": scale, "ue8m0": ue8m0 or None}
    parsed, notes = parse_formats(
        ",".join(formats), {name: value for name, value in given.items() if value is not None}
    )
    for note in notes:
        print(f"moeconv: warning: {note}", file=sys.stderr)
    checkpoint, found, options = open_source(
        source, recipe, layout, include, max_shard_size, jobs, max_memory, device, max_vram
    )  # fmt: skip
    wanted = Wanted(
        parse_size(target_size, "--target-size"), parsed, tuple(ignore or ()), tuple(only or ()), parse_dtype(dtype),
        allow_nonfinite, str(Path(recipe).resolve()) if recipe and Path(recipe).is_file() else recipe,
        tuple(sys.argv[1:]), how.hashes,
    )  # fmt: skip

    def measure(plan: Plan, folder: Path) -> None:
        print(f"moeconv: measuring what {', '.join(parsed)} cost, in {folder}", file=sys.stderr)
        execute_shown(plan, folder, RunOptions(fsync=False, overwrite=True), pool)

    made, path, folder = plan_for_size(checkpoint, found, wanted, options, destination, measure, how.overwrite)
    print(f"moeconv: the choice is in {path}", file=sys.stderr)
    return made, folder


@app.command(cls=Command)
def quantize(
    source: Source, destination: Destination, format_: FormatOption = None,
    target_size: TargetOption = None, formats: FormatsOption = None,
    ignore: IgnoreOption = None, only: OnlyOption = None, group_size: GroupOption = None, scale: ScaleOption = None,
    ue8m0: Ue8m0Option = False, double_quant: DoubleOption = False, experts: ExpertsOption = None,
    dtype: DtypeOption = None, allow_nonfinite: NonfiniteOption = False,
    recipe: RecipeOption = None, layout: LayoutOption = None, include: IncludeOption = None,
    max_shard_size: ShardOption = "5GB", jobs: JobsOption = None, max_memory: MemoryOption = None,
    device: DeviceOption = "auto", max_vram: VramOption = None, as_json: JsonOption = False,
    dry_run: DryRunOption = False, no_fsync: NoFsyncOption = False, overwrite: OverwriteOption = False,
    restart: RestartOption = False, hashes: HashOption = False, consume_source: ConsumeOption = False,
    yes: YesOption = False,
) -> None:  # fmt: skip
    """Store matrices with fewer bits: experts and linear layers, unless rules say otherwise."""
    from moeconv.errors import UsageError
    from moeconv.files import Files

    how = run_options(as_json, dry_run, no_fsync, overwrite, restart, hashes, consume_source, yes)
    if not begin(source, destination, how):
        return
    if target_size is not None or formats:
        if target_size is None or not formats or format_ is not None:
            raise UsageError("--target-size and --formats go together, and without --format", "Write both, or neither.")
        if double_quant or experts is not None:
            raise UsageError("--double-quant and --experts go with --format, not with --formats", "Leave them out.")
        if consume_source:
            raise UsageError(
                "--consume-source cannot go with --target-size, which reads SRC twice",
                "Let --dry-run choose, then run the recipe that it writes, with --consume-source.",
            )
        with start_pool(jobs, device) as pool:
            made, measured = _plan_for_size(
                source, destination, recipe, layout, include, max_shard_size, jobs, max_memory, target_size, formats,
                ignore, only, group_size, scale, ue8m0, dtype, allow_nonfinite, device, max_vram, how, pool,
            )  # fmt: skip
            show_or_run(made, destination, how, pool)
        if not dry_run:
            Files().remove_tree(measured)
        return
    with start_pool(jobs, device, dry_run) as pool:
        made = _plan_quantize(
            source, recipe, layout, include, max_shard_size, jobs, max_memory, format_, ignore, only, group_size,
            scale, ue8m0, double_quant, experts, dtype, allow_nonfinite, device, max_vram, destination,
        )  # fmt: skip
        show_or_run(made, destination, how, pool)


@app.command(cls=Command)
def dequantize(
    source: Source, destination: Destination, dtype: DecodedDtypeOption = None, recipe: RecipeOption = None,
    layout: LayoutOption = None, include: IncludeOption = None, max_shard_size: ShardOption = "5GB",
    jobs: JobsOption = None, max_memory: MemoryOption = None, device: DeviceOption = "auto",
    max_vram: VramOption = None, as_json: JsonOption = False, dry_run: DryRunOption = False,
    no_fsync: NoFsyncOption = False, overwrite: OverwriteOption = False, restart: RestartOption = False,
    hashes: HashOption = False, consume_source: ConsumeOption = False, yes: YesOption = False,
) -> None:  # fmt: skip
    """Decode quantized matrices to full precision; experts that share a tensor are written one by one."""
    how = run_options(as_json, dry_run, no_fsync, overwrite, restart, hashes, consume_source, yes)
    if not begin(source, destination, how):
        return
    with start_pool(jobs, device, dry_run) as pool:
        made = _plan_dequantize(
            source, recipe, layout, include, max_shard_size, jobs, max_memory, dtype, device, max_vram, destination
        )  # fmt: skip
        show_or_run(made, destination, how, pool)


@plan_app.command("quantize", cls=Command)
def plan_quantize_command(
    source: Source, destination: OptionalDestination = None, format_: FormatOption = None,
    ignore: IgnoreOption = None, only: OnlyOption = None, group_size: GroupOption = None, scale: ScaleOption = None,
    ue8m0: Ue8m0Option = False, double_quant: DoubleOption = False, experts: ExpertsOption = None,
    dtype: DtypeOption = None, allow_nonfinite: NonfiniteOption = False,
    recipe: RecipeOption = None, layout: LayoutOption = None, include: IncludeOption = None,
    max_shard_size: ShardOption = "5GB", jobs: JobsOption = None, max_memory: MemoryOption = None,
    device: DeviceOption = "auto", max_vram: VramOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """What `moeconv quantize` would do."""
    made = _plan_quantize(
        source, recipe, layout, include, max_shard_size, jobs, max_memory, format_, ignore, only, group_size,
        scale, ue8m0, double_quant, experts, dtype, allow_nonfinite, device, max_vram,
    )  # fmt: skip
    show_plan(made, destination or source.resolve().parent, as_json=as_json)


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
    show_plan(made, destination or source.resolve().parent, as_json=as_json)
