"""config.json of a checkpoint whose matrices change: the `quantization_config` that readers need, and the dtype."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from moeconv import __version__
from moeconv.checkpoint import CONFIG
from moeconv.encoded import CONFIG_DTYPES, MODELOPT_SETTINGS, quantization_config
from moeconv.formats import METHOD, Format


class Group(NamedTuple):
    """Modules whose matrices have one format."""

    format: Format
    modules: tuple[str, ...]


def groups_of(formats: Iterable[tuple[Format, Iterable[str]]]) -> list[Group]:
    """Modules by what config.json says of their format; how scales were chosen or stored is not said there."""
    found: dict[str, tuple[Format, list[str]]] = {}
    for made, modules in formats:
        text = made.quant_method + json.dumps(made.settings(), sort_keys=True)
        found.setdefault(text, (made, []))[1].extend(modules)
    return [Group(made, tuple(modules)) for made, modules in found.values()]


#: Keys of config.json that say how the checkpoint was quantized.
_OF_QUANTIZATION = ("quantization_config", "compression_config", "expert_dtype")


def rewritten(
    config: Mapping[str, Any], groups: Sequence[Group], kept: Iterable[str], dtype: str | None,
    carried: Sequence[str] = (),
) -> dict[str, bytes]:  # fmt: skip
    """New content of config.json, and of what readers want to find beside it, by path.

    Args:
        config: what it says now.
        groups: what is quantized; none for a checkpoint in full precision.
        kept: linear modules that are not quantized.
        dtype: of the matrices, where it changes.
        carried: what is kept of the `quantization_config` that it has now.

    Returns:
        Nothing where there is no config.json.
    """
    if not config:
        return {}
    made = json.loads(json.dumps(config))
    has_dtype = "expert_dtype" in {**quantization_config(config), **config}
    for holder in (made, *(value for value in made.values() if isinstance(value, dict))):
        for key in _OF_QUANTIZATION:
            holder.pop(key, None)
    if has_dtype and groups and groups[0].format.quant_method == "fp8":
        made["expert_dtype"] = "fp8"  # where nothing is said, readers take "fp4"
    if groups:
        before = {key: value for key, value in quantization_config(config).items() if key in carried}
        made["quantization_config"] = {**before, **_quantization_config(groups, sorted(set(kept)))}
    name = next((name for name, short in CONFIG_DTYPES.items() if short == dtype), None)
    if name:
        for key in [key for key in ("dtype", "torch_dtype") if key in made] or ["dtype"]:
            made[key] = name
    contents = {CONFIG: _json(made)}
    if groups and groups[0].format.quant_method == "modelopt":
        said = made["quantization_config"]
        quantization = {
            "quant_algo": said["quant_algo"],
            "kv_cache_quant_algo": None,
            "group_size": said["config_groups"]["group_0"]["weights"]["group_size"],
            "exclude_modules": said["ignore"],
        }
        contents[MODELOPT_SETTINGS] = _json({"producer": said["producer"], "quantization": quantization})
    return contents


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _quantization_config(groups: Sequence[Group], kept: Sequence[str]) -> dict[str, Any]:
    """The one for all matrices: `fp8`, ModelOpt's, or compressed-tensors with a group for each format."""
    first = groups[0].format
    if first.quant_method in ("fp8", "mxfp4"):
        return {"quant_method": first.quant_method, **first.settings(), "modules_to_not_convert": kept}
    if first.quant_method == "bitsandbytes":
        return {"quant_method": "bitsandbytes", **first.settings(), "llm_int8_skip_modules": _ignored(groups, kept)}
    if first.quant_method == METHOD:
        return {"quant_method": METHOD, **first.settings(), "modules_to_not_convert": kept}
    if first.quant_method == "modelopt":
        settings = first.settings()
        return {
            "quant_method": "modelopt",
            "quant_algo": settings["quant_algo"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": settings["weights"]}},
            "ignore": _ignored(groups, kept),
            "producer": {"name": "moeconv", "version": __version__},
        }
    targets = [["Linear"]] if len(groups) == 1 else _targets([group.modules for group in groups])
    said = {}
    for number, (group, named) in enumerate(zip(groups, targets, strict=True)):
        settings = group.format.settings()
        said[f"group_{number}"] = {
            "targets": named,
            "weights": settings["weights"],
            "input_activations": settings["input_activations"],
            "output_activations": None,
            "format": settings["format"],
        }
    kinds = {group["format"] for group in said.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": _ignored(groups, kept),
        "config_groups": said,
    }


def _ignored(groups: Sequence[Group], kept: Sequence[str]) -> list[str]:
    """Kept modules. Readers take lm_head for a linear layer also where it is the embedding, without a tensor."""
    return sorted({*kept, *({"lm_head"}.difference(*(group.modules for group in groups)))})


def _targets(groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """Regular expressions for the modules of each group that name no module of another.

    Engines put words of their own before the layers of a model that has other parts, so the names begin there where
    that is enough. A number stands for all numbers, else the first one (the layer) for itself, else every one.
    """
    ways = [(is_whole, fixed) for is_whole in (False, True) for fixed in (0, 1, sys.maxsize)]
    taken = [Counter(form for modules in groups for form in {_form(m, *way) for m in modules}) for way in ways]
    return [
        sorted(
            {
                next(form for way, forms in zip(ways, taken, strict=True) if forms[form := _form(m, *way)] == 1)
                for m in modules
            }
        )
        for modules in groups
    ]


def _form(module: str, is_whole: bool, fixed: int) -> str:
    """A module's name as a regular expression in which all numbers but the first `fixed` ones are free."""
    words = module.split(".")
    numbers = [at for at, word in enumerate(words) if word.isdecimal()]
    start = 0 if is_whole or not numbers else max(0, numbers[0] - 1)
    free = numbers[fixed:]
    name = r"\.".join(r"\d+" if at in free else re.escape(word) for at, word in enumerate(words) if at >= start)
    return ("re:^" if start == 0 else r"re:^(?:.*\.)?") + name + "$"
