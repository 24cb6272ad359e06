"""Where a result comes from: tool, options, recipe and source. The journal and `moeconv.json` hold it.

Plans with one fingerprint make the same weight files. Of two that have not, `differences` says what differs.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moeconv import __version__
from moeconv.errors import CheckpointError
from moeconv.files import Files, FileStat
from moeconv.plan import Plan

#: A snapshot in the cache of huggingface_hub: `models--ORG--NAME/snapshots/REVISION`.
_SNAPSHOT = re.compile(r"models--([^/]+)/snapshots/([0-9a-f]{40})$")
#: What huggingface_hub notes of each file that it downloads into a folder: revision, etag and time, a line each.
_DOWNLOAD_NOTE = Path(".cache", "huggingface", "download", "config.json.metadata")
_MAX_NOTE_BYTES = 4096
_MAX_OTHER_BYTES = 64 << 20
_SHOWN = 3


def origin_of(plan: Plan, files: Files | None = None) -> dict[str, Any]:
    """Everything that decides the bytes of a plan's result, and what else tells where they come from.

    Args:
        plan: what is to be done.
        files: door to the file system.
    """
    source, options, files = plan.source, plan.options, files or Files()
    hub_id, revision = _hub_id(source.root, files)
    return {
        "tool": {"name": "moeconv", "version": __version__},
        "layout": plan.layout,
        "source_layout": options.layout,
        "include": list(options.include),
        "max_shard_bytes": options.max_shard_nbytes,
        "stay": list(options.stay),
        "scheme": json.loads(plan.scheme.text) if plan.scheme else None,
        "recipe": {"name": plan.recipe.name, "text": plan.recipe.text},
        "source": {
            "path": str(source.root),
            "id": hub_id,
            "revision": revision,
            "model_type": source.config.get("model_type"),
            "bytes": source.nbytes,
            "files": [
                {"path": f.path, "bytes": f.nbytes, "mtime_ns": f.mtime_ns, "header_sha256": f.header_sha256}
                for f in source.files
            ],
            "others": [_other(source.root, file, files) for file in source.sidecars],
            "left_out": [{"path": f.path, "bytes": f.nbytes, "why": f.why} for f in source.left_out],
        },
    }


def _other(root: Path, file: FileStat, files: Files) -> dict[str, Any]:
    """A file beside the weights: its content, where that is quickly read, and not its time."""
    if file.nbytes > _MAX_OTHER_BYTES:
        return {"path": file.path, "bytes": file.nbytes, "mtime_ns": file.mtime_ns}
    return {"path": file.path, "bytes": file.nbytes, "sha256": files.sha256(root / file.path)}


def fingerprint_of(origin: Mapping[str, Any]) -> str:
    """sha256 of what decides the bytes; the same wherever the source lies.

    Args:
        origin: from `origin_of`.
    """
    said = {key: value for key, value in origin.items() if key != "source"}
    said["recipe"] = origin["recipe"]["text"]
    said["source"] = [origin["source"]["files"], origin["source"]["others"]]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _hub_id(root: Path, files: Files) -> tuple[str | None, str | None]:
    """Repository and revision of a checkpoint that huggingface_hub downloaded, as far as the folder tells."""
    snapshot = _SNAPSHOT.search(root.absolute().as_posix())
    if snapshot:
        return snapshot[1].replace("--", "/"), snapshot[2]
    note = root / _DOWNLOAD_NOTE
    try:
        lines = files.read_bytes(note, _MAX_NOTE_BYTES).split() if files.exists(note) else []
    except CheckpointError:
        return None, None  # a note of another tool, which no result depends on
    is_revision = bool(lines) and re.fullmatch(rb"[0-9a-f]{40}", lines[0]) is not None
    return None, lines[0].decode() if is_revision else None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In what two origins differ, in words.

    Args:
        before: as a file holds it, which somebody may have changed: nothing of it is taken for granted.
        now: from `origin_of`.
    """
    return "; ".join(_differences(before, now)) or "in what this version cannot tell"


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    version, recipe = _mapping(before, "tool").get("version"), _mapping(before, "recipe")
    if version != __version__:
        yield f"made by moeconv {version}, this is {__version__}"
    if before.get("layout") != now["layout"]:
        yield f"layout {before.get('layout')}, not {now['layout']}"
    yield from _scheme_differences(before.get("scheme"), now["scheme"])
    if recipe.get("text") != now["recipe"]["text"]:
        then, name = recipe.get("name"), now["recipe"]["name"]
        yield f"another text of recipe {name}" if then == name else f"recipe {then}, not {name}"
    for key, what in (
        ("source_layout", "--layout"), ("include", "--include"), ("max_shard_bytes", "--max-shard-size"),
        ("stay", "blocks that keep their layout"),
    ):  # fmt: skip
        if before.get(key) != now[key]:
            yield f"{what} {_shown(before.get(key))}, not {_shown(now[key])}"
    for key in ("files", "others"):
        yield from _file_differences(_mapping(before, "source").get(key), now["source"][key])


def _scheme_differences(before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*now, *before]):
            if before.get(key) != now.get(key):
                yield f"{key} {_shown(before.get(key))}, not {_shown(now.get(key))}"
    elif before != now:
        yield "a change of values, not of the layout" if before else "a change of the layout, not of values"


def _file_differences(before: Any, now: list[dict[str, Any]]) -> Iterator[str]:
    listed = before if isinstance(before, list) else []
    then = {file["path"]: file for file in listed if isinstance(file, dict) and isinstance(file.get("path"), str)}
    lines = []
    for file in now:
        old = then.pop(file["path"], None)
        if old is None:
            lines.append(f"{file['path']} is new in the source")
        elif old != file:
            words = {
                "bytes": "size", "header_sha256": "header", "sha256": "content", "mtime_ns": "time of its last change"
            }  # fmt: skip
            changed = [words[key] for key in words if old.get(key) != file.get(key)]
            lines.append(f"{file['path']} changed in the source ({', '.join(changed)})")
    lines += [f"{path} is gone from the source" for path in then]
    yield from lines[:_SHOWN]
    if len(lines) > _SHOWN:
        yield f"and {len(lines) - _SHOWN} more source files"


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def _shown(value: Any) -> str:
    text = "none" if value in (None, "", [], {}) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
