"""One fold of a model, compressed: its channels ranked, its widths chosen, removed channels merged into the others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..model.trained import TrainedModel
from ..pruning import (
    CostModel,
    Ranking,
    channel_layout,
    feature_map_voxels,
    merge_channels,
    position_weights,
    rank_units,
    resize,
)
from ..pruning.moments import UNSURE
from ..pruning.ranking import PROBED
from ..pruning.timing import RATIO_REPEATS, Timing, time_left, time_networks
from ..pruning.tolerance import Cost, cost_left, weighted, widths_at
from .goal import Goal, tolerance_meeting
from .images import enough_patches, too_few


@dataclass(frozen=True)
class Compressed:
    """One fold's compressed network.

    Attributes:
        tolerance: The tolerance that gave its widths.
        before, after: Channels of every unit.
        parameters, macs, seconds: Before and after; median seconds of one patch, timed in alternation.
        busy: Whether these seconds scatter so much that they tell little.
        weights: The new network's.
        left_alone: Units with too few positions for a fit, which keep all of their channels.
    """

    tolerance: float
    before: dict[str, int]
    after: dict[str, int]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    seconds: tuple[float, float]
    weights: dict[str, torch.Tensor]
    left_alone: list[str] = field(default_factory=list)
    busy: bool = False

    def numbers(self) -> dict:
        """All but the weights."""
        return {name: value for name, value in vars(self).items() if name != "weights"}


class FoldCompressor:
    """Compresses one fold of a model.

    Args:
        model: The model.
        fold: One of its folds.
        device: Where networks run.
        round_to: Widths are multiples of this, up to the channels that there are.

    Attributes:
        before: Channels of every unit.
        wanted: Number of patches for a good fit of every layer.
        left_alone: Units with too few positions for a stable fit, which keep all of their channels.
    """

    def __init__(self, model: TrainedModel, fold: str, device: torch.device, round_to: int = 1):
        self.device, self.round_to = device, round_to
        # Fits need float64, which MPS does not have: there the network is timed and no more.
        self._fits_on = torch.device("cpu") if device.type == "mps" else device
        self.network = model.network(fold).to(self._fits_on)
        self.patch_size = model.patch_size
        self.before = channel_layout(self.network).widths
        self._channels = model.input_channels
        self._regions = model.has_regions
        self.cost = CostModel(self.network, self.patch_size, self._channels)
        self._positions = feature_map_voxels(self.network, self.patch_size, self._channels)
        self.wanted = enough_patches(self._positions, self.before)
        self.left_alone: list[str] = []

    def probes(self, inputs: Sequence[torch.Tensor]) -> int:
        """Number of steps that `rank` takes on these inputs."""
        return len(self.before) * min(len(inputs), PROBED)

    def leave_alone(self, patches: int) -> str | None:
        """Leave alone the layers that this number of patches is too small for; returns a remark if there are any.

        Raises:
            ValueError: It is too small for all layers.
        """
        self.left_alone = too_few(patches, self._positions, self.before)
        if not self.left_alone:
            return None
        described = ", ".join(
            f"{name} ({self.before[name]} channels, {self._positions[name]} positions a patch)"
            for name in self.left_alone
        )
        return (
            f"{patches} patches are too few for a stable fit of {described}: they keep all of their channels. More "
            f"images (--max-images) would let them be compressed as well."
        )

    def rank(
        self,
        inputs: Sequence[torch.Tensor],
        *,
        unsure: float = UNSURE,
        after_probe: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Rank every layer's channels on patches. Must be called before `tolerance` and `merge`.

        Args:
            inputs: The patches, (B, channels, *patch) each.
            unsure: That of `position_weights`.
            after_probe: Called with a unit's name after each of the `probes`.

        Raises:
            ValueError: They are too few for a stable fit of any layer.
        """
        self.leave_alone(sum(map(len, inputs)))
        self.inputs = inputs
        self.weights = position_weights(self.network, inputs, regions=self._regions, unsure=unsure)
        self.ranked: dict[str, Ranking] = rank_units(
            self.network, inputs, self.weights, regions=self._regions, left_alone=self.left_alone,
            after_probe=after_probe,
        )  # fmt: skip
        self.weigh(self.cost.macs)

    def weigh(self, cost: Cost) -> None:
        """Weigh the rankings by what is to be saved; `tolerance` and `merge` go by them."""
        self.rankings = weighted(self.ranked, cost)

    def tolerance(self, goal: Goal) -> float:
        """The tolerance that meets a goal, of rankings that are weighed for it from there on.

        Raises:
            ValueError: The goal cannot be met.
        """
        self.weigh(goal.counted(self.cost))
        found = tolerance_meeting(goal, self.fraction_left(goal), self.rankings, self.round_to, self.left_alone)
        if (
            goal.latency is not None
            and goal.latency < 1
            and widths_at(found, self.rankings, self.round_to) == self.before
        ):
            raise ValueError(
                f"--latency {goal.latency:g} cannot be judged: the network as it is was timed at less than that part "
                f"of its own time, so this machine is too busy. End other programs, or give --macs."
            )
        return found

    def fraction_left(self, goal: Goal) -> Callable[[dict[str, int]], float]:
        """A function from widths to the fraction that is left of the MACs, the parameters or the time."""
        if goal.latency is not None:
            return self._time_left
        return cost_left(goal.counted(self.cost), self.before)

    def merge(
        self,
        tolerance: float,
        after_unit: Callable[[str], None] = lambda _: None,
        widths: dict[str, int] | None = None,
    ) -> Compressed:
        """Merge the channels that a tolerance, or these widths, leave out; `network` itself stays as it is.

        Args:
            tolerance: The tolerance.
            after_unit: Called with each unit's name once it is merged.
            widths: Channels of every unit; None for those of the tolerance.
        """
        network = copy.deepcopy(self.network)
        after = widths or widths_at(tolerance, self.rankings, self.round_to)
        keep = {name: self.rankings[name].keep(width) for name, width in after.items()}
        merge_channels(network, keep, self.inputs, weights=self.weights, after_unit=after_unit)
        resize(network, after)  # pads with zeros where a stage's width is above the layer's own
        times = self._times(network)
        return Compressed(
            tolerance=tolerance,
            before=self.before,
            after=after,
            parameters=(self.cost.parameters(self.before), self.cost.parameters(after)),
            macs=(self.cost.macs(self.before), self.cost.macs(after)),
            seconds=(times["before"].median, times["after"].median),
            # Moved as a whole: nnU-Net's modules have several names, and each tensor is to be stored once.
            weights=network.cpu().state_dict(),
            left_alone=self.left_alone,
            busy=any(timing.scatters for timing in times.values()),
        )

    def _time_left(self, widths: dict[str, int]) -> float:
        narrow = copy.deepcopy(self.network)
        resize(narrow, widths)  # the time does not depend on the weights
        fraction, _ = time_left(self.network, narrow, (1, self._channels, *self.patch_size), self.device)
        self.network.to(self._fits_on)
        return fraction

    def _times(self, network: nn.Module) -> dict[str, Timing]:
        both = {"before": self.network, "after": network}
        shape = (1, self._channels, *self.patch_size)
        timed = time_networks(both, shape, repeats=RATIO_REPEATS, warmup=2, device=self.device)
        for one in both.values():
            one.to(self._fits_on)
        return timed
