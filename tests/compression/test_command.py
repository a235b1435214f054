"""`nnUNetv2_sauron compress` in process on a small model; the real commands are in tests/integration."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from matplotlib.figure import Figure

from nnunet_sauron.cli import main
from nnunet_sauron.compression.agreement import Segmenter
from nnunet_sauron.compression.compressor import FoldCompressor
from nnunet_sauron.compression.goal import Goal
from nnunet_sauron.compression.images import batches, patches
from nnunet_sauron.compression.stages import UniformStages
from nnunet_sauron.model.cases import find_cases
from nnunet_sauron.model.trained import TrainedModel
from nnunet_sauron.pruning import (
    CostModel,
    channel_layout,
    count_parameters,
    merge_channels,
    position_weights,
    rank_units,
)
from nnunet_sauron.pruning.stages import stage_rankings
from nnunet_sauron.pruning.timing import Timing
from nnunet_sauron.pruning.tolerance import weighted

from ..full_disk import full_disk
from .small_model import write_images, write_model

SHAPE = (3, 24, 24)  # of an image


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("nnunet_sauron_debug", "0")
    write_images(tmp_path / "images", shape=SHAPE, labels=tmp_path / "labels")
    return tmp_path


def compress(root, *words, model="model", output="small") -> int:
    return main(["compress", "-m", str(root / model), "-i", str(root / "images"), "-o", str(root / output), *words])


def what_is_left(root, fold: str, cost: str) -> float:
    old, new = (TrainedModel.read(root / name, [fold]).network(fold) for name in ("model", "small"))
    measure = getattr(CostModel(old, [16] * (next(old.parameters()).ndim - 2), 1), cost)
    return measure(channel_layout(new).widths) / measure(channel_layout(old).widths)


@pytest.mark.parametrize(("dim", "architecture"), [(2, "plain"), (3, "plain"), (2, "resenc"), (3, "resenc")])
def test_the_target_is_met_and_nearly_used_up(folders, monkeypatch, dim, architecture):
    monkeypatch.setattr("nnunet_sauron.compression.images.LEAST_PATCHES", 1)
    write_model(folders / "model", dim, architecture=architecture, widths=(32, 40, 48))
    assert compress(folders, "--macs", "0.6") == 0
    assert 0.585 < what_is_left(folders, "0", "macs") <= 0.6


def test_every_fold_gets_its_own_widths_and_its_own_weights(folders):
    write_model(folders / "model", folds=(0, 2, "all"))
    assert compress(folders, "--params", "0.5", "-f", "0", "2", "all") == 0
    small = TrainedModel.read(folders / "small", every_fold=True)
    widths = {fold: channel_layout(small.network(fold)).widths for fold in small.checkpoints}
    assert list(widths) == ["0", "2", "all"] and widths["0"] != widths["2"]
    assert all(what_is_left(folders, fold, "parameters") <= 0.5 for fold in widths)


def test_channels_in_a_fourth_axis_are_named_before_any_work(folders, capsys):
    write_model(folders / "model", 3, channels=("T1", "T2"))
    for file in (folders / "images").iterdir():
        volume = SimpleITK.ReadImage(str(file))
        SimpleITK.WriteImage(SimpleITK.JoinSeries(volume, volume), str(file))
    assert compress(folders, "--macs", "0.5") == 2
    said = capsys.readouterr().err
    assert "case_0_0000.nii.gz has 4 axes" in said and "Save each channel as a file of its own" in said
    assert "patches of" not in said and not (folders / "small").exists()


def test_only_the_folds_asked_for(folders):
    write_model(folders / "model", folds=(0, 1))
    assert compress(folders, "--tolerance", "0.1", "-f", "1") == 0
    assert [path.name for path in (folders / "small").glob("fold_*")] == ["fold_1"]


def test_a_tolerance_of_nearly_nothing_changes_nothing(folders, capsys):
    write_model(folders / "model")
    assert compress(folders, "--tolerance", "1e-12", "--json") == 0
    described = json.loads(capsys.readouterr().out)
    assert described["folds"]["0"]["after"] == described["folds"]["0"]["before"]
    agreement = described["agreement_dice"]
    assert set(agreement) == {"low", "high"}
    assert all(value == 1 or value is None for value in agreement.values()) and 1 in agreement.values()


def test_agreement_is_that_of_nnunets_own_prediction(folders, capsys):
    write_model(folders / "model")
    assert compress(folders, "--macs", "0.5", "--json") == 0
    described = json.loads(capsys.readouterr().out)
    notes = json.loads((folders / "small" / "compression.json").read_text())
    held_out = {path.name[:6] for path in (folders / "images").iterdir()} - set(notes["fitted_on"])
    assert len(held_out) == 1
    (case,) = held_out
    for name in ("model", "small"):
        predictor = TrainedModel.read(folders / name).predictor(torch.device("cpu"))
        predictor.predict_from_files_sequential(
            [[str(folders / "images" / f"{case}_0000.nii.gz")]], [str(folders / f"by_{name}")]
        )
    old, new = (
        SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folders / f"by_{n}.nii.gz"))) for n in ("model", "small")
    )
    for name, value in {"low": 1, "high": 2}.items():
        dice = 2 * ((old == value) & (new == value)).sum() / ((old == value).sum() + (new == value).sum())
        assert described["agreement_dice"][name] == pytest.approx(dice, nan_ok=True)


def test_labels_judge_both_models(folders, capsys):
    write_model(folders / "model")
    assert compress(folders, "--macs", "0.5", "--json", "--labels", str(folders / "labels")) == 0
    described = json.loads(capsys.readouterr().out)
    for model in ("old_model", "new_model"):
        assert set(described[model]) == {"dice", "hd95"} and 0 < described[model]["dice"]["low"] < 1
    summary = json.loads((folders / "small/fold_0/validation/summary.json").read_text())
    classes = described["new_model"]["dice"].values()
    assert summary["foreground_mean"]["Dice"] == pytest.approx(sum(classes) / len(classes), abs=0.01)


def test_agreement_is_not_passed_off_as_dice(folders):
    write_model(folders / "model")
    assert compress(folders, "--tolerance", "1e-12") == 0
    summary = json.loads((folders / "small/fold_0/validation/summary.json").read_text())
    assert summary["foreground_mean"]["Dice"] is None and summary["metric_per_case"] == []
    assert summary["agreement_with_the_old_model"]["Dice"] == 1


def test_voxels_of_the_ignore_label_are_not_judged(folders, capsys):
    write_model(folders / "model", ignore=3)
    dice = []
    for mark in (False, True):
        for path in (folders / "labels").iterdir():
            labels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
            labels[:, :12] = 3 if mark else 0
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(labels), str(path))
        words = ("--tolerance", "1e-12", "--json", "--labels", str(folders / "labels"))
        assert compress(folders, *words, output=f"small_{mark}") == 0
        dice.append(json.loads(capsys.readouterr().out)["old_model"]["dice"]["low"])
    assert 0 < dice[0] < dice[1]  # what was segmented there counted as wrong


def test_widths_keep_to_multiples(folders, capsys):
    write_model(folders / "model")
    assert compress(folders, "--macs", "0.7", "--round-to", "2", "--json") == 0
    widths = json.loads(capsys.readouterr().out)["folds"]["0"]["after"].values()
    assert all(width % 2 == 0 for width in widths)


def test_latency_is_met_by_what_the_clock_says(folders, monkeypatch):
    """The clock here counts parameters; what small networks take on a busy machine is chance."""

    def clock(whole, narrow, input_shape, device):
        return count_parameters(narrow) / count_parameters(whole), False

    monkeypatch.setattr("nnunet_sauron.compression.compressor.time_left", clock)
    write_model(folders / "model")
    assert compress(folders, "--latency", "0.7") == 0
    assert 0.5 < what_is_left(folders, "0", "parameters") <= 0.7


def test_times_of_a_busy_machine_are_said_to_be_so(folders, monkeypatch, capsys):
    def clock(networks, input_shape, **_):
        return {name: Timing(1.0, 0.9, 1.4, repeats=9, threads=1, device="cpu") for name in networks}

    monkeypatch.setattr("nnunet_sauron.compression.compressor.time_networks", clock)
    write_model(folders / "model")
    assert compress(folders, "--macs", "0.5") == 0
    assert "Network times scatter by more than 30%: this machine was busy" in capsys.readouterr().err
    assert json.loads((folders / "small/compression.json").read_text())["folds"]["0"]["busy"]


def test_a_clock_that_finds_the_old_network_fast_enough_is_not_believed(folders, monkeypatch, capsys):
    monkeypatch.setattr("nnunet_sauron.compression.compressor.time_left", lambda *_: (0.5, True))
    write_model(folders / "model")
    assert compress(folders, "--latency", "0.7") == 2
    assert "--latency 0.7 cannot be judged" in capsys.readouterr().err
    assert not (folders / "small").exists()


def test_the_trade_off_is_that_of_the_first_fold_that_was_given(folders, capsys):
    write_model(folders / "model", folds=(0, 1, 2))
    assert compress(folders, "--dry-run", "-f", "1", "2", "--json") == 0, capsys.readouterr().err


def test_a_full_temporary_folder_is_named(folders, monkeypatch, capsys):
    write_model(folders / "model")
    write = SimpleITK.WriteImage

    def write_to_full_disk(*arguments):
        with full_disk(room=20):
            write(*arguments)  # which tells nothing

    monkeypatch.setattr(SimpleITK, "WriteImage", write_to_full_disk)
    assert compress(folders, "--macs", "0.5") == 2
    said = capsys.readouterr().err
    assert "The temporary folder /" in said and "TMPDIR" in said and "give the same command again" in said


def test_provenance_stands_in_the_folder_and_in_every_checkpoint(folders):
    write_model(folders / "model")
    assert compress(folders, "--macs", "0.5") == 0
    notes = json.loads((folders / "small" / "compression.json").read_text())
    assert notes["goal"] == {"macs": 0.5} and notes["round_to"] == 1
    assert notes["source"] == str(folders / "model") and notes["source_trainer"] == "nnUNetTrainer"
    checkpoint = torch.load(folders / "small/fold_0/checkpoint_final.pth", weights_only=False)
    assert checkpoint["compression"]["folds"]["0"]["after"] == notes["folds"]["0"]["after"]
    assert checkpoint["trainer_name"] == "CompressedTrainer" and "optimizer_state" not in checkpoint
    assert (folders / "small/plans.json").read_bytes() == (folders / "model/plans.json").read_bytes()


def test_every_fold_has_a_picture_of_its_training_or_of_its_widths(folders):
    write_model(folders / "model", folds=(0, 1))
    pictures = [folders / f"model/fold_{fold}/progress.png" for fold in (0, 1)]
    pictures[0].write_text("of the training")
    pictures[1].unlink()
    assert compress(folders, "--macs", "0.5") == 0
    kept, drawn = ((folders / f"small/fold_{fold}/progress.png").read_bytes() for fold in (0, 1))
    assert kept == b"of the training" and drawn.startswith(b"\x89PNG")


def test_a_dry_run_draws_the_trade_off_and_writes_no_model(folders, capsys):
    write_model(folders / "model")
    assert compress(folders, "--dry-run", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    channels = [sum(row["after"].values()) for row in rows]
    assert len(rows) == 6 and channels == sorted(channels, reverse=True) and channels[0] > channels[-1]
    new = {path.name for path in folders.iterdir()} - {"images", "labels", "model"}
    assert new == {"small_trade_off.png"}


def test_a_dry_run_beside_a_goal_shows_what_that_gives_and_judges_by_labels(folders, capsys, monkeypatch):
    write_model(folders / "model")
    monkeypatch.setattr("nnunet_sauron.compression.command.TOLERANCES", (0.02,))
    words = "--dry-run", "--macs", "0.6", "--labels", str(folders / "labels")
    assert compress(folders, *words, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    left = [row["macs"][1] / row["macs"][0] for row in rows]
    assert len(rows) == 2 and sum(0.55 < part <= 0.6 for part in left) >= 1
    assert all(0 < row[name]["dice"]["low"] < 1 for row in rows for name in ("old_model", "new_model"))
    monkeypatch.setenv("COLUMNS", "150")
    assert compress(folders, *words) == 0
    assert "labels (old:" in capsys.readouterr().out


def test_a_trade_off_whose_picture_cannot_be_written_is_printed(folders, capsys, monkeypatch):
    def half(figure, path, **_):
        Path(path).write_text("half")
        raise OSError("No space left on device")

    write_model(folders / "model")
    monkeypatch.setattr("nnunet_sauron.compression.command.TOLERANCES", (0.2,))
    monkeypatch.setattr(Figure, "savefig", half)
    assert compress(folders, "--dry-run", "--json") == 0
    captured = capsys.readouterr()
    (row,) = json.loads(captured.out)
    assert "small_trade_off.png: No space left" in row["remarks"][-1] and "Nothing was written" in captured.err
    assert not list(folders.glob("small*"))


def test_a_dry_run_rounds_as_the_run_that_follows(folders, capsys, monkeypatch):
    write_model(folders / "model")
    monkeypatch.setattr("nnunet_sauron.compression.command.TOLERANCES", (0.2,))
    assert compress(folders, "--dry-run", "--json", "--round-to", "2") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert compress(folders, "--tolerance", "0.2", "--json", "--round-to", "2") == 0
    assert row["after"] == json.loads(capsys.readouterr().out)["folds"]["0"]["after"]


def test_a_checkpoint_holds_each_weight_once(folders):
    """nnU-Net's modules have several names; a file of three copies would not be a smaller model."""
    write_model(folders / "model", widths=(32, 32, 32))
    assert compress(folders, "--macs", "0.9") == 0
    sizes = [(folders / name / "fold_0/checkpoint_final.pth").stat().st_size for name in ("model", "small")]
    assert sizes[1] < sizes[0]


def test_a_dry_run_compares_one_fold_with_itself(folders, capsys, monkeypatch):
    write_model(folders / "model", folds=(0, 1, 2))
    monkeypatch.setattr("nnunet_sauron.compression.command.TOLERANCES", (1e-12,))
    assert compress(folders, "--dry-run", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert [value for value in row["agreement_dice"].values() if value is not None] == [1.0] * 2


def test_the_table_shows_layers_cost_and_agreement(folders, capsys):
    write_model(folders / "model")
    assert compress(folders, "--macs", "0.5", "--labels", str(folders / "labels")) == 0
    printed = capsys.readouterr()
    for said in ("encoder.stages.0.0.convs.0", "parameters", "MACs of one patch", "network time", "agreement", "HD95",
                 "measured on 1 held-out", "nnUNetv2_predict_from_modelfolder"):  # fmt: skip
        assert said in printed.out
    assert "fold 0: merging" in printed.err


def test_a_single_image_is_fitted_on_and_nothing_is_compared(folders, capsys):
    write_model(folders / "model")
    for path in list((folders / "images").iterdir())[1:]:
        path.unlink()
    assert compress(folders, "--macs", "0.5") == 0
    assert "No image was held out" in capsys.readouterr().out


@pytest.mark.parametrize("dry_run", [False, True])
def test_that_nothing_was_there_to_be_compared_is_said(folders, capsys, monkeypatch, dry_run):
    monkeypatch.setattr("nnunet_sauron.compression.command.TOLERANCES", (0.003, 0.01))
    write_model(folders / "model")

    def only_background(weights) -> None:
        for name in weights:
            if "seg_layers" in name and name.endswith("bias"):
                weights[name] = torch.tensor([1e3, 0, 0])

    replace_weights(folders, only_background)
    assert compress(folders, "--tolerance", "0.01", "--json", *(["--dry-run"] if dry_run else [])) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    (remark,) = found[0]["remarks"] if dry_run else found["remarks"]
    assert remark.startswith("Neither model finds any class") and f"WARNING: {remark}" in captured.err


def replace_images(root, count: int) -> None:
    """One slice each, as large as the patch."""
    shutil.rmtree(root / "images")
    write_images(root / "images", count=count, shape=(1, 16, 16))


def test_images_of_the_size_of_the_patch_are_enough_for_wide_layers(folders):
    """Of as many positions a channel as nnU-Net's default 2D network has in 20 images: 1.3 before patches are made."""
    write_model(folders / "model", widths=(8, 16, 48))
    replace_images(folders, count=4)
    assert compress(folders, "--macs", "0.5") == 0
    assert 0.3 < what_is_left(folders, "0", "macs") <= 0.5


def test_layers_with_too_few_voxels_are_left_as_they_are_and_named(folders, capsys):
    write_model(folders / "model", widths=(4, 8, 64))
    replace_images(folders, count=2)
    assert compress(folders, "--tolerance", "0.5") == 0
    captured = capsys.readouterr()
    deepest = ["encoder.stages.2.0.convs.0", "encoder.stages.2.0.convs.1"]
    said = " ".join(captured.err.split())
    assert "too few for a stable fit of encoder.stages.2.0.convs.0 (64 channels, 16 positions a patch), enc" in said
    assert captured.out.count("left alone") == 2
    fold = json.loads((folders / "small/compression.json").read_text())["folds"]["0"]
    assert fold["left_alone"] == deepest and all(fold["after"][name] == 64 for name in deepest)
    others = [name for name in fold["before"] if name not in deepest]
    assert any(fold["after"][name] < fold["before"][name] for name in others)


def replace_weights(root, change) -> None:
    path = root / "model/fold_0/checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    change(checkpoint["network_weights"])
    torch.save(checkpoint, path)


class TestErrors:
    @pytest.fixture
    def model(self, folders):
        write_model(folders / "model")
        return folders

    def refused(self, root, capsys, *words, said: str, **options) -> None:
        before = sorted(root.rglob("*"))
        assert compress(root, *words, **options) == 2
        assert said in capsys.readouterr().err
        assert sorted(root.rglob("*")) == before

    def test_a_target_out_of_reach(self, model, capsys):
        self.refused(model, capsys, "--macs", "0.001", said="A target of 0.001 cannot be met")

    @pytest.mark.parametrize("words", [("--macs", "1.5"), ("--params", "0"), ("--latency", "-1")])
    def test_a_target_that_is_no_fraction(self, model, capsys, words):
        self.refused(model, capsys, *words, said="fraction between 0 and 1")

    def test_a_tolerance_that_nothing_meets(self, model, capsys):
        self.refused(model, capsys, "--tolerance", "0", said="tolerance is a number above 0")

    def test_an_output_that_exists(self, model, capsys):
        self.refused(model, capsys, "--macs", "0.5", said="images exists", output="images")

    def test_an_output_that_is_a_link_to_nowhere(self, model, capsys):
        (model / "link").symlink_to(model / "nowhere")
        try:
            self.refused(model, capsys, "--macs", "0.5", said="link exists", output="link")
        finally:
            (model / "link").unlink()

    def test_a_folder_that_is_no_model(self, model, capsys):
        self.refused(model, capsys, "--macs", "0.5", said="has no plans.json", model="images")

    def test_a_fold_that_is_not_there(self, model, capsys):
        self.refused(
            model,
            capsys,
            "--macs",
            "0.5",
            "-f",
            "3",
            said="has no fold 3; there are 0.",
        )

    def test_too_few_voxels(self, folders, capsys, monkeypatch):
        monkeypatch.setattr(Segmenter, "_predict", lambda *_: pytest.fail("segments already"))
        monkeypatch.setattr("nnunet_sauron.compression.images.LEAST_SAMPLES_PER_CHANNEL", 10**6)
        write_model(folders / "model")
        self.refused(folders, capsys, "--macs", "0.5", said="Too few voxels for a stable fit")

    def test_a_target_that_the_layers_with_enough_voxels_cannot_meet(self, folders, capsys):
        write_model(folders / "model", widths=(4, 8, 64))
        replace_images(folders, count=2)
        said = "need not be left alone: encoder.stages.2.0.convs.0, encoder.stages.2.0.convs.1."
        self.refused(folders, capsys, "--macs", "0.1", said=said)

    def test_labels_that_lack_a_case(self, model, capsys):
        (model / "empty").mkdir()
        self.refused(model, capsys, "--macs", "0.5", "--labels", str(model / "empty"), said="--labels needs one for")

    def test_segmentations_in_place_of_images_are_remarked(self, model, capsys):
        warning = "every voxel of every image has the number of one of the model's classes"
        assert compress(model, "--macs", "0.9") == 0
        assert warning not in capsys.readouterr().err
        shutil.rmtree(model / "images")
        (model / "images").mkdir()
        for path in (model / "labels").iterdir():
            shutil.copy(path, model / "images" / path.name.replace(".nii.gz", "_0000.nii.gz"))
        shutil.rmtree(model / "small")
        compress(model, "--macs", "0.9")
        assert warning in " ".join(capsys.readouterr().err.split())

    def test_a_dataset_json_that_was_edited_since(self, model, capsys):
        path = model / "model/dataset.json"
        told = json.loads(path.read_text())
        path.write_text(json.dumps({**told, "labels": {**told["labels"], "new": 3}}))
        self.refused(model, capsys, "--macs", "0.5", said="was trained on other classes than dataset.json tells")
        path.write_text(json.dumps({**told, "labels": {"background": 0, "high": 1, "low": 2}}))
        assert compress(model, "--macs", "0.5") == 0
        assert "Fold 0 was trained on other classes than dataset.json tells" in capsys.readouterr().err

    def test_weights_of_another_architecture(self, model, capsys):
        replace_weights(model, lambda weights: weights.pop("encoder.stages.0.0.convs.0.conv.weight"))
        self.refused(model, capsys, "--macs", "0.5", said="another architecture than its plans describe")

    def test_a_network_that_cannot_be_pruned(self, model, capsys):
        path = model / "model/plans.json"
        path.write_text(path.read_text().replace("unet.PlainConvUNet", "unet.Transformer"))
        self.refused(model, capsys, "--macs", "0.5", said="Transformer cannot be pruned: known are")

    def test_the_second_stage_of_a_cascade(self, model, capsys):
        path = model / "model/plans.json"
        plans = json.loads(path.read_text())
        plans["configurations"]["2d"]["previous_stage"] = "2d"
        path.write_text(json.dumps(plans))
        self.refused(model, capsys, "--macs", "0.5", said="second stage of a cascade")

    def test_a_truncated_checkpoint(self, model, capsys):
        path = model / "model/fold_0/checkpoint_final.pth"
        path.write_bytes(path.read_bytes()[:1000])
        self.refused(model, capsys, "--macs", "0.5", said="checkpoint_final.pth")

    def test_a_checkpoint_that_does_not_say_what_it_was_trained_with(self, model, capsys):
        path = model / "model/fold_0/checkpoint_final.pth"
        torch.save({"network_weights": {}}, path)
        self.refused(model, capsys, "--macs", "0.5", said="does not hold the plans it was trained with")

    def test_a_place_that_is_not_there(self, model, capsys):
        self.refused(model, capsys, "--dry-run", said="nowhere is no folder; make it first", output="nowhere/small")

    @pytest.fixture
    def nothing_ranked(self, monkeypatch):
        """What is refused late would lose the hours before it."""
        monkeypatch.setattr("nnunet_sauron.compression.compressor.rank_units", lambda *_: pytest.fail("ranked already"))

    @pytest.mark.parametrize("case", range(4))
    def test_an_image_that_cannot_be_read_whether_held_out_or_not(self, model, capsys, nothing_ranked, case):
        (model / f"images/case_{case}_0000.nii.gz").write_text("no image")
        self.refused(model, capsys, "--macs", "0.5", said=f"case_{case}_0000.nii.gz")

    def test_an_image_with_nan(self, folders, capsys, nothing_ranked):
        """SimpleITK makes zeros of them, nnU-Net's other reader of NIfTI does not."""
        model = folders
        write_model(model / "model", reader="NibabelIO")
        path = str(model / "images/case_0_0000.nii.gz")
        voxels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path))
        voxels[0, 0, 0] = np.nan
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels), path)
        self.refused(model, capsys, "--macs", "0.5", said="Case case_0 has voxels that are not finite")

    def test_labels_of_another_size(self, model, capsys, nothing_ranked):
        for path in (model / "labels").iterdir():
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.zeros((3, 4, 5), np.uint8)), str(path))
        self.refused(model, capsys, "--macs", "0.5", "--labels", str(model / "labels"), said="3, 4, 5")

    def test_a_place_that_cannot_be_written_to(self, model, capsys, monkeypatch):
        def read_only(**_):
            raise PermissionError("read-only")

        monkeypatch.setattr("nnunet_sauron.files.tempfile.TemporaryFile", read_only)
        self.refused(model, capsys, "--macs", "0.5", said="cannot be written (read-only); choose another folder")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_gpu_that_is_not_there(self, model, capsys):
        self.refused(model, capsys, "--macs", "0.5", "-device", "cuda", said="no GPU for -device cuda")

    def test_no_target(self, model, capsys):
        self.refused(model, capsys, said="Nothing to meet: give --tolerance")

    @pytest.mark.parametrize("words", [("--round-to", "0"), ("--max-images", "0")])
    def test_numbers_below_one(self, model, capsys, words):
        self.refused(model, capsys, "--macs", "0.5", *words, said="must be at least 1; got 0")

    def test_writing_that_fails_leaves_nothing(self, model, capsys, monkeypatch):
        def fails(*_):
            raise OSError("disk full")

        monkeypatch.setattr("nnunet_sauron.files.os.replace", fails)
        self.refused(model, capsys, "--macs", "0.5", said="disk full")


def test_help_does_not_import_nnunet():
    """The command's start is felt in shell scripts; what it costs is its verbs' alone."""
    code = "import sys; from nnunet_sauron.cli import main\ntry: main(['compress', '-h'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'nnunetv2' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_compressing_leaves_the_model_as_it_was_for_the_next_tolerance(folders):
    model = TrainedModel.read(write_model(folders / "model"))
    compressor = FoldCompressor(model, "0", torch.device("cpu"))
    compressor.rank(batches(patches(model, find_cases(folders / "images", model), compressor.wanted)))
    one, other, same = (compressor.merge(tolerance) for tolerance in (0.3, 0.05, 0.3))
    assert one.after != other.after
    assert all(torch.equal(tensor, same.weights[name]) for name, tensor in one.weights.items())


@pytest.mark.parametrize("uniform", [False, True])
def test_layers_are_weighed_by_what_the_goal_counts(folders, uniform):
    model = TrainedModel.read(write_model(folders / "model", widths=(8, 16, 32)))
    compressor = FoldCompressor(model, "0", torch.device("cpu"))
    compressor.rank(batches(patches(model, find_cases(folders / "images", model), compressor.wanted)))
    chooser = UniformStages([compressor]) if uniform else compressor
    cost, macs = compressor.cost, []
    for goal, counted in ((Goal(parameters=0.4), cost.parameters), (Goal(macs=0.4), cost.macs)):
        tolerance = chooser.tolerance(goal)
        after = compressor.merge(tolerance, widths=chooser.widths(tolerance) if uniform else None).after
        assert counted(after) <= 0.4 * counted(compressor.before)
        ranked = stage_rankings([compressor.ranked], chooser.stages, counted) if uniform else None
        assert chooser.rankings == (ranked or weighted(compressor.ranked, counted))
        macs.append(cost.macs(after))
    assert macs[0] > 1.2 * macs[1]  # what saves few parameters stays, although it costs many multiply-accumulates


@pytest.mark.parametrize("regions", [False, True])
def test_positions_count_by_how_unsure_the_network_is(folders, regions):
    model = TrainedModel.read(write_model(folders / "model", **({"whole": [1, 2]} if regions else {})))
    compressor = FoldCompressor(model, "0", torch.device("cpu"))
    inputs = batches(patches(model, find_cases(folders / "images", model), compressor.wanted))
    compressor.rank(inputs)
    one = compressor.merge(compressor.tolerance(Goal(macs=0.5)))
    results = {}
    for kind in (regions, not regions, None):
        network = model.network("0")
        weights = None if kind is None else position_weights(network, inputs, regions=kind)
        rankings = weighted(rank_units(network, inputs, weights, regions=regions), compressor.cost.macs)
        errors = rankings["encoder.stages.0.0.convs.0"].errors
        keep = {name: rankings[name].keep(width) for name, width in one.after.items()}
        merge_channels(network, keep, inputs, weights=weights)
        same = all(torch.equal(tensor, one.weights[name]) for name, tensor in network.state_dict().items())
        results[kind] = same, errors == compressor.rankings["encoder.stages.0.0.convs.0"].errors
    assert results == {regions: (True, True), (not regions): (False, False), None: (False, False)}


@pytest.mark.parametrize("damage", ["cut", "4D", "value", "text"])
def test_damaged_labels_are_named_before_long_work(folders, capsys, monkeypatch, damage):
    monkeypatch.setattr("nnunet_sauron.compression.compressor.rank_units", lambda *_: pytest.fail("ranked already"))
    write_model(folders / "model")
    for path in (folders / "labels").iterdir():
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-30])
        elif damage == "text":
            path.write_text("no image")
        else:
            shape = (*SHAPE, 2) if damage == "4D" else SHAPE
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.full(shape, 7, np.uint8)), str(path))
    assert compress(folders, "--macs", "0.5", "--labels", str(folders / "labels")) == 2
    said = capsys.readouterr().err
    assert str(folders / "labels" / "case_") in said and "Traceback" not in said and "/tmp/tmp" not in said


@pytest.mark.parametrize("case", range(4))
def test_an_image_that_was_cut_short_is_named_though_simpleitk_reads_it(folders, capsys, monkeypatch, case):
    monkeypatch.setattr("nnunet_sauron.compression.compressor.rank_units", lambda *_: pytest.fail("ranked already"))
    write_model(folders / "model")
    path = folders / "images" / f"case_{case}_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:-200])
    assert compress(folders, "--macs", "0.5") == 2
    assert f"{path} is damaged or was cut short" in capsys.readouterr().err
