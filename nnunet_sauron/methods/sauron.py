"""Sauron: draw a layer's feature maps into clusters while training, and remove what became redundant.

Valverde, Shatillo, Tohka: Sauron U-Net: Simple automated redundancy elimination in medical image segmentation via
filter pruning. arXiv 2209.13590; Neurocomputing 594 (2024) 127817.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import nn

from ..pruning.channels import ChannelLayout, channel_layout, feature_map_modules
from ..pruning.cost import CostModel
from ..pruning.eval_mode import eval_mode
from ..pruning.tolerance import unit_factors
from .base import PruningMethod, PruningSettings, TrainingState, channels_to_keep, mean_of, spread_steps
from .delta import NORMALISATIONS, relative_pairwise_distances, with_delta_opt
from .shrink import NOTHING_TO_MEASURE_ON, Schedule, inputs_to_rank_on, rank
from .targets import DEFAULT_MACS

FIRST_THRESHOLD = 0.001
PAIRS_AT_ONCE = 10_000


class Threshold:
    """One layer's threshold, which adjusts itself after every epoch (paper, algorithm 1).

    It starts at 0.001 and climbs `kappa` linear steps to `tau_max`. After an epoch, a waiting threshold waits one
    epoch less; another one goes up a step and waits `rho` epochs when
    (C1) the last training loss lies inside the range of the `rho` before it,
    (C2) the last validation loss is no new minimum, and
    (C3) fewer than `mu` of the layer's channels went last time.

    Attributes:
        value: The threshold now.
        waiting: Epochs that it still waits.

    Args:
        tau_max: Upper end, in (0.001, 1].
        kappa: Number of steps.
        rho: Epochs to look back and to wait.
        mu: A fraction of the channels: 0.02 for the paper's 2 %.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(self, tau_max: float = 0.3, kappa: int = 15, rho: int = 5, mu: float = 0.02):
        _require(FIRST_THRESHOLD < tau_max <= 1, "tau_max", f"in ({FIRST_THRESHOLD}, 1]", tau_max)
        _require(kappa >= 1, "kappa", "at least 1", kappa)
        _require(rho >= 1, "rho", "at least 1 epoch", rho)
        _require(0 < mu <= 1, "mu", "a fraction in (0, 1], such as 0.02 for 2 %", mu)
        self.tau_max, self.kappa, self.rho, self.mu = tau_max, kappa, rho, mu
        self.steps = 0
        self.waiting = 0

    @property
    def value(self) -> float:
        return FIRST_THRESHOLD + (self.tau_max - FIRST_THRESHOLD) * self.steps / self.kappa

    def update(self, train_losses: Sequence[float], val_losses: Sequence[float], widths: Sequence[int]) -> float:
        """Adjust the threshold after an epoch.

        Args:
            train_losses: Training loss of every epoch so far, newest last.
            val_losses: Validation loss, likewise.
            widths: Channels of the layer after every epoch so far, newest last.

        Returns:
            The threshold after that epoch, which is `value`.
        """
        if self.waiting > 0:
            self.waiting -= 1
        elif (
            self.steps < self.kappa
            and self._training_has_settled(train_losses)
            and self._validation_has_settled(val_losses)
            and self._few_channels_went(widths)
        ):
            self.steps += 1
            self.waiting = self.rho
        return self.value

    def _training_has_settled(self, losses: Sequence[float]) -> bool:
        if len(losses) <= self.rho:
            return False
        before = losses[-1 - self.rho : -1]
        return min(before) <= losses[-1] <= max(before)

    def _validation_has_settled(self, losses: Sequence[float]) -> bool:
        # The published code compares with a minimum that includes the value itself, so its C2 never stops anything.
        return len(losses) > 1 and losses[-1] >= min(losses[:-1])

    def _few_channels_went(self, widths: Sequence[int]) -> bool:
        return len(widths) < 2 or (widths[-2] - widths[-1]) < self.mu * widths[-2]


PUBLISHED = {
    "cut_from": 0.0,
    "cut_until": 1.0,
    "max_fraction_per_epoch": None,
    "max_loss_increase": None,
    "min_channels": 1,
    "merge": False,
    "target_macs": None,
    "prune_batches": 1,
    "rho": 5,
    "delta_opt_every": 1,
    "delta_opt_after_cuts": True,
}


@dataclass(frozen=True, kw_only=True)
class SauronSettings(PruningSettings):
    """Sauron's settings. Where the defaults are not the paper's, `published=True` makes them so.

    Attributes:
        published: Decide as the paper does: delta_prune from one random reference channel a layer and epoch, on one
            batch, against thresholds that climb when the losses have settled; channels are dropped, after every epoch
            to the last but one, without a limit for a layer or a guard. False: every channel is a reference, see
            `Sauron`.
        lambda_: Weight of delta_opt in the loss; 0 for the ablation that only prunes.
        normalisation: Of the maps in delta_opt: "minmax", "none" or "max_distance".
        delta_opt_every: Training steps from one with delta_opt to the next; it weighs as many times more there, and
            costs as many times less (benchmarks/results).
        delta_opt_after_cuts: Whether delta_opt stays in the loss when the cutting phase is over.
        target_macs: The part of a patch's multiply-accumulates that is left at the end of the cutting phase; None: the
            thresholds' common level climbs to `tau_max`, and what is left then is left.
        cuts: Number of cuts between `cut_from` and `cut_until`. (With `published`, one after every epoch.)
        standardise: Measure distances of maps of zero mean and unit norm (a correlation distance).
        prune_batches: Training batches over which distances are averaged.
        patches: Training patches on which layers' factors are measured, at least.
        tau_max: Upper end of the thresholds.
        kappa, rho, mu: With `published`: steps from 0.001 to `tau_max`; epochs that a threshold looks back and waits
            (None: 5 for each 1000 epochs of training, at least 2); it stays while the layer's last loss of channels was
            at least the fraction `mu`.
    """

    cut_from: float = 0.1
    cut_until: float = 0.5
    max_fraction_per_epoch: float | None = 0.3
    max_loss_increase: float | None = 0.1
    merge: bool = True
    published: bool = False
    lambda_: float = 0.5
    normalisation: str = "minmax"
    delta_opt_every: int = 2
    delta_opt_after_cuts: bool = False
    target_macs: float | None = DEFAULT_MACS
    cuts: int = 20
    standardise: bool = False
    prune_batches: int = 8
    patches: int = 96
    tau_max: float = 0.3
    kappa: int = 15
    rho: int | None = None
    mu: float = 0.02

    @classmethod
    def from_given(cls, **given) -> SauronSettings:
        """Of what is given, and of the paper's values for the rest if `published` is."""
        return cls(**{**PUBLISHED, **given} if given.get("published") else given)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.lambda_ >= 0, "lambda_", "0 or more", self.lambda_)
        _require(self.normalisation in NORMALISATIONS, "normalisation", "one of " + ", ".join(NORMALISATIONS),
                 self.normalisation)  # fmt: skip
        for name in ("prune_batches", "patches", "cuts", "delta_opt_every"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        if self.target_macs is not None:
            _require(0 < self.target_macs <= 1, "target_macs", "the part that stays, in (0, 1]", self.target_macs)
            _require(not self.published, "target_macs", "None with published=True, which has no target",
                     self.target_macs)  # fmt: skip
        self.threshold(num_epochs=1)

    def without_effect(self) -> list[str]:
        because = {}
        if self.target_macs is not None:
            because["tau_max"] = f"beside target_macs={self.target_macs}, which decides how far thresholds rise"
        if self.published:
            because |= dict.fromkeys(("cuts", "patches"), "with published=True")
        else:
            because |= dict.fromkeys(("kappa", "rho", "mu"), "without published=True")
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return super().without_effect() + [
            f"{name}={values[name][0]} has no effect {why}"
            for name, why in because.items()
            if values[name][0] != values[name][1]
        ]

    def threshold(self, num_epochs: int) -> Threshold:
        """A layer's threshold at the start of a training of so many epochs."""
        # With rho = 1, C1 asks for two equal losses and no threshold would ever move: 2 is the shortest that works.
        rho = max(2, round(5 * num_epochs / 1000)) if self.rho is None else self.rho
        return Threshold(self.tau_max, self.kappa, rho, self.mu)


class Sauron(PruningMethod):
    """delta_opt while training; redundant are channels whose maps lie near another's.

    By default every channel of a layer is a reference, which is the limit of the paper's many random ones: with
    D[r, c] the delta_prune of channel c with reference r, a channel goes when one that stays is nearer than the
    layer's threshold, in the nearer of both directions, nearest pairs first. A layer's threshold is a common level
    times its own factor, which rises with the multiply-accumulates that a channel of it saves and falls with what an
    error in it does to the network's output, both measured anew at each cut. The level is the least that leaves what
    is due of `target_macs`. One channel of a pair stays for this cut, and no layer loses more than
    `max_fraction_per_epoch`; but the last cut of all meets the target.
    """

    Settings = SauronSettings

    def prepare(self, layout: ChannelLayout, cost: CostModel, given_widths: dict[str, int] | None) -> None:
        self._cost = cost
        self._state: dict = {}
        self._measured = True
        if self.settings.target_macs is not None:
            self._schedule = Schedule(self.settings, self.num_epochs, layout, cost, "target_macs")
        elif not self.settings.published:
            self._epochs = spread_steps(self.settings, self.num_epochs, self.settings.cuts)

    def attach(self, network: nn.Module, layout: ChannelLayout) -> None:
        self._network = network
        self._thresholds = {unit.name: self.settings.threshold(self.num_epochs) for unit in layout.units}
        self._terms: list[torch.Tensor] = []
        self._steps, self._regularising = 0, True
        modules = feature_map_modules(network, layout) if self.settings.lambda_ > 0 else ()
        self._hooks = [module.register_forward_hook(self._observe) for _, _, module in modules]

    def target(self):
        if self.settings.target_macs is None:
            return None
        return self._schedule.name, self._schedule.target, self._schedule.left

    def why_missed(self) -> str | None:
        return None if self._measured else NOTHING_TO_MEASURE_ON

    def has_schedule(self) -> bool:
        return not self.settings.published

    def start_epoch(self, epoch: int, widths: dict[str, int]) -> None:
        self._steps = 0
        over = epoch >= self.settings.cut_until * self.num_epochs
        if self._hooks and over and not self.settings.delta_opt_after_cuts:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
            torch._dynamo.reset()  # a compiled graph would still hold what the hooks do

    def before_step(self, steps_left: int) -> None:
        self._terms.clear()
        self._regularising = self._steps % self.settings.delta_opt_every == 0
        self._steps += 1

    def regulariser(self) -> torch.Tensor | None:
        """lambda * mean of delta_opt over the layers of the last forward, for the steps up to the next one with it."""
        mean = mean_of(self._terms)
        return None if mean is None else self.settings.lambda_ * self.settings.delta_opt_every * mean

    def redundant(self, progress: TrainingState) -> dict[str, list[int]]:
        """As published: what is nearer to a random reference channel than the layer's threshold."""
        taus = {
            name: self._thresholds[name].update(progress.train_losses, progress.val_losses, widths)
            for name, widths in progress.widths.items()
        }
        distances = self._distances(self._inputs(progress))
        removable = {}
        for name, of_pairs in distances.items():
            # Seeded by name and epoch: a decision that is made again comes out the same.
            reference = random.Random(f"{progress.epoch}:{name}").randrange(len(of_pairs))
            scores = of_pairs[reference].tolist()
            below = [c for c, score in enumerate(scores) if score < taus[name] and c != reference]
            removable[name] = sorted(below, key=lambda c: scores[c])
        return removable

    def keep(self, progress: TrainingState) -> dict[str, list[int]]:
        if self.settings.published:
            return super().keep(progress)
        widths = {name: series[-1] for name, series in progress.widths.items()}
        met = self._met(progress.epoch)
        if met(widths, 0.0):
            return {}
        to_rank_on = inputs_to_rank_on(self._network, progress, self.settings.patches)
        self._measured = bool(to_rank_on)
        if not to_rank_on:
            return {}
        inputs = to_rank_on + self._inputs(progress, len(to_rank_on))
        rankings = rank(self._network, to_rank_on, progress.regions)
        # An error is a distance squared.
        factors = {name: factor**-0.5 for name, factor in unit_factors(rankings, self._cost.macs).items()}
        pairs = nearest_pairs(self._distances(inputs[: self.settings.prune_batches]), factors)
        worth = {name: {c: i for i, c in enumerate(ranking.order)} for name, ranking in rankings.items()}
        settings = replace(self.settings, max_fraction_per_epoch=None)  # which `cluster` has respected
        gone, level = cluster(
            pairs, worth, widths, self.settings, met, meet=progress.last_chance and self.target() is not None
        )
        self._state = {"level": level, "tau": {name: level * factors[name] for name in widths}}
        kept = {name: channels_to_keep(going, widths[name], settings) for name, going in gone.items()}
        return {name: channels for name, channels in kept.items() if len(channels) < widths[name]}

    def state(self) -> dict:
        if not self.settings.published:
            return dict(self._state) or {"level": 0.0, "tau": dict.fromkeys(self._thresholds, 0.0)}
        return {
            "tau": {name: threshold.value for name, threshold in self._thresholds.items()},
            "tau_steps": {name: threshold.steps for name, threshold in self._thresholds.items()},
            "waiting": {name: threshold.waiting for name, threshold in self._thresholds.items()},
        }

    def load_state(self, state: dict) -> None:
        if not self.settings.published:
            self._state = {key: state[key] for key in ("level", "tau")}
            return
        for name, threshold in self._thresholds.items():
            threshold.steps, threshold.waiting = state["tau_steps"][name], state["waiting"][name]

    def _met(self, epoch: int) -> Callable[[Mapping[str, int], float], bool]:
        """Whether widths, or the level at which the next channel would go, are as far as this epoch's cut leads."""
        step = self.settings.round_to
        if self.settings.target_macs is None:
            done = sum(one <= epoch for one in self._epochs) / len(self._epochs)
            due = FIRST_THRESHOLD + done * (self.settings.tau_max - FIRST_THRESHOLD) if epoch in self._epochs else -1.0
            return lambda widths, level: level > due
        wanted = self._schedule.wanted(epoch)

        def met(widths: Mapping[str, int], level: float) -> bool:
            return self._schedule.left({n: math.ceil(w / step) * step for n, w in widths.items()}) <= wanted

        return met

    def _inputs(self, progress: TrainingState, drawn: int = 0) -> list[torch.Tensor]:
        """`prune_batches` batches, less those that are drawn already."""
        first = progress.patches(1) if drawn < self.settings.prune_batches else []
        missing = self.settings.prune_batches - drawn - 1
        return first + progress.patches(missing * len(first[0])) if first and missing > 0 else first

    def _distances(self, inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        return mean_distances(self._network, inputs, standardise=self.settings.standardise)

    def _observe(self, module: nn.Module, inputs, feature_maps: torch.Tensor) -> torch.Tensor:
        if not (module.training and self._regularising) or feature_maps.shape[1] < 2:
            return feature_maps
        feature_maps, term = with_delta_opt(feature_maps, self.settings.normalisation)
        self._terms.append(term)
        return feature_maps


def mean_distances(
    network: nn.Module, inputs: Sequence[torch.Tensor], *, standardise: bool = False
) -> dict[str, torch.Tensor]:
    """delta_prune of every channel with every other as the reference, by unit: (C, C), float32, on the CPU.

    Args:
        network: A network that `channel_layout` knows, unwrapped; run in evaluation mode.
        inputs: Tensors (B, channels, *patch); distances are averaged over them, and over a unit's places.
        standardise: As in `relative_pairwise_distances`.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def add(unit: str, module: nn.Module, _, feature_maps: torch.Tensor) -> None:
        found = relative_pairwise_distances(feature_maps, standardise=standardise) * len(feature_maps)
        sums[unit] = sums[unit] + found if unit in sums else found
        counts[unit] = counts.get(unit, 0) + len(feature_maps)

    hooks = {m: partial(add, unit) for unit, _, m in feature_map_modules(network, channel_layout(network))}
    device = next(network.parameters()).device
    with torch.no_grad(), eval_mode(network, hooks):
        for tensor in inputs:
            network(tensor.to(device))
    return {unit: (total / counts[unit]).cpu() for unit, total in sums.items()}


def nearest_pairs(
    distances: Mapping[str, torch.Tensor], factors: Mapping[str, float]
) -> Callable[[], Iterator[tuple[float, str, int, int]]]:
    """All pairs of channels of a layer, (level, unit, channel, channel), nearest first; a call begins anew.

    A pair's level is the smaller of its two distances over the layer's factor: the common level from which on the
    layer's threshold, level times factor, is above it.
    """
    names, levels, ones, others = list(distances), [], [], []
    for of_unit in distances.values():
        one, other = torch.triu_indices(len(of_unit), len(of_unit), 1)
        ones.append(one)
        others.append(other)
        levels.append(torch.minimum(of_unit, of_unit.T)[one, other])
    units = torch.cat([torch.full((len(level),), i) for i, level in enumerate(levels)])
    levels = torch.cat([level / factors[name] for name, level in zip(names, levels, strict=True)])
    order = levels.argsort(stable=True)
    columns = [column[order] for column in (levels, units, torch.cat(ones), torch.cat(others))]

    def pairs() -> Iterator[tuple[float, str, int, int]]:
        # A wide network has millions of them, of which a cut takes the nearest few.
        for part in zip(*(column.split(PAIRS_AT_ONCE) for column in columns), strict=True):
            for level, unit, one, other in zip(*(column.tolist() for column in part), strict=True):
                yield level, names[unit], one, other

    return pairs


def cluster(
    pairs: Callable[[], Iterator[tuple[float, str, int, int]]],
    worth: Mapping[str, Mapping[int, int]],
    widths: Mapping[str, int],
    settings: SauronSettings,
    met: Callable[[Mapping[str, int], float], bool],
    *,
    meet: bool,
) -> tuple[dict[str, list[int]], float]:
    """Of pairs, nearest first, one channel goes and the other stays, until a cut has led far enough.

    Args:
        pairs: As `nearest_pairs` gives them.
        worth: By unit and channel, its rank; the one of the higher rank goes.
        widths: Channels of every unit.
        settings: `max_fraction_per_epoch` and `min_channels` apply.
        met: Whether widths, or the level at which the next channel would go, are as far as this cut leads.
        meet: Whether to go on, when no pair is left, without the limit of a layer and with channels that stayed.

    Returns:
        The channels that go, by unit, the first to go first, and the level of the last of them.
    """
    # A layer may always lose what leads to its next multiple; widths in between count as that multiple in `met`.
    most = {name: width - len(channels_to_keep(range(width), width, settings)) for name, width in widths.items()}
    left, level = dict(widths), 0.0
    gone: dict[str, list[int]] = {name: [] for name in widths}
    stays: dict[str, set[int]] = {name: set() for name in widths}
    for last in (False, True) if meet else (False,):
        for at, name, one, other in pairs():
            limit = widths[name] - settings.min_channels if last else most[name]
            if len(gone[name]) >= limit or left[name] <= settings.min_channels or {one, other} & set(gone[name]):
                continue
            free = [c for c in (one, other) if last or c not in stays[name]]
            if not free:
                continue
            if met(left, at):
                return gone, level
            goes = max(free, key=worth[name].__getitem__)
            gone[name].append(goes)
            stays[name].add(other if goes == one else one)
            left[name] -= 1
            level = max(level, at)
    return gone, level


def _require(condition: bool, name: str, expected: str, value) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}; got {value}.")
