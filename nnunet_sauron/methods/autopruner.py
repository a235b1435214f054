"""AutoPruner: every layer learns a code per channel, annealed to 0 or 1, and keeps the channels whose code is 1.

Luo, Wu: AutoPruner: An end-to-end trainable filter pruning method for efficient deep model inference. Pattern
Recognition 107 (2020) 107461, arXiv 1805.08941.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from ..pruning.channels import ChannelLayout, channel_layout, feature_map_modules
from ..pruning.eval_mode import eval_mode
from .base import TrainingState, mean_of
from .distributed import summed_over_ranks
from .gates import register_gates, scaled
from .layerwise import Layerwise
from .limits import require
from .measuring import NOTHING_MEASURED, ChannelSums
from .targets import TargetSettings

# Maps are multiplied by no smaller code; float32's sums lose them anyway. Where those of two layers meet in a gradient,
# their product would be a subnormal number, with which a CPU computes up to 25 times more slowly.
LEAST_CODE = 1e-10


@dataclass(frozen=True, kw_only=True)
class AutoPrunerSettings(TargetSettings):
    """AutoPruner's settings. (The paper's target is `rate=0.5`.)

    Attributes:
        weight: Weight in the loss of (mean code - fraction that stays)^2, a mean over the layers.
        alpha_max: Sharpness of the codes' sigmoid at the end of the cutting phase; it begins at 1.
        code_lr: Learning rate of the codes (Adam).
        prune_batches: Training batches that codes are averaged over before the cut, on each DDP rank.
        seed: Of the codes' first weights.
    """

    weight: float = 10.0
    alpha_max: float = 100.0
    code_lr: float = 1e-3
    prune_batches: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge:
            raise ValueError("merge must be False: AutoPruner's codes have silenced the removed channels already.")
        for name, least in (("weight", 0), ("alpha_max", 1), ("code_lr", 0), ("prune_batches", 1)):
            require(getattr(self, name) >= least, name, f"at least {least}", getattr(self, name))


class AutoPruner(Layerwise):
    """All layers at once: code = sigmoid(alpha * fc(pooled maps)), multiplied onto the maps while training.

    The maps are pooled over the batch and all of space, where the paper's pooling keeps positions: so codes fit any
    patch size. Validation and prediction run without codes, on the very network that a checkpoint holds. At the end of
    the cutting phase the channels of the lowest codes are removed, as many as the target asks for.
    """

    Settings = AutoPrunerSettings
    latest_only = ("codes",)

    def attach(self, network: nn.Module, layout: ChannelLayout) -> None:
        super().attach(network, layout)
        self._device = next(network.parameters()).device
        self._terms: list[torch.Tensor] = []
        coded = {name: width for name, width in layout.widths.items() if width > self.final_widths[name]}
        # In no module of the network, so that its state dict keeps the plain keys. Dots are not allowed in these names.
        self._keys = {name: str(i) for i, name in enumerate(layout.widths)}
        generator = torch.Generator().manual_seed(self.settings.seed)  # the same on every DDP rank
        layers = {self._keys[name]: _linear(width, generator) for name, width in coded.items()}
        self._layers = nn.ModuleDict(layers).to(self._device)
        self._wanted = {name: self.final_widths[name] / width for name, width in coded.items()}
        self._optimizer = torch.optim.Adam(self._layers.parameters(), lr=self.settings.code_lr) if coded else None
        self._log_codes: dict[str, torch.Tensor] = {}
        self._codes: dict[str, torch.Tensor] = {}
        for unit, _, module in feature_map_modules(network, layout):
            module.register_forward_hook(partial(self._multiply, unit))
        register_gates(network, layout, self._log_codes.get)

    def start_epoch(self, epoch: int, widths: dict[str, int]) -> None:
        if epoch > self.cut_epoch:
            self._layers, self._optimizer = nn.ModuleDict(), None
        # A tensor: a graph would be compiled anew for every other number.
        done = epoch / self.cut_epoch if self.cut_epoch else 1.0
        self._alpha = torch.tensor(1 + (self.settings.alpha_max - 1) * done, device=self._device)

    def before_step(self) -> None:
        self._terms.clear()
        self._log_codes.clear()
        if self._optimizer is not None:
            self._optimizer.zero_grad()

    def regulariser(self) -> torch.Tensor | None:
        """weight * mean over the layers of (mean code - fraction that stays)^2."""
        mean = mean_of(self._terms)
        return None if mean is None else self.settings.weight * mean

    def after_step(self, loss_scale: float) -> None:
        self._log_codes.clear()
        gradients = [p.grad for p in self._layers.parameters() if p.grad is not None]
        for gradient in gradients:
            summed_over_ranks(gradient.div_(loss_scale))
        # Where one layer's gradient overflows, the others may be finite and wrong: no code learns from such a batch.
        if gradients and torch.stack([gradient.isfinite().all() for gradient in gradients]).all():
            self._optimizer.step()

    def redundant(self, training: TrainingState) -> dict[str, list[int]]:
        self.unmeasured = None
        if training.epoch == self.cut_epoch and len(self._layers):
            self._codes = self._summed_codes(training.batches(self.settings.prune_batches))
            self.unmeasured = None if self._codes else NOTHING_MEASURED
        return super().redundant(training)

    def order(self, unit: str) -> Sequence[int]:
        return self._codes[unit].argsort().tolist() if unit in self._codes else []

    def state(self) -> dict:
        if self._optimizer is None:
            return {"codes": None}
        state = {"layers": self._layers.state_dict(), "optimizer": self._optimizer.state_dict()}
        return {"codes": _copied(state)}

    def load_state(self, state: dict) -> None:
        if state["codes"] is not None and self._optimizer is not None:
            self._layers.load_state_dict(state["codes"]["layers"])
            self._optimizer.load_state_dict(_copied(state["codes"]["optimizer"]))

    def _multiply(self, unit: str, module: nn.Module, inputs, feature_maps: torch.Tensor) -> torch.Tensor:
        if not module.training or self._keys[unit] not in self._layers:
            return feature_maps
        log_code = self._log_code(unit, feature_maps)
        code = log_code.exp()
        self._terms.append((code.mean() - self._wanted[unit]).square())
        # In two steps, since the product's own gradient would keep the maps once more: the gate adds the code's part.
        self._log_codes[unit] = log_code
        return scaled(module, feature_maps, code.clamp_min(LEAST_CODE)[None])

    def _log_code(self, unit: str, feature_maps: torch.Tensor) -> torch.Tensor:
        """(B, C, *spatial) -> (C,), float32."""
        pooled = feature_maps.mean([0, *range(2, feature_maps.ndim)], dtype=torch.float32)
        with torch.autocast(feature_maps.device.type, enabled=False):
            return functional.logsigmoid(self._alpha * self._layers[self._keys[unit]](pooled))

    @torch.no_grad()
    def _summed_codes(self, batches: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Codes (C,) of each unit, summed over the batches of all ranks, in a network whose maps they multiply."""
        layout = channel_layout(self._network)
        coded = {name: width for name, width in layout.widths.items() if self._keys[name] in self._layers}
        codes = ChannelSums(coded, self._device)

        def multiply(unit: str, module: nn.Module, inputs, feature_maps: torch.Tensor) -> torch.Tensor:
            code = self._log_code(unit, feature_maps).exp()
            codes.add(unit, code)
            return scaled(module, feature_maps, code.clamp_min(LEAST_CODE)[None])

        maps = feature_map_modules(self._network, layout)
        hooks = {module: partial(multiply, unit) for unit, _, module in maps if unit in coded}
        with eval_mode(self._network, hooks):
            for tensor in batches:
                self._network(tensor.to(self._device))
                codes.end_batch()
        codes.share()
        return codes.by_layer()


def _linear(width: int, generator: torch.Generator) -> nn.Linear:
    """A layer as PyTorch initialises it, without its random state."""
    layer = nn.utils.skip_init(nn.Linear, width, width)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-(width**-0.5), width**-0.5, generator=generator)
    return layer


def _copied(state):
    """A nested state with every tensor copied to the CPU, since the original keeps changing."""
    if isinstance(state, torch.Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_copied(value) for value in state]
    return state
