"""Progress on standard error, since standard output may be JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .terminal import plain_console


class Progress:
    """Plain lines and, on a terminal, a bar."""

    def __init__(self, quiet: bool = False):
        self.console = plain_console(file=sys.stderr, quiet=quiet, soft_wrap=True)

    def say(self, text: str) -> None:
        self.console.print(text)

    @contextmanager
    def bar(self, text: str, total: int) -> Iterator[Callable[[str], None]]:
        """A bar of so many units; what it yields is called with each unit's name."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        if not self.console.is_terminal:
            self.say(text)
            yield lambda _: None
            return
        columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        columns += (TextColumn("{task.fields[unit]}", markup=False),)
        # Left alone, standard output stays where the caller has redirected it.
        with Bars(*columns, console=self.console, redirect_stdout=False, redirect_stderr=False) as bars:
            task = bars.add_task(text, total=total, unit="")
            yield lambda name: bars.update(task, advance=1, unit=name)
