"""Folds for nnU-Net, in which the cases of one patient stay together."""

from __future__ import annotations

from collections.abc import Sequence

from .cases import Case

FOLDS = 5
SEED = 12345
"""nnU-Net's own: where every case is a patient of its own, the folds are those that it would make."""


def grouped_folds(cases: Sequence[Case], seed: int = SEED) -> list[dict[str, list[str]]]:
    """Folds as in splits_final.json: five, or as many as there are groups if these are fewer.

    Args:
        cases: The training cases, of two groups at least.
        seed: The same seed gives the same folds.
    """
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    groups: dict[str, list[str]] = {}
    for case in cases:
        groups.setdefault(case.group or case.name, []).append(case.name)
    folds = generate_crossval_split(sorted(groups), seed=seed, n_splits=min(FOLDS, len(groups)))
    return [
        {part: sorted(name for group in of_part for name in groups[group]) for part, of_part in fold.items()}
        for fold in folds
    ]
