"""From a size to a plan: measure what formats cost, choose one for each part, write the choice as a recipe."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moeconv.checkpoint import MAX_CONFIG_BYTES, Checkpoint, open_checkpoint
from moeconv.destination import check_foreign
from moeconv.encoded import CONFIG_DTYPES
from moeconv.errors import CheckpointError, OutputError, PlanError, UsageError
from moeconv.explain import size
from moeconv.files import Files
from moeconv.formats import FAMILY_FORMATS, FORMATS, Format, Probe, format_name
from moeconv.manifest import largest_manifest
from moeconv.plan import DEFAULT_SHARD_BYTES, Options, Plan
from moeconv.quantize import Measurement, plan_measurement, plan_quantize
from moeconv.recipe import Recipe
from moeconv.scheme import FormatRule, Scheme, option_as_given, parse_format, scheme_of
from moeconv.sizing import (
    Component,
    Option,
    choose,
    components,
    error_of,
    measured,
    recipe_of,
    total_of,
    uniform_choices,
)

#: Plans that are made until no better one is found: headers and shards are only known then.
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
        command: the command line, which the manifest of the result holds.
        hashes: the manifest has the sha256 of every file.
    """

    nbytes: int
    formats: Mapping[str, Mapping[str, Any]]
    ignore: tuple[str, ...]
    only: tuple[str, ...]
    dtype: str | None
    allow_nonfinite: bool
    extends: str | None
    command: tuple[str, ...] = ()
    hashes: bool = False


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
        if name in FAMILY_FORMATS:
            raise UsageError(
                f"--formats: {name} is for all experts of a model or none", f"Take it alone with --format {name}."
            )
        takes = FORMATS[name][1] if name in FORMATS else dict.fromkeys(options, str)
        own = {key: value for key, value in options.items() if key in takes and _is_known(value, takes[key])}
        made = parse_format(name, own, "--formats")
        if made.is_packed or made.experts_kept:
            raise UsageError(
                f"--formats: experts of {name} are not quantized one by one, as a choice among formats needs it",
                f"Take it alone with --format {name}.",
            )
        if made.quant_method != "compressed-tensors" and len(set(names)) > 1:
            raise UsageError(f"--formats: {name} cannot stand beside another format", "Take nvfp4a16, or it alone.")
        found[name] = own
    for key, value in options.items():
        if not any(key in own for own in found.values()):
            said = option_as_given(key, "--formats") + (f" {value}" if key == "search" else "")
            raise UsageError(f"--formats: none of {', '.join(found)} takes {said}", "Leave the option out.")
    return found, notes


def _is_known(value: object, kind: object) -> bool:
    """Whether an option is one of the words that a format knows, where it knows words."""
    return not isinstance(kind, tuple) or (isinstance(value, str) and format_name(value) in kind)


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
        OutputError: another recipe has that name, or the destination is not moeconv's.
    """
    path = destination.with_name(f"{destination.name}.recipe.yaml")
    folder = destination.with_name(f"{destination.name}.measured")
    files = Files()
    check_foreign(destination, files)
    before = _recipe_before(path, files)
    formats = [parse_format(name, own, "--formats") for name, own in wanted.formats.items()]
    measurement = plan_measurement(source, recipe, _measuring(wanted, formats), options)
    sizer = _Sizer(source, recipe, wanted, options, path)
    has_index, base = sizer.least(measurement, formats)  # whether anything fits is known without measuring
    measure(measurement.plan, folder)
    parts = components(measurement, formats, measured(open_checkpoint(folder)), has_index)
    found = sizer.best(parts, base)
    if before not in (None, found.text) and not overwrite:
        raise OutputError(
            f"{path} exists and is another recipe than the one chosen now",
            f"Run it as it is with --recipe {path}, remove it, or replace it with --overwrite.",
        )
    _write(files, path, found.text.encode())
    return found.plan, path, folder


class _Try(NamedTuple):
    """A choice: its recipe, the plan that it makes, and the bytes of that plan's whole folder."""

    text: str
    plan: Plan
    nbytes: int
    error: float


class _Sizer:
    """Finds the choice of least error whose folder fits."""

    def __init__(self, source: Checkpoint, recipe: Recipe, wanted: Wanted, options: Options, path: Path) -> None:
        self.source = source
        self.recipe = recipe
        self.wanted = wanted
        self.options = options
        self.path = path
        self.tried: dict[tuple[int, ...], _Try] = {}

    def least(self, measurement: Measurement, formats: Sequence[Format]) -> tuple[bool, int]:
        """Whether the result has an index, and the bytes of its folder beside those of the parts.

        Raises:
            PlanError: even the smallest choice does not fit, or the model fits as it is.
        """
        parts = components(measurement, formats, {}, False)
        smallest = [min(part.options, key=lambda option: option.nbytes) for part in parts]
        if all(option.format is None for option in smallest):
            raise PlanError("no matrix can have any of these formats", "Add another format to --formats.")
        found = self._tried(parts, smallest)
        if found.nbytes > self.wanted.nbytes:
            raise PlanError(
                f"the smallest folder that these formats can make is {size(found.nbytes)} ({found.nbytes:,} bytes)",
                "Give a larger --target-size, or add a smaller format to --formats.",
            )
        has_index = len(found.plan.files) > 1
        parts = components(measurement, formats, {}, has_index)
        base = found.nbytes - sum(min(option.nbytes for option in part.options) for part in parts)
        if base + sum(part.options[-1].nbytes for part in parts) <= self.wanted.nbytes:
            raise PlanError(
                f"the model fits {size(self.wanted.nbytes)} as it is: nothing would be quantized",
                "Give a smaller --target-size.",
            )
        self.tried.clear()  # errors were not known
        return has_index, base

    def best(self, parts: Sequence[Component], base: int) -> _Try:
        """The fitting choice of least error: sizes are estimates until a plan is made, and each plan mends them."""
        fitting = [min(part.options, key=lambda option: (option.nbytes, option.error)) for part in parts]
        found = self._tried(parts, fitting)
        room = self.wanted.nbytes - base
        for _ in range(_ATTEMPTS):
            chosen = choose(parts, max(room, total_of(fitting)))
            if _key(chosen) in self.tried:
                break
            made = self._tried(parts, chosen)
            if made.nbytes <= self.wanted.nbytes and made.error < found.error:
                found = made
            room = total_of(chosen) + self.wanted.nbytes - made.nbytes
        for chosen in uniform_choices(parts):  # none of these may be better, be it by a byte
            is_near = total_of(chosen) <= room * 1.02 and any(option.format for option in chosen)
            if is_near and error_of(chosen) < found.error and _key(chosen) not in self.tried:
                made = self._tried(parts, chosen)
                found = made if made.nbytes <= self.wanted.nbytes else found
        return found

    def _tried(self, parts: Sequence[Component], chosen: Sequence[Option]) -> _Try:
        wanted, error = self.wanted, error_of(chosen)
        about = f"at most {wanted.nbytes} bytes, formats {' '.join(wanted.formats)}, summed error {error:.4g}"
        text = recipe_of(parts, chosen, about, wanted.formats, wanted.extends) + self._run_with()
        said: dict[str, Any] = {
            "format": None, "options": {}, "rules": text, "ignore": list(wanted.ignore), "only": list(wanted.only),
            "dtype": wanted.dtype, "allow_nonfinite": wanted.allow_nonfinite,
        }  # fmt: skip
        plan = plan_quantize(self.source, self.recipe, scheme_of(said, str(self.path)), self.options)
        nbytes = plan.output_nbytes + largest_manifest(plan, wanted.command, wanted.hashes)
        found = self.tried[_key(chosen)] = _Try(text, plan, nbytes, error)
        return found

    def _run_with(self) -> str:
        """What a recipe cannot say, and its run needs."""
        wanted, options = self.wanted, self.options
        words = [f"--ignore {shlex.quote(pattern)}" for pattern in wanted.ignore]
        words += [f"--only {shlex.quote(pattern)}" for pattern in wanted.only]
        words += [f"--dtype {name}" for name, short in CONFIG_DTYPES.items() if short == wanted.dtype]
        words += ["--allow-nonfinite"] if wanted.allow_nonfinite else []
        if options.max_shard_nbytes != DEFAULT_SHARD_BYTES:
            words.append(f"--max-shard-size {options.max_shard_nbytes}")
        return f"# To make the same again, give --recipe together with {' '.join(words)}\n" if words else ""


def _key(chosen: Sequence[Option]) -> tuple[int, ...]:
    return tuple(id(option) for option in chosen)


def _measuring(wanted: Wanted, formats: Sequence[Format]) -> Scheme:
    text = json.dumps({"measured": wanted.formats, "ignore": wanted.ignore, "only": wanted.only, "dtype": wanted.dtype})
    ignored = tuple(FormatRule(pattern, None, "--ignore") for pattern in wanted.ignore)
    return Scheme(ignored, Probe(formats), wanted.only, wanted.dtype, wanted.allow_nonfinite, text)


def _recipe_before(path: Path, files: Files) -> str | None:
    """The recipe that lies there.

    Raises:
        OutputError: it is something else.
    """
    if not files.exists(path):
        return None
    try:
        return files.read_bytes(path, MAX_CONFIG_BYTES).decode()
    except (CheckpointError, UnicodeDecodeError):
        raise OutputError(
            f"{path} exists and is no recipe; the choice would be written there", "Remove it, or choose another DST."
        ) from None


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
