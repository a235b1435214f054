"""Removes a random channel of the layer that is widest now, which Hassler et al. found to be as good as STAMP.

Hassler et al.: Lean Unet. arXiv 2512.03834.
"""

from __future__ import annotations

from collections.abc import Sequence

from .base import TrainingState
from .stepwise import Stepwise, random_scores


class RandomLargestLayer(Stepwise):
    """The channel is random, and so is the layer where several are equally wide."""

    cuts_transposed = False

    def score(self, training: TrainingState) -> dict[str, Sequence[float]]:
        return random_scores(training, self.settings.seed)

    def layer_score(self, lowest: Sequence[float], width: int) -> float:
        return lowest[0] - width  # scores lie in [0, 1), so they decide between equal widths only
