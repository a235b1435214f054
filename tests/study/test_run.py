"""The study's runner, on fakes: order, failures, results; and one small study for real."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ..integration.phantom import PLAIN, write_dataset
from .conftest import STUDY
from .test_grid import BASE, STOCK, small_grid

import run as runner  # isort: skip
from run import Study, executor, run_all  # isort: skip

A, B, C = ("a", 0), ("b", 0), ("c", 0)


class Job:
    """Is done at the second look."""

    def __init__(self, log: list, task, error: Exception | None):
        self.log, self.task, self.error, self.looks = log, task, error, 0
        log.append(("begun", task[0]))

    def done(self) -> bool:
        self.looks += 1
        return self.looks > 1

    def result(self) -> None:
        self.log.append(("done", self.task[0]))
        if self.error:
            raise self.error


def log_of(tasks, needs: dict, workers: int, errors: dict | None = None) -> tuple[list, list]:
    log: list = []
    trained = lambda task: all(("done", needed) in log for needed in needs.get(task[0], ()))  # noqa: E731
    failed = run_all(tasks, trained, lambda task: Job(log, task, (errors or {}).get(task[0])), workers, poll=0)
    return log, failed


def test_one_at_a_time_and_in_order():
    log, failed = log_of([A, B], {}, 1)
    assert log == [("begun", "a"), ("done", "a"), ("begun", "b"), ("done", "b")] and failed == []


def test_a_run_waits_for_what_it_begins_with_and_others_go_before_it():
    log, failed = log_of([A, B, C], {"b": ["a"]}, 2)
    assert [name for what, name in log if what == "begun"] == ["a", "c", "b"] and failed == []


def test_a_failed_run_does_not_end_the_others(capsys):
    log, failed = log_of([A, B, C], {}, 1, {"b": RuntimeError("no memory")})
    assert failed == [B] and ("done", "c") in log and "b fold 0 failed: no memory" in capsys.readouterr().out


def test_a_run_whose_beginning_is_never_trained_is_named(capsys):
    log, failed = log_of([A, B], {"b": ["z"]}, 2)
    assert failed == [B] and log[-1] == ("done", "a")
    assert "b fold 0 failed: it waits for a run" in capsys.readouterr().out


@pytest.mark.parametrize("cluster", [None, "local"])
def test_jobs_run_in_processes_of_their_own(tmp_path, cluster):
    write = "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"
    with executor(cluster, 2, ["timeout_min=5"], tmp_path) as pool:
        done = pool.submit(subprocess.run, [sys.executable, "-c", write, tmp_path / "a", "b"], check=True)
        broken = pool.submit(subprocess.run, [sys.executable, "-c", "raise SystemExit(3)"], check=True)
        assert done.result().returncode == 0 and (tmp_path / "a").read_text() == "b"
        with pytest.raises(Exception, match="exit status 3"):
            broken.result()


@pytest.fixture
def study(tmp_path, monkeypatch) -> Study:
    """A study that runs no command: it remembers them."""
    grid = small_grid(tmp_path, STOCK, {"name": "flat", "trainer": "ShrinkTrainer", "plan": ["--flat", 8]})
    study = Study(grid, tmp_path / "results")
    study.commands = []

    def remember(command, env=None, **_):
        study.commands.append((command, env or {}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(runner.subprocess, "run", remember)
    monkeypatch.setenv("nnUNet_results", "")
    for name in study.grid.environment():
        monkeypatch.setenv(name, "")
    monkeypatch.setattr("measure.measured", lambda *_: {"dice": 0.5, "macs": 10})
    return study


def test_a_training_leaves_its_numbers(study):
    study.do("stock", 0)
    ((command, environment),) = study.commands
    assert command[1:6] == ["-m", "nnunet_sauron.threads", "1", "nnUNetv2_train", "Dataset701_Tiny"]
    assert environment["OMP_NUM_THREADS"] == "1"
    given = environment["nnunet_sauron"]
    assert given[0] == "@" and json.loads(Path(given[1:]).read_text()) == {"num_epochs": 2}
    written = json.loads(study.result("stock", 0).read_text())
    assert (written["run"], written["fold"], written["dice"]) == ("stock", 0, 0.5)
    assert [path.name for path in study.results.iterdir()] == ["stock_fold0.json"]
    assert study.left() == [("flat", 0)]


def test_compress_gets_the_training_cases_images_and_the_folder_that_its_output_goes_to(study, monkeypatch):
    study.grid._add(
        {"name": "small", "trainer": "CompressedTrainer", "start": "stock", "compress": ["--macs", 0.1]}, {}
    )
    raw = study.grid.folder / "raw" / study.grid.dataset
    (raw / "imagesTr").mkdir(parents=True)
    for name in ("case_1_0000", "case_1_0001", "case_1_1_0000", "case_2_0000"):
        (raw / "imagesTr" / f"{name}.nii.gz").write_text(name)
    (raw / "dataset.json").write_text(json.dumps({"file_ending": ".nii.gz"}))
    study.grid.preprocessed.mkdir(parents=True)
    folds = [{"train": ["case_1", "case_2"], "val": ["case_1_1"]}]
    (study.grid.preprocessed / "splits_final.json").write_text(json.dumps(folds))
    seen = []

    def run(command, **_):
        if "compress" in command:
            images, output = (Path(command[command.index(option) + 1]) for option in ("-i", "-o"))
            assert output.parent.is_dir()
            seen.append((output.name, {image.read_text() for image in images.iterdir()}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(runner.subprocess, "run", run)
    study.do("small", 0)
    study.do("small", 0)  # the links are there
    assert seen == [("compressed_0", {"case_1_0000", "case_1_0001", "case_2_0000"})] * 2


def test_a_command_that_fails_leaves_no_result(study, monkeypatch):
    monkeypatch.setattr(runner.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 2))
    with pytest.raises(RuntimeError, match=r"nnUNetv2_train ended with 2; see .*stock_fold0\.log"):
        study.do("stock", 0)
    assert not study.results.exists()


def test_plans_are_made_before_folds_could_make_them_twice(study):
    submitted = []
    pool = type("Pool", (), {"submit": staticmethod(lambda *words, **_: submitted.append(words[1]))})
    study.submit(pool, ("flat", 0))
    ((plan, _),) = study.commands
    assert plan[4:6] == ["nnUNetv2_sauron", "plan"]
    assert submitted[0][-3:] == ["--one", "flat", "0"]
    study.commands.clear()
    study.grid.preprocessed.mkdir(parents=True)
    (study.grid.preprocessed / "tiny_flat.json").touch()
    study.submit(pool, ("flat", 0))
    assert study.commands == []


def test_a_dry_run_prints_what_is_left(study, monkeypatch, capsys):
    study.results.mkdir(parents=True)
    study.result("stock", 0).write_text("{}")
    words = ["run.py", str(study.grid.path), "-o", str(study.grid.folder), "--results", str(study.results.parent)]
    monkeypatch.setattr(sys, "argv", [*words, "--dry-run"])
    runner.main()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("nnUNetv2_sauron plan -d Dataset701_Tiny") for line in lines)
    assert any('nnunet_sauron="num_epochs=2" nnUNetv2_train Dataset701_Tiny 2d 0' in line for line in lines)
    assert not any("StockTrainer" in line for line in lines)
    assert study.commands == [] and not study.grid.folder.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "stok"], "the grid has no stok; it has stock, flat"),
        (["-o", "."], "--resume"),
        (["--workers", "0"], "at least 1; got 0"),
        (["--data", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_a_wrong_word_is_refused(study, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", str(study.grid.path), *words])
    with pytest.raises(SystemExit):
        runner.main()
    assert message in capsys.readouterr().err and study.commands == []


def test_cluster_options_need_a_value(tmp_path):
    with pytest.raises(SystemExit, match="NAME=VALUE, as in timeout_min=600; got slurm_partition"):
        executor("local", 1, ["slurm_partition"], tmp_path)


@pytest.mark.matrix
def test_a_small_study_for_real(tmp_path):
    """Stock, its low-rank network, and a flat one that learns from it, by the commands; then the report."""
    write_dataset(tmp_path / "work" / "raw", "Dataset701_Tiny", PLAIN, test_cases=0)
    runs = [
        STOCK,
        {**STOCK, "name": "tucker-25", "trainer": "TuckerTrainer", "start": "stock", "teacher": "stock"},
        {"name": "flat", "trainer": "ShrinkTrainer", "plan": ["--flat", 8], "teacher": "stock"},
    ]
    runs[1]["settings"], runs[2]["settings"] = {"target_macs": 0.25}, {"target_macs": 1}
    short = {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({**BASE, "settings": short, "runs": runs}))
    command = [sys.executable, STUDY / "run.py", "grid.yaml", "-o", "work", "--results", "results"]
    subprocess.run([*command, "--resume"], cwd=tmp_path, check=True)
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results" / "tiny").glob("*.json")}
    macs = {name: one["macs"] for name, one in results.items()}
    assert (
        0.2 < macs["tucker-25_fold0"] / macs["stock_fold0"] <= 0.25 and macs["flat_fold0"] < 0.1 * macs["stock_fold0"]
    )
    assert set(results["flat_fold0"]["widths"].values()) == {8}
    subprocess.run([*command, "--report"], cwd=tmp_path, check=True)
    assert (tmp_path / "results" / "tiny" / "front.png").is_file()


def test_images_that_another_grid_trains_on_are_not_written_anew(tmp_path):
    grid = small_grid(tmp_path, STOCK)
    (grid.preprocessed / "nnUNetPlans_2d").mkdir(parents=True)
    with pytest.raises(RuntimeError, match=r"nnUNetPlans_2d.* folder of its own with -o"):
        Study(grid, tmp_path / "results").prepare(tmp_path)
