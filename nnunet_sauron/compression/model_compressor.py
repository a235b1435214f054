"""All folds of a model, compressed with one goal."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..console.progress import Progress
from ..model.trained import TrainedModel
from .compressor import Compressed, FoldCompressor
from .goal import Goal
from .stages import UniformStages, features_per_stage


class ModelCompressor:
    """Ranks, chooses widths and merges, fold by fold, or with one width a stage for all.

    Args:
        model: The model.
        device: Where networks run.
        round_to: Widths are multiples of this, up to the channels that there are.
        uniform_stages: Give all layers of a stage, in all folds, one width.
        progress: Shows bars.

    Attributes:
        wanted: Number of patches for a good fit of every layer.
    """

    def __init__(
        self, model: TrainedModel, device: torch.device, round_to: int, uniform_stages: bool, progress: Progress
    ):
        self._folds = {fold: FoldCompressor(model, fold, device, round_to) for fold in model.checkpoints}
        self._round_to, self._uniform_stages, self._progress = round_to, uniform_stages, progress
        self._stages: UniformStages | None = None
        self.wanted = max(one.wanted for one in self._folds.values())

    def leave_alone(self, patches: int) -> list[str]:
        """A remark for every fold with layers that this number of patches is too small for.

        Raises:
            ValueError: It is too small for all layers.
        """
        remarks = {fold: one.leave_alone(patches) for fold, one in self._folds.items()}
        return [f"Fold {fold}: {remark}" for fold, remark in remarks.items() if remark]

    def rank(self, inputs: Sequence[torch.Tensor]) -> None:
        """Rank the channels of every layer on patches, (B, channels, *patch) each."""
        for fold, one in self._folds.items():
            with self._progress.bar(f"fold {fold}: ranking channels", one.probes(inputs)) as step:
                one.rank(inputs, after_probe=step)
        if self._uniform_stages:
            self._stages = UniformStages(list(self._folds.values()), self._round_to)

    def tolerances(self, goal: Goal) -> dict[str, float]:
        """The tolerance of each fold that meets a goal; with uniform stages it is the same in all.

        Raises:
            ValueError: The goal cannot be met.
        """
        if self._stages:
            return dict.fromkeys(self._folds, self._stages.tolerance(goal))
        return {fold: one.tolerance(goal) for fold, one in self._folds.items()}

    def merge(self, tolerances: dict[str, float], text: str = "merging") -> dict[str, Compressed]:
        """Merge the channels that the tolerances leave out. May be called again with others.

        Args:
            tolerances: By fold; a fold without one is left out.
            text: What the progress bars say.
        """
        found = {}
        for fold, tolerance in tolerances.items():
            one = self._folds[fold]
            with self._progress.bar(f"fold {fold}: {text}", len(one.before)) as step:
                found[fold] = one.merge(tolerance, step, self._stages and self._stages.widths(tolerance))
        return found

    def features_per_stage(self, found: dict[str, Compressed]) -> list[int]:
        """The widths that all folds share, by stage, for plans."""
        fold, one = next(iter(found.items()))
        return features_per_stage(self._folds[fold].network, one.after)
