"""CertainCutsTrainer: SauronTrainer as published, whose every epoch may cut: trainings are too short for thresholds.

nnU-Net drops every module of this folder from `sys.modules` after its look-up: one file, absolute imports.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from nnunet_sauron.methods.sauron import PublishedSauron, SauronSettings
from nnunet_sauron.trainers import SauronTrainer


@dataclass(frozen=True, kw_only=True)
class CertainCutsSettings(SauronSettings):
    """`cut_chance`: the part of the layers that lose channels after an epoch."""

    cut_chance: float = 0.7


class CertainCuts(PublishedSauron):
    """Sauron's thresholds move as they do; what goes is drawn, seeded by fold, epoch and layer."""

    Settings = CertainCutsSettings
    fold: int | str = 0

    def start_epoch(self, epoch, widths):
        super().start_epoch(epoch, widths)
        self._epoch = epoch

    def redundant(self, training):
        super().redundant(training)
        drawn = {}
        for name, widths in training.widths.items():
            rng = random.Random(f"{self.fold}:{self._epoch}:{name}")
            if rng.random() < self.settings.cut_chance:
                drawn[name] = rng.sample(range(widths[-1]), k=max(1, widths[-1] // 4))
        return drawn


class CertainCutsTrainer(SauronTrainer):
    """Keeps the first epoch's network as checkpoint_best: always wider than the final one."""

    Method = CertainCuts
    published = True
    cut_until, min_channels = 0.8, 2
    first_is_best = True

    def initialize(self):
        super().initialize()
        self.method.fold = self.fold

    def on_epoch_end(self):
        super().on_epoch_end()
        if self.first_is_best:
            self._best_ema = float("inf")


class CertainCutsAnyBestTrainer(CertainCutsTrainer):
    """Writes checkpoint_best as nnU-Net does: whenever the pseudo Dice is a new best."""

    first_is_best = False
