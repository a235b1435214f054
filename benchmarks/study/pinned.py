"""A command of nnU-Net's or ours on one thread: `python pinned.py train ...`, `python pinned.py sauron ...`.

nnU-Net's `-device cpu` sets PyTorch's threads to the number of cores, whatever OMP_NUM_THREADS says, and two trainings
at a time then take five times as long each.
"""

from __future__ import annotations

import sys

import torch


def main() -> None:
    torch.set_num_threads(1)
    torch.set_num_threads = lambda count: None
    command = sys.argv.pop(1)
    if command == "train":
        from nnunetv2.run.run_training import run_training_entry

        run_training_entry()
    elif command == "sauron":
        from nnunet_sauron.cli import main as sauron

        sys.exit(sauron())
    else:
        sys.exit(f"pinned.py knows train and sauron, not {command}.")


if __name__ == "__main__":  # nnU-Net's validation starts processes that import this file
    main()
