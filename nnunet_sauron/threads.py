"""A command on some of the machine's cores: `python -m nnunet_sauron.threads 1 nnUNetv2_train ...`.

nnU-Net's `-device cpu` sets PyTorch's threads to the number of cores, whatever OMP_NUM_THREADS says. Two trainings side
by side then take five times as long each.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

import torch


def on_threads(threads: int, command: Sequence[str]) -> list[str]:
    """The command that runs another one on this number of threads.

    Args:
        threads: PyTorch's.
        command: The name of a console script that is installed here, such as `nnUNetv2_train`, and its arguments.
    """
    return [sys.executable, "-m", __name__, str(threads), *command]


def main() -> None:
    threads, name, *arguments = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.set_num_threads = lambda count: None
    scripts = [script for script in entry_points(group="console_scripts") if script.name == name]
    if not scripts:
        sys.exit(f"There is no command {name} in {sys.prefix}; install the package that has it.")
    sys.argv = [name, *arguments]
    sys.exit(scripts[0].load()())


if __name__ == "__main__":  # nnU-Net's validation starts processes that import this file
    main()
