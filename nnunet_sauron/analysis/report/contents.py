"""What a report holds: the models that it compares, with their folds."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...model.evaluation import CaseScore
from ...model.trained import ALL
from ...pruning.timing import Timing
from ..cost import NetworkCost
from .paired import PairedDifference
from .scores import PREDICTIONS

# Attributes of ClassScore that are compared with the baseline's, case by case.
COMPARED = ("dice", "hd95", "surface_dice", "absolute_volume_error")


@dataclass(frozen=True)
class FoldReport:
    """One fold's network and the log of its training.

    Attributes:
        cost: Of its network, for one patch.
        widths: Channels of every unit now; empty for a network whose channels cannot be followed.
        timing: Seconds for one patch by device, "cpu" and "cuda"; empty if not timed.
        epoch_seconds: Length of each epoch.
        history: The pruning history, a record an epoch; empty for other trainers.
    """

    cost: NetworkCost
    widths: dict[str, int]
    timing: dict[str, Timing]
    epoch_seconds: list[float]
    history: list[dict]

    @property
    def target(self) -> dict | None:
        """The target of its pruning, from the newest epoch's record (`trainers.pruning.PruningTrainer`): `name`,
        `value`, the parts `asked` for and `left`, `reached` (None: cuts went on) and `why` not. None without a target.
        """
        found = self.history[-1].get("target") if self.history else None
        return found and {"value": found["asked"], "reached": found["left"] <= found["asked"], "why": None, **found}

    @property
    def epoch_time_ratio(self) -> float | None:
        """Median length of the last tenth of the epochs over that of the first tenth; None for fewer than two epochs.

        The very first epoch, in which data loaders and GPU warm up, does not count where there are three or more.
        """
        seconds = self.epoch_seconds[1:] if len(self.epoch_seconds) > 2 else self.epoch_seconds
        count = max(1, len(seconds) // 10)
        if len(seconds) < 2 or not (first := statistics.median(seconds[:count])):
            return None
        return statistics.median(seconds[-count:]) / first


@dataclass(frozen=True)
class ModelReport:
    """One model.

    Attributes:
        name: Short, and no other model's of the report.
        folder, trainer, dataset, configuration, plans: Where it lies and what it was trained with.
        classes: Foreground classes or regions, and the values that belong to them in a segmentation.
        patch_size: Voxels per axis.
        input_channels: Of its networks.
        dense_widths, dense_cost: What its plans describe; empty or None where that cannot be told.
        folds: By fold; none whose network could not be built.
        scores: Of the validation cases by fold, or of a folder under "predictions"; others are absent.
        differences: Against the baseline, case by case, for the attributes of `ClassScore` in `COMPARED` (means over
            classes); empty for the baseline, and without cases in common.
    """

    name: str
    folder: Path
    trainer: str
    dataset: str
    classes: dict[str, tuple[int, ...]]
    configuration: str
    plans: str
    patch_size: tuple[int, ...]
    input_channels: int
    dense_widths: dict[str, int]
    dense_cost: NetworkCost | None
    folds: dict[str, FoldReport]
    scores: dict[str, list[CaseScore]]
    differences: dict[str, PairedDifference] = field(default_factory=dict)

    @property
    def parts(self) -> list[str]:
        """The folds, and "predictions" where scores are of a folder of them."""
        return list(dict.fromkeys([*self.folds, *self.scores]))

    @property
    def compared_parts(self) -> list[str]:
        """Those that means and differences are over: fold "all", which is validated on what it was trained with, only
        where there is no other fold."""
        others = [part for part in self.parts if part != ALL]
        return others if any(part != PREDICTIONS for part in others) else self.parts

    @property
    def cases(self) -> dict[str, CaseScore]:
        """The scored cases of `compared_parts` by name; with its fold, where several folds validate one case."""
        found = [(part, score) for part in self.compared_parts for score in self.scores.get(part, [])]
        count = Counter(score.case for _, score in found)
        return {score.case if count[score.case] == 1 else f"{score.case}, fold {part}": score for part, score in found}


@dataclass(frozen=True)
class Report:
    """All models.

    Attributes:
        models: In the order given.
        baseline: Name of the model that the others are compared with.
        problems: What is missing, and which command makes it.
        tolerance_mm: Of the surface Dice.
        threads: CPU threads of PyTorch, which the timing used.
        left_out: Folders that were to be in the report and are not: models that cannot be read, and segmentations of
            which no case could be scored. The problems tell why.
    """

    models: list[ModelReport]
    baseline: str
    problems: list[str]
    tolerance_mm: float
    threads: int
    left_out: list[Path] = field(default_factory=list)

    def model(self, name: str) -> ModelReport:
        """A model by its name."""
        return next(model for model in self.models if model.name == name)


def target_in_words(targets: Sequence[Mapping]) -> str:
    """The targets of folds that came to the same, such as "target_macs=0.1 reached, 0.098 left", a mean over them."""
    name, value, reached = (targets[0][key] for key in ("name", "value", "reached"))
    words = {True: "reached", False: "missed", None: "not reached yet"}
    named = f"{name}={value:g}" if isinstance(value, (int, float)) else name
    return f"{named} {words[reached]}, {statistics.fmean(one['left'] for one in targets):.3g} left"
