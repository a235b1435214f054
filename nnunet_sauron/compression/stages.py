"""One width for each stage, in all folds, so that nnU-Net alone can build the networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ..model.trained import TrainedModel
from ..planning.derive import plans_of_model
from ..planning.widths import UniformWidths
from ..pruning.stages import Stages, stage_rankings
from ..pruning.tolerance import widths_at
from .compressor import FoldCompressor
from .goal import Goal, tolerance_meeting


class UniformStages:
    """Chooses one width a stage for all folds, since plans hold one list of widths.

    A layer that is already narrower than its stage's width is padded with channels of zero.

    Args:
        compressors: Of every fold; their channels are ranked.
        round_to: Widths are multiples of this, up to the channels that there are.
    """

    def __init__(self, compressors: Sequence[FoldCompressor], round_to: int = 1):
        first, self.round_to = compressors[0], round_to
        self.stages = Stages.of(first.network)
        self._left_alone = list(dict.fromkeys(name for one in compressors for name in one.left_alone))
        # Folds of equal widths have equal costs: only those that were pruned before differ.
        self._different = list({tuple(one.before.values()): one for one in compressors}.values())
        self._ranked, self._cost = [one.ranked for one in compressors], first.cost
        self.rankings = stage_rankings(self._ranked, self.stages, first.cost.macs)

    def tolerance(self, goal: Goal) -> float:
        """The tolerance at which every fold meets a goal, of rankings that are weighed for it from there on.

        Raises:
            ValueError: The goal cannot be met.
        """
        self.rankings = stage_rankings(self._ranked, self.stages, goal.counted(self._cost))
        of_folds = [one.fraction_left(goal) for one in self._different]

        def most_left(widths: dict[str, int]) -> float:
            units = self.stages.units(self.stages.buildable(widths, self.round_to))
            return max(fraction_left(units) for fraction_left in of_folds)

        return tolerance_meeting(goal, most_left, self.rankings, self.round_to, self._left_alone)

    def widths(self, tolerance: float) -> dict[str, int]:
        """Channels of every unit."""
        return self.stages.units(self.of_stages(tolerance))

    def of_stages(self, tolerance: float) -> dict[str, int]:
        """Channels of every stage."""
        return self.stages.buildable(widths_at(tolerance, self.rankings, self.round_to), self.round_to)


def features_per_stage(network: nn.Module, widths: Mapping[str, int]) -> list[int]:
    """Channels of every stage, highest resolution first, of a network whose units have the widths of their stages."""
    stages = Stages.of(network)
    by_stage = {key: widths[name] for name, key in stages.of_unit.items()}
    return [by_stage[key] for key in stages.keys]


def plain_plans(model: TrainedModel, features_per_stage: Sequence[int]) -> dict:
    """A model's plans with nnU-Net's own network class at these widths."""
    return plans_of_model(model.plans, model.configuration, UniformWidths(tuple(features_per_stage)))


def check_plain(model: TrainedModel) -> None:
    """Raise ValueError if nnU-Net's own trainer and network class cannot build the model's network."""
    if model.builder.differs:
        raise ValueError(
            f"--uniform-stages writes a model of nnU-Net's own trainer, which does not build the network of "
            f"{model.builder.trainer_name}. Compress without --uniform-stages."
        )
    architecture = model.manager.get_configuration(model.configuration).configuration["architecture"]
    try:
        plain_plans(model, [1] * architecture["arch_kwargs"]["n_stages"])
    except ValueError as error:
        raise ValueError(f"{error} Or compress without --uniform-stages.") from error
