"""Shrink: remove the channels that the output misses least, merge them into the others, and train on; ours.

Channels are ranked as in `compress`: by the error that their removal causes in the layers that read them, weighted by
what this error does to the network's output and by the cost that is saved (`pruning.ranking`, `pruning.tolerance`). One
tolerance for all layers gives each its width, and removed channels are merged into those that are kept. A few cuts
during a training, each by the same factor, lead to the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..pruning import position_weights, rank_units, resize
from ..pruning.channels import ChannelLayout
from ..pruning.cost import CostModel, feature_map_voxels
from ..pruning.eval_mode import copy_network
from ..pruning.moments import SAMPLES_PER_CHANNEL, patches_needed
from ..pruning.ranking import Ranking
from ..pruning.timing import time_left
from ..pruning.tolerance import LATENCY_STEPS, STEPS, tolerance_for, weighted, widths_at
from .base import PruningMethod, TrainingState
from .distributed import decided_on_one_rank
from .limits import PruningSettings, channels_to_keep, require, require_fraction, require_one_at_most
from .measuring import NOTHING_MEASURED
from .schedule import Schedule
from .targets import DEFAULT_MACS

TARGETS = ("target_macs", "target_parameters", "target_latency")
MOST_CHOICES = 3  # of widths for a latency, each of which is timed once more before it is believed
PROBED = 16  # patches that sensitivities are measured on during a training, at least


@dataclass(frozen=True, kw_only=True)
class ShrinkSettings(PruningSettings):
    """How small, and in how many cuts; without a target, a tenth of the multiply-accumulates is left.

    Attributes:
        target_macs: The fraction of the multiply-accumulates of a patch that is left.
        target_parameters: The fraction of the parameters that is left.
        target_latency: The fraction of the network's time for one patch that is left, measured on this machine at each
            cut.
        cuts: Number of cuts between `cut_from` and `cut_until`.
        patches: Number of training patches, at least, that channels are ranked on; more where a layer has few
            positions.
    """

    cut_from: float = 0.1
    cut_until: float = 0.5
    max_fraction_per_epoch: float | None = None
    max_loss_increase: float | None = 0.1
    merge: bool = True
    rate_after_cuts: float | None = 2
    target_macs: float | None = None
    target_parameters: float | None = None
    target_latency: float | None = None
    cuts: int = 20
    patches: int = 96

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in TARGETS if getattr(self, name) is not None]
        require_one_at_most(given)
        if not given:
            object.__setattr__(self, "target_macs", DEFAULT_MACS)
        for name in given:
            require_fraction(name, getattr(self, name))
        for name in ("cuts", "patches"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))


class Shrink(PruningMethod):
    """Ranks all channels at each cut; one tolerance for the whole network gives each layer its width."""

    Settings = ShrinkSettings
    latest_only = ("latencies",)

    def prepare(self, layout: ChannelLayout, cost: CostModel, given_widths: dict[str, int] | None) -> None:
        name = next(name for name in TARGETS if getattr(self.settings, name) is not None)
        self.schedule = Schedule(self.settings, self.num_epochs, layout, cost, name)
        self._dense, self._input_shape = layout.widths, cost.input_shape
        self._latencies: dict[tuple[int, ...], float] = {}
        self._why: str | None = None

    def attach(self, network: nn.Module, layout: ChannelLayout) -> None:
        self._network = network

    def target(self):
        return self.schedule.name, self.schedule.target, self._left

    def why_missed(self) -> str | None:
        return self._why

    def measure(self, training: TrainingState) -> dict[str, list[int]]:
        return decided_on_one_rank(lambda: self._measure(training))

    def _measure(self, training: TrainingState) -> dict[str, list[int]]:
        schedule, widths = self.schedule, training.widths_now
        self.unmeasured = self._why = self.doubt = None
        at_first = {name: of_epochs[0] for name, of_epochs in training.widths.items()}
        begin = 1.0 if at_first == self._dense else self._left(at_first)
        wanted = schedule.wanted(training.epoch, begin)
        if wanted >= begin or (now := self._left(widths)) <= wanted:
            return {}
        inputs = batches_to_rank_on(self._network, training, self.settings.patches)
        if not inputs:
            self.unmeasured = NOTHING_MEASURED
            return {}
        rankings = weighted(rank(self._network, inputs, training.regions), schedule.cost)
        timed = schedule.name == "target_latency"
        chosen = self._fast_enough(rankings, wanted, now) if timed else self._chosen(rankings, wanted, now, STEPS)
        settings = self.settings_of_cut(training)
        keep = {}
        for name, width in widths.items():
            # As many as the settings allow, of which the ranking chooses.
            left = max(chosen[name], len(channels_to_keep(range(width), width, settings)))
            if left < width:
                keep[name] = rankings[name].keep(left)
        return keep

    def _chosen(self, rankings: Mapping[str, Ranking], wanted: float, now: float, steps: int) -> dict[str, int]:
        # Of what is left now: of the plans' network, a start that is wider has more than all.
        tolerance = tolerance_for(
            wanted / now, lambda widths: self._left(widths) / now, rankings, self.settings.round_to, steps
        )
        return self.schedule.at_least(widths_at(tolerance, rankings, self.settings.round_to))

    def _fast_enough(self, rankings: Mapping[str, Ranking], wanted: float, now: float) -> dict[str, int]:
        """Widths that are fast enough when they are timed again, too, or the fastest that were timed."""
        for _ in range(MOST_CHOICES):
            try:
                chosen = self._chosen(rankings, wanted, now, LATENCY_STEPS)
            except ValueError:
                break
            first, again = self._left(chosen), self._time(chosen)
            self._latencies[self._key(chosen)] = max(first, again)
            if again <= wanted:
                return chosen
        self._why = "no widths of this network are as fast on this machine"  # the log says that the target was missed
        fastest = min(self._latencies, key=self._latencies.__getitem__)
        return dict(zip(self._dense, fastest, strict=True))

    def state(self) -> dict:
        # A resumed training must not time the same widths again, and find them a little slower.
        return {"latencies": dict(self._latencies)} if self._latencies else {}

    def load_state(self, state: dict) -> None:
        self._latencies = dict(state.get("latencies", {}))

    def _left(self, widths: Mapping[str, int]) -> float:
        if self.schedule.name != "target_latency":
            return self.schedule.left(widths)
        key = self._key(widths)
        if key not in self._latencies:
            self._latencies[key] = 1.0 if key == tuple(self._dense.values()) else self._time(widths)
        return self._latencies[key]

    def _key(self, widths: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(self.schedule.at_least(widths)[name] for name in self._dense)

    def _time(self, widths: Mapping[str, int]) -> float:
        """The fraction of the dense network's time, on this machine as it is now."""
        whole, narrow = copy_network(self._network), copy_network(self._network)
        resize(whole, self._dense)  # the time does not depend on the weights
        resize(narrow, self.schedule.at_least(widths))
        fraction, busy = time_left(whole, narrow, self._input_shape, next(self._network.parameters()).device)
        if busy:
            self.doubt = (
                "this machine was busy while networks were timed, so their times, and the target's, may be wrong"
            )
        return fraction


def batches_to_rank_on(
    network: nn.Module, training: TrainingState, patches: int, drawn: Sequence[torch.Tensor] = ()
) -> list[torch.Tensor]:
    """Training batches with at least this number of patches, and with enough positions for a fit of every layer.

    Args:
        network: The network that is trained, unwrapped.
        training: Draws the batches.
        patches: Number of patches, at least.
        drawn: Batches that are drawn already, and are taken first, as many as are needed.

    Returns:
        Batches (B, channels, *patch); none where no batch is finite.
    """
    batches: list[torch.Tensor] = []
    left = list(drawn)

    def draw(least: int) -> None:
        while left and sum(map(len, batches)) < least:
            batches.append(left.pop(0))
        missing = least - sum(map(len, batches))
        batches.extend(training.batches(-(-missing // training.batch_size)) if missing > 0 else ())

    draw(patches)
    if batches:
        voxels = feature_map_voxels(network, batches[0].shape[2:], batches[0].shape[1])
        draw(patches_needed(voxels, training.widths_now, SAMPLES_PER_CHANNEL))
    return batches


def rank(network: nn.Module, inputs: Sequence[torch.Tensor], regions: bool) -> dict[str, Ranking]:
    """Every unit's channels, ranked on training batches as `compress` ranks them on a model's images."""
    if next(network.parameters()).device.type == "mps":
        network = copy_network(network).cpu()  # there is no float64 on MPS
    weights = position_weights(network, inputs, regions=regions)
    return rank_units(network, inputs, weights, regions=regions, probed=-(-PROBED // len(inputs[0])))
