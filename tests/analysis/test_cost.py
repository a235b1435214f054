from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from nnunet_sauron.analysis.cost import network_cost
from nnunet_sauron.pruning.cost import forward_on_meta

FLOAT = 4  # bytes


def test_convolutions_are_counted_as_by_hand():
    # 3x3 on 8x10, 2 -> 5 channels; then a 2x2 transposed one of stride 2, 5 -> 3 channels.
    network = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.ConvTranspose2d(5, 3, 2, stride=2))
    cost = network_cost(network, (8, 10), 2)
    assert cost.parameters == (2 * 5 * 9 + 5) + (5 * 3 * 4 + 3)
    assert cost.macs == 80 * 2 * 5 * 9 + 80 * 5 * 3 * 4
    assert cost.flops == 2 * cost.macs


def test_peak_memory_is_weights_input_and_the_most_that_is_alive_at_once():
    # While the second convolution runs: input (held by its caller), its own input of 8 maps, its output of 2.
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.LeakyReLU(inplace=True), nn.Conv2d(8, 2, 3, padding=1))
    weights = sum(parameter.numel() for parameter in network.parameters())
    assert network_cost(network, (10, 10), 1).peak_memory_bytes == FLOAT * (weights + 100 * (1 + 8 + 2))


def test_an_activation_out_of_place_costs_a_map_more():
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.LeakyReLU(), nn.Conv2d(8, 2, 3, padding=1))
    weights = sum(parameter.numel() for parameter in network.parameters())
    assert network_cost(network, (10, 10), 1).peak_memory_bytes == FLOAT * (weights + 100 * (1 + 8 + 8))


def test_weights_on_disk_are_counted_once_where_modules_have_two_names():
    layer = nn.Conv2d(64, 64, 3)
    network = nn.ModuleDict({"a": layer, "b": layer})
    network.forward = layer.forward
    size = network_cost(network, (8, 8), 64).weights_bytes
    assert FLOAT * 64 * 64 * 9 < size < FLOAT * 64 * 64 * 9 + 4000


def test_counting_leaves_weights_mode_and_memory_alone():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network_cost(network, (8, 8), 1)
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    gc.collect()
    assert not [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and one.device.type == "meta"]


@pytest.mark.parametrize("hooked", [False, True])
def test_forward_on_meta_enters_its_context_for_the_forward_alone(hooked):
    seen = []

    class Context:
        def __enter__(self):
            seen.append("in")

        def __exit__(self, *_):
            seen.append("out")

    network = nn.Conv2d(1, 1, 1)
    hooks = {network: lambda *_: seen.append("forward")} if hooked else None
    forward_on_meta(network, (4, 4), 1, hooks, Context())
    assert seen == (["in", "forward", "out"] if hooked else ["in", "out"])
