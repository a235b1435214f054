"""The network that a trainer builds, which need not be the one that its plans describe.

A trainer of nnU-Net may change anything in `build_network_architecture`: the activation, a slope, a norm's eps, the
order of modules. The names and shapes of the weights can be the same all the same, so that they load into the plans'
network without an error, and what they compute there is something else.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import io
import warnings

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from ..plugin.installation import TRAINERS, trainer_names
from ..pruning import accept_pruned_weights
from ..pruning.channels import is_prunable
from .architecture import network_of_plans
from .checkpoints import trained_with
from .labels import other_classes

BUILT_BY = "network_built_by"
"""Of a configuration in the plans of a compressed model: the trainer whose network it is, where not the plans' own."""

_PLAIN_VALUES = (bool, int, float, str, bytes, tuple, list, type, type(None))


class NetworkBuilder:
    """Builds a model's network as its trainer does.

    Args:
        trainer_name: The trainer's class.
        plans: What it was trained with.
        configuration: The configuration's name.
        dataset_json: For input channels and classes.

    Attributes:
        trainer_name: Whose network it is: for a compressed model that of the model that was compressed.
        differs: Whether the network is another one than the plans describe.
        assumed: Where the trainer's class could not be looked up: a sentence that says so, and why. The network is
            taken to be the plans' then. Else None.

    Raises:
        ValueError: The plans name a trainer that cannot be found, or the trainer builds no network from these plans.
    """

    def __init__(self, trainer_name: str, plans: PlansManager, configuration: str, dataset_json: dict):
        named_in_plans = plans.get_configuration(configuration).configuration.get(BUILT_BY)
        self.trainer_name = named_in_plans or trainer_name
        self._arguments = plans, configuration, dataset_json
        self.assumed: str | None = None
        self._not_found = ""
        self.differs = False
        self._trainer: type[nnUNetTrainer] | None = None
        try:
            trainer = find_trainer(self.trainer_name)
        except LookupError as error:
            if named_in_plans:
                raise ValueError(str(error)) from error
            self._not_found = f" {error}"
            self.assumed = (
                f"Assumed, not known: that the network is the one that its plans describe. {error} Names and shapes of "
                f"all weights fit; an activation or a norm's eps they cannot tell."
            )
            return
        if not builds_what_plans_say(trainer):
            self._trainer = trainer
            built = _description(self.build())
            try:
                self.differs = built != _description(network_of_plans(*self._arguments))
            except Exception:  # plans may name a class that is not installed, which this trainer does not need
                self.differs = True

    def build(self) -> nn.Module:
        """A network on the CPU, not trained, without deep supervision; pruned weights load into one that we can prune.

        Raises:
            ValueError: The trainer cannot build it.
        """
        if self._trainer is None:
            try:
                network = network_of_plans(*self._arguments, device="cpu")
            except Exception as error:  # the class that the plans name may raise anything
                raise ValueError(
                    f"The network that the plans describe cannot be built: {type(error).__name__}: {error}"
                ) from error
        else:
            plans, configuration, dataset_json = self._arguments
            manager = plans.get_configuration(configuration)
            network = network_of_trainer(
                self._trainer,
                plans,
                manager,
                determine_num_input_channels(plans, manager, dataset_json),
                plans.get_label_manager(dataset_json).num_segmentation_heads,
            )
        if is_prunable(network):
            with contextlib.suppress(ValueError):  # a module in it that cannot be followed: it takes its own weights
                accept_pruned_weights(network)
        return network

    def load(self, checkpoint: dict, path) -> nn.Module:
        """The network with a checkpoint's weights, in evaluation mode.

        Args:
            checkpoint: nnU-Net's.
            path: Where it was read from, for the error.

        Raises:
            ValueError: Its weights are of another architecture, or not finite.
        """
        network = self.build()
        try:
            network.load_state_dict(checkpoint["network_weights"])
        except RuntimeError as error:
            if said := other_classes(checkpoint, self._arguments[2]):
                raise ValueError(f"{path} {said}") from error
            builder = "its plans describe" if self._trainer is None else f"its trainer {self.trainer_name} builds"
            raise ValueError(
                f"{path} is of another architecture than {builder}, so its network is not known.{self._not_found} "
                f"{str(error)[:300]}"
            ) from error
        broken = [name for name, tensor in network.state_dict().items() if not tensor.isfinite().all()]
        if broken:
            raise ValueError(
                f"{path} has weights that are nan or infinite ({len(broken)} tensors, the first is {broken[0]}): its "
                f"training failed, and so would any prediction. Take another checkpoint, or train again."
            )
        return network.eval()


def builder_of(checkpoint: dict, path) -> NetworkBuilder | None:
    """The builder of a checkpoint's network; None where the checkpoint does not name its plans and trainer.

    Args:
        checkpoint: nnU-Net's, or one that `compress` wrote.
        path: Where it was read from, for errors.

    Raises:
        ValueError: As `NetworkBuilder`.
    """
    if "trainer_name" not in checkpoint or "dataset_json" not in checkpoint.get("init_args", {}):
        return None
    return NetworkBuilder(checkpoint["trainer_name"], *trained_with(checkpoint, path))


def find_trainer(name: str) -> type[nnUNetTrainer]:
    """A trainer's class: ours, or where nnU-Net looks for it, its own folder and those in nnUNet_extTrainer.

    Raises:
        LookupError: It is not there, or looking for it failed; the message says what to do.
    """
    if name in trainer_names():  # also where nnU-Net has not been shown them
        return getattr(importlib.import_module(TRAINERS.module), name)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net prints every folder that it searches
            return recursive_find_trainer_class_by_name(name)
    except (Exception, SystemExit) as error:  # whatever a module of somebody else's does when it is imported
        said = "" if isinstance(error, RuntimeError) else f" ({type(error).__name__}: {error})"
        raise LookupError(
            f"nnU-Net does not find its trainer {name}{said}: name the folder of its file in nnUNet_extTrainer."
        ) from error


def network_of_trainer(
    trainer: type[nnUNetTrainer],
    plans: PlansManager,
    configuration: ConfigurationManager,
    input_channels: int,
    outputs: int,
    *,
    deep_supervision: bool = False,
) -> nn.Module:
    """What the trainer's class builds, on the CPU; random numbers and the plans stay as they are.

    Args:
        trainer: The class.
        plans, configuration: nnU-Net's managers.
        input_channels: Of the network.
        outputs: Classes or regions.
        deep_supervision: Whether it gives outputs of low resolution as well.

    Raises:
        ValueError: The trainer's own code fails.
    """
    # Copied: many trainers write their activation into the very dictionary that they are given.
    plans, manager = copy.deepcopy((plans, configuration))
    if "plans_manager" in inspect.signature(trainer.build_network_architecture).parameters:
        described = plans, manager
    else:  # the signature of older versions of nnU-Net, which it still takes
        described = (
            manager.network_arch_class_name,
            manager.network_arch_init_kwargs,
            manager.network_arch_init_kwargs_req_import,
        )
    try:
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trainer.build_network_architecture(
                *described, input_channels, outputs, enable_deep_supervision=deep_supervision
            )
    except Exception as error:  # code of other packages may raise anything
        raise ValueError(
            f"The trainer {trainer.__name__} cannot build its network, for nnU-Net's prediction either: "
            f"{type(error).__name__}: {error}"
        ) from error


def take_builder(trainer: nnUNetTrainer, checkpoint: dict, builder: NetworkBuilder | None = None) -> None:
    """Let a trainer's plans name whose network it builds, before it is initialised.

    Args:
        trainer: The trainer.
        checkpoint: One whose plans may name it.
        builder: Who builds that checkpoint's network, where it may be a trainer that its plans do not name.
    """
    configurations = checkpoint.get("init_args", {}).get("plans", {}).get("configurations", {})
    name = configurations.get(trainer.configuration_name, {}).get(BUILT_BY)
    if builder is not None and builder.differs:
        name = builder.trainer_name
    if name is not None:
        # Each holds a copy of its own, and the first of them goes into checkpoints and plans.json.
        trainer.plans_manager.plans["configurations"][trainer.configuration_name][BUILT_BY] = name
        trainer.configuration_manager.configuration[BUILT_BY] = name


def builds_what_plans_say(trainer: type[nnUNetTrainer]) -> bool:
    """Whether it leaves the building to nnU-Net, as most do, which change losses, schedules or augmentation."""
    return inspect.unwrap(trainer.build_network_architecture) is nnUNetTrainer.build_network_architecture


def _description(network: nn.Module) -> list:
    """All that makes two networks compute the same of the same weights: modules, their numbers, and shapes."""
    found = []
    for name, module in network.named_modules():
        numbers = {
            key: repr(value)
            for key, value in vars(module).items()
            if isinstance(value, _PLAIN_VALUES) and key not in ("training", "deep_supervision")
        }
        replaced = sorted(key for key, value in vars(module).items() if inspect.isroutine(value))
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        found.append((name, type(module), numbers, replaced, hooks))
    return [found, {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}]
