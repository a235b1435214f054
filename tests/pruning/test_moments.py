"""What maps sum up to, and which of their positions count how much."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_sauron.pruning import channel_layout, position_weights
from nnunet_sauron.pruning.moments import Moments, collect_moments, patches_needed

from ..contracts.networks import build, patch


def moments_of(*feature_maps: torch.Tensor) -> Moments:
    moments = Moments(feature_maps[0].shape[1])
    for maps in feature_maps:
        moments.add(maps)
    return moments


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
            monkeypatch.setattr("nnunet_sauron.pruning.moments.VALUES_AT_ONCE", pieces)
            moments = Moments(3)
            moments.add(maps, weights=weights)
            torch.testing.assert_close(moments.count, counts.sum())
            np.testing.assert_allclose(moments.mean, np.average(samples, axis=1, weights=counts))
            np.testing.assert_allclose(moments.covariance, np.cov(samples, aweights=counts, ddof=0))

    @pytest.mark.parametrize("pieces", [1 << 22, 300, 21])
    def test_more_maps_are_further_channels(self, pieces, monkeypatch):
        monkeypatch.setattr("nnunet_sauron.pruning.moments.VALUES_AT_ONCE", pieces)
        maps, more, weights = torch.randn(3, 2, 5, 4), torch.randn(3, 4, 5, 4), torch.rand(3, 5, 4)
        expected, moments = Moments(6), Moments(6)
        expected.add(torch.cat([maps, more], 1), weights)
        moments.add(maps, weights, more)
        torch.testing.assert_close(moments.products, expected.products)
        torch.testing.assert_close(moments.total, expected.total)

    def test_a_large_mean_does_not_drown_the_variance(self):
        maps = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0)) + 3000
        variance = maps.double().flatten(2).var(-1, correction=0)[0]
        torch.testing.assert_close(moments_of(maps).covariance.diagonal(), variance, rtol=1e-6, atol=0)

    def test_large_maps_are_taken_in_pieces(self, monkeypatch):
        maps = torch.randn(1, 3, 10, 10)
        whole = moments_of(maps)
        monkeypatch.setattr("nnunet_sauron.pruning.moments.VALUES_AT_ONCE", 21)
        torch.testing.assert_close(moments_of(maps).products, whole.products)

    def test_the_forward_stops_after_the_last_place(self):
        network, seen = build(), []
        network.decoder.register_forward_pre_hook(lambda *_: seen.append("decoder"))
        place = channel_layout(network).units[0].feature_maps[0]
        assert collect_moments(network, [place], [patch()])[place].count == 2 * 16 * 16
        assert seen == [] and network.training

    def test_float16_maps_are_summed_in_float64(self):
        assert moments_of(torch.randn(3, 6, 8, 8).half()).products.dtype == torch.float64


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
        with pytest.raises(
            ValueError, match=r"Weights of positions have the shapes \[\(1, 3, 3\)\]; for these inputs they must be"
        ):
            collect_moments(network, [], [patch()], [torch.ones(1, 3, 3)])


def test_the_patches_needed_are_those_of_the_layer_with_the_fewest_positions_a_channel():
    assert patches_needed({"wide": 1024, "deep": 8}, {"wide": 32, "deep": 320}, 4) == 160
    assert patches_needed({"wide": 1024, "deep": 1000}, {"wide": 32, "deep": 320}, 4) == 2
