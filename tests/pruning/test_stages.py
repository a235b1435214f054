from __future__ import annotations

import pytest
import torch

from nnunet_sauron.pruning import CostModel, Ranking, channel_layout, resize
from nnunet_sauron.pruning.stages import Stages, stage_rankings
from nnunet_sauron.pruning.tolerance import cost_left, tolerance_for, widths_at

from ..contracts.networks import build


@pytest.mark.parametrize("architecture", ["plain", "resenc"])
@pytest.mark.parametrize("dim", [2, 3])
def test_a_stage_has_the_layers_that_plans_give_one_width(architecture, dim):
    """Built at other widths, the network has exactly the widths that the stages say."""
    features = (4, 6, 9)
    stages = Stages.of(build(architecture, dim, (5, 7, 8)))
    widths = dict(zip(stages.keys, features, strict=True))
    assert stages.units(widths) == channel_layout(build(architecture, dim, features)).widths
    assert len(set(stages.of_unit.values())) == 3


def test_stages_that_a_residual_add_joins_are_one():
    joined = Stages.of(build("resenc", 2, (5, 7, 7, 8)))
    assert joined.keys == ("stage 0", "stage 1", "stage 1", "stage 3")
    assert joined.apart == (("stage 0", "stage 1"), ("stage 1", "stage 3"))
    widths = {"stage 0": 3, "stage 1": 4, "stage 3": 5}
    assert joined.units(widths) == channel_layout(build("resenc", 2, (3, 4, 4, 5))).widths
    plain = Stages.of(build("plain", 2, (5, 7, 7, 8)))
    assert len(set(plain.keys)) == 4 and plain.apart == ()


def test_residual_neighbours_with_a_projection_stay_apart():
    """At equal widths nnU-Net would build the stage without it, and could not load the weights."""
    stages = Stages.of(build("resenc", 2, (5, 7, 8)))
    collided = {"stage 0": 4, "stage 1": 4, "stage 2": 4}
    assert stages.buildable(collided, 2) == {"stage 0": 4, "stage 1": 6, "stage 2": 4}
    assert stages.buildable({"stage 0": 4, "stage 1": 4, "stage 2": 5}) == {"stage 0": 4, "stage 1": 5, "stage 2": 6}
    assert collided["stage 1"] == 4
    network, built = build("resenc", 2, (5, 7, 8)), build("resenc", 2, (4, 5, 6))
    resize(network, stages.units({"stage 0": 4, "stage 1": 5, "stage 2": 6}))
    built.load_state_dict(network.state_dict())


STAGES = Stages({"a": "stage 0", "b": "stage 0", "c": "stage 1"}, ("stage 0", "stage 1"), ())


def cost(widths) -> int:
    return widths["a"] * widths["b"] + 10 * widths["c"]


def test_a_stages_error_is_the_sum_of_what_its_units_errors_do():
    fold = {
        "a": Ranking((1, 0), (1.0, 0.5, 0.0), sensitivity=3.0),
        "b": Ranking((0, 1), (1.0, 0.2, 0.0), sensitivity=0.5),
        "c": Ranking((0, 1, 2), (1.0, 0.6, 0.3, 0.0)),
    }
    found = stage_rankings([fold], STAGES, cost)
    saved_0, saved_1 = 4 - 1, 10  # of one channel less in both units of the first stage, and in the second's
    mean = (saved_0 * saved_1) ** 0.5
    first = [(3**0.75 * a + 0.5**0.75 * b) / 1.5 for a, b in ((1.0, 1.0), (0.5, 0.2), (0.0, 0.0))]
    assert found["stage 0"].errors == pytest.approx([e / (saved_0 / mean) ** 0.5 for e in first])
    assert found["stage 1"].errors == pytest.approx([e / 1.5 / (saved_1 / mean) ** 0.5 for e in fold["c"].errors])


def test_folds_are_averaged_and_narrow_units_lose_nothing_above_their_width():
    wide = {name: Ranking((0, 1, 2), (1.0, 0.8, 0.4, 0.0)) for name in "abc"}
    narrow = {**wide, "b": Ranking((0,), (1.0, 0.0))}
    one, both = (stage_rankings(folds, STAGES, cost)["stage 0"].errors for folds in ([wide], [wide, narrow]))
    assert both[1:] == pytest.approx([e * part for e, part in zip(one[1:], (0.75, 0.75, 1), strict=True)])


@pytest.mark.parametrize("architecture", ["plain", "resenc"])
def test_a_target_is_met_by_stages(architecture):
    network = build(architecture, 2, (12, 20, 28))
    model, stages = CostModel(network, (32, 32), 2), Stages.of(network)
    generator = torch.Generator().manual_seed(0)
    fold = {}
    for name, width in channel_layout(network).widths.items():
        falling = torch.rand(width - 1, generator=generator).sort(descending=True).values.tolist()
        fold[name] = Ranking(tuple(range(width)), (1.0, *falling, 0.0))
    rankings = stage_rankings([fold], stages, model.macs)
    left = cost_left(model.macs, channel_layout(network).widths)
    tolerance = tolerance_for(0.5, lambda widths: left(stages.units(stages.buildable(widths))), rankings)
    widths = stages.units(stages.buildable(widths_at(tolerance, rankings)))
    assert 0.4 < left(widths) <= 0.5
