from __future__ import annotations

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_sauron.planning.networks import PrunedPlainConvUNet, PrunedResidualEncoderUNet
from nnunet_sauron.planning.widths import Flat
from nnunet_sauron.pruning import accept_pruned_weights, channel_layout, count_parameters, remove_channels
from nnunet_sauron.pruning.channels import check_prunable

from .plans import configuration, network, plans

PRUNED = {"plain": PrunedPlainConvUNet, "residual": PrunedResidualEncoderUNet}
PATCH = torch.randn((2, 1, 16, 32, 32), generator=torch.Generator().manual_seed(1))


def dense_architecture(kind: str) -> dict:
    return configuration([16, 32, 32], [], residual=kind == "residual")["architecture"]


def pruned_architecture(kind: str, widths: dict[str, int]) -> dict:
    dense = dense_architecture(kind)
    name = f"{PRUNED[kind].__module__}.{PRUNED[kind].__qualname__}"
    return {**dense, "network_class_name": name, "arch_kwargs": {**dense["arch_kwargs"], "widths": widths}}


def cut(network: nn.Module) -> dict[str, int]:
    """Take a different number of channels from every unit; the new widths."""
    layout = channel_layout(network)
    remove_channels(network, {unit.name: range(1 + i % (unit.width - 1)) for i, unit in enumerate(layout.units)})
    return channel_layout(network).widths


@pytest.mark.parametrize("kind", PRUNED)
def test_plans_of_pruned_widths_build_the_network_that_pruning_left(kind: str) -> None:
    pruned = network(dense_architecture(kind))
    widths = cut(pruned)
    built = network(pruned_architecture(kind, widths))
    assert type(built) is PRUNED[kind]
    assert channel_layout(built).widths == widths
    built.load_state_dict(pruned.state_dict())
    torch.testing.assert_close(built(PATCH), pruned(PATCH))


@pytest.mark.parametrize("kind", PRUNED)
def test_layers_narrowed_by_plans_are_initialised_as_nnunets_own(kind: str) -> None:
    built = network(pruned_architecture(kind, cut(network(dense_architecture(kind)))))
    convolutions = {n: m for n, m in built.named_modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d))}
    for name, module in convolutions.items():
        fan_in, _ = nn.init._calculate_fan_in_and_fan_out(module.weight)
        if module.weight.numel() > 1000:
            assert module.weight.detach().std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1), name
        assert module.bias is None or not module.bias.any(), name
    norms = [m for m in built.modules() if isinstance(m, nn.InstanceNorm3d)]
    assert {value for norm in norms for value in norm.weight.tolist()} == ({1.0} if kind == "plain" else {0.0, 1.0})


@pytest.mark.parametrize("kind", PRUNED)
def test_pruned_widths_can_be_pruned_further_and_accept_what_comes_out(kind: str) -> None:
    widths = {
        name: max(4, width // 2) for name, width in channel_layout(network(dense_architecture(kind))).widths.items()
    }
    architecture = pruned_architecture(kind, widths)
    check_prunable(architecture["network_class_name"])
    again = network(architecture)
    narrower = cut(again)
    assert sum(narrower.values()) < sum(widths.values())
    fresh = accept_pruned_weights(network(architecture))
    fresh.load_state_dict(again.state_dict())
    torch.testing.assert_close(fresh(PATCH), again(PATCH))


@pytest.mark.parametrize("kind", PRUNED)
def test_memory_estimate_of_pruned_widths_is_below_the_dense_networks(kind: str) -> None:
    dense = network(dense_architecture(kind))
    narrow = network(pruned_architecture(kind, dict.fromkeys(channel_layout(dense).widths, 4)))
    # Half to a third of the channels everywhere, but for the segmentation.
    ratio = narrow.compute_conv_feature_map_size((16, 32, 32)) / dense.compute_conv_feature_map_size((16, 32, 32))
    assert 1 / 3 < ratio < 0.6


@pytest.mark.parametrize(
    ("unit", "width", "complaint"),
    [
        ("encoder.stages.1.0.convs.0", 13, "13 channels, more than the 12 of features_per_stage"),
        ("encoder.stages.1.0.convs.0", 0, "at least one channel, got 0"),
        ("encoder.stages.7", 3, "no channel unit 'encoder.stages.7'"),
    ],
)
def test_widths_that_no_pruning_leaves_are_refused(unit: str, width: int, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        network(pruned_architecture("plain", {unit: width}))


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("name", ["2d", "3d_fullres"])
def test_flat_network_built_by_nnunets_trainer_loses_channels(residual: bool, name: str) -> None:
    lean = plans(residual)
    chosen = lean["configurations"][name]
    chosen["architecture"] = Flat(6).architecture(name, chosen["architecture"])
    manager = PlansManager(lean)
    built = nnUNetTrainer.build_network_architecture(manager, manager.get_configuration(name), 1, 3, True)
    assert set(channel_layout(built).widths.values()) == {6}
    before = count_parameters(built)
    remove_channels(built, {unit: [0, 2, 5] for unit in channel_layout(built).widths})
    assert set(channel_layout(built).widths.values()) == {3}
    assert count_parameters(built) < before / 2
    outputs = built(torch.randn((2, 1, *chosen["patch_size"])))
    assert tuple(outputs[0].shape) == (2, 3, *chosen["patch_size"])
