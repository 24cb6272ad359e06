"""Which tensors of a checkpoint are the experts that a recipe describes, and in which layout each block holds them.

Layout belongs to the checkpoint, even to each layer: the main layers of a release may be packed and its
MTP layer not. So it is found from headers, block by block, and every claim of the recipe is checked on
the way: ids, shapes, dtypes, sizes against config.json. What does not fit is refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moeconv.checkpoint import Checkpoint, StoredTensor
from moeconv.dims import Dim
from moeconv.encoded import quantization_config
from moeconv.errors import Problem
from moeconv.names import gaps, natural_key, ranges, split_name
from moeconv.ops import parts_of
from moeconv.recipe import LAYOUTS, Component, Recipe, Rule
from moeconv.suspects import FULL_PRECISION, bare_codes, lost_experts, unknown_experts
from moeconv.tensors import Shape
from moeconv.units import Hits, Unit, layout_lines


class Found(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        units: of the recipe.
        rest: tensors that belong to none.
        faults: what is wrong with them, whatever is to be done.
        unknown: what of the rest looks like experts, and would be left behind if the units moved.
    """

    units: tuple[Unit, ...]
    rest: tuple[StoredTensor, ...]
    faults: tuple[Problem, ...]
    unknown: tuple[Problem, ...]

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All that is wrong where units are to move or to change."""
        return self.faults + self.unknown


def config_sizes(checkpoint: Checkpoint, recipe: Recipe, block: str = "") -> dict[str, frozenset[int]]:
    """For each symbol, the sizes that config.json allows: values of the first key that exists, in every scope.

    A list (one value a layer or a modality) allows each of its values. Symbols without a key are absent. Where the
    first word of `block` has a config of its own (`thinker.model…` and `thinker_config`), that one decides.
    """
    own = f"{block.split('.')[0]}_config"
    allowed: dict[str, frozenset[int]] = {}
    for symbol, keys in recipe.dims.items():
        by_scope: dict[str, list[int]] = {}
        for scope in recipe.scopes:
            for key in keys:
                value = checkpoint.config_values(scope, key)
                numbers = [n for v in (value if isinstance(value, list) else [value]) if (n := _count(v))]
                if numbers:
                    by_scope[scope] = numbers
                    break
        scopes = [scope for scope in by_scope if scope.split(".")[0] == own] or list(by_scope)
        if scopes:
            allowed[symbol] = frozenset(number for scope in scopes for number in by_scope[scope])
    return allowed


#: No tensor has a longer axis.
_MOST = 1 << 63


def _count(value: object) -> int | None:
    """A size as config.json may write it: 8, 8.0 or "8"; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return int(number) if 0 < number < _MOST and number.is_integer() else None


def find_units(checkpoint: Checkpoint, recipe: Recipe, forced: str | None = None) -> Found:
    """Find every unit of a recipe.

    Args:
        checkpoint: where to look.
        recipe: what to look for.
        forced: the layout that the user says the source is in, for names and shapes that fit several.
    """
    search = _Search(checkpoint, recipe, recipe.layout(forced) if forced else None)
    decided: dict[tuple[int, str], list[_Decision]] = {}
    for (number, block), by_layout in search.candidates().items():
        component, family = search.components[number]
        decided.setdefault((family, block), []).append(search.decide(component, block, by_layout))
    held: list[frozenset[str]] = []
    for forms in decided.values():  # the form that explains most tensors, full precision first
        best = max(forms, key=lambda decision: (len(decision.names), decision.unit is not None))
        if best.unit:
            search.units.append(best.unit)
            held.append(best.names)
        search.problems += best.problems
    search.units.sort(key=lambda unit: (search.family(unit.component), natural_key(unit.block)))
    used: set[str] = set().union(*held)
    rest = [tensor for name, tensor in checkpoint.tensors.items() if name not in used]
    unknown: list[Problem] = []
    if not search.problems:
        unknown = unknown_experts(search.units, rest, recipe, search.method)
        search.problems += lost_experts(search.units, rest, recipe)
        if search.method:
            search.problems += bare_codes(search.units, rest, recipe)
    return Found(tuple(search.units), tuple(rest), tuple(search.problems), tuple(unknown))


class _Decision(NamedTuple):
    """What a component is in a block, or what is wrong with it; both empty where others count its tensors."""

    names: frozenset[str]
    unit: Unit | None = None
    problems: tuple[Problem, ...] = ()


_Candidates = dict[tuple[int, str], dict[str, dict[int, Hits]]]


class _Search:
    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, forced: str | None) -> None:
        self.checkpoint = checkpoint
        self.recipe = recipe
        self.forced = forced
        #: How config.json says that the model is quantized; empty where it says nothing.
        quantization = quantization_config(checkpoint.config)
        self.method = str(quantization.get("quant_method", "unnamed")) if quantization else ""
        self._allowed: dict[str, dict[str, frozenset[int]]] = {}
        self._kinds: dict[int, tuple[Hits, Counter[tuple[str, Shape]]]] = {}
        #: Components and their forms, each with the number of the component that it is or is a form of.
        self.components = [
            (other, number)
            for number, component in enumerate(recipe.components)
            for other in (component, *component.forms)
        ]
        self._families = {id(component): number for component, number in self.components}
        self.units: list[Unit] = []
        self.problems: list[Problem] = []

    def family(self, component: Component) -> int:
        """Number of the component that this one is or is a form of."""
        return self._families[id(component)]

    def allowed(self, block: str) -> dict[str, frozenset[int]]:
        """Sizes that config.json allows in a block."""
        word = block.split(".")[0]
        if word not in self._allowed:
            self._allowed[word] = config_sizes(self.checkpoint, self.recipe, block)
        return self._allowed[word]

    def kinds(self, hits: Hits) -> Counter[tuple[str, Shape]]:
        """How many tensors have each dtype and shape; the same hits are asked for once for each form."""
        found = self._kinds.get(id(hits))
        if found is None or found[0] is not hits:
            found = self._kinds[id(hits)] = hits, Counter([tensor.spec[1:] for tensor in hits.values()])
        return found[1]

    def usual_shape(self, hits: Hits) -> Shape:
        """The shape that most of them have."""
        shapes: Counter[Shape] = Counter()
        for (_, shape), count in self.kinds(hits).items():
            shapes[shape] += count
        return shapes.most_common(1)[0][0]

    def candidates(self) -> _Candidates:
        """Tensors that match by name: (component number, block) -> layout -> rule number -> id -> tensor."""
        templates: dict[str, list[tuple[tuple[int, ...], StoredTensor]]] = {}
        for name, tensor in self.checkpoint.tensors.items():
            template, integers = split_name(name)
            templates.setdefault(template, []).append((integers, tensor))
        stacks: dict[tuple[str, int | None], list[Hits]] = {}
        found: _Candidates = {}
        for number, (component, _) in enumerate(self.components):
            for layout, rules in component.rules.items():
                for rule_number, rule in enumerate(rules):
                    end, at = rule.pattern.template_end, rule.pattern.expert_integer
                    for template, tensors in templates.items():
                        if not template.endswith(end):
                            continue
                        if (template, at) not in stacks:
                            stacks[template, at] = _stacks(tensors, at)
                        for hits in stacks[template, at]:
                            match = rule.pattern.match(next(iter(hits.values())).spec.name)
                            if match:  # and so do the others, which differ in the expert's id alone
                                found.setdefault((number, match[0]), {}).setdefault(layout, {})[rule_number] = hits
        return dict(sorted(found.items(), key=lambda item: (item[0][0], natural_key(item[0][1]))))

    def decide(self, component: Component, block: str, by_layout: dict[str, dict[int, Hits]]) -> _Decision:
        """The unit of this block, or what is wrong with it."""
        trials = {
            layout: _Trial(self, component, block, layout, hits)
            for layout, hits in sorted(by_layout.items(), key=lambda item: LAYOUTS.index(item[0]))
        }
        if self.forced in trials:
            trials = {self.forced: trials[self.forced]}
        elif self.forced is not None and any(trial.names and trial.share == 1 for trial in trials.values()):
            return self._wrong(
                trials,
                f"{block} holds nothing of the layout {self.forced} that --layout names, "
                f"but tensors of {' and '.join(trials)}",
                "Leave --layout out: it is for shapes that fit several layouts.",
            )
        for trial in trials.values():
            trial.run()
        trials = {layout: trial for layout, trial in trials.items() if trial.names}
        if not trials:
            return _Decision(frozenset())  # every id belongs to another component with the same names
        fits = [trial for trial in trials.values() if not trial.problems]
        best = max(trials.values(), key=lambda trial: (not trial.problems, trial.share, -len(trial.problems)))
        others = [trial for trial in trials.values() if trial is not best and trial.names - best.names]
        if others and (best.share == 1 or len(fits) > 1):
            example = sorted(others[0].names - best.names, key=natural_key)[0]
            return self._wrong(
                trials,
                f"{block} holds experts in the layout {best.layout} and also {example} of layout {others[0].layout}",
                "Remove the copies that do not belong to the model: nothing says which of the two is right.",
            )
        if len({frozenset(layout_lines(component, trial.layout)) for trial in fits}) > 1:
            names = " or ".join(trial.layout for trial in fits)
            return self._wrong(
                trials,
                f"{block}: shapes fit the layouts {names} of recipe {self.recipe.name} alike",
                f"Say which one it is with --layout {'|'.join(trial.layout for trial in fits)}.",
            )
        if fits:
            return _Decision(fits[0].names, fits[0].unit())
        return _Decision(best.names, problems=tuple(best.problems))

    def _wrong(self, trials: Mapping[str, _Trial], message: str, remedy: str) -> _Decision:
        names = frozenset(name for trial in trials.values() for name in trial.names)
        return _Decision(names, problems=(Problem(message, remedy),))


class _Trial:
    """Whether one block's tensors are what one layout claims."""

    def __init__(self, search: _Search, component: Component, block: str, layout: str, hits: dict[int, Hits]) -> None:
        self.search = search
        self.component = component
        self.block = block
        self.layout = layout
        self.rules = component.rules[layout]
        self.hits = hits
        self.allowed = search.allowed(block)
        self.sizes: dict[str, int] = {}
        self.problems: list[Problem] = []
        self._narrow()
        self.names = frozenset(tensor.spec.name for hits in self.hits.values() for tensor in hits.values())

    @property
    def share(self) -> float:
        """Share of the layout's required rules that some tensor matches."""
        required = [number for number in range(len(self.rules)) if not self._is_optional(number)]
        return sum(number in self.hits for number in required) / max(1, len(required))

    def _is_optional(self, number: int) -> bool:
        return set(parts_of(self.rules[number].value)) <= self.search.recipe.optional

    def run(self) -> None:
        self._bind_from_shapes()
        self._bind_from_config()
        self._bind_from_ids()
        self._check_config()
        self._check_ids()
        self._check_tensors()

    def unit(self) -> Unit:
        recipe = self.search.recipe
        hits = tuple((rule, self.hits[number]) for number, rule in enumerate(self.rules) if number in self.hits)
        shapes: dict[str, Shape] = {}
        for rule, _ in hits:
            for part in parts_of(rule.value):
                sizes = [dim.value(self.sizes) for dim in recipe.part_claims[part]]
                shapes[part] = tuple(size for size in sizes if size is not None)
        return Unit(self.component, self.block, self.layout, self.sizes, shapes, hits)

    def _narrow(self) -> None:
        """Leave ids to the component that counts them, where two count their experts in the same names."""
        single = {symbol: next(iter(sizes)) for symbol, sizes in self.allowed.items() if len(sizes) == 1}
        for number in list(self.hits):
            ids = self.rules[number].pattern.ids
            if ids is None or not self._shares_names(self.rules[number]):
                continue
            start, stop = ids.start.value(single), ids.stop.value(single)
            if start is None or stop is None:
                self._problem(
                    f"config.json does not say where the experts {ids.start}..{ids.stop} begin and end",
                    f"Restore config.json: it must give {', '.join(sorted(ids.stop.symbols()))}.",
                )
                continue
            self.hits[number] = {id_: tensor for id_, tensor in self.hits[number].items() if start <= id_ < stop}
            if not self.hits[number]:
                del self.hits[number]

    def _bind_from_shapes(self) -> None:
        claims = [(self.rules[number].claim, self.search.usual_shape(hits)) for number, hits in self.hits.items()]
        pending = [
            (dim, size)
            for claim, shape in claims
            if len(claim) == len(shape)
            for dim, size in zip(claim, shape, strict=True)
        ]
        while pending:
            rest: list[tuple[Dim, int]] = []
            for dim, size in sorted(pending, key=lambda item: item[0].op != "symbol"):
                solved = dim.solve(size, self.sizes)
                if solved:
                    self.sizes[solved[0]] = solved[1]
                elif dim.value(self.sizes) is None:
                    rest.append((dim, size))
            if len(rest) == len(pending):
                return
            pending = rest

    def _bind_from_config(self) -> None:
        for symbol, allowed in self.allowed.items():
            if symbol not in self.sizes and len(allowed) == 1:
                self.sizes[symbol] = next(iter(allowed))
        self._bind_from_shapes()  # folded shapes such as [E*I, H] now have one unknown less

    def _bind_from_ids(self) -> None:
        known = dict(self.sizes)
        for number, hits in self.hits.items():
            ids = self.rules[number].pattern.ids
            if ids is None:
                continue
            solved = ids.stop.solve(max(hits) + 1, known) or ids.stop.solve(max(hits) + 1, self.sizes)
            if solved:
                self.sizes[solved[0]] = max(solved[1], self.sizes.get(solved[0], 0))

    def _problem(self, message: str, remedy: str) -> None:
        self.problems.append(Problem(f"{self.block}: {message}", remedy))

    def _check_config(self) -> None:
        used = {symbol for number in self.hits for dim in self.rules[number].claim for symbol in dim.symbols()}
        used |= {s for number in self.hits if (ids := self.rules[number].pattern.ids) for s in ids.stop.symbols()}
        for symbol in sorted(used):
            allowed = self.allowed.get(symbol)
            size = self.sizes.get(symbol)
            keys = ", ".join(self.search.recipe.dims.get(symbol, ())) or "no key"
            if size is None:
                self._problem(
                    f"the size {symbol} is unknown: neither shapes nor config.json ({keys}) give it",
                    "Restore config.json, or name its key under dims: in a recipe of your own.",
                )
            elif allowed and size not in allowed:
                self._problem(
                    f"{symbol} is {size:,} in the files and {' or '.join(f'{v:,}' for v in sorted(allowed))} "
                    f"in config.json ({keys})",
                    "Files and config.json belong to different models, or an axis is exchanged: check the source.",
                )

    def _check_ids(self) -> None:
        """Every rule must have the same full range of expert ids, and optional parts all or nothing."""
        for number, rule in enumerate(self.rules):
            hits = self.hits.get(number)
            ids = rule.pattern.ids
            if hits is None:
                plain = self._plain(rule)
                if plain is not None and not self._is_optional(number):
                    self._problem(
                        f"{plain.spec} is in full precision, and other matrices of these experts are quantized (form "
                        f"{self.component.form})",
                        "What moves together must be stored alike: dequantize the checkpoint first.",
                    )
                elif not self._is_optional(number):
                    self._problem(
                        f"{rule.pattern.fill('…', 0) if ids is None else _shown(rule)} is missing",
                        "Download the shard that should hold it again, or check that the recipe is the right one.",
                    )
                continue
            if ids is None:
                continue
            start, stop = ids.start.value(self.sizes), ids.stop.value(self.sizes)
            if start is None or stop is None:
                continue
            missing, extra = gaps(hits, start, stop), [id_ for id_ in hits if not start <= id_ < stop]
            if missing:
                self._problem(
                    f"{_shown(rule)} has {len(hits) - len(extra)} of {stop - start} experts; missing: {missing}"
                    + (f"; beyond the last: {ranges(extra)}" if extra else ""),
                    "Download the shards that should hold them again; experts are never renumbered.",
                )
            elif extra:
                self._problem(
                    f"{_shown(rule)} has the experts {ranges(extra)} beyond the last, {stop - 1}",
                    "Check the number of experts in config.json against the files.",
                )

    def _plain(self, rule: Rule) -> StoredTensor | None:
        """A matrix in full precision whose scales or the like `rule` names in vain."""
        part = parts_of(rule.value)[0].partition(".")[0]
        for number, hits in self.hits.items() if self.component.form else ():
            tensor = next(iter(hits.values()))
            own = parts_of(self.rules[number].value)[0]
            if own.partition(".")[0] == part and own.endswith(".weight") and tensor.spec.dtype in FULL_PRECISION:
                return tensor
        return None

    def _shares_names(self, rule: Rule) -> bool:
        """Another component counts its experts in the same names, from another id on."""
        return any(
            other.pattern.ids is not None and other.pattern.fill("", 0) == rule.pattern.fill("", 0)
            for component, family in self.search.components
            if family != self.search.family(self.component)
            for other in component.rules.get(self.layout, ())
        )

    def _check_tensors(self) -> None:
        for number, hits in self.hits.items():
            rule = self.rules[number]
            claimed = tuple(dim.value(self.sizes) for dim in rule.claim)
            claim = f"[{', '.join(map(str, rule.claim))}] = {[size if size is not None else '?' for size in claimed]}"
            kinds = self.search.kinds(hits)
            is_odd = any(shape != claimed for _, shape in kinds)
            odd = [tensor.spec for tensor in hits.values() if tensor.spec.shape != claimed] if is_odd else []
            dims = [*rule.claim, *(d for p in parts_of(rule.value) for d in self.search.recipe.part_claims[p])]
            broken = [dim for dim in dims if dim.value(self.sizes) is None and dim.symbols() <= set(self.sizes)]
            if broken:
                sizes = ", ".join(f"{symbol} = {self.sizes[symbol]:,}" for symbol in sorted(broken[0].symbols()))
                self._problem(
                    f"{next(iter(hits.values())).spec}: {broken[0]} is no whole number for {sizes}",
                    "This layout cannot hold such sizes; keep the layout that the checkpoint has.",
                )
            elif odd and None not in claimed:
                more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
                self._problem(
                    f"{odd[0].name} has the shape {list(odd[0].shape)}{more}; "
                    f"recipe {self.search.recipe.name} claims {claim}",
                    "The tensor is damaged or stored with exchanged axes; restore it, or give the right --recipe."
                    if not self.search.method
                    else f"The model is quantized ({self.search.method}): damaged, or in a form that is not known.",
                )
            if len({dtype for dtype, _ in kinds}) > 1:
                dtypes = Counter(tensor.spec.dtype for tensor in hits.values())
                usual, rare = dtypes.most_common()[0][0], dtypes.most_common()[-1][0]
                name = next(tensor.spec.name for tensor in hits.values() if tensor.spec.dtype == rare)
                self._problem(
                    f"{name} is {rare}; the others of its stack are {usual}",
                    "One tensor has one dtype: restore the source, or convert that expert first.",
                )


def _stacks(tensors: Sequence[tuple[tuple[int, ...], StoredTensor]], at: int | None) -> list[Hits]:
    """Tensors of one template whose names differ in the integer `at` alone, by it; each for itself without one."""
    if at is None:
        return [{0: tensor} for _, tensor in tensors]
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], Hits] = {}
    behind = at + 1 or None
    for integers, tensor in tensors:
        others = integers[:at], integers[behind:] if behind else ()
        found.setdefault(others, {})[integers[at]] = tensor
    return list(found.values())


def _shown(rule: Rule) -> str:
    return f"{rule.pattern.before}{{expert}}{rule.pattern.after}"
