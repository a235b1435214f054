"""nnU-Net's commands as a user types them, in folders of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import SimpleITK
import torch

import nnunet_sauron
from nnunet_sauron.plugin import trainer_folder

from .fork_server import ForkServer

# CertainCutsTrainer, and the package's own trainers through their shim.
TRAINERS = os.pathsep.join((str(Path(__file__).parent / "ext_trainers"), str(trainer_folder())))
SECONDS = 600


def settings(**values: object) -> str:
    """The environment variable `nnunet_sauron` of a very short training whose cuts nothing holds back."""
    short = {
        "num_epochs": 3,
        "num_iterations_per_epoch": 2,
        "num_val_iterations_per_epoch": 1,
        "max_loss_increase": 1000,
        "max_fraction_per_epoch": 0.5,
    }
    return ",".join(f"{name}={value}" for name, value in {**short, **values}.items())


@dataclass(frozen=True)
class NnUNet:
    """Runs nnU-Net's commands.

    Attributes:
        raw, preprocessed, results: nnU-Net's three folders.
    """

    raw: Path
    preprocessed: Path
    results: Path

    @classmethod
    def below(cls, root: Path) -> NnUNet:
        return cls(root / "raw", root / "preprocessed", root / "results")

    def with_results(self, results: Path) -> NnUNet:
        return replace(self, results=results)

    def environment(self, **variables: str) -> dict[str, str]:
        """A command's environment; none of the caller's own nnU-Net variables gets in."""
        own = {k: v for k, v in os.environ.items() if not k.lower().startswith(("nnunet", "nnssl"))}
        package = str(Path(nnunet_sauron.__file__).parents[1])
        return {
            **own,
            "PYTHONPATH": os.pathsep.join(filter(None, (package, own.get("PYTHONPATH")))),
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results),
            "nnUNet_extTrainer": TRAINERS,
            "nnUNet_compile": "f",
            "nnUNet_def_n_proc": "1",
            **variables,
        }

    def run(self, program: str, *arguments: object, fails: bool = False, anew: bool = False, **variables: str) -> str:
        """Run a command to its end.

        Args:
            program: Its name, such as `nnUNetv2_train`; or Python's path, before a script or `-c`.
            arguments: What follows it.
            fails: Whether it is to end with an error.
            anew: Whether to start what is installed, as a user does, with seconds of imports. One test of each command
                does, and what changes where Python looks for modules; the others use a fork, in less than a second.
            variables: Environment variables on top.

        Returns:
            What it printed, standard output and error together.
        """
        command = [program, *map(str, arguments)]
        if anew:
            done = subprocess.run(
                [shutil.which(program, path=str(Path(sys.executable).parent)) or program, *command[1:]],
                env=self.environment(**variables),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        else:
            assert "PYTHONPATH" not in variables, "A fork cannot look elsewhere for what it has imported: anew=True"
            done = fork_server().run(command, self.environment(**variables), SECONDS)
        last_lines = "\n".join(done.stdout.splitlines()[-40:])
        assert (done.returncode != 0) == fails, f"{' '.join(command)} ended with {done.returncode}:\n{last_lines}"
        return done.stdout

    def train(
        self,
        dataset: int,
        configuration: str,
        fold: int | str,
        *flags: object,
        trainer: str = "CertainCutsTrainer",
        plans: str = "nnUNetPlans",
        setting: str | None = None,
        fails: bool = False,
        anew: bool = False,
    ) -> str:
        """`nnUNetv2_train`; by default a training of three epochs that loses channels before the second and third."""
        return self.run(
            "nnUNetv2_train", dataset, configuration, fold, "-tr", trainer, "-p", plans, "-device", "cpu", *flags,
            fails=fails, anew=anew, nnUNet_n_proc_DA="0", nnunet_sauron=settings() if setting is None else setting,
        )  # fmt: skip

    def predict(
        self,
        dataset: int,
        configuration: str,
        output: Path,
        *flags: object,
        trainer: str = "CertainCutsTrainer",
        plans: str = "nnUNetPlans",
        anew: bool = False,
    ) -> dict[str, Path]:
        """`nnUNetv2_predict` of the test cases: the segmentation files by case.

        In one process, unless the flags say otherwise: every worker would take seconds to import nnU-Net.
        """
        images = self.dataset_folder(self.raw, dataset) / "imagesTs"
        self.run(
            "nnUNetv2_predict", "-d", dataset, "-c", configuration, "-tr", trainer, "-p", plans,
            "-i", images, "-o", output, "-device", "cpu", "-npp", 0, "-nps", 0, *flags,
            anew=anew,
        )  # fmt: skip
        return segmentations(output)

    def dataset_folder(self, root: Path, dataset: int) -> Path:
        return next(root.glob(f"Dataset{dataset:03d}_*"))

    def model_folder(
        self, dataset: int, configuration: str, trainer: str = "CertainCutsTrainer", plans: str = "nnUNetPlans"
    ) -> Path:
        name = self.dataset_folder(self.raw, dataset).name
        return self.results / name / f"{trainer}__{plans}__{configuration}"

    def edit_plans(self, dataset: int, edit, name: str = "nnUNetPlans", new_name: str | None = None) -> None:
        """Let `edit(configurations)` change the plans' configurations in place; a new name leaves the old file."""
        folder = self.dataset_folder(self.preprocessed, dataset)
        plans = json.loads((folder / f"{name}.json").read_text())
        edit(plans["configurations"])
        plans["plans_name"] = new_name or name
        (folder / f"{plans['plans_name']}.json").write_text(json.dumps(plans, indent=2))


@cache
def fork_server() -> ForkServer:
    """One for all tests of this process, started when the first needs it; its folders are those of each command."""
    nowhere = Path(os.devnull)
    return ForkServer(NnUNet(nowhere, nowhere, nowhere).environment())


def segmentations(folder: Path) -> dict[str, Path]:
    return {path.name.removesuffix(".nii.gz"): path for path in sorted(folder.glob("*.nii.gz"))}


def voxels(path: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def network_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, map_location="cpu", weights_only=False)["network_weights"]


def pruning_history(checkpoint: Path) -> list[dict]:
    return torch.load(checkpoint, map_location="cpu", weights_only=False)["logging"]["pruning"]


def channels_by_epoch(checkpoint: Path) -> list[int]:
    """Channels of all layers together in each epoch that the checkpoint remembers."""
    return [sum(record["widths"].values()) for record in pruning_history(checkpoint)]
