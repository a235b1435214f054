"""`compress --recover`: the small model learns from the old one on the images alone, without a label.

nnU-Net's training (its augmentation, SGD, poly schedule and clipping) with the distance to the old model's outputs in
the place of its loss (`methods/distillation.py`), each fold from its own.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import nn
from torch.utils.data import DataLoader

from .. import __version__
from ..files import AGAIN, write_atomically
from ..methods.distillation import distillation_loss
from ..model.cases import Case
from ..model.checkpoints import DamagedFileError, load
from ..model.evaluation import CaseScore, mean_score
from ..model.trained import TrainedModel
from ..trainers.compressed import INITIAL_LR, MIRRORING
from ..trainers.teacher import Teacher, is_supervised
from .augmented import AugmentedPatches, store_images
from .compressor import Compressed
from .images import batches, patches

try:
    from torch import GradScaler
except ImportError:  # before torch 2.3
    from torch.cuda.amp import GradScaler

STEPS = 250  # of an epoch, nnU-Net's
LEAST_FITTED, LEAST_HELD_OUT = 2, 1
# nnU-Net's batches are made for a GPU; on a CPU, which is no faster with large ones, a step would take minutes.
CPU_VOXELS, LEAST_BATCH = 1 << 16, 2
JUDGED = 48  # patches of the held-out images, on which the agreement is followed
LEAST_RISE = 5e-4  # of the agreement, to count as one
COOL_DOWN = 4  # epochs in which the rate falls to zero, when the agreement no longer rises
SEED = 0


@dataclass(frozen=True)
class RecoverySettings:
    """How long, and by what steps.

    Attributes:
        epochs: At most; the length of the poly schedule.
        steps: Of an epoch.
        initial_lr, momentum, weight_decay, clip: Of nnU-Net's SGD; but for the rate, nnU-Net's numbers.
    """

    epochs: int
    steps: int = STEPS
    initial_lr: float = INITIAL_LR
    momentum: float = 0.99
    weight_decay: float = 3e-5
    clip: float = 12.0

    def __post_init__(self) -> None:
        for name, value in (("--recover", self.epochs), ("--recover-steps", self.steps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")

    @property
    def patience(self) -> int:
        """Epochs without a rise, after which it cools down and stops."""
        return max(5, self.epochs // 3)


@dataclass
class Recovered:
    """What became of one fold.

    Attributes:
        weights: Those of the best epoch.
        agreement: With the old model on held-out patches, hard Dice over all of them, before and after each epoch; nan
            where neither sees foreground.
        loss: Mean distance to the old model in each epoch.
        best_epoch: Whose weights these are; 0 is before the first.
    """

    weights: dict[str, torch.Tensor]
    agreement: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    best_epoch: int = 0


class Recovery:
    """The recovery of all folds of a compressed model, and what is kept of it beside the output while it runs.

    Args:
        model: The old model.
        output: The new model's folder; `.NAME.recovery` beside it holds the state after every epoch.
        settings: How long.
        fitted_on, held_out: Images to learn on, and to follow the agreement on.
        device: Where networks run.
        progress: For bars and lines.
        made_with: What else the merged weights depend on, such as the goal; a state of other settings is not used.

    Attributes:
        found: The merged networks of an interrupted run, which need not be made again; else empty.

    Raises:
        ValueError: There are too few images.
    """

    def __init__(
        self, model: TrainedModel, output: Path, settings: RecoverySettings, fitted_on: Sequence[Case],
        held_out: Sequence[Case], device: torch.device, progress, made_with: Mapping,
    ):  # fmt: skip
        check_images(len(fitted_on), len(held_out))
        self.model, self.settings, self.device, self.progress = model, settings, device, progress
        self.fitted_on, self.held_out = fitted_on, held_out
        self.folder = output.absolute().with_name(f".{output.name}.recovery")
        self.batch_size = batch_size(model, device)
        files = [Path(file) for case in (*fitted_on, *held_out) for file in case.files]
        files += [model.folder / f"fold_{fold}" / model.checkpoint_name for fold in model.checkpoints]
        self._made_with = {
            "version": __version__,
            **asdict(settings),
            "batch_size": self.batch_size,
            "held_out": [case.name for case in held_out],
            "files": {str(file.resolve()): (file.stat().st_size, file.stat().st_mtime_ns) for file in files},
            **made_with,
        }
        self._state = self._read()
        self.found: dict[str, Compressed] = self._state["found"]

    def run(self, found: Mapping[str, Compressed]) -> dict[str, Compressed]:
        """Recover every fold; an interrupted run's folds and epochs are not repeated.

        Args:
            found: The merged networks.

        Returns:
            The same with other weights.
        """
        if not self.found:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            self._state["found"] = dict(found)
            self._save()
        with self.progress.bar("preprocessing images to learn on", len(self.fitted_on)) as step:
            for name in store_images(self.model, self.fitted_on, self.folder / "images"):
                step(name)
        judged = batches(patches(self.model, self.held_out, JUDGED, SEED, more=False)[0])
        for index, (fold, one) in enumerate(found.items()):
            if fold not in self._state["done"]:
                self._state["done"][fold] = self._recover(index, fold, one, judged)
                self._state["running"] = None
                self._save()
        return {fold: replace(one, weights=self._state["done"][fold].weights) for fold, one in found.items()}

    def notes(self, before: Sequence[CaseScore], after: Sequence[CaseScore]) -> dict:
        """For compression.json.

        Args:
            before, after: Agreement with the old model on the held-out images.
        """
        return {
            **asdict(self.settings),
            "batch_size": self.batch_size,
            "agreement_before": mean_score(before, "dice").value,
            "agreement_after": mean_score(after, "dice").value,
            "folds": {
                fold: {"epochs": len(one.loss), **{k: v for k, v in vars(one).items() if k != "weights"}}
                for fold, one in self._state["done"].items()
            },
        }

    def finish(self) -> None:
        """The model is written: nothing is left to be continued."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _recover(self, index: int, fold: str, one: Compressed, judged: list[torch.Tensor]) -> Recovered:
        checkpoint = self.model.checkpoints[fold]
        source = AugmentedPatches(
            self.model,
            [case.name for case in self.fitted_on],
            self.folder / "images",
            self.batch_size,
            checkpoint.get(MIRRORING, "nnunet"),
            SEED + index,
        )
        regions = self.model.manager.get_label_manager(self.model.dataset_json).has_regions
        supervised = is_supervised(self.model.checkpoints[fold])
        teacher = Teacher([self.model.network(fold)], regions=regions, supervised=supervised)
        teacher.start(self.device, deep_supervision=True)
        student = self.model.network(fold)
        student.load_state_dict(one.weights)

        def save(running: dict) -> None:
            self._state["running"] = {"fold": fold, **running}
            self._save()

        running = self._state["running"]
        running = running if running and running["fold"] == fold else None
        training = _Training(student, teacher, self.settings, self.device, judged, one.weights, running)
        return training.run(f"fold {fold}", source, self.progress, save)

    def _read(self) -> dict:
        begun = {"made_with": self._made_with, "found": {}, "done": {}, "running": None}
        path = self.folder / "state.pth"
        if not path.is_file():
            return begun
        try:
            state = load(path)
        except DamagedFileError:
            self.progress.say(f"{path} cannot be read, it is damaged: beginning anew")
            return begun
        except ValueError as error:
            raise ValueError(f"{error} To begin anew, give another -o.") from error
        made_with = state.get("made_with", {}) if isinstance(state, dict) else {}
        differ = [key for key, value in self._made_with.items() if made_with.get(key) != value]
        if differ or set(made_with) != set(self._made_with):
            named = ", ".join(differ) or "settings"
            self.progress.say(f"{self.folder} is of a recovery with other {named}: beginning anew")
            return begun
        epoch = state["running"]["epoch"] if state["running"] else 0
        self.progress.say(f"Going on from {self.folder}: {len(state['done'])} folds done, {epoch} epochs of the next")
        return state

    def _save(self) -> None:
        write_atomically(self.folder / "state.pth", lambda path: torch.save(self._state, path), AGAIN)


def check_images(fitted_on: int, held_out: int) -> None:
    """Raise ValueError unless there are enough images to learn on and to hold out."""
    if fitted_on < LEAST_FITTED or held_out < LEAST_HELD_OUT:
        raise ValueError(
            f"--recover needs at least {LEAST_FITTED} images to learn on and {LEAST_HELD_OUT} held out to see when it "
            f"is enough; there are {fitted_on} and {held_out}. Give at least {LEAST_FITTED + LEAST_HELD_OUT} images, "
            f"or let more of them be used (--max-images)."
        )


def batch_size(model: TrainedModel, device: torch.device) -> int:
    """That of the plans; on a CPU no more than `CPU_VOXELS`, and two patches in any case."""
    planned = model.manager.get_configuration(model.configuration).batch_size
    if device.type != "cpu":
        return planned
    return min(planned, max(LEAST_BATCH, CPU_VOXELS // math.prod(model.patch_size)))


class _Training:
    """One fold's: student, optimiser, schedule, and the best weights so far."""

    def __init__(
        self, student: nn.Module, teacher: Teacher, settings: RecoverySettings, device: torch.device,
        judged: list[torch.Tensor], merged: dict[str, torch.Tensor], running: dict | None,
    ):  # fmt: skip
        self.student = student.to(device).requires_grad_()
        self.teacher, self.settings, self.device = teacher, settings, device
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), settings.initial_lr, weight_decay=settings.weight_decay,
            momentum=settings.momentum, nesterov=True,
        )  # fmt: skip
        self.scheduler = PolyLRScheduler(self.optimizer, settings.initial_lr, settings.epochs)
        self.cool_down: range | None = None  # the last epochs, once the agreement has stopped rising
        self.scaler = GradScaler(enabled=device.type == "cuda")
        self.judged = [patch.to(device) for patch in judged]
        self.of_teacher = [self._segmented(teacher.logits(patch)[0]) for patch in self.judged]
        if running:
            self.student.load_state_dict(running["student"])
            self.optimizer.load_state_dict(running["optimizer"])
            self.scaler.load_state_dict(running["scaler"])
            self.epoch, self.best, self.cool_down = running["epoch"], running["best"], running["cool_down"]
        else:
            self.epoch, self.best = 0, Recovered(merged, [self.agreement()])

    def run(self, name: str, source: AugmentedPatches, progress, save: Callable[[dict], None]) -> Recovered:
        settings, first = self.settings, self.epoch
        steps = range(first * settings.steps, settings.epochs * settings.steps)
        # An own process makes the batches while this one computes, as in nnU-Net.
        workers = min(get_allowed_n_proc_DA(), os.cpu_count() - 1, len(steps))
        loader = DataLoader(
            source, batch_size=None, sampler=steps, num_workers=workers, pin_memory=self.device.type == "cuda"
        )
        stream = iter(loader)
        with progress.bar(f"{name}: recovering", len(steps)) as step:
            while self.epoch < self._length():
                self.best.loss.append(self._train_epoch(stream, step))
                self.epoch += 1
                self._judge()
                if not progress.console.is_terminal:
                    progress.say(
                        f"{name}: epoch {self.epoch} of {settings.epochs}, loss {self.best.loss[-1]:.4f}, agreement "
                        f"{self.best.agreement[-1]:.4f}"
                    )
                save(self._running())
        if self.epoch < settings.epochs:
            progress.say(f"{name}: stopped after {self.epoch} epochs, since the agreement no longer rose")
        return self.best

    def _train_epoch(self, stream, step: Callable[[str], None]) -> float:
        self._set_rate()
        self.student.train()
        self.student.decoder.deep_supervision = self.teacher.supervised
        losses = []
        for _ in range(self.settings.steps):
            data = next(stream).to(self.device, non_blocking=True)
            of_teacher = self.teacher.logits(data)
            self.optimizer.zero_grad(set_to_none=True)
            with self._mixed():
                loss = distillation_loss(self.student(data), of_teacher, regions=self.teacher.regions)
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.student.parameters(), self.settings.clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            losses.append(loss.item())
            step(f"loss {losses[-1]:.3f}, agreement {self.best.agreement[-1]:.4f}")
        return float(np.mean(losses))

    def _length(self) -> int:
        """The epochs in all: those asked for, or fewer where the agreement no longer rises.

        Much of what a poly schedule brings, its last epochs do, when the rate is small. So a recovery does not stop
        where it stands: the rate falls to zero first, in a few epochs.
        """
        epochs = self.settings.epochs
        if self.cool_down is None and self.epoch + COOL_DOWN < epochs and self._no_longer_rises():
            self.cool_down = range(self.epoch, self.epoch + COOL_DOWN)
        return self.cool_down.stop if self.cool_down else epochs

    def _set_rate(self) -> None:
        if not self.cool_down:
            self.scheduler.step(self.epoch)
            return
        self.scheduler.step(self.cool_down.start)
        for group in self.optimizer.param_groups:
            group["lr"] *= (self.cool_down.stop - self.epoch) / (COOL_DOWN + 1)

    def _judge(self) -> None:
        agreement = self.agreement()
        # Where nothing can be compared, the last weights are as good a guess as any.
        if math.isnan(agreement) or agreement > max(self.best.agreement):
            self.best.best_epoch, self.best.weights = self.epoch, self._weights()
        self.best.agreement.append(agreement)

    def _no_longer_rises(self) -> bool:
        """Whether the last epochs, as many as the patience, brought nothing over what was best before them."""
        before, since = self.best.agreement[: -self.settings.patience], self.best.agreement[-self.settings.patience :]
        return bool(before) and max(since) < max(before) + LEAST_RISE  # never true of nan

    @torch.no_grad()
    def agreement(self) -> float:
        """Hard Dice with the teacher over all judged patches together, mean of the classes that are there."""
        self.student.eval()
        self.student.decoder.deep_supervision = False
        both = each = 0
        for patch, expected in zip(self.judged, self.of_teacher, strict=True):
            with self._mixed():
                found = self._segmented(self.student(patch))
            positions = [0, *range(2, found.ndim)]
            # On the CPU: MPS has no float64.
            both = both + (found & expected).sum(positions).cpu().double()
            each = each + found.sum(positions).cpu().double() + expected.sum(positions).cpu().double()
        return float((2 * both / each)[each > 0].mean())

    def _segmented(self, logits: torch.Tensor) -> torch.Tensor:
        """Foreground classes or regions, (B, classes, *voxels), as True and False."""
        if self.teacher.regions:
            return logits > 0
        best = logits.argmax(1, keepdim=True)
        classes = torch.arange(1, logits.shape[1], device=logits.device).view(1, -1, *[1] * (logits.ndim - 2))
        return best == classes

    def _mixed(self):
        return torch.autocast("cuda") if self.device.type == "cuda" else contextlib.nullcontext()

    def _weights(self) -> dict[str, torch.Tensor]:
        # Moved as a whole: nnU-Net's modules have several names, and each tensor is to be stored once.
        return copy.deepcopy(self.student).cpu().state_dict()

    def _running(self) -> dict:
        return {
            "epoch": self.epoch,
            "student": self._weights(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best,
            "cool_down": self.cool_down,
        }
