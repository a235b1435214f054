"""Two DDP ranks on the CPU (gloo): what nnU-Net starts with nccl, one process per GPU."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import torch
from torch import distributed
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from nnunet_sauron.pruning import channel_layout

from .small import SmallTrainer, small_trainer


class CPURank(SmallTrainer):
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


def run_rank(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), nnUNet_compile="f")
    for kind in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{kind}"] = str(Path(folder) / kind)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(rank)  # DDP itself must make the ranks begin alike
    trainer = small_trainer(Path(folder), CPURank)
    trainer.run_training()
    (Path(folder) / f"rank{rank}.json").write_text(
        json.dumps({
            "steps": trainer.records,
            "history": trainer.history(),
            "widths": channel_layout(trainer.bare_network).widths,
            "parameter": next(trainer.bare_network.parameters()).flatten().tolist(),
        })
    )  # fmt: skip
    distributed.destroy_process_group()


def test_ranks_keep_equal_weights_through_three_cuts(tmp_path):
    for kind in ("raw", "preprocessed", "results"):
        (tmp_path / kind).mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    spawn(run_rank, (str(tmp_path), port), nprocs=2)
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert sum(bool(record["keep"]) for record in one["history"]) >= 3
    assert one["history"] == two["history"]
    assert one["widths"] == two["widths"] and one["parameter"] == two["parameter"]
    assert len({step[0] for step in one["steps"]}) >= 4
    for _, of_rank0, of_rank1 in one["steps"]:
        # Different patches on each rank: equal gradients can only come from DDP's averaging.
        assert of_rank0 == of_rank1
