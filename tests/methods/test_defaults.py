"""What all methods have in common where nothing is set: equal targets, and few cuts."""

from __future__ import annotations

import random

import pytest

from nnunet_sauron.methods.autopruner import AutoPruner
from nnunet_sauron.methods.base import TrainingState
from nnunet_sauron.methods.csgd import CSGD
from nnunet_sauron.methods.fpgm import FPGM
from nnunet_sauron.methods.l1 import L1
from nnunet_sauron.methods.layerwise import Layerwise
from nnunet_sauron.methods.random import RandomLargestLayer
from nnunet_sauron.methods.sauron import Sauron
from nnunet_sauron.methods.sfp import SFP
from nnunet_sauron.methods.shrink import Shrink
from nnunet_sauron.methods.stamp import STAMP, STAMPRandomChannel
from nnunet_sauron.methods.stepwise import Stepwise
from nnunet_sauron.methods.taylor import Taylor
from nnunet_sauron.pruning import CostModel, channel_layout

from ..contracts.networks import build

STEPWISE = [STAMP, STAMPRandomChannel, RandomLargestLayer, L1, Taylor]
LAYERWISE = [SFP, FPGM, CSGD, AutoPruner]
EVERY = [*STEPWISE, *LAYERWISE, Sauron, Shrink]
WIDTHS = (24, 32, 48)


def prepared(method_class, widths=WIDTHS, num_epochs=1000, **settings):
    network = build(widths=widths)
    method = method_class(method_class.Settings(**settings), num_epochs)
    method.prepare(channel_layout(network), CostModel(network, [16, 16], 2), None)
    method.attach(network, channel_layout(network))
    return method, network


def simulate(method, network, num_epochs: int, held=()) -> tuple[dict[str, int], list[int]]:
    """The widths that a training ends with, and the epochs after which it cut, but for those in which it was held.

    Which channels are removed is left to chance: how many does not depend on it.
    """
    draw = random.Random(0)
    now = dict(channel_layout(network).widths)
    if isinstance(method, Stepwise):
        method.score = lambda taken: {name: [draw.random() for _ in range(w)] for name, w in taken.widths_now.items()}
    else:
        method.order = lambda unit: list(range(now[unit]))
    cuts = []
    for epoch in range(num_epochs):
        settings = method.settings
        last = not settings.may_cut_after(epoch + 1, num_epochs)
        if not settings.may_cut_after(epoch, num_epochs) or (epoch in held and not (last and method.has_schedule())):
            continue
        losses = range(epoch + 1)
        taken = TrainingState(
            losses, losses, {name: [w] for name, w in now.items()}, batches=lambda count: [], is_last_cut=last
        )
        keep = method.measure(taken)
        now |= {name: len(kept) for name, kept in keep.items()}
        cuts += [epoch] if keep else []
    return now, cuts


@pytest.mark.parametrize("method_class", EVERY, ids=lambda c: c.__name__)
def test_a_tenth_of_the_macs_is_left_by_default(method_class):
    method, network = prepared(method_class)
    name, asked, left = method.target()
    assert (name, asked) == ("target_macs", pytest.approx(0.1))
    if method_class not in (Sauron, Shrink):  # whose cuts are tried in tests of their own
        widths, _ = simulate(method, network, 1000)
        assert 0.08 < left(widths) <= 0.1
        assert method.why_missed() is None


@pytest.mark.parametrize("method_class", [*STEPWISE, *LAYERWISE], ids=lambda c: c.__name__)
def test_a_narrow_network_keeps_its_least_widths_and_it_is_said(method_class):
    method, network = prepared(method_class, widths=(4, 4, 4))
    widths, _ = simulate(method, network, 1000)
    assert method.target()[2](widths) > 0.1
    assert "min_channels=2" in method.why_missed() and "allow no less" in method.why_missed()
    with pytest.raises(ValueError, match=r"target_macs=0.1 cannot be met"):
        prepared(method_class, widths=(4, 4, 4), target_macs=0.1)


@pytest.mark.parametrize("num_epochs", [5, 1000])
@pytest.mark.parametrize("method_class", EVERY, ids=lambda c: c.__name__)
def test_there_are_at_most_50_cuts(method_class, num_epochs):
    method, network = prepared(method_class, num_epochs=num_epochs)
    if method_class in (Sauron, Shrink):
        schedule = method._schedule if method_class is Sauron else method.schedule
        assert len(schedule.epochs) <= 50
    else:
        cuts = simulate(method, network, num_epochs)[1]
        assert len(cuts) <= 50
        assert cuts[-1] == int(0.8 * num_epochs) - 1  # the last epoch that may
        assert len(cuts) == 1 or issubclass(method_class, Stepwise)


def test_as_published_there_is_a_step_an_epoch():
    method, network = prepared(STAMP, num_epochs=100, recovery_epochs=1, k=1)
    assert simulate(method, network, 100)[1] == list(range(80))


@pytest.mark.parametrize(
    "settings",
    [{}, {"rate": 0.5, "round_to": 4}, {"target_channels": 0.5, "max_fraction_per_epoch": 0.02},
     {"target_macs": 0.3, "round_to": 4, "max_fraction_per_epoch": 0.01}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("method_class", [STAMP, RandomLargestLayer, L1, SFP], ids=lambda c: c.__name__)
@pytest.mark.parametrize("held", [range(3, 16), range(20)], ids=["long", "always"])
def test_what_was_held_is_caught_up(method_class, settings, held):
    method, network = prepared(method_class, num_epochs=20, **settings)
    _, asked, left = method.target()
    widths, cuts = simulate(method, network, 20, held)
    assert left(widths) <= asked + 1e-9
    assert cuts[-1] == 15 and not set(cuts[:-1]) & set(held)
    assert left(widths) > asked - 0.1  # and no more than that


@pytest.mark.parametrize("held", [(), range(3, 16), range(20)], ids=["never", "long", "always"])
@pytest.mark.parametrize("settings", [{}, {"target_channels": 0.7}], ids=str)
def test_k_in_a_step_are_caught_up_as_well(held, settings):
    method, network = prepared(L1, num_epochs=20, k=8, **settings)
    widths, _ = simulate(method, network, 20, held)
    dense = sum(channel_layout(network).widths.values())
    left = {"k": dense - 16 * 8, "target_channels": int(0.7 * dense)}
    assert sum(widths.values()) == left[method.target()[0]]


def test_a_k_too_small_for_a_cost_is_said():
    method, network = prepared(L1, num_epochs=20, k=2, target_macs=0.2)
    widths, _ = simulate(method, network, 20)
    _, asked, left = method.target()
    assert left(widths) > asked and method.why_missed() == "k=2 in 16 steps is too little"


def test_a_rate_that_other_settings_do_not_allow_is_said():
    method, network = prepared(SFP, num_epochs=20, rate=0.9, min_channels=8)
    widths, _ = simulate(method, network, 20)
    assert set(widths.values()) == {8}
    assert method.target()[2](widths) > method.target()[1]
    assert "min_channels=8" in method.why_missed()


def test_a_network_narrower_than_its_target_is_left_alone():
    for method_class in LAYERWISE:
        method, network = prepared(method_class, num_epochs=10, rate=0.5)
        assert isinstance(method, Layerwise)
        narrow = {name: max(1, width // 3) for name, width in channel_layout(network).widths.items()}
        method.order = lambda unit: list(range(100))
        losses = range(method.cut_epoch + 1)
        widths = {name: [width] for name, width in narrow.items()}
        taken = TrainingState(losses, losses, widths, batches=lambda count: [], is_last_cut=True)
        assert method.measure(taken) == {}
