"""The base of all trainers: settings that stay with a training, atomic checkpoints, snapshots of feature maps."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import TypeVar

import torch
from nnunetv2.training.logging import nnunet_logger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from ..files import remove_leftovers, write_atomically
from ..model.checkpoints import PRUNING, SETTINGS, logged_settings
from ..model.compiling import compiling_on_cuda_only
from .kept_settings import check_not_mixed, log_settings
from .settings import Given, TrainingSettings, write_settings
from .snapshots import Snapshots, SnapshotSettings
from .throttled import Throttled

CHANGEABLE = ("save_every", "snapshot_every", "num_val_iterations_per_epoch")
"""Settings of every trainer that may change when a training is continued."""
Kind = TypeVar("Kind")


class BaseTrainer(nnUNetTrainer):
    """The base of all trainers here: settings come from class attributes and the variable, and stay with the training.

    They are read and checked before nnU-Net's constructor, which writes a log. A series of nnU-Net's logger keeps them,
    an entry per finished epoch, and so does every checkpoint.

    Attributes:
        MoreSettings: Settings classes of the trainer's own; those of a subclass contain, or derive from, its base's.
            All of their fields may change when a training is continued, but for `start_from`.
        numbers: nnU-Net's own numbers for which the trainer has other defaults.

    Raises:
        OSError, ValueError: A setting is unknown or bad. Nothing is written then.
        RuntimeError: nnU-Net is too old.
    """

    MoreSettings: tuple[type, ...] = ()
    numbers = TrainingSettings()

    # nnU-Net reads this signature and stores these arguments: it must be exactly its own.
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):  # noqa: B008
        if not hasattr(nnunet_logger, "MetaLogger"):
            raise RuntimeError("This nnU-Net is too old for nnunet-sauron; 2.8 is needed: pip install -U nnunetv2")
        self._given = Given(type(self), *self.settings_classes())
        self._take_settings(self._given.settings())
        self._prepare(plans, configuration, fold, dataset_json)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.numbers.apply_to(self)
        self._apply_settings()
        self.kept_settings()  # a series that begins later would cut nnU-Net's progress plot short
        self.logger.plot_progress_png = Throttled(self, self.logger.plot_progress_png)

    @classmethod
    def settings_classes(cls) -> tuple[type, ...]:
        """The dataclasses of all its settings."""
        return TrainingSettings, SnapshotSettings, *cls.MoreSettings

    def _prepare(self, plans: dict, configuration: str, fold: int | str, dataset_json: dict) -> None:
        """Refuse what cannot be trained, and read the models to start from, before nnU-Net's constructor."""

    def settings(self, kind: type[Kind]) -> Kind:
        """Its settings of a class or of a subclass of it.

        Raises:
            ValueError: It has none.
        """
        for one in self._settings:
            if isinstance(one, kind):
                return one
        names = ", ".join(cls.__name__ for cls in self.settings_classes())
        raise ValueError(
            f"{type(self).__name__} has settings of {names}, and {kind.__name__} is none of them. Let its MoreSettings "
            f"begin with those of its base: MoreSettings = (*Base.MoreSettings, ...)"
        )

    def settings_now(self) -> dict:
        """All settings of this training, by name; of nnU-Net's own numbers those that it has now."""
        numbers = {field.name: getattr(self, field.name) for field in fields(TrainingSettings)}
        others = (one for one in self._settings if not isinstance(one, TrainingSettings))
        return numbers | {name: value for one in others for name, value in asdict(one).items()}

    def series(self) -> dict[str, list]:
        """All series of nnU-Net's logger, by name."""
        return self.logger.local_logger.my_fantastic_logging

    def kept_settings(self) -> list[dict]:
        """An entry per finished epoch."""
        return self.series().setdefault(SETTINGS, [])

    @property
    def bare_network(self) -> nn.Module:
        """The network without the wrappers of DDP and torch.compile."""
        network = self.network
        if isinstance(network, DistributedDataParallel):
            network = network.module
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    def initialize(self) -> None:
        self._given.enforce(self)
        super().initialize()

    def on_train_start(self) -> None:
        if self.local_rank == 0:
            remove_leftovers(Path(self.output_folder), "checkpoint_*.pth")
        super().on_train_start()
        settings = self.settings_now()
        check_not_mixed(self, settings)
        log_settings(self, settings, self._given)
        if self.local_rank == 0:
            write_settings(settings, Path(self.output_folder))
        self._snapshots.start()

    def on_epoch_end(self) -> None:
        entries, now = self.kept_settings(), self.settings_now()
        del entries[self.current_epoch :]
        entries.append(entries[-1] if entries[-1:] == [now] else now)  # a checkpoint then holds them once
        super().on_epoch_end()
        self._snapshots.after_epoch()

    def save_checkpoint(self, filename: str) -> None:
        if self.local_rank == 0 and not self.disable_checkpointing:
            write_atomically(Path(filename), super().save_checkpoint)
        else:
            super().save_checkpoint(filename)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        with compiling_on_cuda_only(self.device):
            super().perform_actual_validation(save_probabilities)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        super().load_checkpoint(filename_or_checkpoint)
        entries = self.kept_settings()  # at first the pruning history held them, or no series
        entries += [record.get(SETTINGS, {}) for record in self.series().get(PRUNING, [])[len(entries) :]]
        entries += [{} for _ in range(self.current_epoch - len(entries))]

    def _take_settings(self, settings: tuple) -> None:
        self._settings = settings

    def _apply_settings(self) -> None:
        self.settings(TrainingSettings).apply_to(self)
        self._snapshots = Snapshots(self, self.settings(SnapshotSettings))

    def _continue_with(self, checkpoint: dict) -> None:
        """Take the settings of the training that is continued, before the network is set up or loaded.

        Raises:
            ValueError: The environment gives another value for a setting that cannot change in a running training.
        """
        before = logged_settings(checkpoint)
        if not before:  # checkpoints did not hold them at first
            return
        had = self.settings_now()
        of_its_own = {field.name for settings in self.MoreSettings for field in fields(settings)} - {"start_from"}
        self._take_settings(self._given.continued(before, {*CHANGEABLE, *of_its_own}))
        self._apply_settings()
        if self.was_initialized and self.settings_now() != had:
            self._settings_changed()

    def _settings_changed(self) -> None:
        """Make anew what was made by other settings."""
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
