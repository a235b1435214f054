"""How far a pruning goes: a fraction of channels, parameters or multiply-accumulates, one rate, or given widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..pruning.channels import ChannelLayout
from ..pruning.cost import CostModel
from .limits import PruningSettings, require, require_fraction, require_one_at_most, to_multiple

FRACTIONS = ("target_channels", "target_parameters", "target_macs")
TARGETS = ("rate", *FRACTIONS, "widths_from")
DEFAULT_MACS = 0.1  # of every method, Sauron and Shrink included, which are compared at equal cost by default

MEASURED = {
    "target_parameters": "parameters",
    "target_macs": "multiply-accumulates",
    "target_latency": "network time",
}
"""What a target is a fraction of, by setting; the others are fractions of the channels."""
EXCLUSIVE = frozenset({*TARGETS, *MEASURED})
"""Settings of all methods of which one at most may be given."""


@dataclass(frozen=True, kw_only=True)
class TargetSettings(PruningSettings):
    """How far to prune, by at most one of the targets. Without one, a tenth of the multiply-accumulates is left, the
    same for all methods; of a narrow network, as little as its least widths allow.

    Attributes:
        rate: The fraction of every layer's channels that is removed.
        target_channels: The fraction of all channels that is left.
        target_parameters: The fraction of the parameters that is left.
        target_macs: The fraction of the multiply-accumulates of a patch that is left.
        widths_from: A checkpoint whose width every layer gets; `min_channels` has no effect then, and `round_to` must
            be 1.
    """

    # A schedule that leads to a target is not held back by default.
    max_fraction_per_epoch: float | None = None
    max_loss_increase: float | None = None
    rate: float | None = None
    target_channels: float | None = None
    target_parameters: float | None = None
    target_macs: float | None = None
    widths_from: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_at_most(self.given_targets())
        fits = self.rate is None or 0 <= self.rate < 1
        require(fits, "rate", "the fraction of a layer's channels to remove, in [0, 1)", self.rate)
        for name in FRACTIONS:
            require_fraction(name, getattr(self, name))
        if self.widths_from is not None:
            if self.round_to != 1:
                raise ValueError(
                    f"round_to must be 1 with widths_from, which gives every layer's width; got {self.round_to}."
                )
            object.__setattr__(self, "min_channels", 1)

    def given_targets(self) -> list[str]:
        """The names of the targets that are set."""
        return [name for name in TARGETS if getattr(self, name) is not None]


@dataclass(frozen=True)
class Target:
    """What `TargetSettings` mean for a network.

    Attributes:
        name: The setting that it comes from.
        least: The least width of each unit.
        measure: The cost that should fall from `start` to `end`, as a function of the widths.
        asked: The cost that the setting asks for, below `end` where other settings do not allow it.
        why: Why `end` is above `asked`; None where it is not.
    """

    name: str
    least: dict[str, int]
    measure: Callable[[Mapping[str, int]], float]
    start: float
    end: float
    asked: float
    why: str | None = None

    @property
    def part_asked(self) -> float:
        """The fraction of the cost that the setting asks for, as it was given."""
        return round(self.asked / self.start, 12)

    def part_left(self, widths: Mapping[str, int]) -> float:
        """The fraction of the cost that is left at these widths."""
        return self.measure(widths) / self.start

    def limit(self, done: float) -> float:
        """The highest cost allowed after this fraction of the steps."""
        return self.start + done * (self.end - self.start)


def make_target(
    settings: TargetSettings,
    layout: ChannelLayout,
    cost: CostModel,
    given_widths: Mapping[str, int] | None,
    fixed: Iterable[str] = (),
) -> Target:
    """Fit the settings to a dense network.

    Args:
        settings: With one target given, or none.
        layout: The dense network's.
        cost: Of the same network.
        given_widths: Widths of the checkpoint that `widths_from` names.
        fixed: Units that must not be cut.

    Raises:
        ValueError: The given target cannot be met.
    """
    (name,) = settings.given_targets() or ("target_macs",)
    dense, fixed = layout.widths, set(fixed)
    least = least_widths(settings, dense, fixed)
    measures = {"target_parameters": cost.parameters, "target_macs": cost.macs}
    measure = measures.get(name, count_channels)
    start = measure(dense)
    limits = f"min_channels={settings.min_channels}, round_to={settings.round_to}"
    if name == "widths_from":
        least = _checked(settings, given_widths, dense, fixed)
        return Target(name, least, measure, start, measure(least), measure(least))
    if name == "rate":
        wanted = {unit: w if unit in fixed else max(1, round(w * (1 - settings.rate))) for unit, w in dense.items()}
        least = {unit: max(least[unit], _allowed(settings, w, dense[unit])) for unit, w in wanted.items()}
        end, asked = measure(least), measure(wanted)
        return Target(name, least, measure, start, end, asked, f"{limits} leave more" if end > asked else None)
    fraction = getattr(settings, name)
    asked = start * (DEFAULT_MACS if fraction is None else fraction)
    end = measure(least)
    if end <= asked:
        return Target(name, least, measure, start, asked, asked)
    limits += f" and {len(fixed)} layers that this method never cuts" if fixed else ""
    if fraction is None:
        return Target(name, least, measure, start, end, asked, f"{limits} allow no less than {end / start:.4g}")
    raise ValueError(
        f"{name}={fraction} cannot be met: with {limits}, {rounded_up(end / start)} is the least. Choose a larger "
        f"target."
    )


def least_widths(settings: PruningSettings, dense: Mapping[str, int], fixed: Iterable[str]) -> dict[str, int]:
    """The least widths that `min_channels` and `round_to` allow; the dense width for units that must not be cut."""
    return {name: w if name in fixed else _allowed(settings, settings.min_channels, w) for name, w in dense.items()}


def rounded_up(part: float) -> str:
    """The least fraction that can be reached, as a number that can be given as a target."""
    return f"{math.ceil(1e4 * part) / 1e4:.4f}"


def count_channels(widths: Mapping[str, int]) -> int:
    """Channels of all units together."""
    return sum(widths.values())


def even_widths(target: Target, settings: PruningSettings, dense: Mapping[str, int]) -> dict[str, int]:
    """Widths that meet a target layer by layer: its least widths, or the largest equal fraction of every layer."""
    if target.end == target.measure(target.least):
        return dict(target.least)

    def at(fraction: float) -> dict[str, int]:
        return {
            name: max(target.least[name], _allowed(settings, int(width * fraction + 1e-9), width))
            for name, width in dense.items()
        }

    low, high = 0.0, 1.0
    if target.measure(at(high)) <= target.end:
        return at(high)
    for _ in range(30):  # far finer than a channel of any layer
        middle = (low + high) / 2
        low, high = (middle, high) if target.measure(at(middle)) <= target.end else (low, middle)
    return at(low)


def _allowed(settings: PruningSettings, wanted: int, dense: int) -> int:
    """The next width, up from the wanted one, that `round_to` and `min_channels` allow."""
    wanted = max(wanted, settings.min_channels)
    return to_multiple(wanted, settings.round_to, dense)


def _checked(
    settings: TargetSettings, given: Mapping[str, int] | None, dense: Mapping[str, int], fixed: set[str]
) -> dict[str, int]:
    if given is None or set(given) != set(dense):
        raise ValueError(
            f"widths_from={settings.widths_from} is of another topology than this network; take a model of the same "
            f"plans and configuration."
        )
    for name, width in given.items():
        if width > dense[name]:
            raise ValueError(
                f"widths_from={settings.widths_from} has {width} channels in {name}, but this network has "
                f"{dense[name]}; take a model that was pruned from these plans."
            )
        if width < dense[name] and name in fixed:
            raise ValueError(
                f"widths_from={settings.widths_from} needs a cut in {name}, which this method never cuts; leave "
                f"transposed_convolutions=False out, if it is given."
            )
    return dict(given)
