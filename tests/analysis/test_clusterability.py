"""How feature maps cluster: the measures on points that can be reckoned with, trends on made-up snapshots."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.spatial.distance import pdist

from nnunet_sauron.analysis.clusterability.measure import (
    clusterability,
    dip_of_distances,
    hopkins,
    neighbours,
    points,
    trend,
)
from nnunet_sauron.analysis.clusterability.plots import draw, embedding, print_table, trends_by_lambda
from nnunet_sauron.model.cases import case_of, preprocess, read_case
from nnunet_sauron.model.snapshots import pooled
from nnunet_sauron.model.trained import TrainedModel
from nnunet_sauron.plugin.commands import train_command
from nnunet_sauron.pruning import channel_layout

from ..compression.small_model import write_images, write_model

PNG = b"\x89PNG"


def four_clusters(count: int = 40, dimensions: int = 60, width: float = 0.02) -> np.ndarray:
    draw = np.random.default_rng(1)
    return np.repeat(draw.random((4, dimensions)), count // 4, axis=0) + width * draw.normal(size=(count, dimensions))


def uniform(count: int = 40, dimensions: int = 60) -> np.ndarray:
    return np.random.default_rng(2).random((count, dimensions))


def maps(channels: int, spread: float, seed: int = 0) -> np.ndarray:
    """Feature maps (2 patches, channels, 4 x 4) of four kinds, the more alike within a kind the smaller `spread`."""
    draw = np.random.default_rng(seed)
    kinds = draw.normal(size=(2, 4, 4, 4))
    noise = np.random.default_rng(seed + 1).normal(size=(2, channels, 4, 4))
    return (kinds[:, np.arange(channels) % 4] + spread * noise).astype(np.float16)


def write_training(
    root: Path, spreads: dict[int, float], lambda_: float | None = 0.5, fold: str = "0", trainer: str = "SauronTrainer",
    widths: dict[int, int] | None = None, checkpoint: bool = True,
) -> Path:  # fmt: skip
    """A model's folder with snapshots of three layers, whose maps spread around their kinds by so much per epoch."""
    model = root / "Dataset004_Hippocampus" / f"{trainer}__nnUNetPlans__2d"
    folder = model / f"fold_{fold}" / "feature_maps"
    folder.mkdir(parents=True)
    np.savez(folder / "patches.npz", data=np.zeros((2, 1, 8, 8)))
    for epoch, spread in spreads.items():
        width = (widths or {}).get(epoch, 24)
        layers = {"first": maps(width, spread), "wide": maps(2 * width, spread, seed=5), "narrow": maps(3, spread)}
        np.savez(folder / f"epoch_{epoch:04d}.npz", **layers)
    settings = {"lambda_": lambda_} if lambda_ is not None else {"rate": 0.5}
    logging = {"pruning": [{}], "settings": [settings]} if trainer != "StockTrainer" else {}
    content = {"network_weights": {}, "trainer_name": trainer, "logging": logging}
    if checkpoint:
        torch.save(content, folder.parent / "checkpoint_final.pth")
    return model


RISING = {0: 1.0, 2: 0.8, 4: 0.6, 6: 0.45, 8: 0.3, 9: 0.2}
FALLING = dict(zip(RISING, reversed(RISING.values()), strict=True))


def test_four_tight_clusters_have_a_dip_and_uniform_points_have_none():
    assert dip_of_distances(pdist(four_clusters())) > 5 * dip_of_distances(pdist(uniform()))
    # Two values, equally often: the unimodal distribution that is nearest is off by 1/4, the greatest dip there is.
    assert dip_of_distances(np.repeat([0.0, 1.0], 500)) == pytest.approx(0.25)


def test_hopkins_is_near_1_for_clusters_and_a_half_for_uniform_points():
    assert hopkins(four_clusters()) > 0.95
    box = np.random.default_rng(3).random((2000, 3))
    assert hopkins(box) == pytest.approx(0.5, abs=0.05)
    line = np.outer(np.random.default_rng(3).random(2000), np.ones(50))
    assert hopkins(line) == pytest.approx(0.5, abs=0.05)
    # Corners of a box around a ball are empty, and would make H nearly 1.
    ball = box[np.linalg.norm(box - 0.5, axis=1) < 0.5]
    assert hopkins(ball) == pytest.approx(0.5, abs=0.05)
    assert hopkins(uniform()) < 0.5


def test_hopkins_of_a_grid_is_what_the_formula_gives():
    # On whole numbers every point is 1 from its neighbour; a uniform point is 1/4 away on average: H = 1/5.
    grid = np.arange(1001.0)[:, None]
    assert hopkins(grid) == pytest.approx(0.2, abs=0.005)
    # However many dimensions the maps have, those on a line have one.
    assert hopkins(grid * np.ones(50)) == pytest.approx(0.2, abs=0.005)
    # In the plane: squares. E[u^2] = 2 * 1/12, w^2 = 1: H = 1/7.
    plane = np.stack(np.meshgrid(np.arange(60.0), np.arange(61.0)), -1).reshape(-1, 2)
    assert hopkins(plane) == pytest.approx(1 / 7, abs=0.005)


def test_neighbours_are_counted_within_the_radius():
    # On a line at 0, 1, 2, 10: within 1 lie 0-1 and 1-2, so the points have 1, 2, 1 and 0 neighbours.
    distances = pdist(np.array([[0.0], [1.0], [2.0], [10.0]]))
    assert neighbours(distances, 1.0) == pytest.approx(1 / 3)
    assert neighbours(distances, 0.9) == 0
    assert neighbours(distances, 10.0) == pytest.approx(1)


def test_points_are_scaled_per_map_and_patch_and_constant_maps_are_0():
    feature_maps = np.zeros((2, 3, 2, 2), np.float16)
    feature_maps[0, 0] = [[1, 3], [2, 1]]
    feature_maps[1, 0] = [[-8, 0], [-4, 0]]
    feature_maps[:, 1] = 10 * feature_maps[:, 0] + 7
    feature_maps[0, 2], feature_maps[1, 2] = 1.25, np.float16(1.25) + np.array([[0, 0], [0, 0.001]])
    found = points(feature_maps)
    expected = [0, 1, 0.5, 0, 0, 1, 0.5, 1]
    np.testing.assert_allclose(found, [expected, expected, [0] * 8], atol=1e-3)


def test_the_order_of_the_channels_does_not_matter():
    feature_points = uniform() ** 2
    shuffled = np.random.default_rng(0).permutation(feature_points)
    distances, others = pdist(feature_points), pdist(shuffled)
    assert dip_of_distances(distances) == pytest.approx(dip_of_distances(others))
    assert hopkins(feature_points) == pytest.approx(hopkins(shuffled))
    assert neighbours(distances, 2.5) == pytest.approx(neighbours(others, 2.5))


def test_maps_that_are_all_alike_are_neighbours_and_have_no_hopkins_statistic():
    same = np.ones((10, 30))
    assert dip_of_distances(pdist(same)) == 0
    assert math.isnan(hopkins(same))
    assert neighbours(pdist(same), 0.0) == 1


def test_trends_by_hand():
    rising = trend([0, 2, 4, 6, 8], [0.1, 0.2, 0.25, 0.4, 0.9])
    assert (rising.rising, rising.falling, rising.tau) == (True, False, pytest.approx(1))
    assert rising.p == pytest.approx(2 / math.factorial(5))  # one of 5! orders, and its reverse
    straight = trend([0, 2, 4, 6, 8], [5, 4, 3, 2, 1])
    assert straight.falling and not straight.rising
    flat = trend(range(6), [0.3, 0.5, 0.1, 0.4, 0.2, 0.35])
    assert not flat.rising and not flat.falling and flat.p > 0.5
    assert trend(range(6), [1.0] * 6).note == "constant"
    few = trend(range(5), [1, 2, 3, math.nan, math.nan])
    assert math.isnan(few.tau) and "3 snapshots" in few.note
    # Too few to tell, even if each is above the last.
    assert not trend(range(4), [1, 2, 3, 4]).rising


def test_each_layer_is_measured_in_every_snapshot(tmp_path):
    result = clusterability([write_training(tmp_path, RISING)])
    frame = result.values
    assert len(frame) == 3 * len(RISING) and set(frame.epoch) == set(RISING)
    first, wide, narrow = (frame[frame.layer == name].set_index("epoch") for name in ("first", "wide", "narrow"))
    assert list(wide.channels) == [48] * 6
    where = points(maps(24, RISING[8]))
    radius = np.quantile(pdist(points(maps(24, RISING[0]))), 0.1)
    measured = first.loc[8]
    assert measured.dip == pytest.approx(dip_of_distances(pdist(where)))
    assert measured.hopkins == pytest.approx(hopkins(where))
    assert measured.neighbours == pytest.approx(neighbours(pdist(where), radius))
    assert first.loc[0, "neighbours"] == pytest.approx(0.1, abs=0.01) and measured.neighbours > 0.2
    # Three maps are too few.
    assert narrow[["dip", "hopkins", "neighbours"]].isna().all(axis=None)
    assert set(result.trends[result.trends.layer == "narrow"].note) == {"defined in 0 snapshots, a trend needs 4"}


def test_maps_that_gather_are_a_rising_trend_and_are_counted_by_lambda(tmp_path):
    folders = [
        write_training(tmp_path / "a", RISING, lambda_=2.0),
        write_training(tmp_path / "b", FALLING, lambda_=0.0),
        write_training(tmp_path / "c", RISING, lambda_=2.0),
        write_training(tmp_path / "d", dict.fromkeys(RISING, 1.0), trainer="StockTrainer"),
        write_training(tmp_path / "e", FALLING, lambda_=None, trainer="STAMPTrainer"),
    ]
    result = clusterability(folders)
    names = ["SauronTrainer, lambda 2 (1)", "SauronTrainer, lambda 0", "SauronTrainer, lambda 2 (2)", "StockTrainer",
             "STAMPTrainer"]  # fmt: skip
    assert [model.name for model in result.models] == names
    by_lambda = result.summary()
    for measure in ("dip", "hopkins", "neighbours"):
        assert counts(by_lambda.loc[2.0, measure]) == [4, 0, 4]
        assert counts(by_lambda.loc[0.0, measure]) == [0, 2, 2]
    assert list(dict.fromkeys(value for value, _ in by_lambda.index))[:2] == [0.0, 2.0]
    none = by_lambda[[math.isnan(value) for value, _ in by_lambda.index]].droplevel(0)
    assert counts(none.loc["hopkins"]) == [0, 2, 4]
    of_first = result.trends[(result.trends.lambda_ == 2.0) & (result.trends.measure == "dip")].dropna(subset="first")
    assert by_lambda.loc[(2.0, "dip"), "last"] == pytest.approx(of_first["last"].median())
    assert of_first["last"].min() > of_first["first"].max() > 0


def counts(row) -> list[int]:
    return [row["rising"], row["falling"], row["layers"]]


def test_what_has_no_snapshots_is_said_and_the_others_are_measured(tmp_path):
    good = write_training(tmp_path / "a", RISING, trainer="StockTrainer")
    without = write_training(tmp_path / "b", {}, trainer="nnUNetTrainer")
    result = clusterability([good, without, tmp_path / "nowhere"])
    assert [model.trainer for model in result.models] == ["StockTrainer"]
    said = train_command("Dataset004_Hippocampus", "2d", 0, "StockTrainer", "nnUNetPlans", settings="snapshot_every=10")
    assert said in result.problems[0] and "fold_0 has no feature_maps" in result.problems[0]
    assert "nowhere has no fold_*" in result.problems[1]
    with pytest.raises(ValueError, match=r"No feature maps to look at.*snapshot_every=10"):
        clusterability([without])
    with pytest.raises(ValueError, match=r"has no fold_3 \(folds: 0\)"):
        clusterability([good], folds=["3"])


def test_folds_are_told_apart_and_those_without_snapshots_named(tmp_path):
    for fold, spreads in (("0", RISING), ("1", FALLING), ("2", {}), ("1_old", RISING)):
        model = write_training(tmp_path, spreads, fold=fold)
    result = clusterability([model])
    assert [m.name for m in result.models] == [f"SauronTrainer, lambda 0.5, fold {fold}" for fold in "01"]
    (problem,) = result.problems
    assert "fold_2 is left out: it has no feature_maps" in problem
    (only,) = clusterability([model, model], folds=["1"]).models
    assert (only.name, only.fold) == ("SauronTrainer, lambda 0.5", "1")


def test_a_damaged_snapshot_or_a_missing_checkpoint_is_a_problem_not_the_end(tmp_path):
    model = write_training(tmp_path, RISING, checkpoint=False)
    damaged = model / "fold_0" / "feature_maps" / "epoch_0002.npz"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    result = clusterability([model])
    assert math.isnan(result.models[0].lambda_) and result.models[0].trainer == "SauronTrainer"
    assert "no checkpoint yet" in result.problems[0] and "epoch_0002.npz cannot be read" in result.problems[1]
    assert set(result.values.epoch) == set(result.models[0].snapshots) == set(RISING) - {2}
    for path in damaged.parent.glob("epoch_*.npz"):
        path.write_bytes(b"")
    other = write_training(tmp_path / "other", RISING)
    assert [found.folder for found in clusterability([model, other]).models] == [other]
    with pytest.raises(ValueError, match="No feature maps to look at.*cannot be read"):
        clusterability([model])


@pytest.mark.parametrize("logging", [None, {"pruning": None}, {"pruning": [{}]}])
def test_a_training_without_a_log_has_no_lambda(tmp_path, logging):
    model = write_training(tmp_path, RISING)
    path = model / "fold_0/checkpoint_final.pth"
    torch.save({**torch.load(path), "logging": logging}, path)
    assert math.isnan(clusterability([model]).models[0].lambda_)


def test_maps_of_a_training_that_went_to_pieces_are_undefined(tmp_path):
    model = write_training(tmp_path, {0: 1.0, 1: math.nan, 2: 1.0})
    frame = clusterability([model]).values
    assert frame[frame.epoch == 1].dip.isna().all()
    assert frame[(frame.epoch == 2) & (frame.layer == "first")].dip.notna().all()


def test_a_training_that_ended_in_pieces_is_drawn(tmp_path):
    found = clusterability([write_training(tmp_path, {0: 1.0, 1: 1.0, 2: math.nan})])
    assert "clusterability_tsne.png" in [path.name for path in draw(found, tmp_path / "pictures")]
    assert np.isnan(embedding(found.models[0], "first", 2)).all()


def test_pictures_are_whole_or_not_there(tmp_path, monkeypatch):
    def cut_short(figure, target, **options):
        Path(target).write_bytes(PNG)
        raise OSError("disk full")

    found = clusterability([write_training(tmp_path, RISING)])
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", cut_short)
    with pytest.raises(OSError, match=r"clusterability_measures.png: disk full"):
        draw(found, tmp_path / "pictures")
    assert not list((tmp_path / "pictures").iterdir())


def test_json_holds_everything_and_no_nan(tmp_path):
    folders = [write_training(tmp_path / "a", RISING), write_training(tmp_path / "b", RISING, trainer="StockTrainer")]
    found = json.loads(json.dumps(clusterability(folders).to_dict(), allow_nan=False))
    assert found["models"][0]["snapshots"] == list(RISING) and found["models"][1]["lambda_"] is None
    assert len(found["values"]) == 36 and len(found["trends"]) == 18
    narrow = next(row for row in found["values"] if row["layer"] == "narrow")
    assert narrow["dip"] is None and narrow["channels"] == 3
    assert {row["measure"] for row in found["by_lambda"]} == {"dip", "hopkins", "neighbours"}


def test_table_names_layers_and_says_what_the_columns_mean(tmp_path):
    folders = [write_training(tmp_path, RISING, widths={9: 12}), tmp_path / "nowhere"]
    output = io.StringIO()
    print_table(clusterability(folders), Console(file=output, width=200))
    text = output.getvalue()
    for words in ("first", "24 -> 12", "SauronTrainer, lambda 0.5", "+1.00 (0.0028)", "Hartigans' dip", "rising",
                  "2 layers lost channels", "delta_opt_after_cuts=True", "Problem: ", "nowhere"):  # fmt: skip
        assert words in text
    write_training(tmp_path / "b", RISING)
    output = io.StringIO()
    print_table(clusterability([tmp_path / "b" / "Dataset004_Hippocampus" / "SauronTrainer__nnUNetPlans__2d"]),
                Console(file=output, width=80))  # fmt: skip
    assert "lost channels" not in output.getvalue()


def test_pictures_are_drawn(tmp_path):
    folders = [
        write_training(tmp_path / "a", RISING, lambda_=2.0, widths={9: 8}),
        write_training(tmp_path / "b", FALLING, trainer="StockTrainer"),
    ]
    written = draw(clusterability(folders), tmp_path / "new" / "pictures")
    assert [path.name for path in written] == [
        "clusterability_measures.png", "clusterability_trends.png", "clusterability_tsne.png"
    ]  # fmt: skip
    assert all(path.read_bytes()[:4] == PNG for path in written)


def test_each_lambda_is_drawn_once_and_so_are_all_trainings_without_delta_opt(tmp_path):
    folders = [
        write_training(tmp_path / "a", RISING, lambda_=2.0),
        *(write_training(tmp_path / name, FALLING, trainer="StockTrainer") for name in ("b", "c")),
    ]
    for panel in trends_by_lambda(clusterability(folders)).axes:
        assert [label.get_text() for label in panel.get_xticklabels()] == ["2\n(2 layers)", "none\n(4 layers)"]


def test_the_layer_shown_is_the_widest_with_enough_maps_or_the_one_asked_for(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "nnunet_sauron.analysis.clusterability.plots.embedding",
        lambda model, layer, epoch: shown.append((layer, epoch)) or np.zeros((8, 2)),
    )
    result = clusterability([write_training(tmp_path / "a", {0: 1.0, 3: 1.0})])
    draw(result, tmp_path)
    assert shown == [("wide", 0), ("wide", 3)]
    shown.clear()
    draw(result, tmp_path, layer="first")
    assert shown == [("first", 0), ("first", 3)]
    with pytest.raises(ValueError, match="no layer 'last'; there are first, wide, narrow"):
        draw(result, tmp_path, layer="last")
    with pytest.raises(ValueError, match="'narrow' has 3 feature maps"):
        draw(result, tmp_path, layer="narrow")
    few = clusterability([write_training(tmp_path / "b", {0: 1.0, 3: 1.0}, widths={0: 24, 3: 3})])
    shown.clear()
    assert len(draw(few, tmp_path)) == 2 and not shown


def test_clusters_stay_together_in_the_embedding(tmp_path):
    (model,) = clusterability([write_training(tmp_path, {0: 0.01})]).models
    where = embedding(model, "wide", 0)
    assert where.shape == (48, 2)
    assert np.array_equal(where, embedding(model, "wide", 0))
    kinds = np.arange(48) % 4
    centres = np.array([where[kinds == kind].mean(0) for kind in range(4)])
    nearest = np.argmin(np.linalg.norm(where[:, None] - centres, axis=2), axis=1)
    assert (nearest == kinds).all()
    same = model.maps(0) | {"wide": np.ones((2, 9, 4, 4), np.float16)}
    object.__setattr__(model, "maps", lambda epoch: same)
    assert np.isfinite(embedding(model, "wide", 0)).all()


def test_without_diptest_it_says_what_to_install_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install diptest"):
        clusterability([tmp_path])


@pytest.mark.parametrize("dim", [2, 3])
def test_any_model_is_measured_on_images_if_it_kept_no_snapshots(tmp_path, dim):
    folder = write_model(tmp_path / "model", dim)
    images = write_images(tmp_path / "images", count=5, shape=(24, 24, 24) if dim == 3 else (6, 24, 24))
    result = clusterability([folder], images=images)
    assert result.problems == ()
    assert set(result.values.epoch) == {1000}  # where its checkpoint says it is
    assert result.values.hopkins.notna().any()
    model = TrainedModel.read(folder)
    network, layout = model.network("0"), channel_layout(model.network("0"))
    assert list(result.values.layer) == list(layout.widths)
    maps = result.models[0].maps(1000)
    assert {name: map_.shape[:2] for name, map_ in maps.items()} == {n: (4, w) for n, w in layout.widths.items()}
    # The first case by hand: its middle slice or block, through the first layer.
    voxels = preprocess(model, *read_case(model, case_of(images / "case_0_0000.nii.gz", model)))[0]
    size = model.patch_size
    lower = [(length - wanted) // 2 for length, wanted in zip(voxels.shape[-dim:], size, strict=True)]
    assert min(lower) >= 0
    block = voxels[:, voxels.shape[1] // 2] if dim == 2 else voxels
    block = block[(slice(None), *(slice(a, a + n) for a, n in zip(lower, size, strict=True)))]
    first = next(iter(layout.widths))
    with torch.inference_mode():
        expected = pooled(network.get_submodule(first)(block[None]))
    np.testing.assert_allclose(maps[first][:1], expected, atol=1e-3)


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no image in nnU-Net's naming"):
        clusterability([write_model(tmp_path / "model")], images=tmp_path)
