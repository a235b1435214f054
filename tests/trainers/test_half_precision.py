"""Mixed precision in every trainer: autocast, and a gradient scaler that skips steps and changes its scale."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_sauron import trainers
from nnunet_sauron.methods.measuring import NOTHING_MEASURED
from nnunet_sauron.pruning import channel_layout
from nnunet_sauron.trainers.batches import training_losses

from ..old_torch import scales_gradients_on_cpu
from .small import RandomPatches, log_of, set_folders
from .test_every_trainer import EVERY, make


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    set_folders(monkeypatch, tmp_path)
    return tmp_path


BATCH_NORM, BOTTLENECK = ("resenc", 2, "batch"), ("bottleneck", 3, "instance")
IN_3D = (trainers.SauronTrainer, trainers.ShrinkTrainer, trainers.STAMPTrainer, trainers.L1Trainer)


@pytest.mark.parametrize(
    ("trainer_class", "architecture", "dim", "norm"),
    [*((c, *BATCH_NORM) for c in EVERY), *((c, *BOTTLENECK) for c in IN_3D)],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_it_trains_and_cuts_under_autocast(folder, monkeypatch, trainer_class, architecture, dim, norm):
    # nnU-Net has autocast on CUDA only; on the CPU it enters this instead.
    monkeypatch.setattr(f"{nnUNetTrainer.__module__}.dummy_context", lambda: torch.autocast("cpu", torch.bfloat16))
    options = {"num_epochs": 3, "num_iterations_per_epoch": 2}
    trainer = make(folder, trainer_class, architecture, dim, norm=norm, **options)
    dtypes = set()
    trainer.initialize()
    trainer.network.encoder.register_forward_hook(lambda m, i, skips: dtypes.add(skips[0].dtype))
    before = trainer.network.decoder.seg_layers[-1].weight.clone()
    trainer.run_training()
    assert torch.bfloat16 in dtypes or norm == "instance"  # which autocast runs in float32 on the CPU
    assert sum(channel_layout(trainer.network).widths.values()) < sum(trainer.dense_widths.values())
    assert all(p.isfinite().all() for p in trainer.network.parameters())
    after = trainer.network.decoder.seg_layers[-1].weight
    assert after.shape != before.shape or not torch.equal(after, before)
    assert all(record["held"] in (None, "outside of the cutting phase") for record in trainer.history())


SCALED = [trainers.STAMPTrainer, trainers.CSGDTrainer, trainers.AutoPrunerTrainer]


def started(folder, trainer_class, scale=None):
    """A trainer in its first epoch, as on CUDA: with a gradient scaler, if `scale` is given."""
    settings = {"b_drop": 0.0} if trainer_class is trainers.STAMPTrainer else {}
    torch.manual_seed(0)
    trainer = make(folder, trainer_class, **settings)
    trainer.initialize()
    trainer.grad_scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    return trainer


def learnt(trainer) -> list[torch.Tensor]:
    """All that a training's steps leave behind."""
    codes = trainer.method._layers.parameters() if hasattr(trainer.method, "_layers") else []
    return [p.detach().clone() for p in (*trainer.network.parameters(), *codes)]


@scales_gradients_on_cpu
@pytest.mark.parametrize("trainer_class", SCALED, ids=lambda c: c.__name__)
def test_a_skipped_step_and_another_scale_leave_no_trace(folder, trainer_class):
    """The optimiser's hooks do not run in a skipped step, whose gradients are inf, and the next step counts in full."""
    plain, scaled = started(folder, trainer_class), started(folder, trainer_class, scale=1024.0)
    loader = RandomPatches(plain, 3)
    first, overflowing, last = (next(loader) for _ in range(3))
    for batch in (first, last):
        plain.train_step(copy.deepcopy(batch))
    poisoned = Poisoned(scaled, maps=False, unit="decoder.stages.1.convs.1")
    scaled.train_step(first)
    before = [p.detach().clone() for p in scaled.network.parameters()]
    poisoned.active = True
    scaled.train_step(overflowing)
    poisoned.active = False
    assert scaled.grad_scaler.get_scale() == 512  # it did skip
    assert all(torch.equal(a, b) for a, b in zip(before, scaled.network.parameters(), strict=True))
    scaled.grad_scaler.load_state_dict({**scaled.grad_scaler.state_dict(), "scale": 16.0})
    scaled.train_step(last)
    for one, other in zip(learnt(plain), learnt(scaled), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@scales_gradients_on_cpu
def test_a_scale_that_has_just_doubled_is_not_measured_with(folder):
    """The scaler doubles its scale until a step overflows; after such a doubling every batch would."""
    trainer = started(folder, trainers.TaylorTrainer, scale=1024.0)
    trainer.grad_scaler.set_growth_interval(1)
    batch = next(RandomPatches(trainer, 3))
    trainer.train_step(copy.deepcopy(batch))
    assert trainer.grad_scaler.get_scale() == 2048
    trainer.dataloader_train = iter([batch])
    (loss,) = training_losses(trainer, 1)
    assert loss == 1024 * trainer.loss(trainer.network(batch["data"]), batch["target"])


UNIT = "encoder.stages.1.0.convs.0"


class Poisoned:
    """A layer's gradients, or maps, are not finite in some forwards; a gradient scaler skips such a training step."""

    def __init__(self, trainer, maps: bool, unit: str = UNIT):
        self.active = False
        self.maps = maps
        trainer.network.get_submodule(unit).register_forward_hook(self.hook, prepend=True)

    def hook(self, module, inputs, output):
        if self.active:
            if self.maps:
                return output + math.inf
            if output.requires_grad:
                output.register_hook(lambda grad: grad * math.inf)
        return None


@scales_gradients_on_cpu
@pytest.mark.parametrize("trainer_class", [trainers.STAMPTrainer, trainers.TaylorTrainer, trainers.AutoPrunerTrainer])
def test_an_epoch_without_a_finite_batch_cuts_nothing_and_says_why(folder, trainer_class):
    trainer = make(folder, trainer_class, num_epochs=6, target_channels=0.5)
    trainer.initialize()
    trainer.grad_scaler = torch.amp.GradScaler("cpu")
    poisoned = Poisoned(trainer, maps=True)
    start = trainer.on_epoch_start
    until = 3 if trainer_class is trainers.AutoPrunerTrainer else 1  # it cuts after epoch 3 alone

    def on_epoch_start():
        poisoned.active = trainer.current_epoch <= until
        start()

    trainer.on_epoch_start = on_epoch_start
    trainer.run_training()
    held = [record["held"] for record in trainer.history()]
    assert held[until] == NOTHING_MEASURED
    assert not any(record["keep"] for record in trainer.history()[: until + 1])
    cut = sum(trainer.history()[-1]["widths"].values()) < sum(trainer.dense_widths.values())
    log = log_of(trainer)
    assert cut == (trainer_class is not trainers.AutoPrunerTrainer)
    assert ("WARNING: target" in log) != cut
