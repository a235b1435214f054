"""Cost and quality of trained models, measured from their folders."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from nnunet_sauron_runtime import Bundle
from torch import nn

from ...console.progress import Progress
from ...model.checkpoints import logged
from ...model.evaluation import TOLERANCE_MM, CaseScore
from ...model.history import SERIES
from ...model.trained import ALL, CHECKPOINT, COMPRESSION, TrainedModel, folds_in
from ...plugin.commands import checkpoint_flag, command, train_command
from ...pruning import channel_layout
from ...pruning.timing import Timing, time_networks
from ..cost import NetworkCost, network_cost
from .bundles import InEngine, bundle_cost, classes_of, engine_networks, is_bundle, open_bundle, score_bundle
from .paired import PairedDifference, paired_difference
from .scores import PREDICTIONS, score_model, was_validated

SECONDS_OF_TIMING = 60.0  # for all networks of a report together
SCATTER = 0.3  # of a median: a wider middle half is a sign of other work on the machine
# Attributes of ClassScore that are compared with the baseline's, case by case.
COMPARED = ("dice", "hd95", "surface_dice", "absolute_volume_error")


@dataclass(frozen=True)
class FoldReport:
    """One fold's network and the log of its training.

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
    def target(self) -> dict | None:
        """The target of its pruning, from the newest epoch's record (`trainers.pruning.PruningTrainer`): `name`,
        `value`, the parts `asked` for and `left`, `reached` (None: cuts went on) and `why` not. None without a target.
        """
        found = self.history[-1].get("target") if self.history else None
        return found and {"value": found["asked"], "reached": found["left"] <= found["asked"], "why": None, **found}

    @property
    def epoch_time_ratio(self) -> float | None:
        """Median length of the last tenth of the epochs over the first one's; None for fewer than two epochs."""
        if len(self.epoch_seconds) < 2 or not self.epoch_seconds[0]:
            return None
        return statistics.median(self.epoch_seconds[-max(1, len(self.epoch_seconds) // 10) :]) / self.epoch_seconds[0]


@dataclass(frozen=True)
class ModelReport:
    """One model.

    Attributes:
        name: Short, and no other model's of the report.
        folder, trainer, dataset, configuration, plans: Where it lies and what it was trained with.
        classes: Foreground classes or regions, and the values that belong to them in a segmentation.
        patch_size: Voxels per axis.
        input_channels: Of its networks.
        dense_widths, dense_cost: What its plans describe; empty or None where that cannot be told.
        folds: By fold; none whose network could not be built.
        scores: Of the validation cases by fold, or of a folder under "predictions"; others are absent.
        differences: Against the baseline, case by case, for the attributes of `ClassScore` in `COMPARED` (means over
            classes); empty for the baseline, and without cases in common.
    """

    name: str
    folder: Path
    trainer: str
    dataset: str
    classes: dict[str, tuple[int, ...]]
    configuration: str
    plans: str
    patch_size: tuple[int, ...]
    input_channels: int
    dense_widths: dict[str, int]
    dense_cost: NetworkCost | None
    folds: dict[str, FoldReport]
    scores: dict[str, list[CaseScore]]
    differences: dict[str, PairedDifference] = field(default_factory=dict)

    @property
    def parts(self) -> list[str]:
        """The folds, and "predictions" where scores are of a folder of them."""
        return list(dict.fromkeys([*self.folds, *self.scores]))

    @property
    def compared_parts(self) -> list[str]:
        """Those that means and differences are over: fold "all", which is validated on what it was trained with, only
        where there is no other fold."""
        others = [part for part in self.parts if part != ALL]
        return others if any(part != PREDICTIONS for part in others) else self.parts

    @property
    def cases(self) -> dict[str, CaseScore]:
        """The scored cases of `compared_parts` by name."""
        return {score.case: score for part in self.compared_parts for score in self.scores.get(part, [])}


@dataclass(frozen=True)
class Report:
    """All models.

    Attributes:
        models: In the order given.
        baseline: Name of the model that the others are compared with.
        problems: What is missing, and which command makes it.
        tolerance_mm: Of the surface Dice.
        threads: CPU threads of PyTorch, which the timing used.
        left_out: Folders that were to be in the report and are not: models that cannot be read, and segmentations of
            which no case could be scored. The problems tell why.
    """

    models: list[ModelReport]
    baseline: str
    problems: list[str]
    tolerance_mm: float
    threads: int
    left_out: list[Path] = field(default_factory=list)

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
    folds: list[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Read models' folders, count, time, score and compare; nothing is trained and no folder is changed.

    Args:
        folders: nnU-Net's `Trainer__Plans__configuration` folders, or what `compress` or `export` wrote.
        baseline: One of them; None for the first that can be read.
        predictions: A folder of segmentations for each model, in the same order, to be scored in place of its
            `validation` folders (None: those all the same); needs `labels`.
        labels: Reference segmentations; None for those that nnU-Net validated with.
        tolerance_mm: Of the surface Dice.
        timing_seconds: About how long networks are timed, all together; 0 times none.
        checkpoint: File name of the checkpoints to read.
        folds: Of each model; None for all that are there.
        progress: Shows what is being done; None: nothing is shown.

    Raises:
        FileNotFoundError: No model can be read, or there is no such folder of segmentations.
        ValueError: The arguments do not fit each other.
    """
    if predictions and (len(predictions) != len(folders) or labels is None):
        raise ValueError(
            f"--predictions takes a folder, or the word validation, for each of the {len(folders)} models, in their "
            f"order, and --labels the references; got {len(predictions)} and {'no ' if labels is None else ''}--labels."
        )
    if baseline is not None and baseline.resolve() not in [folder.resolve() for folder in folders]:
        raise ValueError(f"--baseline {baseline} is none of the models; give one of them.")
    for flag, folder in (*(("--predictions", one) for one in predictions if one), ("--labels", labels)):
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"{flag} {folder} is no folder; give one of segmentations.")
    if not (0 <= tolerance_mm < math.inf and 0 <= timing_seconds < math.inf):
        raise ValueError(f"Tolerance ({tolerance_mm:g} mm) and timing ({timing_seconds:g} s) must be 0 or more.")

    progress = progress or Progress(quiet=True)
    problems: list[str] = []
    left_out: list[Path] = []
    models: list[ModelReport] = []
    networks: dict[tuple[str, str], nn.Module] = {}
    for name, folder, of_folder in zip(
        short_names(folders), folders, predictions or [None] * len(folders), strict=True
    ):
        progress.say(f"reading {folder}")
        try:
            if is_bundle(folder):
                bundle = open_bundle(folder)
                model, of_folds = _measure_bundle(name, bundle)
                networks.update({(name, fold): network for fold, network in of_folds.items()})
                scores = score_bundle(name, bundle, of_folder, labels, tolerance_mm, problems, progress)
                models.append(replace(model, scores=scores))
                if of_folder and not scores:
                    left_out.append(of_folder)
                continue
            trained = TrainedModel.read(folder, folds, checkpoint, problems.append, every_fold=True)
        except Exception as error:  # one bad folder must not stop the report of the others
            problems.append(f"{folder} is not in the report: {_words(error)}")
            left_out.append(folder)
            continue
        model, of_folds = _measure(name, trained, problems)
        networks.update({(name, fold): network for fold, network in of_folds.items()})
        scores = score_model(name, trained, of_folder, labels, tolerance_mm, problems, progress)
        models.append(replace(model, scores=scores))
        if not scores and (of_folder or was_validated(trained)):
            left_out.append(of_folder or trained.folder)
    if not models:
        raise FileNotFoundError(" ".join(problems))

    if timing_seconds and networks:
        _time(models, networks, timing_seconds, checkpoint, problems, progress)
    wanted = [model for model in models if baseline is None or model.folder.resolve() == baseline.resolve()]
    if not wanted:
        problems.append(f"The baseline {baseline} could not be read; {models[0].name} takes its place.")
    reference = (wanted or models)[0]
    for model in models:
        if model is not reference:
            model.differences.update(_differences(model, reference))
            problems += _unequal(model, reference)
    return Report(models, reference.name, problems, tolerance_mm, torch.get_num_threads(), left_out)


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the folders' paths, as many as distinguish them."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(len(part) for part in parts) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"A model was given twice: {', '.join(str(folder) for folder in folders)}.")


def common_values(model: ModelReport, baseline: ModelReport, metric: str) -> dict[str, tuple[float, float]]:
    """A case's mean of a metric in both models, over the classes where both have one; nan where no class has.

    So a class that one of the two missed is left out of both: a distance must not get better by what is not there.
    """
    found = {}
    for case in sorted(model.cases.keys() & baseline.cases.keys()):
        pairs = [
            (getattr(of_class, metric), getattr(baseline.cases[case].classes[name], metric))
            for name, of_class in model.cases[case].classes.items()
            if model.classes[name] == baseline.classes.get(name)
        ]
        defined = [pair for pair in pairs if not any(map(math.isnan, pair))]
        found[case] = tuple(statistics.fmean(values) for values in zip(*defined, strict=True)) or (math.nan, math.nan)
    return found


def _measure(name: str, trained: TrainedModel, problems: list[str]) -> tuple[ModelReport, dict[str, nn.Module]]:
    """All but scores and times; and the networks."""
    channels = trained.input_channels
    dense_widths, dense_cost = {}, None
    networks: dict[str, nn.Module] = {}
    folds: dict[str, FoldReport] = {}
    try:
        dense = trained.builder.build()
        dense_widths, dense_cost = _widths(dense), network_cost(dense, trained.patch_size, channels)
        if trained.builder.assumed:
            problems.append(f"{name}: {trained.builder.assumed}")
    except Exception as error:  # a network class of another package
        known = trained.plans["configurations"][trained.configuration].get("architecture", {})
        problems.append(
            f"{name}: the network of its plans, {known.get('network_class_name', 'an inherited one')}, cannot be "
            f"built, so the channels in the plans are not known: {_words(error)}"
        )
    for fold, checkpoint in trained.checkpoints.items():
        try:
            network = trained.network(fold)
            log = _log(checkpoint)
            history = _history(log)
            if log.get(SERIES) and not history:
                problems.append(
                    f"{name}, fold {fold}: this version cannot read its pruning history, so channels over the epochs "
                    f"are not drawn. It was made by another version: pip install -U nnunet-sauron."
                )
            cost = network_cost(network, trained.patch_size, channels)
            measured = FoldReport(cost, _widths(network), {}, _epoch_seconds(log), history)
            target = measured.target
            if target and not target["reached"]:
                why = target["why"] or "its training does not say why"
                problems.append(f"{name}, fold {fold}: {target_in_words([target])}: {why}.")
            folds[fold], networks[fold] = measured, network  # both or neither
        except Exception as error:  # its segmentations can be scored all the same
            problems.append(f"{name}, fold {fold}: its network is not in the report: {_words(error)}")
    model = ModelReport(
        name=name,
        folder=trained.folder,
        trainer=trained.trainer_names[0],
        dataset=trained.plans["dataset_name"],
        classes=trained.classes,
        configuration=trained.configuration,
        plans=trained.plans["plans_name"],
        patch_size=trained.patch_size,
        input_channels=channels,
        dense_widths=dense_widths,
        dense_cost=dense_cost,
        folds=folds,
        scores={},
    )
    if trained.left_out:
        advice = ""
        if trained.checkpoint_name == CHECKPOINT:
            unread = (fold for fold in folds_in(trained.folder) if fold not in trained.checkpoints)
            fold = next(unread, "FOLD")
            of_training = model.dataset, model.configuration, fold, model.trainer, model.plans
            advice = f" A training writes it at its end. To go on: {train_command(*of_training, '--c')}"
        problems.append(f"{name}: {' '.join(trained.left_out)}{advice}")
    return model, networks


def _measure_bundle(name: str, bundle: Bundle) -> tuple[ModelReport, dict[str, nn.Module]]:
    """As `_measure`, as far as a bundle tells."""
    networks, cost = engine_networks(bundle), bundle_cost(bundle)
    model = ModelReport(
        name=name,
        folder=bundle.path,
        trainer="bundle",
        dataset=bundle.manifest.dataset,
        classes=classes_of(bundle),
        configuration=bundle.manifest.stages[-1].configuration,
        plans=f"{bundle.manifest.precision}, {bundle.engine}",
        patch_size=bundle.manifest.stages[-1].patch_size,
        input_channels=bundle.manifest.stages[-1].input_channels,
        dense_widths={},
        dense_cost=None,
        folds={fold: FoldReport(cost, {}, {}, [], []) for fold in networks},
        scores={},
    )
    return model, networks


def target_in_words(targets: Sequence[Mapping]) -> str:
    """The targets of folds that came to the same, such as "target_macs=0.1 reached, 0.098 left", a mean over them."""
    name, value, reached = (targets[0][key] for key in ("name", "value", "reached"))
    words = {True: "reached", False: "missed", None: "not reached yet"}
    named = f"{name}={value:g}" if isinstance(value, (int, float)) else name
    return f"{named} {words[reached]}, {statistics.fmean(one['left'] for one in targets):.3g} left"


def _time(
    models: list[ModelReport],
    networks: dict[tuple[str, str], nn.Module],
    seconds: float,
    checkpoint: str,
    problems: list[str],
    progress: Progress,
) -> None:
    """Add times to all folds. Networks of the same shapes (all folds of an unpruned model) are timed once."""
    inputs_of = {model.name: (1, model.input_channels, *model.patch_size) for model in models}
    alike: dict[tuple, list[tuple[str, str]]] = {}
    for (name, fold), network in networks.items():
        of_weights = tuple(tuple(parameter.shape) for parameter in network.parameters())
        shapes = network.file if isinstance(network, InEngine) else of_weights
        alike.setdefault((type(network), inputs_of[name], shapes), []).append((name, fold))
    first = {keys[0]: networks[keys[0]] for keys in alike.values()}
    inputs = {key: inputs_of[key[0]] for key in first}
    folders = [model.folder for model in models if not is_bundle(model.folder)]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        share = seconds / len(devices)
        here = {key: one for key, one in first.items() if device == "cpu" or not isinstance(one, InEngine)}
        progress.say(f"timing {len(here)} networks on {device}, taking turns, for {share:.0f} s or four rounds")
        try:
            timed = time_networks(here, inputs, seconds=share, device=device)
        except Exception as error:  # too little memory on the GPU, or whatever somebody's network raises
            problems.append(f"Networks could not be timed on {device}: {_words(error)}")
            continue
        if any(one.interquartile_range > SCATTER * one.median for one in timed.values()):
            problems.append(
                f"Times on {device} scatter by more than {SCATTER:.0%}: this machine was busy. Time again when it is "
                f"not: {command('nnUNetv2_sauron', 'benchmark', '-m', *folders, *checkpoint_flag(checkpoint))}"
            )
        for keys in alike.values():
            for name, fold in keys if keys[0] in timed else ():
                next(model for model in models if model.name == name).folds[fold].timing[device] = timed[keys[0]]


def _widths(network: nn.Module) -> dict[str, int]:
    try:
        return channel_layout(network).widths
    except ValueError:  # not a network whose channels can be followed
        return {}


def _log(checkpoint: dict) -> Mapping[str, list]:
    """What its training logged; nothing after `compress`, which keeps the log of the network it was given."""
    return {} if COMPRESSION in checkpoint else logged(checkpoint)


def _history(log: Mapping[str, list]) -> list[dict]:
    """The pruning history; none where it is not in the form that this version writes."""
    history = log.get(SERIES, [])
    known = all(isinstance(epoch, Mapping) and {"widths", "state"} <= epoch.keys() for epoch in history)
    return history if known else []


def _epoch_seconds(logging: Mapping[str, list]) -> list[float]:
    starts, ends = (logging.get(f"epoch_{when}_timestamps", []) for when in ("start", "end"))
    return [end - start for start, end in zip(starts, ends, strict=False)]


def _differences(model: ModelReport, baseline: ModelReport) -> dict[str, PairedDifference]:
    if model.dataset != baseline.dataset:
        return {}
    found = {metric: common_values(model, baseline, metric) for metric in COMPARED}
    return {
        metric: paired_difference(*zip(*values.values(), strict=True)) for metric, values in found.items() if values
    }


def _unequal(model: ModelReport, baseline: ModelReport) -> list[str]:
    """What makes two models' means no fair comparison."""
    both = f"{model.name} and {baseline.name}"
    found = []
    if model.dataset != baseline.dataset:
        found.append(f"{both} are of different data sets, {model.dataset} and {baseline.dataset}: no case is compared.")
    elif model.scores and baseline.scores and model.cases.keys() != baseline.cases.keys():
        common = len(model.cases.keys() & baseline.cases.keys())
        found.append(
            f"{both}: the means are over different cases, {len(model.cases)} and {len(baseline.cases)}; the "
            f"differences are over the {common} in common."
        )
    other = [name for name, values in model.classes.items() if values != baseline.classes.get(name)]
    if other and model.dataset == baseline.dataset:
        found.append(f"{both}: {', '.join(other)} are not the same classes, and not in the differences.")
    if (model.configuration, model.patch_size) != (baseline.configuration, baseline.patch_size):
        found.append(
            f"{both}: their patches differ, so the cost of a patch is not the cost of an image; no ratios are given."
        )
    return found


def _words(error: BaseException) -> str:
    return f"{error}" if isinstance(error, (ValueError, OSError, RuntimeError)) else f"{type(error).__name__}: {error}"
