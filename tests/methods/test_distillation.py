"""The distillation loss against its formula, written out element by element."""

from __future__ import annotations

import math

import pytest
import torch

from nnunet_sauron.methods.distillation import distillation_loss, output_weights


def logits(*shape, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(student: torch.Tensor, teacher: torch.Tensor, regions: bool) -> float:
    """One output, (B, classes, positions), in plain numbers."""
    batch, classes, positions = student.shape
    p, q = torch.zeros_like(teacher, dtype=torch.float64), torch.zeros_like(teacher, dtype=torch.float64)
    divergences = []
    for b in range(batch):
        for i in range(positions):
            for one, of in ((p, teacher), (q, student)):
                numbers = [float(x) for x in of[b, :, i]]
                if regions:
                    one[b, :, i] = torch.tensor([1 / (1 + math.exp(-x)) for x in numbers])
                else:
                    total = sum(math.exp(x) for x in numbers)
                    one[b, :, i] = torch.tensor([math.exp(x) / total for x in numbers])
            here = 0.0
            for c in range(classes):
                a, z = float(p[b, c, i]), float(q[b, c, i])
                here += a * math.log(a / z)
                if regions:
                    here += (1 - a) * math.log((1 - a) / (1 - z))
            divergences.append(here / classes if regions else here)
    dice = []
    for c in range(0 if regions else 1, classes):
        both = sum(float(p[b, c, i] * q[b, c, i]) for b in range(batch) for i in range(positions))
        each = sum(float(p[b, c, i] ** 2 + q[b, c, i] ** 2) for b in range(batch) for i in range(positions))
        dice.append(2 * both / each)
    return sum(divergences) / len(divergences) + 1 - sum(dice) / len(dice)


@pytest.mark.parametrize("regions", [False, True])
def test_it_is_the_formula(regions):
    student, teacher = logits(2, 3, 5, seed=0), logits(2, 3, 5, seed=1, scale=2)
    found = distillation_loss(student, teacher, regions=regions)
    assert float(found) == pytest.approx(by_hand(student, teacher, regions), abs=1e-4)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("scale", [1, 1000])
def test_two_that_say_the_same_are_not_apart(regions, scale):
    same = logits(2, 3, 4, 4, seed=0, scale=scale).requires_grad_()
    loss = distillation_loss([same, same], [same, same], regions=regions)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and same.grad.abs().max() < 1e-6


def test_outputs_count_as_nnunet_counts_them():
    assert output_weights(4) == pytest.approx([4 / 7, 2 / 7, 1 / 7, 0])
    assert output_weights(1) == [1]
    assert 0 < output_weights(3, last_weight=1e-6)[-1] < 1e-5
    pairs = [(logits(2, 3, n, n, seed=n), logits(2, 3, n, n, seed=n + 50)) for n in (8, 4, 2)]
    alone = [float(distillation_loss(student, teacher)) for student, teacher in pairs]
    together = distillation_loss(*zip(*pairs, strict=True))
    assert float(together) == pytest.approx((2 * alone[0] + alone[1]) / 3)


@pytest.mark.parametrize("regions", [False, True])
def test_only_the_student_gets_a_gradient(regions):
    student, teacher = (logits(2, 3, 4, 4, seed=seed).requires_grad_() for seed in (0, 1))
    distillation_loss(student, teacher, regions=regions).backward()
    assert teacher.grad is None and student.grad.abs().max() > 0


@pytest.mark.parametrize("regions", [False, True])
def test_half_precision_is_computed_in_float32(regions):
    student, teacher = (logits(2, 3, 64, 64, seed=seed, scale=4).half() for seed in (0, 1))
    expected = distillation_loss(student.float(), teacher.float(), regions=regions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distillation_loss(student, teacher, regions=regions)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_what_is_certain_and_wrong_stays_finite():
    student = torch.tensor([[[1000.0], [-1000.0]]]).requires_grad_()
    for regions in (False, True):
        loss = distillation_loss(student, -student.detach(), regions=regions)
        loss.backward()
        assert loss.isfinite() and student.grad.isfinite().all()


def test_other_outputs_are_refused():
    with pytest.raises(ValueError, match="student's outputs have the shapes"):
        distillation_loss([torch.zeros(1, 2, 4)], [torch.zeros(1, 2, 4), torch.zeros(1, 2, 2)])
