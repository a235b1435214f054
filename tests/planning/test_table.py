from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnunet_sauron.cli import main

from .plans import DATASET, network, plans, write_checkpoint, write_plans


@pytest.fixture(autouse=True)
def _errors_as_users_see_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnunet_sauron_debug", raising=False)
    monkeypatch.setenv("COLUMNS", "120")


def configurations(source: Path, name: str) -> dict:
    return json.loads(source.with_name(f"{name}.json").read_text())["configurations"]


def test_table_shows_old_and_new_side_by_side(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-d", "7", "--flat", "6", "-c", "3d_fullres", "--same-memory"]) == 0
    printed = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
            for line in printed.splitlines() if line.startswith("│")}  # fmt: skip
    assert rows["widths"] == ["8-12-12", "6-6-6", ""]
    assert rows["stages"] == ["3", "3", ""]
    old, new, ratio = rows["parameters"]
    assert (old, new, ratio) == ("34.98 k", "11.52 k", "32.9%")
    assert {"MACs of one patch", "patch size", "batch size", "feature map values"} <= set(rows)
    assert "3d_fullres: patch limited by the memory, batch by the memory" in printed
    assert printed.splitlines()[-2:] == [
        f"Wrote {source.with_name('nnUNetLUnet6Plans.json')}",
        f"Train: nnUNetv2_train {DATASET} 3d_fullres FOLD -p nnUNetLUnet6Plans",
    ]


def test_json_says_the_same(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_plans(source.parents[1], "nnUNetOtherPlans")
    assert main(["plan", "-d", DATASET, "-p", "nnUNetOtherPlans", "--scale", "0.5", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["name"], said["source"]) == ("nnUNetOtherScaled50Plans", "nnUNetOtherPlans")
    assert Path(said["path"]) == source.with_name("nnUNetOtherScaled50Plans.json")
    assert list(said["configurations"]) == list(plans()["configurations"])
    fullres = said["configurations"]["3d_fullres"]
    assert (fullres["old"]["widths"], fullres["new"]["widths"]) == ([8, 12, 12], [4, 6, 6])
    assert fullres["ratios"]["macs"] == fullres["new"]["macs"] / fullres["old"]["macs"] < 0.4
    assert fullres["ratios"]["patch_size"] == fullres["ratios"]["batch_size"] == 1
    assert fullres["limits"] is None and fullres["old"]["stages"] == fullres["new"]["stages"] == 3


@pytest.mark.parametrize("words", [["4,5,6"], ["4", "5", "6"], ["4,", "5,6"]])
def test_numbers_are_separated_by_commas_or_spaces(source: Path, words: list[str]) -> None:
    command = ["plan", "-d", "7", "-c", "3d_fullres", "--widths", *words, "--patch-size", "8,16", "32", "-o", "mine"]
    assert main([*command, "--batch-size", "3"]) == 0
    new = configurations(source, "mine")["3d_fullres"]
    assert new["architecture"]["arch_kwargs"]["features_per_stage"] == [4, 5, 6]
    assert (new["patch_size"], new["batch_size"]) == ([8, 16, 32], 3)


def test_widths_come_from_a_checkpoint(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = plans()
    weights = network(trained["configurations"]["2d"]["architecture"]).state_dict()
    checkpoint = write_checkpoint(tmp_path / "a.pth", weights, trained, "2d")
    assert main(["plan", "-d", "7", "-p", "nnUNetPlans", "--widths-from", str(checkpoint)]) == 0
    new = configurations(source, "nnUNetPrunedPlans")["2d"]["architecture"]
    assert new["network_class_name"] == "nnunet_sauron.planning.networks.PrunedPlainConvUNet"
    assert new["arch_kwargs"]["widths"]["encoder.stages.0.0.convs.0"] == 8


def test_overwrite_replaces_what_is_refused_without(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "-d", "7", "--flat", "4"]
    assert main(command) == 0
    capsys.readouterr()
    assert main(command) == 2
    refused = capsys.readouterr()
    assert refused.out == ""
    assert refused.err.startswith("nnUNetv2_sauron plan: ") and "exists already" in refused.err
    assert main([*command, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--widths", "8,x"], "--widths takes whole numbers, such as 64 64 64 or 64,64,64; got '8,x'."),
        (["--flat", "4", "--patch-size", "8.5"], "--patch-size takes whole numbers"),
        (["--flat", "4", "--batch-size", "0"], "The batch size is 0"),
        (["--flat", "4", "--patch-size", ","], "The patch size  has 0 axes"),
        (["--widths", ","], "There are no widths"),
        (["--widths-from", "gone.pth"], "There is no checkpoint gone.pth."),
    ],
)
def test_refusal_is_one_line(
    source: Path, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(source.parent.iterdir())
    assert main(["plan", "-d", "7", *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert complaint in said.err and said.err.count("\n") == 1
    assert sorted(source.parent.iterdir()) == before


@pytest.mark.parametrize("words", [[], ["--flat", "8", "--scale", "0.5"], ["--widths", "8", "--widths-from", "a.pth"]])
def test_exactly_one_kind_of_widths_is_needed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "-d", "7", *words])
    assert stopped.value.code == 2
    assert "--flat" in capsys.readouterr().err


def test_a_cascade_is_trained_after_the_stage_before_it(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-d", "7", "--flat", "6", "-c", "3d_cascade_fullres"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"Train: nnUNetv2_train {DATASET} {stage} FOLD -p nnUNetLUnet6Plans"
        for stage in ("3d_lowres", "3d_cascade_fullres")
    ]
