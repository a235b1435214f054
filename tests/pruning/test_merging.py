"""The algebra of merging; what it does to whole networks stands in the contract of pruned networks."""

from __future__ import annotations

import copy

import pytest
import torch

from nnunet_sauron.pruning import accept_pruned_weights, channel_layout, merge_channels, merging, resize
from nnunet_sauron.pruning.eval_mode import copy_network
from nnunet_sauron.pruning.moments import collect_moments

from ..contracts.networks import build, patch


def test_a_fit_is_best_where_positions_count():
    """Two halves of an image, each with its own best fit of the channel that goes."""
    network, tensor = build(dim=2).eval(), patch(seed=2)
    half = torch.zeros(len(tensor), *tensor.shape[2:])
    half[:, :8] = 1
    outputs = {}
    for name, weights in (("upper", [half]), ("lower", [1 - half]), ("all", None), ("before", None)):
        merged = copy.deepcopy(network)
        if name != "before":
            merge_channels(merged, {"encoder.stages.0.0.convs.0": [0, 1, 2, 3, 4]}, [tensor], weights=weights)
        reader = merged.encoder.stages[0][0].convs[1].conv
        reader.register_forward_hook(lambda module, inputs, output, name=name: outputs.update({name: output}))
        with torch.no_grad():
            merged(tensor)
    errors = {name: (output - outputs["before"]).square().sum(1) for name, output in outputs.items()}
    for name, other, part in (("upper", "lower", half), ("lower", "upper", 1 - half)):
        assert (errors[name] * part).sum() < (errors["all"] * part).sum() < (errors[other] * part).sum()


class TestBorder:
    """Maps that differ by a constant: the reader's bias takes it on, but at the border it is 0 that is read."""

    @pytest.fixture
    def shifted(self):
        network = build(dim=2).eval()
        unit = next(u for u in channel_layout(network).units if u.transposed)
        conv = network.get_submodule(unit.producers[0])
        with torch.no_grad():
            conv.weight[:, 1] = conv.weight[:, 0]
            conv.bias[1] = conv.bias[0] + 0.7
        return network, unit

    def test_inside_it_is_exact_and_at_the_border_bounded(self, shifted):
        network, unit = shifted
        reader = network.decoder.stages[0].convs[0].conv
        read = reader.weight[:, 1].detach().abs().sum(dim=(1, 2))
        merged = copy.deepcopy(network)
        keep = [c for c in range(unit.width) if c != 1]
        merge_channels(merged, {unit.name: keep}, [patch(seed=2)])

        outputs = []
        for each in (network, merged):
            module = each.decoder.stages[0].convs[0].conv
            module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
            with torch.no_grad():
                each(patch())
        difference = (outputs[0] - outputs[1]).abs()
        assert difference[..., 1:-1, 1:-1].max() < 1e-4
        at_border = difference.amax(dim=(0, 2, 3))
        assert at_border.max() > 1e-3
        assert (at_border <= 0.7 * read + 1e-4).all()


class TestReaders:
    @pytest.mark.parametrize("reader", ["transposed", "without bias"])
    def test_who_cannot_carry_a_constant_gets_the_fit_without_one(self, reader):
        """A transposed convolution's taps fall on different voxels; a reader without a bias has nowhere to put it."""
        network = build(dim=2).eval()
        if reader == "transposed":
            name, conv = "encoder.stages.2.0.convs.1", network.decoder.transpconvs[0]
        else:
            name, conv = "encoder.stages.0.0.convs.0", network.encoder.stages[0][0].convs[1].conv
            conv.bias = None
        before = conv.weight.detach().double().clone().transpose(0, 0 if reader == "transposed" else 1)
        moments = collect_moments(network, [name], [patch(seed=2)])[name]
        width = len(moments.total)
        kept = list(range(1, width))
        second = moments.products / moments.count
        fit = torch.linalg.solve(second[1:, 1:], second[1:, 0])
        merge_channels(network, {name: kept}, [patch(seed=2)])
        after = conv.weight.detach().double().transpose(0, 0 if reader == "transposed" else 1)
        expected = before[1:] + fit.view(-1, 1, 1, 1) * before[0]
        torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("ridge", [0, 1e9])
    def test_a_fit_aims_at_the_maps_before_any_cut(self, ridge, monkeypatch):
        """The second of two cuts mends what the first left wrong, by least squares, as far as a ridge lets it."""
        monkeypatch.setattr("nnunet_sauron.pruning.merging.AIM_RIDGE", ridge)
        network, tensor = build(dim=2).eval(), patch(seed=2)
        first, second = "encoder.stages.0.0.convs.0", "encoder.stages.0.0.convs.1"
        kept, maps = [0, 2, 3], []
        reader = network.encoder.stages[1][0].convs[0].conv
        weight, bias = (tensor.detach().double().clone() for tensor in (reader.weight, reader.bias))
        once = copy.deepcopy(network)
        merge_channels(once, {first: [0, 1]}, [tensor])
        for each in (network, once):
            hook = each.get_submodule(second).register_forward_hook(lambda m, i, out: maps.append(out.double()))
            with torch.no_grad():
                each(tensor)
            hook.remove()
        aims, samples = (m.transpose(0, 1).flatten(1).T for m in maps)
        with_one = torch.cat([samples[:, kept], torch.ones(len(samples), 1)], 1)
        fit = torch.linalg.lstsq(with_one, samples if ridge else aims).solution[:-1]
        offset = aims.mean(0) - samples[:, kept].mean(0) @ fit
        merge_channels(network, {first: [0, 1], second: kept}, [tensor])
        expected = torch.einsum("kc,ochw->okhw", fit, weight)
        torch.testing.assert_close(reader.weight.double(), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(reader.bias.double(), bias + torch.einsum("c,ochw->o", offset, weight))


@pytest.mark.parametrize(("architecture", "dim"), [("plain", 2), ("plain", 3), ("residual", 2)])
def test_in_one_pass_or_unit_by_unit_it_is_the_same_fit(architecture, dim, monkeypatch):
    """A residual unit has several places: in one pass, later ones know of the fold in the first. Both end near."""
    network = build(architecture, dim=dim).eval()
    inputs = [patch(dim=dim, seed=seed) for seed in range(3)]
    widths = channel_layout(network).widths
    keep = {name: list(range(width * 3 // 4)) for name, width in widths.items()}
    outputs, units = {}, {}
    for name, limit in (("one pass", 1 << 28), ("unit by unit", 0)):
        monkeypatch.setattr(merging, "VALUES_IN_ONE_PASS", limit)
        merged, units[name] = copy.deepcopy(network), []
        merge_channels(merged, keep, inputs, after_unit=units[name].append)
        assert channel_layout(merged).widths == {name: len(kept) for name, kept in keep.items()}
        with torch.no_grad():
            outputs[name] = merged(inputs[0])
    assert sorted(units["one pass"]) == sorted(units["unit by unit"]) == sorted(widths)
    with torch.no_grad():
        before = network(inputs[0])
    first = [o[0] if isinstance(o, (list, tuple)) else o for o in (*outputs.values(), before)]
    difference, change = (first[0] - first[1]).norm(), (first[1] - first[2]).norm()
    assert difference < (1e-4 if architecture == "plain" else 0.5) * change


def test_nothing_changes_when_what_is_asked_for_is_wrong():
    network = build()
    before = copy.deepcopy(network.state_dict())
    name = channel_layout(network).units[0].name
    for keep, inputs, said in (
        ({"nowhere": [3]}, [patch()], "There is no channel unit 'nowhere'"),
        ({name: []}, [patch()], "would lose all"),
        ({name: [2, 7]}, [patch()], "in 0..5"),
        ({name: [3, 1]}, [patch()], "ascending"),
        ({name: [3]}, [], "There are no inputs"),
    ):
        with pytest.raises(ValueError, match=said):
            merge_channels(network, keep, inputs)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
     "register_full_backward_pre_hook", "register_state_dict_pre_hook", "register_load_state_dict_post_hook",
     "_register_load_state_dict_pre_hook", "_register_state_dict_hook"],
)  # fmt: skip
@pytest.mark.parametrize("limit", [0, 1 << 28], ids=["unit by unit", "one pass"])
def test_what_hooks_belong_to_is_not_copied(register, limit, monkeypatch):
    """A trainer's hooks hold data loaders, and maps with their graphs, which cannot be copied."""
    monkeypatch.setattr(merging, "VALUES_IN_ONE_PASS", limit)
    network, name = build(dim=2), "encoder.stages.1.0.convs.0"

    class Owner:
        def hook(self, *_, **__):
            pass

        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    getattr(network.get_submodule(name), register)(Owner().hook)
    merge_channels(network, {name: [0, 1]}, [patch(seed=2)])
    assert channel_layout(network).widths[name] == 2
    copy_network(network)


def test_a_copys_hooks_are_those_of_its_original():
    network, seen = build(dim=2), []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(module))
    twin = copy_network(network)
    twin(patch())
    assert seen == [twin]
    accept_pruned_weights(twin)
    third = copy_network(twin)  # a hook that PyTorch holds together with its module: the copy's is the copy
    third.load_state_dict(resized(copy_network(network)).state_dict())
    assert channel_layout(third).widths != channel_layout(twin).widths == channel_layout(network).widths


def resized(network):
    resize(network, {name: width - 2 for name, width in channel_layout(network).widths.items()})
    return network


def test_maps_that_are_not_finite_give_no_fit():
    network, name = build(dim=2).eval(), "encoder.stages.1.0.convs.0"
    with torch.no_grad():
        network.get_submodule(name).norm.weight[0] = float("inf")
    with pytest.raises(torch.linalg.LinAlgError, match="no finite solution"):
        merge_channels(network, {name: [1, 2]}, [patch(seed=2)])


@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_a_layer_whose_maps_are_constant_merges_into_one_channel(bias):
    network = build(dim=2).eval()
    norm = network.encoder.stages[1][0].convs[0].norm
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.fill_(bias)
        expected = network(patch())
    merge_channels(network, {"encoder.stages.1.0.convs.0": [2]}, [patch(seed=2)])
    with torch.no_grad():
        difference = network(patch()) - expected
    assert difference.isfinite().all()
    if bias == 0:
        assert difference.abs().max() < 1e-4
