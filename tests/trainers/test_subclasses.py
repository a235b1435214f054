"""What users do with a trainer in nnU-Net's way: numbers in the constructor, mixed-in variants, own optimisers."""

from __future__ import annotations

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_sauron.pruning import channel_layout
from nnunet_sauron.trainers import CompressedTrainer, ShrinkTrainer, StockTrainer

from .small import Gelu, OnRandomPatches, log_of, small_trainer


class Small(OnRandomPatches, ShrinkTrainer):
    num_epochs = 5
    target_macs = 0.4
    patches = 16


class GeluOfOurs(Small):
    @staticmethod
    def build_network_architecture(plans_manager, configuration_manager, *arguments):
        configuration_manager.configuration["architecture"]["arch_kwargs"]["nonlin"] = "torch.nn.GELU"
        configuration_manager.configuration["architecture"]["arch_kwargs"]["nonlin_kwargs"] = {}
        return ShrinkTrainer.build_network_architecture(plans_manager, configuration_manager, *arguments)


def named(name: str, *bases: type, **more) -> type:
    return type(name, bases, more)


@pytest.mark.parametrize("bases", [(Small, Gelu), (Gelu, Small), (CompressedTrainer, Gelu)], ids=str)
def test_a_base_that_builds_another_network_is_refused_by_name(folder, bases):
    with pytest.raises(ValueError, match="Mixed has the base Gelu, which builds a network of its own"):
        small_trainer(folder, named("Mixed", *bases))
    assert not list((folder / "results").rglob("Mixed*"))


def test_a_network_built_from_ours_is_trained_and_cut(folder):
    trainer = small_trainer(folder, GeluOfOurs)
    trainer.run_training()
    assert any(isinstance(module, torch.nn.GELU) for module in trainer.network.modules())
    assert sum(channel_layout(trainer.network).widths.values()) < sum(trainer.dense_widths.values())


def test_a_network_that_could_not_be_predicted_with_is_refused(folder):
    own = {"build_network_architecture": staticmethod(Gelu.build_network_architecture)}
    trainer = small_trainer(folder, named("Own", Small, **own))
    with pytest.raises(ValueError, match="Own builds its network without its base's build_network_architecture"):
        trainer.initialize()


def optimised(scheduler):
    def configure_optimizers(self):
        groups = list(self.network.parameters())
        optimizer = torch.optim.AdamW([{"params": groups[:4]}, {"params": groups[4:]}], lr=1e-3)
        return optimizer, scheduler(optimizer, self.num_epochs)

    return configure_optimizers


def test_the_rate_after_the_cuts_is_a_multiple_of_the_schedules_own(folder):
    from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

    poly = optimised(lambda optimizer, epochs: PolyLRScheduler(optimizer, 1e-3, epochs))
    trainer = small_trainer(folder, named("Poly", Small, configure_optimizers=poly, num_epochs=4, cuts=1))
    trainer.run_training()
    rates = trainer.series()["lrs"]
    assert any(record["keep"] for record in trainer.history())
    assert (
        rates[0] == 1e-3
        and rates[2] == 2e-3
        and all(group["lr"] == rates[3] for group in trainer.optimizer.param_groups)
    )


def test_another_schedule_than_nnunets_stays_and_is_said(folder):
    cosine = optimised(lambda optimizer, epochs: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs))
    trainer = small_trainer(folder, named("Cosine", Small, configure_optimizers=cosine, num_epochs=4, cuts=1))
    trainer.run_training()
    assert any(record["keep"] for record in trainer.history())
    assert max(trainer.series()["lrs"]) == 1e-3
    assert "WARNING: rate_after_cuts=2 has no effect beside CosineAnnealingLR" in log_of(trainer)


@pytest.mark.parametrize("base", [Small, named("Stock", OnRandomPatches, StockTrainer)], ids=lambda base: base.__name__)
def test_the_variable_goes_before_what_a_constructor_sets(folder, monkeypatch, base):
    def constructor(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):  # noqa: B008
        super(trainer_class, self).__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.initial_lr = 2, 0.003

    trainer_class = named("Mine", base, __init__=constructor)
    monkeypatch.setenv("nnunet_sauron", "num_epochs=3")
    trainer = small_trainer(folder, trainer_class)
    trainer.run_training()
    assert len(trainer.series()["lrs"] if base is Small else trainer.kept_settings()) == 3
    assert trainer.settings_now()["num_epochs"] == 3 and trainer.settings_now()["initial_lr"] == 0.003


def test_a_class_attribute_that_changed_meanwhile_is_said_not_to_be_used(folder):
    first = small_trainer(folder, named("Mine", Small, num_epochs=3))
    first.run_training()
    again = small_trainer(folder, named("Mine", Small, num_epochs=8))
    again.load_checkpoint(first.output_folder + "/checkpoint_final.pth")
    again.run_training()
    assert len(again.history()) == 3
    assert "WARNING: the class attribute num_epochs=8 is not used: this training was begun with 3" in log_of(again)
    assert "target_macs=0.4 is not used" not in log_of(again)


def test_nnunets_own_trainer_builds_what_it_did():
    """The check above looks for bases with a network of their own by this name."""
    assert "build_network_architecture" in vars(nnUNetTrainer)
