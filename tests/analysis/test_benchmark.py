from __future__ import annotations

import json
import re

import pytest
import torch

from nnunet_sauron.analysis.benchmark import benchmark, print_benchmark
from nnunet_sauron.cli import main
from nnunet_sauron.pruning.timing import Timing

from ..compression.small_model import write_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [write_model(root / "wide", folds=(0, 1), widths=(6, 8, 10)), write_model(root / "narrow", widths=(2, 2, 2))]


def test_every_model_is_timed_with_the_patch_batch_and_threads_asked_for(models):
    threads = torch.get_num_threads()
    found = benchmark(models, patch_size=(16, 24), batch_size=3, threads=2, repeats=2)
    assert list(found) == ["wide fold 0, 3 x 16 x 24", "narrow fold 0, 3 x 16 x 24"]
    assert all((one.repeats, one.threads, one.device) == (2, 2, "cpu") for one in found.values())
    assert torch.get_num_threads() == threads


def test_folds_can_be_chosen(models):
    assert list(benchmark(models[:1], folds=["0", "1"], repeats=1)) == [f"wide fold {n}, 1 x 16 x 16" for n in (0, 1)]


def test_the_table_gives_ratios_and_json_the_machine(models, capsys):
    words = ["benchmark", "-m", *map(str, models), "--repeats", "2"]
    assert main(words) == 0
    capsys.readouterr()
    timings = {name: Timing(median, median, median, 2, 1, "cpu") for name, median in (("wide", 2.0), ("narrow", 0.5))}
    print_benchmark(timings, json_output=False)
    assert re.search(r"narrow\W+500\W.*\b0\.25\b", capsys.readouterr().out)
    assert main([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["machine"]["torch"] == torch.__version__
    assert len(printed["networks"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--patch-size", "15", "24"], "cannot take one of 15 x 24"),
        (["--patch-size", "1", "1"], "whose patches are 16 x 16"),
        (["--batch-size", "0"], "--batch-size must be at least 1; got 0"),
        (["-f", "7"], "has no fold 7"),
    ],
)
def test_what_cannot_be_timed_is_refused_by_name(models, capsys, words, message):
    assert main(["benchmark", "-m", str(models[0]), *words]) == 2
    assert message in capsys.readouterr().err
