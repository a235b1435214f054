"""Shrink's schedule and choice, on networks whose redundancy is known."""

from __future__ import annotations

import re

import pytest
import torch

from nnunet_sauron.methods import shrink
from nnunet_sauron.methods.base import TrainingState
from nnunet_sauron.methods.measuring import NOTHING_MEASURED
from nnunet_sauron.methods.schedule import Schedule
from nnunet_sauron.methods.shrink import Shrink, ShrinkSettings, batches_to_rank_on
from nnunet_sauron.pruning import CostModel, channel_layout, merge_channels

from ..contracts.networks import build
from ..contracts.pruned_network import make_multiples

SIDE = 16
DENSE = (16, 24, 32)


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4 * count)
    return [torch.randn(4, 2, SIDE, SIDE, generator=generator) for _ in range(count)]


def state(network, epoch: int, **changes) -> TrainingState:
    """A training of this network at the end of an epoch, which began at the widths of `build(DENSE)`."""
    dense = channel_layout(build(widths=DENSE)).widths if epoch else {}
    now = channel_layout(network).widths
    widths = {name: [dense.get(name, width), *[width] * epoch] for name, width in now.items()}
    return TrainingState(
        [0.0] * (epoch + 1), [0.0] * (epoch + 1), widths, **{"batches": batches, "batch_size": 4, **changes}
    )


def prepared(network, num_epochs: int = 20, **settings) -> Shrink:
    method = Shrink(ShrinkSettings(**settings), num_epochs)
    method.prepare(channel_layout(network), CostModel(network, (SIDE, SIDE), 2), None)
    method.attach(network, channel_layout(network))
    return method


@pytest.mark.parametrize("widths", [(6, 8, 10), (5, 7, 9), (7, 11, 13)])
def test_the_least_that_an_error_names_can_be_met(widths):
    network = build(widths=widths)
    with pytest.raises(ValueError, match=r"(0\.\d+) is the least") as error:
        prepared(network, target_macs=0.001)
    prepared(network, target_macs=float(re.search(r"(0\.\d+) is the least", str(error.value))[1]))


@pytest.mark.parametrize("target", [{"target_macs": 0.4}, {"target_parameters": 0.4}], ids=lambda t: next(iter(t)))
def test_cuts_of_one_factor_lead_to_the_target(target):
    network = build(widths=DENSE).eval()
    method = prepared(network, cuts=4, **target)
    name, asked, left = method.target()
    assert (name, asked) == next(iter(target.items()))
    parts = []
    for epoch in range(20):
        keep = method.measure(state(network, epoch))
        assert bool(keep) == (epoch in method.schedule.epochs)
        if keep:
            merge_channels(network, keep, batches(4))
            parts.append(left(channel_layout(network).widths))
    # After cuts 1 to 4 of 4, less than wanted by at most a channel here and there.
    for part, wanted in zip(parts, (0.4**0.25, 0.4**0.5, 0.4**0.75, 0.4), strict=True):
        assert wanted - 0.05 < part <= wanted


def channels(network) -> int:
    return sum(channel_layout(network).widths.values())


def test_a_latency_is_measured_at_each_cut(monkeypatch):
    """As if time went with the channels: the same widths are timed once, and the target is met by what was measured."""
    timed = []

    def time_left(whole, narrow, input_shape, device):
        assert input_shape == (1, 2, SIDE, SIDE)
        timed.append(tuple(channel_layout(narrow).widths.values()))
        return channels(narrow) / channels(whole), False

    monkeypatch.setattr(shrink, "time_left", time_left)
    network = build(widths=DENSE).eval()
    dense = sum(channel_layout(network).widths.values())
    method = prepared(network, cuts=2, target_latency=0.5)
    for epoch in range(20):
        keep = method.measure(state(network, epoch))
        if keep:
            merge_channels(network, keep, batches(4))
    assert 0.4 < sum(channel_layout(network).widths.values()) / dense <= 0.5
    assert len(set(timed)) > 2 and len(timed) - len(set(timed)) == 2  # those that were chosen were timed once more
    assert method.target()[2](channel_layout(network).widths) <= 0.5


def test_a_latency_that_no_widths_have_ends_at_the_fastest(monkeypatch):
    monkeypatch.setattr(
        shrink, "time_left", lambda whole, narrow, *_: (max(0.7, channels(narrow) / channels(whole)), True)
    )
    network = build(widths=DENSE).eval()
    method = prepared(network, cuts=2, target_latency=0.5)
    assert method.measure(state(network, 0)) == {}  # nothing is due
    for epoch in method.schedule.epochs:
        merge_channels(network, method.measure(state(network, epoch)), batches(4))
    assert method.target()[2](channel_layout(network).widths) == 0.7
    again = prepared(network, cuts=2, target_latency=0.5)
    again.load_state(method.state())
    assert again._latencies == method._latencies
    assert "this machine was busy" in method.doubt


def test_a_time_that_a_second_look_does_not_confirm_is_not_believed(monkeypatch):
    """As if another process had slowed the whole network down while the first narrow one was timed."""
    timed: dict[tuple, int] = {}

    def time_left(whole, narrow, *_):
        key = tuple(channel_layout(narrow).widths.values())
        timed[key] = timed.get(key, 0) + 1
        slowed = len(timed) == 1 and timed[key] == 1
        return (0.1 if slowed else channels(narrow) / channels(whole)), slowed

    monkeypatch.setattr(shrink, "time_left", time_left)
    network = build(widths=DENSE).eval()
    dense = channels(network)
    method = prepared(network, cuts=1, target_latency=0.6)
    (epoch,) = method.schedule.epochs
    merge_channels(network, method.measure(state(network, epoch)), batches(4))
    assert 0.4 < channels(network) / dense <= 0.6
    assert method.target()[2](channel_layout(network).widths) == channels(network) / dense


def test_what_was_held_is_made_up_for_at_the_next_chance():
    network = build(widths=DENSE).eval()
    method = prepared(network, cuts=4, target_macs=0.4)
    late = method.schedule.epochs[2] + 1  # three cuts were held
    keep = method.measure(state(network, late))
    merge_channels(network, keep, batches(4))
    assert 0.4**0.75 - 0.05 < method.schedule.left(channel_layout(network).widths) <= 0.4**0.75


def test_multiples_of_other_channels_go_and_the_output_stays():
    """Half of every layer is a multiple of the other half: a cut to what the other half costs loses nothing."""
    network = build(widths=(8, 12, 16)).eval()
    originals = make_multiples(network)
    cost = CostModel(network, (SIDE, SIDE), 2)
    half = {name: len(kept) for name, kept in originals.items()}
    part = cost.macs(half) / cost.macs(channel_layout(network).widths)
    method = prepared(network, cuts=1, target_macs=part * 1.001)
    tensor = batches(1)[0]
    with torch.no_grad():
        before = network(tensor)
        keep = method.measure(state(network, method.schedule.epochs[-1]))
        merge_channels(network, keep, batches(8))
        after = network(tensor)
    assert channel_layout(network).widths == half
    torch.testing.assert_close(after, before, atol=2e-3, rtol=1e-3)


def test_widths_are_multiples_and_the_target_is_met_all_the_same():
    network = build(widths=DENSE).eval()
    method = prepared(network, cuts=1, target_macs=0.5, round_to=4)
    merge_channels(network, method.measure(state(network, method.schedule.epochs[-1])), batches(4))
    widths = channel_layout(network).widths
    assert all(width % 4 == 0 for width in widths.values())
    assert 0.3 < method.schedule.left(widths) <= 0.5


def test_nothing_is_cut_where_no_patch_is_finite():
    network = build(widths=DENSE).eval()
    method = prepared(network, cuts=1, target_macs=0.5)
    assert method.measure(state(network, 14, batches=lambda count: [])) == {}
    assert method.unmeasured == NOTHING_MEASURED


def test_ranking_takes_drawn_batches_first_and_no_more_than_it_needs():
    network = build(widths=(6, 8, 10)).eval()
    drawn, asked = batches(3), []
    training = state(network, 0, batches=lambda count: asked.append(count) or batches(count))
    assert [id(one) for one in batches_to_rank_on(network, training, 8, drawn)] == [id(one) for one in drawn[:2]]
    assert len(batches_to_rank_on(network, training, 18, drawn)) == 5 and asked == [2]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_macs": 0.0}, "target_macs must be the fraction that stays"),
        ({"target_macs": 0.5, "target_parameters": 0.5}, "choose one"),
        ({"cuts": 0}, "cuts must be at least 1"),
        ({"target_macs": 0.01}, r"target_macs=0.01 cannot be met: with min_channels=2 and round_to=1, 0\.\d+ is the"),
    ],
)
def test_what_cannot_be_met_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        prepared(build(widths=(6, 8, 10)), **settings)


def test_a_tenth_of_the_macs_is_the_default():
    assert ShrinkSettings().target_macs == 0.1
    assert ShrinkSettings(target_parameters=0.3).target_macs is None


def test_a_schedule_counts_from_the_dense_network():
    network = build(widths=DENSE)
    layout, cost = channel_layout(network), CostModel(network, (SIDE, SIDE), 2)
    schedule = Schedule(ShrinkSettings(target_macs=0.25, cuts=2), 10, layout, cost, "target_macs")
    assert schedule.left(layout.widths) == 1.0
    first, last = schedule.epochs
    assert [schedule.wanted(e) for e in (first - 1, first, last - 1, last)] == [1.0, 0.5, 0.5, 0.25]
