"""The base of every pruning trainer: nnU-Net's training, with channels removed between epochs.

What goes is decided after an epoch's validation and removed before the next epoch's first step. So a checkpoint holds
the very network that was validated and what is to go next, and a resumed run removes the same channels.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.logging import nnunet_logger
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import distributed, nn

from ..files import TEMPORARY
from ..methods.base import PruningMethod, TrainingState, steps
from ..methods.ranks import decided_on_one_rank
from ..methods.targets import MEASURED
from ..model.architecture import network_of_plans
from ..model.checkpoints import read_checkpoint
from ..model.history import SERIES, plot_pruning
from ..model.snapshots import Snapshots, SnapshotSettings
from ..pruning import (
    CostModel,
    channel_layout,
    feature_map_voxels,
    merge_channels,
    position_weights,
    remove_channels,
    widths_of,
)
from ..pruning.channels import ChannelLayout, check_prunable
from ..pruning.moments import LEAST_SAMPLES_PER_CHANNEL, SAMPLES_PER_CHANNEL, patches_needed
from .kept_settings import changeable, has_begun, tell_settings
from .plots import Throttled
from .resizing import ResizingTrainer
from .settings import Given, TrainingSettings

NNUNET_EPOCHS = 1000  # nnU-Net's length of training, which its constructor sets
MERGE_BATCHES = 6


class PruningTrainer(ResizingTrainer):
    """Trains, removes channels, and predicts with what is left. A subclass names its `Method`, and that is all.

    The history (`self.history()`) is a series of nnU-Net's logger, so every checkpoint holds it: a dict per epoch with
    `widths` (channels per unit in that epoch), `parameters`, `macs`, `regulariser` (mean of the method's loss term),
    `state` (the method's), `keep` (channels that stay, for the units that are cut before the next epoch), `held` (why
    nothing may go, or None), `target` (of a method that has one: its `name` and `value`, the part `asked` for, the part
    `left` after what `keep` leaves, whether that has `reached` it (None while cuts go on), and `why` it has not, or
    None), `given_widths` (of the model that `widths_from` names) and `settings`.

    Raises:
        ValueError: A setting is unknown or bad, or the plans' network cannot be pruned. Nothing is written then.
    """

    Method: type[PruningMethod]
    MoreSettings: tuple[type, ...] = ()

    # nnU-Net reads this signature and stores these arguments: it must be exactly its own.
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):  # noqa: B008
        if not hasattr(nnunet_logger, "MetaLogger"):
            raise RuntimeError("This nnU-Net is too old for nnunet-sauron; 2.8 is needed: pip install -U nnunetv2")
        self._given = Given(type(self), TrainingSettings, self.Method.Settings, SnapshotSettings, *self.MoreSettings)
        training, self.pruning_settings, snapshot_settings, *self._more_settings = self._given.settings()
        self._check_target(plans, configuration, fold, dataset_json, training.num_epochs or NNUNET_EPOCHS)
        self._read_before_writing(plans, configuration, fold, dataset_json)
        super().__init__(plans, configuration, fold, dataset_json, device)
        training.apply_to(self)
        self._series().setdefault(SERIES, [])
        self._steps_done = 0
        self.logger.plot_progress_png = Throttled(self, self.logger.plot_progress_png)
        self._plot = Throttled(self, self._plot_pruning)
        self._snapshots = Snapshots(self, snapshot_settings)
        self._last_regulariser: torch.Tensor | None = None

    def _check_target(
        self, plans: dict, configuration: str, fold: int | str, dataset_json: dict, num_epochs: int
    ) -> None:
        """Refuse what cannot be done before nnU-Net's constructor writes a log, on a network without memory."""
        manager = PlansManager(plans)
        chosen = manager.get_configuration(configuration)
        check_prunable(chosen.network_arch_class_name)
        network, channels = network_of_plans(manager, configuration, dataset_json)
        self._cost = CostModel(network, chosen.patch_size, channels)
        self._positions = feature_map_voxels(network, chosen.patch_size, channels)
        layout = channel_layout(network)
        self._given_widths: dict[str, int] | None = None
        self._refused: Exception | None = None
        try:
            self._given_widths = self._read_given_widths(network)
            self._check_merge_batches(layout.widths, chosen.batch_size)
            self.Method(self.pruning_settings, num_epochs).prepare(layout, self._cost, self._given_widths)
        except (FileNotFoundError, ValueError) as error:
            if not has_begun(type(self), plans, configuration, fold):
                raise
            # One that is continued takes the settings, and the widths, of its checkpoint.
            self._refused = error

    def _read_given_widths(self, network: nn.Module) -> dict[str, int] | None:
        path = getattr(self.pruning_settings, "widths_from", None)
        return widths_of(network, read_checkpoint(path)["network_weights"]) if path else None

    def _read_before_writing(self, plans: dict, configuration: str, fold: int | str, dataset_json: dict) -> None:
        """Read what a subclass starts from, before nnU-Net's constructor writes a log."""

    def _check_merge_batches(self, widths: dict[str, int], batch_size: int) -> None:
        batches = self.pruning_settings.merge_batches
        if distributed.is_initialized():  # nnU-Net shares a batch out among the ranks, and each fits on its own part
            batch_size = max(1, batch_size // distributed.get_world_size())
        least = -(-patches_needed(self._positions, widths, LEAST_SAMPLES_PER_CHANNEL) // batch_size)
        if self.pruning_settings.merge and batches is not None and batches < least:
            raise ValueError(
                f"merge_batches={batches} of {batch_size} patches are too few for a stable fit of these layers; take "
                f"at least {least}, or None, which takes enough."
            )

    # The network

    def history(self) -> list[dict]:
        """A record per finished epoch. (No property: nnU-Net writes every property into debug.json.)"""
        return self._series()[SERIES]

    def _series(self) -> dict[str, list]:
        return self.logger.local_logger.my_fantastic_logging

    def initialize(self) -> None:
        super().initialize()
        layout = channel_layout(self.bare_network)
        self.dense_widths = layout.widths
        self.dense_cost = self._cost.parameters(self.dense_widths), self._cost.macs(self.dense_widths)
        self._make_method(layout)
        # Here and not in _build_loss, which is what subclasses override to bring a loss of their own.
        self.loss = _RegularisedLoss(self.loss, self)

    def _do_i_compile(self) -> bool:
        # Every cut would throw compiled graphs away; compiling takes minutes.
        return "nnUNet_compile" in os.environ and super()._do_i_compile()

    def _make_method(self, layout: ChannelLayout) -> None:
        if self._refused:
            raise self._refused
        self.method = self.Method(self.pruning_settings, self.num_epochs)
        self.method.prepare(layout, self._cost, self._given_widths)

    # The training

    def on_train_start(self) -> None:
        if self.local_rank == 0:
            for pattern in ("checkpoint_*.pth", "pruning.png"):
                for leftover in Path(self.output_folder).glob(pattern + TEMPORARY):
                    leftover.unlink()
        super().on_train_start()
        self.method.attach(self.bare_network, channel_layout(self.bare_network))
        self.optimizer.register_step_pre_hook(lambda *_: self.method.before_update())
        tell_settings(self, self._settings(), self._given)
        for sentence in self.pruning_settings.without_effect():
            self.print_to_log_file(f"WARNING: {sentence}.")
        if self.history():
            self.method.load_state(self.history()[-1]["state"])
        self._snapshots.start()

    def _settings(self) -> dict:
        training = {name: getattr(self, name) for name in asdict(TrainingSettings())}
        more = {name: value for settings in self._more_settings for name, value in asdict(settings).items()}
        return {**asdict(self.pruning_settings), **training, **asdict(self._snapshots.settings), **more}

    def on_epoch_start(self) -> None:
        # First, so that an epoch's time is its training's; the log tells what a merge took.
        if self.current_epoch > 0 and self.history()[self.current_epoch - 1]["keep"]:
            self._remove(self.history()[self.current_epoch - 1]["keep"])
        super().on_epoch_start()

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._steps_done = 0
        self.method.start_epoch(self.current_epoch, channel_layout(self.bare_network).widths)

    def train_step(self, batch: dict) -> dict:
        self.method.before_step(self.num_iterations_per_epoch - self._steps_done)
        self._steps_done += 1
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
        self._epoch_regulariser = float(np.mean(terms))
        self.method.end_epoch()
        super().on_train_epoch_end(train_outputs)

    def on_epoch_end(self) -> None:
        record = decided_on_one_rank(self._decided)
        if self.local_rank > 0:
            self.method.load_state(record["state"])  # what rank 0 decided with is known to it alone
        del self.history()[self.current_epoch :]
        for older in self.history()[-1:]:
            older["state"] = {k: v for k, v in older["state"].items() if k not in self.method.latest_only}
        self.history().append(record)
        self.print_to_log_file(self._report(record))
        if (
            "target" in record
            and self._is_last_chance()
            and self.pruning_settings.may_cut_after(self.current_epoch, self.num_epochs)
        ):
            self.print_to_log_file(_of_target(record["target"]))
        super().on_epoch_end()

        # nnU-Net has counted the epoch already, and stores its counter plus one.
        self.current_epoch -= 1
        if record["keep"]:
            self.save_checkpoint(str(Path(self.output_folder) / "checkpoint_latest.pth"))
        if self.local_rank == 0:
            self._plot()
        self.current_epoch += 1
        self._snapshots.after_epoch()  # what this epoch decided goes before the next one: still this epoch's network

    def _plot_pruning(self) -> None:
        try:
            path = Path(self.output_folder) / "pruning.png"
            plot_pruning(self._series(), self.dense_widths, self.dense_cost, path)
        except OSError as error:  # a picture is no reason to end a training
            self.print_to_log_file(f"WARNING: {error}")

    def _decided(self) -> dict:
        """This epoch's record, with what goes before the next one."""
        now = channel_layout(self.bare_network).widths
        # The same strings, and the same settings, in every record: a checkpoint then holds them once, not per epoch.
        widths = {name: now[name] for name in self.dense_widths}
        settings = self._settings()
        for before in self.history()[: self.current_epoch][-1:]:
            settings = before["settings"] if before["settings"] == settings else settings
        record = {
            "widths": widths,
            "parameters": self._cost.parameters(widths),
            "macs": self._cost.macs(widths),
            "regulariser": self._epoch_regulariser,
            "keep": {},
            "held": self._reason_to_hold(),
            "settings": settings,
        }
        if record["held"] is None:
            history = [*self.history()[: self.current_epoch], record]
            losses = self._series()["train_losses"]
            progress = TrainingState(
                [loss + epoch["regulariser"] for loss, epoch in zip(losses, history, strict=True)],
                list(self._series()["val_losses"]),
                {name: [epoch["widths"][name] for epoch in history] for name in widths},
                self._training_patches,
                self.label_manager.has_regions,
                self._is_last_chance(),
                self.optimizer.param_groups[0]["lr"] / self.initial_lr if self.initial_lr else 1.0,
            )
            record["keep"] = self.method.keep(progress)
        if self._given_widths:
            record["given_widths"] = self._given_widths
        if target := self.method.target():
            kept = {unit: len(record["keep"].get(unit, range(width))) for unit, width in widths.items()}
            record["target"] = self._target_record(*target, kept, record["held"])
        record["state"] = self.method.state()
        return record

    def _target_record(self, name: str, asked: float, left: Callable, kept: dict[str, int], held: str | None) -> dict:
        value = getattr(self.pruning_settings, name, None)
        part = left(kept)
        reached, why = part <= asked + 1e-9, None
        if not reached and self.current_epoch < self._last_cut():
            reached, why = None, f"cuts go on until epoch {self._last_cut()}"
        elif not reached and self.current_epoch == self._last_cut():
            why = held or self.method.why_missed() or "the last cut did not lead so far"
        elif not reached:
            why = self.history()[self.current_epoch - 1].get("target", {}).get("why")
        # A method's default target stands in no setting.
        value = asked if value is None else value
        return {"name": name, "value": value, "asked": asked, "left": part, "reached": reached, "why": why}

    def _training_patches(self, least: int) -> list[torch.Tensor]:
        """Batches of training data with at least so many patches together, or fewer where some are not finite."""
        batches = [next(self.dataloader_train)["data"]]
        batches += [next(self.dataloader_train)["data"] for _ in range(-(-least // len(batches[0])) - 1)]
        finite = [batch for batch in batches if batch.isfinite().all()]
        if len(finite) < len(batches):
            self.print_to_log_file(
                f"WARNING: {len(batches) - len(finite)} of {len(batches)} batches hold values that are not finite, and "
                f"nothing is measured on them. Look for nan in the preprocessed images."
            )
        return finite

    def _is_last_chance(self) -> bool:
        """Whether this epoch's cut is the last one, and so must meet a target even if it would be held."""
        return not self.pruning_settings.may_cut_after(self.current_epoch + 1, self.num_epochs)

    def _last_cut(self) -> int:
        """The last epoch after which channels may go. (Only for a method with a target: else there may be none.)"""
        return steps(self.pruning_settings, self.num_epochs)[-1]

    def _reason_to_hold(self) -> str | None:
        settings = self.pruning_settings
        if not settings.may_cut_after(self.current_epoch, self.num_epochs):
            return "outside of the cutting phase"
        if reason := self.method.reason_to_hold():
            return reason
        if settings.max_loss_increase is None or (self.method.has_schedule() and self._is_last_chance()):
            return None
        losses = self._series()["train_losses"]
        lowest = min((loss for loss in losses if math.isfinite(loss)), default=-math.inf)
        if not losses[-1] <= lowest + settings.max_loss_increase:  # put so that a loss of nan holds, too
            return (
                f"training loss {losses[-1]:.3f} is more than {settings.max_loss_increase:g} above its lowest, "
                f"{lowest:.3f}"
            )
        return None

    def _report(self, record: dict) -> str:
        parameters, macs = self.dense_cost
        left, dense = sum(record["widths"].values()), sum(self.dense_widths.values())
        line = (
            f"{left} of {dense} channels, {record['parameters'] / 1e6:.3g} of {parameters / 1e6:.3g} M parameters "
            f"({record['parameters'] / parameters:.0%}), {record['macs'] / 1e9:.3g} of {macs / 1e9:.3g} GMACs "
            f"({record['macs'] / macs:.0%})"
        )
        going = {name: record["widths"][name] - len(kept) for name, kept in record["keep"].items()}
        if going:
            most = sorted(going, key=going.get, reverse=True)
            named = ", ".join(f"{name} -{going[name]}" for name in most[:3])
            more = f" and {len(most) - 3} more layers" if len(most) > 3 else ""
            return f"{line}; before the next epoch {sum(going.values())} channels go: {named}{more}"
        return f"{line}; nothing goes" + (f": {record['held']}" if record["held"] else "")

    def _remove(self, keep: dict[str, list[int]]) -> None:
        network = self.bare_network
        self._unwrap()
        self.method.before_removal(keep)
        if self.pruning_settings.merge:
            self._merge(network, keep)
        widths = channel_layout(network).widths
        not_merged = {name: kept for name, kept in keep.items() if len(kept) < widths[name]}
        remove_channels(network, not_merged, self.optimizer)
        self._wrap()
        torch._dynamo.reset()  # past 8 recompilations torch.compile would fall back to eager for good
        empty_cache(self.device)

    def _merge(self, network: nn.Module, keep: dict[str, list[int]]) -> None:
        """Merge what goes as far as a fit can be had; a part may be left as it is.

        Every rank fits on patches of its own; wrapping again spreads rank 0's weights.
        """
        if self.device.type == "mps":
            self.print_to_log_file("WARNING: dropped, not merged: a fit needs float64, which MPS does not have")
            return
        wanted = patches_needed(self._positions, channel_layout(network).widths, SAMPLES_PER_CHANNEL)
        count = self.pruning_settings.merge_batches or max(MERGE_BATCHES, -(-wanted // self.batch_size))
        batches = self._training_patches(count * self.batch_size)
        if not batches:
            self.print_to_log_file("WARNING: dropped, not merged: there is nothing to fit on")
            return
        begun = time.perf_counter()
        try:
            weights = position_weights(network, batches, regions=self.label_manager.has_regions)
            merge_channels(network, keep, batches, weights=weights, optimizer=self.optimizer)
        except (RuntimeError, MemoryError) as error:  # of memory, in the forms it has, or of the linear algebra
            self.print_to_log_file(f"WARNING: dropped, not merged, since the fit failed: {error}")
            return
        seconds = time.perf_counter() - begun
        self.print_to_log_file(f"Merged the removed channels, fitted on {len(batches)} batches, in {seconds:.1f} s")

    # Checkpoints

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Take over a checkpoint's widths, weights, optimiser state and history.

        Raises:
            FileNotFoundError, ValueError: There is none, it cannot be read, or it is of another architecture.
        """
        checkpoint = read_checkpoint(filename_or_checkpoint)
        self._continue_with(checkpoint.get("logging", {}).get(SERIES) or [])
        if not self.was_initialized:
            self.initialize()
        network = self.bare_network
        widths = widths_of(network, checkpoint["network_weights"])
        if widths is None or SERIES not in checkpoint.get("logging", {}):
            raise ValueError(
                f"{filename_or_checkpoint} does not fit: it was made by {checkpoint.get('trainer_name')}, with a "
                f"network of other layers than {type(self).__name__} builds from these plans, or without a pruning "
                f"history. To begin with weights of another training, use -pretrained_weights."
            )
        self.take_widths(widths)
        super().load_checkpoint(filename_or_checkpoint)

    def _continue_with(self, history: list[dict]) -> None:
        """Take the settings of the training that is continued."""
        if not history:
            return
        before, had = history[-1]["settings"], self._settings()
        training, self.pruning_settings, snapshots, *self._more_settings = self._given.continued(
            before, changeable(self.MoreSettings)
        )
        training.apply_to(self)
        self._snapshots = Snapshots(self, snapshots)
        if getattr(self.pruning_settings, "widths_from", None):
            self._given_widths = history[-1].get("given_widths")
            if self._given_widths is None:  # of a time when checkpoints did not hold them
                network, _ = network_of_plans(self.plans_manager, self.configuration_name, self.dataset_json)
                self._given_widths = self._read_given_widths(network)
        self._refused = None
        if self.was_initialized and self._settings() != had:  # with what the environment gave
            network = self.bare_network
            widths = channel_layout(network).widths
            self.take_widths(self.dense_widths)
            self._make_method(channel_layout(network))
            self.take_widths(widths)
            self.optimizer, self.lr_scheduler = self.configure_optimizers()


def _of_target(target: dict) -> str:
    """The end of the cutting phase in a line: what was asked for, and what it came to."""
    of_what = MEASURED.get(target["name"], "channels")
    line = f"{target['left']:.4g} of the {of_what} is left, {target['asked']:.4g} was asked for"
    named = f"{target['name']}={target['value']}"
    if target["reached"]:
        return f"Target {named} met: {line}."
    return f"WARNING: target {named} missed: {line}, and no more cuts follow: {target['why']}."


class _RegularisedLoss(nn.Module):
    """nnU-Net's loss plus what the method adds after a forward in training mode."""

    def __init__(self, loss: nn.Module, trainer: PruningTrainer):
        super().__init__()
        self.loss = loss
        self._trainer = [trainer]  # in a list, so that nothing walks from the loss into the trainer's modules

    def forward(self, output, target) -> torch.Tensor:
        loss = self.loss(output, target)
        term = self._trainer[0].method.regulariser()
        if term is None:
            return loss
        self._trainer[0]._last_regulariser = term.detach()
        return loss + term
