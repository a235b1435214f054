"""A compressed model trained on, at its own widths, with the model that it was made from as teacher."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from ..model.checkpoints import CHECKPOINT, COMPRESSION, MIRRORING, read_checkpoint
from ..model.networks import BUILT_BY, find_trainer, network_of_trainer, take_builder
from ..plugin.commands import train_command
from ..pruning import accept_pruned_weights, channel_layout, widths_of
from .distils import Distils, TeacherSource
from .resizing import ResizingTrainer, mirroring_of
from .settings import SETTINGS_FILE, TrainingSettings
from .start import Start, check_not_own, has_begun, start_path, why_it_does_not_fit

INITIAL_LR = 5e-3  # half of nnU-Net's
SERIES = "distillation"
SOURCE = "source"


@dataclass(frozen=True, kw_only=True)
class CompressedSettings:
    """The model to start from, the teacher, and whether to learn from labels.

    Attributes:
        start_from: The folder that `nnUNetv2_sauron compress` wrote (the same fold is taken), or a .pth file; None
            only to continue or to predict.
        teacher: "source" is the model that was compressed, if the checkpoint names one; a trained model's folder or a
            .pth file; None trains without.
        teacher_folds: Of a teacher's folder: "same" takes the fold that is trained, "all" the mean of the numbered
            ones, or fold all where it is alone. None: same.
        labels: False learns from the teacher alone; no label is looked at in training. None: True.

    A training that is continued keeps its teacher, its folds and its labels where these are left at their defaults.
    """

    start_from: str | None = None
    teacher: str | None = SOURCE
    teacher_folds: str | None = None
    labels: bool | None = None

    def __post_init__(self) -> None:
        if self.teacher_folds not in (None, "same", "all"):
            raise ValueError(f"teacher_folds is same or all; got '{self.teacher_folds}'.")
        if self.labels is False and self.teacher is None:
            raise ValueError("labels=False and teacher=None leave nothing to learn from; set one of them otherwise.")


class CompressedTrainer(Distils, ResizingTrainer):
    """nnU-Net's training from a compressed checkpoint: 50 epochs of the poly schedule from half of its rate.

    The distance to the teacher's output for the same batch is added to nnU-Net's loss (`methods/distillation.py`). The
    validation loss and, with labels, the logged training loss stay nnU-Net's own.

    It mirrors along the axes that the model was trained with, since left and right may be classes. Loss and the rest of
    the augmentation are nnU-Net's own, also where that model's trainer had others.

    nnunet_sauron="start_from=MODEL_FOLDER" nnUNetv2_train DATASET CONFIGURATION FOLD -tr CompressedTrainer

    Every epoch of nnU-Net's logger, and so every checkpoint, holds a record in the series "distillation": `teacher`,
    `teacher_checkpoint`, `teacher_folds`, `labels`, and `loss`, the mean distance to the teacher.

    Raises:
        FileNotFoundError, ValueError: The checkpoint or the teacher is missing, cannot be read, or is of another
            architecture, or the teacher of another data set or other classes.
    """

    MoreSettings = (CompressedSettings,)
    numbers = TrainingSettings(num_epochs=50, initial_lr=INITIAL_LR)

    def _prepare(self, plans: dict, configuration: str, fold: int | str, dataset_json: dict) -> None:
        super()._prepare(plans, configuration, fold, dataset_json)
        self._no_training: str | None = None
        self._unread: FileNotFoundError | None = None
        self._start: Start | None = None
        start_from = self.settings(CompressedSettings).start_from
        try:
            if start_from:
                path = start_path(start_from, fold)
                check_not_own("start_from", [path], type(self), plans, configuration, fold)
                self._start = Start(path, fold, plans["dataset_name"])
            beginning = self._start.checkpoint if self._start else {}
            self._choose_teacher(beginning.get(COMPRESSION, {}), {})
            self.read_teacher(plans, configuration, fold, dataset_json)
        except FileNotFoundError as error:
            if not has_begun(type(self), plans, configuration, fold):
                raise
            self._unread = error  # a training that is continued does not need it
        self.mirroring = mirroring_of(self._start.checkpoint if self._start else {})

    @staticmethod
    @functools.wraps(ResizingTrainer.build_network_architecture)
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        """The network of the trainer that the plans name, where the model that it started from had one of its own."""
        arguments = plans_manager, configuration_manager, num_input_channels, num_output_channels
        name = configuration_manager.configuration.get(BUILT_BY)
        if name is None:
            return ResizingTrainer.build_network_architecture(*arguments, enable_deep_supervision)
        try:
            trainer = find_trainer(name)
        except LookupError as error:
            raise RuntimeError(f"This model has the network of the trainer {name}. {error}") from error
        network = network_of_trainer(trainer, *arguments, deep_supervision=enable_deep_supervision)
        return accept_pruned_weights(network)

    def initialize(self) -> None:
        begins = self._start is not None and self._start.checkpoint is not None
        if begins:
            take_builder(self, self._start.checkpoint, self._start.builder)
        super().initialize()
        if begins:
            of_plans = sum(channel_layout(self.bare_network).widths.values())
            self.take_widths(self._widths(self._start.checkpoint, self._start.path))
            now = sum(channel_layout(self.bare_network).widths.values())
            self._size = f"{now} channels, where these plans' own network has {of_plans}"
            self._start.load_into(self.bare_network)

    def on_train_start(self) -> None:
        if self._no_training:
            raise ValueError(
                f"{self._no_training} was written by compress, so there is no training to continue. Move it away, or "
                f"train without --c, and let start_from name another folder than the training's own."
            )
        if self._unread and self.current_epoch == 0:
            raise self._unread
        if self._start is None and self.current_epoch == 0:
            names = self.plans_manager.dataset_name, self.configuration_name, self.fold, type(self).__name__
            settings, flags, file = "start_from=MODEL_FOLDER", [], Path(self.output_folder) / SETTINGS_FILE
            what = "Name the folder that compress wrote"
            if self.logger.resume and file.is_file():
                settings, flags = f"@{file}", ["--c"]
                what = "The training that was begun here has no checkpoint yet; give its settings again"
            again = train_command(*names, self.plans_manager.plans_name, *flags, settings=settings)
            raise ValueError(f"{names[-1]} has nothing to start from. {what}: {again}")
        if self.current_epoch == 0:
            self._start.check_unchanged(self.bare_network)
        if self._source is None and self._labels is False and self.current_epoch < self.num_epochs:
            raise ValueError(
                "labels=False without a teacher leaves nothing to learn from, and the checkpoint does not say which "
                "model it was compressed from. Name that model's folder: teacher=MODEL_FOLDER."
            )
        super().on_train_start()
        if self.current_epoch == 0:
            self.print_to_log_file(f"{type(self).__name__}: started from {self._start}")
            self._start.warn_of_fitted_cases(self)
            self.print_to_log_file(f"It has {self._size}; widths stay as they are")
            if self._source is None and self.settings(CompressedSettings).teacher == SOURCE:
                self.print_to_log_file(
                    "WARNING: there is no teacher, since compress did not write that model, or it does not say what it "
                    "was made from. Name one: teacher=MODEL_FOLDER"
                )

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        super().on_train_epoch_end(train_outputs)
        series = self.distillation()
        del series[self.current_epoch :]
        source = self._source or TeacherSource("")
        series.append({
            "teacher": source.path or None, "teacher_checkpoint": source.checkpoint, "teacher_folds": source.folds,
            "labels": self._labels, "loss": self.epoch_distance,
        })  # fmt: skip

    def on_epoch_end(self) -> None:
        distance = self.distillation()[self.current_epoch]["loss"]
        if distance is not None:
            self.print_to_log_file(f"distance to the teacher {distance:.4f}")
        super().on_epoch_end()

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        checkpoint = read_checkpoint(filename_or_checkpoint)
        is_of_training = "optimizer_state" in checkpoint  # else compress wrote it, with the log of its source
        if is_of_training:
            self._continue_with(checkpoint)
        if not self.was_initialized:
            take_builder(self, checkpoint)
            self.initialize()
        widths = self._widths(checkpoint, filename_or_checkpoint)
        self.check_plans(checkpoint, filename_or_checkpoint)
        self.take_widths(widths)
        self.mirroring = mirroring_of(checkpoint)
        if is_of_training:
            super().load_checkpoint(filename_or_checkpoint)
            series = self.distillation()
            series += [{} for _ in range(self.current_epoch - len(series))]  # a shorter one would cut nnU-Net's plot
            self._choose_teacher({}, series[-1] if series else {})
            self._teacher = None  # read once training starts: to validate, none is needed
        else:  # to be validated (--val)
            self._no_training = filename_or_checkpoint
            self.bare_network.load_state_dict(checkpoint["network_weights"])
            self.inference_allowed_mirroring_axes = self.mirroring.get(MIRRORING)

    def _choose_teacher(self, start: dict, before: dict) -> None:
        """By the settings, then by what a continued training was `before`, then by what its `start` was made from."""
        settings = self.settings(CompressedSettings)
        of_source = settings.teacher == SOURCE
        path, checkpoint = settings.teacher, CHECKPOINT
        if of_source:
            path = before.get("teacher", start.get("source"))
            checkpoint = before.get("teacher_checkpoint", start.get("source_checkpoint", CHECKPOINT))
        folds = settings.teacher_folds or before.get("teacher_folds", "same")
        self._source = TeacherSource(path, folds, checkpoint) if path else None
        self._labels = before.get("labels", True) if settings.labels is None else settings.labels

    def distillation(self) -> list[dict]:
        """A record per finished epoch."""
        return self.series().setdefault(SERIES, [])

    def _widths(self, checkpoint: dict, name: str | Path) -> dict[str, int]:
        widths = widths_of(self.bare_network, checkpoint["network_weights"])
        if widths is None:
            raise ValueError(f"{name} {why_it_does_not_fit(checkpoint, self.bare_network)}")
        return widths
