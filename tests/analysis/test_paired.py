from __future__ import annotations

import math

import numpy as np
import pytest

from nnunet_sauron.analysis.report.paired import paired_difference


def test_mean_and_p_are_those_computed_by_hand():
    # Six differences, all positive and all different: of the 2^6 signs two are as extreme, p = 2 / 64.
    found = paired_difference([0.8, 0.7, 0.9, 0.6, 0.5, 0.95], [0.79, 0.68, 0.87, 0.56, 0.45, 0.89])
    assert found.mean == pytest.approx(0.035)
    assert found.p == pytest.approx(2 / 64)
    assert 0.01 <= found.low < found.mean < found.high <= 0.06
    assert (found.cases, found.left_out) == (6, 0)


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    draws = [paired_difference(random.normal(0.1, 1, 30), np.zeros(30)) for _ in range(200)]
    covered = np.mean([one.low < 0.1 < one.high for one in draws])
    assert 0.88 < covered < 0.99


def test_undefined_cases_are_left_out_and_counted():
    found = paired_difference([0.5, math.nan, 0.9], [0.4, 0.3, math.nan])
    assert (found.mean, found.cases, found.left_out) == (pytest.approx(0.1), 1, 2)
    assert math.isnan(found.low)


def test_equal_models_have_no_p():
    found = paired_difference([0.5, 0.6], [0.5, 0.6])
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    assert math.isnan(found.p)


def test_nothing_in_common_is_nan_and_no_error():
    found = paired_difference([], [])
    assert math.isnan(found.mean)
    assert found.cases == 0
