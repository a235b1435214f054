"""The demo's output: a line for each step, a bar for each training on a terminal, and the report."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console

from ..console.progress import Progress

EPOCHS_PER_LINE = 8  # without a terminal

# Of nnU-Net's log. NumPy prints float32 as 0.9194, np.float32(0.9194) or np.float32(1e-04).
EPOCH = re.compile(r": Epoch (\d+)\s*$")
DICE = re.compile(r"(\d[\d.]*(?:e-\d+)?)(?=[),\]])")


class Display:
    """Prints a line with its time for each step.

    Args:
        console: Where to print.
        steps: Number of steps in all.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self._progress = Progress(console=console)
        self._steps = steps

    def skip(self, number: int, title: str, seconds: float) -> None:
        """Say that a step was done before."""
        self._progress.say(f"[{number}/{self._steps}] {title}: done before, in {seconds:.0f} s")

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
        head, start = f"[{number}/{self._steps}] {title}", time.monotonic()

        def say(note: str) -> None:
            if not self._progress.console.is_terminal:
                self._progress.say(f"{head}, {time.monotonic() - start:.0f} s: {note}")

        with self._progress.bar(f"{head} ...", epochs, transient=True) as advance:
            yield _follow_training(epochs, advance, say) if epochs else lambda line: None
        self._progress.say(f"{head}: {time.monotonic() - start:.0f} s")


def print_comparison(console: Console, comparison: Mapping, table: str) -> None:
    """Print the report, and the time of a case.

    Args:
        console: Where to print; it takes no markup.
        comparison: The content of `demo.json`.
        table: The content of `report.txt`.
    """
    console.print(table)
    seconds = comparison["seconds_per_case"].items()
    known = ", ".join(f"{trainer} {value:.2f}" for trainer, value in seconds if value is not None)
    console.print(f"Seconds per test case, from reading to writing, without mirroring: {known or 'not known'}")
    console.print(f"Look at the report: {comparison['report_html']}")
    console.print(f"Channels over the epochs: {comparison['pruning_png']}")


def _follow_training(epochs: int, advance: Callable[[str], None], say: Callable[[str], None]) -> Callable[[str], None]:
    """A function that follows the epochs in the lines of nnU-Net's log, also those of a continued training."""
    done, dice = 0, ""

    def follow(line: str) -> None:
        nonlocal done, dice
        if "Pseudo dice" in line:
            values = [float(text) for text in DICE.findall(line.split("Pseudo dice", 1)[1])]
            dice = f", pseudo Dice {statistics.fmean(values):.2f}" if values else ""
        elif (match := EPOCH.search(line)) or "Training done" in line:
            ended = int(match[1]) if match else epochs
            note = f"epoch {ended} of {epochs}{dice}" if match else f"epochs done, validating{dice}"
            for _ in range(ended - done):
                advance(note)
            done = ended
            if not match or (done and done % EPOCHS_PER_LINE == 0):
                say(note)

    return follow
