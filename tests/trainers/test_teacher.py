"""Who may teach, and what a teacher says."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch

from nnunet_sauron.trainers.distils import DistillingLoss
from nnunet_sauron.trainers.teacher import Teacher

from ..compression.small_model import write_model
from .small import dataset_json, plans


def read(folder, student=None, source="model", fold=0, **options) -> Teacher:
    """A teacher for a student of the model's own plans, or of others."""
    args = student or student_of(folder / "model")
    return Teacher.read(folder / source, fold, *args, **options)


def student_of(model) -> tuple[dict, str, dict]:
    return json.loads((model / "plans.json").read_text()), "2d", json.loads((model / "dataset.json").read_text())


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_it_says_what_its_network_says_at_every_resolution(tmp_path, deep_supervision):
    write_model(tmp_path / "model")
    teacher = read(tmp_path)
    teacher.start(torch.device("cpu"), deep_supervision=deep_supervision)
    data = torch.randn(2, 1, 16, 16)
    said = teacher.logits(data)
    assert [tuple(output.shape[2:]) for output in said] == [(16, 16), (8, 8)][: 1 + deep_supervision]
    (network,) = teacher.networks
    network.decoder.deep_supervision = False
    assert torch.equal(said[0], network(data)) and not any(output.requires_grad for output in said)
    assert not network.training and not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("regions", [False, True])
def test_several_folds_say_their_mean_probability(tmp_path, regions):
    write_model(tmp_path / "model", folds=(0, 1, 4), **({"whole": [1, 2]} if regions else {}))
    data = torch.randn(2, 1, 16, 16)
    all_folds = read(tmp_path, folds="all")
    each = [read(tmp_path, fold=fold) for fold in (0, 1, 4)]
    for teacher in (all_folds, *each):
        teacher.start(torch.device("cpu"), deep_supervision=True)
    chances = torch.sigmoid if regions else lambda output: output.softmax(1)
    for output, *of_each in zip(all_folds.logits(data), *(teacher.logits(data) for teacher in each), strict=True):
        mean = sum(chances(one) for one in of_each) / 3
        torch.testing.assert_close(chances(output), mean)
    assert "mean of 3 folds" in all_folds.name


def test_all_folds_are_the_numbered_ones_and_what_is_left_out_is_said(tmp_path):
    model = write_model(tmp_path / "model", folds=(0, 1, "all"))
    (model / "fold_0").rename(model / "fold_10")
    shutil.copytree(model / "fold_1", model / "fold_1_old")
    teacher = read(tmp_path, folds="all")
    assert len(teacher.networks) == 2 and "the mean of 2 folds, without fold_1_old and fold_all" in teacher.name
    for fold in ("fold_1", "fold_10"):
        shutil.rmtree(model / fold)
    alone = read(tmp_path, folds="all")
    assert len(alone.networks) == 1 and "without fold_1_old" in alone.name
    assert "without" not in read(tmp_path, fold="all").name


def test_a_file_and_a_pruned_teacher_do(tmp_path):
    write_model(tmp_path / "model")
    student = student_of(tmp_path / "model")
    write_model(tmp_path / "narrow", widths=(3, 4, 5))
    path = tmp_path / "narrow/fold_0/checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["init_args"]["plans"] = student[0]  # pruned: its plans are the wide ones
    torch.save(checkpoint, path)
    (network,) = Teacher.read(path, "all", *student).networks
    assert network.encoder.stages[0][0].convs[0].conv.out_channels == 3


def other(change) -> tuple[dict, str, dict]:
    """A student's plans that differ."""
    described, dataset = plans(), dataset_json()
    described.pop("continue_training")
    described["transpose_forward"] = [0, 1, 2]
    change(described, described["configurations"]["2d"], dataset)
    return described, "2d", dataset


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p, c, d: p.update(dataset_name="Dataset002_Other"), "data set.*Dataset001_Random.*Dataset002_Other"),
        (lambda p, c, d: d["labels"].update(more=3), "classes"),
        (lambda p, c, d: d["labels"].update(low=2, high=1), "classes"),
        (lambda p, c, d: d["labels"].update(low=[1, 2]) or d.update(regions_class_order=[1, 2]), "classes"),
        (lambda p, c, d: d.update(channel_names={"0": "MRI", "1": "T2"}), "input channels"),
        (lambda p, c, d: d.update(channel_names={"0": "CT"}), "input channels"),
        (lambda p, c, d: c.update(spacing=[2.0, 1.0]), "spacing"),
        (lambda p, c, d: c.update(normalization_schemes=["CTNormalization"]), "normalization_schemes"),
        (lambda p, c, d: p.update(transpose_forward=[1, 0, 2]), "order of axes"),
        (lambda p, c, d: c["architecture"]["arch_kwargs"].update(strides=[[1, 1], [2, 2], [1, 2]]), "resolutions"),
    ],
)
def test_one_that_cannot_teach_is_refused(tmp_path, change, said):
    write_model(tmp_path / "model")
    with pytest.raises(ValueError, match=f"cannot be the teacher: its {said}.*teacher=None"):
        read(tmp_path, other(change))


def test_a_lean_student_may_have_the_same_teacher(tmp_path):
    write_model(tmp_path / "model")
    lean = other(lambda p, c, d: c["architecture"]["arch_kwargs"].update(features_per_stage=[4, 4, 4]))
    assert len(read(tmp_path, lean).networks) == 1


def test_the_ignore_label_is_no_class(tmp_path):
    write_model(tmp_path / "model")
    assert read(tmp_path, other(lambda p, c, d: d["labels"].update(ignore=3)))


def test_one_that_moved_or_lacks_the_fold(tmp_path):
    write_model(tmp_path / "model", folds=(1, 2))
    with pytest.raises(FileNotFoundError, match="nowhere.*If it was moved, name its new folder"):
        read(tmp_path, source="nowhere")
    with pytest.raises(FileNotFoundError, match="no fold_0/checkpoint_final.pth; folds with one: fold_1, fold_2"):
        read(tmp_path)


def test_a_network_of_another_trainers_making_is_refused(tmp_path):
    write_model(tmp_path / "model")
    path = tmp_path / "model/fold_0/checkpoint_final.pth"
    checkpoint = copy.deepcopy(torch.load(path, weights_only=False))
    checkpoint["network_weights"].pop("decoder.seg_layers.0.weight")
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="cannot be the teacher.*of another architecture than its plans describe"):
        read(tmp_path)


@pytest.mark.parametrize("labels", [True, False])
def test_under_ddp_every_head_gets_a_gradient(labels):
    """DDP waits for it at the next step, also of heads whose teacher's counterpart was never trained."""
    teacher = Teacher([torch.nn.Identity()], regions=False, supervised=False)
    loss = DistillingLoss(lambda output, _: output[0].square().mean(), teacher, labels=labels, ddp=True)
    outputs = [torch.randn(2, 3, side, side, requires_grad=True) for side in (8, 4)]

    def step(batch: dict) -> dict:
        term = loss(outputs, None)
        term.backward()
        return {"loss": float(term.detach())}

    loss.train_step(step, {"data": torch.randn(2, 3, 8, 8)}, "cpu")
    assert outputs[0].grad.abs().sum() > 0
    assert not outputs[1].grad.any()
