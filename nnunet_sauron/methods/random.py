"""A random channel of the layer that is widest now: by STAMP's critics, as good as STAMP's choice.

Hassler et al.: Lean Unet. arXiv 2512.03834.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from .stepwise import Stepwise


class RandomLargestLayer(Stepwise):
    """Chance picks the channel, and the layer where several are equally wide."""

    cuts_transposed = False

    def rank(self, widths: Mapping[str, int], epoch: int) -> dict[str, Sequence[float]]:
        draw = random.Random(f"{self.settings.seed}:{epoch}")
        return {name: [draw.random() for _ in range(width)] for name, width in widths.items()}

    def layer_score(self, lowest: Sequence[float], width: int) -> float:
        return lowest[0] - width  # ranks lie in [0, 1), so they decide between equal widths only
