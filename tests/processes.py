"""What runs below a process, from /proc."""

from __future__ import annotations

from pathlib import Path


def children(process: int) -> list[int]:
    """Processes below one, its own children first."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(folder.name))
    found = parents.get(process, [])
    return found + [below for child in found for below in children(child)]
