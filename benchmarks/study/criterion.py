"""Picture of STAMP's criterion on the levels of a network that nothing was cut from, before and after its training.

    python benchmarks/study/criterion.py MODEL_FOLDER [-f FOLD] -i IMAGES -o PICTURE

The criterion is a feature map's L2 norm, mean over patches, over the L2 norm of its layer's. A typical one is near
1 / sqrt(channels), so that the widest layers lose channels first, whatever these hold (Hassler et al., Lean Unet, arXiv
2512.03834).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from figures import layers_of_levels
from matplotlib import pyplot as plt

from nnunet_sauron.analysis.clusterability.folders import middle_patch
from nnunet_sauron.methods.measuring import map_norms
from nnunet_sauron.methods.stepwise import over_layer_norm
from nnunet_sauron.model.cases import find_cases, preprocess, read_case
from nnunet_sauron.model.trained import TrainedModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL_FOLDER", help="a trained model, such as stock nnU-Net's")
    parser.add_argument("-f", dest="fold", default="0", help="fold; %(default)s")
    parser.add_argument("-i", dest="images", type=Path, required=True, metavar="IMAGES", help="such as imagesTs")
    parser.add_argument("--most", type=int, default=40, help="images; %(default)s")
    parser.add_argument("-o", type=Path, required=True, metavar="PICTURE")
    arguments = parser.parse_args()
    try:
        model = TrainedModel.read(arguments.model, [arguments.fold])
        cases = find_cases(arguments.images, model)[: arguments.most]
        images = [preprocess(model, *read_case(model, case))[0] for case in cases]
        patches = torch.stack([middle_patch(image, model.patch_size) for image in images])
        torch.manual_seed(0)
        networks = {"before training": model.builder.build(), "after training": model.network(arguments.fold)}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    scores = {name: over_layer_norm(map_norms(network, patches.split(8), 2)) for name, network in networks.items()}
    draw(scores, arguments.o)
    for name, of_layers in scores.items():
        print(f"{name}: layer, channels, 1 / sqrt(channels), median and lowest criterion")
        for layer, values in of_layers.items():
            told = len(values) ** -0.5, statistics.median(values), min(values)
            print(f"  {layer:30} {len(values):4}", *(f"{value:.3f}" for value in told))


def draw(scores: Mapping[str, Mapping[str, list[float]]], path: Path) -> None:
    """A box a level (median, quartiles, 5th and 95th percentile of all layers' channels), a panel a network."""
    figure, panels = plt.subplots(1, len(scores), figsize=(10, 4), layout="constrained", sharey=True, squeeze=False)
    for axes, (name, of_layers) in zip(panels[0], scores.items(), strict=True):
        levels = layers_of_levels(of_layers)
        values = [[one for layer in layers for one in of_layers[layer]] for layers in levels.values()]
        expected = [statistics.fmean(len(of_layers[layer]) ** -0.5 for layer in layers) for layers in levels.values()]
        axes.boxplot(values, whis=(5, 95), showfliers=False, medianprops={"color": "C0"})
        places = range(1, len(levels) + 1)
        axes.plot(places, expected, "D", color="C1", markersize=4, label="1 / sqrt(channels), mean of the layers")
        axes.set_xticks(places, [f"{side}\n{level}" for side, level in levels], fontsize=8)
        axes.set(title=name, xlabel="level, 0 the highest resolution")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("criterion of a channel")
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
