"""New widths for a configuration's network: flat, scaled, one per stage, or layer by layer as in a checkpoint."""

from __future__ import annotations

import copy
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..model.architecture import network_of_plans
from ..model.checkpoints import DamagedFileError, read_checkpoint, trained_with
from ..pruning import widths_of
from .networks import PrunedPlainConvUNet, PrunedResidualEncoderUNet

MAX_WIDTH = 8192  # nnU-Net's own widest is 512
PRUNED = {"PlainConvUNet": PrunedPlainConvUNet, "ResidualEncoderUNet": PrunedResidualEncoderUNet}


class Widths(ABC):
    """Exchanges the widths in an architecture.

    Attributes:
        label: What stands for them in the name of plans, for example `LUnet32`.
        configuration: The only configuration that they are meant for; None if they fit any.
    """

    label: str
    configuration: str | None

    @abstractmethod
    def architecture(self, configuration: str, old: dict) -> dict:
        """A configuration's new `architecture`, as plans hold it; `old` is left alone.

        Args:
            configuration: Its name, for messages.
            old: Its `architecture` in the source plans.

        Raises:
            ValueError: These widths do not fit that architecture.
        """

    @abstractmethod
    def __str__(self) -> str:
        """What the derived plans note as their widths."""


class StageWidths(Widths):
    """One width for all layers of a stage, which is what nnU-Net's own networks take."""

    configuration = None

    def architecture(self, configuration: str, old: dict) -> dict:
        network_class, arguments = old["network_class_name"].rpartition(".")[2], old["arch_kwargs"]
        if network_class in [pruned.__name__ for pruned in PRUNED.values()]:
            raise ValueError(
                f"{configuration} has a network of class {network_class}, whose layers have widths of their own, so "
                f"new widths for its stages would not change them; give -p the plans that these were derived from."
            )
        if network_class not in PRUNED:
            raise ValueError(
                f"{configuration} has a network of class {network_class}, expected {' or '.join(PRUNED)}; choose "
                f"other plans with -p, for example nnUNetPlans."
            )
        for name in ("stem_channels", "bottleneck_channels"):
            if arguments.get(name) is not None:
                raise ValueError(
                    f"{configuration} sets {name}={arguments[name]} beside the widths of its stages, which is not "
                    f"known here; remove it from a copy of the plans and derive from that."
                )
        widths = arguments["features_per_stage"]
        widths = [widths] * arguments["n_stages"] if isinstance(widths, int) else list(widths)
        new = copy.deepcopy(old)
        new["arch_kwargs"]["features_per_stage"] = self.of_stages(configuration, widths)
        return new

    @abstractmethod
    def of_stages(self, configuration: str, old: Sequence[int]) -> list[int]:
        """The new width of every stage, given the old ones."""


@dataclass(frozen=True)
class Flat(StageWidths):
    """LUnet: the same width on all stages (Hassler et al., Lean Unet, arXiv 2512.03834).

    Raises:
        ValueError: The width is below 1, or above `MAX_WIDTH`.
    """

    width: int

    def __post_init__(self) -> None:
        _check_width(self.width)

    @property
    def label(self) -> str:
        return f"LUnet{self.width}"

    def of_stages(self, configuration: str, old: Sequence[int]) -> list[int]:
        return [self.width] * len(old)

    def __str__(self) -> str:
        return f"flat {self.width}"


@dataclass(frozen=True)
class Scaled(StageWidths):
    """Every width times a factor, rounded, at least 1.

    Raises:
        ValueError: The factor is not a positive number.
    """

    factor: float

    def __post_init__(self) -> None:
        if not (self.factor > 0 and math.isfinite(self.factor)):
            raise ValueError(f"The scale is {self.factor:g}, which must be above 0; give for example 0.5.")

    @property
    def label(self) -> str:
        return f"Scaled{100 * self.factor:g}"

    def of_stages(self, configuration: str, old: Sequence[int]) -> list[int]:
        widths = [max(1, round(self.factor * width)) for width in old]
        for width in widths:
            _check_width(width)
        return widths

    def __str__(self) -> str:
        return f"scale {self.factor:g}"


@dataclass(frozen=True)
class PerStage(StageWidths):
    """The widths of all stages, highest resolution first.

    Raises:
        ValueError: There is none, or one is below 1 or above `MAX_WIDTH`.
    """

    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.widths:
            raise ValueError("There are no widths; give one for each stage, for example 8,16,32.")
        for width in self.widths:
            _check_width(width)

    @property
    def label(self) -> str:
        return f"Widths{self}"

    def of_stages(self, configuration: str, old: Sequence[int]) -> list[int]:
        if len(self.widths) != len(old):
            raise ValueError(
                f"{len(self.widths)} widths were given ({self}), but {configuration} has {len(old)} stages, now of "
                f"{'-'.join(map(str, old))} channels; give {len(old)} widths, or choose other configurations with -c."
            )
        return list(self.widths)

    def __str__(self) -> str:
        return "-".join(map(str, self.widths))


class UniformWidths(PerStage):
    """The widths of all stages of a pruned network, for nnU-Net's own network class."""

    def architecture(self, configuration: str, old: dict) -> dict:
        pruned = PRUNED.get(_dense_class(old))
        if pruned is not None and old["network_class_name"].endswith(pruned.__name__):
            stock = pruned.__base__
            arguments = {name: value for name, value in old["arch_kwargs"].items() if name != "widths"}
            name = f"{stock.__module__}.{stock.__qualname__}"
            old = {**old, "network_class_name": name, "arch_kwargs": arguments}
        return super().architecture(configuration, old)


@dataclass(frozen=True)
class PrunedWidths(Widths):
    """Every layer's own width, as pruning left it; to be trained from a new initialisation.

    Attributes:
        checkpoint: Model folder, fold and file name of the checkpoint.
        configuration: That it was trained for.
        plans_name: That it was trained with.
        trained: The `architecture` of those plans.
        units: Channels by unit name.
    """

    checkpoint: str
    configuration: str
    plans_name: str
    trained: dict
    units: dict[str, int]

    label = "Pruned"

    @classmethod
    def of_checkpoint(cls, path: Path) -> PrunedWidths:
        """Read the widths from a checkpoint of any trainer.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is truncated or no checkpoint, needs a module that is missing, its network's class is
                unknown, or its weights do not fit its own plans.
        """
        try:
            checkpoint = read_checkpoint(path)
        except DamagedFileError as error:  # its advice is for who continues a training
            raise ValueError(
                f"{path} has no widths to take: it is truncated, or no checkpoint of nnU-Net; give the .pth file of a "
                f"pruned model, such as fold_0/checkpoint_final.pth."
            ) from error
        plans, configuration, dataset_json = trained_with(checkpoint, path)
        architecture = plans.get_configuration(configuration).configuration["architecture"]
        if _dense_class(architecture) not in PRUNED:
            raise ValueError(
                f"{path} is of a network of class {architecture['network_class_name']}, expected "
                f"{' or '.join(PRUNED)}; give the checkpoint of a model of nnU-Net's default or ResEnc plans."
            )
        network = network_of_plans(plans, configuration, dataset_json)
        units = widths_of(network, checkpoint["network_weights"])
        if units is None or checkpoint["network_weights"].keys() != network.state_dict().keys():
            raise ValueError(
                f"{path} differs from its own plans, {plans.plans_name}, in more than the widths of layers; give the "
                f"checkpoint of a trainer that changes the network in no other way."
            )
        return cls("/".join(path.resolve().parts[-3:]), configuration, plans.plans_name, architecture, units)

    def architecture(self, configuration: str, old: dict) -> dict:
        one, other = _topology(old), _topology(self.trained)
        differing = [name for name in {**one, **other} if one.get(name) != other.get(name)]
        if differing:
            raise ValueError(
                f"{self.checkpoint} is of another topology than {configuration} of the source plans, it differs in "
                f"{', '.join(differing)}; give -p plans like those that it was trained with, {self.plans_name}."
            )
        network_class = PRUNED[_dense_class(self.trained)]
        return {
            **self.trained,
            "network_class_name": f"{network_class.__module__}.{network_class.__qualname__}",
            # With the checkpoint's own features_per_stage: equal neighbours share channels in a residual encoder.
            "arch_kwargs": {**self.trained["arch_kwargs"], "widths": self.units},
        }

    def __str__(self) -> str:
        return f"from {self.checkpoint}"


def _check_width(width: int) -> None:
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"The width {width} is not from 1 to {MAX_WIDTH}; give for example 16. nnU-Net's go to 512.")


def _dense_class(architecture: dict) -> str:
    """Name of the class without its module, and of nnU-Net's own class for one of ours."""
    name = architecture["network_class_name"].rpartition(".")[2]
    return next((dense for dense, pruned in PRUNED.items() if pruned.__name__ == name), name)


def _topology(architecture: dict) -> dict:
    """Everything in an architecture but its widths."""
    arguments = {name: value for name, value in architecture["arch_kwargs"].items() if value is not None}
    topology = {"network_class_name": _dense_class(architecture), **arguments}
    topology.pop("features_per_stage", None)
    topology.pop("widths", None)
    return json.loads(json.dumps(topology))  # tuples and lists compare equal
