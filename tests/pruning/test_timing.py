from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunet_sauron.pruning import timing
from nnunet_sauron.pruning.timing import time_left, time_networks


class Recorder(nn.Module):
    """Notes its calls, and lets a fake clock run."""

    def __init__(self, name: str, calls: list, clock: list, seconds: list[float]) -> None:
        super().__init__()
        self.name, self.calls, self.clock, self.seconds = name, calls, clock, iter(seconds)

    def forward(self, patch: torch.Tensor) -> torch.Tensor:
        self.calls.append((self.name, tuple(patch.shape), self.training, torch.is_inference_mode_enabled()))
        self.clock[0] += next(self.seconds)
        return patch


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def test_networks_take_turns_in_alternating_order(clock):
    calls = []
    networks = {name: Recorder(name, calls, clock, [1.0] * 4) for name in ("a", "b")}
    time_networks(networks, (1, 1, 4, 4), repeats=3, warmup=1)
    assert [name for name, *_ in calls] == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_median_and_quartiles_leave_the_warmup_out(clock):
    seconds = [100.0, 100.0, 5.0, 1.0, 4.0, 2.0, 3.0]
    result = time_networks({"a": Recorder("a", [], clock, seconds)}, (1, 1, 4, 4), repeats=5, warmup=2)["a"]
    assert (result.lower_quartile, result.median, result.upper_quartile) == pytest.approx((2, 3, 4))
    assert result.interquartile_range == pytest.approx(2)
    assert (result.repeats, result.threads, result.device) == (5, torch.get_num_threads(), "cpu")


def test_networks_run_as_in_prediction_and_get_their_mode_back(clock):
    calls = []
    network = Recorder("a", calls, clock, [1.0] * 2).train()
    time_networks({"a": network}, (2, 3, 4, 5), repeats=1, warmup=1)
    assert calls == [("a", (2, 3, 4, 5), False, True)] * 2
    assert network.training


def test_a_fraction_of_the_time_is_that_of_the_fastest_passes(clock):
    """Something else slows most passes of the whole network down, and the machine is quiet at the third try."""

    def recorded(seconds):
        return Recorder("a", [], clock, seconds)

    warm, busy, quiet = [9.0] * 2, [4.0, *[64.0] * 4, *[9.0] * 4], [5.0] * 9
    whole = recorded([*warm, *busy, *warm, *busy, *warm, *quiet])
    narrow = recorded([1.0] * 33)
    assert time_left(whole, narrow, (1, 1, 4, 4), "cpu") == (0.25, False)
    always = recorded([*warm, *busy] * timing.MOST_TIMES)
    assert time_left(always, recorded([1.0] * 44), (1, 1, 4, 4), "cpu") == (0.25, True)


def test_mode_comes_back_after_an_error(clock):
    network = Recorder("a", [], clock, []).train()
    with pytest.raises(StopIteration):
        time_networks({"a": network}, (1, 1, 4, 4))
    assert network.training


@pytest.mark.parametrize(
    ("networks", "repeats", "warmup", "message"),
    [
        ({}, 1, 1, "networks is empty"),
        ({"a": nn.Identity()}, 0, 1, "repeats is 0"),
        ({"a": nn.Identity()}, 1, -1, "-1"),
    ],
)
def test_nothing_to_time_is_refused(networks, repeats, warmup, message):
    with pytest.raises(ValueError, match=message):
        time_networks(networks, (1, 1, 4, 4), repeats=repeats, warmup=warmup)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ],
)
def test_it_is_autocast_where_nnunet_predicts_so(device):
    class Network(nn.Module):
        def forward(self, patch: torch.Tensor) -> torch.Tensor:
            seen.append((patch[0] @ patch[0]).dtype)
            return patch

    seen = []
    time_networks({"a": Network()}, (1, 1, 4, 4), repeats=1, warmup=0, device=device)
    assert seen == [torch.float16 if device == "cuda" else torch.float32]
