from __future__ import annotations

import random
import re

import pytest

from nnunet_sauron.methods.base import TrainingState
from nnunet_sauron.methods.layerwise import Layerwise
from nnunet_sauron.methods.limits import steps
from nnunet_sauron.methods.stepwise import Stepwise, StepwiseSettings, count_lowest
from nnunet_sauron.methods.targets import TargetSettings, even_widths, make_target
from nnunet_sauron.pruning import CostModel, channel_layout, count_macs, count_parameters, resize

from ..contracts.networks import build

SIDE = 16


@pytest.fixture(scope="module")
def network():
    return build(widths=(16, 24, 32))


def target_of(network, given=None, fixed=(), **settings):
    settings = TargetSettings(**settings)
    layout = channel_layout(network)
    cost = CostModel(network, [SIDE] * 2, 2)
    target = make_target(settings, layout, cost, given, fixed)
    return target, even_widths(target, settings, layout.widths), layout.widths, cost


@pytest.mark.parametrize("architecture", ["plain", "resenc", "bottleneck"])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_cost_model_equals_counting_the_network(architecture, dim, norm):
    network = build(architecture, dim, (8, 8, 16), norm, deep_supervision=True)
    cost = CostModel(network, [SIDE] * dim, 2)
    for step in range(3):
        widths = {
            name: max(1, w - step * (i % 3)) for i, (name, w) in enumerate(channel_layout(network).widths.items())
        }
        resize(network, widths)
        assert cost.parameters(widths) == count_parameters(network)
        assert cost.macs(widths) == count_macs(network, [SIDE] * dim, 2)


def test_rate_is_of_every_layer(network):
    _, widths, dense, _ = target_of(network, rate=0.25)
    assert widths == {name: width * 3 // 4 for name, width in dense.items()}


@pytest.mark.parametrize("name", ["target_parameters", "target_macs"])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9])
def test_even_widths_are_the_widest_that_meet_a_cost(network, name, fraction):
    _, widths, dense, cost = target_of(network, **{name: fraction})
    measure = cost.parameters if name == "target_parameters" else cost.macs
    assert measure(widths) <= fraction * measure(dense)
    wider = {unit: width + 1 for unit, width in widths.items()}
    assert measure(wider) > fraction * measure(dense)


def test_the_least_that_a_target_can_be_is_named(network):
    with pytest.raises(ValueError, match=r"target_channels=0.01 cannot be met.* (0\.\d+) is the least") as error:
        target_of(network, target_channels=0.01, min_channels=4)
    least = float(re.search(r"(0\.\d+) is the least", str(error.value))[1])
    target_of(network, target_channels=least, min_channels=4)


def test_given_widths_must_fit(network):
    dense = channel_layout(network).widths
    first = next(iter(dense))
    with pytest.raises(ValueError, match="another topology"):
        target_of(network, given={first: 3}, widths_from="a.pth")
    with pytest.raises(ValueError, match=f"17 channels in {first}"):
        target_of(network, given={**dense, first: 17}, widths_from="a.pth")
    with pytest.raises(ValueError, match="never cuts"):
        target_of(network, given={**dense, first: 3}, widths_from="a.pth", fixed=[first])
    assert target_of(network, given={**dense, first: 3}, widths_from="a.pth")[1] == {**dense, first: 3}


def test_steps_end_with_the_last_epoch_that_may_cut():
    settings = TargetSettings(cut_from=0.2, cut_until=0.8)
    assert steps(settings, 10) == [1, 2, 3, 4, 5, 6, 7]
    assert steps(settings, 10, every=3) == [1, 4, 7]
    assert steps(settings, 10, every=100) == [7]


def lowest(ranks, done=1.0, k=None, **settings):
    widths = {name: len(values) for name, values in ranks.items()}

    class Layout:
        pass

    Layout.widths = widths
    settings = StepwiseSettings(min_channels=1, k=k, **settings)

    class Cost:
        parameters = macs = None

    target = make_target(settings, Layout, Cost, None)
    return count_lowest(widths, ranks, target, done, settings, lambda low, width: sum(low) / len(low))


def test_the_globally_lowest_go_until_the_limit():
    ranks = {"a": [0.1, 0.9, 0.2, 0.8], "b": [0.3, 0.7, 0.6, 0.5]}
    assert lowest(ranks, target_channels=0.5) == {"a": 2, "b": 2}
    assert lowest(ranks, target_channels=0.5, done=0.5) == {"a": 2, "b": 0}
    assert lowest(ranks, k=3, target_channels=0.25) == {"a": 2, "b": 1}
    assert lowest({"a": [0.1, 0.2, 0.3], "b": [1, 2, 3]}, target_channels=0.5) == {"a": 2, "b": 1}  # one stays


def test_a_limit_that_is_a_count_of_channels_is_met_and_not_overshot():
    # After 9 of 11 steps 63 of 77 channels are gone, and 9 / 11 * 77 is a little more than that.
    assert sum(lowest({"a": list(range(97))}, done=9 / 11, target_channels=20 / 97).values()) == 63


def test_multiples_go_by_the_mean_of_what_leads_to_the_next_one():
    ranks = {"a": [0.0, 1, 1, 1, 1, 1], "b": [0.5, 0.5, 0.5, 0.5, 2, 2]}
    # From 6 to 4 channels: two go, and the mean of a's two lowest is 0.5, b's too; a goes first by name.
    assert lowest(ranks, round_to=4, target_channels=0.9) == {"a": 2, "b": 0}
    assert lowest(ranks, round_to=4, target_channels=0.7) == {"a": 2, "b": 2}


EPOCHS = 10


class Drawn(Stepwise):
    """Ranks that are drawn."""

    def score(self, training):
        return {name: random.Random(f"{name} {training.epoch}").choices(range(100), k=width)
                for name, width in training.widths_now.items()}  # fmt: skip


class FirstToLast(Layerwise):
    def order(self, unit):
        return range(100)


def widths_at_the_end(method_class, network, given=None, **settings) -> dict[str, int]:
    """Those after all epochs' cuts, as a trainer makes them."""
    layout = channel_layout(network)
    settings = method_class.Settings(**settings)
    method = method_class(settings, EPOCHS)
    method.prepare(layout, CostModel(network, [SIDE] * 2, 2), given)
    widths = {name: [width] for name, width in layout.widths.items()}
    for epoch in range(EPOCHS):
        last_chance = not settings.may_cut_after(epoch + 1, EPOCHS)
        losses = [1.0] * (epoch + 1)
        keep = method.measure(TrainingState(losses, losses, widths, is_last_cut=last_chance, learning_rate_left=0.5))
        assert settings.may_cut_after(epoch, EPOCHS) or not keep
        for name, series in widths.items():
            series.append(len(keep.get(name, range(series[-1]))))
    return {name: series[-1] for name, series in widths.items()}


@pytest.mark.parametrize("method_class", [Drawn, FirstToLast])
class TestWidthsAtTheEnd:
    """What every method that takes a target inherits from one of two bases."""

    def test_a_rate_leaves_this_part_of_every_layer(self, network, method_class):
        dense = channel_layout(network).widths
        widths = widths_at_the_end(method_class, network, rate=0.5)
        assert widths == {name: width // 2 for name, width in dense.items()}

    @pytest.mark.parametrize("name", ["target_channels", "target_parameters", "target_macs"])
    @pytest.mark.parametrize("part", [0.3, 0.6])
    def test_a_part_is_met_and_no_channel_more_goes(self, network, method_class, name, part):
        widths, dense = widths_at_the_end(method_class, network, **{name: part}), channel_layout(network).widths
        cost = CostModel(network, [SIDE] * 2, 2)
        measures = {"target_parameters": cost.parameters, "target_macs": cost.macs}
        measure = measures.get(name, lambda widths: sum(widths.values()))
        assert measure(widths) <= part * measure(dense)
        if method_class is Drawn:  # the last one that went was needed
            wider = max(measure({**widths, name: width + 1}) for name, width in widths.items())
        else:
            wider = measure({name: width + 1 for name, width in widths.items()})
        assert wider > part * measure(dense)

    def test_given_widths_are_met_whatever_the_other_limits(self, network, method_class):
        given = {name: 1 + i % width for i, (name, width) in enumerate(channel_layout(network).widths.items())}
        widths = widths_at_the_end(
            method_class, network, given, widths_from="a.pth", min_channels=4, max_fraction_per_epoch=0.1
        )
        assert widths == given

    def test_widths_stay_at_multiples(self, network, method_class):
        widths = widths_at_the_end(method_class, network, round_to=8, target_channels=0.7)
        assert all(width % 8 == 0 for width in widths.values())
        assert sum(widths.values()) <= 0.7 * sum(channel_layout(network).widths.values())


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.7])
def test_a_fraction_is_told_as_it_was_given(network, fraction):
    target, *_ = target_of(network, target_macs=fraction)
    assert target.part_asked == fraction
