"""Distillation: a small network learns a trained one's output, with or without labels.

Hinton, Vinyals, Dean: Distilling the knowledge in a neural network. arXiv 1503.02531 (2015). The Dice term is
nnU-Net's, with the teacher's probabilities in the place of the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

SMOOTH = 1e-5  # nnU-Net's


def distillation_loss(
    student: torch.Tensor | Sequence[torch.Tensor],
    teacher: torch.Tensor | Sequence[torch.Tensor],
    *,
    regions: bool = False,
    last_weight: float = 0.0,
) -> torch.Tensor:
    """How far a network is from its teacher, over all outputs of deep supervision.

    The sum over outputs i of w_i * (KL(p_i || q_i) + 1 - Dice(p_i, q_i)), with w as `output_weights` gives it, p the
    teacher's and q the student's probabilities, where

        KL(p || q)  = mean over positions of sum_c p_c log(p_c / q_c)
        Dice(p, q)  = mean over foreground classes c of 2 sum p_c q_c / (sum p_c^2 + sum q_c^2),

    the sums of the latter over all positions of the batch. Regions overlap: each is a Bernoulli variable of its own,
    with a sigmoid instead of the softmax, and the KL is the mean over positions and regions, as nnU-Net's binary
    cross-entropy is.

    Args:
        student: Logits (B, classes, *voxels), or a list of such, the full resolution first.
        teacher: The same of the teacher, which gets no gradient.
        regions: The classes are regions.
        last_weight: That of `output_weights`.

    Returns:
        A scalar, float32 for logits of any dtype; 0 where both outputs are equal.

    Raises:
        ValueError: The two differ in their number of outputs, or in an output's shape.
    """
    student, teacher = ([one] if isinstance(one, torch.Tensor) else list(one) for one in (student, teacher))
    shapes = [[tuple(output.shape) for output in outputs] for outputs in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"The student's outputs have the shapes {shapes[0]}, the teacher's {shapes[1]}.")
    weights = output_weights(len(student), last_weight)
    return sum(
        weight * _distance(of_student.float(), of_teacher.detach().float(), regions)
        for weight, of_student, of_teacher in zip(weights, student, teacher, strict=True)
        if weight
    )


def output_weights(count: int, last_weight: float = 0.0) -> list[float]:
    """nnU-Net's weights of its outputs: 1, 1/2, 1/4, ..., the last left out, and all of them summing to 1.

    Args:
        count: Number of outputs; a single one has the weight 1.
        last_weight: Of the last one before normalising. Under DDP nnU-Net takes 1e-6, since every parameter must get
            a gradient.
    """
    weights = [0.5**i for i in range(count)]
    if count > 1:
        weights[-1] = last_weight
    return [weight / sum(weights) for weight in weights]


def _distance(student: torch.Tensor, teacher: torch.Tensor, regions: bool) -> torch.Tensor:
    if regions:
        p, q = teacher.sigmoid(), student.sigmoid()
        # The logarithms from the logits: that of a rounded probability is infinite.
        of_inside = functional.logsigmoid(teacher) - functional.logsigmoid(student)
        of_outside = functional.logsigmoid(-teacher) - functional.logsigmoid(-student)
        divergence = (p * of_inside + (1 - p) * of_outside).mean()
    else:
        log_p, log_q = teacher.log_softmax(1), student.log_softmax(1)
        p, q = log_p.exp(), log_q.exp()
        divergence = (p * (log_p - log_q)).sum(1).mean()
        p, q = p[:, 1:], q[:, 1:]
    positions = [0, *range(2, student.ndim)]
    both, each = 2 * (p * q).sum(positions), (p * p).sum(positions) + (q * q).sum(positions)
    return divergence + 1 - ((both + SMOOTH) / (each + SMOOTH)).mean()
