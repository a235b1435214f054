"""One width for all layers of a stage, which is all that nnU-Net's own network classes can be built with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from .channels import channel_layout
from .ranking import Ranking
from .tolerance import SENSITIVITY_POWER, Cost, weighted


@dataclass(frozen=True)
class Stages:
    """Which channel units belong to which resolution: the encoder's, the decoder's, and the upsampling between.

    Attributes:
        of_unit: The key of each unit's stage, by the unit's name; stages that residual adds join have one key.
        keys: Every stage's key, highest resolution first.
        apart: Keys of neighbours whose widths must differ: a residual block without a stride is built with a projection
            only where they do, so at equal widths a network of the same plans would lack that layer.
    """

    of_unit: Mapping[str, str]
    keys: tuple[str, ...]
    apart: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, network: nn.Module) -> Stages:
        """Find them in a network that `channel_layout` knows."""
        stages = network.encoder.stages
        keys = [f"stage {i}" for i in range(len(stages))]
        units = {
            unit.name: sorted({_stage(name, len(stages)) for name in unit.producers})
            for unit in channel_layout(network).units
        }
        for first, *others in units.values():
            joined = [keys[i] for i in others]
            keys = [keys[first] if key in joined else key for key in keys]
        apart = [
            (above, below)
            for (above, below), stage in zip(pairwise(keys), stages[1:], strict=True)
            if above != below and hasattr(stage, "blocks")  # residual ones
        ]
        return cls({name: keys[places[0]] for name, places in units.items()}, tuple(keys), tuple(apart))

    def units(self, widths: Mapping[str, int]) -> dict[str, int]:
        """Widths by unit, of widths by stage."""
        return {name: widths[key] for name, key in self.of_unit.items()}

    def buildable(self, widths: Mapping[str, int], step: int = 1) -> dict[str, int]:
        """The widths, where neighbours that must differ do not, with `step` more for the lower resolution."""
        found = dict(widths)
        for above, below in self.apart:
            if found[below] == found[above]:
                found[below] += step
        return found


def stage_rankings(folds: Sequence[Mapping[str, Ranking]], stages: Stages, cost: Cost) -> dict[str, Ranking]:
    """A ranking of each stage, weighted, for `widths_at` and `tolerance_for`; each unit keeps its own order.

    Of the first k channels of all units, the error is the sum of the units' errors at k, each weighed by what it does
    to the output, in the mean of the folds; that of a unit that is narrower than k already is 0. Then the stage's
    errors count by what is saved by one channel less in all of its units, as in `weighted`. They are divided by the
    mean number of units of a stage, so that tolerances are of the size of those for single layers.

    Args:
        folds: What `rank_units` gives for networks of one architecture. Their widths may differ.
        stages: Of these networks.
        cost: What is to be saved.
    """
    mean_units = len(stages.of_unit) / len(set(stages.keys))
    sums = {}
    for key in dict.fromkeys(stages.keys):
        rankings = [fold[name] for fold in folds for name, of in stages.of_unit.items() if of == key]
        widest = max(len(ranking.order) for ranking in rankings)
        errors = [0.0] * (widest + 1)
        for ranking in rankings:
            factor = ranking.sensitivity**SENSITIVITY_POWER / (len(folds) * mean_units)
            for k, error in enumerate(ranking.errors):
                errors[k] += factor * error
        sums[key] = Ranking(tuple(range(widest)), tuple(errors))
    return weighted(sums, lambda widths: cost(stages.units(widths)))


def _stage(module: str, count: int) -> int:
    """The index of a layer's stage; a transposed convolution's is that of what it upsamples to."""
    side, part, index, *_ = module.split(".")
    if part == "stem":
        return 0
    return int(index) if side == "encoder" else count - 2 - int(index)
