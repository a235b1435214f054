"""ONNX files against PyTorch, in both engines."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from nnunet_sauron_runtime.engines import load_network
from torch import nn

from nnunet_sauron.deploy.checks import ENGINES, synthetic_patches
from nnunet_sauron.deploy.networks import (
    SteadyInstanceNorm,
    steady_mean,
    with_steady_norms,
    without_idle_biases,
    write_network,
)
from nnunet_sauron.deploy.precision import to_float16

from ..contracts.networks import build


def exported(network: nn.Module, path, channels: int, size, engine: str):
    write_network(network, channels, size, path)
    return load_network(engine, path.read_bytes(), path.name, threads=1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("architecture", "dim", "norm"),
    [("plain", 2, "instance"), ("plain", 3, "instance"), ("residual", 3, "instance"), ("bottleneck", 2, "instance"),
     ("plain", 2, "batch")],
)  # fmt: skip
def test_an_engine_computes_what_pytorch_computes(tmp_path, architecture, dim, norm, engine):
    network = build(architecture, dim, norm=norm).eval()
    size = (16, 24, 8)[:dim]
    run = exported(network, tmp_path / "n.onnx", 2, size, engine)
    for kind, patch in synthetic_patches(2, size).items():
        for together in (1, 3):
            several = np.concatenate([patch * (1 + number) for number in range(together)])
            with torch.inference_mode():
                expected = network(torch.from_numpy(several)).numpy()
            assert run(several).shape == expected.shape == (together, 3, *size)
            # Batch norm takes nothing back of a constant of 20.
            assert np.abs(run(several) - expected).max() < 5e-5 + 5e-6 * np.abs(expected).max(), kind


def test_there_is_one_output_and_the_network_stays_as_it_is(tmp_path):
    network = build(deep_supervision=False).eval()
    modules, weights = [type(module) for module in network.modules()], copy.deepcopy(network.state_dict())
    write_network(network, 2, (16, 16), tmp_path / "n.onnx")
    assert [output.name for output in onnx.load(tmp_path / "n.onnx").graph.output] == ["logits"]
    assert [type(module) for module in network.modules()] == modules
    assert weights.keys() == network.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("engine", ENGINES)
def test_norms_of_tiles_that_are_constant_but_for_their_border(tmp_path, engine):
    """An engine that adds up 40 x 56 x 40 voxels one after the other is off by much more than this."""
    tile = np.full((1, 2, 40, 56, 40), 0.37, np.float32)
    tile[:, :, 0] += 0.01
    norm = nn.InstanceNorm3d(2, affine=True).eval()
    expected = norm.double()(torch.from_numpy(tile).double()).detach().numpy()
    run = exported(nn.Sequential(norm.float()), tmp_path / "n.onnx", 2, tile.shape[2:], engine)
    assert np.abs(expected).max() > 1
    assert np.abs(run(tile) - expected).max() < 1e-4


@pytest.mark.parametrize("size", [(7, 5), (53, 47), (96, 160), (3, 101, 8), (128,), (1, 1)])
def test_a_steady_mean_is_the_mean(size):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)) + 5
    axes = tuple(range(2, x.ndim))
    torch.testing.assert_close(steady_mean(x), x.double().mean(axes, keepdim=True).float(), rtol=1e-6, atol=1e-6)


def test_norms_without_weights():
    bare, x = nn.InstanceNorm2d(2), torch.randn(1, 2, 8, 8)
    torch.testing.assert_close(SteadyInstanceNorm(bare)(x), bare(x))


def test_norms_with_running_statistics_are_left_alone():
    tracked = nn.InstanceNorm2d(2, track_running_stats=True)
    assert with_steady_norms(nn.Sequential(tracked))[0].track_running_stats


@pytest.mark.parametrize("engine", ENGINES)
def test_a_network_that_was_hardly_trained_is_not_drowned_in_noise_on_zeros(tmp_path, engine):
    """Biases of its norms are zero, those in front of them are not: its true answer is that of no noise at all."""
    network = build(widths=(6, 8, 10, 12)).eval()
    for module in network.modules():
        if isinstance(module, nn.InstanceNorm2d):
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.bias)
    zeros = np.zeros((1, 2, 48, 48), np.float32)
    run = exported(network, tmp_path / "n.onnx", 2, (48, 48), engine)
    expected = without_idle_biases(network)(torch.from_numpy(zeros)).detach().numpy()
    assert np.abs(run(zeros) - expected).max() < 1e-6
    convolutions = [node for node in onnx.load(tmp_path / "n.onnx").graph.node if node.op_type == "Conv"]
    assert {len(node.input) for node in convolutions[:-1]} == {2} and len(convolutions[-1].input) == 3
    random = torch.randn(1, 2, 48, 48)
    torch.testing.assert_close(without_idle_biases(network)(random), network(random), atol=1e-4, rtol=1e-4)


class Unknown(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvals(x).real


def test_what_pytorch_cannot_write_is_said():
    with pytest.raises(ValueError, match="cannot write this network as ONNX: .*eig"):
        write_network(Unknown(), 1, (4, 4), "nowhere.onnx")


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_of_half_the_size_compute_in_float32(tmp_path, engine):
    network = build(widths=(16, 24, 32)).eval()
    for parameter in network.parameters():
        parameter.data = parameter.data.half().float()
    write_network(network, 2, (16, 16), tmp_path / "full.onnx")
    to_float16(tmp_path / "full.onnx", tmp_path / "half.onnx")
    full, half = ((tmp_path / f"{name}.onnx").stat().st_size for name in ("full", "half"))
    assert half < 0.65 * full
    patch = synthetic_patches(2, (16, 16))["random"]
    run = load_network(engine, (tmp_path / "half.onnx").read_bytes(), "half", threads=1)
    assert np.abs(run(patch) - network(torch.from_numpy(patch)).detach().numpy()).max() < 1e-4


def test_weights_too_large_for_float16_are_refused(tmp_path):
    network = build().eval()
    network.encoder.stages[0][0].convs[0].conv.weight.data *= 1e6
    write_network(network, 2, (16, 16), tmp_path / "full.onnx")
    with pytest.raises(ValueError, match="encoder.stages.0.0.convs.0.conv.weight has weights up to .*float16 ends"):
        to_float16(tmp_path / "full.onnx", tmp_path / "half.onnx")
