"""Commands without nnU-Net's import, which takes seconds: one process has imported it, and forks for each command.

A command is its console script's function, called as the script does, in a process with its own arguments, environment,
working directory and output, that ends like any other. It differs from the real one in what a fork inherits: modules
already imported, one thread, and worker processes forked where nnU-Net would start an interpreter for each. And it does
not do what takes nnU-Net long however small a data set is: a thousandth of the 100 million voxels are drawn for the
intensities, one process and not twelve lists files, and pictures are blank.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile


class ForkServer:
    """The side of the tests. The server ends when this process does."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, command: list[str], environment: dict[str, str], seconds: int) -> subprocess.CompletedProcess[str]:
        """Run a command to its end.

        Args:
            command: A console script's name and its arguments; or Python's path, a script's and its arguments.
            environment: All of its environment variables.
            seconds: When it is killed (return code -14).

        Returns:
            As of `subprocess.run`; standard output and error are together in `stdout`.
        """
        with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as output:
            request = {
                "command": command,
                "environment": environment,
                "folder": os.getcwd(),
                "output": output.name,
                "seconds": seconds,
            }
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            reply = self._server.stdout.readline()
            if not reply:
                raise RuntimeError(f"The server of commands ended with {self._server.wait()} during: {command}")
            return subprocess.CompletedProcess(command, int(reply), output.read())


def serve() -> None:
    """The server: a line of JSON in for every command, a line with its return code out."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _prepare()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            replies.close()
            _run(request)
        _, status = os.waitpid(child, 0)
        _end_what_is_left(child)
        replies.write(f"{os.waitstatus_to_exitcode(status)}\n")
        replies.flush()


def _prepare() -> None:
    """Import what commands would import, and do nothing that a fork would not survive, such as work in threads."""
    import gc
    import multiprocessing
    import pkgutil
    from importlib import import_module

    import torch

    torch.set_num_threads(1)
    torch.set_num_threads = lambda threads: None  # the networks are so small that threads only wait for each other
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: get_context("fork" if method == "spawn" else method)

    import nnunet_sauron

    for script in _scripts():
        script.load()
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    recursive_find_trainer_class_by_name("SauronTrainer")  # imports every trainer of nnU-Net's on its way
    for module in pkgutil.walk_packages(nnunet_sauron.__path__, f"{nnunet_sauron.__name__}."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    _hasten()
    gc.collect()
    gc.freeze()  # a child's garbage collector leaves these objects, and their memory stays shared


def _hasten() -> None:
    """Make small what nnU-Net does at one size for all data sets."""
    from matplotlib.figure import Figure
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.utilities import utils

    make_extractor, save_figure = DatasetFingerprintExtractor.__init__, Figure.savefig

    def make_quick_extractor(self, *arguments, **named) -> None:
        make_extractor(self, *arguments, **named)
        self.num_foreground_voxels_for_intensitystats /= 1000

    DatasetFingerprintExtractor.__init__ = make_quick_extractor
    Figure.savefig = lambda figure, *arguments, **named: save_figure(Figure((1, 1)), *arguments, **named)
    utils.create_lists_from_splitted_dataset_folder.__defaults__ = (None, 1)


def _scripts():
    from importlib.metadata import entry_points

    return [script for script in entry_points(group="console_scripts") if script.name.startswith("nnUNetv2_")]


def _run(request: dict) -> None:
    """In the fork: become the command. Ends by SystemExit, or whatever the command does not catch."""
    import runpy

    import numpy as np

    os.setsid()
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    np.random.seed()  # Python's own numbers are new in every fork, NumPy's are not
    signal.alarm(request["seconds"])
    program, *sys.argv = request["command"]
    if program == sys.executable:
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    sys.argv.insert(0, program)
    (script,) = (script for script in _scripts() if script.name == program)
    sys.exit(script.load()())


def _end_what_is_left(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose modules no command would find
    serve()
