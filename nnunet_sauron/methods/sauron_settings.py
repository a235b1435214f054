"""Sauron's settings: the defaults that work with nnU-Net, and the paper's."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .delta import NORMALISATIONS
from .limits import PruningSettings, require, require_fraction
from .targets import DEFAULT_MACS
from .thresholds import Threshold

PUBLISHED = {
    "cut_from": 0.0,
    "cut_until": 1.0,
    "max_fraction_per_epoch": None,
    "max_loss_increase": None,
    "min_channels": 1,
    "merge": False,
    "rate_after_cuts": None,
    "target_macs": None,
    "prune_batches": 1,
    "rho": 5,
    "delta_opt_every": 1,
    "delta_opt_after_cuts": True,
}


@dataclass(frozen=True, kw_only=True)
class SauronSettings(PruningSettings):
    """Sauron's settings. `published=True` replaces the defaults that are not the paper's by the paper's.

    Attributes:
        published: Decide as the paper does: delta_prune from one random reference channel per layer and epoch, on one
            batch, against thresholds that climb when the losses have settled. Channels are dropped, after every epoch
            but the last, without a limit for a layer or a guard. False: every channel is a reference, see `Sauron`.
        lambda_: Weight of delta_opt in the loss; 0 for the ablation that only prunes.
        normalisation: Of the maps in delta_opt: "minmax", "none" or "max_distance".
        delta_opt_every: delta_opt is in the loss of every n-th training step only, with n times its weight: it costs
            n times less (benchmarks/results).
        delta_opt_after_cuts: Whether delta_opt stays in the loss after the cutting phase.
        target_macs: The fraction of a patch's multiply-accumulates that is left at the end of the cutting phase. None:
            the thresholds' common level climbs to `tau_max`, whatever that leaves.
        cuts: Number of cuts between `cut_from` and `cut_until`. (With `published`, one after every epoch.)
        standardise: Measure distances of maps of zero mean and unit norm (a correlation distance).
        prune_batches: Training batches that distances are averaged over, on each DDP rank.
        patches: Number of training patches, at least, that the layers' factors are measured on.
        tau_max: Upper end of the thresholds; without `published`, of their common level, which a layer's own factor
            multiplies.
        kappa, rho, mu: With `published`: the steps from 0.001 to `tau_max`; the epochs that a threshold looks back and
            waits (None: 5 for each 1000 epochs of training, at least 2); and the fraction of a layer's channels whose
            removal keeps its threshold where it is.
    """

    cut_from: float = 0.1
    cut_until: float = 0.5
    max_fraction_per_epoch: float | None = 0.3
    max_loss_increase: float | None = 0.1
    merge: bool = True
    rate_after_cuts: float | None = 2
    published: bool = False
    lambda_: float = 0.5
    normalisation: str = "minmax"
    delta_opt_every: int = 3
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
        """The given settings, with the paper's values for the rest where `published` is among them."""
        return cls(**{**PUBLISHED, **given} if given.get("published") else given)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lambda_ >= 0, "lambda_", "0 or more", self.lambda_)
        require(self.normalisation in NORMALISATIONS, "normalisation", "one of " + ", ".join(NORMALISATIONS),
                self.normalisation)  # fmt: skip
        for name in ("prune_batches", "patches", "cuts", "delta_opt_every"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        if self.target_macs is not None:
            require_fraction("target_macs", self.target_macs)
            require(not self.published, "target_macs", "None with published=True, which has no target",
                    self.target_macs)  # fmt: skip
        self.threshold(num_epochs=1)

    def without_effect(self) -> list[str]:
        because = {}
        if self.target_macs is not None:
            because["tau_max"] = f"beside target_macs={self.target_macs}, which decides how far thresholds climb"
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
        """A layer's threshold at the start of a training of this length."""
        # With rho = 1, C1 asks for two equal losses and no threshold would ever move: 2 is the shortest that works.
        rho = max(2, round(5 * num_epochs / 1000)) if self.rho is None else self.rho
        return Threshold(self.tau_max, self.kappa, rho, self.mu)
