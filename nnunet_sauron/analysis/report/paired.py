"""Two models on the same cases: their difference, its interval and a significance test."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap, wilcoxon

CONFIDENCE = 0.95
RESAMPLES = 9999


@dataclass(frozen=True)
class PairedDifference:
    """A model's values minus the baseline's, case by case.

    Attributes:
        mean: Mean of the differences; nan without cases.
        low, high: Its 95 % confidence interval, bias-corrected and accelerated bootstrap over cases (Efron, JASA 82,
            1987); nan with fewer than two cases, and the mean itself where all differences are equal.
        p: Of Wilcoxon's signed rank test, two-sided (Biometrics Bulletin 1, 1945); nan where all differences are 0.
        cases: Cases where both values are defined.
        left_out: Cases where one is not.
    """

    mean: float
    low: float
    high: float
    p: float
    cases: int
    left_out: int


def paired_difference(values: Sequence[float], baseline: Sequence[float], seed: int = 0) -> PairedDifference:
    """Compare a model's values with the baseline's of the same cases, in the same order; nan where undefined."""
    differences = np.asarray(values, dtype=float) - np.asarray(baseline, dtype=float)
    defined = differences[~np.isnan(differences)]
    counts = {"cases": len(defined), "left_out": len(differences) - len(defined)}
    mean = float(defined.mean()) if len(defined) else math.nan
    low = high = p = math.nan
    if len(defined) > 1:
        low, high = _interval(defined, seed)
    if np.any(defined != 0):
        p = float(wilcoxon(defined).pvalue)
    return PairedDifference(mean, low, high, p, **counts)


def _interval(differences: np.ndarray, seed: int) -> tuple[float, float]:
    if np.ptp(differences) == 0:
        return float(differences[0]), float(differences[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of degenerate draws, which the nan below stands for
        # Before SciPy 1.15, the only name of `rng`.
        random = {"random_state": np.random.default_rng(seed)}
        interval = bootstrap(
            (differences,), np.mean, confidence_level=CONFIDENCE, n_resamples=RESAMPLES, **random
        ).confidence_interval
    return float(interval.low), float(interval.high)
