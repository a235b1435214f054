"""Pictures are drawn now and then: nnU-Net's `progress.png` takes over a second, as long as a short epoch."""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS_BETWEEN = 20


class Throttled:
    """A function that is run at most every 20 seconds, and always after the last epoch.

    Args:
        trainer: nnU-Net's, which counts the epochs.
        draw: What to run.
    """

    def __init__(self, trainer, draw: Callable[..., None]):
        self._trainer, self._draw = trainer, draw
        self._drawn_at: float | None = None

    def __call__(self, *args) -> None:
        is_last = self._trainer.current_epoch >= self._trainer.num_epochs - 1
        if is_last or self._drawn_at is None or time.monotonic() > self._drawn_at + SECONDS_BETWEEN:
            self._drawn_at = time.monotonic()
            self._draw(*args)
