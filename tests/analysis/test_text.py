"""Names of the user's appear as they are: no markup, no emoji, no formula, no HTML."""

from __future__ import annotations

import io
import json
import re
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import SimpleITK
from matplotlib.figure import Figure
from rich.console import Console

from nnunet_sauron.analysis.benchmark import print_benchmark
from nnunet_sauron.analysis.feature_maps.maps import feature_maps
from nnunet_sauron.analysis.feature_maps.plots import draw
from nnunet_sauron.analysis.plot_text import as_is
from nnunet_sauron.analysis.report.compare import make_report
from nnunet_sauron.analysis.report.table import print_report
from nnunet_sauron.cli import main
from nnunet_sauron.compression.agreement import Measured
from nnunet_sauron.compression.compressor import Compressed
from nnunet_sauron.compression.tables import print_compressed
from nnunet_sauron.console.progress import Progress
from nnunet_sauron.console.terminal import PlainTable, plain_console
from nnunet_sauron.model.cases import case_of
from nnunet_sauron.model.evaluation import CaseScore, ClassScore
from nnunet_sauron.model.trained import TrainedModel
from nnunet_sauron.pruning.timing import Timing

from ..compression.small_model import write_images, write_model

NAMES = (
    "x [/red] y", "[bold]", "[link=a]b", "\\[a]", ":smile:", "$a_1$", "$\\frac$ 5", "<script>alert(1)</script>",
    "&amp;", "é 漢字 ж", "_hidden", "a \"b\" 'c'", "a  b", "%s {x}",
)  # fmt: skip
FOLDER = "_m [b] $x$ :heart: 'q'"


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(path))


def columns(text: str) -> list[list[str]]:
    """Cells of rich's tables."""
    return [[cell.strip() for cell in re.split("[│┃]", line)] for line in text.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A validated model whose classes, cases and folder have such names."""
    root = tmp_path_factory.mktemp("text") / FOLDER
    write_model(root)
    dataset = json.loads((root / "dataset.json").read_text())
    # The network has three outputs; its segmentations may be of more classes for the report.
    dataset["labels"] = {"background": 0, **{name: 1 + i for i, name in enumerate(NAMES)}}
    (root / "dataset.json").write_text(json.dumps(dataset))
    array = np.zeros((2, 16, 16), np.uint8)
    array[0, 0, : len(NAMES)] = range(1, 1 + len(NAMES))
    for case in ("c [red] $1$", "_d <b> :x:"):
        save(root / "fold_0" / "validation" / f"{case}.nii.gz", array)
        save(root.parent / "references" / f"{case}.nii.gz", array)
    (root / "fold_0" / "validation" / "summary.json").write_text("{}")
    return root


def test_report(folder, tmp_path, capsys):
    words = ["report", str(folder), "-o", str(tmp_path / "out [b]"), "--labels", str(folder.parent / "references")]
    assert main([*words, "--timing", "0"]) == 0
    assert str(tmp_path / "out [b]" / "report.html") in capsys.readouterr().out
    text = (tmp_path / "out [b]" / "report.txt").read_text(encoding="utf-8")
    page = (tmp_path / "out [b]" / "report.html").read_text(encoding="utf-8")
    data = json.loads((tmp_path / "out [b]" / "report.json").read_text(encoding="utf-8"))
    cells = {cell for row in columns(text) for cell in row}
    for name in NAMES:
        assert f"{name}: Dice" in cells
        assert f"{escape(name)}: Dice" in page
        assert name in data["models"][0]["cases"]["0"]["c [red] $1$"]
    assert "<script" not in page and FOLDER in cells and escape(FOLDER) in page


def test_report_on_a_console_with_markup(folder):
    report = make_report([folder], labels=folder.parent / "references", timing_seconds=0)
    output = io.StringIO()
    print_report(report, Console(file=output, width=200))
    assert {f"{name}: Dice" for name in NAMES} <= {cell for row in columns(output.getvalue()) for cell in row}


def test_compress(capsys):
    scores = [CaseScore("c", {name: ClassScore(0.5, 1.0, 0.5, 1.0, 1.0) for name in NAMES})]
    one = Compressed(0.1, {"a": 2}, {"a": 1}, (2, 1), (2, 1), (2.0, 1.0), {})
    network = {"built_by": "nnUNetTrainer", "assumed": None, "differs_from_plans": False}
    print_compressed(
        {"0": one}, Measured(scores), Path(FOLDER), json_output=False, predict=f"-m {FOLDER}", network=network
    )
    text = capsys.readouterr().out
    assert set(NAMES) <= {row[0] for row in columns(text) if len(row) > 1} | {
        row[1] for row in columns(text) if len(row) > 1
    }
    assert f"Wrote {FOLDER}" in text and f"Predict: -m {FOLDER}" in text


def test_benchmark(capsys):
    print_benchmark(dict.fromkeys(NAMES, Timing(1.0, 1.0, 1.0, 5, 1, "cpu")), json_output=False)
    assert set(NAMES) <= {cell for row in columns(capsys.readouterr().out) for cell in row}


@pytest.mark.parametrize("name", NAMES)
def test_progress_and_tables(capsys, name):
    progress = Progress()
    progress.say(name)
    with progress.bar(name, 1) as step:
        step(name)
    assert capsys.readouterr().err == f"{name}\n{name}\n"
    console = plain_console(width=60)
    console.print(PlainTable(name, name))
    console.print(name)
    assert capsys.readouterr().out.count(name) == 3


@pytest.mark.parametrize("name", NAMES)
def test_pictures(name):
    figure, output = Figure(), io.StringIO()
    axes = figure.subplots()
    axes.plot([0, 1], label=as_is(name))
    axes.set_title(as_is(name))
    figure.legend()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(output, format="svg")
    assert output.getvalue().count(escape(name, quote=False)) >= 2


def test_bytes_that_are_no_text_are_escaped_in_pictures():
    assert as_is("caf\udce9 $") == r"caf\udce9 \$"


def test_feature_maps(tmp_path):
    root = write_model(tmp_path / FOLDER, channels=("$T_1$ [/b]",))
    dataset = json.loads((root / "dataset.json").read_text())
    dataset["labels"] = {"background": 0, "$\\frac$ [/red]": 1, "_hidden $": 2}
    (root / "dataset.json").write_text(json.dumps(dataset))
    image = write_images(tmp_path / "images", 1, (3, 16, 16)) / "case_0_0000.nii.gz"
    image = image.rename(image.with_name("c $x$ [b]_0000.nii.gz"))
    model = TrainedModel.read(root)
    assert all(path.is_file() for path in draw(feature_maps(model, "0", case_of(image, model)), tmp_path / "out"))


def test_an_error_keeps_the_spaces_of_a_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("nnunet_sauron_debug", "0")
    assert main(["benchmark", "-m", str(tmp_path / "a  [b]  c")]) == 2
    assert str(tmp_path / "a  [b]  c") in capsys.readouterr().err
