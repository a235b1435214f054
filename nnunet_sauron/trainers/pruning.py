"""The base of every pruning trainer: nnU-Net's training, with channels removed between epochs.

Channels are chosen after an epoch's validation (`decision.py`) and removed before the next epoch's first step
(`removal.py`). So a checkpoint holds the very network that was validated and the next cut, and a resumed training makes
the same cut.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.logging import nnunet_logger
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import distributed, nn

from ..files import remove_leftovers
from ..methods.base import PruningMethod
from ..model.checkpoints import PRUNING
from ..model.history_plots import plot_pruning
from ..model.snapshots import Snapshots, SnapshotSettings
from ..pruning import accepts_pruned_weights, channel_layout
from .continuing import take_over
from .decision import decide, is_last_cut
from .kept_settings import has_begun, settings_of, tell_settings
from .log_lines import epoch_line, target_line
from .planned import PlannedNetwork
from .rate import RateAfterCuts
from .removal import remove
from .resizing import ResizingTrainer, check_building
from .settings import Given, TrainingSettings
from .throttled import Throttled

NNUNET_EPOCHS = 1000  # nnU-Net's length of training, which its constructor sets


class PruningTrainer(ResizingTrainer):
    """Trains, removes channels, and predicts with the network that is left. A subclass need only name its `Method`.

    Attributes:
        pruning_settings: The method's.
        method: The method; from `initialize` on.
        planned: The dense network that the plans describe.
        given_widths: Of the model that `widths_from` names, or None.
        dense_widths, dense_cost: Channels per unit of the dense network; its parameters and multiply-accumulates.
        epoch_regulariser: Mean of the method's loss term in the last epoch.

    Raises:
        ValueError: A setting is unknown or bad, or the plans' network cannot be pruned. Nothing is written then.
    """

    Method: type[PruningMethod]
    MoreSettings: tuple[type, ...] = ()

    # nnU-Net reads this signature and stores these arguments: it must be exactly its own.
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):  # noqa: B008
        if not hasattr(nnunet_logger, "MetaLogger"):
            raise RuntimeError("This nnU-Net is too old for nnunet-sauron; 2.8 is needed: pip install -U nnunetv2")
        check_building(type(self))
        self._given = Given(type(self), *self.settings_classes())
        training, self.pruning_settings, snapshot_settings, *self._more_settings = self._given.settings()
        self.planned = PlannedNetwork(plans, configuration, dataset_json)
        self.given_widths: dict[str, int] | None = None
        self._refused: Exception | None = None
        try:
            self._check_settings(training.num_epochs or NNUNET_EPOCHS)
        except (FileNotFoundError, ValueError) as error:
            if not has_begun(type(self), plans, configuration, fold):
                raise
            self._refused = error  # a training that is continued takes the settings, and widths, of its checkpoint
        self._read_before_writing(plans, configuration, fold, dataset_json)
        super().__init__(plans, configuration, fold, dataset_json, device)
        training.apply_to(self)
        self.series().setdefault(PRUNING, [])
        self.logger.plot_progress_png = Throttled(self, self.logger.plot_progress_png)
        self._plot = Throttled(self, self._plot_pruning)
        self._snapshots = Snapshots(self, snapshot_settings)
        self._last_regulariser: torch.Tensor | None = None

    @classmethod
    def settings_classes(cls) -> tuple[type, ...]:
        """The dataclasses of all its settings."""
        return TrainingSettings, cls.Method.Settings, SnapshotSettings, *cls.MoreSettings

    def _check_settings(self, num_epochs: int) -> None:
        """Refuse settings that cannot be met before nnU-Net's constructor writes a log."""
        self.given_widths = self.planned.widths_in(getattr(self.pruning_settings, "widths_from", None))
        self.planned.check_merge_batches(self.pruning_settings)
        method = self.Method.for_settings(self.pruning_settings, num_epochs)
        method.prepare(self.planned.layout, self.planned.cost, self.given_widths)

    def _read_before_writing(self, plans: dict, configuration: str, fold: int | str, dataset_json: dict) -> None:
        """Read the models that a subclass starts from, before nnU-Net's constructor writes a log."""

    def history(self) -> list[dict]:
        """A record per finished epoch, in a series of nnU-Net's logger and so in every checkpoint.

        (No property: nnU-Net writes every property into debug.json.)

        Returns:
            For each epoch `widths` (channels per unit in that epoch), `parameters`, `macs`, `regulariser` (mean of the
            method's loss term), `state` (the method's), `keep` (the channels that are kept, of the units that are cut
            before the next epoch), `held` (why there is no cut, or None), `given_widths` (of the model that
            `widths_from` names), `settings`, and, of a method with a target, `target`: its `name` and `value`, the
            fraction `asked` for, the fraction `left` after that cut, whether the target is `reached` (None while cuts
            go on), and `why` it is not, or None.
        """
        return self.series()[PRUNING]

    def series(self) -> dict[str, list]:
        """All series of nnU-Net's logger, by name."""
        return self.logger.local_logger.my_fantastic_logging

    def settings_now(self) -> dict:
        """All settings of this training, by name."""
        return settings_of(self, self.pruning_settings, self._snapshots.settings, *self._more_settings)

    def initialize(self) -> None:
        self._given.enforce(self)
        super().initialize()
        if not accepts_pruned_weights(self.bare_network):
            raise ValueError(
                f"{type(self).__name__} builds its network without its base's build_network_architecture, so that no "
                f"pruned weights could be loaded into it. Call that one, with changed arguments."
            )
        self._dense_layout = channel_layout(self.bare_network)
        self.dense_widths = self._dense_layout.widths
        self.dense_cost = self.planned.cost.parameters(self.dense_widths), self.planned.cost.macs(self.dense_widths)
        self.make_method()
        # Here and not in _build_loss, which subclasses override to bring a loss of their own.
        self.loss = _RegularisedLoss(self.loss, self)

    def _do_i_compile(self) -> bool:
        # Every cut would throw compiled graphs away; compiling takes minutes.
        return "nnUNet_compile" in os.environ and super()._do_i_compile()

    def make_method(self) -> None:
        """Make the method, for the dense network and the settings now."""
        if self._refused:
            raise self._refused
        self.method = self.Method.for_settings(self.pruning_settings, self.num_epochs)
        self.method.prepare(self._dense_layout, self.planned.cost, self.given_widths)

    def on_train_start(self) -> None:
        if self.local_rank == 0:
            remove_leftovers(Path(self.output_folder), "pruning.png")
        super().on_train_start()
        self.method.attach(self.bare_network, channel_layout(self.bare_network))
        self.optimizer.register_step_pre_hook(lambda *_: self.method.before_update())
        tell_settings(self, self.settings_now(), self._given)
        for sentence in self._without_effect():
            self.print_to_log_file(f"WARNING: {sentence}.")
        if self.history():
            self.method.load_state(self.history()[-1]["state"])
        self._snapshots.start()

    def _without_effect(self) -> list[str]:
        found, rate = self.pruning_settings.without_effect(), self.pruning_settings.rate_after_cuts
        if rate is not None and not isinstance(self.lr_scheduler, (PolyLRScheduler, RateAfterCuts)):
            scheduler = type(self.lr_scheduler).__name__
            found.append(f"rate_after_cuts={rate:g} has no effect beside {scheduler}, which is not nnU-Net's schedule")
        return found

    def on_epoch_start(self) -> None:
        # First, so that nnU-Net's time of an epoch leaves merging out; the log tells how long that took.
        if self.current_epoch > 0 and self.history()[self.current_epoch - 1]["keep"]:
            self._remove(self.history()[self.current_epoch - 1]["keep"])
        super().on_epoch_start()

    def on_train_epoch_start(self) -> None:
        # Here and not in configure_optimizers, which subclasses override to bring an optimiser of their own.
        if isinstance(self.lr_scheduler, PolyLRScheduler):
            self.lr_scheduler = RateAfterCuts(self, self.optimizer, self.lr_scheduler)
        super().on_train_epoch_start()
        self.method.start_epoch(self.current_epoch, channel_layout(self.bare_network).widths)

    def train_step(self, batch: dict) -> dict:
        self.method.before_step()
        self._last_regulariser = None
        loss_scale = self.grad_scaler.get_scale() if self.grad_scaler is not None else 1.0  # a step may change it
        result = super().train_step(batch)
        self.method.after_step(loss_scale)
        term = 0.0 if self._last_regulariser is None else float(self._last_regulariser)
        # The logged loss stays nnU-Net's own, comparable with a stock training's and with the validation loss.
        return {**result, "loss": result["loss"] - term, "regulariser": np.asarray(term)}

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        terms = [float(output.pop("regulariser")) for output in train_outputs]
        if self.is_ddp:
            of_ranks: list = [None] * distributed.get_world_size()
            distributed.all_gather_object(of_ranks, terms)
            terms = [term for rank in of_ranks for term in rank]
        self.epoch_regulariser = float(np.mean(terms))
        super().on_train_epoch_end(train_outputs)

    def on_epoch_end(self) -> None:
        record = self._decide()
        if self.local_rank > 0:
            self.method.load_state(record["state"])  # rank 0 alone has it
        del self.history()[self.current_epoch :]
        for older in self.history()[-1:]:
            older["state"] = {k: v for k, v in older["state"].items() if k not in self.method.latest_only}
        self.history().append(record)
        self.print_to_log_file(epoch_line(record, self.dense_widths, self.dense_cost))
        if self.method.doubt and record["keep"]:
            self.print_to_log_file(f"WARNING: {self.method.doubt}.")
        in_phase = self.pruning_settings.may_cut_after(self.current_epoch, self.num_epochs)
        if "target" in record and in_phase and is_last_cut(self):
            self.print_to_log_file(target_line(record["target"]))
        super().on_epoch_end()

        # nnU-Net has counted the epoch already, and stores its counter plus one.
        self.current_epoch -= 1
        if record["keep"]:
            self.save_checkpoint(str(Path(self.output_folder) / "checkpoint_latest.pth"))
        if self.local_rank == 0:
            self._plot()
        self.current_epoch += 1
        self._snapshots.after_epoch()  # this epoch's network still: its cut is made before the next one

    def _decide(self) -> dict:
        return decide(self)

    def _remove(self, keep: dict[str, list[int]]) -> None:
        remove(self, keep)

    def _plot_pruning(self) -> None:
        try:
            path = Path(self.output_folder) / "pruning.png"
            plot_pruning(self.series(), self.dense_widths, self.dense_cost, path)
        except OSError as error:  # a picture is no reason to end a training
            self.print_to_log_file(f"WARNING: {error}")

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Take over a checkpoint's settings, widths, weights, optimiser state and history.

        Raises:
            FileNotFoundError, ValueError: There is none, it cannot be read, or it is of another architecture.
        """
        take_over(self, filename_or_checkpoint)
        super().load_checkpoint(filename_or_checkpoint)


class _RegularisedLoss(nn.Module):
    """nnU-Net's loss plus the method's term after a forward in training mode."""

    def __init__(self, loss: nn.Module, trainer: PruningTrainer):
        super().__init__()
        self.loss = loss
        self._trainer = [trainer]  # in a list, so that PyTorch does not count the trainer's modules among the loss's

    def forward(self, output, target) -> torch.Tensor:
        loss = self.loss(output, target)
        term = self._trainer[0].method.regulariser()
        if term is None:
            return loss
        self._trainer[0]._last_regulariser = term.detach()
        return loss + term
