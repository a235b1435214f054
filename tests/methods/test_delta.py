"""delta_opt and delta_prune against the formulas written out as they stand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from nnunet_sauron.methods.delta import (
    NORMALISATIONS,
    delta_opt,
    delta_prune,
    pairwise_distances,
    relative_pairwise_distances,
    with_delta_opt,
)

SHAPES = [(2, 5, 8, 6), (3, 4, 7, 9), (2, 5, 4, 6, 8), (2, 3, 1, 7, 8), (1, 3, 5, 5, 5), (2, 4, 1, 1)]


def textbook_delta_opt(h: torch.Tensor, normalisation: str) -> torch.Tensor:
    """METHOD: normalise each map over all of its space, pool, root mean square distance to map 0."""
    b, c = h.shape[:2]
    axes = tuple(range(2, h.ndim))
    if normalisation == "minmax":
        low, high = h.amin(axes, keepdim=True), h.amax(axes, keepdim=True)
        h = (h - low) / (high - low)
    d = [
        torch.stack([torch.sqrt(torch.mean((pool(h[i : i + 1, 0:1]) - pool(h[i : i + 1, j : j + 1])) ** 2))
                     for j in range(1, c)])
        for i in range(b)
    ]  # fmt: skip
    if normalisation == "max_distance":
        d = [row / row.max() for row in d]
    return torch.stack(d).mean()


def pool(h: torch.Tensor) -> torch.Tensor:
    window = [min(2, side) for side in h.shape[2:]]
    return (functional.avg_pool3d if h.ndim == 5 else functional.avg_pool2d)(h, window, window)


def random_maps(shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[-2:] != (1, 1)], ids=str)
def test_delta_opt_and_its_gradient_equal_the_formulas(shape, normalisation):
    h = random_maps(shape).requires_grad_()
    expected_h = h.detach().clone().requires_grad_()
    value, expected = delta_opt(h, normalisation=normalisation), textbook_delta_opt(expected_h, normalisation)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(h.grad, expected_h.grad, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("shape", [*SHAPES[:-1], (2, 3, 32, 40), (2, 3, 33, 40), (2, 3, 8, 6, 10)], ids=str)
def test_its_gradient_is_added_to_that_of_the_layers_after(shape, normalisation):
    h = random_maps(shape).requires_grad_()
    expected_h = h.detach().clone().requires_grad_()
    onward = random_maps(shape, seed=1) / 100
    maps, term = with_delta_opt(h, normalisation)
    handed_on = (maps * onward).sum()
    (handed_on + term).backward()
    ((expected_h * onward).sum() + textbook_delta_opt(expected_h, normalisation)).backward()
    torch.testing.assert_close(h.grad, expected_h.grad, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(onward, random_maps(shape, seed=1) / 100, atol=0, rtol=0)


@pytest.mark.parametrize("shape", [(2, 4, 7, 5), (2, 4, 32, 40), (2, 4, 8, 12, 16)], ids=str)
def test_of_equal_extremes_only_one_has_the_gradient_and_all_of_it(shape):
    # However it is shared out, delta_opt knows neither a map's level nor its scale.
    h = random_maps(shape).clamp(0, 3).requires_grad_()
    delta_opt(h).backward()
    gradient = h.grad.flatten(2).double()
    size = gradient.abs().sum(2)
    assert (size > 0).all()
    assert (gradient.sum(2).abs() < 1e-5 * size).all()
    assert ((gradient * h.detach().flatten(2)).sum(2).abs() < 1e-5 * size).all()


def test_delta_opt_of_a_hand_computed_case():
    # One sample, three 2 x 2 maps; normalised they are [0, 1/3, 2/3, 1] (mean 1/2), [0, 0, 0, 1] (mean 1/4) and
    # [1, 0, 1, 1] (mean 3/4); each is pooled to one value, so both distances are 1/4.
    h = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]], [[5.0, 5.0], [5.0, 9.0]], [[7.0, 1.0], [7.0, 7.0]]]])
    assert delta_opt(h).item() == pytest.approx(0.25)
    # Pooled: 1.5, 6, 5.5.
    assert delta_opt(h, normalisation="none").item() == pytest.approx((4.5 + 4.0) / 2)
    assert delta_opt(h, normalisation="max_distance").item() == pytest.approx((1 + 4.0 / 4.5) / 2)
    torch.testing.assert_close(delta_prune(h, reference=1), torch.tensor([1.0, 0.0, 0.5 / 4.5]))


def test_in_3d_the_extrema_are_those_of_the_volume_not_of_a_slice():
    h = random_maps((2, 4, 4, 6, 6))
    h[:, :, 0] += 10
    assert delta_opt(h).item() == pytest.approx(textbook_delta_opt(h, "minmax").item(), rel=1e-5)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize(
    "h",
    [
        torch.ones(2, 3, 4, 4),
        torch.zeros(2, 3, 4, 4, 4),
        torch.cat([torch.ones(2, 2, 4, 4), random_maps((2, 2, 4, 4))], 1),
        random_maps((2, 1, 4, 4)).repeat(1, 3, 1, 1),
        random_maps((2, 1, 4, 4)) * torch.tensor([1.0, 1e-30, 0.0]).view(1, 3, 1, 1) + 5,
        random_maps((2, 1, 4, 4)) * torch.tensor([1.0, 1e-42, 1.0]).view(1, 3, 1, 1),
        random_maps((2, 3, 1, 1)),
        random_maps((2, 3, 1, 1, 1)),
        (random_maps((2, 3, 6, 6)) * 1000).half(),
        (random_maps((2, 3, 6, 6)) * 1e-7).half(),
        random_maps((2, 3, 6, 6)).bfloat16(),
        random_maps((2, 3, 6, 6, 6)).half(),
        random_maps((2, 3, 5, 4, 6)).bfloat16(),
    ],
    ids=["all constant", "all zero", "some constant", "all equal", "dead", "denormal", "side 1", "side 1 3d", "half",
         "tiny half", "bfloat16", "half 3d", "bfloat16 3d"],
)  # fmt: skip
def test_value_and_gradient_are_finite(h, normalisation):
    h = h.clone().requires_grad_()
    value = delta_opt(h, normalisation=normalisation)
    value.backward()
    assert value.dtype == torch.float32 and torch.isfinite(value)
    assert h.grad.dtype == h.dtype and torch.isfinite(h.grad).all()
    scores = delta_prune(h.detach(), reference=1)
    assert torch.isfinite(scores).all() and scores.min() >= 0 and scores.max() <= 1 + 1e-6


def test_one_channel_adds_nothing():
    h = random_maps((2, 1, 4, 4)).requires_grad_()
    assert delta_opt(h).item() == 0
    assert delta_prune(h, reference=0).tolist() == [0.0]


def test_half_precision_under_autocast_agrees_with_float32():
    h = random_maps((2, 5, 8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = delta_opt(h.half())
    assert value.item() == pytest.approx(textbook_delta_opt(h.half().float(), "minmax").item(), rel=2e-3)


def test_one_step_down_the_gradient_lowers_delta_opt():
    h = random_maps((2, 6, 8, 8)).requires_grad_()
    before = delta_opt(h)
    before.backward()
    assert delta_opt((h - 5 * h.grad).detach()) < before


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_delta_prune_equals_the_formula(shape):
    h = random_maps(shape)
    for reference in range(shape[1]):
        d = torch.stack([torch.sqrt(((pool(h)[:, [c]] - pool(h)[:, [reference]]) ** 2).flatten(1).mean(1))
                         for c in range(shape[1])], 1)  # fmt: skip
        expected = (d / d.amax(1, keepdim=True)).mean(0)
        got = delta_prune(h, reference=reference)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
        assert got[reference] == 0 and got.shape == (shape[1],)


def test_bad_arguments_are_named():
    h = random_maps((2, 3, 4, 4))
    with pytest.raises(ValueError, match="minmax, none, max_distance; got 'l2'"):
        delta_opt(h, normalisation="l2")
    with pytest.raises(ValueError, match=r"0\.\.2; got 3"):
        delta_prune(h, reference=3)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        delta_opt(torch.zeros(2, 3))


@pytest.mark.parametrize("shape", [*SHAPES, (3, 1, 6, 6)], ids=str)
def test_pairwise_distances_equal_the_formula(shape):
    h = random_maps(shape)
    maps = pool(h).flatten(2)
    expected = (maps[:, :, None] - maps[:, None]).square().mean(-1).sqrt()
    got = pairwise_distances(h)
    assert got.shape == (shape[0], shape[1], shape[1]) and got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 1, 6, 6), (2, 40, 6, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_row_of_relative_pairwise_distances_is_delta_prune_with_that_reference(shape, dtype):
    h = random_maps(shape).to(dtype)
    h[:, -1] = h[:, 0]
    got = relative_pairwise_distances(h)
    expected = torch.stack([delta_prune(h, reference=r) for r in range(shape[1])])
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)


def test_pairwise_distances_of_nearly_equal_maps_far_from_zero_are_not_lost():
    # In float32, a product of maps around 1000 is known to 0.06 only, and the distances' squares are around 1e-3. On a
    # grid of 1/256, on which pooling is exact, nothing else is rounded.
    h = 1000 + random_maps((2, 1, 8, 8)) + 0.01 * random_maps((2, 6, 8, 8), seed=1)
    h[:, 0] -= 1000
    h = (256 * h).round() / 256
    maps = pool(h).flatten(2).double()
    expected = (maps[:, :, None] - maps[:, None]).square().mean(-1).sqrt().float()
    torch.testing.assert_close(pairwise_distances(h), expected, atol=1e-7, rtol=1e-6)
    equal = random_maps((2, 1, 8, 8)).repeat(1, 7, 1, 1)
    assert relative_pairwise_distances(equal).count_nonzero() == 0


@pytest.mark.parametrize("shape", [(3, 4, 7, 9), (2, 5, 4, 6, 8), (2, 3, 1, 7, 8)], ids=str)
def test_standardised_distances_are_those_of_correlations(shape):
    h = random_maps(shape)
    h[:, 2] = 100 - 3 * h[:, 1]
    correlation = torch.stack([torch.corrcoef(maps) for maps in pool(h).flatten(2).double()])
    expected = ((1 - correlation).clamp_min(0) / 2).sqrt().mean(0).float()
    got = relative_pairwise_distances(h, standardise=True)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert got[1, 2].item() == pytest.approx(1, abs=1e-6)


def test_standardised_distances_see_neither_level_nor_strength():
    h = random_maps((2, 5, 8, 6))
    level, strength = random_maps((2, 5, 1, 1), seed=1), random_maps((2, 5, 1, 1), seed=2).abs() + 0.1
    torch.testing.assert_close(
        relative_pairwise_distances(h * strength + level, standardise=True),
        relative_pairwise_distances(h, standardise=True),
        atol=1e-5, rtol=0,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("axes", [(6, 6), (4, 6, 5)], ids=str)
def test_a_constant_map_is_standardised_to_zero(dtype, axes):
    h = random_maps((2, 4, *axes)).to(dtype)
    h[:, 1], h[:, 3] = 0.3, -700
    h[:, 3].view(2, -1)[:, 0] = torch.nextafter(torch.tensor(-700.0), torch.tensor(0.0)).to(dtype)
    got = relative_pairwise_distances(h, standardise=True)
    assert got[1, 3] == 0 and got[3, 1] == 0
    torch.testing.assert_close(got[[0, 2, 0, 2], [1, 1, 3, 3]], torch.full((4,), 0.5))
    assert torch.isfinite(got).all() and 0.5 < got[0, 2] < 1
    single = relative_pairwise_distances(h.flatten(2)[..., :1, None].clone(), standardise=True)
    assert single.count_nonzero() == 0


def test_pairwise_distances_of_feature_maps_only():
    for function in (pairwise_distances, relative_pairwise_distances):
        with pytest.raises(ValueError, match=r"\(2, 3\)"):
            function(torch.zeros(2, 3))
