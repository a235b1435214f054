"""What a method observes in an epoch's training steps: a number per channel, comparable between layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .ranks import summed_over_ranks


class Observed:
    """Sums over batches of a number per channel of every layer, in float32.

    A batch in which one number is not finite counts in no layer: under a gradient scaler some overflow, and layers are
    compared with each other.

    Args:
        widths: Channels of each layer.
        device: Of the network.
    """

    def __init__(self, widths: Mapping[str, int], device: torch.device):
        self._widths = dict(widths)
        self._batch: dict[str, torch.Tensor] = {}
        # One vector, the number of batches last: nothing here waits for the device.
        self._sums = torch.zeros(sum(widths.values()) + 1, device=device)

    @property
    def sums(self) -> dict[str, torch.Tensor]:
        """By layer, (C,)."""
        return dict(zip(self._widths, self._sums[:-1].split(list(self._widths.values())), strict=True))

    @property
    def batches(self) -> int:
        """How many batches counted, on all DDP ranks after `share`."""
        return round(self._sums[-1].item())

    def add(self, unit: str, numbers: torch.Tensor) -> None:
        """Observe a layer's numbers (C,) in this batch; of several places they are added up."""
        numbers = numbers.detach().float()
        self._batch[unit] = self._batch[unit] + numbers if unit in self._batch else numbers

    def drop_batch(self) -> None:
        """Forget what was observed since the last batch that ended."""
        self._batch.clear()

    def end_batch(self, scale: float = 1.0) -> None:
        """Count the batch, its numbers divided by `scale`, unless one of them is not finite."""
        if self._widths.keys() - self._batch.keys():
            return self.drop_batch()
        batch = torch.cat([*(self._batch[name] for name in self._widths), self._sums.new_full((1,), scale)]) / scale
        self._sums += torch.where(batch.isfinite().all(), batch, 0)
        return self.drop_batch()

    def share(self) -> None:
        """Add up what all DDP ranks observed."""
        summed_over_ranks(self._sums)
