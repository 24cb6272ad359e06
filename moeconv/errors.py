"""Every error a user can meet, and the one way they are worded.

    MoeconvError          what happened, where, and what to do next
    ├── UsageError        the command line cannot be right, whatever the files hold (exit code 2)
    ├── RecipeError       a recipe file cannot be read or contradicts itself
    ├── CheckpointError   the source folder is not a checkpoint that can be trusted
    ├── PlanError         the conversion asked for is not possible; found before a byte is written
    ├── OutputError       the destination cannot be written, or holds something else
    ├── RunError          the system took something away that the run needs
    └── VerifyError       a finished folder is not what it should be

An error carries one or more `Problem`s, because all problems of a plan are shown together. ERRORS.md beside this file
has an entry for each message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from unicodedata import category

SHOWN_PROBLEMS = 20
#: A longer message loses its middle: names in it come from files, and files may hold anything.
SHOWN_CHARS = 10_000


class Problem(NamedTuple):
    """One thing that is wrong (`message`: what, where, numbers) and what to do about it (`remedy`)."""

    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{shown(self.message)}\n  -> {shown(self.remedy)}"


def shown(text: str) -> str:
    """One line for a terminal, not longer than a person reads, `escaped`."""
    if len(text) > SHOWN_CHARS:
        half = SHOWN_CHARS // 2
        text = f"{text[:half]} ... {len(text) - 2 * half:,} characters left out ... {text[-half:]}"
    return escaped(text)


def escaped(text: str) -> str:
    """One line for a terminal: what it would not show as it is, ends of lines too, stands there as an escape.

    Names come from files that anybody may have made, and could clear a screen, or forge a line of ours.
    """
    if text.isprintable():
        return text
    return "".join([c if c.isprintable() or category(c) == "Zs" else repr(c)[1:-1] for c in text])


class MoeconvError(Exception):
    """Base of all errors that are shown to the user without a traceback."""

    exit_code = 1

    def __init__(self, message: str, remedy: str) -> None:
        self.problems: tuple[Problem, ...] = (Problem(message, remedy),)
        super().__init__(message, remedy)

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> MoeconvError:
        """An error of this class that shows several problems together.

        Args:
            problems: at least one.
        """
        error = cls(problems[0].message, problems[0].remedy)
        error.problems = tuple(problems)
        return error

    def __str__(self) -> str:
        lines = [str(problem) for problem in self.problems[:SHOWN_PROBLEMS]]
        if len(self.problems) > 1:
            rest = len(self.problems) - len(lines)
            lines.append(f"{len(self.problems):,} problems" + (f", {rest:,} of them not shown." if rest else "."))
        return "\n".join(lines)


class UsageError(MoeconvError):
    """The command line cannot be right, whatever the files hold."""

    exit_code = 2


class RecipeError(MoeconvError):
    """A recipe file cannot be read, or contradicts itself."""


class CheckpointError(MoeconvError):
    """The source folder is not a checkpoint that can be trusted."""


class PlanError(MoeconvError):
    """The conversion asked for is not possible. Raised before a byte is written."""


class OutputError(MoeconvError):
    """The destination cannot be written, or holds something else."""


class RunError(MoeconvError):
    """The system took something away that the run needs."""


class VerifyError(MoeconvError):
    """A finished folder is not what it should be."""
