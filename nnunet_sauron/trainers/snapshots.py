"""Pooled feature maps of a few fixed validation patches, kept while a network trains: `fold_X/feature_maps/`.

nnunet_sauron="snapshot_every=10" nnUNetv2_train DATASET CONFIGURATION FOLD -tr SauronTrainer
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..files import remove_leftovers, write_atomically
from ..model.snapshots import FOLDER, MAX_PATCHES, pooled_maps, snapshots
from ..pruning import channel_layout
from ..pruning.eval_mode import mixed_precision

PATCHES = "patches.npz"


@dataclass(frozen=True, kw_only=True)
class SnapshotSettings:
    """What to keep of the feature maps while training.

    Attributes:
        snapshot_every: Epochs between two snapshots; None keeps none.
    """

    snapshot_every: int | None = None

    def __post_init__(self) -> None:
        if self.snapshot_every is not None and self.snapshot_every < 1:
            raise ValueError(f"snapshot_every must be at least 1; got {self.snapshot_every}.")


class Snapshots:
    """Writes a training's snapshots, from its own `on_train_start` and `on_epoch_end`.

    One before the first epoch, one after every `snapshot_every`-th and one after the last: `epoch_0010.npz` is of the
    network after 10 epochs. A file holds an array (patches, channels, *pooled), float16, for each channel unit, by its
    name. With nnU-Net's default widths and 4 patches that is 4.2 MB in 2D (8 stages, 32..512) and 2.1 MB in 3D (6
    stages, 32..320), nearly the same for any patch size, and less as channels go; a training of 1000 epochs with
    `snapshot_every=10` keeps 101 of them.

    The patches are drawn once from the validation data and lie beside, so that they stay the same when a training is
    continued. Snapshots take nothing else from the training: no random number, no gradient, no statistic.

    Args:
        trainer: One of ours, with `bare_network`.
        settings: How often.
    """

    def __init__(self, trainer, settings: SnapshotSettings):
        self._trainer, self._every = trainer, settings.snapshot_every
        self._data: torch.Tensor | None = None

    def start(self) -> None:
        """Remove the snapshots of an earlier training, get the patches, and take the first snapshot.

        Call it once the network is set up and, when a training is continued, loaded.
        """
        if self._trainer.local_rank > 0:
            return
        self._forget_the_future()
        if self._every is None:
            return
        try:
            channel_layout(self._trainer.bare_network)
        except ValueError as error:
            self._log(f"snapshot_every={self._every} has no effect, this network's layers are not known: {error}")
            return
        try:
            self._data = self._patches()
        except OSError as error:
            self._log(f"WARNING: no feature maps are kept: {error}")
            return
        epochs = "epoch" if self._every == 1 else f"{self._every} epochs"
        self._log(f"Feature maps of {len(self._data)} validation patches are kept every {epochs} in {self._folder}")
        # A continued training may have ended between its checkpoint and its snapshot.
        if self._is_due() and not self._path().exists():
            self._take()

    def after_epoch(self) -> None:
        """Take a snapshot if one is due; when nnU-Net has counted the epoch."""
        if self._data is not None and self._is_due():
            self._take()

    @property
    def _folder(self) -> Path:
        return Path(self._trainer.output_folder) / FOLDER

    def _path(self) -> Path:
        return self._folder / f"epoch_{self._trainer.current_epoch:04d}.npz"

    def _is_due(self) -> bool:
        done = self._trainer.current_epoch
        return done % self._every == 0 or done == self._trainer.num_epochs

    def _forget_the_future(self) -> None:
        """Snapshots of epochs that this training has not reached are another one's, whose checkpoints go, too."""
        done = self._trainer.current_epoch
        outdated = [path for epoch, path in snapshots(self._folder).items() if epoch > done or done == 0]
        outdated += [self._folder / PATCHES] if done == 0 else []
        try:
            for path in outdated:
                path.unlink(missing_ok=True)
            remove_leftovers(self._folder, "*.npz")
        except OSError as error:
            self._log(f"WARNING: snapshots of an earlier training stay: {error}")

    def _patches(self) -> torch.Tensor:
        path = self._folder / PATCHES
        try:
            with np.load(path) as file:
                return torch.from_numpy(file["data"])
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            self._log(f"WARNING: {path} cannot be read ({error}): other patches from here on")
        data = next(self._trainer.dataloader_val)["data"][:MAX_PATCHES].cpu()
        self._write(path, {"data": data.numpy()})
        return data

    def _take(self) -> None:
        try:
            self._write(self._path(), self._maps())
        except OSError as error:  # a snapshot is no reason to end a training
            self._log(f"WARNING: {error}")

    def _maps(self) -> dict[str, np.ndarray]:
        device = self._trainer.device
        with mixed_precision(device):
            return pooled_maps(self._trainer.bare_network, self._data.to(device))

    def _write(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        def write(target: str) -> None:
            with open(target, "wb") as file:  # given a name, numpy would append .npz to it
                np.savez(file, **arrays)

        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, write)

    def _log(self, line: str) -> None:
        self._trainer.print_to_log_file(line)
