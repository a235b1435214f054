"""Which folds and which checkpoint of a model's folder are read, by every verb; and on which device."""

from __future__ import annotations

import os
import re

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_sauron import trainers
from nnunet_sauron.cli import main
from nnunet_sauron.model.device import chosen_device
from nnunet_sauron.model.trained import TrainedModel

from ..compression.small_model import write_images, write_model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_images(root / "images", count=2, shape=(2, 24, 24))
    model = write_model(root / "unfinished", folds=(0, 1, 2))
    (model / "fold_1/checkpoint_final.pth").rename(model / "fold_1/checkpoint_latest.pth")
    model = write_model(root / "best", folds=(0, 1))
    for fold in (0, 1):
        (model / f"fold_{fold}/checkpoint_final.pth").rename(model / f"fold_{fold}/checkpoint_best.pth")
    return root


class TestFolds:
    @pytest.mark.parametrize("fold", ["0,1", "fold_0", "00", "7"])
    def test_one_that_is_not_there_is_no_training_to_continue(self, tmp_path, fold):
        folder = write_model(tmp_path / "model", folds=(0, 1))
        with pytest.raises(FileNotFoundError, match=rf"has no fold {fold}; there are 0, 1\. .*: -f 0 1\.") as raised:
            TrainedModel.read(folder, [fold])
        assert "--c" not in str(raised.value)

    @pytest.mark.parametrize("verb", [("benchmark", "--repeats", "1", "-m"), ("feature_maps", "--list", "-m")])
    def test_no_other_is_read_than_the_one_that_is_used(self, tmp_path, verb, capsys):
        folder = write_model(tmp_path / "model", folds=(0, 3))
        (folder / "fold_3/checkpoint_final.pth").write_bytes(b"cut short")
        assert main([*verb, str(folder)]) == 0, capsys.readouterr().err

    @pytest.mark.parametrize(
        ("place", "said"),
        [("model/fold_0", "such as {}/model."), ("b.zip", "is a file, expected the folder"), ("b", "is a bundle, exp")],
    )
    def test_what_is_no_models_folder_is_named(self, tmp_path, place, said):
        write_model(tmp_path / "model")
        (tmp_path / "b.zip").touch()
        (tmp_path / "b").mkdir()
        (tmp_path / "b/bundle.json").touch()
        with pytest.raises(FileNotFoundError, match=re.escape(said.format(tmp_path))):
            TrainedModel.read(tmp_path / place)

    def test_a_hidden_checkpoint_is_not_recommended(self, tmp_path):
        folder = write_model(tmp_path / "model")
        (folder / "fold_0/._checkpoint_best.pth").write_bytes(b"x")
        with pytest.raises(FileNotFoundError, match="-chk checkpoint_final.pth") as raised:
            TrainedModel.read(folder, checkpoint_name="checkpoint_nope.pth")
        assert "._" not in str(raised.value)

    def test_numbered_ones_are_taken_and_all_beside_them_is_named(self, tmp_path):
        model = TrainedModel.read(write_model(tmp_path / "model", folds=(10, 2, 0, "all")))
        assert list(model.checkpoints) == ["0", "2", "10"]
        (said,) = model.remarks
        assert said == "Fold all is left out beside 0, 2, 10, as in nnU-Net's prediction; -f all takes it."
        assert list(TrainedModel.read(model.folder, ["all"]).checkpoints) == ["all"]
        assert list(TrainedModel.read(model.folder, every_fold=True).checkpoints) == ["0", "2", "10", "all"]

    def test_all_is_taken_where_it_is_alone(self, tmp_path):
        model = TrainedModel.read(write_model(tmp_path / "model", folds=("all",)))
        assert list(model.checkpoints) == ["all"] and model.remarks == []

    def test_a_copy_of_a_fold_is_no_fold(self, tmp_path):
        folder = write_model(tmp_path / "model")
        (folder / "fold_0").rename(folder / "fold_0_before")
        with pytest.raises(FileNotFoundError, match="no fold at all"):
            TrainedModel.read(folder)

    def test_one_asked_for_twice_is_read_once(self, tmp_path):
        assert list(TrainedModel.read(write_model(tmp_path / "model"), ["0", "0"]).checkpoints) == ["0"]

    def test_one_asked_for_twice_is_shown_once(self, root, tmp_path):
        assert main([*words_of("feature_maps", root, "unfinished", tmp_path / "out"), "-f", "0", "0"]) == 0
        assert (tmp_path / "out/feature_maps_1.png").is_file()


def words_of(verb: str, root, model: str, output) -> list[str]:
    folder, image = str(root / model), str(root / "images/case_0_0000.nii.gz")
    return {
        "compress": ["compress", "-m", folder, "-i", str(root / "images"), "-o", str(output), "--tolerance", "1e-9"],
        "feature_maps": ["feature_maps", "-m", folder, "-i", image, "-o", str(output)],
        "benchmark": ["benchmark", "-m", folder, "--repeats", "1"],
        "report": ["report", folder, "-o", str(output), "--timing", "0"],
        "clusterability": ["clusterability", "-m", folder, "-i", str(root / "images"), "-o", str(output)],
    }[verb]


VERBS = ("compress", "feature_maps", "benchmark", "report", "clusterability")


@pytest.mark.parametrize("verb", VERBS)
def test_an_unfinished_fold_is_named_by_every_verb(root, tmp_path, verb, capsys):
    assert main(words_of(verb, root, "unfinished", tmp_path / "out")) == 0
    captured = capsys.readouterr()
    said = " ".join((captured.out + captured.err).split())
    assert "fold_1" in said or "Fold 1 is left out: it has no checkpoint_final.pth (checkpoint_latest.pth)" in said


class TestCheckpoint:
    @pytest.mark.parametrize("verb", VERBS)
    def test_that_of_the_best_epoch_alone_is_enough(self, root, tmp_path, verb, capsys):
        words = words_of(verb, root, "best", tmp_path / "out")
        assert main(words) == 2
        assert "-chk checkpoint_best.pth" in " ".join(capsys.readouterr().err.split())
        assert main([*words, "-chk", "checkpoint_best.pth", "-f", "1"]) == 0
        assert "fold_0" not in capsys.readouterr().err

    def test_any_name_will_do(self, tmp_path):
        folder = write_model(tmp_path / "model")
        (folder / "fold_0/checkpoint_final.pth").rename(folder / "fold_0/epoch_200.model")
        assert list(TrainedModel.read(folder, checkpoint_name="epoch_200.model").checkpoints) == ["0"]

    def test_what_is_there_is_listed(self, root):
        with pytest.raises(
            FileNotFoundError, match=r"fold_0/mine.pth.*are: fold_0: checkpoint_best.pth, fold_1: check"
        ):
            TrainedModel.read(root / "best", ["0"], "mine.pth")


class TestDevice:
    def test_cuda_where_there_is_a_gpu_else_the_cpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        for there, name in ((True, "cuda"), (False, "cpu")):
            monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
            assert chosen_device() == torch.device(name)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert chosen_device("cuda:1") == torch.device("cuda", 1)
        with pytest.raises(ValueError, match="no GPU for -device cuda:2, only cuda:0, cuda:1;"):
            chosen_device("cuda:2")

    def test_mps_where_there_is_one(self, monkeypatch):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        assert chosen_device("mps").type == "mps"

    @pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "report"])
    @pytest.mark.parametrize(
        ("device", "said"),
        [
            ("cuda", "no GPU for -device cuda;"),
            ("mps", "for -device mps"),
            ("gpu", "-device gpu is not known; give cpu"),
        ],
    )
    def test_one_that_is_not_there_is_refused_by_every_verb(
        self, root, tmp_path, verb, device, said, monkeypatch, capsys
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        assert main([*words_of(verb, root, "unfinished", tmp_path / "out"), "-device", device]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out").exists()


class TestCompiling:
    def test_prediction_on_a_cpu_is_not_compiled(self, root, monkeypatch, capsys):
        monkeypatch.setenv("nnUNet_compile", "t")
        monkeypatch.setattr(torch, "compile", lambda *_: pytest.fail("compiled"))
        predictor = TrainedModel.read(root / "unfinished", ["0"]).predictor(torch.device("cpu"))
        assert predictor.predict_logits_from_preprocessed_data(torch.zeros(1, 1, 16, 16)).shape == (3, 1, 16, 16)
        assert os.environ["nnUNet_compile"] == "t" and capsys.readouterr().out == ""

    @pytest.mark.parametrize("name", trainers.__all__)
    def test_nor_is_a_trainers_validation(self, name, monkeypatch):
        seen = []
        monkeypatch.setenv("nnUNet_compile", "t")
        monkeypatch.setattr(
            nnUNetTrainer,
            "perform_actual_validation",
            lambda self, save_probabilities: seen.append((os.environ.get("nnUNet_compile"), save_probabilities)),
        )
        trainer = object.__new__(getattr(trainers, name))
        for device in ("cpu", "cuda"):
            trainer.device = torch.device(device)
            trainer.perform_actual_validation(True)
        assert seen == [(None, True), ("t", True)] and os.environ["nnUNet_compile"] == "t"
