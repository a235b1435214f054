"""What became of a training: Dice and HD95 of its validation cases, the network's cost, the time it took."""

from __future__ import annotations

from pathlib import Path

from nnunet_sauron.model.checkpoints import COMPRESSION, logged
from nnunet_sauron.model.evaluation import evaluate_folder, mean_score
from nnunet_sauron.model.trained import TrainedModel
from nnunet_sauron.pruning import channel_layout, count_macs, count_parameters


def measured(model: Path, segmented: Path, fold: int, references: Path) -> dict:
    """The numbers of a fold, for its JSON file.

    Args:
        model: A trained model's folder.
        segmented: Folder of its segmentations of the fold's validation cases.
        fold: The fold.
        references: Folder of the reference segmentations.
    """
    trained = TrainedModel.read(model, [str(fold)])
    network, kind = trained.network(str(fold)), trained.segmentations
    cases = [path.name for path in kind.files(segmented)]
    scores = evaluate_folder(segmented, references, kind, cases=cases)
    checkpoint = trained.checkpoints[str(fold)]
    log = {} if COMPRESSION in checkpoint else logged(checkpoint)  # in a compressed model it is that of its source
    times = zip(log.get("epoch_start_timestamps", ()), log.get("epoch_end_timestamps", ()), strict=True)
    distance = mean_score(scores, "hd95")
    return {
        "cases": len(scores),
        "dice": mean_score(scores, "dice").value,
        "hd95_mm": distance.value,
        "hd95_undefined": distance.undefined,  # pairs of a case and a class without one of the two surfaces
        "case_dice": {score.case: round(score.mean("dice"), 5) for score in scores},
        "classes": {
            name: {key: mean_score(scores, key, name).value for key in ("dice", "hd95")} for name in scores[0].classes
        },
        "parameters": count_parameters(network),
        "macs": count_macs(network, trained.patch_size, trained.input_channels),
        "widths": _widths(network),
        "epoch_seconds": [round(end - start, 2) for start, end in times],
    }


def _widths(network) -> dict[str, int] | None:
    try:
        return channel_layout(network).widths
    except ValueError:  # convolutions in low rank
        return None
