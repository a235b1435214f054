"""Methods that cut every layer to its final width at once, after the last epoch of the cutting phase."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..pruning.channels import ChannelLayout
from ..pruning.cost import CostModel
from .base import PruningMethod, TrainingState
from .limits import steps
from .targets import TargetSettings, even_widths, make_target


class Layerwise(PruningMethod):
    """The base: a subclass orders a layer's channels, and may prepare them for the cut until then. A target for the
    whole network is the same fraction of every layer.

    Attributes:
        final_widths: Channels of each unit after the cut.
        cut_epoch: The epoch after which units are cut.
    """

    Settings = TargetSettings

    def prepare(self, layout: ChannelLayout, cost: CostModel, given_widths: dict[str, int] | None) -> None:
        self._target = make_target(self.settings, layout, cost, given_widths)
        self.final_widths = even_widths(self._target, self.settings, layout.widths)
        self.cut_epoch = steps(self.settings, self.num_epochs)[-1]

    def attach(self, network: nn.Module, layout: ChannelLayout) -> None:
        self._network, self._layout = network, layout

    def target(self):
        return self._target.name, self._target.part_asked, self._target.part_left

    def why_missed(self) -> str | None:
        return self._target.why

    def order(self, unit: str) -> Sequence[int]:
        """A unit's channels, those to be removed first."""
        raise NotImplementedError

    def surplus(self, unit: str, width: int) -> list[int]:
        """The channels of a unit beyond its final width."""
        return list(self.order(unit)[: max(0, width - self.final_widths[unit])])

    def redundant(self, training: TrainingState) -> dict[str, list[int]]:
        if training.epoch != self.cut_epoch:
            return {}
        return {name: self.surplus(name, width) for name, width in training.widths_now.items()}
