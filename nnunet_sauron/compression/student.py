"""One fold's training in a recovery: the small network learns the old one's outputs on images without labels.

It is nnU-Net's training (augmentation, SGD, polynomial schedule, clipping) with a loss that is the distance to the
teacher's outputs (`methods/distillation.py`).
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from ..console.progress import Progress
from ..methods.distillation import distillation_loss
from ..pruning.eval_mode import mixed_precision
from ..trainers.compressed import INITIAL_LR
from ..trainers.teacher import Teacher

try:
    from torch import GradScaler
except ImportError:  # before torch 2.3
    from torch.cuda.amp import GradScaler

STEPS = 250  # an epoch, as in nnU-Net
LEAST_RISE = 5e-4  # of the agreement, to count as one
COOL_DOWN = 4  # epochs in which the learning rate falls to zero once the agreement no longer rises


@dataclass(frozen=True)
class RecoverySettings:
    """Length and optimiser of a recovery.

    Attributes:
        epochs: The most there are, and the length of the polynomial schedule.
        steps: Steps of an epoch.
        initial_lr, momentum, weight_decay, clip: Of SGD. All but the learning rate are nnU-Net's.
        decay: Of the running mean of the weights, which is what is judged and returned; less in the first steps.
    """

    epochs: int
    steps: int = STEPS
    initial_lr: float = INITIAL_LR
    momentum: float = 0.99
    weight_decay: float = 3e-5
    clip: float = 12.0
    decay: float = 0.98

    def __post_init__(self) -> None:
        for name, value in (("--recover", self.epochs), ("--recover-steps", self.steps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")

    @property
    def patience(self) -> int:
        """Epochs without a rise after which it cools down and stops."""
        return max(5, self.epochs // 3)


def move_means(means: Sequence[torch.Tensor], values: Sequence[torch.Tensor], steps: int, decay: float) -> None:
    """Take values into their running means, in place; all of one dtype.

    Args:
        means, values: A tensor for each parameter or buffer.
        steps: How many values the means hold. Up to `decay / (1 - decay)` of them count alike.
        decay: What is left of a mean in a step; whole numbers are taken over as they are.
    """
    part = max(1 - decay, 1 / (1 + int(steps)))
    for mean, value in zip(means, values, strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, part)
        else:
            mean.copy_(value)


@dataclass
class Recovered:
    """One fold's result.

    Attributes:
        weights: The running mean of the best epoch.
        agreement: With the old model on held-out patches, hard Dice over all of them, before the first epoch and after
            each; nan where neither network finds foreground.
        loss: Mean distance to the old model in each epoch.
        best_epoch: The epoch of `weights`; 0 is before the first.
    """

    weights: dict[str, torch.Tensor]
    agreement: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    best_epoch: int = 0


class StudentTraining:
    """Trains one fold's small network.

    Args:
        student: The small network, with its merged weights.
        teacher: The old network.
        settings: Length and optimiser.
        device: Where both run.
        held_out: Patches to follow the agreement on, (B, channels, *patch) each.
        state: What `state()` returned, to resume; None to begin.
    """

    def __init__(
        self, student: nn.Module, teacher: Teacher, settings: RecoverySettings, device: torch.device,
        held_out: Sequence[torch.Tensor], state: dict | None = None,
    ):  # fmt: skip
        self.student = student.to(device).requires_grad_()
        self.teacher, self.settings, self.device = teacher, settings, device
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), settings.initial_lr, weight_decay=settings.weight_decay,
            momentum=settings.momentum, nesterov=True,
        )  # fmt: skip
        self.scheduler = PolyLRScheduler(self.optimizer, settings.initial_lr, settings.epochs)
        self.cool_down: range | None = None  # the last epochs, once the agreement no longer rises
        self.scaler = GradScaler(enabled=device.type == "cuda")
        self.held_out = [patch.to(device) for patch in held_out]
        self.expected = [self._segmented(teacher.logits(patch)[0]) for patch in self.held_out]
        # With this learning rate and momentum, the last step decides how some images are segmented; with the running
        # mean of the weights it does not (Polyak and Juditsky, SIAM J. Control Optim. 30, 1992).
        average = partial(move_means, decay=settings.decay)
        self.averaged = AveragedModel(self.student, multi_avg_fn=average, use_buffers=True)
        if state:
            self.student.load_state_dict(state["student"])
            self.averaged.module.load_state_dict(state["averaged"])
            self.averaged.n_averaged.fill_(state["averaged_steps"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.epoch, self.best, self.cool_down = state["epoch"], state["best"], state["cool_down"]
        else:
            self.epoch, self.best = 0, Recovered(self._weights(), [self.agreement()])

    def run(self, name: str, source: Dataset, progress: Progress, save: Callable[[dict], None]) -> Recovered:
        """Train to the end.

        Args:
            name: For progress bars and lines.
            source: A batch for each step, (B, channels, *patch).
            progress: Shows them.
            save: Called with `state()` after every epoch.
        """
        settings, first = self.settings, self.epoch
        steps = range(first * settings.steps, settings.epochs * settings.steps)
        # As in nnU-Net, other processes make the batches while this one computes.
        workers = min(get_allowed_n_proc_DA(), os.cpu_count() - 1, len(steps))
        loader = DataLoader(
            source, batch_size=None, sampler=steps, num_workers=workers, pin_memory=self.device.type == "cuda"
        )
        stream = iter(loader)
        with progress.bar(f"{name}: recovering", len(steps)) as step:
            self._cool_down_if_flat()  # a state that is resumed may be due
            while self.epoch < self._length:
                self.best.loss.append(self._train_epoch(stream, step))
                self.epoch += 1
                self._validate()
                self._cool_down_if_flat()
                if not progress.console.is_terminal:
                    progress.say(
                        f"{name}: epoch {self.epoch} of {settings.epochs}, loss {self.best.loss[-1]:.4f}, agreement "
                        f"{self.best.agreement[-1]:.4f}"
                    )
                save(self.state())
        if self.epoch < settings.epochs:
            progress.say(f"{name}: stopped after {self.epoch} epochs, since the agreement no longer rose")
        return self.best

    def state(self) -> dict:
        """All that continuing needs."""
        return {
            "epoch": self.epoch,
            "student": copy.deepcopy(self.student).cpu().state_dict(),
            "averaged": self._weights(),
            "averaged_steps": int(self.averaged.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best,
            "cool_down": self.cool_down,
        }

    @torch.no_grad()
    def agreement(self) -> float:
        """Hard Dice with the teacher over all held-out patches together, mean of the classes that either finds."""
        network = self.averaged.module.eval()
        network.decoder.deep_supervision = False
        both = each = 0
        for patch, expected in zip(self.held_out, self.expected, strict=True):
            with mixed_precision(self.device):
                found = self._segmented(network(patch))
            positions = [0, *range(2, found.ndim)]
            # On the CPU: MPS has no float64.
            both = both + (found & expected).sum(positions).cpu().double()
            each = each + found.sum(positions).cpu().double() + expected.sum(positions).cpu().double()
        return float((2 * both / each)[each > 0].mean())

    def _train_epoch(self, stream: Iterator[torch.Tensor], step: Callable[[str], None]) -> float:
        self._set_learning_rate()
        self.student.train()
        self.student.decoder.deep_supervision = self.teacher.supervised
        losses = []
        for _ in range(self.settings.steps):
            data = next(stream).to(self.device, non_blocking=True)
            target = self.teacher.logits(data)
            self.optimizer.zero_grad(set_to_none=True)
            with mixed_precision(self.device):
                loss = distillation_loss(self.student(data), target, regions=self.teacher.regions)
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.student.parameters(), self.settings.clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.averaged.update_parameters(self.student)
            losses.append(loss.item())
            step(f"loss {losses[-1]:.3f}, agreement {self.best.agreement[-1]:.4f}")
        return float(np.mean(losses))

    @property
    def _length(self) -> int:
        """Number of epochs: that of the settings, or fewer where the agreement no longer rises."""
        return self.cool_down.stop if self.cool_down else self.settings.epochs

    def _cool_down_if_flat(self) -> None:
        """Begin the last epochs where the agreement no longer rises.

        The last epochs of a polynomial schedule, with their small learning rates, bring much of the gain. So a recovery
        that stops early first lets its learning rate fall to zero, in a few epochs.
        """
        if self.cool_down is None and self.epoch + COOL_DOWN < self.settings.epochs and self._no_longer_rises():
            self.cool_down = range(self.epoch, self.epoch + COOL_DOWN)

    def _set_learning_rate(self) -> None:
        if not self.cool_down:
            self.scheduler.step(self.epoch)
            return
        self.scheduler.step(self.cool_down.start)
        for group in self.optimizer.param_groups:
            group["lr"] *= (self.cool_down.stop - self.epoch) / (COOL_DOWN + 1)

    def _validate(self) -> None:
        agreement = self.agreement()
        # Where nothing can be compared, the last weights are as good as any.
        if math.isnan(agreement) or agreement > max(self.best.agreement):
            self.best.best_epoch, self.best.weights = self.epoch, self._weights()
        self.best.agreement.append(agreement)

    def _no_longer_rises(self) -> bool:
        """Whether the best of the last `patience` epochs is hardly above the best before them."""
        before, since = self.best.agreement[: -self.settings.patience], self.best.agreement[-self.settings.patience :]
        return bool(before) and max(since) < max(before) + LEAST_RISE  # never true of nan

    def _segmented(self, logits: torch.Tensor) -> torch.Tensor:
        """Foreground classes or regions, (B, classes, *voxels), as True and False."""
        if self.teacher.regions:
            return logits > 0
        best = logits.argmax(1, keepdim=True)
        classes = torch.arange(1, logits.shape[1], device=logits.device).view(1, -1, *[1] * (logits.ndim - 2))
        return best == classes

    def _weights(self) -> dict[str, torch.Tensor]:
        # Moved as a whole: nnU-Net's modules have several names, and each tensor is to be stored once.
        return copy.deepcopy(self.averaged.module).cpu().state_dict()
