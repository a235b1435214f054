"""Two DDP ranks on the CPU (gloo): what nnU-Net starts with nccl, one process per GPU."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.multiprocessing import set_forkserver_preload, start_processes

from nnunet_sauron import trainers
from nnunet_sauron.methods import autopruner, csgd, measuring, shrink, similar_channels
from nnunet_sauron.methods.distributed import summed_over_ranks
from nnunet_sauron.methods.fpgm import FPGM
from nnunet_sauron.methods.l1 import L1
from nnunet_sauron.methods.sfp import SFP
from nnunet_sauron.pruning import channel_layout

from .small import PROBED, OnRandomPatches, SmallTrainer, small_trainer


class OnCPURanks(OnRandomPatches):
    """nnU-Net's DDP set-up assumes CUDA in two places: the device, and the wrapper's device_ids."""

    num_epochs = 4

    def initialize(self):
        self.device = torch.device("cpu")
        self.grad_scaler = None
        self.is_ddp = False
        super().initialize()
        self.is_ddp = True
        self.loss.loss = self._build_loss()
        self.wrap()
        self.records, self.observed = [], []

    def train_step(self, batch):
        result = super().train_step(batch)
        gradients = torch.cat([p.grad.flatten() for p in self.bare_network.parameters() if p.grad is not None])
        weights = torch.cat([p.detach().flatten() for p in self.bare_network.parameters()])
        mine = torch.tensor([gradients.abs().sum(), weights.abs().sum(), weights.double().square().sum()])
        both = [torch.empty_like(mine) for _ in range(2)]
        distributed.all_gather(both, mine)
        self.records.append([len(weights), *[b.tolist() for b in both]])
        return result

    def on_epoch_end(self):
        """What this rank alone would score, and what both score together."""
        own, together = [], []
        for module in (measuring, similar_channels, autopruner):
            if hasattr(module, "summed_over_ranks"):
                module.summed_over_ranks = lambda tensor: (
                    own.append(tensor.flatten().tolist()),
                    together.append(summed_over_ranks(tensor).flatten().tolist()),
                    tensor,
                )[-1]
        super().on_epoch_end()
        both = [None, None]
        distributed.all_gather_object(both, own)
        self.observed += [list(of_tensor) for of_tensor in zip(*both, together, strict=True)]


class SauronRank(OnCPURanks, SmallTrainer):
    pass


class MergingRank(SauronRank):
    merge = True


class UnsupervisedRank(SauronRank):
    """Heads of low resolution are there all the same, and no loss sees them."""

    enable_deep_supervision = False


class STAMPRank(OnCPURanks, trainers.STAMPTrainer):
    b_drop = 0.3


METHODS = [name for name in trainers.__all__ if name not in ("PruningTrainer", "StockTrainer", "CompressedTrainer")]
SETTINGS = {name: {"target_macs": 0.4, "patches": 16} for name in ("SauronTrainer", "ShrinkTrainer")}
RANKS = [
    *(SauronRank, MergingRank, UnsupervisedRank, STAMPRank),
    *(type(f"{n}Rank", (OnCPURanks, getattr(trainers, n)), SETTINGS.get(n, {})) for n in METHODS),
]


def see_other_scores() -> None:
    """What a rank on another card might compute: other filters go, and other ones are alike."""
    for method in (SFP, FPGM, L1):
        own = method.score
        if method is L1:
            method.score = lambda *a, own=own: {n: [-x for x in scores] for n, scores in own(*a).items()}
        else:
            method.score = lambda self, kernels, own=own: -own(self, kernels)
    clusters = csgd.cluster
    csgd.cluster = lambda kernels, *rest: clusters(kernels.flip(0), *rest)


def run_rank(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), nnUNet_compile="f")
    for kind in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{kind}"] = str(Path(folder) / kind)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    if rank == 1:
        see_other_scores()
    shrink.PROBED = PROBED
    for trainer_class in RANKS:
        torch.manual_seed(rank)  # DDP itself must make the ranks begin alike
        trainer = small_trainer(Path(folder), trainer_class)
        trainer.run_training()
        (Path(folder) / f"{trainer_class.__name__}_{rank}.json").write_text(
            json.dumps({
                "steps": trainer.records,
                "observed": trainer.observed,
                "history": [{k: v for k, v in record.items() if k != "state"} for record in trainer.history()],
                "widths": channel_layout(trainer.bare_network).widths,
                "state": list(flat(trainer.method.state())),
                "parameter": next(trainer.bare_network.parameters()).flatten().tolist(),
            })
        )  # fmt: skip
    distributed.destroy_process_group()


def flat(state):
    """The numbers in a nested state."""
    if isinstance(state, dict):
        for value in state.values():
            yield from flat(value)
    elif torch.is_tensor(state):
        yield from state.flatten().tolist()
    elif state is not None:
        yield state


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two ranks left what became of every trainer."""
    folder = tmp_path_factory.mktemp("ranks")
    for kind in ("raw", "preprocessed", "results"):
        (folder / kind).mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    set_forkserver_preload([__name__])  # both are forked from one process that has imported all they need
    start_processes(run_rank, (str(folder), port), nprocs=2, start_method="forkserver")
    return folder


@pytest.mark.parametrize("name", [trainer_class.__name__ for trainer_class in RANKS])
def test_ranks_keep_equal_weights_through_cuts(folder, name):
    one, two = (json.loads((folder / f"{name}_{rank}.json").read_text()) for rank in range(2))
    cuts = sum(bool(record["keep"]) for record in one["history"])
    assert cuts >= (3 if name in ("SauronRank", "MergingRank", "UnsupervisedRank", "STAMPRank") else 1)
    assert one["history"] == two["history"]
    assert one["state"] == two["state"]
    assert one["widths"] == two["widths"] and one["parameter"] == two["parameter"]
    assert len({step[0] for step in one["steps"]}) >= cuts + 1
    for _, of_rank0, of_rank1 in one["steps"]:
        # Different patches on each rank: equal gradients can only come from DDP's averaging.
        assert of_rank0 == of_rank1
    assert one["observed"] == two["observed"]
    for mine, other, sums in one["observed"]:
        assert len(mine) == 1 or mine != other  # but for the number of batches
        torch.testing.assert_close(torch.tensor(mine) + torch.tensor(other), torch.tensor(sums))


def test_scores_are_of_all_ranks(folder):
    measuring_on_batches = [name for name in METHODS if name.startswith(("STAMP", "Taylor", "AutoPruner", "Sauron"))]
    assert len(measuring_on_batches) == 5
    for name in measuring_on_batches:
        assert json.loads((folder / f"{name}Rank_0.json").read_text())["observed"]
