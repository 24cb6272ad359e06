"""Quantized experts where they stand: a recipe's components in other forms, codes and scales in place of a matrix.

A recipe names the matrices of an expert. Where a checkpoint holds them quantized, each is several tensors that lie
and move as the matrix does, with other names and shapes: data from `recipes/forms.yaml`. `with_forms` adds these forms
to the components of a recipe; everything else treats them as it treats any component.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

from moeconv.checkpoint import Checkpoint
from moeconv.dims import Dim, parse_dim, parse_shape
from moeconv.encoded import is_symmetric, weight_bits
from moeconv.errors import RecipeError
from moeconv.names import Pattern
from moeconv.ops import Concat, Expression, Interleave, Part, parts_of
from moeconv.recipe import Component, Recipe, Rule
from moeconv.recipe_file import shipped_folder
from moeconv.tensors import Shape
from moeconv.yamldoc import nearest, read_yaml

_KEYS = ("name", "about", "bits", "tensors", "packed", "optional")
_WEIGHT = "weight"


class Form(NamedTuple):
    """One way to store a quantized matrix [N, K].

    Attributes:
        name: as the table calls it.
        tensors: for each word that stands in place of `weight`, the shape, in N, K and G.
        tails: what hangs behind a name that has no `.weight` to replace.
        optional: words that a checkpoint may lack.
        bits: the `num_bits` that config.json gives to weights in that form; 0 where shapes tell.
    """

    name: str
    tensors: Mapping[str, tuple[Dim, ...]]
    tails: Mapping[str, str]
    optional: frozenset[str]
    bits: int = 0

    @property
    def said(self) -> str:
        """The first word that says more than `weight`."""
        return next(word for word in self.tensors if word != _WEIGHT)

    @property
    def ends(self) -> dict[str, tuple[str, str]]:
        """How names of each tensor end: of a matrix of its own, and of a packed one."""
        return {word: (f".{word}", self.tails[word]) for word in self.tensors}

    def pattern(self, of: Pattern, word: str) -> Pattern:
        """The names of one of the tensors, where `of` names the matrices."""
        if of.text.endswith(f".{_WEIGHT}"):
            return Pattern.parse(of.text.removesuffix(_WEIGHT) + word)
        return Pattern.parse(of.text + self.tails[word])


@cache
def load_forms() -> tuple[Form, ...]:
    """All forms of the table."""
    path = shipped_folder() / "forms.yaml"
    root = {key.text(): value for key, value in read_yaml(path.read_text(encoding="utf-8"), str(path)).items()}
    forms = []
    for item in root["forms"].sequence():
        values = {}
        for key, value in item.items():
            if key.text() not in _KEYS:
                raise key.error(f"unknown key {key.text()!r}", nearest(key.text(), _KEYS))
            values[key.text()] = value
        tensors = {key.text(): parse_shape(value.text()) for key, value in values["tensors"].items()}
        renamed = {key.text(): value.text() for key, value in values["packed"].items()} if "packed" in values else {}
        tails = {word: renamed.get(word, _tail(word)) for word in tensors}
        optional = frozenset(values["optional"].texts() if "optional" in values else ())
        bits = values["bits"].integer() if "bits" in values else 0
        forms.append(Form(values["name"].text(), tensors, tails, optional, bits))
    return tuple(forms)


def _tail(word: str) -> str:
    return word.removeprefix(_WEIGHT) if word.startswith(_WEIGHT) else f"_{word}"


def check_forms(recipe: Recipe) -> None:
    """The forms that a recipe names are in the table.

    Raises:
        RecipeError: one is not.
    """
    known = [form.name for form in load_forms()]
    for name in recipe.forms:
        if name not in known:
            raise RecipeError(f"recipe {recipe.name}: unknown form {name!r} in forms:", nearest(name, known))


def with_forms(recipe: Recipe, source: Checkpoint) -> Recipe:
    """The recipe with the quantized forms that names of the checkpoint hint at; the same recipe where none do."""
    check_forms(recipe)
    last_words = {name.rpartition(".")[2] for name in source.tensors}
    bits = {0, *weight_bits(source.config)}
    hinted = [
        form for form in load_forms() if _is_hinted(form, last_words) and (bits == {0} or form.bits in bits)
    ]  # fmt: skip
    examples = _examples(source, tuple(end for form in hinted for end in form.ends[form.said]))
    forms = [form for form in hinted if any(_is_example(form, name, source) for name in examples)]
    # Of two that fit alike the first is taken: the one that the folder was made from, or that the family has.
    before = source.manifest.get("forms")
    forms.sort(key=lambda form: form.name not in recipe.forms)
    forms.sort(key=lambda form: not (isinstance(before, list) and form.name in before))
    if not forms:
        return recipe
    claims, ids, optional = dict(recipe.part_claims), dict(recipe.part_ids), set(recipe.optional)
    said = {name for component in recipe.components for name in _names(component)}
    components = []
    for component in recipe.components:
        made = []
        for form in forms if _can_be_quantized(component, recipe) else ():
            other = _formed(component, form)
            if _names(other) & said - _names(component):
                continue  # the recipe names these tensors itself
            made.append(other)
            for part in component.parts:
                for word, shape in form.tensors.items():
                    own = _own(part, form, word)
                    claims[own] = _part_claim(shape, recipe.part_claims[part], _group_of(part, component))
                    ids[own] = recipe.part_ids[part]
                    is_due = word == "weight_zero_point" and not is_symmetric(source.config)
                    if (word in form.optional and not is_due) or part in recipe.optional:
                        optional.add(own)
        components.append(component._replace(forms=tuple(made)))
    return recipe._replace(
        components=tuple(components), part_claims=claims, part_ids=ids, optional=frozenset(optional)
    )  # fmt: skip


def movable_forms(recipe: Recipe) -> list[str]:
    """The forms in which the experts of a recipe can be moved between the layouts `packed` and `experts`."""
    wanted = {recipe.layout(name) for name in ("packed", "experts") if name in recipe.layouts}
    experts = [component for component in recipe.components if _can_be_quantized(component, recipe)]
    return [
        form.name
        for form in load_forms()
        if experts and all(wanted <= set(_formed(component, form).rules) for component in experts)
    ]


def _names(component: Component) -> set[str]:
    return {str(rule.pattern) for rules in component.rules.values() for rule in rules}


def _is_hinted(form: Form, last_words: Iterable[str]) -> bool:
    """Names end as those of the form's required tensors do; a plain `weight` alone says nothing."""
    words = [word for word in form.tensors if word != _WEIGHT and word not in form.optional]
    return all(any(last == word or last.endswith(form.tails[word]) for last in last_words) for word in words)


def _examples(source: Checkpoint, telling: tuple[str, ...]) -> list[str]:
    """The first and the last name of those that end alike and have one shape: either may have lost its neighbours."""
    told = [tensor.spec for name, tensor in source.tensors.items() if name.endswith(telling)]
    kinds = [(*name.rsplit(".", 2)[1:], shape) for name, _, shape in told]
    last = dict(zip(kinds, told, strict=True))
    first = dict(zip(reversed(kinds), reversed(told), strict=True))
    first = {kind: first[kind] for kind in last}
    return list(dict.fromkeys(spec.name for spec in (*first.values(), *last.values())))


def _is_example(form: Form, name: str, source: Checkpoint) -> bool:
    """Whether the tensor and those beside it have the shapes of a matrix in that form, or of a stack of matrices."""
    for number, said in enumerate(form.ends[form.said]):
        if name.endswith(said):
            found = [source.tensors.get(name.removesuffix(said) + ends[number]) for ends in form.ends.values()]
            if _solved(form, [tensor and tensor.spec.shape for tensor in found]) is not None:
                return True
    return False


def _solved(form: Form, shapes: Sequence[Shape | None]) -> dict[str, int] | None:
    """N and K of a matrix whose tensors in that form, or stacks of them, have these shapes; None where none has."""
    sizes: dict[str, int] = {}
    for stored, (word, shape) in zip(shapes, form.tensors.items(), strict=True):
        if stored is None or len(stored) < len(shape):
            if word in form.optional:
                continue
            return None
        for dim, size in zip(shape, stored[-2:], strict=False) if len(shape) == 2 else ():
            solved = dim.solve(size, sizes)
            sizes.update([solved] if solved else [])
            if dim.symbols() <= set(sizes) and dim.value(sizes) != size:
                return None
    return sizes


def full_precision(shapes: Mapping[str, Shape], likely: Collection[int] = ()) -> dict[str, Shape]:
    """Names and shapes of tensors as a recipe describes them, every quantized matrix as one tensor.

    Args:
        shapes: the stored tensors.
        likely: sizes of the model, to tell apart forms of the same names.
    """
    result = dict(shapes)
    telling = tuple({end for form in load_forms() for end in form.ends[form.said]})
    for name in (name for name in shapes if name.endswith(telling)):
        readings = [reading for form in load_forms() for reading in _matrices(form, name, shapes)]
        if readings:
            matrix, shape, parts = max(readings, key=lambda r: (len(r[2]), len(set(r[1][-2:]) & set(likely))))
            for part in parts:
                result.pop(part, None)
            result[matrix] = shape
    return result


def _matrices(form: Form, name: str, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Shape, list[str]]]:
    """Name and shape of the matrix that a form would make of a tensor and those beside it, and their names."""
    for number, said in enumerate(form.ends[form.said]):
        stem = name.removesuffix(said)
        parts = [stem + ends[number] for ends in form.ends.values()]
        sizes = _solved(form, [shapes.get(part) for part in parts]) if stem != name else None
        if sizes:
            stacked = max((shapes[part] for part in parts if part in shapes), key=len)[:-2]
            yield (
                stem + (f".{_WEIGHT}", "")[number],
                (*stacked, sizes["N"], sizes["K"]),
                [part for part in parts if part in shapes],
            )


def _can_be_quantized(component: Component, recipe: Recipe) -> bool:
    return all(part in recipe.part_ids and len(recipe.part_claims[part]) == 2 for part in component.parts)


def _own(part: str, form: Form, word: str) -> str:
    return f"{part}.{form.name}.{word}"


def _formed(component: Component, form: Form) -> Component:
    """The component with every matrix stored in a form; without the layouts that the form cannot have."""
    rules: dict[str, tuple[Rule, ...]] = {}
    for layout, own in component.rules.items():
        made = [
            Rule(
                form.pattern(rule.pattern, word), _claim(rule, shape, component),
                _renamed(rule.value, form, word), rule.pad, rule.where,
            )
            for rule in own
            for word, shape in form.tensors.items()
        ]  # fmt: skip
        if all(_keeps(rule.value, shape) for rule in own for shape in form.tensors.values()):
            rules[layout] = tuple(made)
    parts = tuple(_own(part, form, word) for part in component.parts for word in form.tensors)
    return Component(parts, rules, form=form.name)


def _keeps(value: Expression, shape: tuple[Dim, ...]) -> bool:
    """Whether tensors of that shape can be joined as the matrices are, and mean the same afterwards."""
    if isinstance(value, Part):
        return True
    if not isinstance(value, Concat | Interleave) or value.axis != 0:
        return False
    if not all(isinstance(child, Part) for child in value.children) or not shape:
        return False
    return isinstance(value, Concat) or shape[0].symbol == "N"


def _renamed(value: Expression, form: Form, word: str) -> Expression:
    if isinstance(value, Part):
        return Part(_own(value.name, form, word))
    if isinstance(value, Concat | Interleave):
        return type(value)(tuple(_renamed(child, form, word) for child in value.children), value.axis)
    return type(value)(_renamed(value.child, form, word))


def _group_of(part: str, component: Component) -> Dim:
    """The symbol for the columns of a group: one for all parts that some layout joins in one tensor."""
    joined = {part}
    rules = [set(parts_of(rule.value)) for rules in component.rules.values() for rule in rules]
    for _ in rules:
        joined.update(*(names for names in rules if names & joined))
    symbol = f"G.{min(joined, key=component.parts.index)}"  # no recipe can write a dot
    return Dim(symbol, "symbol", symbol=symbol)


def _claim(rule: Rule, shape: tuple[Dim, ...], component: Component) -> tuple[Dim, ...]:
    """The shape of what a rule stores in a form: of a whole tensor, as its own claim is."""
    parts = parts_of(rule.value)
    *stacked, rows, columns = rule.claim
    sizes = {"N": rows, "K": columns, "G": _group_of(parts[0], component)}
    claimed = [dim.replace(sizes) for dim in shape]
    if shape and "N" not in shape[0].symbols():  # one such number, or a few, for each matrix
        claimed[0] = parse_dim(f"{len(parts)}*{claimed[0]}")
    return (*stacked, *claimed)


def _part_claim(shape: tuple[Dim, ...], claim: tuple[Dim, ...], group: Dim) -> tuple[Dim, ...]:
    sizes = {"N": claim[0], "K": claim[1], "G": group}
    return tuple(dim.replace(sizes) for dim in shape)
