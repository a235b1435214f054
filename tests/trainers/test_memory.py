"""What a training step keeps for its backward pass: nnU-Net's plans leave no room for more on a card."""

from __future__ import annotations

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_sauron import trainers
from nnunet_sauron.trainers import StockTrainer

from .small import OnRandomPatches, RandomPatches, set_folders, small_trainer

METHODS = [name for name in trainers.__all__ if name not in ("PruningTrainer", "StockTrainer", "CompressedTrainer")]
SETTINGS = [(name, {}) for name in METHODS] + [
    ("STAMPTrainer", {"ranking": "taylor", "transposed_convolutions": True}),
    ("SauronTrainer", {"normalisation": "none"}),
]
# delta_opt keeps the differences of maps that are pooled to a quarter (2D) or an eighth, and is in every second step.
SAURON = {2: 1.2, 3: 1.1}


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
        # A channel's numbers, such as a code's, weigh something on patches as small as these.
        assert factor <= (SAURON[dim] if name == "SauronTrainer" else 1.04), name
