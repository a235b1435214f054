"""Two DDP ranks on the CPU (gloo): what nnU-Net starts with nccl, one process per GPU."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from nnunet_sauron.pruning import channel_layout
from nnunet_sauron.trainers import AutoPrunerTrainer, STAMPTrainer

from .small import OnRandomPatches, SmallTrainer, small_trainer


class OnCPURanks(OnRandomPatches):
    """nnU-Net's DDP set-up assumes CUDA in two places: the device, and the wrapper's device_ids."""

    num_epochs = 5

    def initialize(self):
        self.device = torch.device("cpu")
        self.grad_scaler = None
        self.is_ddp = False
        super().initialize()
        self.is_ddp = True
        self.loss.loss = self._build_loss()
        self.network = DistributedDataParallel(self.network)
        self.records = []

    def train_step(self, batch):
        result = super().train_step(batch)
        gradients = torch.cat([p.grad.flatten() for p in self.bare_network.parameters() if p.grad is not None])
        weights = torch.cat([p.detach().flatten() for p in self.bare_network.parameters()])
        mine = torch.tensor([gradients.abs().sum(), weights.abs().sum(), weights.double().square().sum()])
        both = [torch.empty_like(mine) for _ in range(2)]
        distributed.all_gather(both, mine)
        self.records.append([len(weights), *[b.tolist() for b in both]])
        return result


class SauronRank(OnCPURanks, SmallTrainer):
    pass


class MergingRank(SauronRank):
    merge = True


class STAMPRank(OnCPURanks, STAMPTrainer):
    b_drop = 0.3


class AutoPrunerRank(OnCPURanks, AutoPrunerTrainer):
    pass


def run_rank(rank: int, folder: str, port: int, trainer_class: type) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), nnUNet_compile="f")
    for kind in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{kind}"] = str(Path(folder) / kind)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(rank)  # DDP itself must make the ranks begin alike
    trainer = small_trainer(Path(folder), trainer_class)
    trainer.run_training()
    (Path(folder) / f"rank{rank}.json").write_text(
        json.dumps({
            "steps": trainer.records,
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


@pytest.mark.parametrize(
    ("trainer_class", "cuts"),
    [(SauronRank, 3), (MergingRank, 3), (STAMPRank, 3), (AutoPrunerRank, 1)],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_ranks_keep_equal_weights_through_cuts(tmp_path, trainer_class, cuts):
    for kind in ("raw", "preprocessed", "results"):
        (tmp_path / kind).mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    spawn(run_rank, (str(tmp_path), port, trainer_class), nprocs=2)
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert sum(bool(record["keep"]) for record in one["history"]) >= cuts
    assert one["history"] == two["history"]
    assert one["state"] == two["state"]
    assert one["widths"] == two["widths"] and one["parameter"] == two["parameter"]
    assert len({step[0] for step in one["steps"]}) >= cuts + 1
    for _, of_rank0, of_rank1 in one["steps"]:
        # Different patches on each rank: equal gradients can only come from DDP's averaging.
        assert of_rank0 == of_rank1
