"""`compress --uniform-stages`: what it writes is read by nnU-Net alone."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import SimpleITK
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_sauron.cli import main
from nnunet_sauron.compression.goal import Goal
from nnunet_sauron.compression.stages import UniformStages
from nnunet_sauron.model.architecture import network_of_plans
from nnunet_sauron.model.trained import TrainedModel
from nnunet_sauron.pruning import CostModel, Ranking, channel_layout, resize
from nnunet_sauron.pruning.tolerance import cost_left, widths_at

from ..contracts.networks import build
from .small_model import write_images, write_model

UNETS = "dynamic_network_architectures.architectures.unet"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer"):
        monkeypatch.delenv(variable, raising=False)
    write_images(tmp_path / "images", shape=(3, 24, 24))
    return tmp_path


def compress(root, *words) -> int:
    paths = "-m", str(root / "model"), "-i", str(root / "images"), "-o", str(root / "small")
    return main(["compress", *paths, "--uniform-stages", *words])


def checkpoint(root, fold=0, model="small") -> dict:
    return torch.load(root / model / f"fold_{fold}/checkpoint_final.pth", weights_only=False)


def change_checkpoint(root, change, fold=0) -> None:
    changed = checkpoint(root, fold, "model")
    change(changed)
    torch.save(changed, root / f"model/fold_{fold}/checkpoint_final.pth")


def stock_network(root, configuration="2d", fold=0) -> torch.nn.Module:
    """The network that nnU-Net builds from what was written, with the weights: every one, of the very shape."""
    plans, dataset = (json.loads((root / "small" / f"{name}.json").read_text()) for name in ("plans", "dataset"))
    network = network_of_plans(PlansManager(plans), configuration, dataset, device="cpu")
    network.load_state_dict(checkpoint(root, fold)["network_weights"], strict=True)
    return network.eval()


@pytest.mark.parametrize(
    ("dim", "architecture", "widths"),
    [(2, "plain", (16, 24, 32)), (3, "plain", (12, 16, 16)), (2, "resenc", (16, 17, 18)), (3, "resenc", (12, 16, 16))],
)
def test_nnunets_own_network_takes_the_weights_and_the_target_is_met(folders, dim, architecture, widths):
    model = TrainedModel.read(write_model(folders / "model", dim, architecture=architecture, widths=widths))
    assert compress(folders, "--macs", "0.5") == 0
    network = stock_network(folders, model.configuration)
    measure = CostModel(model.network("0"), model.patch_size, 1).macs
    left = measure(channel_layout(network).widths) / measure(channel_layout(model.network("0")).widths)
    assert 0.35 < left <= 0.5
    inputs = torch.randn(1, 1, *model.patch_size)
    with torch.no_grad():
        assert torch.equal(network(inputs), TrainedModel.read(folders / "small").network("0")(inputs))


WITHOUT_THIS_PACKAGE = """
import sys
try:
    import nnunet_sauron
except ImportError as error:
    assert "is not here" in str(error)
else:
    raise SystemExit("nnunet_sauron can be imported")
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
import torch
predictor = nnUNetPredictor(perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False)
predictor.initialize_from_trained_model_folder(sys.argv[1], None)
assert predictor.network._load_state_dict_pre_hooks == {}, "the network resizes itself"
predictor.predict_from_files_sequential([[sys.argv[2]]], [sys.argv[3]])
print(predictor.trainer_name, predictor.plans_manager.plans_name, predictor.allowed_mirroring_axes)
"""


def test_it_predicts_where_this_package_is_not_installed(folders):
    """As nnUNetv2_predict_from_modelfolder does, with mirroring and both folds; and what it predicts with it."""
    write_model(folders / "model", folds=(0, 1))
    for fold in (0, 1):  # of a trainer of ours, which keeps what only it can read
        change_checkpoint(
            folders,
            lambda c: c.update(inference_allowed_mirroring_axes=(1,), trainer_name="SauronTrainer", own=CostModel),
            fold,
        )
    assert compress(folders, "--macs", "0.6") == 0
    hidden = folders / "hidden" / "nnunet_sauron"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('nnunet_sauron is not here')")
    image = str(folders / "images/case_0_0000.nii.gz")
    printed = subprocess.run(
        [sys.executable, "-c", WITHOUT_THIS_PACKAGE, str(folders / "small"), image, str(folders / "without.nii.gz")],
        check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(hidden.parent)}, cwd=folders,
    ).stdout  # fmt: skip
    features = json.loads((folders / "small/compression.json").read_text())["features_per_stage"]
    name = f"nnUNetWidths{'-'.join(map(str, features))}Plans"
    assert printed.splitlines()[-1] == f"nnUNetTrainer {name} (1,)"
    predictor = TrainedModel.read(folders / "small").predictor(torch.device("cpu"))
    predictor.use_mirroring = True
    predictor.predict_from_files_sequential([[image]], [str(folders / "with")])
    without, within = (
        SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folders / f"{w}.nii.gz"))) for w in ("without", "with")
    )
    assert len(set(within.flat)) > 1 and (without == within).all()


def test_plans_say_it_and_change_in_nothing_else(folders):
    write_model(folders / "model")
    path = folders / "model/plans.json"
    old = json.loads(path.read_text())
    old["configurations"]["2d"]["next_stage"] = "later"
    old["configurations"]["heir"] = {"inherits_from": "2d"}
    path.write_text(json.dumps(old))
    assert compress(folders, "--macs", "0.5") == 0
    new = json.loads((folders / "small/plans.json").read_text())
    features = new["configurations"]["2d"]["architecture"]["arch_kwargs"]["features_per_stage"]
    assert new.pop("nnunet_sauron")["derived_from"] == "nnUNetPlans"
    expected = copy.deepcopy(old)
    expected["plans_name"] = f"nnUNetWidths{'-'.join(map(str, features))}Plans"
    expected["configurations"]["2d"]["architecture"]["arch_kwargs"]["features_per_stage"] = features
    del expected["configurations"]["2d"]["next_stage"], expected["configurations"]["heir"]
    assert new == expected and all(0 < f < w for f, w in zip(features, (6, 8, 10), strict=True))


def test_notes_and_checkpoints_say_it(folders, capsys):
    write_model(folders / "model")
    assert compress(folders, "--params", "0.5") == 0
    notes = json.loads((folders / "small/compression.json").read_text())
    plans = json.loads((folders / "small/plans.json").read_text())
    assert notes["uniform_stages"] is True and notes["plans"] == plans["plans_name"]
    assert 0.3 < notes["folds"]["0"]["parameters"][1] / notes["folds"]["0"]["parameters"][0] <= 0.5
    written = checkpoint(folders)
    assert written["init_args"]["plans"] == plans and written["trainer_name"] == "nnUNetTrainer"
    assert written["compression"]["features_per_stage"] == notes["features_per_stage"]
    said = " ".join(capsys.readouterr().err.split())
    assert (
        f"A plain nnU-Net model, which predicts without this package: trainer nnUNetTrainer, plans {notes['plans']}"
        in said
    )


def test_all_folds_share_widths_and_every_one_meets_the_target(folders, capsys):
    write_model(folders / "model", folds=(0, 1, 2), widths=(16, 20, 24))
    old = TrainedModel.read(folders / "model")
    narrow = old.network("1")  # was pruned before: to keep half of what is left of it takes fewer channels
    resize(narrow, {"encoder.stages.2.0.convs.0": 6, "encoder.stages.2.0.convs.1": 6, "decoder.stages.0.convs.0": 6})
    change_checkpoint(folders, lambda c: c.update(network_weights=narrow.state_dict()), fold=1)
    assert compress(folders, "--macs", "0.5", "--json") == 0
    described = json.loads(capsys.readouterr().out)["folds"]
    assert list(described) == ["0", "1", "2"]
    assert described["0"]["after"] == described["1"]["after"] == described["2"]["after"]
    assert described["1"]["macs"][0] < described["0"]["macs"][0]
    assert all(fold["macs"][1] <= 0.5 * fold["macs"][0] for fold in described.values())
    for fold in described:
        stock_network(folders, fold=fold)


def prune_unevenly(root, plans: bool = False) -> torch.nn.Module:
    """As a pruning trainer leaves a model, or as `plan --widths-from` does; returns its network."""
    network = TrainedModel.read(root / "model").network("0")
    layout = channel_layout(network).widths
    uneven = {name: max(1, width - 1 - i % 4) for i, (name, width) in enumerate(layout.items())}
    resize(network, uneven)
    change_checkpoint(root, lambda c: c.update(network_weights=network.state_dict()))
    if plans:
        path = root / "model/plans.json"
        described = json.loads(path.read_text())
        architecture = described["configurations"]["2d"]["architecture"]
        name = architecture["network_class_name"].rpartition(".")[2]
        architecture["network_class_name"] = f"nnunet_sauron.planning.networks.Pruned{name}"
        architecture["arch_kwargs"]["widths"] = uneven
        path.write_text(json.dumps(described))
    return network.eval()


@pytest.mark.parametrize("plans", [False, True])
@pytest.mark.parametrize("architecture", ["plain", "resenc"])
def test_a_model_pruned_before_becomes_plain_and_stays_the_same_if_nothing_may_be_lost(folders, architecture, plans):
    """Layers narrower than their stage are filled up: cutting the others to the narrowest would lose what they have."""
    write_model(folders / "model", architecture=architecture)
    old = prune_unevenly(folders, plans)
    assert compress(folders, "--tolerance", "1e-12") == 0
    new = stock_network(folders)
    inputs = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(new(inputs), old(inputs), rtol=1e-4, atol=1e-5)
    architecture_name = {"plain": "PlainConvUNet", "resenc": "ResidualEncoderUNet"}[architecture]
    written = json.loads((folders / "small/plans.json").read_text())["configurations"]["2d"]["architecture"]
    assert written["network_class_name"] == f"{UNETS}.{architecture_name}" and "widths" not in written["arch_kwargs"]


def test_a_model_pruned_before_is_pruned_further(folders):
    write_model(folders / "model", widths=(16, 20, 24))
    old = prune_unevenly(folders)
    assert compress(folders, "--macs", "0.5") == 0
    measure = CostModel(old, (16, 16), 1).macs
    left = measure(channel_layout(stock_network(folders)).widths) / measure(channel_layout(old).widths)
    assert 0.35 < left <= 0.5


def test_widths_keep_to_multiples(folders):
    write_model(folders / "model", widths=(16, 20, 24))
    assert compress(folders, "--macs", "0.5", "--round-to", "4") == 0
    features = json.loads((folders / "small/compression.json").read_text())["features_per_stage"]
    assert all(width % 4 == 0 for width in features)


def test_a_dry_run_shows_what_the_run_gives(folders, capsys, monkeypatch):
    write_model(folders / "model")
    monkeypatch.setattr("nnunet_sauron.compression.command.TOLERANCES", (0.2,))
    assert compress(folders, "--dry-run", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert compress(folders, "--tolerance", "0.2", "--json") == 0
    after = json.loads(capsys.readouterr().out)["folds"]["0"]["after"]
    assert row["after"] == after
    assert len({width for name, width in after.items() if name.startswith("encoder.stages.0")}) == 1


def ranked_fold(widths=(20, 21, 22), share: float = 1.0) -> SimpleNamespace:
    """What `UniformStages` needs of a `FoldCompressor`; `share` scales the errors of the first stage's layers."""
    network = build("resenc", 2, widths)
    before, cost = channel_layout(network).widths, CostModel(network, (16, 16), 2)
    ranked = {}
    for name, width in before.items():
        factor = share if width == widths[0] else 1.0
        ranked[name] = Ranking(tuple(range(width)), (1.0, *(factor * 2.0**-k for k in range(1, width)), 0.0))
    left = cost_left(cost.macs, before)
    return SimpleNamespace(
        network=network, before=before, cost=cost, ranked=ranked, fraction_left=lambda goal: left, left_alone=[]
    )


def test_the_widths_that_residual_stages_are_kept_apart_by_count_towards_the_target():
    fold = ranked_fold()
    uniform = UniformStages([fold], round_to=4)
    moved = 0
    for percent in range(10, 90, 4):
        goal = Goal(macs=percent / 100)
        tolerance = uniform.tolerance(goal)
        assert fold.fraction_left(goal)(uniform.widths(tolerance)) <= goal.macs
        moved += tuple(uniform.of_stages(tolerance).values()) != tuple(
            widths_at(tolerance, uniform.rankings, 4).values()
        )
    assert moved > 5  # else nothing was tested


def test_every_fold_has_its_say_and_their_order_has_none():
    one, other = ranked_fold(), ranked_fold(share=1e-4)
    widths = [UniformStages(folds).of_stages(1e-4) for folds in ([one], [other], [one, other], [other, one])]
    first = [next(iter(of_stages.values())) for of_stages in widths]
    assert first[0] > first[2] > first[1] and widths[2] == widths[3]


@pytest.mark.parametrize("setting", ["stem_channels", "bottleneck_channels"])
def test_layers_that_stages_do_not_describe_are_refused_before_anything_is_read(folders, capsys, setting):
    write_model(folders / "model", architecture="resenc")
    path = folders / "model/plans.json"
    described = json.loads(path.read_text())
    described["configurations"]["2d"]["architecture"]["arch_kwargs"][setting] = 4
    path.write_text(json.dumps(described))
    shutil.rmtree(folders / "images")
    assert compress(folders, "--macs", "0.5") == 2
    assert f"sets {setting}=4 beside" in (said := capsys.readouterr().err) and "without --uniform-stages" in said
    assert not (folders / "small").exists()
