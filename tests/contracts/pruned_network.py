"""What holds for every pruned network, whatever its architecture: a test class names one and inherits this."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

from nnunet_sauron.pruning import (
    accept_pruned_weights,
    channel_layout,
    count_parameters,
    densify,
    feature_map_voxels,
    merge_channels,
    rank_units,
    remove_channels,
    resize,
    widths_of,
)

from .networks import WIDTHS, build, patch


class PrunedNetworkContract:
    """Fill in what `build` takes; every test then runs on that network, 2D and 3D."""

    architecture = "plain"
    widths = WIDTHS
    norm = "instance"

    @pytest.fixture(params=[2, 3], ids=["2d", "3d"])
    def dim(self, request) -> int:
        return request.param

    def network(self, dim: int, **changes) -> nn.Module:
        return build(self.architecture, dim, self.widths, self.norm, **changes)

    @pytest.fixture
    def dense(self, dim) -> nn.Module:
        return self.network(dim)

    def keep(self, network: nn.Module, seed: int = 0) -> dict[str, list[int]]:
        """From one channel to all but one, drawn per unit."""
        draw = random.Random(seed)
        return {
            unit.name: sorted(draw.sample(range(unit.width), draw.randint(1, unit.width - 1)))
            for unit in channel_layout(network).units
        }

    def test_output_equals_that_of_the_masked_dense_network(self, dense, dim):
        dense.eval()
        keep = self.keep(dense)
        pruned = copy.deepcopy(dense)
        remove_channels(pruned, keep)
        mask_feature_maps(dense, keep)
        with torch.no_grad():
            expected, got = dense(patch(dim)), pruned(patch(dim))
        assert count_parameters(pruned) < count_parameters(dense)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)

    def test_deep_supervision_outputs_equal_too(self, dim):
        dense = self.network(dim, deep_supervision=True).eval()
        keep = self.keep(dense)
        pruned = copy.deepcopy(dense)
        remove_channels(pruned, keep)
        mask_feature_maps(dense, keep)
        with torch.no_grad():
            outputs = list(zip(pruned(patch(dim)), dense(patch(dim)), strict=True))
        assert len(outputs) == len(self.widths) - 1
        for got, expected in outputs:
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)

    def test_channel_attributes_follow(self, dense):
        remove_channels(dense, self.keep(dense))
        for name, module in dense.named_modules():
            if isinstance(module, nn.modules.conv._ConvTransposeNd):
                assert tuple(module.weight.shape[:2]) == (module.in_channels, module.out_channels), name
            elif isinstance(module, nn.modules.conv._ConvNd):
                assert tuple(module.weight.shape[:2]) == (module.out_channels, module.in_channels), name
            elif isinstance(module, nn.modules.batchnorm._NormBase):
                assert module.weight.numel() == module.num_features, name
            elif type(module).__name__ == "ConvDropoutNormReLU":
                shape = (module.conv.out_channels, module.conv.in_channels)
                assert (module.output_channels, module.input_channels) == shape, name
        output = dense.eval().encoder(patch(len(dense.encoder.strides[0])))
        assert list(dense.encoder.output_channels) == [skip.shape[1] for skip in output]

    def test_the_plans_own_list_of_widths_is_not_changed(self, dim):
        widths = list(self.widths)
        network = self.network(dim)
        network.encoder.output_channels = widths
        remove_channels(network, self.keep(network))
        assert widths == list(self.widths)

    @pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
    def test_optimiser_state_follows_by_index(self, dim, optimizer_class):
        dense = self.network(dim, deep_supervision=True)
        arguments = {"momentum": 0.9, "nesterov": True} if optimizer_class is torch.optim.SGD else {"amsgrad": True}
        parameters = list(dense.parameters())
        groups = [{"params": parameters[::2]}, {"params": parameters[1::2], "weight_decay": 0.1}]
        optimizer = optimizer_class(groups, lr=1e-3, **arguments)
        train_step(dense, optimizer, dim)
        # Each state tensor becomes its own parameter's value, so the cut must move both alike.
        with torch.no_grad():
            for parameter, state in optimizer.state.items():
                for value in state.values():
                    if torch.is_tensor(value) and value.shape == parameter.shape:
                        value.copy_(parameter)
        remove_channels(dense, self.keep(dense), optimizer)
        alive = {id(p) for p in dense.parameters()}
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == alive
        assert {id(p) for p in optimizer.state} == alive
        assert [len(group["params"]) for group in optimizer.param_groups] == [len(g["params"]) for g in groups]
        for parameter, state in optimizer.state.items():
            tensors = [v for v in state.values() if torch.is_tensor(v) and v.ndim > 0]
            assert tensors
            for value in tensors:
                torch.testing.assert_close(value, parameter.detach())

    def test_every_tensor_still_learns(self, dim):
        dense = self.network(dim, deep_supervision=True)
        optimizer = torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9)
        train_step(dense, optimizer, dim)
        remove_channels(dense, self.keep(dense), optimizer)
        before = {name: p.detach().clone() for name, p in dense.named_parameters()}
        train_step(dense, optimizer, dim)
        for name, parameter in dense.named_parameters():
            assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name
            normalised_away = name.endswith("conv.bias") and parameter.grad.abs().max() < 1e-6
            assert normalised_away or not torch.equal(before[name], parameter.detach()), name

    def test_three_cuts_in_a_row_equal_one_of_their_composition(self, dense, dim):
        once, keep = copy.deepcopy(dense), {name: list(range(w)) for name, w in channel_layout(dense).widths.items()}
        for seed in range(3):
            step = {
                name: kept if len(kept) > 1 else [0]
                for name, kept in self.keep_of_widths(channel_layout(dense).widths, seed).items()
            }
            remove_channels(dense, step)
            keep = {name: [keep[name][i] for i in step[name]] for name in keep}
        remove_channels(once, keep)
        for (name, a), b in zip(dense.state_dict().items(), once.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, msg=name)

    @staticmethod
    def keep_of_widths(widths: dict[str, int], seed: int) -> dict[str, list[int]]:
        draw = random.Random(seed)
        return {name: sorted(draw.sample(range(w), max(1, w - draw.randint(0, 2)))) for name, w in widths.items()}

    def test_a_dense_network_takes_the_widths_of_what_it_loads_up_and_down(self, dense, dim):
        accept_pruned_weights(dense)
        states, outputs = [], []
        for seed in range(3):
            pruned = self.network(dim, seed=seed).eval()
            remove_channels(pruned, self.keep(pruned, seed))
            states.append(pruned.state_dict())
            with torch.no_grad():
                outputs.append(pruned(patch(dim)))
        dense.eval()
        for i in (0, 1, 2, 0):
            with torch.inference_mode():
                dense.load_state_dict(states[i])
                torch.testing.assert_close(dense(patch(dim)), outputs[i])
        train_step(dense.train(), torch.optim.SGD(dense.parameters(), lr=0.1), dim)

    def test_the_load_hook_survives_a_deep_copy_of_the_network(self, dense, dim):
        pruned = self.network(dim)
        remove_channels(pruned, self.keep(pruned))
        copied = copy.deepcopy(accept_pruned_weights(dense))
        copied.load_state_dict(pruned.state_dict())
        assert channel_layout(copied).widths == channel_layout(pruned).widths

    def test_other_differences_stay_pytorchs_own_error(self, dense, dim):
        accept_pruned_weights(dense)
        state = dense.state_dict()
        wrong = {name: t[..., :1] if t.ndim > 1 else t for name, t in state.items()}
        assert widths_of(dense, wrong) is None
        with pytest.raises(RuntimeError, match="size mismatch"):
            dense.load_state_dict(wrong)
        assert channel_layout(dense).widths == channel_layout(self.network(dim)).widths

    def test_densified_network_gives_the_same_output(self, dense, dim):
        widths = channel_layout(dense).widths
        shapes = [p.shape for p in dense.parameters()]
        remove_channels(dense, self.keep(dense))
        dense.eval()
        with torch.no_grad():
            expected = dense(patch(dim))
            got = densify(dense, widths)(patch(dim))
        assert [p.shape for p in dense.parameters()] == shapes
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)

    def test_removal_undoes_resize(self, dense, dim):
        widths = channel_layout(dense).widths
        state = {name: t.clone() for name, t in dense.state_dict().items()}
        resize(dense, {name: w + 3 for name, w in widths.items()})
        remove_channels(dense, {name: range(w) for name, w in widths.items()})
        for name, tensor in dense.state_dict().items():
            torch.testing.assert_close(tensor, state[name], msg=name)

    def test_feature_map_voxels_are_those_of_a_real_forward(self, dense, dim):
        expected: dict[str, list[int]] = {}
        for unit in channel_layout(dense).units:
            for place in unit.feature_maps:
                dense.get_submodule(place).register_forward_hook(
                    lambda m, i, out, name=unit.name: expected.setdefault(name, []).append(out[0, 0].numel())
                )
        counted = feature_map_voxels(copy.deepcopy(dense), [16] * dim, 2)
        expected.clear()  # hooks are copied with the network
        dense(patch(dim))
        assert counted == {name: min(voxels) for name, voxels in expected.items()}

    def test_multiples_of_kept_channels_merge_without_a_trace(self, dense, dim):
        keep = make_multiples(dense.eval())
        with torch.no_grad():
            expected = dense(patch(dim))
        ranked, dropped = copy.deepcopy(dense), copy.deepcopy(dense)
        inputs = [patch(dim, seed=2), patch(dim, seed=3)]
        remove_channels(dropped, keep)
        rankings = rank_units(ranked, inputs)
        merge_channels(ranked, {name: rankings[name].keep(len(kept)) for name, kept in keep.items()}, inputs)
        merge_channels(dense, keep, inputs)
        assert channel_layout(dense).widths == {name: len(kept) for name, kept in keep.items()}
        with torch.no_grad():
            assert (dropped(patch(dim)) - expected).abs().max() > 1e-2
            torch.testing.assert_close(dense(patch(dim)), expected, atol=1e-4, rtol=0)
            torch.testing.assert_close(ranked(patch(dim)), expected, atol=1e-4, rtol=0)

    def test_near_multiples_lose_little_and_the_optimiser_follows(self, dense, dim):
        keep = make_multiples(dense)
        optimizer = torch.optim.SGD(dense.parameters(), lr=1e-2, momentum=0.9)
        train_step(dense, optimizer, dim)  # after it they are multiples no more
        with torch.no_grad():
            expected = dense.eval()(patch(dim))
        dropped = copy.deepcopy(dense)
        remove_channels(dropped, keep)
        merge_channels(dense, keep, [patch(dim)], optimizer=optimizer)
        with torch.no_grad():
            lost = [(network(patch(dim)) - expected).square().mean() for network in (dense, dropped)]
        assert 0 < lost[0] < 0.2 * lost[1]
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in dense.parameters()]
        for parameter, state in optimizer.state.items():
            assert state["momentum_buffer"].shape == parameter.shape
        train_step(dense, optimizer, dim)

    def test_bad_requests_are_refused_and_change_nothing(self, dense):
        name, width = next(iter(channel_layout(dense).widths.items()))
        for keep, said in (
            ({"nowhere": [0]}, "nowhere"),
            ({name: []}, "at least one"),
            ({name: [width]}, str(width - 1)),
            ({name: [1, 0]}, "ascending"),
        ):
            with pytest.raises(ValueError, match=said):
                remove_channels(dense, keep)
        with pytest.raises(ValueError, match="more than"):
            densify(dense, {n: w - 1 for n, w in channel_layout(dense).widths.items()})
        assert channel_layout(dense).widths[name] == width


def mask_feature_maps(network: nn.Module, keep: dict[str, list[int]]) -> None:
    """Make a dense network behave as if only the kept channels existed: all others leave their layer as zeros."""
    for unit in channel_layout(network).units:
        mask = torch.zeros(unit.width)
        mask[keep[unit.name]] = 1
        for name in unit.feature_maps:
            module = network.get_submodule(name)
            module.register_forward_hook(lambda m, i, out, mask=mask: out * mask.view(1, -1, *[1] * (out.ndim - 2)))


@torch.no_grad()
def make_multiples(network: nn.Module) -> dict[str, list[int]]:
    """Make half of every unit's channels positive multiples of others, at all of its places; return the others."""
    draw, layout, keep = random.Random(0), channel_layout(network), {}
    for unit in layout.units:
        channels = draw.sample(range(unit.width), unit.width)
        originals, copies = channels[: unit.width // 2], channels[unit.width // 2 :]
        for copied in copies:
            original, factor = draw.choice(originals), draw.uniform(0.5, 2)
            for axis in layout.axes:
                if axis.reads or axis.segments[0][0] != unit.name:
                    continue
                module = network.get_submodule(axis.module)
                tensor = getattr(module, axis.tensor)
                # A norm undoes its convolution's factor, so it brings its own; a transposed convolution has no norm.
                is_norm = isinstance(module, nn.modules.batchnorm._NormBase)
                scaled = axis.tensor in ("weight", "bias") and (is_norm or unit.transposed)
                tensor.select(axis.dim, copied).copy_(tensor.select(axis.dim, original) * (factor if scaled else 1))
        keep[unit.name] = sorted(originals)
    return keep


def train_step(network: nn.Module, optimizer: torch.optim.Optimizer, dim: int) -> None:
    network.train()
    optimizer.zero_grad()
    output = network(patch(dim))
    outputs = output if isinstance(output, (list, tuple)) else [output]
    sum(o.square().mean() for o in outputs).backward()
    optimizer.step()
