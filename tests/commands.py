"""Commands run in this process as the console script runs them, and what a refused one may leave behind."""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from moeconv.cli import app
from moeconv.process import guarded

#: Formats that are tested in test_bitsandbytes.py and test_transformers.py: experts are packed, or kept.
BITSANDBYTES = {"nf4", "fp4", "int8"}


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(*arguments: object) -> Result:
    """`moeconv ARGUMENTS` without the process around it: an unexpected exception ends the test."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["moeconv", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = guarded(app)
    finally:
        sys.argv = before
    return Result(code, out.getvalue(), err.getvalue())


def succeeds(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.code == 0, result
    return result


def tree(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder, targets of links, and empty folders."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = b"-> " + os.fsencode(path.readlink())
        elif path.is_file():
            found[name] = path.read_bytes()
        elif path.is_dir() and not any(path.iterdir()):
            found[name] = b"empty folder"
    return found


def refused(*arguments: object, within: Path, code: int = 1) -> str:
    """Run a command that must refuse and change nothing below `within`.

    Returns:
        Its message.
    """
    before = tree(within)
    result = run(*arguments)
    assert result.code == code, result
    assert result.out == ""
    assert "\n  -> " in result.err, result.err
    assert "Traceback" not in result.err
    assert tree(within) == before
    return result.err


def refused_source(source: Path, *options: object, command: str = "pack") -> str:
    """Convert a source that cannot be trusted into a folder beside it."""
    return refused(command, source, source.parent / "target", *options, within=source.parent)
