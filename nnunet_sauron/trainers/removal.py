"""The removal of channels before an epoch, in every part of a training: network, optimiser, DDP, compiled graphs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from nnunetv2.utilities.helpers import empty_cache
from torch import nn

from ..pruning import channel_layout, merge_channels, position_weights, remove_channels
from .batches import training_batches

if TYPE_CHECKING:
    from .pruning import PruningTrainer


def remove(trainer: PruningTrainer, keep: dict[str, list[int]]) -> None:
    """Remove all but the channels to keep of these units; merged into those, if the settings say so."""
    network = trainer.bare_network
    trainer.unwrap()
    trainer.method.before_removal(keep)
    if trainer.pruning_settings.merge:
        _merge(trainer, network, keep)
    widths = channel_layout(network).widths
    not_merged = {name: kept for name, kept in keep.items() if len(kept) < widths[name]}
    remove_channels(network, not_merged, trainer.optimizer)
    trainer.wrap()
    torch._dynamo.reset()  # past 8 recompilations torch.compile would fall back to eager for good
    empty_cache(trainer.device)


def _merge(trainer: PruningTrainer, network: nn.Module, keep: dict[str, list[int]]) -> None:
    """Merge the removed channels as far as a fit succeeds; some units may stay as they are.

    Every rank fits on batches of its own; DDP's new wrapper then copies rank 0's weights to all.
    """
    if trainer.device.type == "mps":
        trainer.print_to_log_file("WARNING: channels are dropped, not merged: a fit needs float64, which MPS lacks")
        return
    widths = channel_layout(network).widths
    count = trainer.planned.merge_batches(trainer.pruning_settings, widths, trainer.batch_size)
    batches = list(training_batches(trainer, count))
    if not batches:
        trainer.print_to_log_file("WARNING: channels are dropped, not merged: there is no batch to fit on")
        return
    begun = time.perf_counter()
    try:
        weights = position_weights(network, batches, regions=trainer.label_manager.has_regions)
        merge_channels(network, keep, batches, weights=weights, optimizer=trainer.optimizer)
    except (RuntimeError, MemoryError) as error:  # out of memory, in its several forms, or the linear algebra's
        trainer.print_to_log_file(f"WARNING: channels are dropped, not merged, since the fit failed: {error}")
        return
    seconds = time.perf_counter() - begun
    trainer.print_to_log_file(
        f"Merged the removed channels (least squares on {len(batches)} batches, {seconds:.1f} s)."
    )
