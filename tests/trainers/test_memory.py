"""What a training step keeps for its backward pass: nnU-Net's plans leave no room for more on a card."""

from __future__ import annotations

import weakref

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_sauron import trainers
from nnunet_sauron.methods.measuring import map_gradients, map_norms
from nnunet_sauron.methods.similar_channels import mean_distances
from nnunet_sauron.trainers import StockTrainer
from nnunet_sauron.trainers.batches import training_batches, training_losses

from ..old_torch import IS_OLDEST
from .small import OnRandomPatches, RandomPatches, set_folders, small_trainer

METHODS = [name for name in trainers.__all__ if name not in ("PruningTrainer", "StockTrainer", "CompressedTrainer")]
SETTINGS = [(name, {}) for name in METHODS] + [
    ("STAMPTrainer", {"ranking": "taylor", "transposed_convolutions": True}),
    ("SauronTrainer", {"normalisation": "none"}),
]
# delta_opt keeps the differences of maps that are pooled to a quarter (2D) or an eighth, and is in every third step.
SAURON = {2: 1.2, 3: 1.1}
# A channel's numbers, such as a code's, weigh something on patches as small as these; and with AutoPruner's codes
# PyTorch 2.1 keeps the maps of transposed convolutions.
OTHERS = 1.12 if IS_OLDEST else 1.04


def saved_bytes(folder, trainer_class, settings, **network) -> int:
    """Bytes of all tensors but the weights that the forward of one training step saves; shared memory counts once."""
    trainer = small_trainer(folder, type(trainer_class.__name__, (OnRandomPatches, trainer_class), settings), **network)
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    weights = {parameter.untyped_storage().data_ptr() for parameter in trainer.network.parameters()}
    saved = {}  # the tensors themselves, whose memory would be used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.train_step(next(RandomPatches(trainer, 1)))
    return sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in weights)


@pytest.mark.parametrize(
    ("architecture", "dim", "norm", "half"),
    [("plain", 2, "instance", False), ("plain", 3, "instance", True), ("bottleneck", 2, "batch", True)],
)
def test_no_method_keeps_more_than_nnunet_but_for_saurons_pooled_maps(
    tmp_path, monkeypatch, architecture, dim, norm, half
):
    set_folders(monkeypatch, tmp_path)
    if half:
        monkeypatch.setattr(f"{nnUNetTrainer.__module__}.dummy_context", lambda: torch.autocast("cpu", torch.bfloat16))
    network = {"architecture": architecture, "dim": dim, "norm": norm}
    stock = saved_bytes(tmp_path, StockTrainer, {}, **network)
    for name, more in SETTINGS:
        factor = saved_bytes(tmp_path, getattr(trainers, name), {"target_macs": 0.5, **more}, **network) / stock
        assert factor <= (SAURON[dim] if name == "SauronTrainer" else OTHERS), name


class CountingLoader:
    """A training's batches; `alive` is how many of the batches, and of the losses, there are still at each draw."""

    def __init__(self, trainer):
        self.loader, self.made, self.alive = trainer.dataloader_train, [], []
        loss = trainer.loss
        trainer.loss = lambda *arguments: self.noted(loss(*arguments))

    def noted(self, tensor: torch.Tensor) -> torch.Tensor:
        self.made.append(weakref.ref(tensor))
        return tensor

    def __next__(self) -> dict:
        self.alive.append(sum(one() is not None for one in self.made))
        batch = next(self.loader)
        self.noted(batch["data"])
        return batch


@pytest.mark.parametrize("measured", ["norms", "gradients", "distances", "codes"])
def test_measuring_holds_one_batch_at_a_time_and_no_graph_of_the_last(folder, measured):
    base = trainers.AutoPrunerTrainer if measured == "codes" else trainers.TaylorTrainer
    trainer = small_trainer(folder, type(base.__name__, (OnRandomPatches, base), {"target_macs": 0.5}))
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    trainer.dataloader_train = counting = CountingLoader(trainer)
    network, batches = trainer.bare_network, training_batches(trainer, 4)
    found = {
        "norms": lambda: map_norms(network, batches, 2),
        "gradients": lambda: map_gradients(network, training_losses(trainer, 4)),
        "distances": lambda: mean_distances(network, batches),
        "codes": lambda: trainer.method._summed_codes(batches),
    }[measured]()
    assert found and len(counting.alive) == 4
    # Images at most, and with gradients not even those: a graph that stays would hold the largest maps beside the next.
    assert max(counting.alive) <= (0 if measured == "gradients" else 1)
