from __future__ import annotations

from dataclasses import replace

import pytest

from nnunet_sauron.pruning import Ranking
from nnunet_sauron.pruning.tolerance import LATENCY_STEPS, cost_left, tolerance_for, weighted, widths_at

RANKINGS = {
    "redundant": Ranking(tuple(range(8)), (1.0, 0.01, 0.001, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 0.0)),
    "dense": Ranking(tuple(range(8)), (1.0, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1, 0.05, 0.0)),
}
SMOOTH = {"layer": Ranking(tuple(range(100)), (*(10 ** (-k / 16) for k in range(100)), 0.0))}
CHANNELS = {"redundant": 8, "dense": 8}


def in_channels(widths) -> int:
    return sum(widths.values())


def test_one_tolerance_gives_each_layer_its_own_width():
    assert widths_at(0.015, RANKINGS) == {"redundant": 1, "dense": 8}
    assert widths_at(0.25, RANKINGS) == {"redundant": 1, "dense": 5}
    assert widths_at(1e-9, RANKINGS) == CHANNELS


def test_errors_count_by_powers_of_the_sensitivity_and_of_what_a_channel_saves():
    rankings = {
        "a": Ranking((1, 0), (1.0, 0.5, 0.0), sensitivity=3.0),
        "b": Ranking((0, 1, 2), (1.0, 0.5, 0.25, 0.0), sensitivity=0.2),
        "single": Ranking((0,), (1.0, 0.0)),
    }
    found = weighted(rankings, lambda widths: 8 * widths["a"] + widths["a"] * widths["b"] ** 2 + 7 * widths["single"])
    saved_a, saved_b = 8 + 9, 2 * (9 - 4)
    mean = (saved_a * saved_b) ** 0.5
    assert found["a"].errors == pytest.approx([3**0.75 / (saved_a / mean) ** 0.5 * e for e in (1.0, 0.5, 0.0)])
    assert found["b"].errors == pytest.approx([0.2**0.75 / (saved_b / mean) ** 0.5 * e for e in (1.0, 0.5, 0.25, 0.0)])
    assert found["single"] == rankings["single"]
    assert [r.order for r in found.values()] == [r.order for r in rankings.values()]


def test_errors_above_one_do_not_hide_what_can_be_had():
    rankings = {name: replace(r, errors=tuple(50 * e for e in r.errors)) for name, r in RANKINGS.items()}
    left = cost_left(in_channels, CHANNELS)
    assert left(widths_at(tolerance_for(0.2, left, rankings), rankings)) <= 0.2


@pytest.mark.parametrize(("round_to", "expected"), [(4, 4), (3, 3), (16, 8)])
def test_widths_are_rounded_up_but_never_above_what_there_is(round_to, expected):
    assert widths_at(0.015, RANKINGS, round_to)["redundant"] == expected


@pytest.mark.parametrize("goal", [0.9, 0.6, 0.3])
@pytest.mark.parametrize("round_to", [1, 2])
def test_the_least_tolerance_that_meets_the_goal_is_found(goal, round_to):
    left = cost_left(in_channels, CHANNELS)
    tolerance = tolerance_for(goal, left, RANKINGS, round_to)
    assert (
        left(widths_at(tolerance, RANKINGS, round_to)) <= goal < left(widths_at(tolerance * 0.99, RANKINGS, round_to))
    )


def test_a_goal_out_of_reach_is_refused_with_what_can_be_had():
    left = cost_left(in_channels, CHANNELS)
    with pytest.raises(ValueError, match=r"0.1 cannot be met: at best 0.12 of the cost"):
        tolerance_for(0.1, left, RANKINGS)
    with pytest.raises(ValueError, match="smaller multiple of widths"):
        tolerance_for(0.3, left, RANKINGS, round_to=4)
    for goal in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            tolerance_for(goal, left, RANKINGS)


@pytest.mark.parametrize("goal", [0.9, 0.5])
def test_a_goal_is_met_although_the_narrowest_network_costs_most(goal):
    """As PyTorch's time of narrow convolutions on small patches."""

    def left(widths):
        return 2.0 if widths["layer"] < 40 else widths["layer"] / 100

    assert goal - 0.1 < left(widths_at(tolerance_for(goal, left, SMOOTH, steps=LATENCY_STEPS), SMOOTH)) <= goal
    with pytest.raises(ValueError, match="at best 0.4"):
        tolerance_for(0.3, left, SMOOTH)


def test_of_two_ranges_of_widths_that_meet_a_goal_the_wider_is_taken():
    def left(widths):
        return 0.5 if 60 <= widths["layer"] <= 75 or widths["layer"] < 10 else 1.0

    assert 60 <= widths_at(tolerance_for(0.6, left, SMOOTH, steps=LATENCY_STEPS), SMOOTH)["layer"] <= 75


@pytest.mark.parametrize("goal", [0.95, 0.9, 0.8, 0.5])
def test_the_few_steps_that_a_measured_goal_gets_come_near_it(goal):
    """Useful tolerances lie decades apart: halving the tolerance itself would never see the small ones."""
    left = cost_left(in_channels, {"layer": 100})
    tolerance = tolerance_for(goal, left, SMOOTH, steps=LATENCY_STEPS)
    assert goal - 0.02 < left(widths_at(tolerance, SMOOTH)) <= goal
