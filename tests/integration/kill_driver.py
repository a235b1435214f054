"""Run as a script: a training that is killed again and again, and continued (`--c`) after each kill.

nnU-Net is imported once; every run is a fork. Half of the kills come as soon as a checkpoint's temporary file is seen,
the others at random moments. After each one this notes what stood in the folder, for the test to judge.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

KILLS_IN_A_WRITE = 5
KILLS_ANYWHERE = 5
MOST_RUNS = 30
WRITING = "*.pth.*.tmp"


def main(dataset: str, configuration: str, fold: str, trainer: str, folder: str, report: str) -> None:
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args  # noqa: F401  (imported here, once)
    from nnunetv2.training.logging.nnunet_logger import LocalLogger
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    # Its picture takes longer than our epochs.
    LocalLogger.plot_progress_png = lambda *_: None
    torch.set_num_threads(1)
    recursive_find_trainer_class_by_name(trainer)  # imports all that every run would import again

    rng = random.Random(0)
    checkpoints = Path(folder)
    kills: list[dict] = []
    in_a_write = anywhere = 0
    for run in range(MOST_RUNS):
        done = in_a_write >= KILLS_IN_A_WRITE and anywhere >= KILLS_ANYWHERE
        child = os.fork()
        if child == 0:
            _train(dataset, configuration, fold, trainer, continued=run > 0, seed=run)
        if done:
            _, status = os.waitpid(child, 0)
            Path(report).write_text(json.dumps({"kills": kills, "exit_status": status, "end": _seen(checkpoints)}))
            return
        wanted = "write" if in_a_write < KILLS_IN_A_WRITE and (run % 2 or anywhere >= KILLS_ANYWHERE) else "anywhere"
        _wait_for_epochs(child, checkpoints, epochs=rng.randrange(6))
        if wanted == "write":
            _wait_for_a_write(child, checkpoints, skip=rng.randrange(2))
        else:
            time.sleep(rng.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            raise RuntimeError(f"A run ended by itself, after {len(kills)} kills: see the log, or give it more epochs.")
        seen = _seen(checkpoints)
        kills.append({"wanted": wanted, **seen})
        # What counts is the half-written file that is left, not what was aimed at.
        in_a_write += bool(seen["half_written"])
        anywhere += not seen["half_written"]
    raise RuntimeError(f"After {MOST_RUNS} runs only {in_a_write} kills hit a write.")


def _train(dataset: str, configuration: str, fold: str, trainer: str, *, continued: bool, seed: int) -> None:
    """In the fork: what `nnUNetv2_train` does, without the final validation."""
    import numpy as np
    import torch
    from nnunetv2.run import run_training

    log = os.open(os.environ["KILL_DRIVER_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        run_training.run_training(
            dataset, configuration, fold, trainer, continue_training=continued, device=torch.device("cpu")
        )
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _running(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _wait_for_a_write(child: int, folder: Path, skip: int) -> None:
    """Return at once when a temporary file appears, after `skip` others."""
    known: set[int] = {path.stat().st_ino for path in folder.glob(WRITING)} if folder.is_dir() else set()
    waited = 0
    while True:
        waited += 1
        if waited % 1000 == 0 and not _running(child):
            return
        try:
            entries = [entry for entry in os.scandir(folder) if fnmatch(entry.name, WRITING)]
            new = [entry.inode() for entry in entries if entry.inode() not in known]
        except FileNotFoundError:
            continue
        if new:
            if skip == 0:
                return
            skip -= 1
            known.update(new)
            while any(folder.glob(WRITING)) and _running(child):
                pass


def _wait_for_epochs(child: int, folder: Path, epochs: int) -> None:
    """Return when so many epochs, and one more, have begun since now."""
    before = _epochs_begun(folder)
    while _epochs_begun(folder) <= before + epochs and _running(child):
        time.sleep(0.01)


def _epochs_begun(folder: Path) -> int:
    return sum(log.read_text().count("Current learning rate") for log in folder.glob("training_log_*.txt"))


def _seen(folder: Path) -> dict:
    """Every checkpoint's history, or why it cannot be read, and the half-written ones."""
    import torch

    checkpoints = {}
    for path in sorted(folder.glob("*.pth")):
        try:
            logged = torch.load(path, map_location="cpu", weights_only=False)["logging"]
        except Exception as error:
            checkpoints[path.name] = {"error": f"{type(error).__name__}: {error}"}
        else:
            checkpoints[path.name] = {
                "pruning": logged["pruning"],
                "settings": logged["settings"],
                "train_losses": [float(loss) for loss in logged["train_losses"]],
                "val_losses": [float(loss) for loss in logged["val_losses"]],
            }
    return {"checkpoints": checkpoints, "half_written": sorted(path.name for path in folder.glob(WRITING))}


if __name__ == "__main__":
    main(*sys.argv[1:])
