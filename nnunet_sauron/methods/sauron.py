"""Sauron: draw a layer's feature maps into clusters while training, and remove those that became redundant.

Valverde, Shatillo, Tohka: Sauron U-Net: Simple automated redundancy elimination in medical image segmentation via
filter pruning. arXiv 2209.13590; Neurocomputing 594 (2024) 127817.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from ..pruning.channels import ChannelLayout, feature_map_modules
from ..pruning.cost import CostModel
from ..pruning.tolerance import unit_factors
from .base import PruningMethod, TrainingState, mean_of
from .delta import with_delta_opt
from .distributed import decided_on_one_rank
from .limits import channels_to_keep, spread_steps, to_multiple
from .measuring import NOTHING_MEASURED
from .sauron_settings import SauronSettings
from .schedule import Schedule
from .shrink import batches_to_rank_on, rank
from .similar_channels import mean_distances, nearest_pairs, remove_from_pairs
from .thresholds import FIRST_THRESHOLD


class DrawsMapsTogether(PruningMethod):
    """What both forms of Sauron do in training steps, delta_opt in the loss, and the distances that they decide by."""

    Settings = SauronSettings

    def attach(self, network: nn.Module, layout: ChannelLayout) -> None:
        self._network = network
        self._terms: list[torch.Tensor] = []
        self._step, self._regularises = 0, True
        modules = feature_map_modules(network, layout) if self.settings.lambda_ > 0 else ()
        self._hooks = [module.register_forward_hook(self._add_delta_opt) for _, _, module in modules]

    def start_epoch(self, epoch: int, widths: dict[str, int]) -> None:
        self._step = 0
        over = epoch >= self.settings.first_epoch_after_cuts(self.num_epochs)
        if self._hooks and over and not self.settings.delta_opt_after_cuts:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
            torch._dynamo.reset()  # a compiled graph would still hold what the hooks do

    def before_step(self) -> None:
        self._terms.clear()
        self._regularises = self._step % self.settings.delta_opt_every == 0
        self._step += 1

    def regulariser(self) -> torch.Tensor | None:
        """lambda * mean of delta_opt over the layers of the last forward, also for the steps until the next one."""
        mean = mean_of(self._terms)
        return None if mean is None else self.settings.lambda_ * self.settings.delta_opt_every * mean

    def _distances(self, batches: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        distances = mean_distances(self._network, batches, standardise=self.settings.standardise)
        self.unmeasured = None if distances else NOTHING_MEASURED
        return distances

    def _add_delta_opt(self, module: nn.Module, inputs, feature_maps: torch.Tensor) -> torch.Tensor:
        if not (module.training and self._regularises) or feature_maps.shape[1] < 2:
            return feature_maps
        feature_maps, term = with_delta_opt(feature_maps, self.settings.normalisation)
        self._terms.append(term)
        return feature_maps


class Sauron(DrawsMapsTogether):
    """delta_opt while training; redundant are channels whose maps lie near another channel's.

    Every channel of a layer is a reference, which is the limit of the paper's many random ones: with
    D[r, c] the delta_prune of channel c with reference r, a channel is removed when one that stays is nearer than the
    layer's threshold, in the nearer of both directions, nearest pairs first. A layer's threshold is a common level
    times its own factor, which rises with the multiply-accumulates that a channel of it saves and falls with what an
    error in it does to the network's output, both measured anew at each cut. The level is the lowest that meets this
    cut's share of `target_macs`. One channel of each pair stays in a cut, and no layer loses more than
    `max_fraction_per_epoch`; but the last cut of all meets the target.
    """

    @classmethod
    def for_settings(cls, settings: SauronSettings, num_epochs: int) -> PruningMethod:
        if not settings.published:
            return cls(settings, num_epochs)
        if cls is not Sauron:
            raise ValueError(
                f"published=True has a method of its own, which {cls.__name__} does not change: derive "
                f"{cls.__name__} from PublishedSauron, or leave published out."
            )
        return PublishedSauron(settings, num_epochs)

    def prepare(self, layout: ChannelLayout, cost: CostModel, given_widths: dict[str, int] | None) -> None:
        self._cost = cost
        self._state = {"level": 0.0, "tau": dict.fromkeys(layout.widths, 0.0)}
        if self.settings.target_macs is not None:
            self._schedule = Schedule(self.settings, self.num_epochs, layout, cost, "target_macs")
        else:
            self._epochs = spread_steps(self.settings, self.num_epochs, self.settings.cuts)

    def target(self):
        if self.settings.target_macs is None:
            return None
        return self._schedule.name, self._schedule.target, self._schedule.left

    def has_schedule(self) -> bool:
        return True

    def measure(self, training: TrainingState) -> dict[str, list[int]]:
        self.unmeasured = None
        if self._reached(training)(training.widths_now, 0.0):
            return {}
        batches = list(training.batches(self.settings.prune_batches))  # some of them are ranked on as well
        distances = self._distances(batches)
        return decided_on_one_rank(lambda: self._choose(training, batches, distances)) if distances else {}

    def state(self) -> dict:
        return dict(self._state)

    def load_state(self, state: dict) -> None:
        self._state = {key: state[key] for key in ("level", "tau")}

    def _choose(
        self, training: TrainingState, batches: Sequence[torch.Tensor], distances: Mapping[str, torch.Tensor]
    ) -> dict[str, list[int]]:
        """The channels that are kept, by the distances and by what an error in each layer does to the output."""
        widths = training.widths_now
        inputs = batches_to_rank_on(self._network, training, self.settings.patches, batches)
        if not inputs:
            self.unmeasured = NOTHING_MEASURED
            return {}
        rankings = rank(self._network, inputs, training.regions)
        # An error is a distance squared.
        factors = {name: factor**-0.5 for name, factor in unit_factors(rankings, self._cost.macs).items()}
        value = {name: {c: i for i, c in enumerate(ranking.order)} for name, ranking in rankings.items()}
        removed, level = remove_from_pairs(
            nearest_pairs(distances, factors), value, widths, self.settings, self._reached(training),
            must_reach=training.is_last_cut and self.target() is not None,
        )  # fmt: skip
        self._state = {"level": level, "tau": {name: level * factors[name] for name in widths}}
        settings = replace(self.settings, max_fraction_per_epoch=None)  # `remove_from_pairs` has applied it
        kept = {name: channels_to_keep(channels, widths[name], settings) for name, channels in removed.items()}
        return {name: channels for name, channels in kept.items() if len(channels) < widths[name]}

    def _reached(self, training: TrainingState) -> Callable[[Mapping[str, int], float], bool]:
        """Tells whether widths, or the level of the next pair, are as far as this epoch's cut should go."""
        epoch, now, step = training.epoch, training.widths_now, self.settings.round_to
        if self.settings.target_macs is None:
            done = sum(one <= epoch for one in self._epochs) / len(self._epochs)
            highest = FIRST_THRESHOLD + done * (self.settings.tau_max - FIRST_THRESHOLD)
            return lambda widths, level: epoch not in self._epochs or level > highest
        wanted = self._schedule.wanted(epoch)
        return lambda widths, level: (
            self._schedule.left({name: to_multiple(width, step, now[name]) for name, width in widths.items()}) <= wanted
        )


class PublishedSauron(DrawsMapsTogether):
    """As the paper has it: redundant are the channels whose maps lie near those of one random reference channel, nearer
    than a threshold of the layer's own, which climbs when the losses have settled."""

    def attach(self, network: nn.Module, layout: ChannelLayout) -> None:
        super().attach(network, layout)
        self._thresholds = {unit.name: self.settings.threshold(self.num_epochs) for unit in layout.units}

    def redundant(self, training: TrainingState) -> dict[str, list[int]]:
        """The channels that are nearer to the reference channel than the layer's threshold, nearest first."""
        taus = {
            name: self._thresholds[name].update(training.train_losses, training.val_losses, widths)
            for name, widths in training.widths.items()
        }
        distances = self._distances(training.batches(self.settings.prune_batches))
        redundant = {}
        for name, of_pairs in distances.items():
            # Seeded by name and epoch: a decision that is made again comes out the same.
            reference = random.Random(f"{training.epoch}:{name}").randrange(len(of_pairs))
            scores = of_pairs[reference].tolist()
            below = [c for c, score in enumerate(scores) if score < taus[name] and c != reference]
            redundant[name] = sorted(below, key=lambda c: scores[c])
        return redundant

    def state(self) -> dict:
        return {
            "tau": {name: threshold.value for name, threshold in self._thresholds.items()},
            "tau_steps": {name: threshold.steps for name, threshold in self._thresholds.items()},
            "waiting": {name: threshold.waiting for name, threshold in self._thresholds.items()},
        }

    def load_state(self, state: dict) -> None:
        for name, threshold in self._thresholds.items():
            threshold.steps, threshold.waiting = state["tau_steps"][name], state["waiting"][name]
