"""Do a layer's feature maps cluster as training goes on? What Sauron's regulariser, delta_opt, is meant to bring about.

After Figure 1 of Valverde, Shatillo, Tohka: Sauron U-Net. arXiv 2209.13590; Neurocomputing 594 (2024) 127817. A layer's
feature maps are points (`points`), taken from the snapshots that our trainers keep with `snapshot_every`; three
measures (`dip_of_distances`, `hopkins`, `neighbours`) tell how much they cluster, `trend` how that changes.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial import Delaunay, cKDTree
from scipy.spatial.distance import num_obs_y, pdist
from scipy.stats import kendalltau, theilslopes
from sklearn.decomposition import PCA

from ...console.json_data import json_data
from ...pruning.timing import chosen_device
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
    """What was measured.

    Attributes:
        models: The trainings.
        values: A row per model, layer and epoch: channels, the three measures, the dip's p-value (`dip_p`), how much of
            the variance the Hopkins statistic sees (`variance_kept`), and the plain number of neighbours
            (`neighbours_count`). nan where it is not defined.
        trends: A row per model, layer and measure: its first and last value, Kendall's tau and its p, the Theil-Sen
            slope per epoch with its 95 % confidence interval, whether it is `rising` or `falling`, and a note where
            there is no trend to speak of.
        problems: What could not be read, and what to do.
    """

    models: tuple[TrainedFold, ...]
    values: pd.DataFrame
    trends: pd.DataFrame
    problems: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """`values`."""
        return self.values

    def summary(self, by: str = "model") -> pd.DataFrame:
        """How many layers rise, fall, and can have a trend (`layers`), and the median of their first and last values.

        Args:
            by: "model" or "lambda_".

        Returns:
            A row per model or lambda_, and measure.
        """
        trends = self.trends.assign(layers=self.trends.tau.notna() | (self.trends.note == CONSTANT))
        groups = trends.groupby([by, "measure"], dropna=False, sort=by == "lambda_")
        return groups.agg(
            {"rising": "sum", "falling": "sum", "layers": "sum", "first": "median", "last": "median"},
        )

    def to_dict(self) -> dict:
        """Plain dictionaries and lists for JSON; nan becomes None."""
        models = [
            {**asdict(model), "folder": str(model.folder), "snapshots": list(model.snapshots)} for model in self.models
        ]
        found = {
            "models": models,
            "values": self.values.to_dict("records"),
            "trends": self.trends.to_dict("records"),
            "by_model": self.summary("model").reset_index().to_dict("records"),
            "by_lambda": self.summary("lambda_").reset_index().to_dict("records"),
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
        progress(f"{model.name}: {len(model.snapshots)} snapshots")
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


def dip_of_distances(distances: np.ndarray) -> tuple[float, float]:
    """Hartigans' dip of all pairwise distances, and its p-value: small distances within clusters and large ones
    between them make several modes.

    Hartigan, Hartigan: The dip test of unimodality. Annals of Statistics 13 (1985) 70-84. On distances: Kalogeratos,
    Likas: Dip-means. NeurIPS 2012 (seen from each point); Ackerman, Adolfsson, Brownstein: An effective and efficient
    approach for clusterability evaluation. arXiv 1602.06687 (all pairs, as here).

    Distances among the same points are not independent, which the p-value takes them to be: on clouds of 32 uniform or
    Gaussian points it is below 0.05 in less than 1 of 100. A single tight cluster has one mode and does not show; and
    of the same cloud, fewer points have a larger dip (0.016 for 32 points, 0.055 for 8).

    Args:
        distances: Of n points, n (n - 1) / 2 of them (`scipy.spatial.distance.pdist`).
    """
    import diptest

    with warnings.catch_warnings():
        # Above 72000 distances the largest tabulated sample is taken as asymptotic, as it should be.
        warnings.filterwarnings("ignore", message="Sample size exceeds")
        return diptest.diptest(distances)


def hopkins(feature_points: np.ndarray) -> tuple[float, float]:
    """The Hopkins statistic of the points projected on their first principal components: about 0.5 without clusters,
    near 1 with them.

        H = sum_i u_i^d / (sum_i u_i^d + sum_i w_i^d)

    u: distance from a uniform random point to the nearest map; w: from a map drawn at random to the nearest other one;
    of each kind a tenth of the number of maps (1 to 50), mean of 50 draws from a fixed seed.

    Hopkins, Skellam: A new method for determining the type of distribution of plant individuals. Annals of Botany 18
    (1954) 213-227; with d dimensions as exponent: Cross, Jain: Measurement of clustering tendency. IFAC 1982.

    d is at most 3: in the hundreds of dimensions of the maps, space is so empty that H is 1 for whatever lies in it.
    The uniform points fill the convex hull, not the bounding box, whose empty corners let H grow with the number of
    points: one Gaussian cloud of 100 dimensions had 0.36 with 8 points, 0.59 with 32 and 0.93 with 512 in the box, and
    has 0.30, 0.36 and 0.60 in the hull; four clusters have over 0.98 in both.

    Args:
        feature_points: (n, dimensions), n > 3.

    Returns:
        H, and the part of the variance that the components hold; nan where all points are the same.
    """
    # Few lines of our own: of the packages, hopkins-statistic is a beta that needs a newer Python than we do, and
    # pyclustertend leaves out the exponent, cannot be seeded, and brings numba and pytest along.
    if np.ptp(feature_points, axis=0).max() == 0:
        return math.nan, math.nan
    pca = PCA(min(HOPKINS_DIMENSIONS, feature_points.shape[1]), svd_solver="full")  # another one would draw numbers
    projected = pca.fit_transform(feature_points)
    # A direction with a thousandth of the extent is rounding noise of float16, and no dimension.
    projected = projected[:, pca.singular_values_ > 1e-3 * pca.singular_values_[0]]
    projected = projected[np.lexsort(projected.T)]  # the draws shall not depend on the order of the channels
    count, dimensions = projected.shape
    drawn = min(max(1, count // 10), HOPKINS_MOST_DRAWN)
    generator = np.random.default_rng(0)
    tree = cKDTree(projected)
    u = tree.query(_uniform_in_hull(projected, generator, (HOPKINS_REPEATS, drawn)))[0]
    chosen = np.argsort(generator.random((HOPKINS_REPEATS, count)), axis=1)[:, :drawn]
    w = tree.query(projected, k=2)[0][:, 1][chosen]
    u, w = ((distances**dimensions).sum(1) for distances in (u, w))
    return float(np.mean(u / (u + w))), float(pca.explained_variance_ratio_[:dimensions].sum())


def _uniform_in_hull(corners: np.ndarray, generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Random points (*shape, d), uniform in the convex hull: simplices by their volume, and a place in each."""
    dimensions = corners.shape[1]
    if dimensions == 1:
        return generator.uniform(corners.min(), corners.max(), (*shape, 1))
    simplices = corners[Delaunay(corners / corners.std(0)).simplices]  # scaled: flat simplices would be lost
    volumes = abs(np.linalg.det(simplices[:, 1:] - simplices[:, :1]))
    chosen = generator.choice(len(simplices), shape, p=volumes / volumes.sum())
    return np.einsum("...k,...kd->...d", generator.dirichlet(np.ones(dimensions + 1), shape), simplices[chosen])


def neighbours(distances: np.ndarray, radius: float) -> tuple[float, float]:
    """How many of the other points lie within a radius, on average over the points.

    The paper's radius is not known to us; ours is the distance within which a tenth of the pairs of maps lie in the
    layer's first snapshot, kept for the whole training. So each layer begins at 0.1, and rises as its maps draw nearer:
    a radius of each snapshot's own would hide just that. (A part of the largest distance is no measure: in hundreds of
    dimensions distances are nearly alike, and within 0.2 of the largest lies no pair at all in most layers.)

    Args:
        distances: Of n points, n (n - 1) / 2 of them.
        radius: A distance that still counts.

    Returns:
        As a fraction of the n - 1 others, which can be compared between layers and widths; and their number.
    """
    fraction = float(np.mean(distances <= radius))
    return fraction, fraction * (num_obs_y(distances) - 1)


@dataclass(frozen=True)
class Trend:
    """Kendall's tau of a measure against the epoch, its p, and the Theil-Sen slope per epoch with its 95 % interval."""

    tau: float = math.nan
    p: float = math.nan
    slope: float = math.nan
    slope_low: float = math.nan
    slope_high: float = math.nan
    note: str = ""

    @property
    def rising(self) -> bool:
        return self.tau > 0 and self.p < SIGNIFICANT

    @property
    def falling(self) -> bool:
        return self.tau < 0 and self.p < SIGNIFICANT


def trend(epochs: Sequence[float], values: Sequence[float]) -> Trend:
    """The Mann-Kendall test for a trend (Kendall's tau against time) and Sen's slope; what is nan is left out.

    Snapshots of one training follow from each other, which the test takes to be independent: p is a description, to be
    compared with that of a training without delta_opt, and 1 of 20 layers without a trend is below 0.05 by chance.
    Four snapshots are the fewest, and only five or more can get below 0.05.
    """
    defined = np.isfinite(values)
    x, y = np.asarray(epochs, float)[defined], np.asarray(values, float)[defined]
    if len(y) < FEWEST_SNAPSHOTS:
        return Trend(note=f"defined in {len(y)} snapshots, a trend needs {FEWEST_SNAPSHOTS}")
    if np.ptp(y) == 0:
        return Trend(slope=0.0, note=CONSTANT)
    tau, p = kendalltau(x, y)
    slope, _, low, high = theilslopes(y, x)
    return Trend(float(tau), float(p), float(slope), float(low), float(high))


def _measured(layer: str, feature_maps: np.ndarray, radius: dict[str, float]) -> dict:
    """The measures of one layer in one snapshot; the layer's radius is set by the first one that has enough maps."""
    channels = feature_maps.shape[1]
    names = ("dip", "dip_p", "hopkins", "variance_kept", "neighbours", "neighbours_count")
    undefined = {"channels": channels, **dict.fromkeys(names, math.nan)}
    # Maps are not finite where a training went to pieces; one of a single value has nothing to compare.
    if channels < FEWEST_MAPS or feature_maps[0, 0].size < 2 or not np.isfinite(feature_maps).all():
        return undefined
    where = points(feature_maps)
    distances = pdist(where)
    numbers = (
        *dip_of_distances(distances),
        *hopkins(where),
        *neighbours(distances, radius.setdefault(layer, np.quantile(distances, NEAR))),
    )
    return {"channels": channels, **dict(zip(names, numbers, strict=True))}


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
