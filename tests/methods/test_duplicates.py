"""Every method that claims to find redundancy finds known duplicates, and keeps the rest.

In each layer 6 of 12 channels are copies of one of them. The 5 that are too many must go, and no other.
"""

from __future__ import annotations

import pytest
import torch

from nnunet_sauron.methods.csgd import CSGD
from nnunet_sauron.methods.fpgm import FPGM
from nnunet_sauron.methods.sauron import PublishedSauron, Sauron
from nnunet_sauron.methods.shrink import Shrink, rank
from nnunet_sauron.pruning import CostModel, channel_layout, merge_channels, remove_channels

from ..contracts.networks import build
from .test_shrink import SIDE, batches, state

WIDTH, COPIES = 12, (1, 4, 6, 7, 9, 11)
LEFT = WIDTH - len(COPIES) + 1
RATE = 1 - LEFT / WIDTH

pytestmark = pytest.mark.parametrize("architecture", ["plain", "resenc"])


def with_copies(architecture: str) -> torch.nn.Module:
    network = build(architecture, widths=(WIDTH,) * 3).eval()
    with torch.no_grad():
        for axis in channel_layout(network).axes:
            if not axis.reads and axis.segments[0][0] is not None:
                tensor = getattr(network.get_submodule(axis.module), axis.tensor)
                for copy in COPIES[1:]:
                    tensor.select(axis.dim, copy).copy_(tensor.select(axis.dim, COPIES[0]))
    return network


def prepared(method_class: type, network, num_epochs: int = 20, **settings):
    settings = getattr(method_class.Settings, "from_given", method_class.Settings)(**settings)
    method = method_class(settings, num_epochs)
    layout = channel_layout(network)
    method.prepare(layout, CostModel(network, (SIDE, SIDE), 2), None)
    method.attach(network, layout)
    return method


def part_without_copies(network) -> float:
    cost, dense = CostModel(network, (SIDE, SIDE), 2), channel_layout(network).widths
    return cost.macs(dict.fromkeys(dense, LEFT)) / cost.macs(dense)


def assert_one_copy_and_the_rest_stay(kept, names) -> None:
    assert set(kept) == set(names)
    for name, channels in kept.items():
        assert len(set(channels) & set(COPIES)) == 1, name
        assert set(range(WIDTH)) - set(COPIES) <= set(channels), name


def assert_the_output_stays(network, keep) -> None:
    tensor = batches(1)[0]
    with torch.no_grad():
        before = network(tensor)
        merge_channels(network, keep, batches(16))
        torch.testing.assert_close(network(tensor), before, atol=2e-3, rtol=1e-3)


def test_shrinks_and_compress_ranking(architecture):
    network = with_copies(architecture)
    rankings = rank(network, batches(16), regions=False)
    keep = {name: ranking.keep(LEFT) for name, ranking in rankings.items()}
    assert_one_copy_and_the_rest_stay(keep, channel_layout(network).widths)
    assert_the_output_stays(network, keep)


@pytest.mark.parametrize("method_class", [Shrink, Sauron], ids=lambda c: c.__name__)
def test_one_tolerance_or_threshold_for_all_layers(architecture, method_class):
    network = with_copies(architecture)
    more = {"lambda_": 0, "max_fraction_per_epoch": 0.5} if method_class is Sauron else {}
    method = prepared(method_class, network, cuts=1, target_macs=part_without_copies(network) + 1e-6, **more)
    keep = method.measure(state(network, 9, is_last_cut=True))
    assert_one_copy_and_the_rest_stay(keep, channel_layout(network).widths)
    assert_the_output_stays(network, keep)


def test_delta_prune_from_random_references(architecture):
    """A reference that is a copy shows the other copies, at the lowest threshold; another one shows nothing."""
    network = with_copies(architecture)
    method = prepared(PublishedSauron, network, published=True, lambda_=0)
    left = {name: list(range(WIDTH)) for name in channel_layout(network).widths}
    for epoch in range(19):
        keep = method.measure(state(network, epoch))
        assert all(len(kept) == LEFT for kept in keep.values())
        left |= {name: [left[name][channel] for channel in kept] for name, kept in keep.items()}
        merge_channels(network, keep, batches(16))
    assert_one_copy_and_the_rest_stay(left, left)


def test_the_geometric_median(architecture):
    network = with_copies(architecture)
    method = prepared(FPGM, network, rate=RATE)
    keep = method.measure(state(network, method.cut_epoch))
    assert_one_copy_and_the_rest_stay(keep, channel_layout(network).widths)


def test_clusters_of_filters(architecture):
    network = with_copies(architecture)
    method = prepared(CSGD, network, rate=RATE)
    keep = method.measure(state(network, method.cut_epoch))
    assert_one_copy_and_the_rest_stay(keep, channel_layout(network).widths)
    tensor = batches(1)[0]
    with torch.no_grad():
        before = network(tensor)
        method.before_removal(keep)
        remove_channels(network, keep)
        torch.testing.assert_close(network(tensor), before, atol=1e-4, rtol=1e-4)
