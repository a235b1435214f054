"""`compress --recover`: the small network of each fold learns from the old one on the images alone, without a label.

The state after every epoch is kept beside the output, so that an interrupted run can continue.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from .. import __version__
from ..console.progress import Progress
from ..files import AGAIN, locked, write_atomically
from ..model.cases import Case
from ..model.checkpoints import MIRRORING, DamagedFileError, load
from ..model.evaluation import mean_score
from ..model.trained import TrainedModel
from ..trainers.teacher import Teacher, is_supervised
from .agreement import Measured
from .augmented import AugmentedPatches, store_images
from .compressor import Compressed
from .images import batches, patches
from .student import Recovered, RecoverySettings, StudentTraining

LEAST_FITTED, LEAST_HELD_OUT = 2, 1
# nnU-Net's batch sizes are made for a GPU; a CPU, which is no faster with large batches, would take minutes a step.
CPU_VOXELS, LEAST_BATCH = 1 << 16, 2
JUDGED = 48  # patches of the held-out images on which the agreement is followed
SEED = 0


class Recovery:
    """The recovery of all folds of a compressed model.

    Args:
        model: The old model.
        output: The new model's folder; `.NAME.recovery` beside it holds the state after every epoch.
        settings: Length and optimiser.
        fitted_on, held_out: Images to learn on, and to follow the agreement on.
        device: Where networks run.
        progress: For bars and lines.
        made_with: More that the merged weights depend on, such as the goal; a state of other settings is not used.

    A context, in which no other process writes that state.

    Attributes:
        merged: The merged networks of an interrupted run, which need not be made again; else empty.

    Raises:
        ValueError: There are too few images.
    """

    def __init__(
        self, model: TrainedModel, output: Path, settings: RecoverySettings, fitted_on: Sequence[Case],
        held_out: Sequence[Case], device: torch.device, progress: Progress, made_with: Mapping,
    ):  # fmt: skip
        check_images(len(fitted_on), len(held_out))
        self.model, self.settings, self.device, self.progress = model, settings, device, progress
        self.fitted_on, self.held_out = fitted_on, held_out
        self.output, self.folder = output, recovery_folder(output)
        self._lock = contextlib.ExitStack()
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
        self._state: dict = {}
        self.merged: dict[str, Compressed] = {}

    def __enter__(self) -> Recovery:
        """Read the state of an interrupted run.

        Raises:
            FileExistsError: Another process is writing it.
            ValueError: It cannot be read here.
        """
        self.folder.mkdir(exist_ok=True)
        self._lock.enter_context(locked(self.folder, self.output))
        self._state = self._read()
        self.merged = self._state["merged"]
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # where nothing was written into it
        self._lock.close()

    def run(self, merged: Mapping[str, Compressed]) -> dict[str, Compressed]:
        """Recover every fold; folds and epochs of an interrupted run are not repeated.

        Args:
            merged: The merged networks.

        Returns:
            The same with recovered weights.
        """
        if not self.merged:
            for left in self.folder.iterdir():  # the folder itself is locked
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            self._state["merged"] = dict(merged)
            self._save()
        with self.progress.bar("preprocessing images to learn on", len(self.fitted_on)) as step:
            for name in store_images(self.model, self.fitted_on, self.folder / "images"):
                step(name)
        judged = batches(patches(self.model, self.held_out, JUDGED, SEED, more=False))
        for index, (fold, one) in enumerate(merged.items()):
            if fold not in self._state["done"]:
                self._state["done"][fold] = self._recover(index, fold, one, judged)
                self._state["running"] = None
                self._save()
        return {fold: replace(one, weights=self._state["done"][fold].weights) for fold, one in merged.items()}

    def notes(self, measured: Measured) -> dict:
        """For compression.json; `measured` is that of the recovered networks."""
        return {
            **asdict(self.settings),
            "batch_size": self.batch_size,
            "agreement_before": mean_score(measured.before_recovery or (), "dice").value,
            "agreement_after": mean_score(measured.agreement, "dice").value,
            "folds": {
                fold: {"epochs": len(one.loss), **{k: v for k, v in vars(one).items() if k != "weights"}}
                for fold, one in self._state["done"].items()
            },
        }

    def finish(self) -> None:
        """Remove the state, once the model is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _recover(self, index: int, fold: str, one: Compressed, judged: Sequence[torch.Tensor]) -> Recovered:
        checkpoint = self.model.checkpoints[fold]
        source = AugmentedPatches(
            self.model,
            [case.name for case in self.fitted_on],
            self.folder / "images",
            self.batch_size,
            checkpoint.get(MIRRORING, "nnunet"),
            SEED + index,
        )
        supervised = is_supervised(checkpoint)
        teacher = Teacher([self.model.network(fold)], regions=self.model.has_regions, supervised=supervised)
        teacher.start(self.device, deep_supervision=True)
        student = self.model.network(fold)
        student.load_state_dict(one.weights)

        def save(running: dict) -> None:
            self._state["running"] = {"fold": fold, **running}
            self._save()

        running = self._state["running"]
        running = running if running and running["fold"] == fold else None
        training = StudentTraining(student, teacher, self.settings, self.device, judged, running)
        return training.run(f"fold {fold}", source, self.progress, save)

    def _read(self) -> dict:
        begun = {"made_with": self._made_with, "merged": {}, "done": {}, "running": None}
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
        self.progress.say(f"Continuing from {self.folder}: {len(state['done'])} folds done, {epoch} epochs of the next")
        return state

    def _save(self) -> None:
        write_atomically(self.folder / "state.pth", lambda path: torch.save(self._state, path), AGAIN)


def recovery_folder(output: Path) -> Path:
    """Where the state of a recovery lies until its model is written."""
    return output.absolute().with_name(f".{output.name}.recovery")


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
