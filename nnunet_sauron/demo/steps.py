"""The demo's steps, each skipped when an earlier run has finished it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..console.json_output import print_json
from ..console.terminal import plain_console
from ..datasets.phantom import DATASET_ID, DATASET_NAME, write_phantom
from ..files import locked, write_text_atomically
from ..plugin import find_nnunet, reads_external_trainers, trainer_folder
from ..plugin.commands import command
from ..threads import on_threads
from .commands import CommandError, end_commands, run_command
from .display import Display, print_comparison
from .folder import DemoFolder

DEFAULT_FOLDER = Path("nnunet_sauron_demo")
CONFIGURATION = "2d"
PLANS = "nnUNetDemoPlans"
BATCH_SIZE = 6
EPOCHS = 36
LENGTH = f"num_epochs={EPOCHS},num_iterations_per_epoch=24,num_val_iterations_per_epoch=2"
# An eighth of the multiply-accumulates, not a tenth, since so few steps are not enough to learn the task with less; and
# fewer cuts than in a real training, on fewer patches, since here a cut takes as long as an epoch.
LEFT = 0.12
SHRINK = f"target_macs={LEFT},cuts=6,patches=48"
SAURON = f"target_macs={LEFT},cuts=6,patches=48,prune_batches=8"
SETTINGS = {
    "StockTrainer": LENGTH,
    "SauronTrainer": f"{LENGTH},{SAURON}",
    "ShrinkTrainer": f"{LENGTH},{SHRINK}",
}
COMPRESSED = "CompressedTrainer"  # where nnUNetv2_predict looks for what compress wrote
COMPRESS = ("--macs", str(LEFT), "--recover", "16", "--recover-steps", "40")
# Two at a time, on half of the cores each: networks this small gain next to nothing from more threads.
LANES = {"StockTrainer": 1, "SauronTrainer": 2, "ShrinkTrainer": 2}
THREADS = max(1, (os.cpu_count() or 1) // 2)
MODELS = (*SETTINGS, COMPRESSED)  # the first is what the others are compared with

Follow = Callable[[str], None]


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: Its name in the state file and of its log file.
        title: What it is called on the screen.
        run: Does it, from its beginning; takes a function that is given every line of its output.
        epochs: The length of a training, None for other steps.
        lane: Neighbouring steps of two lanes run side by side, those of one lane one after the other. None: alone.
    """

    name: str
    title: str
    run: Callable[[Follow], None]
    epochs: int | None = None
    lane: int | None = None


def run_demo(folder: Path | None = None, json_output: bool = False) -> None:
    """Generate a phantom dataset, train stock nnU-Net, SauronTrainer and ShrinkTrainer on it, compress the stock model
    and recover it, and print how all four compare.

    Every step is one of nnU-Net's own commands, in an environment of its own: nothing is installed, and nothing is left
    outside the folder. Interrupted and called again for the same folder, it goes on where it was.

    Args:
        folder: Where to work, by default `./nnunet_sauron_demo`; missing, empty, or left by an earlier demo.
        json_output: Print the comparison as JSON on standard output, and all progress on standard error.

    Raises:
        ValueError: If the folder holds foreign files, or a demo made with other settings.
        OSError: If the folder cannot be written, or another process works in it.
        RuntimeError: If nnU-Net is missing or too old, or one of its commands fails.
        KeyboardInterrupt: If interrupted; what was running has been ended and the way to go on printed.
    """
    console = plain_console(stderr=json_output, soft_wrap=True)
    _require_nnunet()
    demo_folder = DemoFolder.open(
        DEFAULT_FOLDER if folder is None else folder,
        {"plans": PLANS, "trainers": SETTINGS, "compress": list(COMPRESS)},
    )
    path = demo_folder.path
    console.print(f"Working in {path}, logs in its folder logs. About 7 minutes on two cores.")
    go_on = command("nnUNetv2_sauron", "demo", "-o", path)
    try:
        with locked(path, path), _terminated_like_interrupted():
            _run_steps(demo_steps(path), demo_folder, console)
    except KeyboardInterrupt:
        console.print(f"Interrupted; finished steps are kept. To go on: {go_on}")
        raise
    except CommandError as error:
        for line in error.last_lines:
            console.print(f"    {line}")
        raise RuntimeError(f"{error}. When the cause is mended, go on with: {go_on}") from error
    comparison = json.loads((path / "demo.json").read_text())
    if json_output:
        print_json(comparison)
    else:
        print_comparison(console, comparison, (path / "report" / "report.txt").read_text())
    console.print(f"The same as JSON: {path / 'demo.json'}")


def demo_steps(folder: Path) -> list[Step]:
    """The demo's steps, in order.

    Args:
        folder: The demo's folder, absolute.
    """

    def train(trainer: str) -> Callable[[Follow], None]:
        return lambda follow: _train(folder, trainer, follow)

    def predict(model: str) -> Callable[[Follow], None]:
        return lambda follow: _predict(folder, model, follow)

    return [
        Step("phantom", "generate the phantom dataset", lambda follow: _generate(folder)),
        Step("plan", "plan and preprocess", lambda follow: _plan(folder, follow)),
        *(Step(f"train_{name}", f"train {name}", train(name), EPOCHS, LANES[name]) for name in SETTINGS),
        Step("compress", "compress the stock model, and recover it", lambda follow: _compress(folder, follow), lane=1),
        *(Step(f"predict_{name}", f"predict the test cases: {name}", predict(name)) for name in MODELS),
        Step("compare", "report on all", lambda follow: _compare(folder, follow)),
    ]


def with_small_batch(plans: Mapping) -> dict:
    """nnU-Net's plans with a batch that suits a CPU; network and preprocessed data stay nnU-Net's.

    Args:
        plans: The content of `nnUNetPlans.json`.

    Returns:
        A new plans dictionary named `PLANS`.

    Source: nnU-Net, documentation/explanation_plans_files.md, "How to edit a plans file".
    """
    derived = json.loads(json.dumps(plans))
    derived["plans_name"] = PLANS
    derived["configurations"][CONFIGURATION]["batch_size"] = BATCH_SIZE
    return derived


def command_environment(folder: Path, **variables: str) -> dict[str, str]:
    """The environment of nnU-Net's commands: ours without anything that steers nnU-Net, and the demo's folders.

    Args:
        folder: The demo's folder, absolute.
        variables: More variables.
    """
    environment = {name: value for name, value in os.environ.items() if not name.lower().startswith("nnunet_")}
    # So that the demo also runs from a source folder that is not installed.
    paths = [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
    return environment | {
        "nnUNet_raw": str(folder / "nnUNet_raw"),
        "nnUNet_preprocessed": str(folder / "nnUNet_preprocessed"),
        "nnUNet_results": str(folder / "nnUNet_results"),
        "nnUNet_extTrainer": str(trainer_folder()),
        "nnUNet_compile": "f",
        "nnUNet_def_n_proc": "1",
        "MPLCONFIGDIR": str(folder / "logs" / "matplotlib"),  # else its font cache goes to the home folder
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        **variables,
    }


def model_folder(folder: Path, name: str) -> Path:
    """Where nnU-Net keeps a trainer's model, the folder that `nnUNetv2_predict_from_modelfolder -m` takes."""
    return folder / "nnUNet_results" / DATASET_NAME / f"{name}__{PLANS}__{CONFIGURATION}"


def _run_steps(steps: list[Step], demo_folder: DemoFolder, console: Console) -> None:
    display = Display(console, len(steps))
    numbered = list(enumerate(steps, start=1))
    for alone, group in itertools.groupby(numbered, key=lambda one: one[1].lane is None):
        if alone or os.cpu_count() == 1:
            _run_in_turn(list(group), demo_folder, display)
        else:
            _run_side_by_side(list(group), demo_folder, display)


def _run_in_turn(steps: list[tuple[int, Step]], demo_folder: DemoFolder, display: Display) -> None:
    for number, step in steps:
        if demo_folder.is_done(step.name):
            display.skip(number, step.title, demo_folder.seconds[step.name])
            continue
        start = time.monotonic()
        with display.step(number, step.title, step.epochs) as follow:
            step.run(follow)
        demo_folder.mark_done(step.name, time.monotonic() - start)


def _run_side_by_side(steps: list[tuple[int, Step]], demo_folder: DemoFolder, display: Display) -> None:
    """Run lanes in threads; what ends one of them, or an interruption, ends the commands of all."""
    lanes: dict[int, list[tuple[int, Step]]] = {}
    for number, step in steps:
        lanes.setdefault(step.lane, []).append((number, step))
    with ThreadPoolExecutor(len(lanes)) as pool:
        running = [pool.submit(_run_in_turn, lane, demo_folder, display) for lane in lanes.values()]
        try:
            for lane in as_completed(running):
                lane.result()
        except BaseException:
            while wait(running, timeout=0.2).not_done:  # a lane may have been between two commands
                end_commands()
            raise


def _generate(folder: Path) -> None:
    write_phantom(folder / "nnUNet_raw")


def _plan(folder: Path, follow: Follow) -> None:
    preprocessed = folder / "nnUNet_preprocessed" / DATASET_NAME
    shutil.rmtree(preprocessed, ignore_errors=True)
    command = ["nnUNetv2_plan_and_preprocess", "-d", str(DATASET_ID), "-c", CONFIGURATION, "-np", "2"]
    command += ["--verify_dataset_integrity"]
    run_command(command, log=_log(folder, "plan"), environment=command_environment(folder), on_line=follow)
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    write_text_atomically(preprocessed / f"{PLANS}.json", json.dumps(with_small_batch(plans), indent=4))


def _train(folder: Path, trainer: str, follow: Follow) -> None:
    command = ["nnUNetv2_train", str(DATASET_ID), CONFIGURATION, "0", "-tr", trainer, "-p", PLANS, "-device", "cpu"]
    if any((model_folder(folder, trainer) / "fold_0").glob("checkpoint_*.pth")):
        command.append("--c")
    # Augmentation in the training's own process: on two cores, workers would compete with it. Threads that sleep while
    # they wait: on a busy machine, spinning ones make an epoch several times as long.
    settings = {"nnUNet_n_proc_DA": "0", "OMP_WAIT_POLICY": "PASSIVE", "nnunet_sauron": SETTINGS[trainer]}
    environment = command_environment(folder, **settings)
    command = on_threads(THREADS, command)
    run_command(command, log=_log(folder, f"train_{trainer}"), environment=environment, on_line=follow)


def _compress(folder: Path, follow: Follow) -> None:
    output = model_folder(folder, COMPRESSED)
    shutil.rmtree(output, ignore_errors=True)
    images = folder / "nnUNet_raw" / DATASET_NAME / "imagesTr"
    command = [
        sys.executable,
        "-m",
        "nnunet_sauron.cli",
        "compress",
        "-m",
        str(model_folder(folder, "StockTrainer")),
        "-i",
        str(images),
    ]
    command += ["-o", str(output), "-device", "cpu", *COMPRESS]
    settings = {"OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "PASSIVE", "nnUNet_n_proc_DA": "0"}
    environment = command_environment(folder, **settings)
    run_command(command, log=_log(folder, "compress"), environment=environment, on_line=follow)


def _predict(folder: Path, model: str, follow: Follow) -> None:
    predictions = folder / "predictions" / model
    shutil.rmtree(predictions, ignore_errors=True)
    images = folder / "nnUNet_raw" / DATASET_NAME / "imagesTs"
    command = ["nnUNetv2_predict", "-i", str(images), "-o", str(predictions), "-d", str(DATASET_ID), "-p", PLANS]
    command += ["-c", CONFIGURATION, "-tr", model, "-f", "0", "-chk", "checkpoint_final.pth", "-device", "cpu"]
    # No workers (-npp, -nps): one case after the other, so that the time between two cases is the time of one.
    command += ["--disable_tta", "--disable_progress_bar", "-npp", "0", "-nps", "0"]
    run_command(command, log=_log(folder, f"predict_{model}"), environment=command_environment(folder), on_line=follow)


def _compare(folder: Path, follow: Follow) -> None:
    # A process of its own, since nnU-Net reads the trainers' folder from the environment.
    command = [sys.executable, "-m", "nnunet_sauron.demo.comparison", str(folder)]
    run_command(command, log=_log(folder, "compare"), environment=command_environment(folder), on_line=follow)


def _log(folder: Path, name: str) -> Path:
    return folder / "logs" / f"{name}.log"


def _require_nnunet() -> None:
    nnunet = find_nnunet()
    if nnunet is None:
        raise RuntimeError(f"nnunetv2 is not installed; run: {sys.executable} -m pip install nnunetv2")
    if not reads_external_trainers(nnunet):
        raise RuntimeError(
            f"The nnU-Net in {nnunet} is older than 2.8.0 and does not read nnUNet_extTrainer, by which the demo shows "
            "it the trainers without installing anything; run: pip install -U nnunetv2"
        )


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM end us as Ctrl-C does, or the training would run on without us."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
