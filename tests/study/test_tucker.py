"""Tucker-2: the algebra, the ranks that a target gives, and a training with such a network."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from nnunet_sauron.model.trained import TrainedModel
from nnunet_sauron.pruning import count_macs
from nnunet_sauron.trainers import StockTrainer

from ..contracts.networks import build, patch
from ..trainers.small import OnRandomPatches, set_folders, small_trainer
from .conftest import STUDY

from tucker import LowRank, _layers, lower_ranks, ranks_for, ranks_in, tucker2  # isort: skip
from tucker_trainer import TuckerTrainer  # isort: skip

WIDTHS = (8, 16, 16)


def full_ranks(network: nn.Module) -> dict[str, tuple[int, int]]:
    """Every rank that a kernel can have at most."""
    found = {}
    for name, conv in _layers(network):
        voxels = math.prod(conv.kernel_size)
        found[name] = (
            min(conv.in_channels, conv.out_channels * voxels), min(conv.out_channels, conv.in_channels * voxels)
        )  # fmt: skip
    return found


def kernel(factors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    first, core, last = factors
    return torch.einsum("sr...,ri,os->oi...", core, first, last)


@pytest.mark.parametrize(("architecture", "dim"), [("plain", 2), ("plain", 3), ("residual", 2)])
def test_at_full_rank_nothing_changes(architecture, dim):
    network = build(architecture, dim).eval()
    expected = network(patch(dim))
    ranks = full_ranks(network)
    assert any("transpconvs" in name for name in ranks) and not any("seg_layers" in name for name in ranks)
    assert "encoder.stem.convs.0.conv" not in ranks and "encoder.stages.0.0.convs.0.conv" not in ranks
    lower_ranks(network, ranks)
    assert sum(isinstance(module, LowRank) for module in network.modules()) == len(ranks)
    torch.testing.assert_close(network(patch(dim)), expected, atol=1e-4, rtol=1e-4)


def test_a_kernel_of_low_rank_is_found():
    weight = kernel((torch.randn(3, 9), torch.randn(2, 3, 3, 3), torch.randn(7, 2)))
    torch.testing.assert_close(kernel(tucker2(weight, (3, 2))), weight, atol=1e-4, rtol=1e-4)
    assert (kernel(tucker2(weight, (3, 1))) - weight).norm() > 0.1 * weight.norm()


def test_iterations_come_nearer_than_the_first_decomposition(monkeypatch):
    weight = torch.randn(12, 12, 3, 3, generator=torch.Generator().manual_seed(0))
    errors = {}
    for iterations in (0, 10):
        monkeypatch.setattr("tucker.ITERATIONS", iterations)
        first, core, last = tucker2(weight, (4, 4))
        errors[iterations] = float((kernel((first, core, last)) - weight).norm())
        torch.testing.assert_close(first @ first.T, torch.eye(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(last.T @ last, torch.eye(4), atol=1e-5, rtol=0)
    assert errors[10] < errors[0] < float(weight.norm())


def test_ranks_meet_the_target_and_no_smaller_ones_are_taken():
    network = build("plain", 2, (16, 32, 64))
    dense = count_macs(network, (16, 16), 2)
    ranks = ranks_for(network, 0.2, (16, 16), 2, 2)
    lower_ranks(network, ranks)
    assert 0.17 < count_macs(network, (16, 16), 2) / dense <= 0.2
    shares = [of_in / conv.in_channels for (of_in, _), (_, conv) in zip(ranks.values(), ranked(ranks), strict=True)]
    assert max(shares) - min(shares) < 0.13  # one part for all layers, but for rounding up to a whole channel


def ranked(ranks) -> list[tuple[str, nn.Module]]:
    return [(name, conv) for name, conv in _layers(build("plain", 2, (16, 32, 64))) if name in ranks]


def test_a_target_out_of_reach_names_the_least():
    with pytest.raises(ValueError, match=r"target_macs=0\.01 cannot be met: with min_rank=8, 0\.\d+ is the least"):
        ranks_for(build("plain", 2, (16, 32, 64)), 0.01, (16, 16), 2, 8)


def test_a_replaced_layer_has_all_of_nnunets_names():
    network = build("plain", 2)
    lower_ranks(network, full_ranks(network))
    block = network.encoder.stages[1][0].convs[0]
    assert isinstance(block.conv, LowRank) and block.conv is block.all_modules[0]
    assert network.decoder.encoder.stages[1][0].convs[0].conv is block.conv
    state = network.state_dict()
    assert ranks_in(build("plain", 2), state) == full_ranks(build("plain", 2))
    assert ranks_in(build("plain", 2), build("plain", 2).state_dict()) == {}


@pytest.fixture
def stock(tmp_path, monkeypatch) -> Path:
    """A trained model's folder, with nnU-Net's folders and the study's trainers set."""
    set_folders(monkeypatch, tmp_path)
    monkeypatch.setenv("nnUNet_compile", "f")
    monkeypatch.setenv("nnUNet_extTrainer", str(STUDY / "trainers"))
    trainer = small_trainer(tmp_path, type("StockTrainer", (OnRandomPatches, StockTrainer), {"num_epochs": 1}), WIDTHS)
    trainer.run_training()
    return Path(trainer.output_folder).parent


def tucker_trainer(folder: Path, epochs: int):
    return small_trainer(
        folder, type("TuckerTrainer", (OnRandomPatches, TuckerTrainer), {"num_epochs": epochs}), WIDTHS
    )


def test_a_training_starts_from_a_model_in_low_rank_goes_on_and_is_read(stock, tmp_path, monkeypatch):
    monkeypatch.setenv("nnunet_sauron", f"start_from={stock},teacher={stock},target_macs=0.5,min_rank=2")
    trainer = tucker_trainer(tmp_path, 1)
    trainer.initialize()
    dense = TrainedModel.read(stock, ["0"]).network("0")
    assert count_macs(trainer.network, (16, 16), 1) <= 0.5 * count_macs(dense, (16, 16), 1)
    lower_ranks(dense, ranks_in(dense, trainer.network.state_dict()))
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, trainer.network.state_dict()[name])
    trainer.run_training()
    (record,) = trainer.logger.local_logger.my_fantastic_logging["distillation"]
    assert record["teacher"] == str(stock) and record["loss"] > 0

    monkeypatch.delenv("nnunet_sauron")
    resumed = tucker_trainer(tmp_path, 2)
    final = Path(trainer.output_folder) / "checkpoint_final.pth"
    resumed.load_checkpoint(str(final))
    resumed.num_epochs = 2  # as if the training had been a longer one
    assert {id(p) for p in resumed.optimizer.param_groups[0]["params"]} == {id(p) for p in resumed.network.parameters()}
    assert all(state["momentum_buffer"].shape == p.shape for p, state in resumed.optimizer.state.items())
    resumed.run_training()

    read = TrainedModel.read(final.parents[1], ["0"]).network("0")
    for name, tensor in resumed.network.state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name])


@pytest.mark.parametrize("given", ["target_macs=1", "target_macs=0", "min_rank=0"])
def test_a_setting_out_of_range_is_refused(stock, tmp_path, monkeypatch, given):
    monkeypatch.setenv("nnunet_sauron", f"start_from={stock},{given}")
    with pytest.raises(ValueError, match=given.partition("=")[0]):
        tucker_trainer(tmp_path, 1)
