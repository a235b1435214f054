"""What Sauron decides: every channel a reference, a common level, a factor for each layer; and the paper's way."""

from __future__ import annotations

import pytest
import torch

from nnunet_sauron.methods.delta import delta_prune
from nnunet_sauron.methods.measuring import NOTHING_MEASURED
from nnunet_sauron.methods.sauron import Sauron
from nnunet_sauron.methods.sauron_settings import PUBLISHED, SauronSettings
from nnunet_sauron.methods.similar_channels import mean_distances, nearest_pairs, remove_from_pairs
from nnunet_sauron.pruning import CostModel, channel_layout, merge_channels

from ..contracts.networks import build
from .test_shrink import SIDE, batches, state


def prepared(network, num_epochs: int = 20, **settings) -> Sauron:
    method = Sauron.for_settings(SauronSettings.from_given(**settings), num_epochs)
    method.prepare(channel_layout(network), CostModel(network, (SIDE, SIDE), 2), None)
    method.attach(network, channel_layout(network))
    return method


def with_twins(widths=(8, 12, 16)):
    """A network in which every layer's second half gives the very maps of its first half."""
    network = build(widths=widths).eval()
    with torch.no_grad():
        for axis in channel_layout(network).axes:
            tensor = getattr(network.get_submodule(axis.module), axis.tensor)
            if not axis.reads and axis.segments[0][0] is not None:
                half = tensor.shape[axis.dim] // 2
                tensor.narrow(axis.dim, half, half).copy_(tensor.narrow(axis.dim, 0, half))
    return network


def test_twins_go_and_the_output_stays():
    network = with_twins()
    dense = channel_layout(network).widths
    cost = CostModel(network, (SIDE, SIDE), 2)
    half = {name: width // 2 for name, width in dense.items()}
    target = cost.macs(half) / cost.macs(dense)
    method = prepared(network, cuts=1, target_macs=target * 1.001, max_fraction_per_epoch=0.5, lambda_=0)
    tensor = batches(1)[0]
    with torch.no_grad():
        before = network(tensor)
        keep = method.measure(state(network, 9, is_last_cut=True))
        for name, kept in keep.items():
            # Of each pair of twins one is left.
            assert sorted(channel % half[name] for channel in kept) == list(range(half[name]))
        merge_channels(network, keep, batches(8))
        torch.testing.assert_close(network(tensor), before, atol=2e-3, rtol=1e-3)
    assert channel_layout(network).widths == half


def test_distances_are_delta_prune_with_every_reference():
    network, inputs = build(widths=(6, 8, 10)).eval(), batches(2)
    found = mean_distances(network, inputs)
    maps = []
    name = "encoder.stages.1.0.convs.0"
    network.get_submodule(name).register_forward_hook(lambda module, i, output: maps.append(output.clone()))
    with torch.no_grad():
        for tensor in inputs:
            network(tensor)
    for reference in range(8):
        expected = torch.stack([delta_prune(h, reference=reference) for h in maps]).mean(0)
        torch.testing.assert_close(found[name][reference], expected, atol=1e-5, rtol=1e-4)


def test_a_layers_threshold_is_the_common_level_times_its_factor():
    a = torch.tensor([[0.0, 0.4, 0.9], [0.2, 0.0, 0.8], [1.0, 1.0, 0.0]])
    b = torch.tensor([[0.0, 0.3], [0.3, 0.0]])
    pairs = nearest_pairs({"a": a, "b": b}, {"a": 1.0, "b": 2.0})
    assert [(round(level, 4), *rest) for level, *rest in pairs()] == [
        (0.15, "b", 0, 1),  # 0.3 over a factor of 2
        (0.2, "a", 0, 1),  # the nearer direction
        (0.8, "a", 1, 2),
        (0.9, "a", 0, 2),
    ]


WORTH = {"layer": {0: 0, 1: 1, 2: 2, 3: 3}}
PAIRS = [(0.1, "layer", 0, 1), (0.2, "layer", 0, 2), (0.3, "layer", 2, 3), (0.4, "layer", 0, 3), (0.5, "layer", 1, 2)]


@pytest.mark.parametrize(
    ("settings", "left", "meet", "gone"),
    [
        ({"max_fraction_per_epoch": None}, 3, False, {1}),  # the less valuable one
        ({"max_fraction_per_epoch": None}, 2, False, {1, 2}),
        ({"max_fraction_per_epoch": None, "min_channels": 1}, 1, False, {1, 2, 3}),
        ({"max_fraction_per_epoch": 0.3}, 1, False, {1}),
        ({"max_fraction_per_epoch": 0.3, "min_channels": 1}, 1, True, {1, 2, 3}),  # the last cut has no limit
        ({"max_fraction_per_epoch": None, "min_channels": 3}, 1, True, {1}),
    ],
)
def test_of_a_pair_one_goes_and_the_other_stays(settings, left, meet, gone):
    def met(widths, level) -> bool:
        return widths["layer"] <= left

    found, level = remove_from_pairs(
        lambda: PAIRS, WORTH, {"layer": 4}, SauronSettings(**settings), met, must_reach=meet
    )
    assert {name: set(going) for name, going in found.items()} == {"layer": gone}
    assert level == {1: 0.1, 2: 0.2, 3: 0.4}[len(gone)]


def test_what_stayed_of_a_pair_does_not_go_in_the_same_cut():
    pairs = [(0.1, "layer", 1, 2), (0.2, "layer", 0, 1)]  # 2 goes for 1, and 1 is worth less than 0
    met = lambda widths, level: False  # noqa: E731
    settings = SauronSettings(max_fraction_per_epoch=None, min_channels=1)
    assert remove_from_pairs(lambda: pairs, WORTH, {"layer": 3}, settings, met, must_reach=False)[0] == {
        "layer": [2, 0]
    }
    pairs = [(0.1, "layer", 1, 2), (0.2, "layer", 0, 3), (0.3, "layer", 0, 1)]  # both stayed
    assert remove_from_pairs(lambda: pairs, WORTH, {"layer": 4}, settings, met, must_reach=False)[0] == {
        "layer": [2, 3]
    }


def test_cuts_lead_to_a_tenth_of_the_macs_by_default_and_the_last_one_meets_it():
    network = build(widths=(24, 32, 48)).eval()
    method = prepared(network, lambda_=0)
    assert method.target()[:2] == ("target_macs", 0.1)
    left, dense = method.target()[2], channel_layout(network).widths
    for epoch in range(20):
        last = not method.settings.may_cut_after(epoch + 1, 20)
        keep = method.measure(state(network, epoch, is_last_cut=last)) if epoch < 10 else {}
        before = channel_layout(network).widths
        if keep:
            if not last:
                assert all(before[n] - len(kept) <= round(0.3 * before[n]) for n, kept in keep.items())
            merge_channels(network, keep, batches(8))
    assert 0.07 < left(channel_layout(network).widths) <= 0.1
    assert all(width < dense[name] for name, width in channel_layout(network).widths.items())


def test_without_a_target_the_level_climbs_to_tau_max():
    network = with_twins()
    method = prepared(network, cuts=2, target_macs=None, tau_max=0.002, lambda_=0, max_fraction_per_epoch=0.5)
    assert method.target() is None
    keep = method.measure(state(network, 9))
    # Twins have a distance of 0; nothing else is as near.
    assert {name: len(kept) for name, kept in keep.items()} == {
        name: width // 2 for name, width in channel_layout(network).widths.items()
    }
    assert method.measure(state(network, 5)) == {}
    assert max(method.state()["tau"].values()) < 0.01


@pytest.mark.parametrize("target", [0.3, 0.6])
def test_widths_are_multiples_and_the_target_is_met_but_not_by_far(target):
    network = build(widths=(16, 24, 32)).eval()
    method = prepared(network, cuts=4, target_macs=target, round_to=4, lambda_=0)
    for epoch in range(20):
        last = not method.settings.may_cut_after(epoch + 1, 20)
        keep = method.measure(state(network, epoch, is_last_cut=last)) if epoch < 10 else {}
        merge_channels(network, keep, batches(8))
        assert all(width % 4 == 0 for width in channel_layout(network).widths.values())
    assert target - 0.15 < method.target()[2](channel_layout(network).widths) <= target


def test_widths_that_are_no_multiples_lead_to_no_further_cut_than_is_due():
    network = build(widths=(10, 20, 40)).eval()
    method = prepared(network, cuts=10, target_macs=0.8, round_to=8, lambda_=0)
    for epoch in range(10):
        merge_channels(network, method.measure(state(network, epoch)), batches(8))
        left = method.target()[2](channel_layout(network).widths)
        assert method._schedule.wanted(epoch) - 0.1 < left <= method._schedule.wanted(epoch)


def test_an_epoch_without_a_finite_batch_is_named_once():
    network = build(widths=(16, 24, 32)).eval()
    method = prepared(network, cuts=2, target_macs=0.5, lambda_=0)
    assert method.measure(state(network, 9, batches=lambda count: [])) == {}
    assert method.unmeasured == NOTHING_MEASURED
    assert method.measure(state(network, 0)) == {} and method.unmeasured is None  # no cut is due


def test_without_a_target_the_last_cut_has_its_limit_as_well():
    network = with_twins()
    method = prepared(network, cuts=1, target_macs=None, tau_max=1.0, lambda_=0)
    keep = method.measure(state(network, 9, is_last_cut=True))
    dense = channel_layout(network).widths
    assert keep and all(dense[name] - len(kept) <= round(0.3 * dense[name]) for name, kept in keep.items())


def test_published_is_the_papers_schedule():
    settings = SauronSettings.from_given(published=True)
    assert (settings.max_fraction_per_epoch, settings.max_loss_increase, settings.target_macs) == (None, None, None)
    assert (settings.cut_until, settings.prune_batches, settings.merge, settings.lambda_) == (1.0, 1, False, 0.5)
    assert (settings.tau_max, settings.kappa, settings.mu, settings.normalisation) == (0.3, 15, 0.02, "minmax")
    assert settings.threshold(num_epochs=500).rho == 5
    assert all(settings.may_cut_after(epoch, 10) for epoch in range(9))
    assert SauronSettings.from_given(published=True, prune_batches=16).prune_batches == 16
    assert set(PUBLISHED) <= set(SauronSettings.__dataclass_fields__)
    with pytest.raises(ValueError, match="target_macs must be None with published=True"):
        SauronSettings.from_given(published=True, target_macs=0.1)


def test_a_subclass_is_not_passed_over_as_published():
    class Mine(Sauron):
        pass

    assert type(Mine.for_settings(SauronSettings.from_given(), 10)) is Mine
    with pytest.raises(ValueError, match="which Mine does not change: derive Mine from PublishedSauron"):
        Mine.for_settings(SauronSettings.from_given(published=True), 10)


@pytest.mark.parametrize("num_epochs", [10, 9])
def test_delta_opt_ends_with_the_cutting_phase_and_costs_nothing_then(num_epochs):
    network = build().train()
    method = prepared(network, num_epochs=num_epochs, cuts=2, target_macs=0.5)  # cuts end at 0.5
    hooked = [module for module in network.modules() if module._forward_hooks]
    terms = []
    for epoch in range(num_epochs):
        method.start_epoch(epoch, channel_layout(network).widths)
        method.before_step()
        network(batches(1)[0])
        terms.append(method.regulariser())
    cutting = method.settings.may_cut_after
    assert [term is not None for term in terms] == [epoch < num_epochs // 2 for epoch in range(num_epochs)]
    assert not any(cutting(epoch, num_epochs) for epoch in range(num_epochs // 2, num_epochs))
    assert hooked and not any(module._forward_hooks for module in hooked)
    stays = prepared(network, num_epochs=10, cuts=2, target_macs=0.5, delta_opt_after_cuts=True)
    stays.start_epoch(9, channel_layout(network).widths)
    network(batches(1)[0])
    assert stays.regulariser() is not None


def test_delta_opt_every_second_step_weighs_twice():
    network, tensor = build().train(), batches(1)[0]
    terms = {}
    for every in (1, 2):
        method = prepared(network, lambda_=0.5, delta_opt_every=every, target_macs=0.5)
        terms[every] = []
        method.start_epoch(0, channel_layout(network).widths)
        for _ in range(4):
            method.before_step()
            network(tensor)
            terms[every].append(method.regulariser())
        for hook in method._hooks:
            hook.remove()
    assert [term is None for term in terms[2]] == [False, True, False, True]
    torch.testing.assert_close(terms[2][0], 2 * terms[1][0])


@pytest.mark.parametrize(
    ("given", "said"),
    [({}, []), ({"published": True, "rho": 3, "tau_max": 0.2}, []), ({"target_macs": None, "tau_max": 0.2}, []),
     ({"tau_max": 0.2, "mu": 0.1}, ["tau_max=0.2 has no effect beside target_macs=0.1, which decides how far",
                                    "mu=0.1 has no effect without published=True"]),
     ({"published": True, "cuts": 5, "merge_batches": 9}, ["merge_batches=9 has no effect without merge=True",
                                                           "cuts=5 has no effect with published=True"])],
)  # fmt: skip
def test_what_changes_nothing_is_said(given, said):
    found = SauronSettings.from_given(**given).without_effect()
    assert len(found) == len(said) and all(f.startswith(s) for f, s in zip(found, said, strict=True))
