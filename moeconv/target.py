"""From a size to a plan: measure what formats cost, choose one for each part, write the choice as a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moeconv.checkpoint import MAX_CONFIG_BYTES, Checkpoint, open_checkpoint
from moeconv.errors import OutputError, PlanError, UsageError
from moeconv.explain import size
from moeconv.files import Files
from moeconv.formats import FORMATS, Probe, format_name
from moeconv.plan import Options, Plan
from moeconv.quantize import plan_measurement, plan_quantize
from moeconv.recipe import Recipe
from moeconv.scheme import FormatRule, Scheme, build_scheme, parse_format
from moeconv.sizing import choose, components, measured, recipe_of

#: Plans that are made until one fits: headers and shards are only known then.
_ATTEMPTS = 6


class Wanted(NamedTuple):
    """What the user asks for.

    Attributes:
        nbytes: that the output may have.
        formats: names, with the options of each.
        ignore: patterns that are kept.
        only: patterns outside of which all is kept; empty for none.
        dtype: of float32 matrices; None as they are.
        allow_nonfinite: NaN and infinities count as zero.
        extends: the recipe of the layouts, where one is named.
    """

    nbytes: int
    formats: Mapping[str, Mapping[str, Any]]
    ignore: tuple[str, ...]
    only: tuple[str, ...]
    dtype: str | None
    allow_nonfinite: bool
    extends: str | None


def parse_formats(text: str, options: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Formats of a list with commas, each with those options that it takes; and what the user should know.

    Raises:
        UsageError: an unknown format, one that stands alone among others, or an option that none takes.
    """
    names = [format_name(name) for name in text.split(",") if name.strip()]
    notes = []
    if "fp8" in names and len(set(names)) > 1:
        notes.append("fp8 cannot stand beside another format in one config.json: fp8_dynamic is taken")
        names = ["fp8_dynamic" if name == "fp8" else name for name in names]
    if not names:
        raise UsageError("--formats names no format", f"Formats: {', '.join(FORMATS)}.")
    found = {}
    for name in dict.fromkeys(names):
        takes = FORMATS[name][1] if name in FORMATS else options
        own = {key: value for key, value in options.items() if key in takes}
        made = parse_format(name, own, "--formats")
        if made.quant_method != "compressed-tensors" and len(set(names)) > 1:
            raise UsageError(f"--formats: {name} cannot stand beside another format", "Take nvfp4a16, or it alone.")
        found[name] = own
    for key in options:
        if not any(key in own for own in found.values()):
            raise UsageError(f"--formats: none of {', '.join(found)} takes {key}", "Leave the option out.")
    return found, notes


def plan_for_size(
    source: Checkpoint, recipe: Recipe, wanted: Wanted, options: Options, destination: Path,
    measure: Callable[[Plan, Path], None], overwrite: bool,
) -> tuple[Plan, Path, Path]:  # fmt: skip
    """The plan of a quantization that fits a size.

    Args:
        source: the checkpoint.
        recipe: how its experts are stored.
        wanted: what is asked for.
        options: see `Options`.
        destination: of the quantization; the recipe and the measurement lie beside it.
        measure: runs a plan that makes a folder.
        overwrite: replace another recipe of that name.

    Returns:
        The plan, the recipe that it is made from, and the folder of the measurement.

    Raises:
        PlanError: nothing fits, or what stands in the way of a quantization.
        OutputError: another recipe has that name.
    """
    formats = [parse_format(name, own, "--formats") for name, own in wanted.formats.items()]
    text = json.dumps({"measured": wanted.formats, "ignore": wanted.ignore, "only": wanted.only, "dtype": wanted.dtype})
    scheme = Scheme(
        tuple(FormatRule(pattern, None, "--ignore") for pattern in wanted.ignore), Probe(formats), wanted.only,
        wanted.dtype, wanted.allow_nonfinite, text,
    )  # fmt: skip
    plan, values, blocks = plan_measurement(source, recipe, scheme, options)
    folder = destination.with_name(f"{destination.name}.measured")
    measure(plan, folder)
    parts = components(values, blocks, formats, measured(open_checkpoint(folder)))
    path = destination.with_name(f"{destination.name}.recipe.yaml")
    files = Files()
    before = files.read_bytes(path, MAX_CONFIG_BYTES).decode() if files.exists(path) else None
    fixed = sum(value.fill.target.nbytes for value in values if value.format is None)
    room = wanted.nbytes - fixed - sum(file.nbytes for file in source.sidecars)
    for _ in range(_ATTEMPTS):
        chosen = choose(parts, room)
        if all(option.format is None for option in chosen):
            raise PlanError(
                f"the model fits {size(wanted.nbytes)} as it is: nothing would be quantized",
                "Give a smaller --target-size.",
            )
        error = sum(option.error for option in chosen)
        about = f"at most {wanted.nbytes} bytes, formats {' '.join(wanted.formats)}, summed error {error:.4g}"
        text = recipe_of(parts, chosen, about, wanted.formats, wanted.extends)
        if before is not None and before != text and not overwrite:
            raise OutputError(
                f"{path} exists and is another recipe than the one chosen now",
                f"Run it as it is with --recipe {path}, remove it, or replace it with --overwrite.",
            )
        _write(files, path, text.encode())
        made = _planned(source, recipe, path, wanted, options)
        over = made.output_nbytes - wanted.nbytes
        if over <= 0:
            return made, path, folder
        before = None  # our own first try
        room = min(room, sum(option.nbytes for option in chosen)) - over
    raise PlanError(
        f"no choice of formats was found that makes {size(wanted.nbytes)}", "Give a slightly larger --target-size."
    )


def _write(files: Files, path: Path, content: bytes) -> None:
    """Put a file there, whole or not at all."""
    beside = path.with_name(f"{path.name}.partial")
    file = files.create(beside, len(content))
    try:
        file.write_at(content, 0)
        file.sync()
    finally:
        file.close()
    files.rename(beside, path)


def _planned(source: Checkpoint, recipe: Recipe, path: Path, wanted: Wanted, options: Options) -> Plan:
    scheme, _ = build_scheme(
        None, {}, str(path), wanted.ignore, wanted.only, wanted.dtype, wanted.allow_nonfinite
    )  # fmt: skip
    return plan_quantize(source, recipe, scheme, options)
