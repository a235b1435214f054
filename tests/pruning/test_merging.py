"""The algebra of merging; what it does to whole networks stands in the contract of pruned networks."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_sauron.pruning import channel_layout, merge_channels, position_weights, rank_units
from nnunet_sauron.pruning.merging import PROBED, Moments, collect_moments, rank_channels

from ..contracts.networks import build, patch


def moments_of(*feature_maps: torch.Tensor) -> Moments:
    moments = Moments(feature_maps[0].shape[1])
    for maps in feature_maps:
        moments.add(maps)
    return moments


def correlated_maps(channels: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(channels, channels, generator=generator)
    return torch.einsum("cd,bdhw->bchw", mixed, torch.randn(3, channels, 8, 8, generator=generator)) + 5


class TestMoments:
    def test_they_are_those_of_all_positions_together(self):
        parts = [torch.randn(2, 5, 6, 7) + 3, torch.randn(1, 5, 4, 3)]
        moments = moments_of(*parts)
        samples = torch.cat([p.transpose(0, 1).flatten(1) for p in parts], 1).double()
        assert moments.count == samples.shape[1]
        torch.testing.assert_close(moments.mean, samples.mean(1))
        torch.testing.assert_close(moments.covariance, torch.cov(samples, correction=0))

    def test_positions_count_by_their_weights(self, monkeypatch):
        maps, weights = torch.randn(2, 3, 5, 4) + 3, torch.rand(2, 5, 4)
        samples, counts = maps.transpose(0, 1).flatten(1).double(), weights.flatten().double()
        for pieces in (1 << 22, 21):
            monkeypatch.setattr("nnunet_sauron.pruning.merging.VALUES_AT_ONCE", pieces)
            moments = Moments(3)
            moments.add(maps, weights)
            torch.testing.assert_close(moments.count, counts.sum())
            np.testing.assert_allclose(moments.mean, np.average(samples, axis=1, weights=counts))
            np.testing.assert_allclose(moments.covariance, np.cov(samples, aweights=counts, ddof=0))

    def test_a_large_mean_does_not_drown_the_variance(self):
        maps = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0)) + 3000
        variance = maps.double().flatten(2).var(-1, correction=0)[0]
        torch.testing.assert_close(moments_of(maps).covariance.diagonal(), variance, rtol=1e-6, atol=0)

    def test_large_maps_are_taken_in_pieces(self, monkeypatch):
        maps = torch.randn(1, 3, 10, 10)
        whole = moments_of(maps)
        monkeypatch.setattr("nnunet_sauron.pruning.merging.VALUES_AT_ONCE", 21)
        torch.testing.assert_close(moments_of(maps).products, whole.products)

    def test_the_forward_stops_after_the_last_place(self):
        network, seen = build(), []
        network.decoder.register_forward_pre_hook(lambda *_: seen.append("decoder"))
        place = channel_layout(network).units[0].feature_maps[0]
        assert collect_moments(network, [place], [patch()])[place].count == 2 * 16 * 16
        assert seen == [] and network.training


class TestPositionWeights:
    """Of networks whose logits are the input."""

    @staticmethod
    def of(*logits: torch.Tensor, regions: bool = False) -> list[torch.Tensor]:
        network = nn.Conv2d(3, 3, 1, bias=False)
        with torch.no_grad():
            network.weight.copy_(torch.eye(3)[..., None, None])
        found = position_weights(network, logits, regions=regions)
        assert network.training
        return found

    def test_most_of_it_goes_by_the_standard_deviation_of_the_label(self):
        logits = [torch.randn(2, 3, 4, 5), 3 * torch.randn(1, 3, 2, 2)]
        for regions, function in ((False, lambda x: x.softmax(1)), (True, torch.sigmoid)):
            spread = [(function(x) * (1 - function(x))).sum(1).sqrt() for x in logits]
            mean = torch.cat([s.flatten() for s in spread]).mean()
            for found, expected in zip(self.of(*logits, regions=regions), spread, strict=True):
                torch.testing.assert_close(found, 0.7 * expected / mean + 0.3)

    def test_where_the_network_is_sure_of_everything_all_positions_count_alike(self):
        (found,) = self.of(torch.tensor([1e4, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4))
        assert (found == 1).all()

    def test_it_is_the_finest_of_several_outputs(self):
        network = build(dim=2)
        network.decoder.deep_supervision = True
        assert [w.shape for w in position_weights(network, [patch()])] == [(len(patch()), *patch().shape[2:])]

    def test_layers_of_lower_resolution_get_their_average(self):
        network, tensor = build(dim=2), patch()
        weights = torch.zeros(len(tensor), *tensor.shape[2:])
        weights[:, :2, :2] = 1
        name = "encoder.stages.1.0.convs.0"
        seen = []
        network.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
        moments = collect_moments(network, [name], [tensor], [weights])[name]
        expected = seen[0].double()[:, :, 0, 0].mean(0)  # the one position under those four
        torch.testing.assert_close(moments.mean, expected)

    def test_weights_of_other_shapes_are_refused(self):
        network = build(dim=2)
        with pytest.raises(ValueError, match=r"Weights of positions are \[\(1, 3, 3\)\]; of these inputs they are"):
            rank_units(network, [patch()], [torch.ones(1, 3, 3)])

    def test_a_fit_is_best_where_positions_count(self):
        """Two halves of an image, each with its own best fit of the channel that goes."""
        network, tensor = build(dim=2).eval(), patch(seed=2)
        half = torch.zeros(len(tensor), *tensor.shape[2:])
        half[:, :8] = 1
        outputs = {}
        for name, weights in (("upper", [half]), ("lower", [1 - half]), ("all", None), ("before", None)):
            merged = copy.deepcopy(network)
            if name != "before":
                merge_channels(merged, {"encoder.stages.0.0.convs.0": [0, 1, 2, 3, 4]}, [tensor], weights=weights)
            reader = merged.encoder.stages[0][0].convs[1].conv
            reader.register_forward_hook(lambda module, inputs, output, name=name: outputs.update({name: output}))
            with torch.no_grad():
                merged(tensor)
        errors = {name: (output - outputs["before"]).square().sum(1) for name, output in outputs.items()}
        for name, other, part in (("upper", "lower", half), ("lower", "upper", 1 - half)):
            assert (errors[name] * part).sum() < (errors["all"] * part).sum() < (errors[other] * part).sum()


class TestRanking:
    def test_each_error_is_what_least_squares_leaves_of_the_readers_output(self):
        maps, filters = correlated_maps(), torch.randn(6, 4).double()
        moments = moments_of(maps)
        ranking = rank_channels([moments], [filters @ filters.T])
        samples = (maps.transpose(0, 1).flatten(1).double() - moments.mean[:, None]).T
        read = samples @ filters
        for kept in range(7):
            chosen = samples[:, list(ranking.order[:kept])]
            left = samples - chosen @ torch.linalg.lstsq(chosen, samples).solution if kept else samples
            lost = (left @ filters).square().sum() / read.square().sum()
            assert ranking.errors[kept] == pytest.approx(float(lost), abs=1e-9)

    def test_each_choice_is_the_best_next_one(self):
        maps, filters = correlated_maps(), torch.randn(6, 4).double()
        moments = moments_of(maps)
        ranking = rank_channels([moments], [filters @ filters.T])
        covariance = moments.covariance
        for k in range(5):
            errors = {}
            for channel in set(range(6)) - set(ranking.order[:k]):
                kept = [*ranking.order[:k], channel]
                of_kept = covariance[:, kept]
                left = covariance - of_kept @ torch.linalg.solve(covariance[kept][:, kept], of_kept.T)
                errors[channel] = float((filters.T @ left @ filters).trace())
            assert ranking.order[k] == min(errors, key=errors.get)

    def test_a_channel_that_nobody_needs_is_chosen_last(self):
        filters = torch.eye(6).double()
        filters[2] = 0
        independent = torch.randn(4, 6, 16, 16, generator=torch.Generator().manual_seed(0))
        assert rank_channels([moments_of(independent)], [filters @ filters.T]).order[-1] == 2

    def test_places_are_decided_together(self):
        """Channel 0 can be had from 1 in one place, but not in the other: it stays."""
        maps = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(0))
        equal = maps.clone()
        equal[:, 1] = equal[:, 0]
        unit = torch.eye(2).double()
        assert rank_channels([moments_of(equal)], [unit]).errors[1] < 1e-9
        assert rank_channels([moments_of(equal), moments_of(maps)], [unit, unit]).errors[1] > 0.1

    def test_a_place_that_nobody_reads_has_no_say(self):
        maps, filters = correlated_maps(), torch.randn(6, 4).double()
        moments, weight = moments_of(maps), filters @ filters.T
        alone = rank_channels([moments], [weight])
        beside = rank_channels([moments, moments], [weight, torch.zeros(6, 6).double()])
        assert beside.order == alone.order and beside.errors == pytest.approx(alone.errors)

    def test_constant_maps_and_unread_places_give_a_ranking(self):
        still = moments_of(torch.ones(1, 3, 4, 4))
        ranking = rank_channels([still], [torch.eye(3).double()])
        assert sorted(ranking.order) == [0, 1, 2] and ranking.errors[-1] == 0
        assert ranking.least(0.01) == 1

    def test_least_is_the_fewest_within_the_tolerance(self):
        ranking = rank_channels([moments_of(correlated_maps())], [torch.eye(6).double()])
        for tolerance in (0.5, 0.1, 0.01, 0.0):
            k = ranking.least(tolerance)
            assert ranking.errors[k] <= tolerance and (k == 1 or ranking.errors[k - 1] > tolerance)


class TestBorder:
    """Maps that differ by a constant: the reader's bias takes it on, but at the border it is 0 that is read."""

    @pytest.fixture
    def shifted(self):
        network = build(dim=2).eval()
        unit = next(u for u in channel_layout(network).units if u.transposed)
        conv = network.get_submodule(unit.producers[0])
        with torch.no_grad():
            conv.weight[:, 1] = conv.weight[:, 0]
            conv.bias[1] = conv.bias[0] + 0.7
        return network, unit

    def test_inside_it_is_exact_and_at_the_border_bounded(self, shifted):
        network, unit = shifted
        reader = network.decoder.stages[0].convs[0].conv
        read = reader.weight[:, 1].detach().abs().sum(dim=(1, 2))
        merged = copy.deepcopy(network)
        keep = [c for c in range(unit.width) if c != 1]
        merge_channels(merged, {unit.name: keep}, [patch(seed=2)])

        outputs = []
        for each in (network, merged):
            module = each.decoder.stages[0].convs[0].conv
            module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
            with torch.no_grad():
                each(patch())
        difference = (outputs[0] - outputs[1]).abs()
        assert difference[..., 1:-1, 1:-1].max() < 1e-4
        at_border = difference.amax(dim=(0, 2, 3))
        assert at_border.max() > 1e-3
        assert (at_border <= 0.7 * read + 1e-4).all()


class TestReaders:
    @pytest.mark.parametrize("reader", ["transposed", "without bias"])
    def test_who_cannot_carry_a_constant_gets_the_fit_without_one(self, reader):
        """A transposed convolution's taps fall on different voxels; a reader without a bias has nowhere to put it."""
        network = build(dim=2).eval()
        if reader == "transposed":
            name, conv = "encoder.stages.2.0.convs.1", network.decoder.transpconvs[0]
        else:
            name, conv = "encoder.stages.0.0.convs.0", network.encoder.stages[0][0].convs[1].conv
            conv.bias = None
        before = conv.weight.detach().double().clone().transpose(0, 0 if reader == "transposed" else 1)
        moments = collect_moments(network, [name], [patch(seed=2)])[name]
        width = len(moments.total)
        kept = list(range(1, width))
        second = moments.products / moments.count
        fit = torch.linalg.solve(second[1:, 1:], second[1:, 0])
        merge_channels(network, {name: kept}, [patch(seed=2)])
        after = conv.weight.detach().double().transpose(0, 0 if reader == "transposed" else 1)
        expected = before[1:] + fit.view(-1, 1, 1, 1) * before[0]
        torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("ridge", [0, 1e9])
    def test_a_fit_aims_at_the_maps_before_any_cut(self, ridge, monkeypatch):
        """The second of two cuts mends what the first left wrong, by least squares, as far as a ridge lets it."""
        monkeypatch.setattr("nnunet_sauron.pruning.merging.AIM_RIDGE", ridge)
        network, tensor = build(dim=2).eval(), patch(seed=2)
        first, second = "encoder.stages.0.0.convs.0", "encoder.stages.0.0.convs.1"
        kept, maps = [0, 2, 3], []
        reader = network.encoder.stages[1][0].convs[0].conv
        weight, bias = (tensor.detach().double().clone() for tensor in (reader.weight, reader.bias))
        once = copy.deepcopy(network)
        merge_channels(once, {first: [0, 1]}, [tensor])
        for each in (network, once):
            hook = each.get_submodule(second).register_forward_hook(lambda m, i, out: maps.append(out.double()))
            with torch.no_grad():
                each(tensor)
            hook.remove()
        aims, samples = (m.transpose(0, 1).flatten(1).T for m in maps)
        with_one = torch.cat([samples[:, kept], torch.ones(len(samples), 1)], 1)
        fit = torch.linalg.lstsq(with_one, samples if ridge else aims).solution[:-1]
        offset = aims.mean(0) - samples[:, kept].mean(0) @ fit
        merge_channels(network, {first: [0, 1], second: kept}, [tensor])
        expected = torch.einsum("kc,ochw->okhw", fit, weight)
        torch.testing.assert_close(reader.weight.double(), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(reader.bias.double(), bias + torch.einsum("c,ochw->o", offset, weight))

    def test_float16_maps_are_summed_in_float64(self):
        assert moments_of(correlated_maps().half()).products.dtype == torch.float64


def test_nothing_changes_when_what_is_asked_for_is_wrong():
    network = build()
    before = copy.deepcopy(network.state_dict())
    name = channel_layout(network).units[0].name
    for keep, inputs, said in (
        ({"nowhere": [3]}, [patch()], "There is no channel unit 'nowhere'"),
        ({name: []}, [patch()], "would lose all"),
        ({name: [2, 7]}, [patch()], "in 0..5"),
        ({name: [3, 1]}, [patch()], "ascending"),
        ({name: [3]}, [], "needs inputs"),
    ):
        with pytest.raises(ValueError, match=said):
            merge_channels(network, keep, inputs)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_what_hooks_belong_to_is_not_copied():
    """A trainer's hooks hold maps with their graphs, which cannot be copied."""
    network, name = build(dim=2), "encoder.stages.1.0.convs.0"

    class Owner:
        def __init__(self):
            self.maps = []

        def observe(self, module, inputs, output):
            self.maps.append(output)

    network.get_submodule(name).register_forward_hook(Owner().observe)
    network(patch())
    merge_channels(network, {name: [0, 1]}, [patch(seed=2)])
    assert channel_layout(network).widths[name] == 2


@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_a_layer_whose_maps_are_constant_merges_into_one_channel(bias):
    network = build(dim=2).eval()
    norm = network.encoder.stages[1][0].convs[0].norm
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.fill_(bias)
        expected = network(patch())
    merge_channels(network, {"encoder.stages.1.0.convs.0": [2]}, [patch(seed=2)])
    with torch.no_grad():
        difference = network(patch()) - expected
    assert difference.isfinite().all()
    if bias == 0:
        assert difference.abs().max() < 1e-4


class TestRankUnits:
    def test_every_input_is_run_once_and_few_of_them_once_more_for_every_unit(self):
        network, forwards, done = build(), [], []
        network.encoder.register_forward_pre_hook(lambda *_: forwards.append(1))
        rankings = rank_units(network, [patch(seed=i) for i in range(PROBED + 3)], after_probe=done.append)
        assert {name: len(r.order) for name, r in rankings.items()} == channel_layout(network).widths
        assert len(forwards) == PROBED + 3 + PROBED * (1 + len(rankings))
        assert done == PROBED * list(rankings) and network.training

    @pytest.mark.parametrize("regions", [False, True])
    @pytest.mark.parametrize("architecture", ["plain", "residual"])
    def test_sensitivity_is_how_far_the_output_diverges_for_an_error(self, architecture, regions):
        """Every unit's maps replaced, in all of their places, by least squares from the channels that stay."""
        network, inputs = build(architecture).eval(), [patch(seed=2), patch(seed=3)]
        divergences = {}
        rankings = rank_units(network, inputs, regions=regions)
        expected = [distribution(network, x, regions) for x in inputs]
        for unit in channel_layout(network).units:
            ranking = rankings[unit.name]
            kept = ranking.keep(min(ranking.least(0.1), unit.width - 1))
            maps = {place: [] for place in unit.feature_maps}
            with hooked(network, {place: found.append for place, found in maps.items()}):
                for x in inputs:
                    distribution(network, x, regions)
            refits = {}
            for place, found in maps.items():
                samples = torch.cat([m.transpose(0, 1).flatten(1).T for m in found]).double()
                ones = torch.ones(len(samples), 1)
                fit = torch.linalg.lstsq(torch.cat([samples[:, kept], ones], 1), samples).solution

                def refit(out, fit=fit, kept=kept):
                    channels_last = out.movedim(1, -1).double()
                    with_one = torch.cat([channels_last[..., kept], torch.ones_like(channels_last[..., :1])], -1)
                    return (with_one @ fit).movedim(-1, 1).float()

                refits[place] = refit
            with hooked(network, refits):
                after = [distribution(network, x, regions) for x in inputs]
            lost = sum((p * (p / q).log()).sum() for p, q in zip(expected, after, strict=True))
            divergences[unit.name] = float(lost) / ranking.errors[len(kept)]
        mean = np.exp(np.mean(np.log(list(divergences.values()))))
        found = {name: ranking.sensitivity for name, ranking in rankings.items()}
        assert found == pytest.approx({name: d / mean for name, d in divergences.items()}, rel=1e-3)
        assert max(found.values()) > 10 * min(found.values())

    def test_an_output_that_tells_nothing_gives_a_ranking_all_the_same(self):
        network = build()
        with torch.no_grad():
            for parameter in network.decoder.seg_layers[-1].parameters():
                parameter.zero_()
        assert {r.sensitivity for r in rank_units(network, [patch()]).values()} == {1.0}


@contextlib.contextmanager
def hooked(network: nn.Module, functions: dict):
    """What a function of a module's output returns, if anything, takes its place."""
    hooks = [
        network.get_submodule(name).register_forward_hook(lambda m, i, out, function=function: function(out))
        for name, function in functions.items()
    ]
    yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def distribution(network: nn.Module, tensor: torch.Tensor, regions: bool) -> torch.Tensor:
    logits = network(tensor).double()
    return torch.stack([logits.sigmoid(), (-logits).sigmoid()]) if regions else logits.softmax(1)
