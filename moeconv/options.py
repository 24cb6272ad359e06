"""Arguments and options that commands share, and how their values are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
import typer.core

from moeconv.errors import UsageError
from moeconv.formats import FAMILY_FORMATS, FORMATS

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}B": size for unit, size in _UNITS.items() if len(unit) == 1 and unit != "B"}
_UNITS |= {f"{unit}iB": 1024**power for power, unit in enumerate("KMGT", 1)}


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


class Command(typer.core.TyperCommand):
    """A command that starts fast."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _plainly(super().get_params(ctx))


class Group(typer.core.TyperGroup):
    """A group of commands that starts fast."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _plainly(super().get_params(ctx))


def _plainly(params: Sequence[Any]) -> list[Any]:
    for param in params:
        param._runtime_param = _Plain()  # a typer that does not know the attribute converts as ever
    return list(params)


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
JobsOption = Annotated[
    int | None, typer.Option("--jobs", min=1, help="Threads, or processes that encode. Default: one a core, at most 8.")
]
MemoryOption = Annotated[
    str | None, typer.Option("--max-memory", help="Most host memory to use, such as 500MB.", metavar="SIZE")
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device", help="Where matrices are encoded: auto takes a GPU where there is one.",
        metavar="auto|cpu|cuda|cuda:0,cuda:1",
    ),
]  # fmt: skip
VramOption = Annotated[
    str | None, typer.Option("--max-vram", help="Most memory to use on each GPU, such as 4GB.", metavar="SIZE")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
NoFsyncOption = Annotated[
    bool, typer.Option("--no-fsync", help="Do not wait for the disk: a power loss may damage a finished DST.")
]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace a DST that moeconv made, or discard an unfinished run of another plan."),
]
RestartOption = Annotated[
    bool, typer.Option("--restart", help="Discard an unfinished run and begin anew, instead of going on with it.")
]
HashOption = Annotated[
    bool, typer.Option("--hash", help="Note the sha256 of every file in moeconv.json: DST is read once more.")
]
ConsumeOption = Annotated[
    bool,
    typer.Option(
        "--consume-source",
        help="Delete each weight file of SRC once all that it held is in DST, durable and compared. Needs --yes.",
    ),
]
YesOption = Annotated[bool, typer.Option("--yes", help="Yes, --consume-source may delete the weights of SRC.")]

AgainstOption = Annotated[Path | None, typer.Option("--against", help="The folder it was made from.", metavar="SRC")]
CompareOption = Annotated[
    str | None,
    typer.Option(
        "--compare",
        help="How to compare with SRC. Default: bytes where they can be made again here, values of another tool's.",
        metavar="bytes|values",
    ),
]
StructureOption = Annotated[
    bool, typer.Option("--structure", help="Read headers, config.json and moeconv.json alone, and no numbers.")
]
SampleOption = Annotated[
    str | None,
    typer.Option(
        "--sample",
        help="Look at so many matrices, or this share of them, spread over layers and experts.",
        metavar="N|P%",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Which matrices --sample takes; 0 by default.")]


FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        help=f"{', '.join(FORMATS)}: for experts and linear layers. {', '.join(FAMILY_FORMATS)}: one family's experts.",
        metavar="NAME",
    ),
]
TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target-size",
        help="Choose among --formats for each part of the model, so that DST fits and the summed error is least.",
        metavar="SIZE",
    ),
]
FormatsOption = Annotated[
    list[str] | None,
    typer.Option("--formats", help="Formats to choose from, with --target-size. Repeatable.", metavar="NAME,NAME"),
]
IgnoreOption = Annotated[
    list[str] | None, typer.Option("--ignore", help="Keep modules of that name, * for any text. Repeatable.")
]
OnlyOption = Annotated[
    list[str] | None, typer.Option("--only", help="Quantize nothing but modules of that name. Repeatable.")
]
GroupOption = Annotated[
    int | None, typer.Option("--group-size", help="Columns of a group, for w4a16, w8a16 and w4a16_asym. Default: 128.")
]
ScaleOption = Annotated[
    str | None,
    typer.Option(
        "--scale",
        help="How scales are chosen: amax, or a search for less error: mse, four_over_six (NVFP4), full_range (w4a16).",
        metavar="NAME",
    ),
]
DoubleOption = Annotated[bool, typer.Option("--double-quant", help="Quantize scales of nf4 and fp4 too, to 8 bits.")]
ExpertsOption = Annotated[
    str | None,
    typer.Option(
        "--experts",
        help="keep: leave experts as they are. packed (default) or per-expert: tensors that nf4 and fp4 make of them.",
        metavar="NAME",
    ),
]
Ue8m0Option = Annotated[bool, typer.Option("--ue8m0", help="Scales of fp8 are powers of two.")]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="Round float32 matrices to it first.", metavar="bfloat16|float16|float32"),
]
DecodedDtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="Decode to it. Default: the dtype of the scales, or of the model.",
        metavar="bfloat16|float16|float32",
    ),
]  # fmt: skip
NonfiniteOption = Annotated[bool, typer.Option("--allow-nonfinite", help="Count NaN and infinities as zero.")]


class RunOptions(NamedTuple):
    """How a plan is run, whatever it is. `execute` says what each means."""

    as_json: bool = False
    dry_run: bool = False
    fsync: bool = True
    overwrite: bool = False
    restart: bool = False
    hashes: bool = False
    consume_source: bool = False


def run_options(
    as_json: bool, dry_run: bool, no_fsync: bool, overwrite: bool, restart: bool, hashes: bool, consume_source: bool,
    yes: bool,
) -> RunOptions:  # fmt: skip
    """How a plan is run, from the command line.

    Raises:
        UsageError: a source that is to be deleted without a word, or without waiting for the disk.
    """
    if yes and not consume_source:
        raise UsageError("--yes answers what only --consume-source asks", "Leave it out.")
    if consume_source and no_fsync:
        raise UsageError(
            "--consume-source deletes what is durable elsewhere, and --no-fsync does not wait for that",
            "Leave out --no-fsync.",
        )
    if consume_source and not yes and not dry_run:
        raise UsageError(
            "--consume-source deletes the weights of SRC while they are converted",
            "If DST is to be all that is left, say so with --yes.",
        )
    return RunOptions(as_json, dry_run, not no_fsync, overwrite, restart, hashes, consume_source)


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


def check_layouts(to: str | None, layout: str | None) -> None:
    """Refuse a word that is no layout.

    Raises:
        UsageError: such a word.
    """
    from moeconv.recipe import LAYOUTS

    for option, value in (("--to", to), ("--layout", layout)):
        if value is not None and value not in LAYOUTS:
            raise UsageError(f"{option} {value!r} is no layout", f"Known: {', '.join(LAYOUTS)}.")


def parse_dtype(name: str | None) -> str | None:
    """The safetensors name of a dtype as config.json has it.

    Raises:
        UsageError: not one of full precision.
    """
    from moeconv.encoded import CONFIG_DTYPES

    if name is not None and name not in CONFIG_DTYPES:
        raise UsageError(f"--dtype {name!r} is no dtype of full precision", f"Known: {', '.join(CONFIG_DTYPES)}.")
    return CONFIG_DTYPES[name] if name is not None else None


def parse_comparison(text: str | None, against: Path | None) -> str | None:
    """How to compare, as typed.

    Raises:
        UsageError: an unknown word, or nothing to compare with.
    """
    if text is not None and text not in ("bytes", "values"):
        raise UsageError(f"--compare {text!r} is no way to compare", "Known: bytes, values.")
    if text is not None and against is None:
        raise UsageError("--compare without --against", "Name the folder that DST was made from, or leave it out.")
    return text
