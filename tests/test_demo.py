from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from nnunet_sauron.console.terminal import plain_console
from nnunet_sauron.demo import steps
from nnunet_sauron.demo.commands import CommandError, run_command
from nnunet_sauron.demo.display import Display, print_comparison
from nnunet_sauron.demo.folder import STATE_FILE, DemoFolder
from nnunet_sauron.demo.steps import (
    Step,
    command_environment,
    demo_steps,
    model_folder,
    run_demo,
    with_small_batch,
)
from nnunet_sauron.files import locked

COMPARISON = {
    "seconds_per_case": {"StockTrainer": 1.25, "SauronTrainer": None},
    "report_html": "report.html",
    "pruning_png": "pruning.png",
}

TRAINING_OUTPUT = """\
This is the configuration: Epoch 7 of nothing, Pseudo
2026-01-01 10:00:00.000001: Epoch 7
2026-01-01 10:00:00.000002: Current learning rate: 0.00944
2026-01-01 10:00:05.000001: Pseudo dice [np.float32(0.5), np.float32(1.0), np.float32(nan), np.float32(3e-04)]
2026-01-01 10:00:05.000002: Epoch time: 4.29 s
2026-01-01 10:00:05.000003: Epoch 8
2026-01-01 10:00:06.000000: Training done.
"""


@pytest.fixture
def no_nnunet_needed(monkeypatch):
    monkeypatch.setattr(steps, "_require_nnunet", lambda: None)


def write_comparison(folder: Path) -> None:
    (folder / "demo.json").write_text(json.dumps(COMPARISON))
    (folder / "report").mkdir()
    (folder / "report" / "report.txt").write_text("the report")


def fake_steps(monkeypatch, *runs) -> None:
    """Put steps called a, b, ... in the place of the demo's."""
    fakes = [Step(name, f"step {name}", run) for name, run in zip("abc", runs, strict=False)]
    monkeypatch.setattr(steps, "demo_steps", lambda folder: fakes)


# Plans and environment


def test_derived_plans_change_name_and_batch_alone():
    plans = {
        "plans_name": "nnUNetPlans",
        "configurations": {
            "2d": {"data_identifier": "nnUNetPlans_2d", "batch_size": 44, "architecture": {"features": [32, 64]}},
            "3d_fullres": {"data_identifier": "nnUNetPlans_3d_fullres", "batch_size": 2},
        },
    }
    before = json.dumps(plans)
    derived = with_small_batch(plans)
    assert json.dumps(plans) == before
    assert derived["plans_name"] == steps.PLANS
    assert derived["configurations"]["2d"]["batch_size"] == steps.BATCH_SIZE
    derived["plans_name"], derived["configurations"]["2d"]["batch_size"] = "nnUNetPlans", 44
    assert derived == plans


def test_commands_see_the_demos_folders_and_none_of_the_users_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "/elsewhere")
    monkeypatch.setenv("nnUNet_n_proc_DA", "7")
    monkeypatch.setenv("nnunet_sauron", "lambda_=100")
    environment = command_environment(tmp_path)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        assert environment[name] == str(tmp_path / name)
    assert "nnUNet_n_proc_DA" not in environment
    assert "nnunet_sauron" not in environment
    assert Path(environment["nnUNet_extTrainer"]).is_dir()
    assert command_environment(tmp_path, nnunet_sauron="num_epochs=2")["nnunet_sauron"] == "num_epochs=2"
    assert dict(os.environ)["nnUNet_raw"] == "/elsewhere"


def test_all_trainings_have_the_same_length():
    lengths = {setting for text in steps.SETTINGS.values() for setting in text.split(",") if setting.startswith("num_")}
    assert lengths == {setting for setting in steps.SETTINGS["StockTrainer"].split(",") if setting.startswith("num_")}
    assert f"num_epochs={steps.EPOCHS}" in lengths


# Progress


def shown(capsys, output: str, epochs: int) -> str:
    display = Display(plain_console(force_terminal=False, width=200), 7)
    with display.step(3, "train", epochs) as follow:
        for line in output.splitlines(keepends=True):
            follow(line)
    return capsys.readouterr().out


def test_plain_output_has_a_line_for_the_step_some_epochs_and_the_validation(capsys):
    lines = shown(capsys, TRAINING_OUTPUT, 16).splitlines()
    assert lines[0] == "[3/7] train ..."
    assert lines[1].endswith(" s: epoch 8 of 16, pseudo Dice 0.50")  # of the classes that have one
    assert lines[2].endswith(" s: epochs done, validating, pseudo Dice 0.50")
    assert lines[3].startswith("[3/7] train: ") and len(lines) == 4


def test_pseudo_dice_without_any_class_is_not_shown(capsys):
    output = "2026-01-01 10:00:05.000001: Pseudo dice [np.float32(nan)]\n2026-01-01 10:00:06.000000: Training done.\n"
    assert shown(capsys, output, 8).splitlines()[1].endswith("validating")


def test_the_report_and_where_it_is_are_printed(capsys):
    print_comparison(plain_console(force_terminal=False, width=200), COMPARISON, "Dice [of] both")
    output = capsys.readouterr().out
    for text in ("Dice [of] both", "StockTrainer 1.25", "report.html", "pruning.png"):
        assert text in output


# Going on after an interruption


def test_finished_steps_are_not_done_again(tmp_path, monkeypatch, capsys, no_nnunet_needed):
    done = []

    def interrupt(follow):
        raise KeyboardInterrupt

    fake_steps(monkeypatch, lambda follow: done.append("a"), interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "demo")
    assert f"To go on: nnUNetv2_sauron demo -o {tmp_path / 'demo'}" in capsys.readouterr().out

    def finish(follow):
        done.append("b")
        write_comparison(tmp_path / "demo")

    fake_steps(monkeypatch, lambda follow: done.append("a again"), finish)
    run_demo(tmp_path / "demo")
    assert done == ["a", "b"]
    run_demo(tmp_path / "demo")
    assert done == ["a", "b"]


def test_two_demos_do_not_work_in_one_folder(tmp_path, monkeypatch, no_nnunet_needed):
    fake_steps(monkeypatch, lambda follow: pytest.fail("it was begun"))
    (tmp_path / "demo").mkdir()
    with locked(tmp_path / "demo", tmp_path), pytest.raises(FileExistsError, match="by another process"):
        run_demo(tmp_path / "demo")


def test_training_goes_on_from_a_checkpoint_and_begins_without_one(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(steps, "run_command", lambda command, **options: commands.append((command, options)))
    train = next(step for step in demo_steps(tmp_path) if step.name == "train_SauronTrainer")
    train.run(print)
    fold = model_folder(tmp_path, "SauronTrainer") / "fold_0"
    fold.mkdir(parents=True)
    torch.save({}, fold / "checkpoint_best.pth")
    train.run(print)
    assert ["--c" in command for command, _ in commands] == [False, True]
    assert all(options["environment"]["nnunet_sauron"] == steps.SETTINGS["SauronTrainer"] for _, options in commands)


def test_half_done_predictions_are_removed_first(tmp_path, monkeypatch):
    leftover = tmp_path / "predictions" / "StockTrainer" / "phantom_ts_000.nii.gz"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    monkeypatch.setattr(steps, "run_command", lambda command, **options: None)
    next(step for step in demo_steps(tmp_path) if step.name == "predict_StockTrainer").run(print)
    assert not leftover.exists()


# The folder


def test_foreign_folder_is_refused_and_left_alone(tmp_path, no_nnunet_needed):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="thesis.tex.*empty or a new"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_folder_of_other_settings_is_refused(tmp_path):
    DemoFolder.open(tmp_path, {"epochs": 1}).mark_done("a", 1.0)
    with pytest.raises(ValueError, match="other settings|another version"):
        DemoFolder.open(tmp_path, {"epochs": 2})
    assert DemoFolder.open(tmp_path, {"epochs": 1}).is_done("a")


def test_a_name_that_is_no_text_is_named(tmp_path):
    with pytest.raises(ValueError, match="has a name that is no UTF-8; rename it, or its folder"):
        DemoFolder.open(tmp_path / os.fsdecode(b"caf\xe9"), {})
    assert list(tmp_path.iterdir()) == []


def test_damaged_state_is_named(tmp_path):
    (tmp_path / STATE_FILE).write_text("{")
    with pytest.raises(ValueError, match=STATE_FILE):
        DemoFolder.open(tmp_path, {})


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written.*-o"):
        DemoFolder.open(tmp_path / "file" / "demo", {})
    with pytest.raises(ValueError, match="is a file"):
        DemoFolder.open(tmp_path / "file", {})


# Commands


def test_failing_command_keeps_its_log_and_last_lines(tmp_path):
    program = "print('first'); [print(i) for i in range(50)]; raise SystemExit('out of luck')"
    log = tmp_path / "logs" / "step.log"
    with pytest.raises(CommandError, match=r"exit status 1.*step\.log") as caught:
        run_command([sys.executable, "-u", "-c", program], log=log, environment=os.environ)
    assert caught.value.last_lines[-2:] == ("49", "out of luck")
    assert "first" not in caught.value.last_lines
    assert "first\n" in log.read_text()


def test_missing_command_is_named(tmp_path):
    with pytest.raises(CommandError, match="nnUNetv2_nothing.*install"):
        run_command(["nnUNetv2_nothing"], log=tmp_path / "log", environment=os.environ)


def test_failing_step_shows_last_lines_and_the_way_on(tmp_path, monkeypatch, capsys, no_nnunet_needed):
    def fail(follow):
        raise CommandError(
            "nnUNetv2_train ended with exit status 1; its log is x.log", ["[why] it failed"], Path("x.log")
        )

    fake_steps(monkeypatch, fail)
    with pytest.raises(RuntimeError, match=r"x\.log.*go on with: nnUNetv2_sauron demo -o"):
        run_demo(tmp_path / "demo")
    assert "[why] it failed" in capsys.readouterr().out


def test_two_lanes_run_side_by_side(tmp_path, monkeypatch, no_nnunet_needed):
    meeting = threading.Barrier(2, timeout=20)  # broken unless both are there at a time
    fakes = [
        Step("a", "step a", lambda follow: meeting.wait(), lane=1),
        Step("b", "step b", lambda follow: meeting.wait(), lane=2),
        Step("c", "step c", lambda follow: write_comparison(tmp_path / "demo")),
    ]
    monkeypatch.setattr(steps, "demo_steps", lambda folder: fakes)
    monkeypatch.setattr(steps.os, "cpu_count", lambda: 2)
    run_demo(tmp_path / "demo")
    assert set(json.loads((tmp_path / "demo" / STATE_FILE).read_text())["seconds"]) == {"a", "b", "c"}


@pytest.mark.parametrize(("how", "raised"), [("error", RuntimeError), ("interrupted", KeyboardInterrupt)])
def test_what_ends_one_lane_ends_the_command_of_the_other(tmp_path, monkeypatch, no_nnunet_needed, how, raised):
    started = threading.Event()
    sleeps = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]

    def sleep(follow) -> None:
        run_command(sleeps, log=tmp_path / "log", environment=os.environ, on_line=lambda line: started.set())

    def end(follow) -> None:
        assert started.wait(20)
        if how == "error":
            raise CommandError("nnUNetv2_train ended with exit status 1", ["why"], tmp_path / "log")
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    fakes = [Step("a", "step a", sleep, lane=1), Step("b", "step b", end, lane=2)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    monkeypatch.setattr(steps, "demo_steps", lambda folder: fakes)
    monkeypatch.setattr(steps.os, "cpu_count", lambda: 2)
    begun = time.monotonic()
    try:
        with pytest.raises(raised):
            run_demo(tmp_path / "demo")
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begun < 30


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe to see a process end")
def test_interruption_ends_the_command_and_its_workers(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    # Both hold the pipe open; who survives writes into it.
    worker = (
        f"import time; pipe = open({str(pipe)!r}, 'w'); print('ready', flush=True); time.sleep(20); pipe.write('alive')"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}]); {worker}"

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_command([sys.executable, "-c", parent], log=tmp_path / "log", environment=os.environ, on_line=interrupt)
    os.set_blocking(reader, True)
    assert os.read(reader, 10) == b""  # the end of the pipe: nobody holds it any more
    os.close(reader)


# The result


def test_json_is_all_there_is_on_standard_output(tmp_path, monkeypatch, capsys, no_nnunet_needed):
    folder = tmp_path / "demo"
    fake_steps(monkeypatch, lambda follow: write_comparison(folder))
    run_demo(folder, json_output=True)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == COMPARISON
    assert "step a" in captured.err


def test_seconds_per_case_are_those_between_files(tmp_path):
    from nnunet_sauron.demo.comparison import seconds_per_case

    assert seconds_per_case(tmp_path) is None
    for index, written in enumerate((100.0, 102.0, 106.0)):
        path = tmp_path / f"case_{index}.nii.gz"
        path.touch()
        os.utime(path, (written, written))
    assert seconds_per_case(tmp_path) == pytest.approx(3.0)
