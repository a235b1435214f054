"""`nnUNetv2_sauron compress`: fold what can be told from the rest into the rest, and measure what that did."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from .. import __version__
from ..model.cases import Case
from ..model.evaluation import CaseScore, evaluate_folder
from ..model.trained import TrainedModel
from ..pruning import (
    CostModel,
    Ranking,
    channel_layout,
    feature_map_voxels,
    merge_channels,
    position_weights,
    rank_units,
    resize,
)
from ..pruning.moments import UNSURE
from ..pruning.ranking import PROBED
from ..pruning.timing import time_networks
from ..pruning.tolerance import LATENCY_STEPS, STEPS, cost_left, tolerance_for, weighted, widths_at
from .images import enough_patches, too_few

HELD_OUT = 0.25  # of the images: what the agreement is measured on
REPEATS = 9
GOALS = ("tolerance", "macs", "parameters", "latency")


@dataclass(frozen=True)
class Goal:
    """What the small model is to meet: exactly one of these.

    Attributes:
        tolerance: Error that every layer may make in what its readers get, relative, squared, as `weighted` counts it
            by MACs, or all layers of a stage together, as `stage_rankings` counts it; above 0.
        macs, parameters, latency: Fraction that is to be left.
    """

    tolerance: float | None = None
    macs: float | None = None
    parameters: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in GOALS if getattr(self, name) is not None}
        if len(given) != 1:
            raise ValueError(f"Give exactly one of {', '.join(GOALS)}; got {', '.join(given) or 'none'}.")
        ((name, value),) = given.items()
        if name == "tolerance":
            if not 0 < value < math.inf:
                raise ValueError(f"tolerance is a number above 0, such as 0.02; got {value:g}.")
        elif not 0 < value < 1:
            raise ValueError(f"{name} is a fraction between 0 and 1, such as 0.5; got {value:g}.")

    @property
    def part(self) -> float:
        """The fraction that is to be left, of whatever it is."""
        return next(part for part in (self.macs, self.parameters, self.latency) if part is not None)

    @property
    def steps(self) -> int:
        """Steps that `tolerance_for` takes."""
        return LATENCY_STEPS if self.latency is not None else STEPS


@dataclass(frozen=True)
class Compressed:
    """One fold's network made smaller.

    Attributes:
        tolerance: At which its widths were taken.
        before, after: Channels of every unit.
        parameters, macs, seconds: Before and after; median seconds of one patch, measured taking turns.
        weights: The new network's.
        left_alone: Units that had too few positions for a fit and keep all of their channels.
    """

    tolerance: float
    before: dict[str, int]
    after: dict[str, int]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    seconds: tuple[float, float]
    weights: dict[str, torch.Tensor]
    left_alone: list[str] = field(default_factory=list)


class Compressor:
    """One fold of a model.

    Args:
        model: The model.
        fold: One of its folds.
        device: Where networks run.
        round_to: Widths are multiples of this, where there are as many channels.

    Attributes:
        before: Channels of every unit.
        wanted: How many patches its layers should be fitted on.
        left_alone: Units that keep all of their channels, since they have too few positions for a stable fit.
    """

    def __init__(self, model: TrainedModel, fold: str, device: torch.device, round_to: int = 1):
        self.device, self.round_to = device, round_to
        # Fits need float64, which MPS does not have: there the network is timed and no more.
        self._fits_on = torch.device("cpu") if device.type == "mps" else device
        self.network = model.network(fold).to(self._fits_on)
        self.patch_size = model.patch_size
        self.before = channel_layout(self.network).widths
        self._channels = next(self.network.parameters()).shape[1]
        self._regions = model.manager.get_label_manager(model.dataset_json).has_regions
        self.cost = CostModel(self.network, self.patch_size, self._channels)
        self._positions = feature_map_voxels(self.network, self.patch_size, self._channels)
        self.wanted = enough_patches(self._positions, self.before)
        self.left_alone: list[str] = []

    def probes(self, inputs: Sequence[torch.Tensor]) -> int:
        """How many steps `rank` takes on so many inputs."""
        return len(self.before) * min(len(inputs), PROBED)

    def leave_alone(self, patches: int) -> str | None:
        """Leave alone the layers for which so many patches are too few; what to tell about them, if there are any.

        Raises:
            ValueError: That is all layers.
        """
        self.left_alone = too_few(patches, self._positions, self.before)
        if not self.left_alone:
            return None
        described = ", ".join(
            f"{name} ({self.before[name]} channels, {self._positions[name]} positions a patch)"
            for name in self.left_alone
        )
        return (
            f"{patches} patches are too few for a stable fit of {described}: they keep all of their channels. More "
            f"images (--max-images) would let them be compressed as well."
        )

    def rank(
        self,
        inputs: Sequence[torch.Tensor],
        *,
        unsure: float = UNSURE,
        after_probe: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Rank every layer's channels on patches (B, channels, *patch). Comes before what follows.

        Args:
            inputs: The patches.
            unsure: That of `position_weights`.
            after_probe: Called `probes` times, with a unit's name.

        Raises:
            ValueError: They are too few for a stable fit of any layer.
        """
        self.leave_alone(sum(map(len, inputs)))
        self.inputs = inputs
        self.weights = position_weights(self.network, inputs, regions=self._regions, unsure=unsure)
        self.ranked: dict[str, Ranking] = rank_units(
            self.network, inputs, self.weights, regions=self._regions, left_alone=self.left_alone,
            after_probe=after_probe,
        )  # fmt: skip
        self.rankings = weighted(self.ranked, self.cost.macs)

    def tolerance(self, goal: Goal) -> float:
        """The tolerance that meets a goal.

        Raises:
            ValueError: The goal cannot be met.
        """
        if goal.tolerance is not None:
            return goal.tolerance
        try:
            return tolerance_for(goal.part, self.part_left(goal), self.rankings, self.round_to, goal.steps)
        except ValueError as error:
            raise with_left_alone(error, self.left_alone) from error

    def part_left(self, goal: Goal) -> Callable[[dict[str, int]], float]:
        """From widths to the part that is left of what a goal is for, which is not the tolerance."""
        if goal.latency is not None:
            return self._time_left
        return cost_left(self.cost.macs if goal.macs is not None else self.cost.parameters, self.before)

    def compress(
        self,
        tolerance: float,
        after_unit: Callable[[str], None] = lambda _: None,
        widths: dict[str, int] | None = None,
    ) -> Compressed:
        """Cut to the widths of a tolerance, or to these, merging; the network itself stays as it is."""
        network = copy.deepcopy(self.network)
        after = widths or widths_at(tolerance, self.rankings, self.round_to)
        keep = {name: self.rankings[name].keep(width) for name, width in after.items()}
        merge_channels(network, keep, self.inputs, weights=self.weights, after_unit=after_unit)
        resize(network, after)  # where more channels are asked for than there are, with zeros
        times = self._times(network)
        return Compressed(
            tolerance,
            self.before,
            after,
            (self.cost.parameters(self.before), self.cost.parameters(after)),
            (self.cost.macs(self.before), self.cost.macs(after)),
            (times["before"], times["after"]),
            # Moved as a whole: nnU-Net's modules have several names, and each tensor is to be stored once.
            network.cpu().state_dict(),
            self.left_alone,
        )

    def _time_left(self, widths: dict[str, int]) -> float:
        narrow = copy.deepcopy(self.network)
        resize(narrow, widths)  # what its weights are makes no difference to the time
        times = self._times(narrow)
        return times["after"] / times["before"]

    def _times(self, network: nn.Module) -> dict[str, float]:
        both = {"before": self.network, "after": network}
        shape = (1, self._channels, *self.patch_size)
        timed = time_networks(both, shape, repeats=REPEATS, warmup=2, device=self.device)
        for one in both.values():
            one.to(self._fits_on)
        return {name: timing.median for name, timing in timed.items()}


def with_left_alone(error: ValueError, left_alone: Sequence[str]) -> ValueError:
    """The error of a goal that cannot be met, with the layers that had too few positions to be compressed."""
    if not left_alone:
        return error
    return ValueError(f"{error} Give more images, so that these need not be left alone: {', '.join(left_alone)}.")


def split(cases: Sequence[Case], most: int) -> tuple[list[Case], list[Case]]:
    """At most so many cases, evenly from all: those to fit on, and those held out (none of a single case)."""
    step = max(1, len(cases) / most)
    chosen = [cases[int(i * step)] for i in range(min(most, len(cases)))]
    held_out = round(len(chosen) * HELD_OUT) or min(1, len(chosen) - 1)
    every = len(chosen) / held_out if held_out else math.inf
    indices = {int((i + 0.5) * every) for i in range(held_out)}
    return [c for i, c in enumerate(chosen) if i not in indices], [c for i, c in enumerate(chosen) if i in indices]


class Segmenter:
    """Segmentations of the held-out cases by nnU-Net's own prediction, and how they agree.

    Args:
        model: The model.
        cases: The held-out cases.
        device: Where it predicts.
        progress: Its `bar(text, total)` is a context that yields what to call after each case.
        labels: A folder of reference segmentations, if there is one.

    Raises:
        FileNotFoundError: A case has no reference.
    """

    def __init__(
        self, model: TrainedModel, cases: Sequence[Case], device: torch.device, progress, labels: Path | None = None
    ):
        self.model, self.cases, self.device, self.progress = model, cases, device, progress
        self._folder = tempfile.TemporaryDirectory()
        self.root = Path(self._folder.name)
        self.ending = model.dataset_json["file_ending"]
        self.labels = labels
        self._noted: set[str] = set()
        for path in self.references.values():
            if not path.exists():
                raise FileNotFoundError(f"{labels} has no {path.name}; --labels needs one for every held-out image.")

    @property
    def references(self) -> dict[str, Path]:
        """The reference segmentations by case."""
        return {case.name: self.labels / (case.name + self.ending) for case in self.cases} if self.labels else {}

    def segment_with_old_model(self) -> None:
        """Comes before what follows."""
        self._predict("old", None)

    def agreement(self, weights: list[dict]) -> list[CaseScore]:
        """Segmentations with new weights, against the old ones, case by case."""
        if not self.cases:
            return []
        return evaluate_folder(self._predict("new", weights), self.root / "old", self.model.segmentations)

    def against_labels(self, name: str) -> list[CaseScore] | None:
        """The "old" or "new" segmentations against the references, if there are any."""
        if not self.labels or not self.cases:
            return None
        names = [path.name for path in self.references.values()]
        return evaluate_folder(
            self.root / name, self.labels, self.model.segmentations, cases=names, on_note=self._say_once
        )

    def _say_once(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            self.progress.say(text)

    def _predict(self, name: str, weights: list[dict] | None) -> Path:
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        predictor = self.model.predictor(self.device, weights)
        with self.progress.bar(f"segmenting with the {name} model", len(self.cases)) as step:
            for case in self.cases:
                predictor.predict_from_files_sequential([list(case.files)], [str(folder / case.name)])
                step(case.name)
        return folder


def described_network(model: TrainedModel) -> dict:
    """Whose network was compressed, and what had to be assumed about it."""
    builder = model.builder
    return {"built_by": builder.trainer_name, "differs_from_plans": builder.differs, "assumed": builder.assumed}


def provenance(
    model: TrainedModel, goal: Goal, round_to: int, cases: Sequence[Case], found: Mapping[str, Compressed]
) -> dict:
    """Where a compressed model comes from, for its checkpoints and its compression.json."""
    return {
        "made_by": f"nnunet-sauron {__version__}",
        "source": str(model.folder.resolve()),
        "source_checkpoint": model.checkpoint_name,
        "source_trainer": model.trainer_names[0],
        "network": described_network(model),
        "goal": {name: value for name, value in asdict(goal).items() if value is not None},
        "round_to": round_to,
        "fitted_on": [case.name for case in cases],
        "folds": {
            fold: {key: value for key, value in vars(one).items() if key != "weights"} for fold, one in found.items()
        },
    }
