"""What is converted passes nnU-Net's own verification, planning and preprocessing, and training finds the folds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from nnunet_sauron.dataset_conversion import atlas2, harp, rats

from ..integration.nnunet import NnUNet
from .brain_trees import write_atlas2, write_harp, write_rats
from .trees import convert


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "write_tree", "flags"),
    [(atlas2, write_atlas2, ["--link"]), (rats, write_rats, []), (harp, write_harp, ["--crop", "--crop-size", "16"])],
)
def test_nnunet_verifies_plans_and_preprocesses(
    module: ModuleType, write_tree: Callable[[Path], Path], flags: list[str], tmp_path: Path, raw: Path
) -> None:
    assert convert(module, write_tree(tmp_path / "tree"), "-d", 7, *flags) == 0
    (dataset,) = raw.iterdir()
    nnunet = NnUNet(raw, tmp_path / "nnUNet_preprocessed", tmp_path / "nnUNet_results")
    told = nnunet.run(
        "nnUNetv2_plan_and_preprocess", "-d", 7, "--verify_dataset_integrity", "-c", "2d", "-npfp", 1, "-np", 1
    )
    assert "verify_dataset_integrity Done" in told
    assert "Warning" not in told
    preprocessed = nnunet.preprocessed / dataset.name
    names = {path.name.removesuffix(".b2nd") for path in (preprocessed / "nnUNetPlans_2d").glob("*.b2nd")}
    folds = json.loads((preprocessed / "splits_final.json").read_text())
    assert folds == json.loads((dataset / "splits_final.json").read_text())
    assert all({*fold["train"], *fold["val"]} <= names for fold in folds)
