"""What is decided after an epoch: whether channels may be removed, which are kept, and what became of a target."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from ..methods.base import TrainingState
from ..methods.distributed import decided_on_one_rank
from ..methods.limits import steps
from ..pruning import channel_layout
from .batches import training_batches, training_losses

if TYPE_CHECKING:
    from .pruning import PruningTrainer


def decide(trainer: PruningTrainer) -> dict:
    """This epoch's record of the history, with the channels that are kept in the cut before the next epoch.

    Measured on every DDP rank, decided on rank 0.
    """
    now = channel_layout(trainer.bare_network).widths
    widths = {name: now[name] for name in trainer.dense_widths}  # the same strings in every record
    held = decided_on_one_rank(lambda: reason_to_hold(trainer))
    keep = {} if held else trainer.method.measure(training_state(trainer, widths))
    return decided_on_one_rank(lambda: _record(trainer, widths, keep, held or trainer.method.unmeasured))


def reason_to_hold(trainer: PruningTrainer) -> str | None:
    """Why no channel may be removed after this epoch, or None."""
    settings = trainer.pruning_settings
    if not settings.may_cut_after(trainer.current_epoch, trainer.num_epochs):
        return "outside of the cutting phase"
    if settings.max_loss_increase is None or (trainer.method.has_schedule() and is_last_cut(trainer)):
        return None
    losses = trainer.series()["train_losses"]
    lowest = min((loss for loss in losses if math.isfinite(loss)), default=-math.inf)
    if not losses[-1] <= lowest + settings.max_loss_increase:  # written so that a loss of nan holds cuts, too
        return (
            f"training loss {losses[-1]:.3f} is more than {settings.max_loss_increase:g} above its lowest, {lowest:.3f}"
        )
    return None


def training_state(trainer: PruningTrainer, widths: dict[str, int]) -> TrainingState:
    """What the method is told of the training, with the network's widths now."""
    before = trainer.history()[: trainer.current_epoch]
    terms = [*(record["regulariser"] for record in before), trainer.epoch_regulariser]
    rate = trainer.optimizer.param_groups[0]["lr"]
    return TrainingState(
        [loss + term for loss, term in zip(trainer.series()["train_losses"], terms, strict=True)],
        list(trainer.series()["val_losses"]),
        {name: [*(record["widths"][name] for record in before), width] for name, width in widths.items()},
        batches=partial(training_batches, trainer),
        losses=partial(training_losses, trainer),
        batch_size=trainer.batch_size,
        regions=trainer.label_manager.has_regions,
        is_last_cut=is_last_cut(trainer),
        learning_rate_left=rate / trainer.initial_lr if trainer.initial_lr else 1.0,
    )


def is_last_cut(trainer: PruningTrainer) -> bool:
    """Whether no cut can follow this epoch's, which must meet a target even if it would be held."""
    return not trainer.pruning_settings.may_cut_after(trainer.current_epoch + 1, trainer.num_epochs)


def last_cut_epoch(trainer: PruningTrainer) -> int:
    """The last epoch after which channels can be removed, of a method with a schedule (else there may be none)."""
    return steps(trainer.pruning_settings, trainer.num_epochs)[-1]


def _record(trainer: PruningTrainer, widths: dict[str, int], keep: dict[str, list[int]], held: str | None) -> dict:
    record = {
        "widths": widths,
        "parameters": trainer.planned.cost.parameters(widths),
        "macs": trainer.planned.cost.macs(widths),
        "regulariser": trainer.epoch_regulariser,
        "keep": keep,
        "held": held,
    }
    if trainer.given_widths:
        record["given_widths"] = trainer.given_widths
    if trainer.method.target():
        record["target"] = _target(trainer, record)
    record["state"] = trainer.method.state()
    return record


def _target(trainer: PruningTrainer, record: dict) -> dict:
    name, asked, left_of = trainer.method.target()
    left = left_of({unit: len(record["keep"].get(unit, range(width))) for unit, width in record["widths"].items()})
    reached, why = left <= asked + 1e-9, None
    last = last_cut_epoch(trainer)
    if not reached and trainer.current_epoch < last:
        reached, why = None, f"cuts go on until epoch {last}"
    elif not reached and trainer.current_epoch == last:
        why = record["held"] or trainer.method.why_missed() or "the last cut did not lead so far"
    elif not reached:
        why = trainer.history()[trainer.current_epoch - 1].get("target", {}).get("why")
    # A method's default target is given by no setting.
    value = getattr(trainer.pruning_settings, name, None)
    return {
        "name": name, "value": asked if value is None else value, "asked": asked, "left": left, "reached": reached,
        "why": why,
    }  # fmt: skip
