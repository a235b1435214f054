"""The learning rate after the cutting phase."""

from __future__ import annotations

from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler


class RateAfterCuts:
    """nnU-Net's scheduler; but where channels were removed, epochs after the cutting phase have the rate that the
    setting `rate_after_cuts` gives them, relative to the one that the scheduler began with.

    Args:
        trainer: A `PruningTrainer`.
        optimizer: Its optimiser.
        scheduler: nnU-Net's, which is asked for everything else.
    """

    def __init__(self, trainer, optimizer, scheduler: PolyLRScheduler):
        self._trainer, self._optimizer, self._scheduler = trainer, optimizer, scheduler

    def step(self, epoch: int) -> None:
        self._scheduler.step(epoch)
        trainer = self._trainer
        rate = trainer.pruning_settings.learning_rate(epoch, trainer.num_epochs)
        if rate is not None and any(record.get("keep") for record in trainer.history()):
            for group in self._optimizer.param_groups:
                group["lr"] = rate * self._scheduler.initial_lr

    def __getattr__(self, name: str):
        return getattr(self._scheduler, name)
