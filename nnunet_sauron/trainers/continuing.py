"""A training that is continued: its settings, widths and history come from its checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from ..model.checkpoints import PRUNING, logged, plain, read_checkpoint, trained_with
from ..model.snapshots import Snapshots
from ..pruning import widths_of
from .kept_settings import changeable

if TYPE_CHECKING:
    from .pruning import PruningTrainer


def take_over(trainer: PruningTrainer, path: str) -> None:
    """Take a checkpoint's settings and widths, before nnU-Net loads its weights and optimiser state.

    Raises:
        FileNotFoundError, ValueError: There is none, it cannot be read, or it is of another architecture.
    """
    checkpoint = read_checkpoint(path)
    history = logged(checkpoint).get(PRUNING)
    if history:
        _take_settings(trainer, history[-1])
    if not trainer.was_initialized:
        trainer.initialize()
    widths = widths_of(trainer.bare_network, checkpoint["network_weights"])
    if widths is None or history is None:
        raise ValueError(
            f"{path} does not fit: it was made by {checkpoint.get('trainer_name')}, with a network of other layers "
            f"than {type(trainer).__name__} builds from these plans, or without a pruning history. To start from the "
            f"weights of another training, use -pretrained_weights."
        )
    check_plans(trainer, checkpoint, path)
    trainer.take_widths(widths)


def check_plans(trainer: nnUNetTrainer, checkpoint: dict, path: str) -> None:
    """Raise ValueError if the plans describe another network now than when a checkpoint was trained.

    nnU-Net stops at weights that do not fit, but a network that takes the checkpoint's widths would accept them.
    """
    if not {"plans", "configuration"} <= checkpoint.get("init_args", {}).keys():
        return
    before, configuration, _ = trained_with(checkpoint, path)
    then, now = (
        plain(manager.configuration["architecture"]["arch_kwargs"])
        for manager in (before.get_configuration(configuration), trainer.configuration_manager)
    )
    differ = [
        f"{name}={then.get(name)} (now {now.get(name)})" for name in {**then, **now} if then.get(name) != now.get(name)
    ]
    if differ:
        raise ValueError(
            f"{path} was trained with plans {before.plans_name} whose network had {', '.join(differ)}. Restore these "
            f"plans (a copy is plans.json in the model's folder), or begin anew without --c."
        )


def _take_settings(trainer: PruningTrainer, record: dict) -> None:
    """The settings of the history's last record, and what the environment may change of them."""
    before = trainer.settings_now()
    training, trainer.pruning_settings, snapshots, *trainer._more_settings = trainer._given.continued(
        record["settings"], changeable(trainer.MoreSettings)
    )
    training.apply_to(trainer)
    trainer._snapshots = Snapshots(trainer, snapshots)
    if widths_from := getattr(trainer.pruning_settings, "widths_from", None):
        trainer.given_widths = record.get("given_widths")
        if trainer.given_widths is None:  # checkpoints did not hold them at first
            trainer.given_widths = trainer.planned.widths_in(widths_from)
    trainer._refused = None
    if trainer.was_initialized and trainer.settings_now() != before:
        trainer.make_method()
        trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
