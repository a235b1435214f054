from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from skimage import io

from nnunet_sauron.model.evaluation import CaseScore, Segmentations, evaluate_folder, mean_score, score_class

LABELS = Segmentations({"background": 0, "organ": 1, "lesion": 2})
SPACING = (3.0, 1.0, 0.5)  # mm, in z, y, x


def save(path: Path, array: np.ndarray, spacing: tuple[float, ...] = SPACING) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    SimpleITK.WriteImage(image, str(path))


def mask(*voxels: tuple[int, ...], shape: tuple[int, ...] = (8, 10, 12)) -> np.ndarray:
    array = np.zeros(shape, dtype=bool)
    for voxel in voxels:
        array[voxel] = True
    return array


def test_folder_scores_match_the_hand_computed_anisotropic_case(tmp_path):
    # One voxel each for the organ, apart by 1, 2, 3 voxels: sqrt(3^2 + 2^2 + 1.5^2) mm, no overlap.
    # For the lesion two plates of 5 x 5 voxels, two slices of 3 mm apart plus a common one.
    prediction, reference = np.zeros((2, 8, 10, 12), dtype=np.uint8)
    reference[1, 1, 1] = prediction[2, 3, 4] = 1
    reference[4, 4:9, 5:10] = prediction[4, 4:9, 5:10] = 2
    prediction[6, 4:9, 5:10] = 2
    save(tmp_path / "predictions" / "case_1.nii.gz", prediction)
    save(tmp_path / "references" / "case_1.nii.gz", reference)
    (tmp_path / "predictions" / "plans.json").write_text("{}")

    (score,) = evaluate_folder(tmp_path / "predictions", tmp_path / "references", LABELS)

    assert score.case == "case_1"
    assert score.values("dice") == pytest.approx({"organ": 0.0, "lesion": 2 * 25 / (25 + 50)})
    assert score.values("hd95") == pytest.approx({"organ": math.sqrt(9 + 4 + 2.25), "lesion": 6.0})
    # Plates of one slice are all surface: of 25 + 50 voxels the 25 + 25 of the common slice are near the other one.
    assert score.values("surface_dice") == pytest.approx({"organ": 0.0, "lesion": 50 / 75})
    assert score.values("reference_ml") == pytest.approx({"organ": 0.0015, "lesion": 25 * 0.0015})
    assert score.values("volume_error") == pytest.approx({"organ": 0.0, "lesion": 1.0})
    (tolerant,) = evaluate_folder(tmp_path / "predictions", tmp_path / "references", LABELS, tolerance_mm=6.0)
    assert tolerant.values("surface_dice") == pytest.approx({"organ": 1.0, "lesion": 1.0})


def test_regions_are_unions_and_ignored_voxels_are_not_judged(tmp_path):
    prediction, reference = np.zeros((2, 4, 6, 8), dtype=np.uint8)
    reference[1, 1, 1:5] = [1, 1, 2, 3]
    prediction[1, 1, 1:5] = [1, 2, 2, 2]
    prediction[2, 2, 2:6], reference[2, 2, 2:6] = 1, 9
    save(tmp_path / "predictions" / "case_1.nii.gz", prediction)
    save(tmp_path / "references" / "case_1.nii.gz", reference)
    labels = {"background": 0, "organ": (1, 2), "lesion": [2]}
    (score,) = evaluate_folder(tmp_path / "predictions", tmp_path / "references", Segmentations(labels, 9))
    assert score.values("dice") == pytest.approx({"organ": 2 * 3 / (3 + 4), "lesion": 2 * 1 / (1 + 3)})
    (judged,) = evaluate_folder(tmp_path / "predictions", tmp_path / "references", Segmentations(labels))
    assert judged.values("dice")["organ"] == pytest.approx(2 * 3 / (3 + 8))


def test_hd95_passes_over_a_single_far_voxel():
    line = mask(*((4, 5, x) for x in range(40)), shape=(8, 10, 42))
    with_outlier = line.copy()
    with_outlier[0, 0, 41] = True
    assert score_class(with_outlier, line, SPACING).hd95 == 0


def test_2d_masks_are_scored():
    score = score_class(mask((1, 1), shape=(6, 6)), mask((1, 3), shape=(6, 6)), (1.0, 0.5))
    assert (score.dice, score.hd95, score.predicted_ml) == (0.0, pytest.approx(1.0), pytest.approx(0.005))


def test_empty_masks_are_undefined_and_counted():
    some, none = mask((1, 1, 1)), mask()
    scores = [
        CaseScore("missed", {"organ": score_class(none, some, SPACING)}),
        CaseScore("invented", {"organ": score_class(some, none, SPACING)}),
        CaseScore("absent", {"organ": score_class(none, none, SPACING)}),
        CaseScore("found", {"organ": score_class(some, some, SPACING)}),
    ]
    for metric, expected in (
        ("dice", [0, 0, math.nan, 1]),
        ("surface_dice", [0, 0, math.nan, 1]),
        ("hd95", [math.nan, math.nan, math.nan, 0]),
        ("volume_error", [-1, math.nan, math.nan, 0]),
        ("absolute_volume_error", [1, math.nan, math.nan, 0]),
    ):
        assert [score.mean(metric) for score in scores] == pytest.approx(expected, nan_ok=True), metric

    dice, hd95 = mean_score(scores, "dice"), mean_score(scores, "hd95")
    assert (dice.value, dice.defined, dice.undefined) == (pytest.approx(1 / 3), 3, 1)
    assert (hd95.value, hd95.defined, hd95.undefined) == (0, 1, 3)


def test_mean_of_nothing_defined_is_nan():
    mean = mean_score([CaseScore("absent", {"organ": score_class(mask(), mask(), SPACING)})], "hd95")
    assert math.isnan(mean.value)
    assert (mean.defined, mean.undefined) == (0, 1)


def test_pictures_have_no_millimetres(tmp_path):
    for folder, shift in (("predictions", 2), ("references", 0)):
        picture = np.zeros((40, 40), np.uint8)
        picture[10 + shift : 20 + shift, 10:20] = 1
        (tmp_path / folder).mkdir()
        io.imsave(tmp_path / folder / "case.png", picture, check_contrast=False)
    kind = Segmentations({"background": 0, "organ": 1}, None, ".png", NaturalImage2DIO())
    notes = []
    (score,) = evaluate_folder(tmp_path / "predictions", tmp_path / "references", kind, on_note=notes.append)
    assert score.values("hd95") == {"organ": 2.0}
    assert len(notes) == 1 and "as if voxels had 1 mm" in notes[0]


def test_a_missing_prediction_is_named(tmp_path):
    save(tmp_path / "references" / "case_7.nii.gz", np.zeros((4, 4, 4), dtype=np.uint8))
    (tmp_path / "predictions").mkdir()
    with pytest.raises(FileNotFoundError, match="case_7.nii.gz"):
        evaluate_folder(tmp_path / "predictions", tmp_path / "references", LABELS)


def test_a_folder_without_references_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no reference"):
        evaluate_folder(tmp_path, tmp_path, LABELS)


@pytest.mark.parametrize(("shape", "spacing"), [((4, 4, 5), SPACING), ((4, 4, 4), (1.0, 1.0, 1.0))])
def test_a_prediction_of_other_voxels_is_refused(tmp_path, shape, spacing):
    save(tmp_path / "references" / "case.nii.gz", np.zeros((4, 4, 4), dtype=np.uint8))
    save(tmp_path / "predictions" / "case.nii.gz", np.zeros(shape, dtype=np.uint8), spacing)
    with pytest.raises(ValueError, match="same voxels"):
        evaluate_folder(tmp_path / "predictions", tmp_path / "references", LABELS)


def test_a_slice_stored_as_a_volume_is_scored_as_a_slice():
    # In 3D every voxel of a single slice would be surface.
    reference, prediction = np.zeros((2, 1, 40, 40), dtype=bool)
    reference[0, 10:30, 10:30], prediction[0, 10:30, 16:36] = True, True
    flat = score_class(prediction[0], reference[0], (1.0, 1.0))
    assert score_class(prediction, reference, (999.0, 1.0, 1.0)) == flat
    assert flat.hd95 == pytest.approx(6)
    assert flat.predicted_ml == pytest.approx(4)  # square centimetres


def test_names_with_dots_are_different_cases(tmp_path):
    for name in ("1.2.840.1", "1.2.840.2"):
        for folder in ("predictions", "references"):
            save(tmp_path / folder / f"{name}.nii.gz", np.ones((4, 4, 4), dtype=np.uint8))
    scores = evaluate_folder(tmp_path / "predictions", tmp_path / "references", LABELS)
    assert [score.case for score in scores] == ["1.2.840.1", "1.2.840.2"]


def test_spacing_is_what_nnunets_reader_for_the_data_tells(tmp_path):
    reader = Tiff3DIO()
    for folder, at in (("predictions", 3), ("references", 1)):
        (tmp_path / folder).mkdir()
        mask = np.zeros((8, 8, 8), dtype=np.uint8)
        mask[at, 2:5, 2:5] = 1
        reader.write_seg(mask, str(tmp_path / folder / "case_1.tif"), {"spacing": (5.0, 0.5, 0.5)})
    kind = Segmentations({"organ": 1}, ending=".tif", reader=reader)
    (score,) = evaluate_folder(tmp_path / "predictions", tmp_path / "references", kind)
    assert score.values("hd95") == pytest.approx({"organ": 10.0})


def ball(shape: tuple[int, ...], centre: tuple[int, ...], radius: float, spacing: tuple[float, ...]) -> np.ndarray:
    offsets = (np.indices(shape).T - centre) * spacing
    return ((offsets**2).sum(-1) <= radius**2).T


def two_balls() -> np.ndarray:
    shape = (12, 30, 60)
    return ball(shape, (3, 8, 20), 5.2, SPACING) | ball(shape, (8, 24, 40), 6.3, SPACING)


# Prediction, reference, spacing, tolerance; Dice, HD95 and surface Dice as MONAI 1.6.1 computed them from the masks in
# 15 voxels of margin: compute_dice, compute_hausdorff_distance(percentile=95) and compute_surface_dice.
OF_MONAI = {
    "anisotropic": (
        ball((12, 30, 60), (5, 14, 30), 9.1, SPACING), ball((12, 30, 60), (6, 15, 33), 8.2, SPACING), SPACING, 1.0,
        (0.678275, 3.741657, 0.349232),
    ),
    "one in the other": (
        ball((20, 20, 20), (10, 9, 10), 3.3, (1, 1, 1)), ball((20, 20, 20), (10, 10, 10), 8.4, (1, 1, 1)), (1, 1, 1),
        5.0, (0.11036, 6.082763, 0.502604),
    ),
    "at the border": (
        ball((10, 30, 60), (0, 14, 30), 9.1, SPACING), ball((10, 30, 60), (1, 14, 31), 9.1, SPACING), SPACING, 0.5,
        (0.810722, 3.0, 0.561876),
    ),
    "far parts": (
        two_balls(), ball((12, 30, 60), (8, 23, 41), 6.6, SPACING), SPACING, 2.0, (0.668797, 20.757217, 0.764228),
    ),
    "an image": (
        ball((40, 50), (20, 20), 9.7, (0.7, 1.3)), ball((40, 50), (22, 22), 9.2, (0.7, 1.3)), (0.7, 1.3), 1.4,
        (0.798046, 3.461864, 0.387931),
    ),
    "as far as the tolerance": (
        ball((30, 30), (12, 12), 0.75, (0.1, 0.1)), ball((30, 30), (15, 12), 0.75, (0.1, 0.1)), (0.1, 0.1), 0.3,
        (0.745763, 0.3, 1.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OF_MONAI)
def test_scores_are_those_of_monai(case):
    *arguments, expected = OF_MONAI[case]
    score = score_class(*arguments)
    assert (score.dice, score.hd95, score.surface_dice) == pytest.approx(expected, abs=2e-6)


def test_what_is_wrong_with_a_case_is_told_and_the_others_are_scored(tmp_path):
    for name in ("case_1", "case_2"):
        for folder in ("predictions", "references"):
            save(tmp_path / folder / f"{name}.nii.gz", np.ones((4, 4, 4), dtype=np.uint8))
    (tmp_path / "predictions" / "case_1.nii.gz").unlink()
    told, seen = [], []
    scores = evaluate_folder(
        tmp_path / "predictions", tmp_path / "references", LABELS, on_error=told.append, after_case=seen.append
    )
    assert [score.case for score in scores] == ["case_2"]
    assert "case_1.nii.gz has no prediction" in told[0]
    assert seen == ["case_1.nii.gz", "case_2.nii.gz"]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of predictions.*nowhere"):
        evaluate_folder(tmp_path / "nowhere", tmp_path, LABELS)


def test_a_class_that_few_cases_have_counts_as_much_as_another():
    """As in nnU-Net's foreground_mean: the mean over classes of their means over cases."""
    absent = score_class(mask(), mask(), SPACING)
    full, part = score_class(mask((2, 2, 2)), mask((2, 2, 2)), SPACING), score_class(mask(), mask((2, 2, 2)), SPACING)
    scores = [CaseScore(str(number), {"often": full, "rare": absent}) for number in range(4)]
    scores.append(CaseScore("4", {"often": full, "rare": part}))
    mean = mean_score(scores, "dice")
    assert (mean.value, mean.defined, mean.undefined) == (0.5, 6, 4)
