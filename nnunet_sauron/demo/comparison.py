"""Reports on the demo's models and writes `demo.json`; a command of its own, in nnU-Net's environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ..analysis.report.command import report
from ..datasets.phantom import DATASET_NAME
from ..files import write_text_atomically
from .steps import COMPRESS, MODELS, SETTINGS, model_folder


def compare(folder: Path) -> dict:
    """Make the report of all models, on the test cases.

    Args:
        folder: The demo's folder, with trained models and predictions.

    Returns:
        What `demo.json` holds: the content of the report's `report.json`, the `settings`, the seconds per case of each
        model, and where the report and the pruning's picture are.
    """
    predictions = {name: folder / "predictions" / name for name in MODELS}
    report(
        [model_folder(folder, name) for name in MODELS],
        folder / "report",
        predictions=list(predictions.values()),
        labels=folder / "nnUNet_raw" / DATASET_NAME / "labelsTs",
    )
    return {
        **json.loads((folder / "report" / "report.json").read_text()),
        "settings": {**SETTINGS, "compress": " ".join(COMPRESS)},
        "seconds_per_case": {name: seconds_per_case(path) for name, path in predictions.items()},
        "report_html": str(folder / "report" / "report.html"),
        "pruning_png": str(model_folder(folder, "SauronTrainer") / "fold_0" / "pruning.png"),
    }


def seconds_per_case(predictions: Path) -> float | None:
    """Mean time between the files of two successive cases, in seconds; None with fewer than two cases.

    Without workers nnU-Net reads, preprocesses, predicts and writes one case after the other, so this is all that a
    case costs. Imports, loading of the network and the first case (its warm-up) lie before the first file.

    Args:
        predictions: Folder of predicted segmentations, written with `-npp 0 -nps 0`.
    """
    written = sorted(path.stat().st_mtime for path in predictions.glob("*.nii.gz"))
    return (written[-1] - written[0]) / (len(written) - 1) if len(written) > 1 else None


def main(folder: Path) -> None:
    """Write `demo.json` into the demo's folder, whole or not at all."""
    write_text_atomically(folder / "demo.json", json.dumps(compare(folder), indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
