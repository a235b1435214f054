"""ShrinkTrainer: trains from scratch, or from a trained model, which is its teacher then."""

from __future__ import annotations

from dataclasses import dataclass

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from ..methods.shrink import Shrink
from ..model.architecture import network_of_plans
from ..model.checkpoints import COMPRESSION, MIRRORING
from ..model.networks import builds_what_plans_say
from ..pruning import widths_of
from .distils import Distils, TeacherSource
from .pruning import PruningTrainer
from .resizing import mirroring_of
from .start import Start, check_not_own, has_begun, start_path, why_it_does_not_fit

START = "start"


@dataclass(frozen=True, kw_only=True)
class StartSettings:
    """The model to start from, and the teacher.

    Attributes:
        start_from: A trained model's folder, of which the same fold is taken, or one of its .pth files; None: from
            scratch.
        teacher: "start" for the model that the training starts from, if it starts from one; or a trained model's
            folder or .pth file; None for no teacher. A training that is continued keeps its teacher at the default.
    """

    start_from: str | None = None
    teacher: str | None = START


class ShrinkTrainer(Distils, PruningTrainer):
    """Removes the channels that the output misses least and merges them into the others, to a tenth of the MACs.

    Started from a trained model, it learns from that model beside the labels (`methods/distillation.py`), and mirrors
    along the axes that the model was trained with:

    nnunet_sauron="start_from=MODEL_FOLDER,num_epochs=50" nnUNetv2_train DATASET CONFIGURATION FOLD -tr ShrinkTrainer

    Raises:
        FileNotFoundError, ValueError: The model to start from or the teacher is missing, cannot be read, or is of
            another architecture, data set or other classes. Nothing is written then.
    """

    Method = Shrink
    MoreSettings = (StartSettings,)

    def _prepare(self, plans: dict, configuration: str, fold: int | str, dataset_json: dict) -> None:
        super()._prepare(plans, configuration, fold, dataset_json)
        settings = self.settings(StartSettings)
        path = start_path(settings.start_from, fold) if settings.start_from else None
        check_not_own("start_from", [path] if path else [], type(self), plans, configuration, fold)
        self._start: Start | None = None
        try:
            self._start = Start(path, fold, plans["dataset_name"]) if path else None
        except FileNotFoundError as error:
            if not has_begun(type(self), plans, configuration, fold):
                raise
            self._refused = error  # a training that is continued does not need it
        teacher = settings.teacher
        if teacher == START:
            teacher = str(path) if path else None
        self._source = TeacherSource(teacher) if teacher else None
        self.mirroring = {}
        if self._start:
            self.mirroring = mirroring_of(self._start.checkpoint)
            self._larger_source = self._start.checkpoint.get(COMPRESSION, {}).get("source")
            self._check_builder()
            network = network_of_plans(PlansManager(plans), configuration, dataset_json)
            self._start_widths = widths_of(network, self._start.checkpoint["network_weights"])
            if self._start_widths is None:
                raise ValueError(f"start_from={path} {why_it_does_not_fit(self._start.checkpoint, network)}")
        if self._refused:
            return
        try:
            self.read_teacher(plans, configuration, fold, dataset_json)
        except FileNotFoundError:
            if not has_begun(type(self), plans, configuration, fold):
                raise  # else it is read when the training is continued

    def _check_builder(self) -> None:
        builder = self._start.builder
        if builder and builder.differs and builds_what_plans_say(type(self)):  # a subclass may build that network
            raise ValueError(
                f"start_from={self._start.path} has the network of its trainer {builder.trainer_name}, which differs "
                f"from its plans' network (in an activation, a norm's eps, ...), but {type(self).__name__} builds the "
                f"plans' network. Make that model smaller with `nnUNetv2_sauron compress`, or start from scratch."
            )

    def initialize(self) -> None:
        super().initialize()
        if self._start and self._start.checkpoint is not None:
            self.take_widths(self._start_widths)
            self._start.load_into(self.bare_network)

    def on_train_start(self) -> None:
        if not self.was_initialized:
            self.initialize()
        if self._start and self.current_epoch == 0:
            self._start.check_unchanged(self.bare_network)
        super().on_train_start()
        if self._start and self.current_epoch == 0:
            self.print_to_log_file(f"Started from {self._start}")
            self._start.warn_of_fitted_cases(self)
            if self._larger_source and self.settings(StartSettings).teacher == START:
                self.print_to_log_file(
                    f"WARNING: that model, which is the teacher, was itself compressed. The better teacher is what it "
                    f"was made from: teacher={self._larger_source}"
                )
            if self._start_widths != self.dense_widths:
                self._tell_size_of_start()

    def _tell_size_of_start(self) -> None:
        part = self.planned.cost.macs(self._start_widths) / self.dense_cost[1]
        name, asked, left = self.method.target()
        self.print_to_log_file(
            f"It has {part:.0%} of the multiply-accumulates of these plans' own network, of which {name} is a fraction"
        )
        if name != "target_latency" and left(self._start_widths) <= asked:
            self.print_to_log_file(f"WARNING: it is no larger than {name}={asked:g} asks for: nothing will be cut.")

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        super().load_checkpoint(filename_or_checkpoint)
        self.mirroring = {MIRRORING: self.inference_allowed_mirroring_axes}
        teacher = self.settings(StartSettings).teacher
        if teacher == START:
            teacher = self.history()[-1].get("teacher") if self.history() else None
        source = TeacherSource(teacher) if teacher else None
        if source != self._source:
            self._source, self._teacher = source, None

    def _decide(self) -> dict:
        return {**super()._decide(), "teacher": self._source and self._source.path}
