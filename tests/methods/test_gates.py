"""Gates and factors on feature maps: what autograd would compute with tensors of its own, without them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from nnunet_sauron.methods.autopruner import AutoPruner
from nnunet_sauron.methods.gates import register_gates, scaled
from nnunet_sauron.methods.measuring import map_gradients, map_norms
from nnunet_sauron.methods.stamp import STAMP
from nnunet_sauron.pruning import CostModel, channel_layout, remove_channels
from nnunet_sauron.pruning.channels import feature_map_modules

from ..contracts.networks import build, patch
from ..old_torch import compiles_hooks
from .test_methods import attached, maps_of

NETWORKS = [("plain", 2, "instance"), ("resenc", 2, "batch"), ("plain", 3, "batch"), ("bottleneck", 2, "instance")]


def gradients(network, x, also=()) -> list[torch.Tensor]:
    network.train()
    network.zero_grad()
    network(x).square().mean().backward()
    return [p.grad.clone() for p in [*network.parameters(), *also] if p.grad is not None]


def multiply(network, factor_of) -> None:
    """Multiply every unit's maps, as autograd does it."""
    for unit, _, module in feature_map_modules(network, channel_layout(network)):
        module.register_forward_hook(lambda m, i, h, unit=unit: h * factor_of(unit, h))


def assert_equal(ones, others, atol: float = 1e-6) -> None:
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=atol)


@pytest.mark.parametrize(("architecture", "dim", "norm"), NETWORKS)
def test_a_gates_gradient_is_the_sum_of_maps_times_gradient_and_all_else_stays(architecture, dim, norm):
    network, other = build(architecture, dim, norm=norm), build(architecture, dim, norm=norm)
    layout = channel_layout(network)
    gates = {name: torch.ones(width, requires_grad=True) for name, width in layout.widths.items()}
    register_gates(network, layout, gates.__getitem__)
    assert_equal(gradients(network, patch(dim)), gradients(other, patch(dim)))
    sums = {u: (h * h.grad).sum([0, *range(2, h.ndim)]).detach() for u, h in maps_of(other, patch(dim)).items()}
    single = [unit.name for unit in layout.units if len(unit.feature_maps) == 1]
    assert any("transpconvs" in name for name in single)
    for name in single:
        torch.testing.assert_close(gates[name].grad, sums[name], rtol=1e-4, atol=1e-6)


def test_float16_neither_overflows_nor_underflows():
    network = build()
    layout = channel_layout(network)
    unit = layout.units[0]
    gate = torch.ones(unit.width, requires_grad=True)
    block = network.encoder.stages[0][0].convs[0] = nn.Identity()
    register_gates(network, layout, lambda name: gate if name == unit.name else None)
    for value, grad in ((300.0, 300.0), (1e-4, 1e-6)):
        gate.grad = None
        h = torch.full((2, unit.width, 64, 64), value, dtype=torch.float16, requires_grad=True)
        block(h).backward(torch.full_like(h, grad))
        expected = 2 * 64 * 64 * h.detach()[0, 0, 0, 0].double() * torch.tensor(grad).half().double()
        torch.testing.assert_close(gate.grad, expected.float().expand(unit.width))


@pytest.mark.parametrize(
    "nonlinearity",
    [nn.LeakyReLU(inplace=True), nn.LeakyReLU(0.2), nn.ReLU(inplace=True), nn.ELU(inplace=True), nn.GELU(),
     nn.Sigmoid(), nn.Tanh(), None],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("norm", [nn.InstanceNorm2d, nn.BatchNorm2d])
def test_scaling_is_the_product_after_every_nonlinearity(nonlinearity, norm):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 4, 3), norm(4, affine=True)
            if nonlinearity is not None:
                self.nonlin = nonlinearity

        def forward(self, x):
            x = self.norm(self.conv(x))
            return x if nonlinearity is None else self.nonlin(x)

    block, reader = Block(), nn.Conv2d(4, 3, 3)
    factors = torch.tensor([[0.0, 1.25, 0.3, 1.0], [1.25, 0.0, 1e-3, 2.0]])
    found = []
    for multiplied in (lambda h: scaled(block, h, factors), lambda h: h * factors[..., None, None]):
        both = nn.ModuleList([block, reader])
        both.zero_grad()
        output = reader(multiplied(block(patch())))
        output.square().sum().backward()
        found.append([output.detach(), *(p.grad.clone() for p in both.parameters())])
    assert_equal(*found)


@pytest.mark.parametrize(("architecture", "dim", "norm"), NETWORKS)
def test_norms_and_gradients_are_those_of_all_maps_of_a_unit(architecture, dim, norm):
    """In evaluation mode, summed over two batches, and over the modules that make a unit's maps."""
    network, other = build(architecture, dim, norm=norm), build(architecture, dim, norm=norm).eval()
    batches = [patch(dim, seed=1), patch(dim, seed=2)]
    norms, products = {}, {}
    for unit, _, module in feature_map_modules(other, channel_layout(other)):

        def seen(m, i, h, unit=unit):
            h = h * 1.0
            norms[unit] = norms.get(unit, 0) + h.detach().flatten(2).norm(dim=2).mean(0)
            h.register_hook(
                lambda g: products.__setitem__(unit, products.get(unit, 0) + (h * g).flatten(2).sum([0, 2]))
            )
            return h

        module.register_forward_hook(seen)
    for tensor in batches:
        other(tensor).square().mean().backward()
    found = map_gradients(network, (network(tensor).square().mean() for tensor in batches))
    for sums, expected in ((map_norms(network, batches, 2), norms), (found, products)):
        assert sums.keys() == expected.keys() == channel_layout(network).widths.keys()
        for unit, of_unit in sums.items():
            torch.testing.assert_close(of_unit, expected[unit].detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("architecture", "dim", "norm"), NETWORKS)
def test_stamps_dropout_is_pytorchs_after_each_block(architecture, dim, norm):
    network, other = build(architecture, dim, norm=norm), build(architecture, dim, norm=norm)
    stamp = attached(STAMP, network, b_drop=0.4)
    blocks = {unit.name for unit in channel_layout(network).units if not unit.transposed}
    assert stamp.state()["dropout"].keys() == blocks
    stamp.load_state({"dropout": dict.fromkeys(blocks, 0.4)})
    drop = functional.dropout2d if dim == 2 else functional.dropout3d
    for unit, _, module in feature_map_modules(other, channel_layout(other)):
        if unit in blocks:
            module.register_forward_hook(lambda m, i, h: drop(h * 1.0, 0.4))
    torch.manual_seed(0)
    mine = gradients(network, patch(dim))
    torch.manual_seed(0)
    assert_equal(mine, gradients(other, patch(dim)))


@pytest.mark.parametrize(("architecture", "dim", "norm"), NETWORKS)
@pytest.mark.parametrize("alpha", [1.0, 30.0])
def test_autopruners_codes_have_the_gradients_of_a_product(architecture, dim, norm, alpha):
    network, other = build(architecture, dim, norm=norm), build(architecture, dim, norm=norm)
    method, reference = attached(AutoPruner, network), attached(AutoPruner, build(architecture, dim, norm=norm))
    method._alpha.fill_(alpha)

    def code(unit, h):
        layer = reference._layers[reference._keys[unit]]
        return torch.sigmoid(alpha * layer(h.mean([0, *range(2, h.ndim)]))).view(1, -1, *[1] * dim)

    multiply(other, code)
    mine = gradients(network, patch(dim), method._layers.parameters())
    # In 3D, float32's rounding of the two orders of sums differs by 3e-6 on some processors.
    assert_equal(mine, gradients(other, patch(dim), reference._layers.parameters()), atol=1e-5 if dim == 3 else 1e-6)


@pytest.mark.parametrize("method_class", [AutoPruner, STAMP])
def test_evaluation_neither_needs_an_epoch_nor_the_widths_that_it_began_with(method_class):
    network, layout = build(), channel_layout(build())
    method = method_class(method_class.Settings(), 6)
    method.prepare(layout, CostModel(network, [16, 16], 2), None)
    method.attach(network, layout)
    expected = build().eval()(patch())
    assert torch.equal(network.eval()(patch()), expected)
    method.start_epoch(0, layout.widths)
    remove_channels(network, {name: [0, 1, 2] for name in layout.widths})
    assert network(patch()).isfinite().all()


@compiles_hooks
@pytest.mark.parametrize("method_class", [AutoPruner, STAMP])
def test_compiled_it_learns_the_same(method_class):
    """In one graph; the compiler's back end is not what is tested."""
    torch._dynamo.reset()
    found = []
    for compiled in (True, False):
        network = build(widths=(4, 6))
        # What is dropped is drawn otherwise in a compiled graph: with this little nothing is.
        method = attached(method_class, network, **({"b_drop": 1e-6} if method_class is STAMP else {}))
        layers = method._layers.parameters() if method_class is AutoPruner else []
        run = torch.compile(network, backend="aot_eager", fullgraph=True) if compiled else network
        network.train()
        method.before_step()
        loss = run(patch()).square().mean()
        term = method.regulariser()
        (loss if term is None else loss + term).backward()
        learnt = [p.grad.clone() for p in [*network.parameters(), *layers] if p.grad is not None]
        found.append(learnt)
    assert_equal(*found)


def test_codes_of_next_to_nothing_leave_no_subnormal_numbers():
    """A CPU is slow with them: once codes were sharp, an epoch of AutoPruner took 71 s in the place of 19."""
    network = build(widths=(8, 12, 16))
    method = attached(AutoPruner, network)
    for layer in method._layers.values():
        nn.init.zeros_(layer.weight)
        layer.bias.data = torch.where(torch.arange(len(layer.bias)) % 2 == 0, 50.0, -50.0)  # codes of 1 and of 2e-22
    method._alpha = torch.ones(())
    for gradient in gradients(network, patch(2)):
        assert not ((gradient != 0) & (gradient.abs() < torch.finfo(gradient.dtype).tiny)).any()
