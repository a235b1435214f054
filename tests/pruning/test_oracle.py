"""torch-pruning, an independent tracer of dependencies, agrees with our symbolic pass about every shape."""

from __future__ import annotations

import random

import pytest
import torch
import torch_pruning
from torch import nn

from nnunet_sauron.pruning import channel_layout, remove_channels

from ..contracts.networks import EQUAL_WIDTHS, WIDTHS, build, patch


@pytest.mark.parametrize("widths", [WIDTHS, EQUAL_WIDTHS], ids=["rising", "equal"])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("architecture", ["plain", "basic", "bottleneck"])
def test_shapes_agree_with_torch_pruning(architecture, dim, widths):
    network = build(architecture, dim, widths)
    draw = random.Random(1)
    for unit in channel_layout(network).units:
        # Deep supervision, so that the tracer sees every head.
        judged = traceable(build(architecture, dim, widths, deep_supervision=True))
        ours = build(architecture, dim, widths)
        gone = sorted(draw.sample(range(unit.width), draw.randint(1, unit.width - 1)))
        remove_channels(ours, {unit.name: [i for i in range(unit.width) if i not in gone]})

        graph = torch_pruning.DependencyGraph().build_dependency(judged, patch(dim, side=8))
        producer = judged.get_submodule(unit.producers[0])
        prune = torch_pruning.prune_conv_out_channels
        group = graph.get_pruning_group(producer, prune, idxs=gone)
        assert graph.check_pruning_group(group), unit.name
        group.prune()
        expected = {name: tuple(p.shape) for name, p in judged.named_parameters()}
        assert {name: tuple(p.shape) for name, p in ours.named_parameters()} == expected, unit.name


def traceable(network: nn.Module) -> nn.Module:
    """torch-pruning loses its way where an in-place activation overwrites a norm's view: give it a copy."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.register_forward_hook(lambda m, i, out: out.clone())
    return network.eval()


def test_all_channels_of_the_first_layer_are_judged_not_only_their_number():
    """The judge removes the same channels, not just as many: weights agree as well."""
    ours, judged = build("plain", 2), traceable(build("plain", 2))
    unit = channel_layout(ours).units[3]
    remove_channels(ours, {unit.name: [0, 2, 5]})
    graph = torch_pruning.DependencyGraph().build_dependency(judged, patch(2, side=8))
    gone = [i for i in range(unit.width) if i not in (0, 2, 5)]
    graph.get_pruning_group(
        judged.get_submodule(unit.producers[0]), torch_pruning.prune_conv_out_channels, idxs=gone
    ).prune()
    for (name, a), b in zip(ours.named_parameters(), judged.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
