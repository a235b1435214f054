"""What the demo shows: a line a step, a live bar on a terminal, and the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from .commands import TrainingProgress

# Without a terminal, one line in so many epochs.
EPOCHS_PER_LINE = 8


class Display:
    """Prints one line a step with its time; on a terminal also a live line while it runs.

    Args:
        console: Where to print.
        steps: Number of steps in all.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        self._steps = steps

    def skip(self, number: int, title: str, seconds: float) -> None:
        """Say that a step was done before."""
        self._console.print(f"[{number}/{self._steps}] {title}: done before, in {seconds:.0f} s")

    @contextmanager
    def step(self, number: int, title: str, epochs: int | None) -> Iterator[Callable[[str], None]]:
        """Show a step while it runs.

        Args:
            number: The step's number, from 1.
            title: What it does.
            epochs: Length of a training; None for every other step.

        Yields:
            A function that takes every line of the step's output, to follow a training's epochs.
        """
        head = f"[{number}/{self._steps}] {title}"
        live = self._console.is_terminal
        if not live:
            self._console.print(f"{head} ...")
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
        )
        start = time.monotonic()
        with Progress(*columns, console=self._console, transient=True, disable=not live) as progress:
            task = progress.add_task(head, total=epochs, note="")
            training = TrainingProgress()

            def follow(line: str) -> None:
                if epochs is None or not training.read(line):
                    return
                note = _training_note(training, epochs)
                progress.update(task, completed=training.epochs_done, note=note)
                worth_a_line = "Epoch time" in line and training.epochs_done % EPOCHS_PER_LINE == 0
                if not live and (worth_a_line or training.validating):
                    self._console.print(f"      {time.monotonic() - start:.0f} s: {note}")

            yield follow
        self._console.print(f"{head}: {time.monotonic() - start:.0f} s")


def print_comparison(console: Console, comparison: Mapping, table: str) -> None:
    """Print the report, and what a case cost.

    Args:
        console: Where to print.
        comparison: The content of `demo.json`.
        table: The content of `report.txt`.
    """
    console.print(Text(table))
    seconds = comparison["seconds_per_case"].items()
    known = ", ".join(f"{trainer} {value:.2f}" for trainer, value in seconds if value is not None)
    console.print(f"Seconds per test case, from reading to writing, without mirroring: {known or 'not known'}")
    console.print(f"Look at the report: {comparison['report_html']}")
    console.print(f"Channels over the epochs: {comparison['pruning_png']}")


def _training_note(training: TrainingProgress, epochs: int) -> str:
    dice = "" if training.pseudo_dice is None else f", pseudo Dice {training.pseudo_dice:.2f}"
    if training.validating:
        return f"epochs done, validating{dice}"
    return f"epoch {min(training.epochs_done + 1, epochs)} of {epochs}{dice}"
