"""Progress on standard error, since standard output may be JSON."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from .terminal import plain_console


class Progress:
    """Plain lines and, on a terminal, a bar.

    Args:
        quiet: Show nothing.
        console: Where; by default standard error.
    """

    def __init__(self, quiet: bool = False, console: Console | None = None):
        self.console = console or plain_console(file=sys.stderr, quiet=quiet, soft_wrap=True)
        self._bars, self._users, self._lock = None, 0, threading.Lock()

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(text)

    @contextmanager
    def bar(self, text: str, total: int | None, *, transient: bool = False) -> Iterator[Callable[[str], None]]:
        """A bar of `total` units, or of a number that is not known; yields a function to call with each unit's name.

        Without a terminal the text is printed, and that is all. A transient bar is removed at its end. Bars of several
        threads stand below each other.
        """
        if not self.console.is_terminal:
            self.say(text)
            yield lambda _: None
            return
        with self._lock:
            if self._bars is None:
                self._bars = self._made_bars()
                self._bars.start()
            self._users += 1
            bars = self._bars
        task = bars.add_task(text, total=total, unit="")
        try:
            yield lambda name: bars.update(task, advance=1, unit=name)
        finally:
            if transient:
                bars.remove_task(task)
            with self._lock:
                self._users -= 1
                if not self._users:
                    bars.stop()
                    self._bars = None

    def _made_bars(self):
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        columns += (TextColumn("{task.fields[unit]}", markup=False),)
        # Left alone, standard output stays where the caller has redirected it.
        return Bars(*columns, console=self.console, redirect_stdout=False, redirect_stderr=False)
