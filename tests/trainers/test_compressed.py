"""CompressedTrainer in process: it goes on from a compressed checkpoint at that checkpoint's widths, with a teacher."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_sauron.model.networks import BUILT_BY
from nnunet_sauron.pruning import channel_layout, remove_channels
from nnunet_sauron.trainers import CompressedTrainer

from .small import Gelu, OnRandomPatches, RandomPatches, dataset_json, log_of, plans, small_trainer


class SmallCompressedTrainer(OnRandomPatches, CompressedTrainer):
    num_epochs = 3


@pytest.fixture
def model(folder) -> Path:
    """The folder of a model whose network is narrower than its plans."""
    trainer = small_trainer(folder, type("T", (SmallCompressedTrainer,), {}))
    trainer.initialize()
    remove_channels(trainer.network, {name: range(1, w) for name, w in channel_layout(trainer.network).widths.items()})
    written = folder / "small" / "fold_0"
    written.mkdir(parents=True)
    torch.save({"network_weights": trainer.network.state_dict()}, written / "checkpoint_final.pth")
    return written.parent


@pytest.fixture
def source(folder, model) -> Path:
    """The folder of the dense model that `model` says it was compressed from."""
    trainer = small_trainer(folder, type("T", (SmallCompressedTrainer,), {}))
    trainer.initialize()
    (folder / "dense" / "fold_0").mkdir(parents=True)
    init_args = {"plans": plans(), "configuration": "2d", "fold": 0, "dataset_json": dataset_json()}
    dense = {"network_weights": trainer.network.state_dict(), "init_args": init_args, "trainer_name": "nnUNetTrainer"}
    torch.save(dense, folder / "dense" / "fold_0" / "checkpoint_final.pth")
    compressed = {"network_weights": weights(model / "fold_0" / "checkpoint_final.pth")}
    torch.save(
        {**compressed, "compression": {"source": str(folder / "dense")}}, model / "fold_0" / "checkpoint_final.pth"
    )
    return folder / "dense"


def weights(path: Path) -> dict:
    return torch.load(path, weights_only=False)["network_weights"]


def start(folder, monkeypatch, given, **changes):
    monkeypatch.setenv("nnunet_sauron", f"start_from={given}")
    return small_trainer(folder, type("T", (SmallCompressedTrainer,), changes))


def test_it_begins_with_the_compressed_weights_at_half_of_nnunets_rate(folder, model, monkeypatch):
    for given in (model, model / "fold_0" / "checkpoint_final.pth"):
        trainer = start(folder, monkeypatch, given)
        trainer.initialize()
        begun = trainer.network.state_dict()
        for name, tensor in weights(model / "fold_0" / "checkpoint_final.pth").items():
            assert torch.equal(begun[name], tensor)
        assert {id(p) for g in trainer.optimizer.param_groups for p in g["params"]} == {
            id(p) for p in trainer.network.parameters()
        }
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(5e-3)


def test_a_network_that_is_not_its_plans_stays_what_it_is(folder, model, monkeypatch):
    """The plans in nnUNet_preprocessed name no trainer; those of the compressed checkpoint do."""
    monkeypatch.setattr("nnunet_sauron.trainers.compressed.find_trainer", {"Gelu": Gelu}.get)
    path = model / "fold_0" / "checkpoint_final.pth"
    named = plans()
    named["configurations"]["2d"][BUILT_BY] = "Gelu"
    torch.save({"network_weights": weights(path), "init_args": {"plans": named}}, path)
    trainer = start(folder, monkeypatch, model)
    trainer.initialize()
    kinds = {type(module).__name__ for module in trainer.network.modules()}
    assert "GELU" in kinds and "LeakyReLU" not in kinds and trainer.network.decoder.deep_supervision
    trainer.save_checkpoint(str(folder / "saved.pth"))
    monkeypatch.delenv("nnunet_sauron")
    resumed = small_trainer(folder, type("T", (SmallCompressedTrainer,), {}))
    resumed.load_checkpoint(str(folder / "saved.pth"))
    assert "GELU" in {type(module).__name__ for module in resumed.network.modules()}
    assert resumed.plans_manager.plans["configurations"] == named["configurations"]  # and so its own checkpoints


def test_a_model_trained_with_a_network_of_its_own_is_started_from_as_it_is(folder, source, monkeypatch):
    """No `compress` in between, which would have named the trainer in the plans."""
    for module in ("trainers.compressed", "model.networks"):
        monkeypatch.setattr(f"nnunet_sauron.{module}.find_trainer", {"Gelu": Gelu}.get)
    path = source / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(path, weights_only=False), "trainer_name": "Gelu"}, path)
    trainer = start(folder, monkeypatch, source)
    trainer.initialize()
    assert {"GELU"} == {type(module).__name__ for module in trainer.network.modules()} & {"GELU", "LeakyReLU"}
    assert trainer.plans_manager.plans["configurations"]["2d"][BUILT_BY] == "Gelu"


def test_by_default_it_trains_for_50_epochs(folder, model, monkeypatch):
    monkeypatch.setenv("nnunet_sauron", f"start_from={model}")
    assert small_trainer(folder, type("T", (CompressedTrainer,), {})).num_epochs == 50


def test_it_trains_at_the_same_widths_and_continues_without_the_setting(folder, model, monkeypatch):
    compressed = weights(model / "fold_0" / "checkpoint_final.pth")
    trainer = start(folder, monkeypatch, model)
    trainer.run_training()
    final = Path(trainer.output_folder) / "checkpoint_final.pth"
    trained = weights(final)
    assert {n: t.shape for n, t in trained.items()} == {n: t.shape for n, t in compressed.items()}
    assert not torch.equal(trained["encoder.stages.0.0.convs.0.conv.weight"],
                           compressed["encoder.stages.0.0.convs.0.conv.weight"])  # fmt: skip

    monkeypatch.delenv("nnunet_sauron")
    resumed = small_trainer(folder, type("T", (SmallCompressedTrainer,), {}))
    resumed.load_checkpoint(str(final))
    resumed.num_epochs = 4  # as if the training had been a longer one
    assert resumed.current_epoch == 3
    assert len(resumed.optimizer.state) > 20
    for parameter, state in resumed.optimizer.state.items():
        assert state["momentum_buffer"].shape == parameter.shape
    resumed.run_training()
    assert torch.load(final, weights_only=False)["current_epoch"] == 4


def final_of(trainer) -> dict:
    return torch.load(Path(trainer.output_folder) / "checkpoint_final.pth", weights_only=False)


def steps(trainer, targets=lambda target: target) -> tuple[dict, dict]:
    """What one training and one validation step say of a batch; the batch's targets may be changed."""
    trainer.num_epochs = 1
    trainer.on_train_start()
    trainer.lr_scheduler.step(0)
    batch = next(RandomPatches(trainer, 5))
    changed = {**batch, "target": [targets(target) for target in batch["target"]]}
    trainer.network.eval()
    with torch.no_grad():
        validated = trainer.validation_step({**changed, "target": [t.clone() for t in changed["target"]]})
    trainer.network.train()
    return trainer.train_step(changed), validated


def test_the_model_that_was_compressed_is_the_teacher(folder, model, source, monkeypatch):
    trainer = start(folder, monkeypatch, model)
    trainer.run_training()
    assert f"Teacher: {source}, with labels" in log_of(trainer)
    records = final_of(trainer)["logging"]["distillation"]
    assert [record["teacher"] for record in records] == [str(source)] * 3
    assert all(record["loss"] > 0 and record["labels"] for record in records)


def test_no_teacher_is_stored_or_trained(folder, model, source, monkeypatch):
    trainer = start(folder, monkeypatch, model)
    before = torch.load(source / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    trainer.run_training()
    (teacher,) = trainer._teacher.networks
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in teacher.parameters()} and not list(trainer.loss.parameters())
    assert set(final_of(trainer)["network_weights"]) == set(before)


def test_the_logged_losses_are_nnunets_own(folder, model, source, monkeypatch):
    learning, alone = start(folder, monkeypatch, model), start(folder, monkeypatch, f"{model},teacher=None")
    (trained, validated), (expected, validated_alone) = steps(learning), steps(alone)
    assert trained["loss"] == pytest.approx(expected["loss"], abs=1e-5) and trained["distillation"] > 0.01
    assert validated["loss"] == validated_alone["loss"]
    assert "distillation" not in expected and "No teacher" in log_of(alone)
    name = "encoder.stages.0.0.convs.0.conv.weight"  # what was learnt is another thing all the same
    assert not torch.equal(learning.network.state_dict()[name], alone.network.state_dict()[name])


def test_after_a_training_step_validation_hears_no_teacher(folder, model, source, monkeypatch):
    trainer = start(folder, monkeypatch, model)
    steps(trainer)
    batch = next(RandomPatches(trainer, 6))
    output = trainer.network(batch["data"])
    assert torch.equal(trainer.loss(output, batch["target"]), trainer.loss.loss(output, batch["target"]))


def test_a_training_from_before_there_were_teachers_is_continued_without(folder, model, monkeypatch):
    trainer = start(folder, monkeypatch, model)
    trainer.run_training()
    final = final_of(trainer)
    del final["logging"]["distillation"]
    torch.save(final, Path(trainer.output_folder) / "checkpoint_final.pth")
    monkeypatch.delenv("nnunet_sauron")
    resumed = small_trainer(folder, type("T", (SmallCompressedTrainer,), {}))
    resumed.load_checkpoint(str(Path(resumed.output_folder) / "checkpoint_final.pth"))
    resumed.num_epochs = 4  # as if the training had been a longer one
    resumed.run_training()
    # As long as every other series, by the shortest of which nnU-Net draws its progress.
    assert {len(series) for series in final_of(resumed)["logging"].values()} == {4}


def test_without_labels_no_target_is_looked_at(folder, model, source, monkeypatch):
    results = []
    for targets in (torch.zeros_like, torch.ones_like):
        trainer = start(folder, monkeypatch, f"{model},labels=False")
        results.append((steps(trainer, targets)[0], trainer.network.state_dict()))
    (first, weights_first), (second, weights_second) = results
    assert first["loss"] == second["loss"] == pytest.approx(float(first["distillation"]))
    assert all(torch.equal(tensor, weights_second[name]) for name, tensor in weights_first.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("compiled", ["f", "t"])
def test_it_learns_from_the_teacher_on_a_gpu(folder, model, source, monkeypatch, compiled):
    monkeypatch.setenv("nnUNet_compile", compiled)
    monkeypatch.setenv("nnunet_sauron", f"start_from={model},labels=False,num_iterations_per_epoch=20")
    trainer = small_trainer(folder, type("T", (SmallCompressedTrainer,), {}), device="cuda")
    trainer.run_training()
    losses = [record["loss"] for record in final_of(trainer)["logging"]["distillation"]]
    assert all(np.isfinite(losses)) and losses[-1] < losses[0]


def test_a_training_that_is_continued_keeps_its_teacher_and_does_without_labels(folder, model, source, monkeypatch):
    start(folder, monkeypatch, f"{model},labels=False,teacher_folds=all").run_training()
    monkeypatch.delenv("nnunet_sauron")
    resumed = small_trainer(folder, type("T", (SmallCompressedTrainer,), {}))
    resumed.load_checkpoint(str(Path(resumed.output_folder) / "checkpoint_final.pth"))
    resumed.num_epochs = 4  # as if the training had been a longer one
    resumed.run_training()
    records = final_of(resumed)["logging"]["distillation"]
    assert len(records) == 4
    assert {key: value for key, value in records[-1].items() if key != "loss"} == {
        "teacher": str(source), "teacher_checkpoint": "checkpoint_final.pth", "teacher_folds": "all", "labels": False
    }  # fmt: skip
    assert records[-1]["loss"] > 0


def test_what_is_set_on_continuing_goes_before_what_was(folder, model, source, monkeypatch):
    start(folder, monkeypatch, model).run_training()
    monkeypatch.setenv("nnunet_sauron", "teacher=None")
    resumed = small_trainer(folder, type("T", (SmallCompressedTrainer,), {}))
    resumed.load_checkpoint(str(Path(resumed.output_folder) / "checkpoint_final.pth"))
    resumed.num_epochs = 4  # as if the training had been a longer one
    resumed.run_training()
    assert final_of(resumed)["logging"]["distillation"][-1]["teacher"] is None


def test_a_teacher_that_moved_is_named_before_a_log_is_written(folder, model, source, monkeypatch):
    source.rename(folder / "elsewhere")
    written = list(folder.rglob("training_log*"))
    with pytest.raises(FileNotFoundError, match=f"There is no teacher at {source}.*teacher=None"):
        start(folder, monkeypatch, model)
    assert list(folder.rglob("training_log*")) == written
    start(folder, monkeypatch, f"{model},teacher={folder / 'elsewhere'}")


def test_to_validate_no_teacher_is_needed(folder, model, source, monkeypatch):
    start(folder, monkeypatch, model).run_training()
    source.rename(folder / "elsewhere")
    monkeypatch.delenv("nnunet_sauron")
    resumed = small_trainer(folder, type("T", (SmallCompressedTrainer,), {}))
    resumed.load_checkpoint(str(Path(resumed.output_folder) / "checkpoint_final.pth"))
    resumed.run_training()  # it is finished: nothing is learnt any more
    resumed.num_epochs = 4  # as if the training had been a longer one
    with pytest.raises(FileNotFoundError, match="There is no teacher at"):  # to train on, it is
        resumed.run_training()


@pytest.mark.parametrize(
    ("settings", "said"),
    [("labels=False,teacher=None", "nothing to learn from"), ("teacher_folds=some", "same or all; got 'some'")],
)
def test_settings_that_do_not_go_together(folder, model, monkeypatch, settings, said):
    with pytest.raises(ValueError, match=said):
        start(folder, monkeypatch, f"{model},{settings}")


def test_without_labels_a_teacher_must_be_known(folder, model, monkeypatch):
    trainer = start(folder, monkeypatch, f"{model},labels=False")
    with pytest.raises(ValueError, match="nothing to learn from.*teacher=MODEL_FOLDER"):
        trainer.run_training()


def test_without_a_start_it_says_what_to_name(folder, monkeypatch):
    monkeypatch.delenv("nnunet_sauron", raising=False)
    trainer = small_trainer(folder, type("T", (SmallCompressedTrainer,), {}))
    with pytest.raises(ValueError, match="nothing to start from.*start_from=MODEL_FOLDER"):
        trainer.run_training()


def test_continued_before_its_first_checkpoint_it_names_the_settings_that_it_was_begun_with(folder, model, monkeypatch):
    first = start(folder, monkeypatch, f"{model},num_epochs=7")
    first.on_train_start()
    monkeypatch.delenv("nnunet_sauron")
    again = small_trainer(folder, type(first))
    again.logger.resume = True  # --c
    file = Path(first.output_folder) / "settings.json"
    with pytest.raises(ValueError, match=rf"no checkpoint yet.*nnunet_sauron=@{file} nnUNetv2_train .* --c$"):
        again.run_training()
    monkeypatch.setenv("nnunet_sauron", f"@{file}")
    assert small_trainer(folder, type(first)).num_epochs == 7


def test_another_architecture_is_refused(folder, model, monkeypatch):
    path = model / "fold_0" / "checkpoint_final.pth"
    torch.save({"network_weights": {k: v for k, v in weights(path).items() if "transpconvs" not in k}}, path)
    trainer = start(folder, monkeypatch, model)
    with pytest.raises(ValueError, match="another architecture than these plans"):
        trainer.initialize()


def test_its_own_folder_is_no_start(folder, model, monkeypatch):
    first = start(folder, monkeypatch, model, num_epochs=2)
    first.run_training()
    with pytest.raises(ValueError, match="start_from: .* lies in the folder that this training writes"):
        start(folder, monkeypatch, Path(first.output_folder).parent, num_epochs=2)


def test_a_start_without_a_teacher_and_its_size_are_told(folder, model, monkeypatch):
    trainer = start(folder, monkeypatch, model)
    trainer.on_train_start()
    now = sum(channel_layout(trainer.network).widths.values())
    assert f"It has {now} channels, where these plans' own network has" in log_of(trainer)
    assert "WARNING: there is no teacher, since compress did not write that model" in log_of(trainer)


def test_a_missing_model_is_refused_before_a_log_is_written(folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        start(folder, monkeypatch, folder / "nowhere")
    assert not list(folder.rglob("training_log*"))


def test_what_compress_wrote_can_be_validated_and_is_no_training_to_continue(folder, model, monkeypatch):
    path = model / "fold_0" / "checkpoint_final.pth"
    log = {"settings": [{"start_from": "/of/the/source", "num_epochs": 7}]}  # as compress copies it
    torch.save({"network_weights": weights(path), "inference_allowed_mirroring_axes": (1,), "logging": log}, path)
    monkeypatch.setenv("nnunet_sauron", f"start_from={model}")
    trainer = small_trainer(folder, type("T", (SmallCompressedTrainer,), {}))
    trainer.load_checkpoint(str(path))
    assert all(torch.equal(tensor, weights(path)[name]) for name, tensor in trainer.network.state_dict().items())
    assert trainer.inference_allowed_mirroring_axes == (1,)
    with pytest.raises(ValueError, match="written by compress, so there is no training to continue"):
        trainer.run_training()


@pytest.mark.parametrize("axes", [None, (1,), (0, 1)])
def test_it_mirrors_as_the_model_that_was_compressed(folder, model, monkeypatch, axes):
    path = model / "fold_0" / "checkpoint_final.pth"
    torch.save({"network_weights": weights(path), "inference_allowed_mirroring_axes": axes}, path)
    mirror = "configure_rotation_dummyDA_mirroring_and_inital_patch_size"
    trainer = start(folder, monkeypatch, model)
    trainer.initialize()
    assert getattr(trainer, mirror)()[-1] == axes
    trainer.run_training()
    final = Path(trainer.output_folder) / "checkpoint_final.pth"
    assert torch.load(final, weights_only=False)["inference_allowed_mirroring_axes"] == axes

    monkeypatch.delenv("nnunet_sauron")
    resumed = small_trainer(folder, type("T", (SmallCompressedTrainer,), {}))
    resumed.load_checkpoint(str(final))
    assert getattr(resumed, mirror)()[-1] == axes


def test_a_checkpoint_that_says_nothing_of_mirroring_gets_nnunets(folder, model, monkeypatch):
    trainer = start(folder, monkeypatch, model)
    trainer.initialize()
    assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[-1] == (0, 1)


def test_pretrained_weights_over_those_of_the_start_are_refused(folder, model, monkeypatch):
    trainer = start(folder, monkeypatch, model)
    trainer.initialize()
    with torch.no_grad():
        next(trainer.network.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="start_from=.* and -pretrained_weights are both given"):
        trainer.run_training()


def test_a_start_of_another_fold_is_told(folder, model, source, monkeypatch):
    path = model / "fold_0" / "checkpoint_final.pth"
    init_args = {"plans": plans(), "configuration": "2d", "fold": 3, "dataset_json": dataset_json()}
    torch.save({**torch.load(path, weights_only=False), "init_args": init_args}, path)
    trainer = start(folder, monkeypatch, path)
    trainer.on_train_start()
    assert log_of(trainer).count("is a model of fold 3, which was trained on validation cases of fold 0") == 1
