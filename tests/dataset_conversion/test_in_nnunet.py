"""What is converted passes nnU-Net's own verification, planning and preprocessing, and training finds the folds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from nnunet_sauron.dataset_conversion import acdc, atlas2, harp, kits19, msd, rats

from ..integration.nnunet import NnUNet, voxels
from .brain_trees import write_atlas2, write_harp, write_rats
from .conftest import in_new_folders
from .trees import convert, write_acdc, write_kits19, write_msd

DATA_SETS = {
    2: (msd, lambda root: write_msd(root, channels=2), []),
    3: (atlas2, write_atlas2, ["--link"]),
    4: (rats, write_rats, []),
    5: (harp, write_harp, ["--crop", "--crop-size", "16"]),
    27: (acdc, write_acdc, ["--link"]),
    40: (kits19, write_kits19, ["--regions"]),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> NnUNet:
    """All data sets, converted, and then verified, planned and preprocessed by one command."""
    root = tmp_path_factory.mktemp("data_sets")
    with pytest.MonkeyPatch.context() as monkeypatch:
        nnunet = in_new_folders(root, monkeypatch)
        for number, (module, write_tree, flags) in DATA_SETS.items():
            assert convert(module, write_tree(root / f"download_{number}"), "-d", number, *flags) == 0
    told = nnunet.run(
        "nnUNetv2_plan_and_preprocess", "-d", *DATA_SETS, "--verify_dataset_integrity", "-c", "2d", "-npfp", 1, "-np", 1
    )
    assert told.count("verify_dataset_integrity Done") == len(DATA_SETS)
    assert "Error" not in told and "Warning" not in told
    return nnunet


@pytest.mark.parametrize("number", DATA_SETS, ids=lambda number: DATA_SETS[number][0].__name__.rpartition(".")[2])
def test_nnunet_verifies_plans_and_preprocesses(number: int, whole: NnUNet) -> None:
    converted, made = (whole.dataset_folder(root, number) for root in (whole.raw, whole.preprocessed))
    assert (made / "nnUNetPlans.json").is_file()
    splits = (made / "splits_final.json").read_text()
    assert splits == (converted / "splits_final.json").read_text()
    names = {path.name.removesuffix(".b2nd") for path in (made / "nnUNetPlans_2d").glob("*.b2nd")}
    assert all({*fold["train"], *fold["val"]} <= names for fold in json.loads(splits))


def test_a_decathlon_task_becomes_what_nnunets_own_converter_makes_of_it(nnunet: NnUNet, tmp_path: Path) -> None:
    task = write_msd(tmp_path, channels=2)
    nnunet.run("nnUNetv2_convert_MSD_dataset", "-i", task, "-overwrite_id", 3, "-np", 1)
    assert convert(msd, task) == 0
    theirs, ours = (nnunet.dataset_folder(nnunet.raw, number) for number in (3, 2))
    names = sorted(str(path.relative_to(theirs)) for path in theirs.rglob("*.nii.gz"))
    assert names == sorted(str(path.relative_to(ours)) for path in ours.rglob("*.nii.gz")) and len(names) == 20
    for name in names:
        images = [SimpleITK.ReadImage(str(folder / name)) for folder in (theirs, ours)]
        assert np.array_equal(voxels(theirs / name), voxels(ours / name))
        for geometry in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert np.allclose(*(getattr(image, geometry)() for image in images), atol=1e-5)
    described = [json.loads((folder / "dataset.json").read_text()) for folder in (theirs, ours)]
    for key in ("channel_names", "labels", "numTraining", "file_ending"):
        assert described[0][key] == described[1][key]
