"""A format for each part of a model, so that the whole fits a size and the summed error is least.

What is decided at once is what engines need alike: all experts of a layer, and the linear layers of one parent
(attention, shared experts, a dense layer). The error of such a part is the sum, over its projections, of the squared
difference relative to the squares of the weights: the noise that each linear layer adds to its output, relative to
the output, for inputs of equal size. Experts of one projection are taken together, as a token sees a mean of them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import groupby, takewhile
from typing import NamedTuple

from moeconv.checkpoint import Checkpoint
from moeconv.errors import PlanError
from moeconv.explain import size
from moeconv.files import Files
from moeconv.formats import Format
from moeconv.names import natural_key
from moeconv.quantize import Measurement
from moeconv.tensors import Spec, total_nbytes
from moeconv.values import Value, kept, parts_of

_WEIGHT = ".weight"
#: Sizes are counted in so many steps of the room that there is.
_STEPS = 100_000
#: Bytes that one table of the search may take.
_TABLE_NBYTES = 50_000_000


class Option(NamedTuple):
    """A format, None to keep a part as it is; the bytes and the error that it costs."""

    format: Format | None
    nbytes: int
    error: float


class Component(NamedTuple):
    """What gets one format.

    Attributes:
        modules: names of its matrices without `.weight`.
        patterns: what names these modules and no others, for the rules of a recipe.
        options: what it can be, `keep` last.
    """

    modules: tuple[str, ...]
    patterns: tuple[str, ...]
    options: tuple[Option, ...]


def measured(folder: Checkpoint) -> dict[str, tuple[list[float], float]]:
    """Sums of squared errors for each format, and of squares, by module; from a folder that a `Probe` filled."""
    files = Files()
    found: dict[str, list[list[float]]] = {}
    for number, tensors in groupby(folder.tensors.items(), key=lambda item: item[1].file):
        file = files.open_read(folder.root / folder.files[number].path)
        try:
            for name, tensor in tensors:
                content = bytearray(tensor.spec.nbytes)
                file.read_into(memoryview(content), tensor.offset)
                numbers = struct.unpack(f"<{len(content) // 8}d", content)
                module, _, what = name.rpartition(".")
                width = tensor.spec.shape[1]
                sums = [sum(numbers[column::width]) for column in range(width)]
                found.setdefault(module, [[], []])[what == "norms"] = sums
        finally:
            file.close()
    return {module: (errors, norms[0]) for module, (errors, norms) in found.items()}


def components(
    measurement: Measurement, formats: Sequence[Format], found: Mapping[str, tuple[list[float], float]], has_index: bool
) -> list[Component]:  # fmt: skip
    """The parts of a model that are decided, in natural order.

    Args:
        measurement: every target, also those that are not measured.
        formats: in the order of the results.
        found: see `measured`; nothing for errors of zero.
        has_index: the result has several files.
    """
    grouped: dict[tuple[str, bool], list[Value]] = {}
    for value in measurement.values:
        name = value.fill.target.name
        if value.format is not None:
            block = measurement.blocks.get(name)
            key = (block, True) if block else (name.removesuffix(_WEIGHT).rpartition(".")[0], False)
            grouped.setdefault(key, []).append(value)
    targets = [value.fill.target for value in measurement.values]
    everything = [spec.name.removesuffix(_WEIGHT) for spec in targets if len(spec.shape) == 2]
    parts = []
    for key in sorted(grouped, key=lambda item: (natural_key(item[0]), item[1])):
        group = grouped[key]
        options = [_option(group, made, number, found, measurement, has_index) for number, made in enumerate(formats)]
        whole = Option(None, _nbytes([value.fill.target for value in group], has_index), 0.0)
        modules = tuple(value.fill.target.name.removesuffix(_WEIGHT) for value in group)
        fitting = [option for option in options if option is not None]
        parts.append(Component(modules, tuple(_patterns(modules, everything)), (*fitting, whole)))
    return parts


def _option(
    group: Sequence[Value], made: Format, number: int, found: Mapping[str, tuple[list[float], float]],
    measurement: Measurement, has_index: bool,
) -> Option | None:  # fmt: skip
    """What a format would cost; None where some matrix of the group cannot have it."""
    errors: dict[str, float] = {}
    norms: dict[str, float] = {}
    specs: list[Spec] = []
    for value in group:
        (name, _, shape), dtype = value.fill.target, value.fate.dtype
        if made.refusal(shape, dtype) is not None:
            return None
        module = name.removesuffix(_WEIGHT)
        specs += [Spec(f"{module}.{part.suffix}", part.dtype, part.shape) for part in parts_of(made, shape, dtype)]
        of_module, norm = found.get(module, ([0.0] * (number + 1), 1.0))
        projection = module.rpartition(".")[2]
        is_kept = name not in measurement.torn and kept(value.source, made, dtype)
        errors[projection] = errors.get(projection, 0.0) + (0.0 if is_kept else of_module[number])
        norms[projection] = norms.get(projection, 0.0) + norm
    error = sum(errors[key] / norms[key] for key in errors if norms[key])
    return Option(made, _nbytes(specs, has_index), error)


#: About what an entry of a header, and one of the index, takes beside the name and the shape.
_HEADER_NBYTES, _INDEX_NBYTES = 72, 45


def _nbytes(specs: Sequence[Spec], has_index: bool) -> int:
    """About the bytes that tensors take in a checkpoint."""
    names = sum(len(spec.name) + 6 * len(spec.shape) for spec in specs)
    entries = _HEADER_NBYTES * len(specs) + names + has_index * (_INDEX_NBYTES * len(specs) + names)
    return total_nbytes(specs) + entries


def _patterns(modules: Sequence[str], everything: Sequence[str]) -> list[str]:
    """As few patterns as name all modules and no other matrix of a model."""
    columns = zip(*(module.split(".") for module in modules), strict=False)
    parent = ".".join(words[0] for words in takewhile(lambda words: len(set(words)) == 1, columns))
    inside = [module for module in everything if module.startswith(f"{parent}.")]
    last_words = dict.fromkeys(module.rpartition(".")[2] for module in modules)
    for patterns in ([f"{parent}.*"], [f"{parent}.*{word}" for word in last_words]):
        if {m for m in inside if any(fnmatchcase(m, pattern) for pattern in patterns)} == set(modules):
            return patterns
    return list(modules)


def choose(parts: Sequence[Component], room: int) -> list[Option]:
    """An option for each part, of all that fit together into `room` bytes those of least summed error.

    Sizes are counted in steps of the room, upwards, so the best is found but for what less than a step a part decides;
    what is left is given to the parts that gain most. No choice of one format for all that fits is better.

    Raises:
        PlanError: even the smallest do not fit.
    """
    import numpy

    smallest = [min(option.nbytes for option in part.options) for part in parts]
    extra = room - sum(smallest)
    if extra < 0:
        raise PlanError(
            f"the smallest that these formats can make of the matrices is {size(sum(smallest))}; {size(max(0, room))} "
            "are left for them",
            "Give a larger --target-size, or add a smaller format to --formats.",
        )
    steps = max(1, min(_STEPS, _TABLE_NBYTES // max(1, len(parts)), extra))
    step = max(1, -(-extra // steps))
    count = extra // step + 1
    least = numpy.zeros(count)  # least error of the parts so far, by steps that they may take
    taken = numpy.zeros((len(parts), count), numpy.uint8)
    for number, part in enumerate(parts):
        best = numpy.full(count, numpy.inf)
        for which, option in enumerate(part.options):
            cost = -(-(option.nbytes - smallest[number]) // step)
            if cost >= count:
                continue
            errors = numpy.full(count, numpy.inf)
            errors[cost:] = least[: count - cost] + option.error
            is_better = errors < best
            best[is_better], taken[number, is_better] = errors[is_better], which
        least = best
    chosen: list[Option] = []
    at = count - 1
    for number in range(len(parts) - 1, -1, -1):
        option = parts[number].options[taken[number, at]]
        chosen.append(option)
        at -= -(-(option.nbytes - smallest[number]) // step)
    uniform = [alike for alike in uniform_choices(parts) if total_of(alike) <= room]
    return min([_filled(parts, chosen[::-1], room), *uniform], key=error_of)


def total_of(options: Sequence[Option]) -> int:
    """Bytes of a choice."""
    return sum(option.nbytes for option in options)


def error_of(options: Sequence[Option]) -> float:
    """Summed error of a choice."""
    return sum(option.error for option in options)


def uniform_choices(parts: Sequence[Component]) -> Iterator[list[Option]]:
    """One format for all parts that can have it; the others are kept."""
    formats = {id(option.format): option.format for part in parts for option in part.options}
    for made in formats.values():
        yield [next((option for option in part.options if option.format is made), part.options[-1]) for part in parts]


def _filled(parts: Sequence[Component], chosen: list[Option], room: int) -> list[Option]:
    """Take better options while there is room, those first that gain most for a byte."""
    left = room - total_of(chosen)
    while True:
        gains = [
            ((chosen[number].error - option.error) / max(1, option.nbytes - chosen[number].nbytes), number, which)
            for number, part in enumerate(parts)
            for which, option in enumerate(part.options)
            if option.error < chosen[number].error and option.nbytes - chosen[number].nbytes <= left
        ]
        if not gains:
            return chosen
        _, number, which = max(gains)
        left -= parts[number].options[which].nbytes - chosen[number].nbytes
        chosen[number] = parts[number].options[which]


def recipe_of(
    parts: Sequence[Component], chosen: Sequence[Option], about: str, options: Mapping[str, Mapping[str, object]],
    extends: str | None,
) -> str:  # fmt: skip
    """The choice as a recipe.

    Args:
        parts: what was decided.
        chosen: how.
        about: one line.
        options: of each format, as rules write them.
        extends: the recipe of the layouts, where one was named.
    """
    lines = [f"about: {about}"]
    lines += [f"extends: {json.dumps(extends)}"] if extends else []
    lines.append("quantize:")
    for part, option in zip(parts, chosen, strict=True):
        name = option.format.name if option.format else "keep"
        own = "".join(f", {key}: {_text(value)}" for key, value in options.get(name, {}).items())
        costs = f"error {option.error:.2e}" if len(part.options) > 1 else "no format of the list can be had"
        for number, pattern in enumerate(part.patterns):
            why = f"  # {size(option.nbytes)}, {costs}" if not number else ""
            lines.append(f'  - {{match: "{pattern}", format: {name}{own}}}{why}')
    return "\n".join(lines) + "\n"


def _text(value: object) -> str:
    """An option as YAML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
