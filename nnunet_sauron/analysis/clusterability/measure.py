"""Whether a layer's feature maps cluster during training, as Sauron's regulariser, delta_opt, intends.

After Figure 1 of Valverde, Shatillo, Tohka: Sauron U-Net. arXiv 2209.13590; Neurocomputing 594 (2024) 127817. A layer's
feature maps are points (`points`), taken from the snapshots that our trainers keep with `snapshot_every`; three
measures (`dip_of_distances`, `hopkins`, `neighbours`) tell how much they cluster, `trend` how that changes.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial import Delaunay, cKDTree
from scipy.spatial.distance import pdist
from scipy.stats import kendalltau
from sklearn.decomposition import PCA

from ...console.json_data import json_data
from ...model.device import chosen_device
from .folders import TrainedFold, find_folds

MEASURES = ("dip", "hopkins", "neighbours")
NEAR = 0.1
FEWEST_MAPS = 4
FEWEST_SNAPSHOTS = 4
SIGNIFICANT = 0.05
CONSTANT = "constant"
HOPKINS_DIMENSIONS = 3
HOPKINS_MOST_DRAWN = 50
HOPKINS_REPEATS = 50


@dataclass(frozen=True)
class Clusterability:
    """The result.

    Attributes:
        models: The trainings.
        values: A row per model, layer and epoch: channels and the three measures; nan where one is not defined.
        trends: A row per model, layer and measure: its first and last value, Kendall's tau against the epoch and its p,
            whether it is `rising` or `falling`, and a note where no trend can be computed.
        problems: What could not be read, and what to do.
    """

    models: tuple[TrainedFold, ...]
    values: pd.DataFrame
    trends: pd.DataFrame
    problems: tuple[str, ...]

    def summary(self) -> pd.DataFrame:
        """A row per lambda_ and measure: how many layers rise, fall, and can have a trend (`layers`), and the median of
        their first and last values."""
        trends = self.trends.assign(layers=self.trends.tau.notna() | (self.trends.note == CONSTANT))
        groups = trends.groupby(["lambda_", "measure"], dropna=False)
        return groups.agg({"rising": "sum", "falling": "sum", "layers": "sum", "first": "median", "last": "median"})

    def to_dict(self) -> dict:
        """Plain dictionaries and lists for JSON; nan becomes None."""
        models = [
            {**asdict(model), "folder": str(model.folder), "snapshots": list(model.snapshots)} for model in self.models
        ]
        found = {
            "models": models,
            "values": self.values.to_dict("records"),
            "trends": self.trends.to_dict("records"),
            "by_lambda": self.summary().reset_index().to_dict("records"),
            "problems": list(self.problems),
        }
        return json_data(found)


def clusterability(
    model_folders: Sequence[Path],
    folds: Sequence[str] | None = None,
    *,
    images: Path | None = None,
    checkpoint: str | None = None,
    device: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Clusterability:
    """Measure how much the feature maps of trained models clustered, snapshot after snapshot.

    Args:
        model_folders: What `nnUNetv2_predict_from_modelfolder -m` takes, with fold_*/feature_maps.
        folds: Only these; None for every fold that has snapshots.
        images: Raw images in nnU-Net's naming, for models without snapshots: maps of the middle patches of the first
            four are what is measured then, of the trained network alone.
        checkpoint: File name of the checkpoint whose network that is, and whose lambda_ is told; None for the last.
        device: Where that network runs, as `chosen_device` takes it.
        progress: Called with a line before each model.

    Raises:
        ValueError: There are no feature maps of any of them; what to do is said.
    """
    if importlib.util.find_spec("diptest") is None:
        raise RuntimeError("The dip test needs the package diptest, which is GPL: pip install diptest")
    models, problems = find_folds(model_folders, folds, images, checkpoint, chosen_device(device))
    rows: list[dict] = []
    measured = []
    for model in models:
        progress(f"{model.name}: {len(model.snapshots)} snapshot{'s' if len(model.snapshots) > 1 else ''}")
        radius: dict[str, float] = {}
        readable = {}
        for epoch, path in model.snapshots.items():
            try:
                maps = model.maps(epoch)
            except ValueError as error:
                problems.append(str(error))
                continue
            readable[epoch] = path
            about = {"model": model.name, "lambda_": model.lambda_, "epoch": epoch}
            rows += [{**about, "layer": layer, **_measured(layer, h, radius)} for layer, h in maps.items()]
        if readable:
            measured.append(replace(model, snapshots=readable))
    if not measured:
        raise ValueError("No feature maps to look at. " + " ".join(problems))
    values = pd.DataFrame(rows)
    return Clusterability(tuple(measured), values, _trends(values), tuple(problems))


def points(feature_maps: np.ndarray) -> np.ndarray:
    """One point per channel: its maps of all patches, each scaled to [0, 1] as in delta_opt, one behind the other.

    Unlike in delta_opt, least and greatest value are those of the pooled map, which is all that a snapshot has. A map
    that is constant, up to the rounding of float16, becomes 0.

    Args:
        feature_maps: (patches, channels, *pooled).

    Returns:
        (channels, patches * values of a pooled map), in [0, 1].
    """
    maps = np.swapaxes(feature_maps, 0, 1).astype(np.float64).reshape(feature_maps.shape[1], feature_maps.shape[0], -1)
    low, high = maps.min(-1, keepdims=True), maps.max(-1, keepdims=True)
    half = np.finfo(np.float16)
    constant = high - low <= np.maximum(half.eps * np.maximum(abs(low), abs(high)), half.tiny)
    return ((maps - low) / np.where(constant, np.inf, high - low)).reshape(len(maps), -1)


def dip_of_distances(distances: np.ndarray) -> float:
    """Hartigans' dip of all pairwise distances: small ones within clusters and large ones between make several modes.

    Hartigan, Hartigan: The dip test of unimodality. Annals of Statistics 13 (1985) 70-84. On all pairwise distances:
    Ackerman, Adolfsson, Brownstein: An effective and efficient approach for clusterability evaluation, arXiv
    1602.06687. A single tight cluster has one mode and does not show; and of the same cloud, fewer points have a larger
    dip (0.016 for 32 points, 0.055 for 8).

    Args:
        distances: Of n points, n (n - 1) / 2 of them (`scipy.spatial.distance.pdist`).
    """
    import diptest

    return float(diptest.dipstat(distances))


def hopkins(feature_points: np.ndarray) -> float:
    """The Hopkins statistic of the points projected on their first principal components: about 0.5 without clusters,
    near 1 with them, nan where all points are the same.

        H = sum_i u_i^d / (sum_i u_i^d + sum_i w_i^d)

    u: distance from a uniform random point to the nearest map; w: from a map drawn at random to the nearest other one;
    of each kind a tenth of the number of maps (1 to 50), mean of 50 draws from a fixed seed.

    Hopkins, Skellam: A new method for determining the type of distribution of plant individuals. Annals of Botany 18
    (1954) 213-227; with d dimensions as exponent: Cross, Jain: Measurement of clustering tendency. IFAC 1982.

    d is at most 3: in the hundreds of dimensions of the maps, H is 1 for any points. The uniform points fill the convex
    hull, since the empty corners of a bounding box let H grow with the number of points.

    Args:
        feature_points: (n, dimensions), n > 3.
    """
    # Few lines of our own: of the packages, hopkins-statistic is a beta that needs a newer Python than we do, and
    # pyclustertend leaves out the exponent, cannot be seeded, and brings numba and pytest along.
    if np.ptp(feature_points, axis=0).max() == 0:
        return math.nan
    pca = PCA(min(HOPKINS_DIMENSIONS, feature_points.shape[1]), svd_solver="full")  # another one would draw numbers
    projected = pca.fit_transform(feature_points)
    # A direction with a thousandth of the extent is rounding noise of float16, and no dimension.
    projected = projected[:, pca.singular_values_ > 1e-3 * pca.singular_values_[0]]
    projected = projected[np.lexsort(projected.T)]  # the draws must not depend on the order of the channels
    count, dimensions = projected.shape
    drawn = min(max(1, count // 10), HOPKINS_MOST_DRAWN)
    generator = np.random.default_rng(0)
    tree = cKDTree(projected)
    u = tree.query(_uniform_in_hull(projected, generator, (HOPKINS_REPEATS, drawn)))[0]
    chosen = np.argsort(generator.random((HOPKINS_REPEATS, count)), axis=1)[:, :drawn]
    w = tree.query(projected, k=2)[0][:, 1][chosen]
    u, w = ((distances**dimensions).sum(1) for distances in (u, w))
    return float(np.mean(u / (u + w)))


def _uniform_in_hull(corners: np.ndarray, generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Random points (*shape, d), uniform in the convex hull: simplices by their volume, and a place in each."""
    dimensions = corners.shape[1]
    if dimensions == 1:
        return generator.uniform(corners.min(), corners.max(), (*shape, 1))
    simplices = corners[Delaunay(corners / corners.std(0)).simplices]  # scaled: flat simplices would be lost
    volumes = abs(np.linalg.det(simplices[:, 1:] - simplices[:, :1]))
    chosen = generator.choice(len(simplices), shape, p=volumes / volumes.sum())
    return np.einsum("...k,...kd->...d", generator.dirichlet(np.ones(dimensions + 1), shape), simplices[chosen])


def neighbours(distances: np.ndarray, radius: float) -> float:
    """The fraction of the other points that lie within a radius, on average over the points.

    The paper's radius is not known to us. Ours is the distance within which a tenth of the pairs of maps lie in the
    layer's first snapshot, for the whole training: each layer begins at 0.1, and rises as its maps draw nearer.

    Args:
        distances: Of n points, n (n - 1) / 2 of them.
        radius: A distance that still counts.
    """
    return float(np.mean(distances <= radius))


@dataclass(frozen=True)
class Trend:
    """Kendall's tau of a measure against the epoch, and its p."""

    tau: float = math.nan
    p: float = math.nan
    note: str = ""

    @property
    def rising(self) -> bool:
        """Whether it rises by more than chance would let it."""
        return self.tau > 0 and self.p < SIGNIFICANT

    @property
    def falling(self) -> bool:
        """Whether it falls by more than chance would let it."""
        return self.tau < 0 and self.p < SIGNIFICANT


def trend(epochs: Sequence[float], values: Sequence[float]) -> Trend:
    """The Mann-Kendall test for a trend (Kendall's tau against time); values that are nan are left out.

    The test takes snapshots to be independent, and those of one training are not: compare p with that of a training
    without delta_opt. Four snapshots are the fewest, and only five or more can get below 0.05.
    """
    defined = np.isfinite(values)
    x, y = np.asarray(epochs, float)[defined], np.asarray(values, float)[defined]
    if len(y) < FEWEST_SNAPSHOTS:
        return Trend(note=f"defined in {len(y)} snapshots, a trend needs {FEWEST_SNAPSHOTS}")
    if np.ptp(y) == 0:
        return Trend(note=CONSTANT)
    tau, p = kendalltau(x, y)
    return Trend(float(tau), float(p))


def _measured(layer: str, feature_maps: np.ndarray, radius: dict[str, float]) -> dict:
    """The measures of one layer in one snapshot; the layer's radius is set by the first one that has enough maps."""
    channels = feature_maps.shape[1]
    found = {"channels": channels, **dict.fromkeys(MEASURES, math.nan)}
    # Maps of a training that diverged are not finite; pooled maps of a single value have nothing to compare.
    if channels >= FEWEST_MAPS and feature_maps[0, 0].size > 1 and np.isfinite(feature_maps).all():
        where = points(feature_maps)
        distances = pdist(where)
        near = radius.setdefault(layer, np.quantile(distances, NEAR))
        found |= {
            "dip": dip_of_distances(distances), "hopkins": hopkins(where), "neighbours": neighbours(distances, near)
        }  # fmt: skip
    return found


def _trends(values: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (model, layer), of_layer in values.groupby(["model", "layer"], sort=False):
        of_layer = of_layer.sort_values("epoch")
        for measure in MEASURES:
            found = trend(of_layer.epoch, of_layer[measure])
            defined = of_layer[measure].dropna()
            first, last = (defined.iloc[0], defined.iloc[-1]) if len(defined) else (math.nan, math.nan)
            rows.append({
                "model": model, "lambda_": of_layer.lambda_.iloc[0], "layer": layer, "measure": measure,
                "first": first, "last": last, **asdict(found), "rising": found.rising, "falling": found.falling,
            })  # fmt: skip
    return pd.DataFrame(rows)
