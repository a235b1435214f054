"""Learning from a teacher: the loss with the distance to its outputs, and what a trainer does with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from ..methods.distillation import distillation_loss
from ..model.checkpoints import CHECKPOINT
from .start import check_not_own
from .teacher import Teacher, as_list

TERM = "distillation"  # of a training step's results
LAST_WEIGHT_OF_DDP = 1e-6  # nnU-Net's


class DistillingLoss(nn.Module):
    """nnU-Net's loss plus, in training steps only, the distance to a teacher.

    Args:
        loss: nnU-Net's, or a wrapper of it.
        teacher: The teacher, started.
        labels: False leaves nnU-Net's loss, and so the labels, out of training steps.
        ddp: Several processes train together, and every parameter must get a gradient.
    """

    def __init__(self, loss: nn.Module, teacher: Teacher, *, labels: bool = True, ddp: bool = False):
        super().__init__()
        self.loss, self.labels = loss, labels
        self._teacher = teacher
        self._ddp = ddp
        self._of_teacher: list[torch.Tensor] | None = None
        self._term: torch.Tensor | None = None

    def train_step(self, train_step: Callable[[dict], dict], batch: dict, device: torch.device) -> dict:
        """nnU-Net's training step with the teacher's output for its batch.

        Args:
            train_step: The step without a teacher (`super().train_step`).
            batch: nnU-Net's.
            device: The student's.

        Returns:
            What `train_step` gives, with the distance to the teacher as "distillation". With labels, "loss" stays
            nnU-Net's own, comparable with a stock training's and with the validation loss; without, it is the distance.
        """
        data = batch["data"].to(device, non_blocking=True)
        self._of_teacher = self._teacher.logits(data)
        try:
            result = train_step({**batch, "data": data})  # which finds them on the device already
        finally:
            self._of_teacher = None
        term = float(self._term)
        return {**result, "loss": result["loss"] - term * self.labels, TERM: np.asarray(term)}

    def forward(self, output, target) -> torch.Tensor:
        if self._of_teacher is None:  # a validation step
            return self.loss(output, target)
        outputs, count = as_list(output), len(self._of_teacher)
        term = distillation_loss(
            outputs[:count], self._of_teacher, regions=self._teacher.regions,
            last_weight=LAST_WEIGHT_OF_DDP if self._ddp else 0.0,
        )  # fmt: skip
        self._term = term.detach()
        if self._ddp:  # waits for a gradient of every head
            term = term + sum(0 * unlike.float().mean() for unlike in outputs[count:])
        return self.loss(output, target) + term if self.labels else term


@dataclass(frozen=True)
class TeacherSource:
    """Where a teacher is read from, as `Teacher.read` takes it."""

    path: str
    folds: str = "same"
    checkpoint: str = CHECKPOINT


class Distils(nnUNetTrainer):
    """For trainers that may learn from a teacher. It stands before other trainers among a class's bases.

    A subclass sets `_source` and calls `read_teacher` before nnU-Net's constructor, so that a wrong teacher is refused
    before a log is written; and sets both anew where a training is continued.

    Attributes:
        epoch_distance: The last epoch's mean distance to the teacher; None without one.
    """

    _source: TeacherSource | None = None
    _teacher: Teacher | None = None
    _labels = True
    epoch_distance: float | None = None

    def read_teacher(self, plans: dict, configuration: str, fold: int | str, dataset_json: dict) -> None:
        """Read the teacher, if there is a source.

        Raises:
            FileNotFoundError, ValueError: As `Teacher.read`; or it is this training's own.
        """
        self._teacher = self._source and Teacher.read(
            self._source.path, fold, plans, configuration, dataset_json, folds=self._source.folds,
            checkpoint_name=self._source.checkpoint,
        )  # fmt: skip
        if self._teacher:
            check_not_own("teacher", self._teacher.files, type(self), plans, configuration, fold)

    def on_train_start(self) -> None:
        if not self.was_initialized:
            self.initialize()
        if self._teacher is None:  # of a training that is continued
            try:
                self.read_teacher(self.plans_manager.plans, self.configuration_name, self.fold, self.dataset_json)
            except FileNotFoundError:
                if self.current_epoch < self.num_epochs:
                    raise  # else the training is finished, and needs no teacher
        if self._teacher:
            self._teacher.start(self.device, deep_supervision=self.enable_deep_supervision)
            self.loss = DistillingLoss(self.loss, self._teacher, labels=self._labels, ddp=self.is_ddp)
        super().on_train_start()
        labels = "with labels" if self._labels else "without labels"
        self.print_to_log_file(f"Teacher: {self._teacher.name}, {labels}" if self._teacher else "No teacher")

    def train_step(self, batch: dict) -> dict:
        if self._teacher is None:
            return super().train_step(batch)
        return self.loss.train_step(super().train_step, batch, self.device)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        terms = [float(output.pop(TERM)) for output in train_outputs if TERM in output]
        self.epoch_distance = float(np.mean(terms)) if terms else None
        super().on_train_epoch_end(train_outputs)
