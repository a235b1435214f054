"""Run a command with its output in a log file, its lines watched, and nothing of it left when we are interrupted."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LAST_LINES = 15
SECONDS_TO_END = 10

# NumPy prints float32 as np.float32(0.9194) and small values as 1e-04.
NUMBER = re.compile(r"nan|\d+\.\d*(?:e-?\d+)?|\d+e-?\d+")


class CommandError(RuntimeError):
    """A command ended with an error.

    Attributes:
        last_lines: What it printed last.
        log: The file with all that it printed.
    """

    def __init__(self, message: str, last_lines: Sequence[str], log: Path) -> None:
        super().__init__(message)
        self.last_lines = tuple(last_lines)
        self.log = log


def run_command(
    command: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str],
    on_line: Callable[[str], None] | None = None,
) -> None:
    """Run a command to its end.

    It gets a process group of its own: a Ctrl-C reaches only us, and we end the whole group, nnU-Net's workers
    included.

    Args:
        command: Program and arguments. A program without a folder is looked for beside this Python first, then on PATH.
        log: Its standard output and error are appended here.
        environment: Its whole environment.
        on_line: Called with every line it prints.

    Raises:
        CommandError: If it cannot be found, or ends with another exit status than 0.
    """
    program = _find(command[0], environment)
    if program is None:
        raise CommandError(
            f"{command[0]} is neither beside {sys.executable} nor on PATH; install nnunetv2 into this environment.",
            (),
            log,
        )
    last_lines: deque[str] = deque(maxlen=LAST_LINES)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as log_file:
        log_file.write(f"$ {shlex.join(command)}\n")
        log_file.flush()
        process = subprocess.Popen(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            for line in process.stdout:
                log_file.write(line)
                log_file.flush()
                if line.strip():
                    last_lines.append(line.rstrip())
                if on_line is not None:
                    on_line(line)
            status = process.wait()
        finally:
            _end(process)
    if status != 0:
        name = Path(command[0]).name
        raise CommandError(f"{name} ended with exit status {status}; its log is {log}", last_lines, log)


@dataclass
class TrainingProgress:
    """What nnU-Net's trainer says of its progress.

    Attributes:
        epochs_done: Epochs that have ended, those of an earlier, interrupted run included.
        pseudo_dice: Mean of the last epoch's pseudo Dice over the classes that have one; None before the first.
        validating: Whether the epochs are over and the final validation runs.
    """

    epochs_done: int = 0
    pseudo_dice: float | None = None
    validating: bool = False

    def read(self, line: str) -> bool:
        """Take in one line of the trainer's output; True if an epoch began or ended or the validation began."""
        if match := re.search(r": Epoch (\d+)\s*$", line):
            self.epochs_done = int(match[1])
        elif "Pseudo dice" in line:
            values = [float(text) for text in NUMBER.findall(line.split("Pseudo dice", 1)[1])]
            values = [value for value in values if value == value]
            self.pseudo_dice = sum(values) / len(values) if values else None
            return False
        elif "Epoch time:" in line:
            self.epochs_done += 1
        elif "Training done" in line:
            self.validating = True
        else:
            return False
        return True


def _find(program: str, environment: Mapping[str, str]) -> str | None:
    beside_python = shutil.which(program, path=str(Path(sys.executable).parent))
    return beside_python or shutil.which(program, path=environment.get("PATH"))


def _end(process: subprocess.Popen) -> None:
    """End the command and whatever it started; without effect on what has ended by itself."""
    for name in ("SIGTERM", "SIGKILL"):
        try:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, getattr(signal, name))
            elif process.poll() is None:
                process.terminate()
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            continue
    process.stdout.close()
    process.wait()
