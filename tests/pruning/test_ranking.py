"""Which channels of a layer are worth keeping, and how much its errors count."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_sauron.analysis.cost import _LiveTensors
from nnunet_sauron.pruning import channel_layout, position_weights, rank_units
from nnunet_sauron.pruning.ranking import PROBED, rank_channels

from ..contracts.networks import build, patch
from .test_moments import moments_of


def correlated_maps(channels: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(channels, channels, generator=generator)
    return torch.einsum("cd,bdhw->bchw", mixed, torch.randn(3, channels, 8, 8, generator=generator)) + 5


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

    def test_without_inputs_there_is_nothing_to_measure(self):
        network = build()
        for measure in (rank_units, position_weights):
            with pytest.raises(ValueError, match="There are no inputs"):
                measure(network, [])

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

    @pytest.mark.parametrize("regions", [False, True])
    def test_many_classes_need_no_more_memory_than_a_prediction(self, monkeypatch, regions):
        """Of which nnU-Net's logits, and the sum of them over windows in half precision, are the largest part."""
        monkeypatch.setattr("nnunet_sauron.pruning.moments.VALUES_AT_ONCE", 1 << 12)
        network, inputs = build(widths=(4, 8), classes=120), [patch(batch=1, side=64, seed=i) for i in range(2)]
        prediction, ranking = _LiveTensors(), _LiveTensors()
        with torch.no_grad(), prediction:
            logits = network.eval()(inputs[0])
            sums = logits.half()
        assert prediction.peak >= logits.nbytes + sums.nbytes
        with ranking:
            weights = position_weights(network, inputs, regions=regions)
            rank_units(network, inputs, weights, regions=regions)
        assert ranking.peak < prediction.peak

    def test_it_does_not_matter_how_many_positions_are_taken_at_once(self, monkeypatch):
        network, inputs = build(), [patch(seed=2), patch(seed=3)]
        found = []
        for at_once in (1 << 22, 100):
            monkeypatch.setattr("nnunet_sauron.pruning.moments.VALUES_AT_ONCE", at_once)
            weights = position_weights(network, inputs)
            found.append(({n: r.sensitivity for n, r in rank_units(network, inputs, weights).items()}, weights))
        assert found[0][0] == pytest.approx(found[1][0])
        torch.testing.assert_close(found[0][1], found[1][1])

    def test_a_head_of_another_kernel_is_run_as_it_is(self):
        one, other = build(), build()
        wide = nn.Conv2d(6, 3, 3, padding=1)
        with torch.no_grad():
            wide.weight.zero_()[..., 1:2, 1:2] = one.decoder.seg_layers[-1].weight
            wide.bias.copy_(one.decoder.seg_layers[-1].bias)
        other.decoder.seg_layers[-1] = wide
        torch.testing.assert_close(position_weights(one, [patch()]), position_weights(other, [patch()]))

    def test_what_is_left_alone_keeps_every_channel(self):
        name = channel_layout(build()).units[1].name
        found = rank_units(build(), [patch()], left_alone=[name])
        assert found[name].least(1e9) == len(found[name].order) and found[name].sensitivity == 1
        assert all(ranking.least(0.5) < len(ranking.order) for other, ranking in found.items() if other != name)

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
