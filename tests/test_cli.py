from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nnunet_sauron_runtime
import pytest

from nnunet_sauron import __version__, cli
from nnunet_sauron.cli import main
from nnunet_sauron.plugin import trainer_folder
from nnunet_sauron.plugin.installation import SHIMS, TRAINERS

VERBS = (
    "path", "install", "uninstall", "doctor", "plan", "densify", "demo", "compress", "export", "predict", "report",
    "benchmark", "feature_maps", "clusterability",
)  # fmt: skip


@pytest.fixture
def site_packages(tmp_path: Path) -> Path:
    """Holds as much of an nnU-Net as an installation touches: the verbs must not reach the real one."""
    for shim in SHIMS:
        (tmp_path / "nnunetv2" / shim.place).mkdir(parents=True)
        (tmp_path / "nnunetv2" / shim.place / "__init__.py").touch()
    (tmp_path / "nnunetv2" / "__init__.py").touch()
    (tmp_path / "nnunetv2" / "paths.py").write_text("nnUNet_extTrainer = None\n")
    return tmp_path


def command(site_packages: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a Python that finds its nnU-Net in `site_packages`."""
    runtime = Path(nnunet_sauron_runtime.__file__).parents[1]
    search = os.pathsep.join(map(str, [site_packages, trainer_folder().parents[2], runtime]))
    return subprocess.run(
        [sys.executable, "-c", "import sys; from nnunet_sauron.cli import main; sys.exit(main())", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": search, **environment},
    )


def test_path_prints_the_folder_alone(site_packages: Path) -> None:
    result = command(site_packages, "path")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{trainer_folder()}\n", "")


def test_path_warns_beside_stdout_if_nnunet_would_not_read_it(site_packages: Path) -> None:
    (site_packages / "nnunetv2" / "paths.py").write_text("nnUNet_raw = None\n")
    result = command(site_packages, "path")
    assert (result.returncode, result.stdout) == (0, f"{trainer_folder()}\n")
    assert "since 2.8.0" in result.stderr
    assert "nnUNetv2_sauron install" in result.stderr


@pytest.mark.parametrize("verb", ["path", "install", "uninstall"])
def test_verbs_about_files_do_not_import_pytorch(site_packages: Path, verb: str) -> None:
    # A PyTorch that cannot be imported: whoever tries to, fails.
    (site_packages / "torch.py").write_text("raise RuntimeError('PyTorch was imported')")
    result = command(site_packages, verb)
    assert result.returncode == 0, result.stderr


def test_install_and_uninstall_say_what_they_did(site_packages: Path) -> None:
    trainers, planners = (site_packages / "nnunetv2" / shim.place / shim.file for shim in SHIMS)
    said = [command(site_packages, verb).stdout for verb in ("install", "install", "uninstall", "uninstall")]
    assert said == [
        f"Installed: {trainers}\nInstalled: {planners}\n",
        f"Already there: {trainers}\nAlready there: {planners}\n",
        f"Removed: {trainers}\nRemoved: {planners}\n",
        "Nothing to remove: nnU-Net has no shim of ours.\n",
    ]


def test_error_is_one_line_that_names_the_verb(site_packages: Path) -> None:
    shim = site_packages / "nnunetv2" / TRAINERS.place / TRAINERS.file
    shim.write_text("theirs = True\n")
    result = command(site_packages, "install")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"nnUNetv2_sauron install: {shim} exists and is not ours")
    assert result.stderr.count("\n") == 1


def test_debug_variable_shows_where_an_error_came_from(site_packages: Path) -> None:
    (site_packages / "nnunetv2" / TRAINERS.place / TRAINERS.file).write_text("theirs = True\n")
    result = command(site_packages, "install", nnunet_sauron_debug="1")
    assert result.returncode != 0
    assert result.stderr.startswith("Traceback")


@pytest.mark.parametrize("error", [ValueError, RuntimeError, FileNotFoundError])
def test_message_of_several_lines_becomes_one(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_demo(folder: Path | None, json_output: bool) -> None:
        raise error("first\n  second")

    monkeypatch.setitem(sys.modules, "nnunet_sauron.demo.steps", SimpleNamespace(run_demo=run_demo))
    monkeypatch.delenv("nnunet_sauron_debug", raising=False)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == "nnUNetv2_sauron demo: first second\n"


def test_error_nobody_foresaw_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_demo(folder: Path | None, json_output: bool) -> None:
        raise TypeError("a mistake of ours")

    monkeypatch.setitem(sys.modules, "nnunet_sauron.demo.steps", SimpleNamespace(run_demo=run_demo))
    with pytest.raises(TypeError):
        main(["demo"])


def test_interruption_is_no_error_of_ours(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run_demo(folder: Path | None, json_output: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "nnunet_sauron.demo.steps", SimpleNamespace(run_demo=run_demo))
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "nnUNetv2_sauron demo: interrupted\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], (None, False)), (["-o", "there"], (Path("there"), False)), (["--json"], (None, True))],
)
def test_demo_gets_its_folder_and_format(
    words: list[str], expected: tuple[Path | None, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stands in for ten minutes of training; what is tested is what the command hands over.
    got: list[tuple[Path | None, bool]] = []
    demo = SimpleNamespace(run_demo=lambda folder, json_output: got.append((folder, json_output)))
    monkeypatch.setitem(sys.modules, "nnunet_sauron.demo.steps", demo)
    assert main(["demo", *words]) == 0
    assert got == [expected]


def test_densify_of_a_checkpoint_that_is_not_there_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("nnunet_sauron_debug", raising=False)
    assert main(["densify", str(tmp_path / "gone.pth"), "-o", str(tmp_path / "dense.pth")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("nnUNetv2_sauron densify: ")
    assert str(tmp_path / "gone.pth") in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_variable_that_nnunet_cannot_read_is_named(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("nnUNet_def_n_proc", "abc")
    assert main(["densify", "a.pth", "-o", "b.pth"]) == 2
    assert "nnUNet_def_n_proc: 'abc' is no whole number. Give one, or: unset" in capsys.readouterr().err


def test_a_notebooks_backend_for_pictures_is_no_matter() -> None:
    command = [sys.executable, "-m", "nnunet_sauron.cli", "report", "not_there", "-o", "out"]
    environment = {**os.environ, "MPLBACKEND": "of another environment"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stderr
    assert "not_there has no plans.json" in said and "backend" not in said


def test_densify_needs_to_be_told_where_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["densify", "checkpoint.pth"])
    assert stopped.value.code == 2
    assert "-o" in capsys.readouterr().err


def test_doctor_prints_nothing_but_json_and_answers_by_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(trainer_folder()))
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path))
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["ok"] is True
    monkeypatch.delenv("nnUNet_results")
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capfd.readouterr().out)["ok"] is False


def test_doctor_shows_a_table_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(trainer_folder()))
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path))
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "SauronTrainer" in printed
    assert printed.splitlines()[-1] == "Ready: nnUNetv2_train DATASET CONFIGURATION FOLD -tr SauronTrainer"


@pytest.mark.parametrize("verb", cli._parser()._subparsers._group_actions[0].choices)
def test_help_describes_the_verb_its_defaults_and_an_example(verb: str) -> None:
    parser = cli._parser()
    described = parser._subparsers._group_actions[0].choices[verb]
    assert described.description.endswith(".")
    words = shlex.split(described.epilog.splitlines()[-1])
    assert words[:2] == ["nnUNetv2_sauron", verb] and parser.parse_args(words[1:]).verb == verb
    for option in described._actions:
        assert option.help, option.dest
        if option.default not in (None, False, [], "==SUPPRESS=="):
            assert "(default: " in option.help, option.dest


def test_no_verb_prints_help_with_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n    {verb}" in printed for verb in VERBS)


def test_unknown_verb_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["prune"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert all(verb in message for verb in ("prune", *VERBS))


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"nnunet-sauron {__version__}\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ImportError("The engine x is not installed: pip install x"), "The engine x is not installed: pip install x"),
        (ModuleNotFoundError("No module named 'x'"), "ModuleNotFoundError: No module named 'x' (nnunet_sauron_debug=1"),
    ],
)
def test_an_error_of_ours_stands_without_its_class(error, line):
    assert cli._words(error).startswith(line)


def test_an_unknown_option_is_shown_with_the_verbs_own_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["predict", "-b", "small.zip", "--num_parts", "2"])
    message = capsys.readouterr().err
    assert "usage: nnUNetv2_sauron predict" in message and "unrecognized arguments: --num_parts 2" in message


def test_predict_takes_nnunets_names_of_its_options() -> None:
    parser = cli._parser()
    words = ["predict", "-b", "a.zip", "-i", "in", "-o", "out"]
    theirs = ["-step_size", "0.3", "--disable_tta", "--save_probabilities", "--continue_prediction"]
    ours = ["--step", "0.3", "--no-mirroring", "--save-probabilities", "--continue-prediction"]
    assert parser.parse_args([*words, *theirs]) == parser.parse_args([*words, *ours])
