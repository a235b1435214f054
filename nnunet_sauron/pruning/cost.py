"""What a network costs: parameters and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(network: nn.Module) -> int:
    """Number of trainable and fixed parameters, each counted once."""
    return sum(p.numel() for p in network.parameters())


def count_macs(network: nn.Module, patch_size: Sequence[int], input_channels: int) -> int:
    """Multiply-accumulates of convolutions and transposed convolutions for one patch, as in prediction.

    Counted by PyTorch's own counter on the meta device (half of its FLOPs), with deep supervision off and without
    running anything on the real weights. Norms, activations and biases are not counted, as is usual.

    Args:
        network: A network of nnU-Net, unwrapped.
        patch_size: Voxels per axis.
        input_channels: Channels of the network's input.
    """
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    tensors = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    patch = torch.empty((1, input_channels, *patch_size), device="meta")
    decoder = getattr(network, "decoder", None)
    supervised = getattr(decoder, "deep_supervision", None)
    was_training = network.training
    counter = FlopCounterMode(display=False)
    try:
        network.eval()
        if supervised is not None:
            decoder.deep_supervision = False
        with torch.no_grad(), counter:
            # tie_weights: nnU-Net holds its modules under several names, and with it each would be swapped once per
            # name, the last time for the meta tensor itself: that is what the network would be left with.
            functional_call(network, tensors, (patch,), tie_weights=False)
    finally:
        network.train(was_training)
        if supervised is not None:
            decoder.deep_supervision = supervised
    return counter.get_total_flops() // 2
