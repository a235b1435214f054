"""The study: every run of a grid by nnU-Net's commands, one thread each, and what it came to as a small JSON file.

    python benchmarks/study/run.py benchmarks/study/hippocampus.yaml --data .../Task04_Hippocampus [--resume]
    python benchmarks/study/run.py benchmarks/study/hippocampus.yaml --report
    python benchmarks/study/run.py benchmarks/study/hippocampus.yaml -o /shared/study --cluster slurm --workers 16
        --cluster-options slurm_partition=gpu gpus_per_node=1 --device cuda

Results are written to a folder of the grid's name in `benchmarks/results`, one file a run and fold, and what has one is
not run again. An interrupted training goes on from its last checkpoint. `--dry-run` prints the commands that are left;
`--report` prints the table and draws Dice against MACs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml
from grid import Grid, Step

from nnunet_sauron.threads import on_threads

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
POLL = 2.0  # seconds
Task = tuple[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid", type=Path)
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared" / "data" / "Task04_Hippocampus")
    parser.add_argument("-o", type=Path, default=Path("study"), help="folder to work in; %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results go; %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on in a folder that is there already")
    parser.add_argument("--only", nargs="+", default=[], metavar="RUN")
    parser.add_argument("--folds", nargs="+", type=int, metavar="FOLD", help="only these")
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time, one thread each; %(default)s")
    parser.add_argument("--device", default="cpu", help="where to train; %(default)s")
    parser.add_argument("--cluster", help="submit trainings: slurm, or local to try it (needs submitit)")
    parser.add_argument("--cluster-options", nargs="+", default=[], metavar="NAME=VALUE", help="submitit's parameters")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that are left, run nothing")
    parser.add_argument("--report", action="store_true", help="table and picture of the results, nothing is run")
    parser.add_argument("--one", nargs=2, metavar=("RUN", "FOLD"), help="one training, prepared already")
    arguments = parser.parse_args()

    try:
        grid = Grid(arguments.grid, arguments.o, arguments.device)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if unknown := [name for name in arguments.only if name not in grid.runs]:
        parser.error(f"the grid has no {', '.join(unknown)}; it has {', '.join(grid.runs)}")
    if arguments.workers < 1:
        parser.error(f"--workers is at least 1; got {arguments.workers}")
    study = Study(grid, arguments.results)
    if arguments.report:
        import report

        report.write(study.results, [task for task in grid.tasks() if not study.result(*task).is_file()])
        return
    if arguments.one:
        study.do(arguments.one[0], int(arguments.one[1]))
        return
    tasks = [
        (name, fold) for name, fold in study.left()
        if name in (arguments.only or grid.runs) and (arguments.folds is None or fold in arguments.folds)
    ]  # fmt: skip
    if arguments.dry_run:
        print(study.listed(tasks, arguments.data))
        return
    if arguments.o.exists() and not arguments.resume:
        parser.error(f"{arguments.o} is there already; --resume goes on in it")
    # nnU-Net's commands, here and in what they start, are those beside this Python, also where PATH does not name it.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    if shutil.which("nnUNetv2_train") is None:
        parser.error("nnunetv2 is not installed in this environment")
    try:
        study.prepare(arguments.data)
    except (OSError, RuntimeError) as error:
        parser.error(str(error))
    with executor(arguments.cluster, arguments.workers, arguments.cluster_options, study.logs) as pool:
        failed = run_all(tasks, study.is_ready, lambda task: study.submit(pool, task), arguments.workers)
    if failed:
        sys.exit(f"Not done: {', '.join(f'{name} fold {fold}' for name, fold in failed)}; see {study.logs}")


class Study:
    """A grid that is worked through.

    Args:
        grid: The grid.
        results: Folder of all studies' results.
    """

    def __init__(self, grid: Grid, results: Path = RESULTS):
        self.grid, self.results = grid, results.resolve() / grid.name
        self.logs = grid.folder / "logs" / grid.name

    def result(self, name: str, fold: int) -> Path:
        return self.results / f"{name}_fold{fold}.json"

    def left(self) -> list[Task]:
        """What has no result yet."""
        return [task for task in self.grid.tasks() if not self.result(*task).is_file()]

    def is_ready(self, task: Task) -> bool:
        """Whether all that it begins with is trained."""
        name, fold = task
        return all(self.grid.is_trained(needed, fold) for needed in self.grid.runs[name].needs)

    def listed(self, tasks: Sequence[Task], data: Path) -> str:
        """The commands, one a line, with what is there already as a comment."""
        lines = [f"export {name}={value}" for name, value in self.grid.environment().items()]
        plans = f"plans {self.grid.plans}: {self.grid.from_plans} with a batch of {self.grid.batch_size}"
        titled = [(f"preparation, then {plans}", self.grid.preparation(data))]
        titled += [(f"{name}, fold {fold}", self.grid.steps(name, fold)) for name, fold in tasks]
        for title, steps in titled:
            lines.append(f"# {title}")
            lines += [f"# done: {step}" if step.made and step.made.exists() else str(step) for step in steps]
        return "\n".join(lines)

    def prepare(self, data: Path) -> None:
        """Raw data, preprocessing, and the plans of the grid.

        Raises:
            FileNotFoundError: There are no data to convert.
            RuntimeError: A command failed, or nnU-Net would replace images that are there.
        """
        steps = self.grid.preparation(data)
        if not data.is_dir() and any(str(data) in step.words and not step.made.exists() for step in steps):
            raise FileNotFoundError(f"there is no folder {data}; name that of the data set's task with --data")
        for kind in ("raw", "preprocessed"):
            (self.grid.folder / kind).mkdir(parents=True, exist_ok=True)
        self.grid.write_raw()
        images = sorted(self.grid.preprocessed.glob(f"*Plans_{self.grid.configuration}"))
        if images and not steps[-1].made.exists():
            raise RuntimeError(
                f"{images[0]} has the images of another grid, or of a preprocessing that was interrupted, and nnU-Net "
                "would write them anew, under the trainings that read them. Give this grid a folder of its own with "
                "-o, or delete them."
            )
        for step in steps:
            self._run(step, self.logs / "preparation.log")
        self.grid.write_plans()

    def submit(self, pool, task: Task):
        """Make its plans, here since two folds share them, and hand the rest to the pool."""
        name, fold = task
        first, *others = self.grid.steps(name, fold)
        if others and first.words[0] == "plan":
            self._run(first, self._log(task))
        one = [sys.executable, str(HERE / "run.py"), str(self.grid.path.resolve()), "-o", str(self.grid.folder)]
        one += ["--results", str(self.results.parent), "--device", self.grid.device, "--one", name, str(fold)]
        return pool.submit(subprocess.run, one, check=True)

    def do(self, name: str, fold: int) -> None:
        """Train, validate, measure, and write the result."""
        run = self.grid.runs[name]
        folder = self.grid.folder_of(run)
        folder.mkdir(parents=True, exist_ok=True)
        if run.compress:
            self.grid.link_images(fold)
        for step in self.grid.steps(name, fold):
            if step.settings:
                step = self._with_settings_file(step, folder / f"settings_{fold}.json")
            self._run(step, self._log((name, fold)))
        os.environ.update(self.grid.environment())  # nnU-Net reads it when it is imported
        from measure import measured

        from nnunet_sauron.files import write_text_atomically
        from nnunet_sauron.model.device import machine

        written = {
            "run": name, "fold": fold, "trainer": run.trainer, "settings": run.settings, "plan": list(run.plan),
            "start": run.start, "teacher": run.teacher, "compress": list(run.compress),
            "date": time.strftime("%Y-%m-%d"), "machine": machine(),
            **measured(*self.grid.results_of(run, fold), fold, self.grid.preprocessed / "gt_segmentations"),
        }  # fmt: skip
        self.results.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self.result(name, fold), json.dumps(written, indent=1) + "\n")
        print(f"{name} fold {fold}: Dice {written['dice']:.4f}, MACs {written['macs'] / 1e6:.1f} M", flush=True)

    def _with_settings_file(self, step: Step, path: Path) -> Step:
        """Its settings given by a file, since a path in them may hold a comma."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(step.settings), indent=1), encoding="utf-8")
        return Step(step.program, step.words, variables={**step.variables, "nnunet_sauron": f"@{path}"})

    def _log(self, task: Task) -> Path:
        return self.logs / f"{task[0]}_fold{task[1]}.log"

    def _run(self, step: Step, log: Path) -> None:
        """Run a command, on one thread, unless what it makes is there.

        Raises:
            RuntimeError: It failed.
        """
        if step.made and step.made.exists():
            return
        log.parent.mkdir(parents=True, exist_ok=True)
        own = {name: value for name, value in os.environ.items() if name.lower() != "nnunet_sauron"}
        command = [step.program, *step.words]
        if step.program in ("nnUNetv2_train", "nnUNetv2_sauron", "nnUNetv2_predict_from_modelfolder"):
            command = on_threads(1, command)
        with log.open("a", encoding="utf-8") as output:
            output.write(f"$ {step}\n")
            output.flush()
            ended = subprocess.run(
                command, env={**own, **self.grid.environment(), **step.variables}, stdout=output,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        if ended.returncode:
            raise RuntimeError(f"{step.program} ended with {ended.returncode}; see {log}")


def executor(cluster: str | None, workers: int, options: Sequence[str], logs: Path):
    """Where trainings run: threads of this process, or jobs of a cluster.

    Args:
        cluster: submitit's name of it, such as "slurm"; None for this machine without submitit.
        workers: Trainings at a time.
        options: submitit's parameters, "NAME=VALUE".
        logs: Folder for what submitit writes.
    """
    if cluster is None:
        return ThreadPoolExecutor(workers)
    try:
        import submitit
    except ImportError as error:
        raise SystemExit("--cluster needs submitit: pip install 'nnunet-sauron[study]'") from error
    jobs = submitit.AutoExecutor(folder=logs / "submitit", cluster=cluster)
    if wrong := [option for option in options if "=" not in option]:
        raise SystemExit(f"--cluster-options are NAME=VALUE, as in timeout_min=600; got {wrong[0]}")
    given = {name: yaml.safe_load(value) for name, _, value in (option.partition("=") for option in options)}
    jobs.update_parameters(**{"timeout_min": 24 * 60, "cpus_per_task": 2, **given})
    return Jobs(jobs)


class Jobs:
    """submitit's executor, used as Python's are."""

    def __init__(self, jobs):
        self.submit = jobs.submit

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass


def run_all(
    tasks: Sequence[Task], is_ready: Callable[[Task], bool], submit: Callable, workers: int, poll: float = POLL
) -> list[Task]:
    """Submit tasks in their order, each once it is ready, as many at a time as there are workers.

    Args:
        tasks: What to do.
        is_ready: Whether a task can begin; asked again and again.
        submit: Begins one; returns a job with `done()` and `result()`.
        workers: Jobs at a time.
        poll: Seconds between two looks at the jobs.

    Returns:
        The tasks that failed, or never became ready.
    """
    left, running, failed = list(tasks), {}, []

    def fails(task: Task, why: object) -> None:
        failed.append(task)
        print(f"{task[0]} fold {task[1]} failed: {why}", flush=True)

    while left or running:
        for task in [task for task in left if is_ready(task)][: workers - len(running)]:
            left.remove(task)
            try:
                running[task] = submit(task)
            except Exception as error:  # one failed run must not end the night's
                fails(task, error)
        for task in [task for task, job in running.items() if job.done()]:
            try:
                running.pop(task).result()
            except Exception as error:
                fails(task, error)
        if not running and not any(map(is_ready, left)):
            break
        time.sleep(poll)
    for task in left:
        fails(task, "it waits for a run that is not trained, and that nobody trains")
    return failed


if __name__ == "__main__":
    main()
