"""What every pruning trainer promises, each in process on nnU-Net's own training loop with random patches.

A trainer is trained once per network, and once more from the middle on; all that is promised is read off these runs.
How targets become widths is arithmetic, in `tests/methods/test_targets.py`.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_sauron import trainers
from nnunet_sauron.methods.layerwise import Layerwise
from nnunet_sauron.methods.stepwise import Stepwise
from nnunet_sauron.pruning import CostModel, channel_layout, count_macs, resize, widths_of
from nnunet_sauron.trainers import PruningTrainer

from .small import BATCH, SIDE, OnRandomPatches, RandomPatches, SmallTrainer, set_folders, small_trainer

TO_A_TARGET = [
    getattr(trainers, name)
    for name in trainers.__all__
    if name not in ("PruningTrainer", "SauronTrainer", "ShrinkTrainer", "StockTrainer", "CompressedTrainer")
]
TO_A_PART = [trainers.SauronTrainer, trainers.ShrinkTrainer]
EVERY = [SmallTrainer, *TO_A_PART, *TO_A_TARGET]
NETWORKS = [("plain", 2), ("resenc", 3)]
OF_EACH_BASE = [trainers.L1Trainer, trainers.SFPTrainer]
INTERRUPTED_AFTER = 2
MACS = 0.4


def make(
    folder, trainer_class, architecture="plain", dim=2, widths=(6, 8, 10), norm="instance", **settings
) -> PruningTrainer:
    bases = (trainer_class,) if issubclass(trainer_class, OnRandomPatches) else (OnRandomPatches, trainer_class)
    if trainer_class in TO_A_PART:  # of so narrow a network hardly a tenth can be left, and few patches tell enough
        settings = {"target_macs": MACS, "patches": 16, **settings}
    # Under its own name, which nnU-Net writes into the checkpoint.
    small = type(trainer_class.__name__, bases, settings)
    return small_trainer(folder, small, widths=widths, architecture=architecture, dim=dim, norm=norm)


@dataclass
class Trained:
    """A whole training. From `INTERRUPTED_AFTER` on it had new random numbers and patches, as a resumed run has them.

    Attributes:
        trainer: As the training left it: to be looked at only.
        keys: Of the dense network's state dict.
        interrupted, final: The network's weights in the checkpoints of that epoch and of the end.
        checkpoint: The file of the former.
        unmoved: Parameters that two more steps left as they were.
    """

    trainer: PruningTrainer
    keys: list[str]
    interrupted: dict[str, torch.Tensor]
    final: dict[str, torch.Tensor]
    checkpoint: Path
    unmoved: set[str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[..., Trained]:
    """`trained(trainer_class, architecture, dim)`: each is trained when it is first asked for."""

    @cache
    def once(trainer_class: type, architecture: str, dim: int) -> Trained:
        root = tmp_path_factory.mktemp(trainer_class.__name__)
        with pytest.MonkeyPatch.context() as patch:
            set_folders(patch, root)
            patch.setenv("nnUNet_compile", "f")
            return train(root, trainer_class, architecture, dim)

    return once


def train(root: Path, trainer_class: type, architecture: str, dim: int) -> Trained:
    target = {} if trainer_class is SmallTrainer else {"target_macs": MACS}
    trainer = make(root, trainer_class, architecture, dim, save_every=1, **target)
    trainer.initialize()
    keys = list(trainer.network.state_dict())
    results = Path(trainer.output_folder)
    end, interrupted = trainer.on_epoch_end, root / "interrupted.pth"

    def end_epoch():
        end()
        if trainer.current_epoch == INTERRUPTED_AFTER + 1:
            shutil.copy(results / "checkpoint_latest.pth", interrupted)
            trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
            torch.manual_seed(1)

    trainer.on_epoch_end = end_epoch
    trainer.run_training()
    weights = [
        torch.load(path, weights_only=False)["network_weights"]
        for path in (interrupted, results / "checkpoint_final.pth")
    ]
    return Trained(trainer, keys, *weights, interrupted, unmoved_by_two_steps(trainer))


def unmoved_by_two_steps(trainer: PruningTrainer) -> set[str]:
    state = copy.deepcopy(trainer.network.state_dict())
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    rate = trainer.optimizer.param_groups[0]["lr"]
    trainer.network.train()
    trainer.optimizer.param_groups[0]["lr"] = 0.01
    for _ in range(2):
        trainer.train_step(next(RandomPatches(trainer, 7)))
    trainer.optimizer.param_groups[0]["lr"] = rate
    unmoved = {name for name, p in trainer.network.named_parameters() if torch.equal(p, before[name])}
    trainer.network.load_state_dict(state)
    return unmoved


def architecture_of(trainer: PruningTrainer) -> tuple:
    """What nnU-Net hands to `build_network_architecture`."""
    heads = trainer.label_manager.num_segmentation_heads
    return trainer.plans_manager, trainer.configuration_manager, trainer.num_input_channels, heads, True


def output_of(network: torch.nn.Module, dim: int) -> torch.Tensor:
    network.eval()
    with torch.no_grad():
        return network(torch.randn((BATCH, 1, *[SIDE] * dim), generator=torch.Generator().manual_seed(3)))[0]


def plain_output(trainer: PruningTrainer, weights: dict[str, torch.Tensor], dim: int) -> torch.Tensor:
    """What these weights give in a network that is nnU-Net's own, without a hook of ours."""
    network = nnUNetTrainer.build_network_architecture(*architecture_of(trainer))
    resize(network, widths_of(network, weights))
    network.load_state_dict(weights)
    return output_of(network, dim)


@pytest.mark.parametrize("trainer_class", EVERY, ids=lambda c: c.__name__)
class TestEveryTrainer:
    @pytest.mark.parametrize(("architecture", "dim"), NETWORKS, ids=lambda v: str(v))
    def test_it_prunes_and_keeps_what_hangs_on_the_channels(self, trained, trainer_class, architecture, dim):
        run = trained(trainer_class, architecture, dim)
        trainer, history = run.trainer, run.trainer.history()
        widths = channel_layout(trainer.network).widths
        assert sum(widths.values()) < sum(trainer.dense_widths.values())
        assert history[-1]["widths"] == widths
        assert not history[-1]["keep"]
        for before, after in pairwise(history):
            left = {name: len(before["keep"].get(name, range(width))) for name, width in before["widths"].items()}
            assert after["widths"] == left
        for parameter, state in trainer.optimizer.state.items():
            assert state["momentum_buffer"].shape == parameter.shape

    @pytest.mark.parametrize(("architecture", "dim"), NETWORKS, ids=lambda v: str(v))
    def test_its_checkpoint_is_plain_nnunets(self, trained, trainer_class, architecture, dim):
        run = trained(trainer_class, architecture, dim)
        assert list(run.trainer.network.state_dict()) == list(run.final) == run.keys
        plain = plain_output(run.trainer, run.final, dim)
        torch.testing.assert_close(output_of(run.trainer.network, dim), plain)
        assert plain.std() > 1e-3

    @pytest.mark.parametrize(("architecture", "dim"), NETWORKS, ids=lambda v: str(v))
    def test_every_tensor_learns_after_the_last_cut(self, trained, trainer_class, architecture, dim):
        run = trained(trainer_class, architecture, dim)
        # A convolution's bias before an instance norm has no effect, and moves by its weight decay alone.
        # nnU-Net gives the output of the lowest resolution no weight in the loss.
        learns = {n for n, p in run.trainer.network.named_parameters() if p.ndim > 1 and "seg_layers.0" not in n}
        assert not learns & run.unmoved

    @pytest.mark.parametrize(("architecture", "dim"), NETWORKS, ids=lambda v: str(v))
    def test_networks_of_different_widths_load_into_one_and_predict_as_before(
        self, trained, trainer_class, architecture, dim
    ):
        """As nnU-Net loads one fold after another for an ensemble."""
        run = trained(trainer_class, architecture, dim)
        shapes = [{name: tuple(weight.shape) for name, weight in w.items()} for w in (run.interrupted, run.final)]
        assert shapes[0] != shapes[1]
        network = type(run.trainer).build_network_architecture(*architecture_of(run.trainer))
        for weights in (run.interrupted, run.final, run.interrupted):
            network.load_state_dict(weights)
            torch.testing.assert_close(output_of(network, dim), plain_output(run.trainer, weights, dim))

    def test_a_resumed_run_goes_on_as_if_nothing_had_happened(self, trained, folder, trainer_class):
        whole = trained(trainer_class, *NETWORKS[0])
        resumed = make(folder, trainer_class)
        resumed.load_checkpoint(str(whole.checkpoint))
        torch.manual_seed(1)
        resumed.run_training()
        for a, b in zip(whole.trainer.history(), resumed.history(), strict=True):
            assert {k: v for k, v in a.items() if k != "state"} == {k: v for k, v in b.items() if k != "state"}
        assert resumed.kept_settings() == whole.trainer.kept_settings()
        for name, parameter in resumed.network.named_parameters():
            assert torch.equal(whole.final[name], parameter), name


@pytest.mark.parametrize("trainer_class", [*TO_A_PART, *TO_A_TARGET], ids=lambda c: c.__name__)
def test_a_target_is_met_and_hardly_overshot(trained, trainer_class):
    trainer = trained(trainer_class, *NETWORKS[0]).trainer
    told, widths = trainer.history()[-1]["target"], channel_layout(trainer.network).widths
    network = nnUNetTrainer.build_network_architecture(*architecture_of(trainer))
    cost, dense = CostModel(network, [SIDE] * 2, 1), count_macs(network, [SIDE] * 2, 1)
    resize(network, widths)
    left = count_macs(network, [SIDE] * 2, 1) / dense
    assert left <= MACS + 1e-9
    assert told["reached"] and (told["asked"], told["left"]) == (pytest.approx(MACS), pytest.approx(left))
    if issubclass(trainer_class.Method, Stepwise):  # the last channel that went was needed
        assert max(cost.macs({**widths, name: width + 1}) for name, width in widths.items()) > MACS * dense
    elif issubclass(trainer_class.Method, Layerwise):
        assert cost.macs({name: width + 1 for name, width in widths.items()}) > MACS * dense


@pytest.mark.parametrize("trainer_class", OF_EACH_BASE, ids=lambda c: c.__name__)
class TestTargets:
    def test_widths_are_taken_from_another_model(self, trained, folder, trainer_class):
        other = trained(SmallTrainer, *NETWORKS[0]).trainer
        checkpoint = str(Path(other.output_folder) / "checkpoint_final.pth")
        trainer = make(folder, trainer_class, widths_from=checkpoint, num_epochs=3)
        trainer.run_training()
        assert channel_layout(trainer.network).widths == channel_layout(other.network).widths

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"target_channels": 0.001}, "target_channels=0.001 cannot be met"),
            ({"target_macs": 1.5}, "target_macs must be the fraction that stays"),
            ({"rate": 1.0}, "rate must be the fraction"),
            ({"rate": 0.5, "target_macs": 0.5}, "choose one"),
            ({"num_epochs": 1}, "no epoch after which to cut"),
            ({"widths_from": "nowhere.pth"}, "no checkpoint .*nowhere.pth"),
        ],
        ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
    )
    def test_what_cannot_be_met_is_refused_before_anything_is_written(self, folder, trainer_class, settings, words):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            make(folder, trainer_class, **settings)
        assert not any((folder / "results").iterdir())

    def test_widths_of_another_topology_are_refused(self, folder, trainer_class):
        other = make(folder, SmallTrainer, widths=(4, 6), num_epochs=1)
        other.initialize()
        other.save_checkpoint(str(folder / "other.pth"))
        with pytest.raises(ValueError, match="another topology"):
            make(folder, trainer_class, widths_from=str(folder / "other.pth"))


def test_csgd_moves_the_filters_of_a_cluster_alike(folder):
    trainer = make(folder, trainers.CSGDTrainer, eps=1e-9, weight_decay=0.0)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    clusters = trainer.method.state()["clusters"]
    name, labels = next(iter(clusters.items()))
    weight = trainer.network.get_submodule(name).conv.weight
    before = weight.detach().clone()
    trainer.network.train()
    trainer.train_step(next(RandomPatches(trainer, 7)))
    moved = (weight.detach() - before).flatten(1)
    assert len(set(labels)) < len(labels)
    for one, label in enumerate(labels):
        for other in range(one):
            if labels[other] == label:
                torch.testing.assert_close(moved[one], moved[other], rtol=1e-3, atol=1e-7)
    assert moved.abs().max() > 1e-5


def test_the_contract_covers_every_trainer_of_the_shim():
    from nnunet_sauron.plugin import trainer_names

    assert set(trainer_names()) == {c.__name__ for c in TO_A_TARGET} | {
        "SauronTrainer",
        "ShrinkTrainer",
        "StockTrainer",
        "CompressedTrainer",
    }
