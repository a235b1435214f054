"""What trained models cost and how well they segment, measured from the folders that trainings left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import nn

from ..architecture import network_of_plans
from ..pruning import channel_layout
from ..pruning.channels import is_prunable
from ..trainers.pruning import SERIES
from .cost import NetworkCost, network_cost
from .evaluation import TOLERANCE_MM, CaseScore, evaluate_folder, segmentation_files
from .models import CHECKPOINT, COMPRESSION, TrainedModel
from .paired import PairedDifference, paired_difference
from .timing import Timing, time_networks

SECONDS_OF_TIMING = 60.0  # for all networks of a report together
PREDICTIONS = "predictions"  # stands for a fold where scores are of a folder of predictions
# Attributes of ClassScore that are compared with the baseline's, case by case.
COMPARED = ("dice", "hd95", "surface_dice", "absolute_volume_error")


@dataclass(frozen=True)
class FoldReport:
    """One fold's network and what its training logged.

    Attributes:
        cost: Of its network, for one patch.
        widths: Channels of every unit now; empty for a network whose channels cannot be followed.
        timing: Seconds for one patch by device, "cpu" and "cuda"; empty if not timed.
        epoch_seconds: Length of each epoch.
        history: The pruning history, a record an epoch; empty for other trainers.
    """

    cost: NetworkCost
    widths: dict[str, int]
    timing: dict[str, Timing]
    epoch_seconds: list[float]
    history: list[dict]

    @property
    def epoch_time_ratio(self) -> float | None:
        """Median length of the last tenth of the epochs over the first one's; None for fewer than two epochs."""
        if len(self.epoch_seconds) < 2 or not self.epoch_seconds[0]:
            return None
        last = sorted(self.epoch_seconds[-max(1, len(self.epoch_seconds) // 10) :])
        return last[len(last) // 2] / self.epoch_seconds[0]


@dataclass(frozen=True)
class ModelReport:
    """One model.

    Attributes:
        name: Short, and no other model's of the report.
        folder, trainer, configuration, plans: Where it lies and what it was trained with.
        patch_size: Voxels per axis.
        dense_widths, dense_cost: What its plans describe.
        folds: By fold.
        scores: Of the validation cases by fold, or of a folder under "predictions"; what could not be scored is absent.
        differences: Against the baseline, case by case, for the attributes of `ClassScore` in `COMPARED` (means over
            classes); empty for the baseline, and without cases in common.
    """

    name: str
    folder: Path
    trainer: str
    configuration: str
    plans: str
    patch_size: tuple[int, ...]
    dense_widths: dict[str, int]
    dense_cost: NetworkCost
    folds: dict[str, FoldReport]
    scores: dict[str, list[CaseScore]]
    differences: dict[str, PairedDifference] = field(default_factory=dict)

    @property
    def cases(self) -> dict[str, CaseScore]:
        """All scored cases by name."""
        return {score.case: score for scores in self.scores.values() for score in scores}


@dataclass(frozen=True)
class Report:
    """All models.

    Attributes:
        models: In the order given.
        baseline: Name of the model that the others are compared with.
        problems: What is missing, and which command makes it.
        tolerance_mm: Of the surface Dice.
        threads: CPU threads of PyTorch, which the timing used.
    """

    models: list[ModelReport]
    baseline: str
    problems: list[str]
    tolerance_mm: float
    threads: int

    def model(self, name: str) -> ModelReport:
        """A model by its name."""
        return next(model for model in self.models if model.name == name)


def make_report(
    folders: Sequence[Path],
    *,
    baseline: Path | None = None,
    predictions: Sequence[Path | None] = (),
    labels: Path | None = None,
    tolerance_mm: float = TOLERANCE_MM,
    timing_seconds: float = SECONDS_OF_TIMING,
    checkpoint: str = CHECKPOINT,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Read models' folders, count, time, score and compare; nothing is trained and no folder is changed.

    Args:
        folders: nnU-Net's `Trainer__Plans__configuration` folders, or what `compress` wrote.
        baseline: One of them; None for the first that can be read.
        predictions: A folder of segmentations for each model, in the same order, to be scored in place of its
            `validation` folders (None: those all the same); needs `labels`.
        labels: Reference segmentations; None for those that nnU-Net validated with.
        tolerance_mm: Of the surface Dice.
        timing_seconds: About how long networks are timed, all together; 0 times none.
        checkpoint: File name of the checkpoints to read.
        say: Told what is being done.

    Raises:
        FileNotFoundError: No model can be read.
        ValueError: The arguments do not fit each other.
    """
    if predictions and (len(predictions) != len(folders) or labels is None):
        raise ValueError(
            f"--predictions takes a folder, or the word validation, for each of the {len(folders)} models, in their "
            f"order, and --labels the references; got {len(predictions)} and {'no ' if labels is None else ''}--labels."
        )
    if baseline is not None and baseline.resolve() not in [folder.resolve() for folder in folders]:
        raise ValueError(f"--baseline {baseline} is none of the models; give one of them.")
    if tolerance_mm < 0 or timing_seconds < 0:
        raise ValueError(f"Tolerance ({tolerance_mm:g} mm) and timing ({timing_seconds:g} s) must be 0 or more.")

    problems: list[str] = []
    models: list[ModelReport] = []
    networks: dict[tuple[str, str], nn.Module] = {}
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    for name, folder, of_folder in zip(
        short_names(folders), folders, predictions or [None] * len(folders), strict=True
    ):
        say(f"reading {folder}")
        try:
            trained = TrainedModel.read(folder, checkpoint_name=checkpoint)
            model, of_folds, channels = _measure(name, trained)
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            problems.append(f"{folder} is not in the report: {error}")
            continue
        for fold, one in model.folds.items():
            if not one.history and _log(trained.checkpoints[fold]).get(SERIES):
                problems.append(
                    f"{name}, fold {fold}: this version cannot read its pruning history, so channels over the epochs "
                    f"are not drawn. It was made by another version: pip install -U nnunet-sauron."
                )
        networks.update({(name, fold): network for fold, network in of_folds.items()})
        shapes.update({(name, fold): (1, channels, *model.patch_size) for fold in of_folds})
        say(f"scoring {name}")
        models.append(replace(model, scores=_scores(trained, of_folder, labels, tolerance_mm, problems)))
    if not models:
        raise FileNotFoundError(" ".join(problems))

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])] if timing_seconds else []
    for device in devices:
        say(f"timing {len(networks)} networks on {device}, taking turns, about {timing_seconds:.0f} s")
        timed = time_networks(networks, shapes, seconds=timing_seconds / len(devices), device=device)
        for model in models:
            for fold, one in model.folds.items():
                one.timing[device] = timed[model.name, fold]

    wanted = [model for model in models if baseline is None or model.folder.resolve() == baseline.resolve()]
    if not wanted:
        problems.append(f"The baseline {baseline} could not be read; {models[0].name} takes its place.")
    reference = (wanted or models)[0]
    for model in models:
        if model is not reference:
            model.differences.update(_differences(model, reference))
            if not model.differences and model.scores and reference.scores:
                problems.append(
                    f"{model.name} and {reference.name} have no scored case in common; compare the same folds."
                )
    return Report(models, reference.name, problems, tolerance_mm, torch.get_num_threads())


def short_names(folders: Sequence[Path]) -> list[str]:
    """The folders' last parts, as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(len(part) for part in parts) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"A model was given twice: {', '.join(str(folder) for folder in folders)}.")


def _measure(name: str, trained: TrainedModel) -> tuple[ModelReport, dict[str, nn.Module], int]:
    manager = trained.manager
    channels = determine_num_input_channels(
        manager, manager.get_configuration(trained.configuration), trained.dataset_json
    )
    dense, _ = network_of_plans(manager, trained.configuration, trained.dataset_json, device="cpu")
    networks = {fold: trained.network(fold) for fold in trained.checkpoints}
    folds = {
        fold: FoldReport(
            cost=network_cost(network, trained.patch_size, channels),
            widths=_widths(network),
            timing={},
            epoch_seconds=_epoch_seconds(log := _log(trained.checkpoints[fold])),
            history=_history(log),
        )
        for fold, network in networks.items()
    }
    model = ModelReport(
        name=name,
        folder=trained.folder,
        trainer=next(iter(trained.checkpoints.values()))["trainer_name"],
        configuration=trained.configuration,
        plans=trained.plans["plans_name"],
        patch_size=trained.patch_size,
        dense_widths=_widths(dense),
        dense_cost=network_cost(dense, trained.patch_size, channels),
        folds=folds,
        scores={},
    )
    return model, networks, channels


def _widths(network: nn.Module) -> dict[str, int]:
    return channel_layout(network).widths if is_prunable(network) else {}


def _log(checkpoint: dict) -> dict[str, list]:
    """What its training logged; nothing after `compress`, which keeps the log of the network it was given."""
    return {} if COMPRESSION in checkpoint else checkpoint.get("logging", {})


def _history(log: Mapping[str, list]) -> list[dict]:
    """The pruning history; none where it is not in the form that this version writes."""
    history = log.get(SERIES, [])
    known = all(isinstance(epoch, Mapping) and {"widths", "state"} <= epoch.keys() for epoch in history)
    return history if known else []


def _epoch_seconds(logging: Mapping[str, list]) -> list[float]:
    starts, ends = (logging.get(f"epoch_{when}_timestamps", []) for when in ("start", "end"))
    return [end - start for start, end in zip(starts, ends, strict=False)]


def _scores(
    trained: TrainedModel, predictions: Path | None, labels: Path | None, tolerance_mm: float, problems: list[str]
) -> dict[str, list[CaseScore]]:
    """Of each fold's validation, or of one folder of predictions; what is missing is added to the problems."""
    validations = {fold: trained.folder / f"fold_{fold}" / "validation" for fold in trained.checkpoints}
    scores = {}
    for fold, folder in ({PREDICTIONS: predictions} if predictions else validations).items():
        try:
            if not predictions:
                _check_validation(trained, fold, folder)
            references = labels or _references(trained, folder)
            cases = [path.name for path in segmentation_files(folder)]
            scores[fold] = evaluate_folder(
                folder, references, trained.classes, tolerance_mm=tolerance_mm, ignore_label=trained.ignore_label,
                cases=cases,
            )  # fmt: skip
            without = len(segmentation_files(references)) - len(cases)
            if predictions and without:
                problems.append(f"{without} references in {references} have no segmentation in {folder}.")
        except (ValueError, OSError, RuntimeError) as error:
            problems.append(f"{trained.folder.name}, fold {fold}, has no quality in the report: {error}")
    return scores


def _check_validation(trained: TrainedModel, fold: str, folder: Path) -> None:
    if not (folder / "summary.json").is_file():
        trainer, plans, configuration = [*trained.folder.name.split("__"), "", ""][:3]
        raise FileNotFoundError(
            f"{folder} has no summary.json: the validation did not end. Run: nnUNetv2_train DATASET "
            f"{configuration or trained.configuration} {fold} -tr {trainer} -p {plans or trained.plans['plans_name']} "
            f"--val"
        )
    if not segmentation_files(folder):
        raise FileNotFoundError(
            f"{folder} holds no segmentations. Make some with nnUNetv2_predict_from_modelfolder -m {trained.folder} "
            f"-i IMAGES -o OUT and give --predictions OUT --labels LABELS."
        )


def _references(trained: TrainedModel, validation: Path) -> Path:
    """The folder of references that nnU-Net validated with."""
    cases = json.loads((validation / "summary.json").read_text()).get("metric_per_case", [])
    named = {Path(case["reference_file"]).parent for case in cases if "reference_file" in case}
    named |= {Path(nnUNet_preprocessed or "") / trained.plans["dataset_name"] / "gt_segmentations"}
    for folder in named:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"the references are not where nnU-Net had them ({', '.join(str(folder) for folder in sorted(named))}); give "
        f"--labels FOLDER, such as nnUNet_raw{os.sep}{trained.plans['dataset_name']}{os.sep}labelsTr."
    )


def _differences(model: ModelReport, baseline: ModelReport) -> dict[str, PairedDifference]:
    common = sorted(model.cases.keys() & baseline.cases.keys())
    if not common:
        return {}
    return {
        metric: paired_difference(*([one.cases[case].mean(metric) for case in common] for one in (model, baseline)))
        for metric in COMPARED
    }
