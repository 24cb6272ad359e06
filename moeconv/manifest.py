"""`moeconv.json`: where a folder came from, written into every folder that moeconv makes.

It holds the recipe's text and the source's names, so that `unpack` restores exactly what was packed, even
if a later version ships another recipe.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from moeconv.checkpoint import INDEX
from moeconv.errors import CheckpointError
from moeconv.explain import groups_of
from moeconv.losses import Loss, summary_of
from moeconv.origin import fingerprint_of, origin_of
from moeconv.plan import Plan, index_path
from moeconv.recipe import Recipe
from moeconv.recipe_file import parse_recipe

SCHEMA_VERSION = 1


def build_manifest(
    plan: Plan, origin: Mapping[str, Any], command: Sequence[str], consumed: bool = False
) -> dict[str, Any]:
    """What is known of a run before it ends.

    Args:
        plan: what is done.
        origin: see `origin_of`.
        command: the command line, without the program's name.
        consumed: the source is deleted on the way.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        **origin,
        "libraries": _libraries(plan),
        "devices": sorted({name.partition(":")[0] for name in plan.options.devices}) if plan.scheme else [],
        "command": list(command),
        "fingerprint": fingerprint_of(origin),
        **({"consumed_source": True} if consumed else {}),
        "kept": _kept(plan),
        "forms": _forms(plan),
        "renamed": [
            {"from": list(group.sources), "to": list(group.targets)}
            for group in groups_of(plan)
            if group.what != "copied"
        ],
        "history": _history(plan.source.manifest),
    }


def manifest_bytes(
    content: Mapping[str, Any], plan: Plan, losses: Iterable[Loss] = (), sums: Mapping[str, str] | None = None
) -> bytes:
    """The manifest of a finished run.

    Args:
        content: from `build_manifest`.
        plan: what was done.
        losses: what encoding was seen to lose.
        sums: sha256 of every file but this one, by path; None or empty where they were not wanted.
    """
    sums = sums or {}
    heads = {file.path: hashlib.sha256(file.head).hexdigest() for file in plan.files}
    sizes = {file.path: file.nbytes for file in plan.files} | {file.path: file.nbytes for file in plan.copied_files}
    sizes |= {path: len(made) for path, made in plan.contents.items()}
    sizes |= {index: len(plan.index)} if (index := index_path(plan)) else {}
    files = [
        {
            "path": path, "bytes": nbytes,
            **({"header_sha256": heads[path]} if path in heads else {}),
            **({"sha256": sums[path]} if path in sums else {}),
        }
        for path, nbytes in sorted(sizes.items())
    ]  # fmt: skip
    whole = {**content, "files": files, **({"errors": summary_of(plan, losses)} if plan.scheme else {})}
    # Python has bytes of names that are not UTF-8 as half characters; they become escapes, which stay JSON.
    return (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def largest_manifest(plan: Plan, command: Sequence[str], hashes: bool) -> int:
    """Bytes that the manifest of a run has at most, before anything is known of what it loses."""
    content = build_manifest(plan, origin_of(plan), command)
    longest = max((value.fill.target.name for value in plan.values), key=len, default="")
    losses = [Loss(name, longest, 0.123456e-10, 1.0) for name in {v.format.name for v in plan.values if v.format}]
    paths = [file.path for file in plan.files] + [file.path for file in plan.copied_files] + [*plan.contents, INDEX]
    sums = dict.fromkeys(paths, "0" * 64) if hashes else {}
    spare = len(str(len(plan.values))) * len(losses)  # more may be sampled than one
    return len(manifest_bytes(content, plan, losses, sums)) + spare


def _libraries(plan: Plan) -> dict[str, str]:
    """Versions of what the result was made with. A change of layout needs none but Python."""
    found = {"python": platform.python_version()}
    if plan.scheme is not None:
        found |= {name: version(name) for name in ("numpy", "torch")}
    return found


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
