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
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import distributed, nn

from ..files import remove_leftovers
from ..methods.base import PruningMethod
from ..model.checkpoints import LATEST, PRUNING, logged, logged_settings, read_checkpoint
from ..model.history_plots import plot_pruning
from ..pruning import accepts_pruned_weights, channel_layout, widths_of
from .decision import decide, is_last_cut
from .log_lines import epoch_line, target_line
from .planned import PlannedNetwork
from .rate import RateAfterCuts
from .removal import remove
from .resizing import ResizingTrainer
from .settings import TrainingSettings
from .start import has_begun
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
    _last_regulariser: torch.Tensor | None = None
    _refused: Exception | None = None

    @classmethod
    def settings_classes(cls) -> tuple[type, ...]:
        """The dataclasses of all its settings."""
        return *super().settings_classes(), cls.Method.Settings

    def _take_settings(self, settings: tuple) -> None:
        super()._take_settings(settings)
        self.pruning_settings = self.settings(self.Method.Settings)

    def _prepare(self, plans: dict, configuration: str, fold: int | str, dataset_json: dict) -> None:
        super()._prepare(plans, configuration, fold, dataset_json)
        self.planned = PlannedNetwork(plans, configuration, dataset_json)
        self.given_widths: dict[str, int] | None = None
        self._plot = Throttled(self, self._plot_pruning)
        try:
            self.given_widths = self.planned.widths_in(getattr(self.pruning_settings, "widths_from", None))
            self.planned.check_merge_batches(self.pruning_settings)
            num_epochs = self.settings(TrainingSettings).num_epochs or self.numbers.num_epochs or NNUNET_EPOCHS
            method = self.Method.for_settings(self.pruning_settings, num_epochs)
            method.prepare(self.planned.layout, self.planned.cost, self.given_widths)
        except (FileNotFoundError, ValueError) as error:
            if not has_begun(type(self), plans, configuration, fold):
                raise
            self._refused = error  # a training that is continued takes the settings, and widths, of its checkpoint

    def history(self) -> list[dict]:
        """A record per finished epoch, in a series of nnU-Net's logger and so in every checkpoint.

        (No property: nnU-Net writes every property into debug.json.)

        Returns:
            For each epoch `widths` (channels per unit in that epoch), `parameters`, `macs`, `regulariser` (mean of the
            method's loss term), `state` (the method's), `keep` (the channels that are kept, of the units that are cut
            before the next epoch), `held` (why there is no cut, or None), `given_widths` (of the model that
            `widths_from` names), and, of a method with a target, `target`: its `name` and `value`, the fraction
            `asked` for, the fraction `left` after that cut, whether the target is `reached` (None while cuts go on),
            and `why` it is not, or None.
        """
        return self.series().setdefault(PRUNING, [])

    def initialize(self) -> None:
        super().initialize()
        if not accepts_pruned_weights(self.bare_network):
            raise ValueError(
                f"{type(self).__name__} builds its network without its base's build_network_architecture, so that no "
                f"pruned weights could be loaded into it. Call that one, with changed arguments."
            )
        self._dense_layout = channel_layout(self.bare_network)
        self.dense_widths = self._dense_layout.widths
        self.dense_cost = self.planned.cost.parameters(self.dense_widths), self.planned.cost.macs(self.dense_widths)
        self._make_method()
        # Here and not in _build_loss, which subclasses override to bring a loss of their own.
        self.loss = _RegularisedLoss(self.loss, self)

    def _do_i_compile(self) -> bool:
        # Every cut would throw compiled graphs away; compiling takes minutes.
        return "nnUNet_compile" in os.environ and super()._do_i_compile()

    def _settings_changed(self) -> None:
        self._make_method()
        super()._settings_changed()

    def _make_method(self) -> None:
        """For the dense network and the settings now."""
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
        for sentence in self._without_effect():
            self.print_to_log_file(f"WARNING: {sentence}.")
        if self.history():
            self.method.load_state(self.history()[-1]["state"])

    def _without_effect(self) -> list[str]:
        found, rate = self.pruning_settings.without_effect(), self.pruning_settings.rate_after_cuts
        if rate is not None and not isinstance(self.lr_scheduler, (PolyLRScheduler, RateAfterCuts)):
            scheduler = type(self.lr_scheduler).__name__
            found.append(f"rate_after_cuts={rate:g} has no effect beside {scheduler}, which is not nnU-Net's schedule")
        return found

    def on_epoch_start(self) -> None:
        # First, so that nnU-Net's time of an epoch leaves merging out; the log tells how long that took.
        if self.current_epoch > 0 and self.history()[self.current_epoch - 1]["keep"]:
            remove(self, self.history()[self.current_epoch - 1]["keep"])
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
            self.save_checkpoint(str(Path(self.output_folder) / LATEST))
        if self.local_rank == 0:
            self._plot()
        self.current_epoch += 1

    def _decide(self) -> dict:
        return decide(self)

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
        checkpoint = read_checkpoint(filename_or_checkpoint)
        history = logged(checkpoint).get(PRUNING)
        if history:
            self._refused = None
            self.given_widths = history[-1].get("given_widths") or self.planned.widths_in(
                logged_settings(checkpoint).get("widths_from")  # checkpoints did not hold the widths at first
            )
            self._continue_with(checkpoint)
        if not self.was_initialized:
            self.initialize()
        widths = widths_of(self.bare_network, checkpoint["network_weights"])
        if widths is None or history is None:
            raise ValueError(
                f"{filename_or_checkpoint} does not fit: it was made by {checkpoint.get('trainer_name')}, with a "
                f"network of other layers than {type(self).__name__} builds from these plans, or without a pruning "
                f"history. To start from the weights of another training, use -pretrained_weights."
            )
        self.check_plans(checkpoint, filename_or_checkpoint)
        self.take_widths(widths)
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
