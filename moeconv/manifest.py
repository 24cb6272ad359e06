"""`moeconv.json`: where a folder came from, written into every folder that moeconv makes.

It holds the recipe's text and the source's names, so that `unpack` restores exactly what was packed, even
if a later version ships another recipe.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moeconv import __version__
from moeconv.errors import CheckpointError
from moeconv.explain import groups_of
from moeconv.plan import Plan
from moeconv.recipe import Recipe
from moeconv.recipe_file import parse_recipe

SCHEMA_VERSION = 1


def build_manifest(plan: Plan, command: Sequence[str]) -> bytes:
    """The manifest of a finished run.

    Args:
        plan: what was done.
        command: the command line, without the program's name.
    """
    source = plan.source
    content = {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "moeconv", "version": __version__},
        "command": list(command),
        "fingerprint": plan.fingerprint,
        "layout": plan.layout,
        "source_layout": plan.options.layout,
        "include": list(plan.options.include),
        "kept": _kept(plan),
        "forms": _forms(plan),
        "scheme": json.loads(plan.scheme.text) if plan.scheme else None,
        "recipe": {"name": plan.recipe.name, "text": plan.recipe.text},
        "source": {
            "path": str(source.root),
            "model_type": source.config.get("model_type"),
            "bytes": source.nbytes,
            "files": [
                {"path": file.path, "bytes": file.nbytes, "header_sha256": file.header_sha256} for file in source.files
            ],
            "left_out": [{"path": item.path, "bytes": item.nbytes, "why": item.why} for item in source.left_out],
        },
        "renamed": [
            {"from": list(group.sources), "to": list(group.targets)}
            for group in groups_of(plan)
            if group.what != "copied"
        ],
        "history": _history(source.manifest),
    }
    # Python has bytes of names that are not UTF-8 as half characters; they become escapes, which stay JSON.
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _kept(plan: Plan) -> list[str]:
    """Blocks that stayed as they were while others changed; a block with something that changed did not stay."""
    changed = {made.unit.block for made in plan.changes}
    return list(dict.fromkeys(unit.block for unit in plan.kept if unit.block not in changed)) if changed else []


def _forms(plan: Plan) -> list[str]:
    """Forms of quantized experts: packed, some have the same names."""
    units = (*plan.kept, *(made.unit for made in plan.changes))
    return sorted({unit.component.form for unit in units if unit.component.form})


def _history(manifest: Mapping[str, Any]) -> list[Any]:
    """What was done to the source before: its own manifest's entries, oldest first."""
    if not manifest:
        return []
    before = manifest.get("history")
    step = {key: manifest.get(key) for key in ("tool", "command", "layout", "include", "scheme", "source")}
    return [*(before if isinstance(before, list) else []), step]


def kept_blocks(manifest: Mapping[str, Any], layout: str) -> tuple[str, ...]:
    """Blocks that were in `layout` already when the others were brought into it."""
    kept = manifest.get("kept")
    return tuple(map(str, kept)) if isinstance(kept, list) and manifest.get("layout") == layout else ()


def recipe_of(manifest: Mapping[str, Any]) -> Recipe | None:
    """The recipe that a folder was made with, or None for a folder that moeconv did not make.

    Raises:
        CheckpointError: a manifest that does not hold together.
    """
    if not manifest:
        return None
    recipe = manifest.get("recipe")
    if (
        not isinstance(recipe, dict)
        or not isinstance(recipe.get("text"), str)
        or not isinstance(recipe.get("name"), str)
    ):
        raise CheckpointError("moeconv.json names no recipe", "Give --recipe, or remove the damaged moeconv.json.")
    return parse_recipe(recipe["text"], recipe["name"], f"moeconv.json (recipe {recipe['name']})")
