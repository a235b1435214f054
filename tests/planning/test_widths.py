from __future__ import annotations

import copy

import pytest

from nnunet_sauron.planning.widths import Flat, PerStage, Scaled

from .plans import UNETS, configuration


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Flat(0), "width 0 is not from 1 to 8192"),
        (lambda: Flat(10**8), "width 100000000 is not from 1 to 8192"),
        (lambda: PerStage((8, -1, 8)), "width -1 is not from 1"),
        (lambda: PerStage(()), "no widths"),
        (lambda: Scaled(0), "scale is 0, which must be above 0"),
        (lambda: Scaled(-0.5), "scale is -0.5"),
        (lambda: Scaled(float("nan")), "scale is nan"),
        (lambda: Scaled(float("inf")), "scale is inf"),
        (lambda: Scaled(1e6).of_stages("2d", [8, 16]), "width 8000000 is not from 1"),
    ],
)
def test_widths_that_no_layer_can_have_are_refused(make, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()


def test_architecture_it_was_given_stays_as_it_was() -> None:
    old = configuration([32, 32], [])["architecture"]
    before = copy.deepcopy(old)
    assert Flat(4).architecture("2d", old)["arch_kwargs"]["features_per_stage"] == [4, 4, 4]
    assert old == before


def test_single_number_of_features_means_every_stage() -> None:
    old = configuration([32, 32], [])["architecture"]
    old["arch_kwargs"]["features_per_stage"] = 8
    assert Scaled(0.5).architecture("2d", old)["arch_kwargs"]["features_per_stage"] == [4, 4, 4]


def test_network_of_another_class_is_refused_by_name() -> None:
    old = configuration([32, 32], [])["architecture"]
    old["network_class_name"] = f"{UNETS}.ResidualUNet"
    with pytest.raises(ValueError, match="2d has a network of class ResidualUNet, expected PlainConvUNet or Resid"):
        Flat(4).architecture("2d", old)


def test_networks_of_pruned_widths_are_sent_back_to_where_they_come_from() -> None:
    old = configuration([32, 32], [])["architecture"]
    old["network_class_name"] = "nnunet_sauron.planning.networks.PrunedPlainConvUNet"
    with pytest.raises(ValueError, match="PrunedPlainConvUNet, .* give -p the plans that these were derived from"):
        Flat(4).architecture("2d", old)


@pytest.mark.parametrize("name", ["stem_channels", "bottleneck_channels"])
def test_widths_beside_those_of_stages_are_refused(name: str) -> None:
    old = configuration([32, 32], [], residual=True)["architecture"]
    old["arch_kwargs"][name] = 16
    with pytest.raises(ValueError, match=f"2d sets {name}=16"):
        Flat(4).architecture("2d", old)
