"""Over how many batches should delta_prune be averaged, so that another draw of batches removes the same channels?

Takes a trained model, keeps one reference channel per layer, scores all channels on many training batches as nnU-Net
loads and augments them, and compares the channels chosen by disjoint groups of k batches: the mean Jaccard index of
what falls below the layer's tau (for several tau), pooled over layers. 1 means that the draw does not matter.

    python benchmarks/delta_prune_reproducibility.py DATASET CONFIGURATION FOLD -tr TRAINER -p PLANS [-chk NAME]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from nnunetv2.run.run_training import get_trainer_from_args

from nnunet_sauron.methods.delta import delta_prune
from nnunet_sauron.pruning import channel_layout
from nnunet_sauron.pruning.channels import feature_map_modules

GROUPS = (1, 2, 4, 8, 16)
TAUS = (0.1, 0.2, 0.3, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("configuration")
    parser.add_argument("fold", type=int)
    parser.add_argument("-tr", default="SauronTrainer")
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("-chk", default="checkpoint_final.pth")
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    trainer = get_trainer_from_args(
        arguments.dataset, arguments.configuration, arguments.fold, arguments.tr, arguments.p, True,
        torch.device("cpu"),
    )  # fmt: skip
    trainer.initialize()
    trainer.load_checkpoint(str(Path(trainer.output_folder) / arguments.chk))
    scores = scores_per_batch(trainer, arguments.batches)
    table = {f"tau={tau}": {k: agreement(scores, k, tau) for k in GROUPS if 2 * k <= arguments.batches} for tau in TAUS}
    print("agreement of the removed channels (Jaccard) between two draws of k batches")
    print("           " + "".join(f"  k={k:<4d}" for k in GROUPS) + "  channels below tau")
    for tau, row in zip(TAUS, table.values(), strict=True):
        means = [s.mean(0) for s in scores.values()]
        below = sum(int((m < tau).sum()) - 1 for m in means)
        values = "".join(f"  {value:.3f} " for value in row.values())
        print(f"tau = {tau:<5g}{values}  {below} of {sum(len(m) for m in means)}")
    if arguments.json:
        given = {name: value for name, value in vars(arguments).items() if name != "json"}
        # Where nothing falls below tau there is nothing to agree on.
        known = {tau: {k: None if math.isnan(v) else v for k, v in row.items()} for tau, row in table.items()}
        result = {"arguments": given, "date": time.strftime("%Y-%m-%d"), "jaccard": known}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def scores_per_batch(trainer, batches: int) -> dict[str, torch.Tensor]:
    """delta_prune of every channel on every batch: (batches, C) by layer."""
    network = trainer.bare_network if hasattr(trainer, "bare_network") else trainer.network
    layout = channel_layout(network)
    references = {name: random.Random(name).randrange(width) for name, width in layout.widths.items()}
    collected: dict[str, list[torch.Tensor]] = {name: [] for name in layout.widths}

    def score(unit, module, inputs, maps):
        collected[unit].append(delta_prune(maps, reference=references[unit]))

    for unit, _, module in feature_map_modules(network, layout):
        module.register_forward_hook(partial(score, unit))
    loader, _ = trainer.get_dataloaders()
    network.train()
    with torch.no_grad():
        for _ in range(batches):
            network(next(loader)["data"])
    return {name: torch.stack(values) for name, values in collected.items()}


def agreement(scores: dict[str, torch.Tensor], k: int, tau: float) -> float:
    values = []
    for per_batch in scores.values():
        groups = [set((group.mean(0) < tau).nonzero().flatten().tolist()) for group in per_batch.split(k)]
        for one, other in itertools.islice(itertools.combinations(groups, 2), 200):
            # The reference is below every tau and would flatter the figure.
            both, either = len(one & other) - 1, len(one | other) - 1
            if either > 0:
                values.append(both / either)
    return statistics.mean(values) if values else float("nan")


if __name__ == "__main__":
    main()
