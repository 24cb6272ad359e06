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
from moeconv.encoded import CONFIG_DTYPES, quantization_config
from moeconv.formats import Format


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


#: Where ModelOpt says how a checkpoint is quantized, beside config.json or instead of it.
MODELOPT_SETTINGS = "hf_quant_config.json"


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
    for holder in (made, *(value for value in made.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            holder.pop(key, None)
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
    if first.quant_method == "modelopt":
        settings = first.settings()
        return {
            "quant_method": "modelopt",
            "quant_algo": settings["quant_algo"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": settings["weights"]}},
            # Readers take lm_head for a linear layer also where it is the embedding and no tensor has its name.
            "ignore": sorted({*kept, *({"lm_head"} - set(groups[0].modules))}),
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
        "ignore": list(kept),
        "config_groups": said,
    }


def _targets(groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """Regular expressions for the modules of each group that name no module of another.

    A number stands for all numbers where that is so, else the first one (the layer) for itself, else every one.
    """
    levels = (0, 1, sys.maxsize)
    taken = [Counter(form for modules in groups for form in {_form(m, level) for m in modules}) for level in levels]
    return [
        sorted(
            {
                next(form for level, forms in zip(levels, taken, strict=True) if forms[form := _form(m, level)] == 1)
                for m in modules
            }
        )
        for modules in groups
    ]


def _form(module: str, fixed: int) -> str:
    """A module's name as a regular expression in which all numbers but the first `fixed` ones are free."""
    words = module.split(".")
    free = [at for at, word in enumerate(words) if word.isdecimal()][fixed:]
    return "re:^" + r"\.".join(r"\d+" if at in free else re.escape(word) for at, word in enumerate(words)) + "$"
