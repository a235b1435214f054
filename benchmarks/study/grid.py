"""A grid of trainings, read from YAML, and the commands of nnU-Net and of this package that each of its runs takes."""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from nnunet_sauron.datasets.phantom import DATASET_NAME as PHANTOM
from nnunet_sauron.datasets.phantom import write_phantom

FINAL = "checkpoint_final.pth"
CHECKPOINTS = (FINAL, "checkpoint_latest.pth", "checkpoint_best.pth")
# `augmentation_processes`: nnU-Net's nnUNet_n_proc_DA; with 0 a training makes its own batches, on its one core.
PREDEFINED = {"planner": "ExperimentPlanner", "from_plans": "nnUNetPlans", "augmentation_processes": 0}


@dataclass(frozen=True)
class Run:
    """One method with its settings, on some folds; hippocampus.yaml tells what may be given."""

    name: str
    trainer: str | None = None
    settings: dict = field(default_factory=dict)
    folds: tuple[int, ...] = (0,)
    plan: tuple = ()
    widths_from: str | None = None
    start: str | None = None
    teacher: str | None = None
    compress: tuple = ()

    @property
    def needs(self) -> list[str]:
        """Runs that must be trained before."""
        return [name for name in (self.start, self.teacher, self.widths_from) if name]


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        program: "nnUNetv2_train", "nnUNetv2_sauron", ...
        words: Its arguments.
        settings: Of a training that begins, for the variable `nnunet_sauron`.
        variables: Of its environment.
        made: What it makes; it is not run where that is there.
    """

    program: str
    words: tuple[str, ...]
    settings: Mapping = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    made: Path | None = None

    def __str__(self) -> str:
        given = [f"{name}={value}" for name, value in self.variables.items()]
        if self.settings:
            given.append(f'nnunet_sauron="{",".join(f"{name}={value}" for name, value in self.settings.items())}"')
        return " ".join([*given, self.program, *self.words])


class Grid:
    """What a YAML file declares, in a folder to work in.

    Args:
        path: The YAML file.
        folder: For data and models.
        device: nnU-Net's word for where to train.

    Attributes:
        name: Of the study: its models lie in a folder of that name, its results in `benchmarks/results`.
        runs: By name, in the file's order.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no grid, names a run twice, or one that begins with a run that does not stand before it.
    """

    def __init__(self, path: Path, folder: Path, device: str = "cpu"):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
        needed = {"name", "dataset", "configuration", "plans", "batch_size", "settings", "runs"}
        if not isinstance(content, dict) or not needed <= set(content) <= needed | set(PREDEFINED):
            have = ", ".join(content) if isinstance(content, dict) else "no keys"
            raise ValueError(
                f"{path} is no grid: it has {have}; a grid has {', '.join(sorted(needed))}, and may have "
                f"{', '.join(PREDEFINED)}."
            )
        self.path, self.folder, self.device = path, folder.resolve(), device
        self.name, self.dataset, self.configuration = content["name"], content["dataset"], content["configuration"]
        self.plans, self.batch_size = content["plans"], content["batch_size"]
        self.planner, self.from_plans, self.augmentation_processes = (
            content.get(name, value) for name, value in PREDEFINED.items()
        )
        self.runs: dict[str, Run] = {}
        for one in content["runs"]:
            self._add(one, content["settings"])

    def _add(self, one: dict, settings: dict) -> None:
        known = {of.name for of in fields(Run)}
        missing = sorted({"name", "trainer"} - set(one) - ({"trainer"} if one.get("compress") else set()))
        unknown = sorted(set(one) - known)
        if unknown or missing:
            said = f"has {', '.join(unknown)}" if unknown else f"lacks {', '.join(missing)}"
            raise ValueError(f"{self.path}: the run {one.get('name')} {said}; known are {', '.join(sorted(known))}.")
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in one.items()}
        run = Run(**{**given, "settings": {**(settings if "trainer" in one else {}), **one.get("settings", {})}})
        if run.name in self.runs:
            raise ValueError(f"{self.path} has two runs called {run.name}.")
        for needed in run.needs:
            of = self.runs.get(needed)
            if of is None or of.trainer is None or not set(run.folds) <= set(of.folds):
                raise ValueError(f"{run.name} begins with {needed}, which must be trained before it on its folds.")
        self.runs[run.name] = run

    def tasks(self) -> list[tuple[str, int]]:
        """Name and fold of every training, all of the first fold first."""
        return sorted(((run.name, fold) for run in self.runs.values() for fold in run.folds), key=lambda task: task[1])

    def environment(self) -> dict[str, str]:
        """nnU-Net's variables; one thread each, whatever the machine has."""
        from nnunet_sauron.plugin import trainer_folder

        trainers = (trainer_folder(), Path(__file__).resolve().parent / "trainers")
        return {
            **{f"nnUNet_{kind}": str(self.folder / kind) for kind in ("raw", "preprocessed", "results")},
            "nnUNet_extTrainer": os.pathsep.join(map(str, trainers)), "nnUNet_compile": "f",
            "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
        }  # fmt: skip

    @property
    def preprocessed(self) -> Path:
        return self.folder / "preprocessed" / self.dataset

    def preparation(self, data: Path) -> list[Step]:
        """Raw data and preprocessing; the phantom is written by `write_raw`.

        Args:
            data: The task of the Medical Segmentation Decathlon.
        """
        raw = self.folder / "raw" / self.dataset / "dataset.json"
        plan = ("-d", self.dataset[7:10], "-c", self.configuration, "-pl", self.planner, "-np", "1")
        convert = [] if self.dataset == PHANTOM else [Step("nnUNetv2_convert_MSD_dataset", ("-i", str(data)), made=raw)]
        return [*convert, Step("nnUNetv2_plan_and_preprocess", plan, made=self.preprocessed / f"{self.plans}.json")]

    def write_raw(self) -> None:
        """The phantom, if that is the data set."""
        if self.dataset == PHANTOM and not (self.folder / "raw" / PHANTOM).is_dir():
            write_phantom(self.folder / "raw", training_cases=60, test_cases=0)

    def write_plans(self) -> None:
        """nnU-Net's plans with this grid's batch size: what nnU-Net plans is for a GPU."""
        path = self.preprocessed / f"{self.plans}.json"
        if not path.is_file():
            plans = json.loads((self.preprocessed / f"{self.from_plans}.json").read_text(encoding="utf-8"))
            plans["plans_name"] = self.plans
            plans["configurations"][self.configuration]["batch_size"] = self.batch_size
            path.write_text(json.dumps(plans, indent=4), encoding="utf-8")

    def plans_of(self, run: Run) -> str:
        return f"{self.name}_{run.name}".replace("-", "_") if run.plan or run.widths_from else self.plans

    def folder_of(self, run: Run) -> Path:
        return self.folder / self.name / run.name

    def model(self, run: Run) -> Path:
        """Its model folder, of one that is trained."""
        return self.folder_of(run) / self.dataset / f"{run.trainer}__{self.plans_of(run)}__{self.configuration}"

    def compressed(self, run: Run, fold: int) -> Path:
        """The folder that `compress` writes for it."""
        return self.folder_of(run) / f"compressed_{fold}"

    def results_of(self, run: Run, fold: int) -> tuple[Path, Path]:
        """The model's folder, and that of the segmentations of the fold's validation cases."""
        if run.trainer is None:
            return self.compressed(run, fold), self.folder_of(run) / f"segmented_{fold}"
        return self.model(run), self.model(run) / f"fold_{fold}" / "validation"

    def is_trained(self, name: str, fold: int) -> bool:
        return (self.model(self.runs[name]) / f"fold_{fold}" / FINAL).is_file()

    def images(self, fold: int, part: str) -> Path:
        """The folder that `link_images` fills: "train" or "val"."""
        return self.folder / "images" / self.dataset / f"{part}_{fold}"

    def link_images(self, fold: int) -> None:
        """Link the images of the fold's training cases, for `compress`, apart from those that it is validated on.

        Raises:
            FileNotFoundError: nnU-Net has not made the folds yet.
        """
        raw = self.folder / "raw" / self.dataset
        ending = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))["file_ending"]
        splits = json.loads((self.preprocessed / "splits_final.json").read_text(encoding="utf-8"))
        for part, cases in splits[fold].items():
            links = self.images(fold, part)
            links.mkdir(parents=True, exist_ok=True)
            for case in cases:
                for image in (raw / "imagesTr").glob(f"{glob.escape(case)}_????{ending}"):
                    with contextlib.suppress(FileExistsError):  # by another run of this fold, too
                        (links / image.name).symlink_to(image)

    def steps(self, name: str, fold: int) -> Iterator[Step]:
        """The commands of a run's fold: its plans, the compressed model that it starts from, and the training.

        Without a trainer the compressed model is the run's, and segments the validation cases.
        """
        run = self.runs[name]
        if run.plan or run.widths_from:
            yield self._plan(run, fold)
        settings = dict(run.settings)
        if run.start:
            start = self.model(self.runs[run.start])
            if run.compress:
                output = self.compressed(run, fold)
                words = ("compress", "-m", start, "-i", self.images(fold, "train"), "-o", output, "-f", fold)
                words += run.compress
                yield Step("nnUNetv2_sauron", tuple(map(str, words)), made=output)
                start = output
            if run.trainer is None:
                yield self._segment(run, fold)
                return
            settings["start_from"] = str(start)
        if run.teacher:
            settings["teacher"] = str(self.model(self.runs[run.teacher]))
        words = (self.dataset, self.configuration, str(fold), "-tr", run.trainer, "-p", self.plans_of(run))
        words += ("-device", self.device)
        variables = {"nnUNet_results": str(self.folder_of(run)), "nnUNet_n_proc_DA": str(self.augmentation_processes)}
        if any((self.model(run) / f"fold_{fold}" / checkpoint).is_file() for checkpoint in CHECKPOINTS):
            yield Step("nnUNetv2_train", (*words, "--c"), variables=variables)
        else:
            yield Step("nnUNetv2_train", words, settings, variables)

    def _segment(self, run: Run, fold: int) -> Step:
        model, output = self.results_of(run, fold)
        words = ("-m", model, "-i", self.images(fold, "val"), "-o", output, "-f", fold, "--continue_prediction")
        words += ("-npp", 1, "-nps", 1, "-device", self.device)
        return Step("nnUNetv2_predict_from_modelfolder", tuple(map(str, words)))

    def _plan(self, run: Run, fold: int) -> Step:
        name = self.plans_of(run)
        words = run.plan
        if run.widths_from:
            words = ("--widths-from", self.model(self.runs[run.widths_from]) / f"fold_{fold}" / FINAL)
        words = ("plan", "-d", self.dataset, "-c", self.configuration, "-p", self.plans, "-o", name, *words)
        return Step("nnUNetv2_sauron", tuple(map(str, words)), made=self.preprocessed / f"{name}.json")
