"""What parts of compress do for it, or cost: that positions do not count alike, nor layers (`position_weights`,
`weighted`), and that all layers of a stage have one width (`--uniform-stages`).

A trained model is compressed on patches of some images, with and without either, for several draws of patches;
segmentations of patches of the other images are compared with the model's own, without a training step in between. For
models with batch norm there is a variant that compress does not have, with running statistics made anew on the patches.

    python benchmarks/compress_parts.py -m MODEL_FOLDER -i imagesTs [--macs 0.5 0.35 0.25] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from nnunet_sauron.compression.compressor import FoldCompressor
from nnunet_sauron.compression.goal import Goal
from nnunet_sauron.compression.images import batches, patches
from nnunet_sauron.compression.stages import UniformStages
from nnunet_sauron.model.cases import find_cases
from nnunet_sauron.model.device import machine
from nnunet_sauron.model.trained import TrainedModel
from nnunet_sauron.pruning.moments import UNSURE

HELD_OUT = 7  # every seventh case


@dataclass(frozen=True)
class Variant:
    """Share of `position_weights`, whether layers' errors are `weighted`, whether batch norm's statistics are new, and
    whether stages are uniform."""

    unsure: float = UNSURE
    weighted: bool = True
    statistics_anew: bool = False
    uniform: bool = False


VARIANTS = {
    "as it is": Variant(),
    "positions alike": Variant(unsure=0),
    "layers alike": Variant(weighted=False),
    "both alike": Variant(unsure=0, weighted=False),
    "uniform stages": Variant(uniform=True),
    "statistics anew": Variant(statistics_anew=True),
}


class Unweighted(FoldCompressor):
    """Layers' errors count alike."""

    def weigh(self, cost) -> None:
        self.rankings = self.ranked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", dest="model", type=Path, required=True, help="folder of a trained model; its first fold")
    parser.add_argument("-i", dest="images", type=Path, required=True, help="raw images")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS)[:-1])
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5, 0.35, 0.25], help="targets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="draws of patches")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    model = TrainedModel.read(arguments.model)
    fold = next(iter(model.checkpoints))
    cases = find_cases(arguments.images, model)
    others, used = cases[1::HELD_OUT], [case for i, case in enumerate(cases) if i % HELD_OUT != 1]
    kinds = {True: FoldCompressor, False: Unweighted}
    compressors = {weighted: kind(model, fold, torch.device("cpu")) for weighted, kind in kinds.items()}
    judged = batches(patches(model, others, 8 * len(others), seed=99))
    old = segmented(model.network(fold), judged)
    rows = []
    for seed in arguments.seeds:
        cut = patches(model, used[:15], max(15, compressors[True].wanted), seed)
        for name in arguments.variants:
            variant = VARIANTS[name]
            compressor = compressors[variant.weighted]
            compressor.rank(batches(cut), unsure=variant.unsure)
            for macs in arguments.macs:
                network = model.network(fold)
                goal, stages = Goal(macs=macs), UniformStages([compressor]) if variant.uniform else None
                tolerance = (stages or compressor).tolerance(goal)
                small = compressor.merge(tolerance, widths=stages and stages.widths(tolerance))
                network.load_state_dict(small.weights)
                if variant.statistics_anew:
                    make_statistics(network, compressor.inputs)
                parameters = small.parameters[1] / small.parameters[0]
                dice = agreement(segmented(network, judged), old, list(model.classes.values()))
                rows.append({"variant": name, "macs": macs, "parameters": parameters, "seed": seed,
                             "patches": len(cut), "dice": dice})  # fmt: skip
                print(f"{macs:.0%} of the MACs, {parameters:.0%} of the parameters, {name}, draw {seed}: "
                      f"{', '.join(f'{d:.3f}' for d in dice)}", flush=True)  # fmt: skip
    for macs in arguments.macs:
        for name in arguments.variants:
            means = [statistics.mean(r["dice"]) for r in rows if (r["macs"], r["variant"]) == (macs, name)]
            print(f"{macs:.0%}, {name}: {statistics.median(means):.3f} ({min(means):.3f} to {max(means):.3f})")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine(), "model": model.folder.name, "rows": rows}, indent=1)
        )


@torch.no_grad()
def make_statistics(network: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    """Batch norm's running mean and variance, averaged over these inputs alone."""
    norms = [module for module in network.eval().modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
        norm.train()
    for patches_together in inputs:
        network(patches_together)


@torch.no_grad()
def segmented(network: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([network.eval()(patch).argmax(1) for patch in inputs])


def agreement(new: torch.Tensor, old: torch.Tensor, classes: Sequence[tuple[int, ...]]) -> list[float]:
    dice = []
    for values in classes:
        a, b = (torch.isin(labels, torch.tensor(values)) for labels in (new, old))
        dice.append(2 * (a & b).sum().item() / max(1, a.sum().item() + b.sum().item()))
    return dice


if __name__ == "__main__":
    main()
