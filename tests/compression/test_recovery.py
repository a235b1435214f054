"""`nnUNetv2_sauron compress --recover` in process: the small model learns from the old one, without a label."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_sauron.cli import main
from nnunet_sauron.compression import recovery, student
from nnunet_sauron.compression.augmented import AugmentedPatches, store_images
from nnunet_sauron.compression.images import patches
from nnunet_sauron.files import locked
from nnunet_sauron.model.cases import find_cases
from nnunet_sauron.model.trained import TrainedModel
from nnunet_sauron.pruning import channel_layout

from .small_model import write_images, write_model

RECOVER = "--macs", "0.3", "--json", "--recover-steps", "2", "--recover"


@pytest.fixture(scope="module", autouse=True)
def environment():
    with pytest.MonkeyPatch.context() as patched:
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            patched.delenv(variable, raising=False)
        patched.setenv("nnunet_sauron_debug", "0")
        patched.setenv("nnUNet_n_proc_DA", "0")
        yield


@pytest.fixture
def folders(tmp_path):
    write_images(tmp_path / "images", 5)
    return tmp_path


def compress(root, *words, output="small") -> int:
    return main(["compress", "-m", str(root / "model"), "-i", str(root / "images"), "-o", str(root / output), *words])


def notes(root, output="small") -> dict:
    return json.loads((root / output / "compression.json").read_text())["recovery"]


def weights(root, output="small", fold="0") -> dict:
    return torch.load(root / output / f"fold_{fold}/checkpoint_final.pth", weights_only=False)["network_weights"]


def equal(one: dict, other: dict) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def teach(root) -> None:
    """Train the folder's folds on what shows in the images; an untrained network says next to nothing."""
    plans = json.loads((root / "model/plans.json").read_text())
    plans["configurations"]["2d"]["batch_size"] = 4
    (root / "model/plans.json").write_text(json.dumps(plans))
    model = TrainedModel.read(root / "model")
    cut = torch.cat(patches(model, find_cases(root / "images", model), 16, more=False))
    labels = (cut[:, 0] > 0.3).long() + (cut[:, 0] > 1)
    regions = model.manager.get_label_manager(model.dataset_json).has_regions
    targets = torch.stack([labels > 0, labels > 1], 1) if regions else nn.functional.one_hot(labels, 3).movedim(-1, 1)
    for fold, checkpoint in model.checkpoints.items():
        network = model.network(fold).train()
        optimizer = torch.optim.Adam(network.parameters(), 0.01)
        for _ in range(60):
            output = network(cut)
            if regions:
                loss = nn.functional.binary_cross_entropy_with_logits(output, targets.float())
            else:
                loss = nn.functional.cross_entropy(output, targets.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        path = root / f"model/fold_{fold}/checkpoint_final.pth"
        torch.save({**checkpoint, "network_weights": network.state_dict()}, path)


@pytest.mark.parametrize("labels", [{}, {"low": [1, 2], "high": 2}])
def test_agreement_rises(folders, capsys, labels):
    write_model(folders / "model", widths=(16, 24, 32), **labels)
    teach(folders)
    assert compress(folders, "--macs", "0.1", "--json", "--recover-steps", "15", "--recover", "4") == 0
    printed = json.loads(capsys.readouterr().out)
    before, after = (
        np.mean(list(printed[key].values())) for key in ("agreement_dice_before_recovery", "agreement_dice")
    )
    found = notes(folders)
    assert after > before + 0.03
    assert found["agreement_before"] == pytest.approx(before, abs=0.01)
    assert found["agreement_after"] == pytest.approx(after, abs=0.01)
    assert found["epochs"] == 4 and found["steps"] == 15 and found["initial_lr"] == 0.005
    for of_fold in found["folds"].values():
        assert len(of_fold["agreement"]) == 5 and len(of_fold["loss"]) == of_fold["epochs"] == 4
        assert of_fold["agreement"][of_fold["best_epoch"]] == max(of_fold["agreement"])
        assert of_fold["loss"][-1] < of_fold["loss"][0]


def test_what_is_written_is_a_model_of_the_merged_widths_and_nothing_else(folders):
    write_model(folders / "model", 3)
    assert compress(folders, *RECOVER, "1") == 0
    assert {path.name for path in folders.iterdir()} == {"images", "model", "small"}
    checkpoint = torch.load(folders / "small/fold_0/checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == "CompressedTrainer"
    small = TrainedModel.read(folders / "small")
    after = json.loads((folders / "small/compression.json").read_text())["folds"]["0"]["after"]
    assert channel_layout(small.network("0")).widths == after
    small.predictor(torch.device("cpu")).predict_from_files_sequential(
        [[str(folders / "images/case_0_0000.nii.gz")]], [str(folders / "out")]
    )
    assert (folders / "out.nii.gz").is_file()


def test_a_checkpoint_holds_each_weight_once(folders):
    write_model(folders / "model", widths=(32, 32, 32))
    assert compress(folders, "--macs", "0.9", "--recover", "1", "--recover-steps", "2") == 0
    sizes = [(folders / name / "fold_0/checkpoint_final.pth").stat().st_size for name in ("model", "small")]
    assert sizes[1] < sizes[0]


def test_a_plain_model_of_uniform_stages_recovers_as_well(folders):
    write_model(folders / "model")
    assert compress(folders, *RECOVER, "1", "--uniform-stages") == 0
    small = TrainedModel.read(folders / "small")
    assert small.checkpoints["0"]["trainer_name"] == "nnUNetTrainer"
    predictor = small.predictor(torch.device("cpu"))
    assert predictor.network(torch.zeros(1, 1, 16, 16)).shape == (1, 3, 16, 16)
    assert notes(folders)["folds"]["0"]["epochs"] == 1


def interrupt_after(monkeypatch, epochs: int) -> None:
    """The user presses Ctrl-C once so many epochs are kept."""
    save, count = recovery.Recovery._save, [0]

    def counting(self):
        save(self)
        count[0] += self._state["running"] is not None
        if count[0] == epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(recovery.Recovery, "_save", counting)


def test_two_recoveries_of_one_output_do_not_meet(folders, capsys):
    write_model(folders / "model")
    state = folders / ".small.recovery"
    state.mkdir()
    (state / "state.pth").write_text("of the other process")
    with locked(state, folders / "small"):
        assert compress(folders, *RECOVER, "1") == 2
    assert "small is being written by another process" in capsys.readouterr().err
    assert (state / "state.pth").read_text() == "of the other process"


def test_without_a_target_in_reach_no_state_is_left(folders, capsys):
    write_model(folders / "model")
    assert compress(folders, "--macs", "0.00001", "--recover", "1") == 2
    assert {path.name for path in folders.iterdir()} == {"images", "model"}
    (folders / "small").mkdir()
    (folders / ".small.recovery").mkdir()
    assert compress(folders, *RECOVER, "1") == 2
    assert ".small.recovery is the rest of an interrupted --recover" in capsys.readouterr().err


def test_an_interrupted_run_ends_as_one_that_was_not(folders, monkeypatch, capsys):
    """Interrupted in the first fold, and once more in the second."""
    write_model(folders / "model", folds=(0, 1))
    assert compress(folders, *RECOVER, "3", output="whole") == 0
    trained = []
    train_epoch = student.StudentTraining._train_epoch
    monkeypatch.setattr(
        student.StudentTraining, "_train_epoch", lambda self, *args: trained.append(1) or train_epoch(self, *args)
    )
    for epochs, trained_so_far in ((1, 1), (4, 5)):
        with monkeypatch.context() as patched:
            interrupt_after(patched, epochs)
            assert compress(folders, *RECOVER, "3") == 130
        assert len(trained) == trained_so_far and not (folders / "small").exists()
        monkeypatch.setattr("nnunet_sauron.compression.compressor.rank_units", lambda *_: pytest.fail("ranked again"))
    assert compress(folders, *RECOVER, "3") == 0
    assert len(trained) == 6
    for fold in ("0", "1"):
        assert equal(weights(folders, "whole", fold), weights(folders, "small", fold))
    assert notes(folders, "whole") == notes(folders)
    assert {path.name for path in folders.iterdir()} == {"images", "model", "small", "whole"}


def test_weights_are_a_running_mean_that_counts_its_first_values_alike():
    values = torch.randn(60, 3, dtype=torch.float64)
    means, counted = [values[0].clone(), torch.tensor(7)], torch.tensor(9)
    for steps, value in enumerate(values[1:4], start=1):
        student.move_means(means, [value, counted], torch.tensor(steps), decay=0.8)
    assert torch.allclose(means[0], values[:4].mean(0)) and means[1] == 9
    expected = values[:5].mean(0)
    student.move_means(means, [values[4], counted], torch.tensor(4), decay=0.8)
    for steps, value in enumerate(values[5:], start=5):
        student.move_means(means, [value, counted], torch.tensor(steps), decay=0.8)
        expected = 0.8 * expected + 0.2 * value
    assert torch.allclose(means[0], expected)


def test_what_was_interrupted_with_other_images_is_begun_anew(folders, monkeypatch, capsys):
    write_model(folders / "model")
    with monkeypatch.context() as patched:
        interrupt_after(patched, 1)
        assert compress(folders, *RECOVER, "3") == 130
    path = folders / "images/case_0_0000.nii.gz"
    path.write_bytes((folders / "images/case_1_0000.nii.gz").read_bytes())
    assert compress(folders, *RECOVER, "3") == 0
    assert "with other files: beginning anew" in " ".join(capsys.readouterr().err.split())
    assert compress(folders, *RECOVER, "3", output="fresh") == 0
    assert equal(weights(folders), weights(folders, "fresh"))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A folder in which a recovery was interrupted after an epoch; no test changes its model or images."""
    root = tmp_path_factory.mktemp("interrupted")
    write_images(root / "images", 3)
    write_model(root / "model")
    with pytest.MonkeyPatch.context() as patched:
        interrupt_after(patched, 1)
        assert compress(root, *RECOVER, "3") == 130
    return root


@pytest.mark.parametrize("changed", ["epochs", "goal", "version", "decay"])
def test_what_was_interrupted_with_other_settings_is_begun_anew(interrupted, monkeypatch, capsys, changed):
    path = interrupted / f".{changed}.recovery/state.pth"
    shutil.copytree(interrupted / ".small.recovery", path.parent)
    if changed == "decay":  # unknown to states of before there was one
        state = torch.load(path, weights_only=False)
        del state["made_with"]["decay"]
        torch.save(state, path)
    if changed == "version":
        monkeypatch.setattr(recovery, "__version__", "0.0.1")
    words = [*RECOVER, "2" if changed == "epochs" else "3"]
    if changed == "goal":
        words[1] = "0.4"

    def rank_units(*_, **__):  # what is continued is not ranked again
        raise KeyboardInterrupt

    monkeypatch.setattr("nnunet_sauron.compression.compressor.rank_units", rank_units)
    assert compress(interrupted, *words, output=changed) == 130
    assert f"with other {changed}: beginning anew" in " ".join(capsys.readouterr().err.split())


def scripted(monkeypatch, agreements: list[float]) -> None:
    """What is measured, in the place of what would be."""
    given = iter(agreements)
    monkeypatch.setattr(student.StudentTraining, "agreement", lambda self: next(given))


@pytest.mark.parametrize("interrupted", [False, True])
def test_it_cools_down_and_stops_when_agreement_no_longer_rises(folders, monkeypatch, capsys, interrupted):
    write_model(folders / "model")
    scripted(monkeypatch, [0.5, 0.6, 0.8, *[0.7] * 4, 0.8002, 0.81, 0.82, 0.83, 0.82])
    rates = []
    train_epoch = student.StudentTraining._train_epoch

    def noting(self, *args):
        loss = train_epoch(self, *args)
        rates.append(self.optimizer.param_groups[0]["lr"])
        return loss

    monkeypatch.setattr(student.StudentTraining, "_train_epoch", noting)
    words = ("--macs", "0.3", "--recover-steps", "1", "--recover", "16")
    if interrupted:
        with monkeypatch.context() as patched:
            interrupt_after(patched, 9)
            assert compress(folders, *words) == 130
    assert compress(folders, *words) == 0
    found = notes(folders)["folds"]["0"]
    assert found["epochs"] == 11 and found["best_epoch"] == 10
    assert "stopped after 11 epochs" in capsys.readouterr().err
    poly = [student.INITIAL_LR * (1 - epoch / 16) ** 0.9 for epoch in range(8)]
    assert rates == pytest.approx(poly[:7] + [poly[7] * part for part in (0.8, 0.6, 0.4, 0.2)])


def test_a_recovery_that_does_harm_is_not_taken(folders, monkeypatch):
    write_model(folders / "model")
    assert compress(folders, "--macs", "0.3", output="merged") == 0
    scripted(monkeypatch, [0.5, 0.4, 0.3])
    assert compress(folders, "--macs", "0.3", "--recover-steps", "2", "--recover", "2") == 0
    assert notes(folders)["folds"]["0"]["best_epoch"] == 0
    assert equal(weights(folders), weights(folders, "merged"))


def test_without_foreground_the_last_weights_are_taken(folders, monkeypatch):
    write_model(folders / "model")
    scripted(monkeypatch, [math.nan] * 8)
    assert compress(folders, "--macs", "0.3", "--recover-steps", "1", "--recover", "7") == 0
    assert notes(folders)["folds"]["0"]["best_epoch"] == 7


class TestPatches:
    def source(self, root, dim=2, batch=3, mirror_axes="nnunet", seed=0, **options) -> AugmentedPatches:
        model = TrainedModel.read(write_model(root / "model", dim, **options))
        cases = find_cases(root / "images", model)
        list(store_images(model, cases, root / "stored"))
        return AugmentedPatches(model, [case.name for case in cases], root / "stored", batch, mirror_axes, seed)

    @pytest.mark.parametrize("dim", [2, 3])
    def test_a_step_gives_the_same_batch_whenever_it_is_asked_for(self, folders, dim):
        source = self.source(folders, dim)
        first, second = source[0], source[1]
        torch.manual_seed(5)
        np.random.seed(5)
        before = torch.rand(1), np.random.rand()
        torch.manual_seed(5)
        np.random.seed(5)
        again = source[0]
        assert (torch.rand(1), np.random.rand()) == before
        assert torch.equal(first, again) and not torch.equal(first, second)
        assert first.shape == (3, 1, *[16] * dim) and first.dtype == torch.float32 and first.isfinite().all()

    def test_the_stored_images_stay_as_they_were(self, folders):
        source = self.source(folders)
        before = {path.name: np.load(path) for path in (folders / "stored").iterdir()}
        for step in range(20):
            source[step]
        assert all(np.array_equal(np.load(folders / "stored" / name), image) for name, image in before.items())

    @pytest.mark.parametrize("name", ["case_0_seg", "case_0.tmp", "case_0.outside", "case_0.image"])
    def test_no_cases_file_is_another_ones(self, folders, name):
        (folders / "images/case_1_0000.nii.gz").rename(folders / f"images/{name}_0000.nii.gz")
        source = self.source(folders)
        images = [source._loader._data.load_case(case)[0] for case in ("case_0", name)]
        assert images[0].shape == images[1].shape and not np.array_equal(*images)

    @pytest.mark.parametrize("axes", [None, (1,), (0, 1)])
    def test_only_the_models_axes_are_mirrored(self, folders, axes):
        transforms = self.source(folders, mirror_axes=axes)._loader.transforms.transforms
        mirrors = [one.allowed_axes for one in transforms if type(one).__name__ == "MirrorTransform"]
        assert mirrors == ([axes] if axes else [])

    def test_they_are_what_nnunets_trainer_trains_on(self, folders, monkeypatch):
        """Its own transforms for these plans, one by one."""
        from ..trainers.small import set_folders, small_trainer

        set_folders(monkeypatch, folders / "nnunet")
        source = self.source(folders, 3)
        trainer = small_trainer(folders / "nnunet", dim=3)
        rotation, dummy, size, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        expected = trainer.get_training_transforms(
            trainer.configuration_manager.patch_size, rotation, None, axes, dummy, use_mask_for_norm=[False]
        )
        expected = [type(getattr(one, "transform", one)).__name__ for one in expected.transforms]
        found = source._loader.transforms.transforms
        assert [type(getattr(one, "transform", one)).__name__ for one in found] == expected
        assert tuple(source._loader.patch_size) == tuple(size)

    def test_an_ignore_label_needs_no_labels(self, folders):
        assert self.source(folders, ignore=3)[0].isfinite().all()


class TestErrors:
    def refused(self, root, capsys, *words, said: str) -> None:
        before = sorted(root.rglob("*"))
        assert compress(root, *words) == 2
        assert said in " ".join(capsys.readouterr().err.split())
        assert sorted(root.rglob("*")) == before

    @pytest.fixture
    def model(self, folders):
        write_model(folders / "model")
        return folders

    @pytest.mark.parametrize(("images", "counts"), [(1, "1 and 0"), (2, "1 and 1")])
    def test_too_few_images(self, model, capsys, images, counts):
        for path in sorted((model / "images").iterdir())[images:]:
            path.unlink()
        said = f"at least 2 images to learn on and 1 held out to see when it is enough; there are {counts}. Give at"
        self.refused(model, capsys, *RECOVER, "1", said=said)

    def test_three_images_are_enough(self, model):
        for path in sorted((model / "images").iterdir())[3:]:
            path.unlink()
        assert compress(model, *RECOVER, "1") == 0

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("--macs", "0.5", "--recover", "0"), "--recover must be at least 1; got 0"),
            (("--macs", "0.5", "--recover", "2", "--recover-steps", "0"), "--recover-steps must be at least 1"),
            (("--macs", "0.5", "--recover-steps", "5"), "give --recover EPOCHS as well"),
            (("--macs", "0.5", "--recover", "2", "--dry-run"), "give one of the two"),
        ],
    )
    def test_words_that_do_not_go_together(self, model, capsys, words, said):
        self.refused(model, capsys, *words, said=said)

    def test_a_target_out_of_reach(self, model, capsys):
        self.refused(model, capsys, "--macs", "0.001", "--recover", "2", said="cannot be met")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu(folders, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    write_model(folders / "model", widths=(16, 24, 32))
    teach(folders)
    words = "--macs", "0.2", "--recover-steps", "25", "--recover", "4", "-device", "cuda"
    with monkeypatch.context() as patched:
        interrupt_after(patched, 2)
        assert compress(folders, *words) == 130
    assert compress(folders, *words) == 0
    found = notes(folders)["folds"]["0"]
    assert found["epochs"] == 4 and max(found["agreement"]) > found["agreement"][0]
    assert {tensor.device.type for tensor in weights(folders).values()} == {"cpu"}


def test_other_processes_make_the_same_batches(folders, monkeypatch):
    write_model(folders / "model")
    monkeypatch.setattr(student.os, "cpu_count", lambda: 3)
    for output, processes in (("one", "0"), ("two", "2")):
        monkeypatch.setenv("nnUNet_n_proc_DA", processes)
        assert compress(folders, "--macs", "0.5", "--recover-steps", "3", "--recover", "1", output=output) == 0
    assert notes(folders, "one") == notes(folders, "two")


def test_the_batch_is_nnunets_and_small_on_a_cpu(folders, monkeypatch):
    path = write_model(folders / "model") / "plans.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["2d"]["batch_size"] = 300
    path.write_text(json.dumps(plans))
    model = TrainedModel.read(folders / "model")
    assert recovery.batch_size(model, torch.device("cuda")) == 300
    assert recovery.batch_size(model, torch.device("cpu")) == 256  # 65536 voxels
    monkeypatch.setattr(recovery, "CPU_VOXELS", 1)
    assert recovery.batch_size(model, torch.device("cpu")) == 2
