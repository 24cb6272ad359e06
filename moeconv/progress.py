"""How far a run is, on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from moeconv.explain import size

_PLAIN_SECONDS = 10.0
_BAR_SECONDS = 0.1


class Progress:
    """Context manager; `show` is called with bytes done and bytes in all."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._last = self._began
        self._bar: Any = None
        self._task: Any = None
        self._is_terminal = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def show(self, done: int, total: int) -> None:
        """Say how far the run is, if it is time to."""
        now = time.monotonic()
        if now - self._last < (_BAR_SECONDS if self._is_terminal else _PLAIN_SECONDS):
            return
        self._last = now
        if self._is_terminal:
            self._draw(done, total)
            return
        rate = done / (now - self._began)
        left = f", {(total - done) / rate:.0f} s left" if rate else ""
        print(f"moeconv: {size(done)} of {size(total)}, {size(int(rate))}/s{left}", file=sys.stderr, flush=True)

    def _draw(self, done: int, total: int) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=total)
        self._bar.update(self._task, completed=done)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
