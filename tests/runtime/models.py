"""Models with small random networks, as nnU-Net's folders and as bundles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import SimpleITK
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_sauron.deploy.command import export
from nnunet_sauron.model.networks import network_of_trainer
from nnunet_sauron.model.trained import TrainedModel
from tests.trainers.small import CONFIGURATIONS, dataset_json, plans

SETTINGS = {"order_z": 0, "force_separate_z": None}
CT = {"mean": 30.0, "std": 40.0, "percentile_00_5": -60.0, "percentile_99_5": 140.0}


def write_model(
    folder: Path,
    *,
    dim: int = 3,
    name: str | None = None,
    widths: list[tuple[int, ...]] = ((6, 8, 10),),
    trainer: str = "nnUNetTrainer",
    configuration: dict | None = None,
    plan: dict | None = None,
    dataset: dict | None = None,
    mirror_axes: tuple[int, ...] | None = None,
    seed: int = 0,
) -> TrainedModel:
    """A model's folder with a network of random weights per entry of `widths`.

    Args:
        name: Of the configuration, where it is not the usual one.
        configuration, plan, dataset: What differs from the plans of tests/trainers/small.py.
    """
    described, told = plans(widths[0], dim=dim), {**dataset_json(), **(dataset or {})}
    name = name or CONFIGURATIONS[dim]
    chosen = described["configurations"][name] = described["configurations"].pop(CONFIGURATIONS[dim])
    channels = len(told["channel_names"])
    resampling = {"data": (False, 3), "seg": (True, 1), "probabilities": (False, 1)}
    for what, (is_seg, order) in resampling.items():
        chosen[f"resampling_fn_{what}"] = "resample_data_or_seg_to_shape"
        chosen[f"resampling_fn_{what}_kwargs"] = {"is_seg": is_seg, "order": order, **SETTINGS}
    chosen.update(normalization_schemes=["ZScoreNormalization"] * channels, use_mask_for_norm=[False] * channels)
    chosen.update(configuration or {})
    described.update(
        transpose_forward=[0, 1, 2], transpose_backward=[0, 1, 2],
        foreground_intensity_properties_per_channel={str(channel): CT for channel in range(channels)},
    )  # fmt: skip
    described.update(plan or {})
    folder.mkdir(parents=True)
    for file, content in (("plans.json", described), ("dataset.json", told)):
        (folder / file).write_text(json.dumps(content))
    for fold, width in enumerate(widths):
        checkpoint = {
            "trainer_name": trainer,
            "init_args": {"configuration": name, "plans": described, "dataset_json": told, "fold": fold},
            "inference_allowed_mirroring_axes": mirror_axes,
            "network_weights": _weights(described, told, name, width, seed + fold),
        }
        (folder / f"fold_{fold}").mkdir()
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return TrainedModel.read(folder)


def _weights(described: dict, told: dict, name: str, width: tuple[int, ...], seed: int) -> dict:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    described = json.loads(json.dumps(described))
    described["configurations"][name]["architecture"]["arch_kwargs"]["features_per_stage"] = list(width)
    manager = PlansManager(described)
    configuration = manager.get_configuration(name)
    network = network_of_trainer(
        nnUNetTrainer, manager, configuration, determine_num_input_channels(manager, configuration, told),
        manager.get_label_manager(told).num_segmentation_heads, deep_supervision=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    weights = network.state_dict()
    for key, tensor in weights.items():
        if tensor.ndim > 1:
            fan_in = tensor[0].numel()
            # The last layers' weights are large, so that classes differ by more than rounding does.
            size = 6 if "seg_layers" in key else 1.4
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * size / fan_in**0.5)
        elif ".norm." in key:  # the biases of convolutions stay 0 in nnU-Net's training, too
            tensor.add_(torch.randn(tensor.shape, generator=generator) / 10)
    return weights


def write_bundle(path: Path, *models: TrainedModel) -> Path:
    """What `nnUNetv2_sauron export` writes of a model, or of the two models of a cascade."""
    *previous, model = (one.folder for one in models)
    export(model, path, previous_stage=previous[0] if previous else None)
    return path


def predict_with_nnunet(
    model: TrainedModel, images: Path, output: Path, *, previous: Path | None = None, probabilities: bool = False
) -> None:
    """nnU-Net's own prediction of a folder, in this process."""
    output.mkdir(parents=True)
    predictor = nnUNetPredictor(perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model.folder), tuple(model.checkpoints))
    predictor.predict_from_files_sequential(
        str(images), str(output), probabilities, folder_with_segs_from_prev_stage=str(previous) if previous else None
    )


def phantom(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A smooth volume of float32 (z, y, x) with some contrast and noise."""
    from scipy.ndimage import gaussian_filter

    noise = np.random.default_rng(seed).normal(size=shape)
    return (gaussian_filter(noise, 2) * 300 + noise * 5 + 100).astype(np.float32)


def write_image(file: Path, array: np.ndarray, spacing=None, direction=None, origin=None) -> Path:
    """An image with a geometry; `spacing`, `direction` and `origin` as SimpleITK has them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(array)
    if spacing is not None:
        image.SetSpacing(spacing)
    if direction is not None:
        image.SetDirection(direction)
    if origin is not None:
        image.SetOrigin(origin)
    SimpleITK.WriteImage(image, str(file))
    return file
