"""A target that a few cuts of one factor lead to, as Shrink and Sauron have it."""

from __future__ import annotations

from collections.abc import Mapping

from ..pruning.channels import ChannelLayout
from ..pruning.cost import CostModel
from .limits import spread_steps
from .targets import least_widths, rounded_up


class Schedule:
    """A target reached in n cuts by one factor: after cut i, `target ** (i / n)` of the dense network is left; where
    a part b of it was there to begin with, `b (target / b) ** (i / n)`.

    Args:
        settings: `cut_from`, `cut_until`, `cuts`, `min_channels` and `round_to` apply.
        num_epochs: Length of the training.
        layout, cost: The dense network's.
        name: The target's setting, such as `target_macs`.

    Raises:
        ValueError: The target is below the least widths, or there is no epoch to cut after.
    """

    def __init__(self, settings, num_epochs: int, layout: ChannelLayout, cost: CostModel, name: str):
        self.name, self.target = name, getattr(settings, name)
        self.epochs = spread_steps(settings, num_epochs, settings.cuts)
        self.least = least_widths(settings, layout.widths, ())
        # The cost that a channel's error is weighed against; the time of a single channel cannot be measured.
        self.cost = cost.parameters if name == "target_parameters" else cost.macs
        self._whole = self.cost(layout.widths)
        if name != "target_latency" and self.left(self.least) > self.target:
            least = rounded_up(self.left(self.least))
            raise ValueError(
                f"{name}={self.target:g} cannot be met: with min_channels={settings.min_channels} and "
                f"round_to={settings.round_to}, {least} is the least. Choose a larger target."
            )

    def at_least(self, widths: Mapping[str, int]) -> dict[str, int]:
        """The widths, none below its layer's least."""
        return {name: max(width, self.least[name]) for name, width in widths.items()}

    def left(self, widths: Mapping[str, int]) -> float:
        """The fraction of the dense network's cost that is left at these widths, none below its layer's least."""
        return self.cost(self.at_least(widths)) / self._whole

    def wanted(self, epoch: int, begin: float = 1.0) -> float:
        """The fraction that should be left after this epoch's cut, which makes up for cuts that were held back.

        Args:
            epoch: Counted from 0.
            begin: The fraction of the dense network that the training began with.
        """
        done = sum(step <= epoch for step in self.epochs)
        return begin * (self.target / begin) ** (done / len(self.epochs))
