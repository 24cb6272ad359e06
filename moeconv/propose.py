"""A recipe for a checkpoint that none is for, proposed from its headers and config.json.

Lines on which all readings of the matrices agree are decided. For the others the recipe says DECIDE, which `recipes
check` refuses, with the choices above the line. The proposal is tried on the checkpoint, and what it does not cover is
said in its comments.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence

from moeconv.checkpoint import Checkpoint
from moeconv.discover import Key, Stack, find_experts, sizes_of
from moeconv.drafts import ROLES, Experts, Line, Sort, drafted
from moeconv.errors import PlanError, RecipeError
from moeconv.forms import with_forms
from moeconv.layouts import find_units
from moeconv.names import collapse, holes, natural_key
from moeconv.ops import parts_of
from moeconv.recipe_file import UNDECIDED, load_shipped, parse_recipe, printable, quoted
from moeconv.selection import fitting, model_types, sample_of

_MAX_TRIALS = 8
_SCOPES = (".", "text_config")


def propose(source: Checkpoint) -> str:
    """The text of a recipe for the experts of a checkpoint.

    Raises:
        PlanError: nothing in it looks like experts that a recipe can describe.
    """
    shapes = {name: tensor.spec.shape for name, tensor in source.tensors.items()}
    keys = list(sizes_of(source.config))
    found, alike = find_experts(shapes, keys)
    if not found:
        raise _nothing_found(source)
    sorts, values = drafted(found)
    text = [_rendered(source, keys, sorts, values, choice) for choice in (None, *range(_choices(sorts)))]
    notes = _about(source, sorts, alike, text[1:])
    return "".join(f"# {line}\n" for note in notes for line in _wrapped(note)) + text[0]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 116, break_long_words=False, break_on_hyphens=False)


def _nothing_found(source: Checkpoint) -> PlanError:
    names = [name for name in source.tensors if "expert" in name and "share" not in name]
    shown = ", ".join(f"{printable(name)[:200]} {list(source.tensors[name].spec.shape)}" for name in names[:3])
    shipped = fitting(sample_of(source)) if names else []
    remedy = "A dense model needs no recipe. If it has experts, check that all of its files are there."
    if shipped:
        remedy = f"Names and shapes fit what is shipped: --recipe {' or '.join(shipped)}."
    elif names:
        remedy = (
            "Write a recipe by hand if the language can say it (`moeconv recipes show gate_up_down` is an example)."
        )
    return PlanError(
        f"{source.root} holds nothing that can be read as experts: no block has projections into an inner size and "
        "out of it, one by one under whole numbers between dots or stacked in one tensor"
        + (f"; {len(names):,} names say so: {shown}" if names else ""),
        remedy,
    )


def _choices(sorts: Sequence[Sort]) -> int:
    return min(_MAX_TRIALS, max(len(sort.variants) for sort in sorts))


def _rendered(
    source: Checkpoint, keys: Sequence[Key], sorts: Sequence[Sort], values: Mapping[str, set[int]], choice: int | None
) -> str:
    """The recipe without the comments at its top; with a `choice`, that one is written wherever there are several."""
    named = model_types(source.config)[:1]
    lines = [f"about: {quoted(f'Proposed for {named[0] if named else source.root.name}')}"]
    lines.append(f"model_types: [{', '.join(map(_plain, named))}]")
    lines += _dims(values, keys)
    optional = [part for sort in sorts for part in _optional(sort)]
    if optional:
        lines.append(f"optional: [{', '.join(dict.fromkeys(optional))}]")
    lines.append("layouts:")
    same_as = [
        layout for layout in ("experts", "packed") if all(v["hub"] is v[layout] for s in sorts for v in s.variants)
    ]
    for layout in ("hub", "packed", "experts") if not same_as else ("experts", "packed"):
        lines.append(f"  {layout}:")
        for sort in sorts:
            lines += _layout([variant[layout] for variant in sort.variants], choice)
    lines += [f"  hub: {layout}" for layout in same_as[:1]]
    return "\n".join(lines) + "\n"


def _dims(values: Mapping[str, set[int]], keys: Sequence[Key]) -> Iterator[str]:
    chosen = {symbol: _key_of(symbol, sizes, keys) for symbol, sizes in values.items()}
    scopes = _scopes(chosen, values)
    if not set(scopes) <= set(_SCOPES):
        yield f"config: [{', '.join(scopes)}]"
    if any(chosen.values()):
        yield "dims:"
    for symbol, same in chosen.items():
        shown = " or ".join(map(str, sorted(values[symbol]))) or "not decided"
        if same:
            others = list(dict.fromkeys(key.name for key in same if key.name != same[0].name))[:3]
            more = f"; also {', '.join(others)}" if others else ""
            yield f"  {symbol}: {same[0].name}  # {shown}{more}"
        else:
            yield f"{'  ' if any(chosen.values()) else ''}# {symbol}, {shown}: no key of config.json tells"


def _plain(word: str) -> str:
    return word if re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", word) else quoted(word)


def _layout(variants: Sequence[Sequence[Line]], choice: int | None) -> Iterator[str]:
    for choices in zip(*variants, strict=True):
        several = list(dict.fromkeys(choices))
        line = choices[0 if choice is None else choice % len(choices)]
        if choice is None and len(several) > 1:
            if len({line.key for line in several}) == 1:
                yield f"    # {UNDECIDED}: {', or '.join(line.made_of for line in several)}"
            else:
                yield f"    # {UNDECIDED} by one of these lines:"
                yield from (f"    #   {line.key}: {line.made_of}" for line in several)
        yield f"    {line.key}: {line.made_of if choice is not None or len(several) == 1 else UNDECIDED}"


def _optional(sort: Sort) -> Iterator[str]:
    """Parts that some block lacks."""
    for experts in sort.held:
        blocks = experts.stack.blocks.values()
        rare = {tail for block in blocks for tail in block.shapes if any(tail not in b.shapes for b in blocks)}
        names = {experts.pattern(tail) for tail in rare}
        for line in experts.source(experts.readings[0]):
            if line.name in names:
                yield from parts_of(line.value)


def _key_of(symbol: str, sizes: set[int], keys: Sequence[Key]) -> list[Key]:
    """Keys of config.json that hold the sizes of a symbol, the most telling first; none where no name tells."""
    held: dict[str, set[int]] = {}
    for key in keys:
        held.setdefault(key.name, set()).update(key.values)
    fitting = [key for key in keys if sizes and sizes <= held[key.name] and key.values & sizes]
    telling = [key for key in fitting if key.tells(symbol[0])]
    if not telling:
        return []
    return sorted(
        fitting, key=lambda key: (key not in telling, held[key.name] != sizes, not re.search("moe|expert", key.name))
    )


def _scopes(chosen: Mapping[str, Sequence[Key]], values: Mapping[str, set[int]]) -> list[str]:
    """Where the chosen keys are looked up: as few places as hold all values."""
    scopes: list[str] = []
    for symbol, same in chosen.items():
        wanted = set(values[symbol])
        for key in sorted(same, key=lambda key: key.scope not in scopes):
            if key.name == same[0].name and key.values & wanted:
                wanted -= key.values
                scopes += [] if key.scope in scopes else [key.scope]
    return scopes


# What its comments say


def _about(source: Checkpoint, sorts: Sequence[Sort], alike: Sequence[Stack], trials: Sequence[str]) -> Iterator[str]:
    yield f"Proposed by `moeconv recipes new` from the headers and config.json of {printable(source.root.name)}."
    named = [
        recipe.name for recipe in load_shipped() for name in model_types(source.config) if name in recipe.model_types
    ]
    sample = sample_of(source)
    if named:
        yield f"Shipped recipes are for its model_type, use them if they fit: {', '.join(dict.fromkeys(named))}."
    elif fits := fitting(sample):
        yield f"Names and shapes also fit what is shipped, by `--recipe NAME`: {', '.join(fits)}."
    for sort in sorts:
        for experts in sort.held:
            yield _found(experts)
    for stack in alike:
        yield f"Not taken for experts, though alike: {_shown(f'{block}.{stack.stem}'[:-1] for block in stack.blocks)}."
    yield from _left_to_decide(sorts)
    yield from _rest(source, sorts)
    yield "Packed names are those of most models; the class that loads them decides: compare with its parameters."
    problems = [p for trial in trials for p in _problems(source if trial is trials[0] else sample, sorts, trial)]
    yield from (f"PROBLEM: {problem}" for problem in dict.fromkeys(problems))


def _shown(names: Iterable[str]) -> str:
    lines = [printable(line)[:200] for line in collapse(sorted(names, key=natural_key))]
    return ", ".join(lines[:3]) + (f" and {len(lines) - 3} more" if len(lines) > 3 else "")


def _found(experts: Experts) -> str:
    stack, reading = experts.stack, experts.readings[0]
    counts = sorted({block.experts for block in stack.blocks.values()})
    read = sorted(reading.roles.items(), key=lambda item: ROLES.index(item[1][0]))
    roles = ", ".join(
        f"{printable(tail[1:])} as {role}{' transposed' if is_flipped else ''}" for tail, (role, is_flipped) in read
    )
    where = f" in {printable(stack.stem[:-1])}" if stack.stem else ""
    return (
        f"{_shown(stack.blocks)}: {' or '.join(map(str, counts))} experts{where}, {stack.stored}"
        + (f" ({stack.ids[1:]})" if stack.ids else "")
        + f", I = {reading.inner}, H = {reading.hidden}; {roles}"
        + ("." if len(experts.readings) == 1 else ", or otherwise.")
    )


def _left_to_decide(sorts: Sequence[Sort]) -> Iterator[str]:
    several = [experts.readings for sort in sorts for experts in sort.held if len(experts.readings) > 1]
    if not several:
        return
    yield f"{UNDECIDED} stands where headers do not tell; the model's code does:"
    if any(reading.is_interleaved for readings in several for reading in readings):
        yield "- concat: all rows of gate, then all of up; interleave: in turns. Where up is first, write [up, gate]."
    if any(len({reading.flips for reading in readings}) > 1 for readings in several):
        yield "- shapes allow a tensor to be [out, in] or, transposed, [in, out]."
    if any(reading.order != readings[0].order for readings in several for reading in readings):
        yield "- names do not tell which matrix is which; the activation function is applied to what gate gives."


def _rest(source: Checkpoint, sorts: Sequence[Sort]) -> Iterator[str]:
    """Tensors beside the experts that have their number for a size, and shared experts."""
    hidden = {reading.hidden for sort in sorts for e in sort.held for reading in e.readings}
    counts = {(block, held.experts) for sort in sorts for e in sort.held for block, held in e.stack.blocks.items()}
    own = tuple(
        {f"{block}.{e.stack.stem}" for sort in sorts for e in sort.held for block in e.stack.blocks if e.stack.stem}
    )
    starts = {count: tuple(f"{block}." for block, other in counts if other == count) for _, count in counts}
    beside, shared = [], dict[str, None]()
    for name, tensor in source.tensors.items():
        if name.startswith(own):
            continue
        if is_shared := re.match(r".*shared?_expert[^.]*", name):
            shared[is_shared[0]] = None
        elif any(count in tensor.spec.shape and name.startswith(blocks) for count, blocks in starts.items()):
            beside.append((name, hidden & {*tensor.spec.shape}))
    routers = [name for name, _ in beside if re.search(r"gate|rout|bias|expert", name)]
    for word, names in (
        ("routers, by their size", routers or [name for name, is_wide in beside if is_wide]),
        ("shared experts", list(shared)),
    ):
        if names:
            yield f"Stay as they are ({word}): {_shown(names)}."


def _problems(source: Checkpoint, sorts: Sequence[Sort], text: str) -> Iterator[str]:
    """What a trial of the proposal finds wrong, and what it leaves out below the numbers of experts."""
    try:
        recipe = with_forms(parse_recipe(text, "proposed", "the proposal"), source)
    except RecipeError as error:
        raise PlanError(
            f"experts of {source.root} have names that no recipe can say: {printable(error.problems[0].message)}",
            "Rename the tensors: names in recipes have no spaces and no braces.",
        ) from None
    found = find_units(source, recipe)
    yield from (printable(problem.message) for problem in found.problems)
    stacks = [experts.stack for sort in sorts for experts in sort.held]
    numbered = {f"{block}.{s.stem}" for s in stacks if s.stored == "one by one" for block in s.blocks}
    rest = [tensor.spec.name for tensor in found.rest]
    left = [name for name in rest if any(before in numbered for before, *_ in holes(name))]
    if left and not found.problems:
        yield f"left as they are though they look like experts': {printable(', '.join(collapse(left)))[:400]}"
