"""The study: every run of a grid by nnU-Net's commands, one thread each, and what it came to as a small JSON file.

    python benchmarks/study/run.py benchmarks/study/hippocampus.yaml --data .../Task04_Hippocampus [--resume]
    python benchmarks/study/run.py benchmarks/study/hippocampus.yaml --report

Results are written to `benchmarks/results/study`, one file a run and fold, and what has one is not run again. An
interrupted training goes on from its last checkpoint. `--report` prints the table and draws Dice against MACs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hippocampus

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "study"
CONFIGURATION = "2d"
FINAL = "checkpoint_final.pth"


@dataclass(frozen=True)
class Run:
    """One method with its settings, on some folds; see hippocampus.yaml."""

    name: str
    trainer: str
    settings: dict = field(default_factory=dict)
    folds: tuple[int, ...] = (0,)
    plan: tuple = ()
    widths_from: str | None = None
    start: str | None = None
    compress: tuple = ()

    @property
    def needs(self) -> list[str]:
        return [name for name in (self.start, self.widths_from) if name]

    @property
    def plans(self) -> str:
        own = self.plan or self.widths_from
        return f"Study_{self.name.replace('-', '_')}" if own else hippocampus.PLANS


class Study:
    """A grid, the folder it works in, and what is done of it.

    Args:
        grid: The YAML file.
        folder: For data and models.

    Raises:
        ValueError: The grid names a run twice, or one that starts from a run that does not stand before it.
    """

    def __init__(self, grid: Path, folder: Path):
        content = yaml.safe_load(grid.read_text(encoding="utf-8"))
        self.folder, self.dataset = folder.resolve(), content["dataset"]
        self.runs: dict[str, Run] = {}
        for one in content["runs"]:
            settings = {**content["settings"], **one.pop("settings", {})}
            run = Run(**{k: tuple(v) if isinstance(v, list) else v for k, v in one.items()}, settings=settings)
            if run.name in self.runs:
                raise ValueError(f"{grid} has two runs called {run.name}.")
            for needed in run.needs:
                if needed not in self.runs or not set(run.folds) <= set(self.runs[needed].folds):
                    raise ValueError(f"{run.name} begins with {needed}, which must stand before it with its folds.")
            self.runs[run.name] = run
        self._plans_lock = threading.Lock()

    def result(self, run: Run, fold: int) -> Path:
        return RESULTS / f"{run.name}_fold{fold}.json"

    def model(self, run: Run) -> Path:
        name = f"{run.trainer}__{run.plans}__{CONFIGURATION}"
        return self.folder / "study" / run.name / self.dataset / name

    def do(self, run: Run, fold: int) -> None:
        """Train, validate, measure, and write the result."""
        started = time.time()
        self._make_plans(run, fold)
        settings = dict(run.settings)
        if run.start:
            settings["start_from"] = str(self._start(run, fold))
        fold_folder = self.model(run) / f"fold_{fold}"
        again = any((fold_folder / name).is_file() for name in (FINAL, "checkpoint_latest.pth", "checkpoint_best.pth"))
        words = [self.dataset, CONFIGURATION, str(fold), "-tr", run.trainer, "-p", run.plans, "-device", "cpu"]
        (self.folder / "study" / run.name).mkdir(parents=True, exist_ok=True)
        given = self.folder / "study" / run.name / f"settings_{fold}.json"
        given.write_text(json.dumps(settings, indent=1))
        variables = {"nnUNet_results": str(self.folder / "study" / run.name), "nnUNet_n_proc_DA": "0"}
        if not again:
            variables["nnunet_sauron"] = f"@{given}"
        self._pinned(run, fold, "train", *words, *(["--c"] if again else []), **variables)
        self.result(run, fold).parent.mkdir(parents=True, exist_ok=True)
        self._write(run, fold, time.time() - started, interrupted=again)

    def _write(self, run: Run, fold: int, seconds: float, *, interrupted: bool) -> None:
        from nnunet_sauron.pruning.timing import machine

        written = {
            "run": run.name, "fold": fold, "trainer": run.trainer, "settings": run.settings, "plan": list(run.plan),
            "start": run.start, "compress": list(run.compress), "date": time.strftime("%Y-%m-%d"), "machine": machine(),
            "seconds": None if interrupted else round(seconds), **measured(self.model(run), fold, self._references),
        }  # fmt: skip
        partial = self.result(run, fold).with_suffix(".partial")
        partial.write_text(json.dumps(written, indent=1) + "\n")
        os.replace(partial, self.result(run, fold))
        print(f"{run.name} fold {fold}: Dice {written['dice']:.4f}, MACs {written['macs'] / 1e6:.1f} M", flush=True)

    @property
    def _references(self) -> Path:
        return self.folder / "preprocessed" / self.dataset / "gt_segmentations"

    def _make_plans(self, run: Run, fold: int) -> None:
        preprocessed = self.folder / "preprocessed" / self.dataset
        if run.plans == hippocampus.PLANS:
            return
        with self._plans_lock:
            if (preprocessed / f"{run.plans}.json").is_file():
                return
            words = [str(word) for word in run.plan]
            if run.widths_from:
                words = ["--widths-from", str(self.model(self.runs[run.widths_from]) / f"fold_{fold}" / FINAL)]
            command = [
                "plan",
                "-d",
                self.dataset,
                "-c",
                CONFIGURATION,
                "-p",
                hippocampus.PLANS,
                "-o",
                run.plans,
                *words,
            ]
            self._pinned(run, fold, "sauron", *command)

    def _start(self, run: Run, fold: int) -> Path:
        """The model that a run starts from: another run's, compressed if it says so."""
        before = self.model(self.runs[run.start])
        if not run.compress:
            return before
        output = self.folder / "study" / run.name / f"compressed_{fold}"
        if not output.is_dir():
            images = self.folder / "raw" / self.dataset / "imagesTr"
            words = ["-m", before, "-i", images, "-o", output, "-f", fold, *run.compress]
            self._pinned(run, fold, "sauron", "compress", *map(str, words))
        return output

    def _pinned(self, run: Run, fold: int, *words: str, **variables: str) -> None:
        log = self.folder / "logs" / f"{run.name}_fold{fold}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name.lower() != "nnunet_sauron"}
        environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "nnUNet_def_n_proc": "1", **variables}
        with log.open("a") as output:
            output.write(f"$ {' '.join(words)}\n")
            output.flush()
            command = [sys.executable, str(HERE / "pinned.py"), *words]
            subprocess.run(command, check=True, env=environment, stdout=output, stderr=subprocess.STDOUT)


def measured(model: Path, fold: int, references: Path) -> dict:
    """Dice and HD95 of a fold's validation cases, and the network's cost."""
    from nnunet_sauron.model.evaluation import evaluate_folder, mean_score
    from nnunet_sauron.model.trained import TrainedModel
    from nnunet_sauron.pruning import channel_layout, count_macs, count_parameters

    trained = TrainedModel.read(model, [str(fold)])
    network, kind = trained.network(str(fold)), trained.segmentations
    validation = model / f"fold_{fold}" / "validation"
    cases = [path.name for path in kind.files(validation)]
    scores = evaluate_folder(validation, references, kind, cases=cases)
    log = trained.checkpoints[str(fold)]["logging"]
    times = zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=True)
    return {
        "cases": len(scores),
        "dice": mean_score(scores, "dice").value,
        "hd95_mm": mean_score(scores, "hd95").value,
        "classes": {
            name: {key: mean_score(scores, key, name).value for key in ("dice", "hd95")} for name in scores[0].classes
        },
        "parameters": count_parameters(network),
        "macs": count_macs(network, trained.patch_size, 1),
        "widths": channel_layout(network).widths,
        "epoch_seconds": [round(end - start, 2) for start, end in times],
    }


def run_all(study: Study, chosen: list[str], workers: int) -> None:
    """Run what has no result yet, in the grid's order, as many at a time as there are workers."""
    left = [(run, fold) for run in study.runs.values() for fold in run.folds if not study.result(run, fold).is_file()]
    left = sorted(((run, fold) for run, fold in left if not chosen or run.name in chosen), key=lambda task: task[1])
    busy: set[tuple[str, int]] = set()
    lock = threading.Lock()

    def next_task():
        with lock:
            for index, (run, fold) in enumerate(left):
                if all((study.model(study.runs[n]) / f"fold_{fold}" / FINAL).is_file() and (n, fold) not in busy
                       for n in run.needs):  # fmt: skip
                    busy.add((run.name, fold))
                    return left.pop(index)
            return None

    def work() -> None:
        while left:
            task = next_task()
            if task is None:  # what is left waits for what another worker trains
                if not busy:
                    print("Waiting for runs that nobody makes:", *(run.name for run, _ in left))
                    return
                time.sleep(5)
                continue
            run, fold = task
            try:
                study.do(run, fold)
            except Exception as error:  # one failed run must not end the night's
                print(f"{run.name} fold {fold} failed: {error}; see {study.folder / 'logs'}", flush=True)
            with lock:
                busy.discard((run.name, fold))

    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(work) for _ in range(workers)]:
            future.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid", type=Path)
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared" / "data" / "Task04_Hippocampus")
    parser.add_argument("-o", type=Path, default=Path("study"), help="folder to work in; %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on in a folder that is there already")
    parser.add_argument("--only", nargs="+", default=[], metavar="RUN")
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time, one thread each; %(default)s")
    parser.add_argument("--report", action="store_true", help="table and picture of the results, nothing is run")
    arguments = parser.parse_args()

    if arguments.report:
        import report

        report.write(RESULTS)
        return
    if arguments.o.exists() and not arguments.resume:
        parser.error(f"{arguments.o} is there already; --resume goes on in it")
    if shutil.which("nnUNetv2_train") is None:
        parser.error("nnunetv2 is not installed in this environment")
    study = Study(arguments.grid, arguments.o)
    unknown = [name for name in arguments.only if name not in study.runs]
    if unknown:
        parser.error(f"the grid has no {', '.join(unknown)}; it has {', '.join(study.runs)}")
    hippocampus.set_environment(study.folder)
    hippocampus.prepare(arguments.data, study.folder)
    run_all(study, arguments.only, arguments.workers)


if __name__ == "__main__":
    main()
