"""Threshold: C1, C2 and C3 each alone, the waiting, and the ladder."""

from __future__ import annotations

import pytest

from nnunet_sauron.methods.sauron_settings import SauronSettings
from nnunet_sauron.methods.thresholds import Threshold

SETTLED_TRAIN = [1.0, 0.6, 0.8]  # with rho = 2 the last lies between the two before it
SETTLED_VAL = [0.5, 0.4, 0.45]
STEADY = [100, 100, 100]


def threshold(**changes) -> Threshold:
    return Threshold(**{"tau_max": 0.3, "kappa": 10, "rho": 2, "mu": 0.02, **changes})


def test_rises_one_linear_step_when_all_three_conditions_hold():
    tau = threshold()
    assert tau.value == pytest.approx(0.001)
    assert tau.update(SETTLED_TRAIN, SETTLED_VAL, STEADY) == pytest.approx(0.001 + 0.0299)
    assert tau.value == pytest.approx(0.0309)


@pytest.mark.parametrize(
    ("train", "val", "widths"),
    [
        ([1.0, 0.6, 0.5], SETTLED_VAL, STEADY),
        ([1.0, 0.6, 1.1], SETTLED_VAL, STEADY),
        ([0.6, 0.8], SETTLED_VAL, STEADY),
        (SETTLED_TRAIN, [0.5, 0.4, 0.3], STEADY),
        (SETTLED_TRAIN, SETTLED_VAL, [100, 100, 98]),
    ],
    ids=["C1 below", "C1 above", "C1 too short", "C2 new minimum", "C3 two percent went"],
)
def test_stays_when_one_condition_fails(train, val, widths):
    assert threshold().update(train, val, widths) == pytest.approx(0.001)


def test_borders_of_the_conditions_count_as_settled():
    assert threshold().update([1.0, 0.6, 0.6], SETTLED_VAL, STEADY) > 0.001
    assert threshold().update(SETTLED_TRAIN, [0.5, 0.4, 0.4], STEADY) > 0.001
    assert threshold().update(SETTLED_TRAIN, SETTLED_VAL, [100, 100, 99]) > 0.001


def test_only_the_last_removal_counts():
    assert threshold().update(SETTLED_TRAIN, SETTLED_VAL, [100, 50, 50]) > 0.001


def test_c1_looks_back_over_exactly_rho_epochs():
    losses = [1.0, 0.9, 0.8, 0.7, 0.6, 0.75]
    assert threshold(rho=5).update(losses, SETTLED_VAL, STEADY) > 0.001
    assert threshold(rho=5).update(losses[1:], SETTLED_VAL, STEADY) == pytest.approx(0.001)
    assert threshold(rho=2).update([0.75, 1.0, 0.8, 0.75], SETTLED_VAL, STEADY) == pytest.approx(0.001)


def test_waits_rho_epochs_and_then_rises_again():
    tau = threshold(rho=3, tau_max=0.301, kappa=3)
    values = [tau.update([1.0, 0.5, 0.9, 0.7], SETTLED_VAL, STEADY) for _ in range(9)]
    assert values == pytest.approx([0.101] * 4 + [0.201] * 4 + [0.301])


def test_ends_at_tau_max():
    tau = threshold(rho=2, kappa=2)
    for _ in range(20):
        tau.update([0.7, 0.8, 0.75], SETTLED_VAL, STEADY)
    assert tau.value == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"tau_max": 0.0}, "tau_max"), ({"tau_max": 1.5}, "1.5"), ({"kappa": 0}, "kappa"), ({"rho": 1}, "rho"),
     ({"mu": 2}, "0.02 for 2 %")],
)  # fmt: skip
def test_bad_numbers_are_named(change, said):
    with pytest.raises(ValueError, match=said):
        threshold(**change)


@pytest.mark.parametrize(("epochs", "rho"), [(1000, 5), (2000, 10), (600, 3), (50, 2), (1, 2)])
def test_rho_fits_itself_to_the_length_of_the_run_unless_it_is_set(epochs, rho):
    assert SauronSettings().threshold(epochs).rho == rho
    assert SauronSettings(rho=7).threshold(epochs).rho == 7
