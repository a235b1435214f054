"""What each method scores, against the papers' formulas written out."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from nnunet_sauron.methods.autopruner import AutoPruner
from nnunet_sauron.methods.base import TrainingState
from nnunet_sauron.methods.csgd import CSGD, cluster, merge_clusters
from nnunet_sauron.methods.filters import filters, tensors_of
from nnunet_sauron.methods.fpgm import FPGM
from nnunet_sauron.methods.l1 import L1
from nnunet_sauron.methods.measuring import NOTHING_MEASURED
from nnunet_sauron.methods.random import RandomLargestLayer
from nnunet_sauron.methods.sauron import Sauron
from nnunet_sauron.methods.sfp import SFP, zero_channels
from nnunet_sauron.methods.shrink import Shrink
from nnunet_sauron.methods.stamp import STAMP, STAMPRandomChannel, targeted_dropout
from nnunet_sauron.methods.taylor import Taylor
from nnunet_sauron.pruning import CostModel, channel_layout, remove_channels
from nnunet_sauron.pruning.channels import feature_map_modules

from ..contracts.networks import build, patch

UNIT = "encoder.stages.1.0.convs.0"
NETWORKS = [("plain", 2), ("resenc", 2), ("plain", 3), ("bottleneck", 2)]


def attached(method_class, network, num_epochs=6, **settings):
    """A method on a network, in the first epoch's first step."""
    method = method_class(method_class.Settings(**settings), num_epochs)
    layout = channel_layout(network)
    dim = next(p.ndim for p in network.parameters() if p.ndim > 2) - 2
    method.prepare(layout, CostModel(network, [16] * dim, 2), None)
    method.attach(network, layout)
    method.start_epoch(0, layout.widths)
    method.before_step()
    return method


def state(network, epoch: int, seeds=(1, 2), scale: float = 1.0) -> TrainingState:
    """A training of this network at the end of an epoch. Its batches are patches of these seeds, however many."""
    dim = next(p.ndim for p in network.parameters() if p.ndim > 2) - 2
    widths = {name: [width] * (epoch + 1) for name, width in channel_layout(network).widths.items()}
    return TrainingState(
        [1.0] * (epoch + 1), [1.0] * (epoch + 1), widths,
        batches=lambda count: [patch(dim, seed=seed) for seed in seeds],
        losses=lambda count: (network(patch(dim, seed=seed)).square().mean() * scale for seed in seeds),
    )  # fmt: skip


def maps_of(network, x) -> dict[str, torch.Tensor]:
    """Every unit's feature maps, with their gradients kept."""
    maps = {}
    hooks = []
    for unit, _, module in feature_map_modules(network, channel_layout(network)):

        def keep(module, inputs, output, unit=unit):
            output = output * 1.0
            output.retain_grad()
            maps[unit] = output
            return output

        hooks.append(module.register_forward_hook(keep))
    network.train()
    network(x).square().mean().backward()
    for hook in hooks:
        hook.remove()
    return maps


@pytest.mark.parametrize("ranking", ["l1", "l2", "taylor"])
def test_stamp_ranks_by_activations_summed_over_batches(ranking):
    network = build()
    expected = torch.zeros(channel_layout(network).widths[UNIT])
    for seed in (1, 2):
        h = maps_of(network, patch(seed=seed))[UNIT]
        if ranking == "taylor":
            expected += (h * h.grad).sum([0, 2, 3]).detach()
        else:
            power = int(ranking[1])
            expected += h.detach().abs().pow(power).sum([2, 3]).pow(1 / power).mean(0)
    expected = expected.abs() / expected.norm()
    method = attached(STAMP, network, ranking=ranking, b_drop=0.5)  # of which there is none while ranking
    network.zero_grad()
    ranks = method.score(state(network, 0))[UNIT]
    torch.testing.assert_close(torch.tensor(ranks), expected, rtol=1e-4, atol=1e-6)
    assert network.training and all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("ranking", ["l2", "taylor"])
def test_as_many_batches_are_drawn_as_the_setting_says(ranking):
    network, drawn = build(), []
    method = attached(STAMP, network, ranking=ranking, prune_batches=3)
    taken = state(network, 0)
    method.score(
        replace(
            taken,
            batches=lambda count: drawn.append(count) or taken.batches(count),
            losses=lambda count: drawn.append(count) or taken.losses(count),
        )
    )
    assert drawn == [3]


def test_taylor_is_stamps_ranking_without_its_dropout():
    network, other = build(), build()
    taylor, stamp = attached(Taylor, network), attached(STAMP, other, ranking="taylor", b_drop=0.0)
    assert taylor.score(state(network, 0)) == stamp.score(state(other, 0))
    assert not hasattr(taylor, "_dropout")


@pytest.mark.parametrize("method_class", [Taylor, STAMP, AutoPruner, Sauron])
def test_measuring_leaves_no_hook_no_gradient_and_no_other_mode(method_class):
    network = build()
    method = attached(method_class, network, target_macs=0.5)
    network.encoder.eval()  # as a part that is frozen
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in network.modules()]
    kept = [p.detach().clone() for p in network.parameters()]
    assert method.measure(state(network, 3 if method_class is AutoPruner else 2)) and method.unmeasured is None
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in network.modules()] == hooks
    assert all(torch.equal(p, before) and p.grad is None for p, before in zip(network.parameters(), kept, strict=True))


@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_a_loss_scale_changes_no_rank(scale):
    network = build()
    ranks = [attached(Taylor, network).score(state(network, 0, scale=by)) for by in (1.0, scale)]
    assert ranks[0].keys() == ranks[1].keys() == channel_layout(network).widths.keys()
    for name, of_unit in ranks[0].items():
        assert ranks[1][name] == pytest.approx(of_unit)


def poison(network, unit: str, seed: int, maps: bool):
    """A unit's maps, or their gradients, are not finite for the patch of this seed."""
    marked = patch(seed=seed)

    def hook(module, inputs, output):
        if not torch.equal(seen[0], marked):
            return None
        if maps:
            return output + math.inf
        output.register_hook(lambda gradient: gradient * math.inf)
        return None

    seen = []
    network.register_forward_pre_hook(lambda module, inputs: seen.__setitem__(slice(None), inputs))
    network.get_submodule(unit).register_forward_hook(hook, prepend=True)


@pytest.mark.parametrize(("ranking", "maps"), [("taylor", False), ("taylor", True), ("l2", True), ("l1", True)])
def test_a_batch_that_overflows_in_one_layer_counts_in_none(ranking, maps):
    network, other = build(), build()
    methods = [attached(STAMP, one, ranking=ranking) for one in (network, other)]
    poison(network, "decoder.stages.1.convs.1", 3, maps)
    ranks = methods[0].score(state(network, 0, (1, 3, 2))), methods[1].score(state(other, 0, (1, 2)))
    assert ranks[0] == ranks[1] and max(max(of_unit) for of_unit in ranks[0].values()) > 0
    assert methods[0].measure(state(network, 3, (3,))) == {} and methods[0].unmeasured == NOTHING_MEASURED
    assert methods[0].measure(state(network, 3, (1,))) and methods[0].unmeasured is None


def test_targeted_dropout_by_hand():
    # Sorted: a 0.1, b 0.2, a 0.3, b 0.4, b 0.9: scores 4, 3, 2, 1, 0. S(a) = 3, S(b) = 4 / 3.
    ranks = {"a": [0.1, 0.3], "b": [0.4, 0.2, 0.9]}
    assert targeted_dropout(ranks, 0.1) == pytest.approx({"a": 0.1, "b": 0.1 * 4 / 9})
    # Without a's first: b 3, a 2, b 1, b 0.
    assert targeted_dropout({**ranks, "a": [0.3]}, 0.1) == pytest.approx({"a": 0.1, "b": 0.1 * (4 / 3) / 2})


@pytest.mark.parametrize("limit", [None, 0.1])
def test_targeted_dropout_is_that_of_the_channels_that_stay(limit):
    network = build(widths=(16, 24, 32))
    method = attached(STAMP, network, num_epochs=3, target_macs=0.3, max_fraction_per_epoch=limit)
    taken = state(network, 0)
    keep = method.measure(taken)
    assert keep
    ranks = method.score(taken)
    blocks = method.state()["dropout"]
    of_kept = {name: [of for c, of in enumerate(ranks[name]) if c in keep.get(name, range(99))] for name in blocks}
    assert blocks == pytest.approx(targeted_dropout(of_kept, 0.1))


def test_a_random_ranking_is_the_seeds_and_is_comparable_between_layers():
    network = build()
    ranks, again, other = (
        attached(STAMP, network, ranking="random", seed=seed).score(state(network, 2)) for seed in (0, 0, 1)
    )
    assert ranks == again != other
    assert {name: len(of_unit) for name, of_unit in ranks.items()} == channel_layout(network).widths
    of_all = [rank for of_unit in ranks.values() for rank in of_unit]
    assert 0 <= min(of_all) < 0.05 and 0.95 < max(of_all) < 1


def test_dropout_zeroes_whole_channels_while_training_only():
    network = build()
    method = attached(STAMP, network, b_drop=0.5)
    method._dropout = dict.fromkeys(channel_layout(network).widths, 0.5)
    seen = []
    network.get_submodule(UNIT).register_forward_hook(lambda m, i, o: seen.append(o.detach()))
    network.train()
    network(patch(batch=16))
    dropped = (seen[0] == 0).flatten(2).all(-1).float()
    assert 0.3 < dropped.mean() < 0.7
    network.eval()
    network(patch())
    assert not (seen[1] == 0).flatten(2).all(-1).any()
    assert list(network.state_dict()) == list(build().state_dict())


def test_before_its_first_ranking_stamp_drops_little_and_then_by_rank():
    network = build()
    method = attached(STAMP, network, num_epochs=10)
    assert set(method.state()["dropout"].values()) == {0.005}
    method.measure(state(network, 0))
    assert max(method.state()["dropout"].values()) == pytest.approx(0.1)
    assert len(set(method.state()["dropout"].values())) > 3


def test_stamp_leaves_transposed_convolutions_alone_unless_told():
    network = build()
    for told in (None, True):
        method = attached(STAMP, network, num_epochs=3, target_channels=0.5, transposed_convolutions=told)
        cut = {name.split(".")[1] for name in method.redundant(state(network, 1))}
        assert ("transpconvs" in cut) == bool(told)


def test_random_channels_come_from_the_layers_that_stamp_picks():
    network = build()
    stamp, chance = attached(STAMP, network, b_drop=0.0), attached(STAMPRandomChannel, network, b_drop=0.0)
    lowest, drawn = stamp.redundant(state(network, 1)), chance.redundant(state(network, 1))
    assert {n: len(c) for n, c in lowest.items()} == {n: len(c) for n, c in drawn.items()}
    assert lowest != drawn
    assert chance.redundant(state(network, 1)) == drawn  # the same after a resume


def test_the_widest_layer_loses_a_random_channel():
    network = build(widths=(6, 8, 10))
    method = attached(RandomLargestLayer, network, num_epochs=10, k=3)
    going = method.redundant(state(network, 2))
    # Three layers are 10 wide (the transposed convolutions are left alone): a channel of each goes first.
    widest = {name for name, width in channel_layout(network).widths.items() if width == 10 and "transp" not in name}
    assert sum(len(channels) for channels in going.values()) == 3
    assert set(going) <= widest and all(len(channels) <= 2 for channels in going.values())


@pytest.mark.parametrize(("architecture", "dim"), NETWORKS)
def test_filters_are_the_kernels_of_all_producers(architecture, dim):
    network = build(architecture, dim)
    layout = channel_layout(network)
    for unit in layout.units:
        kernels = filters(network, layout, unit.name)
        sizes = [network.get_submodule(name).weight.numel() for name in unit.producers]
        assert kernels.shape == (unit.width, sum(sizes) // unit.width)
    transposed = next(unit for unit in layout.units if unit.transposed)
    weight = network.get_submodule(transposed.producers[0]).weight
    torch.testing.assert_close(filters(network, layout, transposed.name)[1], weight.detach()[:, 1].flatten())


def test_l1_and_soft_scores_by_hand():
    network = build()
    kernels = filters(network, channel_layout(network), UNIT)
    n1 = kernels.abs().sum(1)
    ranks = attached(L1, network).score(state(network, 0))[UNIT]
    torch.testing.assert_close(torch.tensor(ranks), n1 / n1.norm())
    assert attached(SFP, network).order(UNIT) == kernels.square().sum(1).argsort().tolist()
    distances = torch.stack([(kernels - one).square().sum(1).sqrt().sum() for one in kernels])
    assert attached(FPGM, network).order(UNIT) == distances.argsort().tolist()


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize(("architecture", "dim"), NETWORKS)
def test_a_zeroed_channel_is_as_good_as_removed_and_grows_back(architecture, dim, norm):
    network = build(architecture, dim, norm=norm)
    layout = channel_layout(network)
    network.train()  # a batch norm's statistics of a map of zeros are those of its batch
    for unit in layout.units:
        zero_channels(network, layout, unit.name, torch.tensor([1, 3]))
    pruned = copy.deepcopy(network)
    remove_channels(pruned, {u.name: [c for c in range(u.width) if c not in (1, 3)] for u in layout.units})
    x = patch(dim)
    torch.testing.assert_close(network(x), pruned(x), rtol=1e-4, atol=1e-5)

    network.zero_grad()
    network(x).square().mean().backward()
    kernel = network.get_submodule(layout.units[0].producers[0]).weight
    assert not kernel.detach()[1].any() and kernel.grad[1].abs().max() > 0


def test_soft_methods_zero_between_epochs_and_cut_once():
    network = build(widths=(8, 8, 8))
    method = attached(SFP, network, num_epochs=10, rate=0.5)
    norms = filters(network, channel_layout(network), UNIT).norm(dim=1)
    method.start_epoch(1, channel_layout(network).widths)
    zeroed = (filters(network, channel_layout(network), UNIT).norm(dim=1) == 0).nonzero().flatten().tolist()
    assert sorted(zeroed) == sorted(norms.argsort()[:4].tolist())
    assert [e for e in range(10) if method.redundant(state(network, e))] == [7]
    assert sorted(method.redundant(state(network, 7))[UNIT]) == sorted(zeroed)


class TestCSGD:
    @pytest.mark.parametrize("norm", ["instance", "batch"])
    @pytest.mark.parametrize(("architecture", "dim"), NETWORKS)
    def test_merging_equal_filters_leaves_the_output(self, architecture, dim, norm):
        network = build(architecture, dim, norm=norm, deep_supervision=True)
        layout = channel_layout(network)
        labels = {unit.name: [c % 3 for c in range(unit.width)] for unit in layout.units}
        self.make_equal(network, layout, labels)
        network.eval()
        x = patch(dim)
        before = network(x)
        keep = {name: [0, 1, 2] for name in labels}
        for name in labels:
            merge_clusters(network, channel_layout(network), name, labels[name], keep[name])
        remove_channels(network, keep)
        assert set(channel_layout(network).widths.values()) == {3}
        for a, b in zip(network(x), before, strict=True):
            assert (a - b).abs().max() < 1e-4
            assert b.abs().max() > 0.01

    @staticmethod
    def make_equal(network, layout, labels) -> None:
        """Filters of a cluster equal in all that makes them, and in the statistics that their maps then share."""
        with torch.no_grad():
            for axis in layout.axes:
                if not axis.reads:
                    unit = axis.segments[0][0]
                    if unit is not None:
                        tensor = getattr(network.get_submodule(axis.module), axis.tensor)
                        tensor.copy_(tensor.index_select(axis.dim, torch.tensor(labels[unit])))

    def test_gradient_is_the_clusters_mean_and_a_pull_to_its_centre(self):
        network = build()
        method = attached(CSGD, network, eps=0.1)
        labels = torch.tensor(method.state()["clusters"][UNIT])
        network.train()
        network(patch()).square().mean().backward()
        before = {name: (t.detach().clone(), t.grad.clone(), d) for name, t, d in self.tensors(network)}
        method.before_update()
        for name, tensor, dim in self.tensors(network):
            weight, gradient, _ = before[name]
            for channel, label in enumerate(labels):
                members = [c for c, other in enumerate(labels) if other == label]
                mean_gradient = torch.stack([gradient.select(dim, c) for c in members]).mean(0)
                centre = torch.stack([weight.select(dim, c) for c in members]).mean(0)
                expected = mean_gradient + 0.1 * (weight.select(dim, channel) - centre)
                torch.testing.assert_close(tensor.grad.select(dim, channel), expected, rtol=1e-4, atol=1e-6)

    @staticmethod
    def tensors(network):
        found = list(tensors_of(network, channel_layout(network), UNIT))
        assert [(tensor.ndim, dim) for _, tensor, dim in found] == [(4, 0), (1, 0), (1, 0), (1, 0)]
        return [(f"{i}", tensor, dim) for i, (_, tensor, dim) in enumerate(found)]

    def test_filters_of_a_cluster_become_equal(self):
        network = build()
        method = attached(CSGD, network, eps=1.0)
        optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, nesterov=True)
        optimizer.register_step_pre_hook(lambda *_: method.before_update())
        network.train()
        for seed in range(120):
            optimizer.zero_grad()
            network(patch(seed=seed)).square().mean().backward()
            optimizer.step()
        layout = channel_layout(network)
        for name, labels in method.state()["clusters"].items():
            kernels, labels = filters(network, layout, name), torch.tensor(labels)
            for label in labels.unique():
                of_cluster = kernels[labels == label]
                assert (of_cluster - of_cluster.mean(0)).norm() < 1e-2 * kernels.norm()

    def test_clusters_are_k_means(self):
        torch.manual_seed(0)
        centres = 10 * torch.randn(3, 5)
        labels = cluster(centres[[0, 1, 2, 0, 1, 0]] + 0.01 * torch.randn(6, 5), 3)
        assert labels[0] == labels[3] == labels[5] and labels[1] == labels[4]
        assert len(set(labels)) == 3

    def test_one_of_each_cluster_stays(self):
        network = build()
        method = attached(CSGD, network, num_epochs=5, rate=0.5)
        for name, removed in method.redundant(state(network, method.cut_epoch)).items():
            labels = method.state()["clusters"][name]
            kept = [label for channel, label in enumerate(labels) if channel not in removed]
            assert sorted(kept) == sorted(set(labels))


class TestAutoPruner:
    def test_code_is_the_sigmoid_of_a_layer_on_pooled_maps(self):
        network = build()
        h = maps_of(network, patch())[UNIT].detach()
        method = attached(AutoPruner, network, num_epochs=11, rate=0.5, cut_until=0.95)
        method._layers = torch.nn.ModuleDict({method._keys[UNIT]: method._layers[method._keys[UNIT]]})
        method.start_epoch(5, channel_layout(network).widths)
        seen = []
        network.get_submodule(UNIT).register_forward_hook(lambda m, i, o: seen.append(o.detach()))
        network.train()
        network(patch())
        alpha = 1 + 99 * 5 / method.cut_epoch
        layer = method._layers[method._keys[UNIT]]
        code = torch.sigmoid(alpha * layer(h.mean([0, 2, 3]))).detach()
        torch.testing.assert_close(seen[0], h * code.view(1, -1, 1, 1))
        term = method.regulariser()
        torch.testing.assert_close(term, 10 * (code.mean() - 0.5).square())

    def test_codes_learn_become_binary_and_keep_the_wanted_part(self):
        torch.manual_seed(0)
        network = build(widths=(8, 8, 8))
        method = attached(AutoPruner, network, num_epochs=12, rate=0.5, code_lr=0.01)
        for epoch in range(method.cut_epoch + 1):
            method.start_epoch(epoch, channel_layout(network).widths)
            for seed in range(8):
                method.before_step()
                (network.train()(patch(seed=seed)).square().mean() + method.regulariser()).backward()
                method.after_step(1.0)
        batches = [patch(seed=seed) for seed in range(8)]
        sums = method._summed_codes(batches)
        codes = torch.stack([of_unit / 8 for of_unit in sums.values()])
        assert ((codes < 0.1) | (codes > 0.9)).float().mean() > 0.8
        assert abs(codes.mean() - 0.5) < 0.15
        going = method.redundant(state(network, method.cut_epoch))
        assert going.keys() == sums.keys()
        for name, channels in going.items():
            assert sorted(channels) == sorted(method._codes[name].argsort()[:4].tolist())

    def test_codes_begin_alike_everywhere_and_leave_the_random_state_alone(self, monkeypatch):
        networks, begun = [build(seed=1), build(seed=2)], []
        # It would seed every CUDA device as well, which nothing sets back.
        monkeypatch.setattr(torch, "manual_seed", lambda _: pytest.fail("everybody's random state was seeded"))
        state = torch.get_rng_state()
        for network in networks:
            begun.append(next(attached(AutoPruner, network)._layers.parameters()).detach().clone())
            assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(*begun) and 0 < begun[0].abs().max() <= begun[0].shape[1] ** -0.5

    def test_validation_sees_the_plain_network(self):
        network, other = build(), build()
        attached(AutoPruner, network)
        torch.testing.assert_close(network.eval()(patch()), other.eval()(patch()))

    def test_codes_and_their_optimiser_survive_a_resume(self):
        network = build()
        method = attached(AutoPruner, network)
        step_terms(network, method)
        state = copy.deepcopy(method.state())
        step_terms(network, method)
        again = attached(AutoPruner, build())
        again.load_state(state)
        for a, b in zip(again.state()["codes"]["layers"].values(), state["codes"]["layers"].values(), strict=True):
            assert torch.equal(a, b)
        assert again._optimizer.state_dict()["state"][0]["step"] == 1
        assert method.state()["codes"]["optimizer"]["state"][0]["step"] == 2


def step_terms(network, method) -> None:
    network.train()
    method.before_step()
    (network(patch()).square().mean() + method.regulariser()).backward()
    method.after_step(1.0)


@pytest.mark.parametrize(
    ("method_class", "bad"),
    [(STAMP, {"ranking": "l3"}), (STAMP, {"b_drop": 1.0}), (STAMP, {"k": 0}), (STAMP, {"recovery_epochs": 0}),
     (CSGD, {"eps": 0.0}), (CSGD, {"merge": True}),
     (AutoPruner, {"merge": True}), (AutoPruner, {"alpha_max": 0.5}), (AutoPruner, {"weight": -1.0}),
     (SFP, {"rate": 1.0})],
)  # fmt: skip
def test_bad_settings_are_named(method_class, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        method_class.Settings(**bad)


def test_published_names_drop_as_published_and_ours_merge():
    published = {STAMP, STAMPRandomChannel, RandomLargestLayer, L1, Taylor, SFP, FPGM, CSGD, AutoPruner}
    assert not any(method.Settings().merge for method in published)
    assert not Sauron.Settings.from_given(published=True).merge
    assert Sauron.Settings().merge and Shrink.Settings().merge


def test_a_k_that_cannot_reach_the_target_is_refused():
    network = build()
    with pytest.raises(ValueError, match=r"k=1 in 4 steps removes 4 channels.*take at least \d+"):
        attached(L1, network, num_epochs=6, k=1, target_channels=0.5)


def test_without_a_target_k_go_in_each_step():
    network = build()
    method = attached(L1, network, num_epochs=6, k=2)
    assert sum(len(c) for c in method.redundant(state(network, 1)).values()) == 2
    assert method.settings.target_channels is None
