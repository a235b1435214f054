"""The thresholds of Sauron as published: one for each layer, which climbs when the losses have settled."""

from __future__ import annotations

from collections.abc import Sequence

from .limits import require

FIRST_THRESHOLD = 0.001


class Threshold:
    """One layer's threshold, which adjusts itself after every epoch (paper, algorithm 1).

    It starts at 0.001 and climbs `kappa` linear steps to `tau_max`. After an epoch, a waiting threshold waits one
    epoch less; another one climbs a step and waits `rho` epochs when
    (C1) the last training loss lies inside the range of the `rho` before it,
    (C2) the last validation loss is no new minimum, and
    (C3) fewer than `mu` of the layer's channels were removed last time.

    Attributes:
        value: The threshold now.
        waiting: Epochs that it still waits.

    Args:
        tau_max: Upper end, in (0.001, 1].
        kappa: Number of steps.
        rho: Epochs to look back and to wait.
        mu: A fraction of the channels: 0.02 for the paper's 2 %.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(self, tau_max: float = 0.3, kappa: int = 15, rho: int = 5, mu: float = 0.02):
        require(FIRST_THRESHOLD < tau_max <= 1, "tau_max", f"in ({FIRST_THRESHOLD}, 1]", tau_max)
        require(kappa >= 1, "kappa", "at least 1", kappa)
        require(rho >= 2, "rho", "at least 2 epochs, since no loss lies between one and itself", rho)
        require(0 < mu <= 1, "mu", "a fraction in (0, 1], such as 0.02 for 2 %", mu)
        self.tau_max, self.kappa, self.rho, self.mu = tau_max, kappa, rho, mu
        self.steps = 0
        self.waiting = 0

    @property
    def value(self) -> float:
        """tau: from `FIRST_THRESHOLD` to `tau_max` in kappa steps."""
        return FIRST_THRESHOLD + (self.tau_max - FIRST_THRESHOLD) * self.steps / self.kappa

    def update(self, train_losses: Sequence[float], val_losses: Sequence[float], widths: Sequence[int]) -> float:
        """Adjust the threshold after an epoch.

        Args:
            train_losses: Training loss of every epoch so far, newest last.
            val_losses: Validation loss, likewise.
            widths: Channels of the layer after every epoch so far, newest last.

        Returns:
            The threshold after that epoch, which is `value`.
        """
        if self.waiting > 0:
            self.waiting -= 1
        elif (
            self.steps < self.kappa
            and self._training_has_settled(train_losses)
            and self._validation_has_settled(val_losses)
            and self._few_were_removed(widths)
        ):
            self.steps += 1
            self.waiting = self.rho
        return self.value

    def _training_has_settled(self, losses: Sequence[float]) -> bool:
        if len(losses) <= self.rho:
            return False
        before = losses[-1 - self.rho : -1]
        return min(before) <= losses[-1] <= max(before)

    def _validation_has_settled(self, losses: Sequence[float]) -> bool:
        # The published code compares with a minimum that includes the value itself, so its C2 never stops anything.
        return len(losses) > 1 and losses[-1] >= min(losses[:-1])

    def _few_were_removed(self, widths: Sequence[int]) -> bool:
        return len(widths) < 2 or (widths[-2] - widths[-1]) < self.mu * widths[-2]
