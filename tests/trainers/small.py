"""A pruning trainer without a data set: nnU-Net's own class, fed with random patches."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_sauron.methods.sauron import PublishedSauron
from nnunet_sauron.trainers import SauronTrainer

SIDE = 16
BATCH = 2
PROBED = 4  # patches that sensitivities are measured on
CONFIGURATIONS = {2: "2d", 3: "3d_fullres"}


class CertainCuts(PublishedSauron):
    """Sauron, whose thresholds move as they do; but random channels go after every epoch."""

    def redundant(self, training):
        super().redundant(training)
        draw = random.Random(training.epoch + 1)
        return {name: draw.sample(range(width), width) for name, width in training.widths_now.items()}


class RandomPatches:
    """What nnU-Net's data loaders yield: patches and targets at every scale of deep supervision."""

    def __init__(self, trainer, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.scales = trainer._get_deep_supervision_scales()
        self.shape = (trainer.batch_size, 1, *trainer.configuration_manager.patch_size)

    def __next__(self) -> dict:
        data = torch.randn(self.shape, generator=self.generator)
        labels = (data > 0.3).float() + (data > 1).float()
        if self.scales is None:
            return {"data": data, "target": labels}
        steps = [[round(1 / side) for side in scale] for scale in self.scales]
        return {"data": data, "target": [labels[(..., *(slice(None, None, s) for s in step))] for step in steps]}


class OnRandomPatches:
    """Before a trainer class: it trains on random patches, a few steps per epoch, and draws only if told to."""

    draws = False

    num_epochs = 6
    num_iterations_per_epoch = 3
    num_val_iterations_per_epoch = 1

    @property
    def patch_seed(self) -> int:
        return self.local_rank

    def get_dataloaders(self):
        return RandomPatches(self, self.patch_seed), RandomPatches(self, 100)

    def on_train_start(self) -> None:
        folder = Path(self.preprocessed_dataset_folder_base)
        (folder / "dataset_fingerprint.json").write_text("{}")
        if not self.draws:  # the pictures take longer than such a training
            self.logger.plot_progress_png = self._plot = lambda *_: None
        super().on_train_start()


class SmallTrainer(OnRandomPatches, SauronTrainer):
    """SauronTrainer as published, with certain cuts, and not to the last epoch."""

    Method = CertainCuts
    published = True
    cut_until, max_fraction_per_epoch, min_channels, rho = 0.8, 0.15, 2, None
    prune_batches = 2
    max_loss_increase = None  # the loss on a few random patches goes up and down


class Gelu(nnUNetTrainer):
    """A trainer with a network of its own."""

    @staticmethod
    def build_network_architecture(plans_manager, configuration_manager, channels, classes, enable_deep_supervision):
        arguments = configuration_manager.network_arch_init_kwargs | {"nonlin": "torch.nn.GELU", "nonlin_kwargs": {}}
        return get_network_from_plans(
            configuration_manager.network_arch_class_name,
            arguments,
            configuration_manager.network_arch_init_kwargs_req_import,
            channels,
            classes,
            deep_supervision=enable_deep_supervision,
        )


def small_trainer(
    folder: Path,
    trainer_class: type = SmallTrainer,
    widths=(6, 8, 10),
    device="cpu",
    architecture="plain",
    dim=2,
    norm="instance",
):
    """A trainer whose folders lie under `folder`; pytest's monkeypatch or the caller sets nnU-Net's variables."""
    preprocessed = folder / "preprocessed" / "Dataset001_Random" / f"nnUNetPlans_{CONFIGURATIONS[dim]}"
    preprocessed.mkdir(parents=True, exist_ok=True)
    # nnU-Net tells its data format from what it finds there.
    (preprocessed / "case.b2nd").touch()
    chosen = plans(widths, architecture, dim, norm)
    return trainer_class(chosen, CONFIGURATIONS[dim], 0, dataset_json(), torch.device(device))


def log_of(trainer) -> str:
    """What a fold's trainings wrote to their logs: each trainer has one of its own, named by the second it was made."""
    return "".join(path.read_text() for path in sorted(Path(trainer.output_folder).glob("training_log*.txt")))


def set_folders(monkeypatch, folder: Path) -> None:
    for kind in ("raw", "preprocessed", "results"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv(f"nnUNet_{kind}", str(folder / kind))


def plans(widths=(6, 8, 10), architecture="plain", dim=2, norm="instance") -> dict:
    """A plans file for patches of 16 x 16 (x 16), as nnU-Net's command hands it to a trainer."""
    network = "PlainConvUNet" if architecture == "plain" else "ResidualEncoderUNet"
    blocks = "n_conv_per_stage" if architecture == "plain" else "n_blocks_per_stage"
    more = {}
    if architecture == "bottleneck":
        block = "dynamic_network_architectures.building_blocks.residual.BottleneckD"
        more = {"block": block, "bottleneck_channels": [4] * len(widths)}
    return {
        "dataset_name": "Dataset001_Random",
        "plans_name": "nnUNetPlans",
        "continue_training": False,
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
        "configurations": {
            CONFIGURATIONS[dim]: {
                "data_identifier": f"nnUNetPlans_{CONFIGURATIONS[dim]}",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": BATCH,
                "patch_size": [SIDE] * dim,
                "batch_dice": True,
                "spacing": [1.0] * dim,
                "normalization_schemes": ["ZScoreNormalization"],
                "use_mask_for_norm": [False],
                "architecture": {
                    "network_class_name": f"dynamic_network_architectures.architectures.unet.{network}",
                    "arch_kwargs": {
                        "n_stages": len(widths),
                        "features_per_stage": list(widths),
                        "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
                        "kernel_sizes": [[3] * dim] * len(widths),
                        "strides": [[1] * dim] + [[2] * dim] * (len(widths) - 1),
                        blocks: [2] * len(widths),
                        "n_conv_per_stage_decoder": [2] * (len(widths) - 1),
                        "conv_bias": True,
                        "norm_op": f"torch.nn.modules.{norm}norm.{norm.title()}Norm{dim}d",
                        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                        "dropout_op": None,
                        "dropout_op_kwargs": None,
                        "nonlin": "torch.nn.LeakyReLU",
                        "nonlin_kwargs": {"inplace": True},
                        **more,
                    },
                    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin", *list(more)[:1]],
                },
            }
        },
    }


def dataset_json() -> dict:
    labels = {"background": 0, "low": 1, "high": 2}
    return {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}
