"""A trained model as teacher: its networks, whether they suit a student, and their outputs for a batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn
from torch.nn import functional

from ..model.checkpoints import CHECKPOINT, logged_settings, plain, read_checkpoint, trained_with
from ..model.labels import class_values
from ..model.networks import NetworkBuilder
from ..model.trained import ALL, folds_in
from ..pruning.eval_mode import mixed_precision
from .start import seen_cases

SEEN = ("spacing", "normalization_schemes", "use_mask_for_norm")  # these decide the images that a network is given


class Teacher:
    """One or several trained networks that segment a batch. No module, so that no checkpoint stores it.

    Args:
        networks: Of the same classes and outputs; put into evaluation mode, and without gradients.
        regions: The classes are regions.
        name: Their origin, for a log.
        supervised: Whether their outputs of low resolution were trained; if not, only the full resolution is learned.
    """

    def __init__(
        self, networks: Sequence[nn.Module], *, regions: bool, name: str = "", supervised: bool = True,
        files: Sequence[Path] = (),
    ):  # fmt: skip
        self.networks = [network.eval().requires_grad_(False) for network in networks]
        self.files = list(files)
        self.regions, self.name, self.supervised = regions, name, supervised
        self.device = torch.device("cpu")

    @classmethod
    def read(
        cls, source: str | Path, fold: int | str, plans: dict, configuration: str, dataset_json: dict,
        *, folds: str = "same", checkpoint_name: str = CHECKPOINT,
    ) -> Teacher:  # fmt: skip
        """Read a teacher for a student of these plans; it stays on the CPU until `start`.

        Args:
            source: A trained model's folder, or a .pth file of one.
            fold: The student's.
            plans, configuration, dataset_json: What the student's trainer is given.
            folds: Of a folder: "same" takes the student's fold, "all" the mean of the numbered folds that are there, or
                fold all where it is alone.
            checkpoint_name: Of a folder: the file in each fold.

        Raises:
            FileNotFoundError: It is not there (any more).
            ValueError: It cannot be read, or it is of another data set, or has other classes, input channels, images
                or resolutions of its outputs than the student.
        """
        student = PlansManager(copy.deepcopy(plans)), configuration, dataset_json
        files, left_out = _files(Path(source), fold, folds, checkpoint_name)
        networks, supervised, seen = [], True, []
        for path in files:
            checkpoint = read_checkpoint(path)
            teacher = trained_with(checkpoint, path)
            _check(student, teacher, path)
            try:
                builder = NetworkBuilder(checkpoint.get("trainer_name"), *teacher)
                network = builder.load(checkpoint, path)
            except ValueError as error:
                raise ValueError(f"{path} cannot be the teacher: {error}") from error
            if not hasattr(getattr(network, "decoder", None), "deep_supervision"):
                raise ValueError(
                    f"{path} cannot be the teacher: its network, {type(network).__name__}, is no U-Net of nnU-Net with "
                    f"outputs of several resolutions. Name another model (teacher=FOLDER), or none (teacher=None)."
                )
            networks.append(network)
            supervised = supervised and is_supervised(checkpoint)
            seen.append(seen_cases(checkpoint, path, fold, plans["dataset_name"]))
        name = str(source) if len(files) == 1 else f"{source}, the mean of {len(files)} folds"
        name += f", without {' and '.join(left_out)}" if left_out else ""
        name += f" ({builder.assumed})" if builder.assumed else ""
        name += "".join(f". {warning}" for warning in seen if warning)
        return cls(
            networks, regions=student[0].get_label_manager(dataset_json).has_regions, name=name, supervised=supervised,
            files=files,
        )  # fmt: skip

    def start(self, device: torch.device, *, deep_supervision: bool) -> None:
        """Move to the student's device, and give as many outputs as it, or only the first. Comes before `logits`."""
        self.device = device
        for network in self.networks:
            network.to(device)
            network.decoder.deep_supervision = deep_supervision and self.supervised

    def logits(self, data: torch.Tensor) -> list[torch.Tensor]:
        """The logits that the student should give for a batch.

        Of several networks: the logits of their mean probability, in float32.

        Args:
            data: (B, channels, *patch), on the student's device.

        Returns:
            (B, classes, *voxels) for every output of deep supervision, the full resolution first.
        """
        # Not inference_mode: its tensors cannot take part in the student's gradient.
        with torch.no_grad(), mixed_precision(self.device):
            of_networks = [as_list(network(data)) for network in self.networks]
            if len(of_networks) == 1:
                return of_networks[0]
            return [self._mean([output.float() for output in outputs]) for outputs in zip(*of_networks, strict=True)]

    def _mean(self, logits: list[torch.Tensor]) -> torch.Tensor:
        """The logits of the mean probability, from logarithms: a probability near 0 or 1 loses digits."""
        if self.regions:
            inside, outside = (
                torch.logsumexp(torch.stack([functional.logsigmoid(sign * one) for one in logits]), 0)
                for sign in (1, -1)
            )
            return inside - outside
        # Their number would be a constant over all classes, which changes no softmax.
        return torch.logsumexp(torch.stack([one.log_softmax(1) for one in logits]), 0)


def _files(source: Path, fold: int | str, folds: str, name: str) -> tuple[list[Path], list[str]]:
    """The checkpoints to read and, of all folds, the folders that have one and are left out."""
    if not source.exists():
        raise FileNotFoundError(
            f"There is no teacher at {source}. If it was moved, name its new folder (teacher=FOLDER); teacher=None "
            f"trains without one."
        )
    if source.is_file():
        return [source], []
    if folds not in ("same", "all"):
        raise ValueError(f"teacher_folds is same or all; got '{folds}'.")
    there = [one for one in folds_in(source) if (source / f"fold_{one}" / name).is_file()]
    numbered = [one for one in there if one != ALL] or there  # as nnU-Net predicts
    found = numbered if folds == "all" else [one for one in there if one == str(fold)]
    if not found:
        have = ", ".join(f"fold_{one}" for one in there) or "none"
        raise FileNotFoundError(
            f"The teacher {source} has no fold_{fold if folds == 'same' else '*'}/{name}; folds with one: "
            f"{have}. Name another folder or a .pth file (teacher=...), or take all folds (teacher_folds=all)."
        )
    files = [source / f"fold_{one}" / name for one in found]
    others = [path.parent.name for path in sorted(source.glob(f"fold_*/{name}")) if path not in files]
    return files, others if folds == "all" else []


def _check(student: tuple, teacher: tuple, path: Path) -> None:
    """Raise ValueError unless both take the same images, and have outputs of the same classes and resolutions."""
    (plans, configuration, dataset), (plans_t, configuration_t, dataset_t) = student, teacher
    one, other = plans.get_configuration(configuration), plans_t.get_configuration(configuration_t)
    facts = {
        "data set": (plans.dataset_name, plans_t.dataset_name),
        "classes": (_classes(plans, dataset), _classes(plans_t, dataset_t)),
        "input channels": (_channels(plans, one, dataset), _channels(plans_t, other, dataset_t)),
        **{key: tuple(each.configuration.get(key) for each in (one, other)) for key in SEEN},
        "order of axes": tuple(each.plans.get("transpose_forward") for each in (plans, plans_t)),
        "resolutions of outputs (strides)": (one.pool_op_kernel_sizes, other.pool_op_kernel_sizes),
    }
    for what, (of_student, of_teacher) in facts.items():
        if plain(of_student) != plain(of_teacher):
            raise ValueError(
                f"{path} cannot be the teacher: its {what}: {plain(of_teacher)}; the student's: "
                f"{plain(of_student)}. Name a model of the same data set and configuration (teacher=FOLDER), or none "
                f"(teacher=None)."
            )


def _classes(plans: PlansManager, dataset_json: dict) -> list:
    labels = plans.get_label_manager(dataset_json)
    known = [(name, value) for name, value in class_values(dataset_json["labels"]).items() if name != "ignore"]
    # Regions are outputs in the order in which they stand; classes in the order of their values.
    return known if labels.has_regions else sorted(known, key=lambda item: item[1])


def _channels(plans: PlansManager, configuration, dataset_json: dict) -> tuple:
    names = dataset_json.get("channel_names") or dataset_json["modality"]
    return determine_num_input_channels(plans, configuration, dataset_json), list(names.values())


def is_supervised(checkpoint: dict) -> bool:
    """Whether the heads of low resolution, which nnU-Net always builds, were trained."""
    without = logged_settings(checkpoint).get("enable_deep_supervision") is False
    if without or "NoDeepSupervision" in str(checkpoint.get("trainer_name")):
        return False
    # nnU-Net begins with biases of 0, and a head that no loss sees keeps them. It never sees that of the lowest
    # resolution; that of the highest is trained in any case.
    biases = [
        tensor for name, tensor in checkpoint["network_weights"].items()
        if name.startswith("decoder.seg_layers.") and name.endswith(".bias")
    ]  # fmt: skip
    between = biases[1:-1]
    return not between or any(bool(bias.any()) for bias in between)


def as_list(outputs: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """A network's outputs: with deep supervision several, the full resolution first, without it one."""
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
