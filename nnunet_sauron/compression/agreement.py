"""How segmentations of the old and the new model agree, on images that were held out."""

from __future__ import annotations

import errno
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..console.progress import Progress
from ..files import AGAIN
from ..model.cases import Case, predict_case
from ..model.evaluation import CaseScore, evaluate_folder, mean_score
from ..model.trained import TrainedModel

HELD_OUT = 0.25  # of the images
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
Scores = list[CaseScore]


@dataclass(frozen=True)
class Measured:
    """Scores of the held-out images, case by case.

    Attributes:
        agreement: Of the new segmentations with the old ones; empty where no image was held out.
        old, new: Of the old and the new segmentations with the references, if there are any.
        before_recovery: Agreement before a recovery, if there was one.
    """

    agreement: Scores
    old: Scores | None = None
    new: Scores | None = None
    before_recovery: Scores | None = None

    @property
    def undefined(self) -> bool:
        """Whether neither model finds any class, so that there is nothing to compare."""
        return bool(self.agreement) and math.isnan(mean_score(self.agreement, "dice").value)


class Segmenter:
    """Segments the held-out cases by nnU-Net's own prediction, and compares.

    Args:
        model: The model.
        cases: The held-out cases.
        device: Where it predicts.
        progress: Shows bars and lines.
        labels: A folder of reference segmentations, if there is one.

    Raises:
        FileNotFoundError: A case has no reference.
    """

    def __init__(
        self, model: TrainedModel, cases: Sequence[Case], device: torch.device, progress: Progress,
        labels: Path | None = None,
    ):  # fmt: skip
        if labels and not labels.is_dir():
            raise FileNotFoundError(f"--labels {labels} is no folder; give one of reference segmentations.")
        self.model, self.cases, self.device, self.progress = model, cases, device, progress
        self._folder = tempfile.TemporaryDirectory()
        self._root = Path(self._folder.name)
        self._labels = labels if cases else None
        self._notes: set[str] = set()
        self._old: Scores | None = None
        ending = model.dataset_json["file_ending"]
        self.references = {case.name: labels / (case.name + ending) for case in cases} if labels else {}
        for path in self.references.values():
            if not path.exists():
                raise FileNotFoundError(f"{labels} has no {path.name}; --labels needs one for every held-out image.")

    def segment_with_old_model(self) -> None:
        """Must be called before `measure`."""
        if self.cases:
            self._predict("old", None)
            self._old = self._against_labels("old")

    def measure(self, weights: list[dict], before_recovery: Scores | None = None) -> Measured:
        """Segment with new weights, one dictionary a fold, and compare.

        Args:
            weights: The new networks'.
            before_recovery: Agreement measured earlier, to be kept beside the new one.
        """
        if not self.cases:
            return Measured([])
        agreement = evaluate_folder(self._predict("new", weights), self._root / "old", self.model.segmentations)
        return Measured(agreement, self._old, self._against_labels("new"), before_recovery)

    def _against_labels(self, name: str) -> Scores | None:
        if not self._labels:
            return None
        names = [path.name for path in self.references.values()]
        return evaluate_folder(
            self._root / name, self._labels, self.model.segmentations, cases=names, on_note=self._say_once
        )

    def _say_once(self, text: str) -> None:
        if text not in self._notes:
            self._notes.add(text)
            self.progress.say(text)

    def _predict(self, name: str, weights: list[dict] | None) -> Path:
        folder = self._root / name
        predictor = self.model.predictor(self.device, weights)
        try:
            folder.mkdir(exist_ok=True)
            with self.progress.bar(f"segmenting with the {name} model", len(self.cases)) as step:
                for case in self.cases:
                    predict_case(predictor, case, folder)
                    step(case.name)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise OSError(
                f"The temporary folder {folder} has no room for segmentations: {error}. Make room, or name another "
                f"place in the environment variable TMPDIR, then {AGAIN}."
            ) from error
        return folder


def split(cases: Sequence[Case], most: int) -> tuple[list[Case], list[Case]]:
    """Cases to fit on and cases to hold out (none of a single one), at most `most` together, spread evenly."""
    step = max(1, len(cases) / most)
    chosen = [cases[int(i * step)] for i in range(min(most, len(cases)))]
    held_out = round(len(chosen) * HELD_OUT) or min(1, len(chosen) - 1)
    every = len(chosen) / held_out if held_out else math.inf
    indices = {int((i + 0.5) * every) for i in range(held_out)}
    return [c for i, c in enumerate(chosen) if i not in indices], [c for i, c in enumerate(chosen) if i in indices]
