"""What a model's folder or bundle tells without its segmentations: cost, channels, training log and times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from nnunet_sauron_runtime import Bundle
from torch import nn

from ...console.errors import in_words
from ...console.progress import Progress
from ...model.checkpoints import CHECKPOINT, COMPRESSION, PRUNING, logged
from ...model.trained import TrainedModel, folds_in
from ...plugin.commands import train_command
from ...pruning import channel_layout
from ...pruning.timing import SCATTER, time_networks
from ..cost import network_cost
from .bundles import InEngine, classes_of, engine_networks
from .contents import FoldReport, ModelReport, target_in_words


def measure_model(name: str, trained: TrainedModel, problems: list[str]) -> tuple[ModelReport, dict[str, nn.Module]]:
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
            f"built, so the channels in the plans are not known: {in_words(error)}"
        )
    for fold, checkpoint in trained.checkpoints.items():
        try:
            network = trained.network(fold)
            log = _log(checkpoint)
            history = _history(log)
            if log.get(PRUNING) and not history:
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
            problems.append(f"{name}, fold {fold}: its network is not in the report: {in_words(error)}")
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
            go_on = train_command(*of_training, "--c", model_folder=trained.folder)
            advice = f" A training writes it at its end. To go on: {go_on}"
        problems.append(f"{name}: {' '.join(trained.left_out)}{advice}")
    return model, networks


def measure_bundle(name: str, bundle: Bundle, folds: Sequence[str] | None) -> tuple[ModelReport, dict[str, nn.Module]]:
    """As `measure_model`, as far as a bundle tells, of these folds or (None) all."""
    networks = engine_networks(bundle, folds)
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
        folds={fold: FoldReport(cost, {}, {}, [], []) for fold, (_, cost) in networks.items()},
        scores={},
    )
    return model, {fold: network for fold, (network, _) in networks.items()}


class NetworksToTime:
    """Networks of a report's models that are to be timed: of those of the same shapes (all folds of an unpruned model)
    the first, so that no others stay in memory."""

    def __init__(self) -> None:
        self._networks: dict[tuple, nn.Module] = {}
        self._folds: dict[tuple, list[FoldReport]] = {}

    def add(self, model: ModelReport, networks: Mapping[str, nn.Module]) -> None:
        """A model's networks by fold."""
        for fold, network in networks.items():
            of_weights = tuple(tuple(parameter.shape) for parameter in network.parameters())
            shapes = network.file if isinstance(network, InEngine) else of_weights
            key = type(network), (1, model.input_channels, *model.patch_size), shapes
            self._networks.setdefault(key, network)
            self._folds.setdefault(key, []).append(model.folds[fold])

    def time(self, seconds: float, again: str, problems: list[str], progress: Progress) -> None:
        """Give all folds their times, for about so many seconds on all devices together.

        Args:
            seconds: All together.
            again: The command that times once more.
            problems: What went wrong is added to these.
            progress: Shows what is being done.
        """
        devices = ["cpu"]
        if torch.cuda.is_available() and not all(isinstance(one, InEngine) for one in self._networks.values()):
            devices.append("cuda")
        for device in devices if self._networks else ():
            share = seconds / len(devices)
            here = {key: one for key, one in self._networks.items() if device == "cpu" or not isinstance(one, InEngine)}
            progress.say(f"timing {len(here)} networks on {device}, taking turns, for {share:.0f} s or four rounds")
            try:
                timed = time_networks(here, {key: key[1] for key in here}, seconds=share, device=device)
            except Exception as error:  # too little memory on the GPU, or whatever somebody's network raises
                problems.append(f"Networks could not be timed on {device}: {in_words(error)}")
                continue
            if any(one.scatters for one in timed.values()):
                problems.append(
                    f"Times on {device} scatter by more than {SCATTER:.0%}: this machine was busy. Time again when it "
                    f"is not: {again}"
                )
            for key, timing in timed.items():
                for fold in self._folds[key]:
                    fold.timing[device] = timing


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
    history = log.get(PRUNING, [])
    known = all(isinstance(epoch, Mapping) and {"widths", "state"} <= epoch.keys() for epoch in history)
    return history if known else []


def _epoch_seconds(logging: Mapping[str, list]) -> list[float]:
    starts, ends = (logging.get(f"epoch_{when}_timestamps", []) for when in ("start", "end"))
    return [end - start for start, end in zip(starts, ends, strict=False)]
