"""Run a command with its output in a log file, and end all of it when we are interrupted."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

LAST_LINES = 15
SECONDS_TO_END = 10
_running: set[subprocess.Popen] = set()


class CommandError(RuntimeError):
    """A command ended with an error.

    Attributes:
        last_lines: The last lines of its output.
        log: The file with all of its output.
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

    It gets a process group of its own. So Ctrl-C reaches only us, and we end the whole group, with nnU-Net's workers.

    Args:
        command: Program and arguments. A program without a folder is taken from beside this Python, else from PATH.
        log: Its standard output and error are appended here.
        environment: Its whole environment.
        on_line: Called with every line it prints.

    Raises:
        CommandError: It cannot be found, or its exit status is not 0.
    """
    folders = [str(Path(sys.executable).parent), environment.get("PATH", "")]
    program = shutil.which(command[0], path=os.pathsep.join(folders))
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
        _running.add(process)
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
            _running.discard(process)
            _end(process)
            process.stdout.close()
    if status != 0:
        name = Path(command[0]).name
        raise CommandError(f"{name} ended with exit status {status}; its log is {log}", last_lines, log)


def _end(process: subprocess.Popen) -> None:
    """End the command and its workers; without effect on those that have ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)


def end_commands() -> None:
    """End all that other threads are running; their `run_command` raises CommandError."""
    for process in list(_running):
        _end(process)
