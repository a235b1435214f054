"""Which channels of a network must shrink together, and the layers that make and read them.

A symbolic pass follows the network's forward with channel labels in place of tensors. A label ("segment") stands for
the output channels of one producer: a residual add joins the segments of its two inputs, a concatenation puts segments
behind each other, and segmentation heads and the network's input are fixed. The pass reads only modules and widths: no
example input, no tracing, a few milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd

KNOWN_NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet")
# Subclasses of them in the planning room that forward as they do; by name, since this room imports nothing of it.
PRUNED_NETWORKS = ("PrunedPlainConvUNet", "PrunedResidualEncoderUNet")


@dataclass(frozen=True)
class ChannelUnit:
    """Channels that can only be removed together.

    Attributes:
        name: Name of the module that makes the unit's first feature maps, for example `encoder.stages.0.0.convs.0`.
        width: Number of channels.
        producers: Names of the convolutions whose output channels these are; more than one after a residual add.
        feature_maps: Names of the modules whose outputs are the unit's feature maps (B, `width`, *spatial): the whole
            block (convolution, norm, nonlinearity; a residual block after its add), or a bare transposed convolution.
        transposed: Whether a transposed convolution makes them.
    """

    name: str
    width: int
    producers: tuple[str, ...]
    feature_maps: tuple[str, ...]
    transposed: bool


Segment = tuple["str | None", int]
"""A unit's name (None: channels that are fixed) and the number of channels."""


@dataclass(frozen=True)
class ChannelAxis:
    """One axis of one tensor that counts channels.

    Attributes:
        module: The module's name in the network.
        tensor: Name of the parameter or buffer in that module.
        dim: The axis.
        segments: What lies along it, in order; several after a concatenation.
        reads: True for the input side of a convolution; False for its output side and for norms, which make channels.
        places: For each segment, the module whose output lies there (one of its unit's `feature_maps`), or None.
    """

    module: str
    tensor: str
    dim: int
    segments: tuple[Segment, ...]
    reads: bool
    places: tuple[str | None, ...]


@dataclass(frozen=True)
class ChannelAttribute:
    """A plain attribute that repeats a channel count: an int, or a list with one of them per stage (`index`)."""

    module: str
    attribute: str
    segments: tuple[Segment, ...]
    index: int | None = None


@dataclass(frozen=True)
class ChannelLayout:
    """Every channel unit of a network, in the data's order, and every place where their channels are counted."""

    units: tuple[ChannelUnit, ...]
    axes: tuple[ChannelAxis, ...]
    attributes: tuple[ChannelAttribute, ...]

    @property
    def widths(self) -> dict[str, int]:
        """Channels of each unit, by its name."""
        return {unit.name: unit.width for unit in self.units}


def channel_layout(network: nn.Module) -> ChannelLayout:
    """Find the channel units of a network.

    Args:
        network: A `PlainConvUNet` or `ResidualEncoderUNet` of `dynamic_network_architectures`, 2D or 3D.

    Raises:
        ValueError: The network, or a module in it, is of a class whose channels this pass cannot follow.
    """
    check_prunable(f"{type(network).__module__}.{type(network).__qualname__}")
    return _Pass(network).run()


def is_prunable(network: nn.Module) -> bool:
    """Whether the network is of a class that `channel_layout` knows."""
    return type(network).__name__ in KNOWN_NETWORKS + PRUNED_NETWORKS


def check_prunable(network_class: str) -> None:
    """Raise ValueError, with the list of what can be pruned, unless a class of this (qualified) name is known."""
    if network_class.rpartition(".")[2] not in KNOWN_NETWORKS + PRUNED_NETWORKS:
        raise ValueError(
            f"A network of class {network_class} cannot be pruned: known are {' and '.join(KNOWN_NETWORKS)} "
            f"(dynamic_network_architectures.architectures.unet). Choose plans that name one of them, for example "
            f"nnUNetPlans or nnUNetResEncUNetMPlans."
        )


class _Segment:
    """One convolution's output channels; `joined` leads to the segment they were added to."""

    def __init__(self, width: int, fixed: bool, order: int):
        self.width, self.fixed, self.order = width, fixed, order
        self.producers: list[str] = []
        self.feature_maps: list[str] = []
        self.joined: _Segment | None = None

    def root(self) -> _Segment:
        return self if self.joined is None else self.joined.root()


_Channels = list[_Segment]


def _place(segment: _Segment) -> str | None:
    return segment.feature_maps[0] if segment.feature_maps else None


class _Pass:
    """Mirrors the forward of nnU-Net's U-Nets on lists of segments."""

    def __init__(self, network: nn.Module):
        self.network = network
        self.names = {module: name for name, module in network.named_modules()}
        self.segments: list[_Segment] = []
        self.axes: list[tuple[str, str, int, _Channels, bool]] = []
        self.attributes: list[tuple[str, str, _Channels, int | None]] = []

    def run(self) -> ChannelLayout:
        first = next(m for m in self.network.modules() if isinstance(m, _ConvNd))
        skips = self.encoder(self.network.encoder, [self.new_segment(first.in_channels, fixed=True)])
        self.decoder(self.network.decoder, skips)
        self.check_nothing_else_computes()
        roots = sorted({s.root() for s in self.segments if not s.root().fixed}, key=lambda s: s.order)
        units = {}
        for root in roots:
            members = [s for s in self.segments if s.root() is root]
            maps = tuple(name for s in members for name in s.feature_maps)
            producers = tuple(name for s in members for name in s.producers)
            transposed = any(isinstance(self.network.get_submodule(name), _ConvTransposeNd) for name in producers)
            units[root] = ChannelUnit(maps[0], root.width, producers, maps, transposed)

        def resolve(channels: _Channels) -> tuple[Segment, ...]:
            return tuple((units[s.root()].name if s.root() in units else None, s.width) for s in channels)

        return ChannelLayout(
            tuple(units.values()),
            tuple(ChannelAxis(m, t, d, resolve(c), r, tuple(map(_place, c))) for m, t, d, c, r in self.axes),
            tuple(ChannelAttribute(m, a, resolve(c), i) for m, a, c, i in self.attributes),
        )

    def check_nothing_else_computes(self) -> None:
        """Refuse modules that were added to a network, or replaced in it: this pass does not mirror their forward."""
        modules = {name: module for module, name in self.names.items()}
        followed = {id(getattr(modules[name], tensor)) for name, tensor, *_ in self.axes}
        for module, name in self.names.items():
            if "forward" in vars(module):
                raise ValueError(f"Module '{name}' has a forward of its own, so its channels cannot be followed.")
            known = _leaves_channels_apart(module) or all(id(p) in followed for p in module.parameters(recurse=False))
            if not known:
                raise ValueError(
                    f"Module '{name}' of class {type(module).__name__} does not belong to this kind of network: its "
                    f"effect on channels is not known, so they cannot be pruned."
                )

    def new_segment(self, width: int, fixed: bool = False) -> _Segment:
        self.segments.append(_Segment(width, fixed, len(self.segments)))
        return self.segments[-1]

    def join(self, a: _Channels, b: _Channels) -> _Channels:
        """The channels of a + b."""
        if [s.width for s in a] != [s.width for s in b]:
            raise ValueError(f"A residual add of unequal channels: {[s.width for s in a]} and {[s.width for s in b]}.")
        for one, other in zip((s.root() for s in a), (s.root() for s in b), strict=True):
            if one is not other:
                early, late = sorted((one, other), key=lambda s: s.order)
                late.joined = early
                early.fixed = early.fixed or late.fixed
        return b

    def axis(self, module: nn.Module, tensor: str, dim: int, channels: _Channels, reads: bool = False) -> None:
        if getattr(module, tensor, None) is not None:
            self.axes.append((self.names[module], tensor, dim, channels, reads))

    def attribute(self, module: nn.Module, name: str, channels: _Channels, index: int | None = None) -> None:
        self.attributes.append((self.names[module], name, channels, index))

    # What each kind of module does to channels, outermost first.

    def encoder(self, encoder: nn.Module, channels: _Channels) -> list[_Channels]:
        if getattr(encoder, "stem", None) is not None:
            channels = self.follow(encoder.stem, channels)
        skips = []
        for i, stage in enumerate(encoder.stages):
            channels = self.follow(stage, channels)
            self.attribute(encoder, "output_channels", channels, index=i)
            skips.append(channels)
        return skips

    def decoder(self, decoder: nn.Module, skips: list[_Channels]) -> None:
        channels = skips[-1]
        for i, (transpconv, stage, head) in enumerate(
            zip(decoder.transpconvs, decoder.stages, decoder.seg_layers, strict=True)
        ):
            channels = self.convolution(transpconv, channels)
            channels[0].feature_maps.append(self.names[transpconv])
            channels = self.follow(stage, channels + skips[-(i + 2)])
            self.convolution(head, channels, fixed=True)

    def follow(self, module: nn.Module, channels: _Channels) -> _Channels:
        """The channels of a module's output, given those of its input."""
        if isinstance(module, nn.Sequential):
            for child in module:
                channels = self.follow(child, channels)
            return channels
        for kinds, rule in _RULES.items():
            if type(module).__name__ in kinds:
                return rule(self, module, channels)
        if _leaves_channels_apart(module):
            return channels
        raise ValueError(
            f"Module '{self.names[module]}' of class {type(module).__name__} cannot be pruned: known are convolutions "
            f"without groups, instance and batch norm, elementwise activations, dropout, pooling, and the plain and "
            f"residual blocks of dynamic_network_architectures. Choose plans without it."
        )

    def convolution(self, conv: nn.Module, channels: _Channels, fixed: bool = False) -> _Channels:
        if conv.groups != 1:
            raise ValueError(f"'{self.names[conv]}' is a convolution with {conv.groups} groups; only 1 can be pruned.")
        out = [self.new_segment(conv.out_channels, fixed)]
        out[0].producers.append(self.names[conv])
        transposed = isinstance(conv, _ConvTransposeNd)
        self.axis(conv, "weight", 1 if transposed else 0, out)
        self.axis(conv, "weight", 0 if transposed else 1, channels, reads=True)
        self.axis(conv, "bias", 0, out)
        self.attribute(conv, "in_channels", channels)
        self.attribute(conv, "out_channels", out)
        return out

    def norm(self, norm: nn.Module, channels: _Channels) -> None:
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            self.axis(norm, tensor, 0, channels)
        self.attribute(norm, "num_features", channels)

    def conv_block(self, block: nn.Module, channels: _Channels) -> _Channels:
        """ConvDropoutNormReLU: whatever order its modules have, channels change only in the convolution."""
        out = self.inner_conv_block(block, channels)
        out[0].feature_maps.append(self.names[block])
        return out

    def inner_conv_block(self, block: nn.Module, channels: _Channels) -> _Channels:
        """A block without feature maps of its own: its output is added to another's before anything reads it."""
        self.attribute(block, "input_channels", channels)
        for module in block.all_modules:
            if isinstance(module, _ConvNd):
                channels = self.convolution(module, channels)
            elif isinstance(module, _NormBase):
                self.norm(module, channels)
            else:
                channels = self.follow(module, channels)
        self.attribute(block, "output_channels", channels)
        return channels

    def stacked_blocks(self, stack: nn.Module, channels: _Channels) -> _Channels:
        for block in stack.convs if hasattr(stack, "convs") else stack.blocks:
            channels = self.follow(block, channels)
        self.attribute(stack, "output_channels", channels)
        return channels

    def residual_block(self, block: nn.Module, channels: _Channels) -> _Channels:
        if block.apply_se:
            raise ValueError(f"'{self.names[block]}' has squeeze-and-excitation, which cannot be pruned.")
        self.attribute(block, "input_channels", channels)
        residual = channels
        if isinstance(block.skip, nn.Module):
            for module in block.skip:
                is_projection = type(module).__name__ == "ConvDropoutNormReLU"
                residual = (self.inner_conv_block if is_projection else self.follow)(module, residual)
        *inner, last = [m for m in (block.conv1, block.conv2, getattr(block, "conv3", None)) if m is not None]
        for conv in inner:
            channels = self.conv_block(conv, channels)
        if hasattr(block, "bottleneck_channels"):
            self.attribute(block, "bottleneck_channels", channels)
        out = self.join(residual, self.inner_conv_block(last, channels))
        out[0].feature_maps.append(self.names[block])
        self.attribute(block, "output_channels", out)
        return out


_Rule = Callable[[_Pass, nn.Module, _Channels], _Channels]
_RULES: dict[tuple[str, ...], _Rule] = {
    # By class name, not by import: this room knows PyTorch only.
    ("ConvDropoutNormReLU",): _Pass.conv_block,
    ("StackedConvBlocks", "StackedResidualBlocks"): _Pass.stacked_blocks,
    ("BasicBlockD", "BottleneckD"): _Pass.residual_block,
}


def _leaves_channels_apart(module: nn.Module) -> bool:
    """True for activations, dropout and pooling that treat every channel alike and keep their number."""
    kind = type(module)
    if isinstance(module, (_DropoutNd, nn.Identity)) or kind.__name__ == "DropPath":
        return True
    if kind.__module__ == "torch.nn.modules.pooling":
        return True
    mixes_channels = kind.__name__ in ("Softmax", "LogSoftmax", "Softmax2d", "Softmin", "GLU", "MultiheadAttention")
    if kind.__module__ == "torch.nn.modules.activation" and not mixes_channels:
        return all(p.numel() == 1 for p in module.parameters())
    return False


def feature_map_modules(network: nn.Module, layout: ChannelLayout) -> Iterator[tuple[str, str, nn.Module]]:
    """Every module that makes a unit's feature maps, as (unit's name, module's name, module)."""
    for unit in layout.units:
        for name in unit.feature_maps:
            yield unit.name, name, network.get_submodule(name)
