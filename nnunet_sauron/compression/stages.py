"""Widths that a model's folds and all layers of a stage share, so that nnU-Net alone can build its networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ..model.trained import TrainedModel
from ..planning.derive import plans_of_model
from ..planning.widths import UniformWidths
from ..pruning.stages import Stages, stage_rankings
from ..pruning.tolerance import tolerance_for, widths_at
from .compressor import Compressor, Goal, with_left_alone


class UniformStages:
    """Chooses the widths of all folds together, for plans have one list of them.

    A layer that was pruned below its stage's width already is filled up with channels of zero.

    Args:
        compressors: Of every fold; all have ranked.
        round_to: Widths are multiples of this, where there are as many channels.
    """

    def __init__(self, compressors: Sequence[Compressor], round_to: int = 1):
        first, self.round_to = compressors[0], round_to
        self.stages = Stages.of(first.network)
        self._left_alone = list(dict.fromkeys(name for one in compressors for name in one.left_alone))
        # Folds cost the same at the same widths, and what is left of it differs only where they were pruned before.
        self._different = list({tuple(one.before.values()): one for one in compressors}.values())
        self.rankings = stage_rankings([one.ranked for one in compressors], self.stages, first.cost.macs)

    def tolerance(self, goal: Goal) -> float:
        """The tolerance at which every fold meets a goal.

        Raises:
            ValueError: The goal cannot be met.
        """
        if goal.tolerance is not None:
            return goal.tolerance
        parts_left = [one.part_left(goal) for one in self._different]

        def most_left(widths: dict[str, int]) -> float:
            units = self.stages.units(self.stages.buildable(widths, self.round_to))
            return max(part_left(units) for part_left in parts_left)

        try:
            return tolerance_for(goal.part, most_left, self.rankings, self.round_to, goal.steps)
        except ValueError as error:
            raise with_left_alone(error, self._left_alone) from error

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
