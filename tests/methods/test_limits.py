from __future__ import annotations

import pytest

from nnunet_sauron.methods.limits import PruningSettings, channels_to_keep


def kept(redundant: int, width: int, **settings) -> int:
    return len(channels_to_keep(list(range(redundant)), width, PruningSettings(**settings)))


def test_the_most_redundant_go_first():
    settings = PruningSettings(max_fraction_per_epoch=0.25)
    assert channels_to_keep([5, 1, 7, 0], 8, settings) == [0, 2, 3, 4, 6, 7]


def test_at_most_the_fraction_goes():
    assert kept(50, 100) == 85
    assert kept(3, 4) == 3
    assert kept(2, 3) == 3
    assert kept(0, 4) == 4


def test_less_goes_as_the_learning_rate_falls():
    settings = PruningSettings()
    assert [len(channels_to_keep(range(50), 100, settings, left)) for left in (1.0, 0.5, 0.2, 0.0)] == [85, 92, 97, 100]


def test_min_channels_stay():
    assert kept(2, 2) == 2
    assert kept(10, 12, min_channels=11, max_fraction_per_epoch=1) == 11
    assert kept(1, 3, min_channels=5) == 3


def test_widths_stay_at_multiples():
    assert kept(3, 32, round_to=8) == 32
    assert kept(8, 32, round_to=8) == 24
    assert kept(32, 32, round_to=8) == 24
    assert kept(32, 32, round_to=8, max_fraction_per_epoch=1, min_channels=2) == 8
    assert kept(4, 20, round_to=8) == 16
    assert kept(20, 320, round_to=16) == 304


def test_cutting_phase_and_its_ends():
    settings = PruningSettings(cut_from=0.2, cut_until=0.8)
    assert [e for e in range(10) if settings.may_cut_after(e, 10)] == [1, 2, 3, 4, 5, 6, 7]
    assert not PruningSettings(cut_until=1.0).may_cut_after(9, 10)


def test_a_number_of_epochs_that_floats_fall_short_of_is_whole():
    settings = PruningSettings(cut_until=0.29, rate_after_cuts=2)  # 0.29 * 100 is 28.999999999999996
    assert settings.may_cut_after(28, 100) and not settings.may_cut_after(29, 100)
    assert settings.learning_rate(28, 100) is None and settings.learning_rate(29, 100) == 2
    assert PruningSettings(cut_from=0.07).may_cut_after(6, 100)  # 7.000000000000001


@pytest.mark.parametrize(
    "bad",
    [{"cut_from": -0.1}, {"cut_until": 1.1}, {"cut_from": 0.9}, {"min_channels": 0}, {"round_to": 0},
     {"max_loss_increase": 0}, {"max_fraction_per_epoch": 2}],
)  # fmt: skip
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        PruningSettings(**bad)
