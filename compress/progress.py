"""Progress on stderr: where the run is, how much of the whole is done, how long it will take, memory in use.

The time left is what the work done so far cost, scaled to the work that is left, over all phases of the run.
Quiet when stderr is no terminal.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from compress.plan.footprint import memory_now


class Bar:
    """A context manager whose `show` is a progress callback."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._started = time.monotonic()

    def __enter__(self) -> Bar:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, phase: str, done: float, words: str) -> None:
        """`done`: the share of the whole run, 0…1."""
        if not self._console.is_terminal:
            return
        elapsed = time.monotonic() - self._started
        left = duration(elapsed * (1 - done) / done) + " left" if done > 0.02 else "estimating"
        row = Table.grid(padding=(0, 2))
        memory = f"{memory_now() / 1e9:.1f} GB"
        row.add_row(f"[bold]{phase}[/]", ProgressBar(100, 100 * done, width=30), words, left, memory)
        self._live.update(row)


def duration(seconds: float) -> str:
    """Seconds as a person says them: `42 s`, `3 m 20 s`, `2 h 5 m`."""
    whole = round(seconds)
    if 0 < seconds < 1:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} m"
