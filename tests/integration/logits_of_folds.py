"""Run as a script: each fold's logits for one image, and all folds' together, by nnU-Net's own predictor."""

from __future__ import annotations

import sys

import numpy as np
import torch


def main(model_folder: str, image: str, output: str) -> None:
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(model_folder, use_folds=(0, 1, 2, 3, 4))
    preprocessor = predictor.configuration_manager.preprocessor_class()
    data, _, properties = preprocessor.run_case(
        [image], None, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    )
    data = torch.from_numpy(np.asarray(data, dtype=np.float32))
    # First to last, then back: what a fold gives must not depend on the widths that were loaded before it.
    ensemble = predictor.predict_logits_from_preprocessed_data(data).clone()
    parameters = predictor.list_of_parameters
    single = []
    for weights in reversed(parameters):
        predictor.list_of_parameters = [weights]
        single.insert(0, predictor.predict_logits_from_preprocessed_data(data).clone())
    # nnU-Net's logits are float16, and their mean has its rounding: the same sum in the same order.
    mean = sum(single[1:], single[0]) / len(single)
    _, probabilities = convert_predicted_logits_to_segmentation_with_correct_shape(
        mean,
        predictor.plans_manager,
        predictor.configuration_manager,
        predictor.label_manager,
        properties,
        return_probabilities=True,
    )
    np.savez(
        output,
        single=torch.stack(single).float().numpy(),
        mean=mean.float().numpy(),
        ensemble=ensemble.float().numpy(),
        probabilities=probabilities,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
