"""nnU-Net's training with a network that takes the widths of the checkpoint it is given."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..model.checkpoints import MIRRORING, plain, trained_with
from ..pruning import accept_pruned_weights, channel_layout, resize
from .base import BaseTrainer


def mirroring_of(checkpoint: dict) -> dict:
    """The axes that a model was mirrored along, under nnU-Net's key; empty where its checkpoint has none."""
    return {key: value for key, value in checkpoint.items() if key == MIRRORING}


class ResizingTrainer(BaseTrainer):
    """Builds nnU-Net's network so that pruned weights load into it, in training and in prediction.

    Attributes:
        mirroring: Of the model that a training starts from, as `mirroring_of` gives it. It replaces nnU-Net's own,
            since left and right may be classes.
    """

    mirroring: Mapping = MappingProxyType({})

    def _prepare(self, plans: dict, configuration: str, fold: int | str, dataset_json: dict) -> None:
        _check_building(type(self))

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):  # noqa: N802  (nnU-Net's)
        *others, mirror_axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if self.mirroring:
            self.inference_allowed_mirroring_axes = mirror_axes = self.mirroring[MIRRORING]
        return *others, mirror_axes

    @staticmethod
    @functools.wraps(nnUNetTrainer.build_network_architecture)  # its signature differs between versions of nnU-Net
    def build_network_architecture(*args, **kwargs) -> nn.Module:
        return accept_pruned_weights(nnUNetTrainer.build_network_architecture(*args, **kwargs))

    def take_widths(self, widths: dict[str, int]) -> None:
        """Give the network other widths and a new optimiser; a load must follow, since weights are lost."""
        if widths != channel_layout(self.bare_network).widths:
            bare = self.bare_network
            self.unwrap()
            resize(bare, widths)
            self.optimizer, self.lr_scheduler = self.configure_optimizers()
            self.wrap()
            torch._dynamo.reset()

    def initialize(self) -> None:
        super().initialize()
        if not self.enable_deep_supervision:
            self.unwrap()
            self.wrap()

    def check_plans(self, checkpoint: dict, path: str) -> None:
        """Refuse to continue where the plans describe another network now; warn of another patch or spacing.

        nnU-Net stops at weights that do not fit, but a network that takes the checkpoint's widths would accept them.

        Raises:
            ValueError: The network differs.
        """
        if not {"plans", "configuration"} <= checkpoint.get("init_args", {}).keys():
            return
        before, configuration, _ = trained_with(checkpoint, path)
        then, now = before.get_configuration(configuration).configuration, self.configuration_manager.configuration
        if differ := _differences(then["architecture"]["arch_kwargs"], now["architecture"]["arch_kwargs"]):
            raise ValueError(
                f"{path} was trained with plans {before.plans_name} whose network had {', '.join(differ)}. Restore "
                f"these plans (a copy is plans.json in the model's folder), or begin anew without --c."
            )
        if differ := _differences(then, now, ("patch_size", "batch_size", "spacing", "normalization_schemes")):
            self.print_to_log_file(
                f"WARNING: {path} was trained with plans {before.plans_name} that had {', '.join(differ)}. If that is "
                f"not meant, restore these plans (a copy is plans.json in the model's folder)."
            )

    def unwrap(self) -> None:
        """Take the network out of DDP's wrapper, before its parameters are replaced."""
        if self.is_ddp:
            self.network = self.network.module

    def wrap(self) -> None:
        """Wrap the network for DDP, whose old reducer holds the old parameters: ranks would drift apart in silence."""
        if self.is_ddp:
            if not self.enable_deep_supervision:  # DDP would wait for gradients of the heads that no loss sees
                for head in self.bare_network.decoder.seg_layers[:-1]:
                    head.requires_grad_(False)
            devices = [self.local_rank] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.network, device_ids=devices)


def _differences(then: Mapping, now: Mapping, names: Iterable[str] = ()) -> list[str]:
    """In words, of these names or of all."""
    pairs = ((name, plain(then.get(name)), plain(now.get(name))) for name in names or {**then, **now})
    return [f"{name}={before} (now {after})" for name, before, after in pairs if before != after]


def _check_building(trainer_class: type) -> None:
    """Raise ValueError where another base than nnU-Net's own trainer builds a network, as its variant with batch norm.

    It would be passed over or, as the first of the bases, build a network that no pruned weights can be loaded into.
    A subclass that builds its own network from ours decides for itself.
    """
    builders = [base for base in trainer_class.__mro__ if "build_network_architecture" in vars(base)]
    if issubclass(builders[0], ResizingTrainer) and not builders[0].__module__.startswith("nnunet_sauron."):
        return
    for base in builders:
        if base is not nnUNetTrainer and not issubclass(base, ResizingTrainer):
            raise ValueError(
                f"{trainer_class.__name__} has the base {base.__name__}, which builds a network of its own, and that "
                f"cannot be combined. Change the plans' architecture, or let {trainer_class.__name__} have a "
                f"build_network_architecture that calls its other base's with changed arguments."
            )
