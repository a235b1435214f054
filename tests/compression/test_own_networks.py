"""Models of trainers that build other networks than their plans say: compressed as what they are, or refused."""

from __future__ import annotations

import json
import os
from functools import cache

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities import find_class_by_name
from torch import nn

from nnunet_sauron.cli import main
from nnunet_sauron.model.networks import BUILT_BY, NetworkBuilder
from nnunet_sauron.model.trained import TrainedModel
from nnunet_sauron.planning.widths import PrunedWidths
from nnunet_sauron.plugin.installation import trainer_folder
from nnunet_sauron.trainers.teacher import Teacher, is_supervised

from .small_model import write_images, write_model

TRAINERS = '''
from torch import nn
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans


class Changed(nnUNetTrainer):
    """With other keyword arguments of its architecture, written into the dictionary that nnU-Net hands out."""

    changes = {}

    @classmethod
    def build_network_architecture(cls, plans_manager, configuration_manager, channels, classes,
                                   enable_deep_supervision=True):
        arguments = configuration_manager.network_arch_init_kwargs
        arguments.update(cls.changes)
        return get_network_from_plans(
            configuration_manager.network_arch_class_name, arguments,
            configuration_manager.network_arch_init_kwargs_req_import, channels, classes,
            deep_supervision=enable_deep_supervision,
        )


class Gelu(Changed):
    changes = {"nonlin": "torch.nn.GELU", "nonlin_kwargs": {}}


class Slope(Changed):
    changes = {"nonlin_kwargs": {"negative_slope": 0.2, "inplace": True}}


class Eps(Changed):
    changes = {"norm_op_kwargs": {"eps": 1e-2, "affine": True}}


class Dropout(Changed):
    changes = {"dropout_op": "torch.nn.Dropout2d", "dropout_op_kwargs": {"p": 0.3}}


class Order(Changed):
    changes = {"nonlin_first": True}


class Kernel(Changed):
    changes = {"kernel_sizes": [[5, 5]] * 3}


class Mutating(nnUNetTrainer):
    """Exchanges modules of the network once it is built."""

    @staticmethod
    def change(network):
        for module in network.modules():
            if isinstance(module, nn.LeakyReLU):
                module.negative_slope = 0.3

    @classmethod
    def build_network_architecture(cls, *arguments, **options):
        network = nnUNetTrainer.build_network_architecture(*arguments, **options)
        cls.change(network)
        return network


Mutating.build_network_architecture.__func__.__signature__ = __import__("inspect").signature(
    Changed.build_network_architecture.__func__)


class OldSignature(nnUNetTrainer):
    @staticmethod
    def build_network_architecture(architecture_class_name, arch_init_kwargs, arch_init_kwargs_req_import,
                                   num_input_channels, num_output_channels, enable_deep_supervision=True):
        return get_network_from_plans(
            architecture_class_name, {**arch_init_kwargs, "nonlin": "torch.nn.GELU", "nonlin_kwargs": {}},
            arch_init_kwargs_req_import, num_input_channels, num_output_channels,
            deep_supervision=enable_deep_supervision,
        )


class Longer(nnUNetTrainer):
    def configure_optimizers(self):
        self.num_epochs = 7
        return super().configure_optimizers()


class OtherInitialisation(Mutating):
    @staticmethod
    def change(network):
        for parameter in network.parameters():
            parameter.data.normal_()


class NormFirst(Mutating):
    @staticmethod
    def change(network):
        for module in network.modules():
            if type(module).__name__ == "ConvDropoutNormReLU":
                module.norm = nn.InstanceNorm2d(module.conv.in_channels, affine=True)
                module.all_modules = nn.Sequential(module.norm, module.nonlin, module.conv)


class Extra(Mutating):
    @staticmethod
    def change(network):
        network.gate = nn.Conv2d(6, 6, 1)


class OwnForward(Mutating):
    @staticmethod
    def change(network):
        forward = network.forward
        network.forward = lambda x: forward(x * 2)


class Net(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.body = nn.Conv2d(channels, classes, 3, padding=1)

    def forward(self, x):
        return self.body(x)


class Foreign(nnUNetTrainer):
    @staticmethod
    def build_network_architecture(plans_manager, configuration_manager, channels, classes,
                                   enable_deep_supervision=True):
        return Net(channels, classes)


class Failing(nnUNetTrainer):
    @staticmethod
    def build_network_architecture(plans_manager, configuration_manager, channels, classes,
                                   enable_deep_supervision=True):
        raise KeyError("my_setting")
'''


@pytest.fixture
def root(tmp_path, monkeypatch):
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("nnunet_sauron_debug", "0")
    # nnU-Net asks it of every module that is loaded, twice for each folder that it searches: a third of the time here.
    if asked := getattr(find_class_by_name, "_module_originates_from_path", None):
        monkeypatch.setattr(find_class_by_name, asked.__name__, cache(asked))
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers/somebodys_trainers.py").write_text(TRAINERS)
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join((str(trainer_folder()), str(tmp_path / "trainers"))))
    write_images(tmp_path / "images", shape=(3, 24, 24))
    return tmp_path


def write(root, trainer: str, found: bool = True):
    """A model of that trainer, with weights of the network that it builds."""
    folder = write_model(root / "model")
    path = folder / "fold_0/checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["trainer_name"] = trainer
    if found:
        model = TrainedModel.read(folder)
        network = NetworkBuilder(trainer, model.manager, model.configuration, model.dataset_json).build()
        generator = torch.Generator().manual_seed(0)
        for parameter in network.parameters():  # nnU-Net begins with norms of 1 and 0
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        checkpoint["network_weights"] = network.state_dict()
    torch.save(checkpoint, path)
    return folder


def compress(root, *words: str) -> int:
    return main(["compress", "-m", f"{root}/model", "-i", f"{root}/images", "-o", f"{root}/small", *words])


@torch.no_grad()
def logits_of_nnunet(folder) -> torch.Tensor:
    """By nnU-Net's own prediction, which finds the trainer by its name."""
    predictor = nnUNetPredictor(perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), (0,), "checkpoint_final.pth")
    return predictor.network.eval()(torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(1)))


class TestCompressedWithItsOwnNetwork:
    @pytest.mark.parametrize(
        "trainer", ["Gelu", "Slope", "Eps", "Dropout", "Order", "Kernel", "Mutating", "OldSignature"]
    )
    def test_the_new_models_logits_are_the_old_ones(self, root, trainer, capsys):
        write(root, trainer)
        assert compress(root, "--tolerance", "1e-12") == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert f"Its network is that of {trainer}: predicting needs this trainer" in printed
        old, new = logits_of_nnunet(root / "model"), logits_of_nnunet(root / "small")
        torch.testing.assert_close(new, old)
        plans = json.loads((root / "small/plans.json").read_text())
        assert plans["configurations"]["2d"].pop(BUILT_BY) == trainer
        assert plans == json.loads((root / "model/plans.json").read_text())
        notes = json.loads((root / "small/compression.json").read_text())["network"]
        assert notes == {"built_by": trainer, "differs_from_plans": True, "assumed": None}

    def test_a_narrower_one_computes_what_was_measured_and_is_compressed_again(self, root):
        write(root, "Gelu")
        assert compress(root, "--macs", "0.6") == 0
        small = TrainedModel.read(root / "small")
        patch = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.testing.assert_close(small.network("0")(patch), logits_of_nnunet(root / "small"))
        assert any(isinstance(module, nn.GELU) for module in small.network("0").modules())
        (root / "small").rename(root / "once")
        (root / "model").rename(root / "first")
        (root / "once").rename(root / "model")
        assert compress(root, "--tolerance", "1e-12") == 0
        torch.testing.assert_close(logits_of_nnunet(root / "small"), logits_of_nnunet(root / "model"))

    def test_without_the_trainer_the_new_model_is_refused_by_name(self, root, monkeypatch, capsys):
        write(root, "Gelu")
        assert compress(root, "--tolerance", "1e-12") == 0
        monkeypatch.setenv("nnUNet_extTrainer", str(trainer_folder()))
        with pytest.raises(RuntimeError, match=r"network of the trainer Gelu.*nnUNet_extTrainer"):
            logits_of_nnunet(root / "small")
        assert main(["benchmark", "-m", f"{root}/small"]) == 2
        assert "does not find its trainer Gelu" in capsys.readouterr().err

    @pytest.mark.parametrize("trainer", ["Gelu", "nnUNetTrainer"])
    def test_densify_names_whose_network_it_is(self, root, capsys, trainer):
        write(root, trainer)
        assert main(["densify", str(root / "model/fold_0/checkpoint_final.pth"), "-o", str(root / "dense.pth")]) == 0
        assert ("of the network that Gelu builds" in capsys.readouterr().out) == (trainer == "Gelu")

    def test_the_command_to_predict_names_the_folder_of_its_trainer(self, root, capsys, monkeypatch):
        write(root, "Gelu")
        monkeypatch.setattr("nnunet_sauron.plugin.commands.shim_state", lambda folder: "current")
        assert compress(root, "--tolerance", "1e-12") == 0
        predict = f"nnUNet_extTrainer={os.environ['nnUNet_extTrainer']} nnUNetv2_predict_from_modelfolder -m {root}"
        assert predict in capsys.readouterr().out

    def test_uniform_stages_would_be_nnunets_own_network(self, root, capsys):
        write(root, "Gelu")
        assert compress(root, "--macs", "0.6", "--uniform-stages") == 2
        assert "does not build the network of Gelu" in capsys.readouterr().err

    def test_as_a_teacher_it_is_what_it_is(self, root):
        model = TrainedModel.read(write(root, "Gelu"))
        teacher = Teacher.read(root / "model", 0, model.plans, "2d", model.dataset_json)
        assert any(isinstance(module, nn.GELU) for module in teacher.networks[0].modules())

    def test_its_checkpoints_name_it_to_a_training_that_starts_from_them(self, root):
        write(root, "Gelu")
        assert compress(root, "--tolerance", "1e-12") == 0
        checkpoint = torch.load(root / "small/fold_0/checkpoint_final.pth", weights_only=False)
        assert checkpoint["init_args"]["plans"]["configurations"]["2d"][BUILT_BY] == "Gelu"


@pytest.mark.parametrize("trainer", ["nnUNetTrainer", "nnUNetTrainer_250epochs", "Longer", "OtherInitialisation"])
def test_a_trainer_that_changes_no_layer_works_in_silence(root, trainer, capsys):
    write(root, trainer)
    assert compress(root, "--tolerance", "1e-12") == 0
    captured = capsys.readouterr()
    assert "ssumed" not in captured.out + captured.err and "needs this trainer" not in captured.out
    assert (root / "small/plans.json").read_text() == (root / "model/plans.json").read_text()
    torch.testing.assert_close(logits_of_nnunet(root / "small"), logits_of_nnunet(root / "model"))


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ("NormFirst", "InstanceNorm2d stands before the convolution"),
        ("Extra", "Module 'gate' of class Conv2d does not belong to this kind of network"),
        ("OwnForward", "has a forward of its own"),
        ("Foreign", "Net cannot be pruned"),
        ("Failing", "The trainer Failing cannot build its network, for nnU-Net's prediction either: KeyError"),
    ],
)
def test_a_network_that_cannot_be_followed_is_refused_by_name(root, trainer, said, capsys):
    write(root, trainer, found=trainer not in ("Failing",))
    assert compress(root, "--macs", "0.6") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert said in error and trainer in error and not (root / "small").exists()


class TestATrainerThatIsNotFound:
    def test_a_module_that_ends_the_process_does_not_end_ours(self, root, capsys):
        write(root, "Elsewhere", found=False)
        (root / "trainers/a_script.py").write_text("raise SystemExit('usage: a_script.py FOLDER')")
        assert main(["benchmark", "-m", f"{root}/model", "--repeats", "1"]) == 0
        assert "Elsewhere (SystemExit: usage: a_script.py FOLDER)" in capsys.readouterr().err

    def test_what_is_assumed_is_said_in_the_table_in_json_and_in_the_folder(self, root, capsys):
        write(root, "Elsewhere", found=False)
        assert compress(root, "--tolerance", "1e-12") == 0
        captured = capsys.readouterr()
        for text in (captured.out, captured.err, (root / "small/compression.json").read_text()):
            assert "Assumed, not known" in text and "Elsewhere" in text
        (root / "small").rename(root / "first")
        assert compress(root, "--tolerance", "1e-12", "--json") == 0
        assert "Elsewhere" in json.loads(capsys.readouterr().out)["network"]["assumed"]

    def test_other_verbs_say_it_as_well(self, root, capsys):
        model = str(write(root, "Elsewhere", found=False))
        image = str(root / "images/case_0_0000.nii.gz")
        for words in (
            ["benchmark", "-m", model, "--repeats", "1"],
            ["feature_maps", "-m", model, "-i", image, "-o", str(root / "maps")],
            ["report", model, "-o", str(root / "report"), "--timing", "0"],
        ):
            assert main(words) == 0
            captured = capsys.readouterr()
            assert "Elsewhere" in captured.out + captured.err, words[0]

    @pytest.mark.parametrize("change", ["missing", "extra", "shape"])
    def test_names_and_shapes_of_weights_are_checked(self, root, change, capsys):
        path = write(root, "Elsewhere", found=False) / "fold_0/checkpoint_final.pth"
        checkpoint = torch.load(path, weights_only=False)
        weights = checkpoint["network_weights"]
        first = "encoder.stages.0.0.convs.0.conv.weight"
        if change == "missing":
            weights.pop(first)
        elif change == "extra":
            weights["gate.weight"] = torch.zeros(1)
        else:
            weights[first] = torch.zeros(6, 1, 5, 5)
        torch.save(checkpoint, path)
        assert compress(root, "--macs", "0.6") == 2
        assert "another architecture than its plans describe" in capsys.readouterr().err
        if change == "extra":
            with pytest.raises(ValueError, match="in more than the widths of layers"):
                PrunedWidths.of_checkpoint(path)

    def test_a_module_that_cannot_be_imported_is_named(self, root):
        (root / "trainers/a_first.py").write_text("import no_such_package")
        model = TrainedModel.read(write(root, "Elsewhere", found=False))
        assert "No module named 'no_such_package'" in model.builder.assumed


def test_costs_are_those_of_the_trainers_network(root):
    write(root, "Kernel")
    assert main(["report", f"{root}/model", "-o", f"{root}/report", "--timing", "0"]) == 0
    told = json.loads((root / "report/report.json").read_text())["models"][0]
    write_model(root / "plain")
    assert main(["report", f"{root}/plain", "-o", f"{root}/other", "--timing", "0"]) == 0
    plain = json.loads((root / "other/report.json").read_text())["models"][0]
    assert told["folds"]["0"]["macs"] == told["dense"]["macs"] > 1.5 * plain["dense"]["macs"]


def test_heads_that_no_loss_saw_are_known_by_their_biases():
    heads = {f"decoder.seg_layers.{i}.bias": torch.zeros(3) for i in range(4)}
    assert not is_supervised({"trainer_name": "Mine", "network_weights": heads})
    assert not is_supervised({"trainer_name": "Mine", "network_weights": heads, "logging": None})
    heads["decoder.seg_layers.2.bias"] = torch.ones(3)
    assert is_supervised({"trainer_name": "Mine", "network_weights": heads})
    without = {"enable_deep_supervision": False}
    for logged in ({"settings": [without]}, {"pruning": [{"settings": without}]}):  # as it came from a trained one
        assert not is_supervised({"trainer_name": "Ours", "network_weights": heads, "logging": logged})
