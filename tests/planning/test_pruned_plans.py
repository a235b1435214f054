from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_sauron.planning.derive import DerivedPlans, derive_plans
from nnunet_sauron.planning.widths import Flat, PrunedWidths, Scaled
from nnunet_sauron.pruning import channel_layout, count_parameters, remove_channels
from nnunet_sauron.trainers import SauronTrainer

from .plans import network, plans, write_checkpoint


def write_pruned(path: Path, trained: dict, configuration: str = "3d_fullres", input_channels: int = 1) -> dict:
    """Write the checkpoint of a pruned network; its weights."""
    architecture = PlansManager(trained).get_configuration(configuration).configuration["architecture"]
    pruned = network(architecture, input_channels)
    layout = channel_layout(pruned)
    remove_channels(pruned, {unit.name: range(1 + i % (unit.width - 1)) for i, unit in enumerate(layout.units)})
    write_checkpoint(path, pruned.state_dict(), trained, configuration)
    return pruned.state_dict()


def build(derived: DerivedPlans, configuration: str = "3d_fullres", input_channels: int = 1, trainer=nnUNetTrainer):
    """What a trainer builds of derived plans."""
    manager = PlansManager(json.loads(derived.path.read_text()))
    return trainer.build_network_architecture(
        manager, manager.get_configuration(configuration), input_channels, 3, True
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tmp_path / "SauronTrainer__nnUNetPlans__3d_fullres" / "fold_0" / "checkpoint_final.pth"


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_stock_trainer_builds_what_pruning_left(source: Path, checkpoint: Path, residual: bool) -> None:
    trained = plans(residual)
    source.write_text(json.dumps(trained))
    weights = write_pruned(checkpoint, trained)
    derived = derive_plans(7, PrunedWidths.of_checkpoint(checkpoint))
    built = build(derived)
    assert {name: w.shape for name, w in built.state_dict().items()} == {name: w.shape for name, w in weights.items()}
    built.load_state_dict(weights)

    assert derived.name == "nnUNetPrunedPlans"
    change = derived.configurations["3d_fullres"]
    assert change.new.parameters == count_parameters(built) < change.old.parameters
    assert change.new.macs < change.old.macs
    assert change.new.feature_map_values < change.old.feature_map_values
    new = json.loads(derived.path.read_text())
    # The checkpoint's own configuration, with the data it was trained on.
    assert list(new["configurations"]) == ["3d_fullres"]
    assert new["configurations"]["3d_fullres"]["data_identifier"] == "nnUNetPlans_3d_fullres"
    origin = "SauronTrainer__nnUNetPlans__3d_fullres/fold_0/checkpoint_final.pth"
    assert new["nnunet_sauron"] == {"derived_from": "nnUNetPlans", "widths": f"from {origin}"}


def test_weights_are_not_the_checkpoints(source: Path, checkpoint: Path) -> None:
    weights = write_pruned(checkpoint, plans())
    torch.manual_seed(5)
    built = build(derive_plans(7, PrunedWidths.of_checkpoint(checkpoint)))
    name = "encoder.stages.2.0.convs.1.conv.weight"
    assert not torch.equal(built.state_dict()[name], weights[name])


def test_pruning_trainer_takes_pruned_plans_further(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    write_pruned(checkpoint, plans())
    first = derive_plans(7, PrunedWidths.of_checkpoint(checkpoint))
    further = build(first, trainer=SauronTrainer)
    layout = channel_layout(further)
    remove_channels(further, {unit.name: range(max(1, unit.width // 2)) for unit in layout.units})
    other = build(first, trainer=SauronTrainer)
    other.load_state_dict(further.state_dict())
    left = channel_layout(other).widths
    assert left == channel_layout(further).widths != layout.widths

    # And what comes out gives plans again.
    again = tmp_path / "again.pth"
    write_checkpoint(again, further.state_dict(), json.loads(first.path.read_text()))
    second = derive_plans(7, PrunedWidths.of_checkpoint(again), source=first.name, name="nnUNetTwicePrunedPlans")
    assert channel_layout(build(second)).widths == left
    third = derive_plans(7, PrunedWidths.of_checkpoint(again), name="nnUNetTwicePrunedFromDensePlans")
    assert channel_layout(build(third)).widths == left


def test_cascade_keeps_its_dense_parent_and_previous_stage(source: Path, checkpoint: Path) -> None:
    weights = write_pruned(checkpoint, plans(), "3d_cascade_fullres", input_channels=3)
    derived = derive_plans(7, PrunedWidths.of_checkpoint(checkpoint))
    assert list(derived.configurations) == ["3d_cascade_fullres"]
    new, old = json.loads(derived.path.read_text())["configurations"], plans()["configurations"]
    assert list(new) == ["3d_lowres", "3d_fullres", "3d_cascade_fullres"]
    assert (new["3d_lowres"], new["3d_fullres"]) == (old["3d_lowres"], old["3d_fullres"])
    build(derived, "3d_cascade_fullres", input_channels=3).load_state_dict(weights)


def test_checkpoint_of_wider_plans_gives_its_widths(source: Path, checkpoint: Path) -> None:
    # Wider stages, but the same topology.
    trained = plans()
    architecture = trained["configurations"]["3d_fullres"]["architecture"]
    architecture["arch_kwargs"]["features_per_stage"] = [16, 20, 24]
    wider = network(architecture)
    write_checkpoint(checkpoint, wider.state_dict(), trained)
    derived = derive_plans(7, PrunedWidths.of_checkpoint(checkpoint))
    assert channel_layout(build(derived)).widths == channel_layout(wider).widths


def test_patch_and_memory_options_hold_for_pruned_widths(source: Path, checkpoint: Path) -> None:
    write_pruned(checkpoint, plans())
    widths = PrunedWidths.of_checkpoint(checkpoint)
    change = derive_plans(7, widths, same_memory=True).configurations["3d_fullres"]
    assert change.old.feature_map_values * 0.85 < change.new.feature_map_values <= change.old.feature_map_values


def assert_refused(source: Path, complaint: str, path: Path, **arguments) -> None:
    before = sorted(source.parent.iterdir())
    with pytest.raises(ValueError, match=complaint):
        derive_plans(7, PrunedWidths.of_checkpoint(path), **arguments)
    assert sorted(source.parent.iterdir()) == before


def test_checkpoint_of_another_configuration_is_refused(source: Path, checkpoint: Path) -> None:
    write_pruned(checkpoint, plans())
    assert_refused(
        source, "trained for 3d_fullres, not for 2d; choose -c 3d_fullres", checkpoint, configurations=["2d"]
    )
    both = ["2d", "3d_fullres"]
    assert_refused(source, "trained for 3d_fullres, not for 2d", checkpoint, configurations=both)


def test_checkpoint_of_a_configuration_that_the_plans_lack_is_refused(source: Path, checkpoint: Path) -> None:
    trained = plans()
    trained["configurations"]["3d_other"] = trained["configurations"]["3d_fullres"]
    write_pruned(checkpoint, trained, "3d_other")
    assert_refused(source, "nnUNetPlans has no configuration 3d_other", checkpoint)


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({"n_conv_per_stage": [2, 1, 2]}, "n_conv_per_stage"),
        ({"strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]]}, "strides"),
        ({"kernel_sizes": [[1, 3, 3]] * 3, "conv_bias": False}, "kernel_sizes, conv_bias"),
    ],
)
def test_checkpoint_of_another_topology_is_refused(
    source: Path, checkpoint: Path, change: dict, differing: str
) -> None:
    trained = plans()
    trained["plans_name"] = "nnUNetOtherPlans"
    trained["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= change
    write_pruned(checkpoint, trained)
    complaint = f"another topology than 3d_fullres .* differs in {differing}; .* nnUNetOtherPlans"
    assert_refused(source, complaint, checkpoint)


def test_residual_checkpoint_is_no_plain_one(source: Path, checkpoint: Path) -> None:
    write_pruned(checkpoint, plans(residual=True))
    assert_refused(source, "another topology .* differs in network_class_name, n_conv_per_stage", checkpoint)


def test_checkpoint_that_does_not_fit_its_own_plans_is_refused(source: Path, checkpoint: Path) -> None:
    weights = write_pruned(checkpoint, plans())
    odd = copy.deepcopy(plans())
    odd["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["n_conv_per_stage"] = [3, 2, 2]
    write_checkpoint(checkpoint, weights, odd)
    assert_refused(source, "differs from its own plans, nnUNetPlans", checkpoint)


def test_checkpoint_of_an_unknown_network_is_refused_by_its_class(source: Path, checkpoint: Path) -> None:
    trained = plans()
    trained["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "somewhere.Transformer"
    write_checkpoint(checkpoint, {}, trained)
    assert_refused(source, "network of class somewhere.Transformer, expected PlainConvUNet", checkpoint)


def test_what_is_no_checkpoint_is_named(source: Path, checkpoint: Path) -> None:
    write_pruned(checkpoint, plans())
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2])
    assert_refused(source, "checkpoint_final.pth has no widths to take: it is truncated", checkpoint)
    torch.save({"weights": {}}, checkpoint)
    assert_refused(source, "checkpoint_final.pth .* no checkpoint of nnU-Net; give the .pth file", checkpoint)
    torch.save({"network_weights": {}}, checkpoint)
    assert_refused(source, "checkpoint_final.pth does not hold the plans it was trained with", checkpoint)
    with pytest.raises(FileNotFoundError, match="gone.pth"):
        PrunedWidths.of_checkpoint(checkpoint.with_name("gone.pth"))


def test_new_stage_widths_for_pruned_plans_are_refused(source: Path, checkpoint: Path) -> None:
    write_pruned(checkpoint, plans())
    name = derive_plans(7, PrunedWidths.of_checkpoint(checkpoint)).name
    for widths in (Flat(4), Scaled(0.5)):
        with pytest.raises(ValueError, match="PrunedPlainConvUNet, .* the plans that these were derived from"):
            derive_plans(7, widths, source=name)
