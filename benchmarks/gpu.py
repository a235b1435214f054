"""One run on one card: what a GPU does to training, cutting, resuming, predicting and compressing.

Trainers are built in process on nnU-Net's default networks and random patches; nothing is downloaded or preprocessed.
Every check stands by itself: one that fails, or takes longer than its share, becomes a row and the next one begins.

    python benchmarks/gpu.py [--minutes 5] [--only training steps ...] [--json FILE]
    python benchmarks/gpu.py --dry-run        # every check on a CPU with tiny networks

Checks, in this order:
    training    a short training that cuts to half of the MACs: whether losses stay finite under autocast and loss
                scaling, how long a cut takes with and without merging, that the training resumes from a checkpoint
                with the same cuts, that nnU-Net predicts with the model, as on the CPU
    steps       median time and peak memory of a training step, dense, at 50 % and at 10 % of the MACs
    network     time of a forward pass at widths as a cut leaves them and at multiples of 8, under float16 autocast and
                in float32 as PyTorch computes it by default (convolutions in TF32)
    agreement   output of the pruned network on the device against the CPU
    compress    `nnUNetv2_sauron compress` on the model of StockTrainer's training
    compile     a short training with a cut, with torch.compile and without
    ranks       a short training with a cut as one rank of DDP over NCCL, which takes nothing but tensors on the card;
                not in a dry run, since nnU-Net trains several ranks on GPUs alone
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import io
import itertools
import json
import math
import os
import platform
import random
import shutil
import signal
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

TRAINERS = ("StockTrainer", "SauronTrainer", "STAMPTrainer", "TaylorTrainer", "ShrinkTrainer")
CHECKS = ("training", "steps", "network", "agreement", "compress", "compile", "ranks")
MACS_LEFT = (1.0, 0.5, 0.1)
DATASET = "Dataset999_Random"
TOO_LATE = "left out: no time left"


@dataclass(frozen=True)
class Network:
    """A configuration of nnU-Net's: its patch size, batch size and channels per stage."""

    patch: tuple[int, ...]
    batch: int
    widths: tuple[int, ...]

    @property
    def configuration(self) -> str:
        return "2d" if len(self.patch) == 2 else "3d_fullres"

    def __str__(self) -> str:
        return f"{len(self.patch)}D {'x'.join(map(str, self.patch))} batch {self.batch}"


@dataclass(frozen=True)
class Sizes:
    """What the checks run on.

    Attributes:
        large: Of steps, network time and agreement: nnU-Net's defaults.
        trained: Of short trainings.
        compiled: Of trainings with torch.compile, which takes minutes for a large 3D network.
        repeats: Measured steps and forward passes.
        iterations: Training steps per epoch.
    """

    large: tuple[Network, ...]
    trained: Network
    compiled: Network
    repeats: int
    iterations: int


FULL = Sizes(
    large=(
        Network((128, 128, 128), 2, (32, 64, 128, 256, 320, 320)),
        Network((512, 512), 12, (32, 64, 128, 256, 512, 512, 512, 512)),
    ),
    trained=Network((64, 64, 64), 2, (32, 64, 128, 256, 320)),
    compiled=Network((128, 128), 8, (16, 32, 64)),
    repeats=9,
    iterations=6,
)
TINY = Sizes(
    large=(Network((16, 16, 16), 2, (8, 16, 24)), Network((16, 16), 2, (16, 24, 32))),
    trained=Network((16, 16, 16), 2, (8, 12, 16)),
    compiled=Network((16, 16), 2, (8, 12, 16)),
    repeats=2,
    iterations=2,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5, help="begin no check after this time (default: 5)")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS, help="only these checks")
    parser.add_argument("--trainers", nargs="+", default=TRAINERS, metavar="NAME", help="only these trainers")
    parser.add_argument("--device", default="cuda", help="where to run (default: cuda)")
    parser.add_argument("--dry-run", action="store_true", help="run every check on the CPU with tiny networks")
    parser.add_argument("--json", type=Path, help="write the rows here, after each one")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.dry_run else arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU; --dry-run shows on a CPU what would be run.")
    with tempfile.TemporaryDirectory() as folder:
        set_environment(Path(folder))
        from nnunet_sauron import trainers

        run = Run(Path(folder), device, TINY if arguments.dry_run else FULL, arguments.minutes * 60, arguments.json)
        chosen = [name for name in arguments.trainers if hasattr(trainers, name)]
        if missing := [name for name in arguments.trainers if name not in chosen]:
            print(f"this version has no {', '.join(missing)}", flush=True)
        of_gpus = {"ranks"} if device.type == "cpu" else set()
        run.checks([name for name in CHECKS if name in arguments.only and name not in of_gpus], chosen)
    print_tables(run.rows)
    if failed := sum("FAILED" in row["result"] for row in run.rows):
        print(f"\n{failed} of {len(run.rows)} rows FAILED")


def set_environment(folder: Path) -> None:
    from nnunet_sauron.plugin import trainer_folder

    for kind in ("raw", "preprocessed", "results"):
        (folder / kind).mkdir()
        os.environ[f"nnUNet_{kind}"] = str(folder / kind)
    # A shell's settings must not decide what is measured.
    os.environ.pop("nnunet_sauron", None)
    os.environ.update(nnUNet_extTrainer=str(trainer_folder()), nnUNet_compile="f", nnUNet_n_proc_DA="0")
    # As nnU-Net's training command does.
    torch.backends.cudnn.benchmark = True


class Run:
    """All checks of one run: where they work, how long they may take, and the rows they gave."""

    def __init__(self, folder: Path, device: torch.device, sizes: Sizes, seconds: float, output: Path | None):
        self.folder, self.device, self.sizes, self.output = folder, device, sizes, output
        self.begun, self.seconds = time.perf_counter(), seconds
        self.rows: list[dict] = []
        self.machine = describe_machine()
        self.log = io.StringIO()  # of the check that runs: all that nnU-Net prints
        print(json.dumps(self.machine), flush=True)

    def checks(self, names: Sequence[str], trainers: Sequence[str]) -> None:
        """Run checks; the time that runs out is that of the last ones."""
        networks = {"training": [self.sizes.trained], "compress": [self.sizes.trained]}
        networks |= dict.fromkeys(("steps", "network", "agreement"), self.sizes.large)
        networks |= {"compile": [self.sizes.compiled], "ranks": [self.sizes.compiled]}
        for name in names:
            check = getattr(self, f"check_{name}")
            for network in networks[name]:
                if name in ("training", "steps", "compile", "ranks"):
                    for trainer in trainers:
                        self.row(name, f"{trainer}, {network}", check, trainer, network)
                else:
                    self.row(name, str(network), check, network)

    def row(self, check: str, what: str, function: Callable[..., None], *arguments) -> None:
        """Run one check and write down what came of it."""
        left = self.seconds - (time.perf_counter() - self.begun)
        row: dict = {"check": check, "of": what, "result": "ok"}
        found: dict = {}  # filled as a check goes, so that one which fails leaves what it had measured
        self.log.seek(0)
        self.log.truncate()
        begun = time.perf_counter()
        if left < 5:
            row["result"] = TOO_LATE
        else:
            try:
                with alarm(max(20, min(left, self.seconds / 3))), contextlib.redirect_stdout(self.log):
                    function(found, *arguments)
            except Exception as error:  # each check stands by itself
                where = traceback.extract_tb(error.__traceback__)[-1]
                text = " ".join(str(error).split())[:300]
                row["result"] = f"FAILED: {type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"
                row["traceback"] = traceback.format_exc()[-4000:]
                row["log"] = self.log.getvalue()[-2000:]
            finally:
                self.tidy()
        row |= found
        row["seconds"] = round(time.perf_counter() - begun, 1)
        self.rows.append(row)
        at = time.perf_counter() - self.begun
        print(f"[{at:4.0f} s] {check}: {what}: {row['result']} ({row['seconds']} s)", flush=True)
        if self.output:
            document = {"machine": self.machine, "rows": self.rows}
            self.output.write_text(json.dumps(document, indent=1, default=str) + "\n")

    def tidy(self) -> None:
        os.environ["nnUNet_compile"] = "f"
        os.environ["nnUNet_results"] = str(self.folder / "results")
        os.environ.pop("nnunet_sauron", None)
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # The checks

    def check_training(self, result: dict, name: str, network: Network) -> None:
        for merge in (False, True) if name != "StockTrainer" else (None,):
            whole = self.training(name, network, f"{name}_{merge}", merge)
            key = {None: "", False: "drop_", True: "merge_"}[merge]
            result |= {f"{key}{k}": v for k, v in described_training(whole).items()}
        # Of the last of them: resumed, and predicted with.
        resumed = self.resumed(name, network, f"{name}_{merge}")
        result["resume"] = compared(whole, resumed)
        result |= self.predicted(Path(whole.output_folder_base))

    def training(self, name: str, network: Network, folder: str, merge: bool | None) -> nn.Module:
        """A finished training, from the first of the settings that its trainer knows."""
        problems = []
        for settings in settings_of(name, self.sizes.iterations, merge):
            os.environ["nnunet_sauron"] = settings
            try:
                trainer = self.trainer(name, network, folder)
            except ValueError as error:  # settings are read before anything is written
                problems.append(str(error))
                continue
            trainer.settings_given = settings
            trainer.run_training()
            return trainer
        raise ValueError(f"no settings that {name} takes: {problems[-1]}")

    def resumed(self, name: str, network: Network, folder: str) -> nn.Module:
        """The rest of the same training, from its checkpoint after the second epoch."""
        trainer = self.trainer(name, network, folder, continued=True)
        trainer.load_checkpoint(str(Path(trainer.output_folder) / INTERRUPTED))
        trainer.run_training()
        return trainer

    def predicted(self, model: Path) -> dict:
        """nnU-Net's own prediction from files with the trained model, here and on the CPU."""
        import nibabel
        import numpy as np
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        images, segmentations = self.images(1), {}
        result = {}
        for device in dict.fromkeys((self.device, torch.device("cpu"))):
            predictor = nnUNetPredictor(device=device, use_mirroring=False, allow_tqdm=False)
            predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
            target = self.folder / f"predicted_{device.type}"
            begun = time.perf_counter()
            predictor.predict_from_files_sequential([[str(images[0])]], [str(target)])
            result[f"predict_{device.type}_s"] = time.perf_counter() - begun
            segmentations[device.type] = np.asarray(nibabel.load(f"{target}.nii.gz").dataobj)
        ours, reference = segmentations[self.device.type], segmentations["cpu"]
        result["predict_equal_voxels"] = float((ours == reference).mean())
        return result

    def check_steps(self, result: dict, name: str, network: Network) -> None:
        from nnunet_sauron.pruning import resize

        os.environ["nnunet_sauron"] = "num_epochs=1000"
        for left in MACS_LEFT:
            trainer = self.trainer(name, network, f"steps_{name}_{left}_{len(network.patch)}")
            trainer.initialize()
            bare, cost = trainer.bare_network, Cost(trainer.bare_network, network)
            widths = cost.widths_at(left)
            resize(bare, widths)
            trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
            trainer.on_train_start()
            trainer.on_epoch_start()
            trainer.on_train_epoch_start()
            batches = trainer.dataloader_train
            for _ in range(3):  # cuDNN tries its algorithms in the first, the optimiser's state comes with it
                trainer.train_step(next(batches))
            trainer.step_seconds.clear()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            losses = [float(trainer.train_step(next(batches))["loss"]) for _ in range(self.sizes.repeats)]
            key = f"{left:.0%}"
            result[f"{key} step_s"] = statistics.median(trainer.step_seconds)
            if self.device.type == "cuda":
                result[f"{key} peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
            result[f"{key} macs"] = cost.macs(widths)
            result[f"{key} finite"] = all(map(math.isfinite, losses))
            if trainer.grad_scaler is not None:
                result[f"{key} loss_scale"] = trainer.grad_scaler.get_scale()
            del trainer, bare
            gc.collect()

    def check_network(self, result: dict, network: Network) -> None:
        from nnunet_sauron.pruning import resize

        dense = build(network).to(self.device).eval()
        cost = Cost(dense, network)
        networks = {"dense": dense}
        for left, round_to in itertools.product(MACS_LEFT[1:], (1, 8)):
            name = f"{left:.0%} {'as cut' if round_to == 1 else f'to {round_to}'}"
            networks[name] = narrow = copy.deepcopy(dense)
            widths = cost.widths_at(left, round_to)
            resize(narrow, widths)
            result[f"{name} macs"] = cost.macs(widths) / cost.macs(cost.dense)
        patch = torch.randn((1, 1, *network.patch), device=self.device)
        for precision in ("float16", "float32") if self.device.type == "cuda" else ("float32",):
            times: dict[str, list[float]] = {name: [] for name in networks}
            with torch.inference_mode(), torch.autocast(self.device.type, torch.float16, precision == "float16"):
                for turn in range(self.sizes.repeats + 3):
                    for name, one in networks.items():  # taking turns, so that a slow moment hits all alike
                        begun = now(self.device)
                        one(patch)
                        if turn >= 3:
                            times[name].append(now(self.device) - begun)
            result |= {f"{name} {precision} s": statistics.median(values) for name, values in times.items()}

    def check_agreement(self, result: dict, network: Network) -> None:
        from nnunet_sauron.pruning import resize

        narrow = build(network).eval()
        resize(narrow, Cost(narrow, network).widths_at(0.5))
        patch = torch.randn((1, 1, *network.patch))
        saved = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
        with torch.inference_mode():
            reference = narrow(patch)
            narrow.to(self.device)
            precisions = ("float32", "tf32", "float16") if self.device.type == "cuda" else ("float32",)
            for precision in precisions:
                torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
                with torch.autocast(self.device.type, torch.float16, precision == "float16"):
                    output = narrow(patch.to(self.device)).float().cpu()
                error = (output - reference).norm() / reference.norm()
                result[f"{precision} relative_error"] = float(error)
                result[f"{precision} equal_labels"] = float((output.argmax(1) == reference.argmax(1)).float().mean())
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = saved

    def check_compress(self, result: dict, network: Network) -> None:
        from nnunet_sauron.cli import main as nnunetv2_sauron

        images = self.images(8)
        models = sorted((self.folder / "StockTrainer_None").glob("*/StockTrainer__*"))
        if not models:
            raise FileNotFoundError("StockTrainer's training has not run; it is part of the check 'training'.")
        for round_to in (1, 8) if self.device.type == "cuda" else (1,):
            target = self.folder / f"compressed_{round_to}"
            words = ["compress", "-m", models[0], "-i", images[0].parent, "-o", target, "--macs", 0.5]
            words += ["--round-to", round_to, "-device", self.device.type, "--json"]
            begun, printed, errors = time.perf_counter(), io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
                code = nnunetv2_sauron([str(word) for word in words])
            if code:
                raise RuntimeError(errors.getvalue()[-300:])
            key = f"round_to {round_to} "
            result[f"{key}seconds"] = time.perf_counter() - begun
            fold = json.loads(printed.getvalue())
            result[f"{key}agreement_dice"] = fold.get("agreement_dice")
            result[f"{key}fold"] = next(iter(fold["folds"].values()))
            result |= {f"{key}{k}": v for k, v in self.predicted(target).items()}

    def check_compile(self, result: dict, name: str, network: Network) -> None:
        for compiled in (False, True):
            os.environ["nnUNet_compile"] = "t" if compiled else "f"
            torch._dynamo.reset()
            begun = time.perf_counter()
            merge = None if name == "StockTrainer" else False
            trainer = self.training(name, network, f"compile_{name}_{compiled}", merge)
            key = "compiled" if compiled else "eager"
            result[f"{key} seconds"] = time.perf_counter() - begun
            result |= {f"{key} {k}": v for k, v in described_training(trainer).items()}
            result[f"{key} was_compiled"] = isinstance(trainer.network, torch._dynamo.OptimizedModule)

    def check_ranks(self, result: dict, name: str, network: Network) -> None:
        from torch import distributed
        from torch.nn.parallel import DistributedDataParallel

        store = f"file://{self.folder / f'ranks_{name}'}"
        distributed.init_process_group("nccl", init_method=store, rank=0, world_size=1)
        try:
            trainer = self.training(name, network, f"ranks_model_{name}", None if name == "StockTrainer" else True)
            result |= described_training(trainer)
            result["wrapped"] = isinstance(trainer.network, DistributedDataParallel)
        finally:
            distributed.destroy_process_group()

    # What they share

    def trainer(self, name: str, network: Network, folder: str, continued: bool = False):
        """A trainer of this name that trains on random patches and writes into a folder of its own."""
        from nnunet_sauron import trainers

        base = self.folder / "preprocessed" / DATASET
        data = base / f"nnUNetPlans_{network.configuration}"
        data.mkdir(parents=True, exist_ok=True)
        (data / "case.b2nd").touch()  # nnU-Net tells its data format from what it finds there
        (base / "dataset_fingerprint.json").write_text("{}")
        os.environ["nnUNet_results"] = str(self.folder / folder)
        torch.manual_seed(0)
        trainer_class = watched(getattr(trainers, name))
        chosen = plans(network) | {"continue_training": continued}
        return trainer_class(chosen, network.configuration, 0, dataset_json(), self.device)

    def images(self, count: int) -> list[Path]:
        """Made images, a patch and a bit large, in nnU-Net's naming."""
        import nibabel
        import numpy as np

        folder = self.folder / "images"
        folder.mkdir(exist_ok=True)
        shape = [side + side // 4 for side in self.sizes.trained.patch]
        for index in range(count):
            path = folder / f"case_{index:03d}_0000.nii.gz"
            if not path.exists():
                image = np.random.default_rng(index).normal(100, 20, shape).astype(np.float32)
                nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), path)
        return sorted(folder.iterdir())[:count]


class Cost:
    """Multiply-accumulates of a network, dense when this is made, at any widths."""

    def __init__(self, network: nn.Module, of: Network):
        from nnunet_sauron.pruning import CostModel, channel_layout

        self.dense = channel_layout(network).widths
        self.macs = CostModel(network, of.patch, 1).macs

    def widths_at(self, left: float, round_to: int = 1) -> dict[str, int]:
        """Widths with this part of the MACs, uneven between layers and, unless rounded, within no grid, as cuts are."""
        if left == 1:
            return dict(self.dense)
        draw = random.Random(0)
        uneven = {name: draw.uniform(0.8, 1.2) for name in self.dense}

        def at(scale: float) -> dict[str, int]:
            wanted = {name: round(width * scale * uneven[name] / round_to) for name, width in self.dense.items()}
            return {name: min(self.dense[name], max(2, round_to, w * round_to)) for name, w in wanted.items()}

        low, high = 0.0, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if self.macs(at(middle)) <= left * self.macs(self.dense) else (low, middle)
        return at(low)


INTERRUPTED = "interrupted.pth"


def watched(trainer_class: type) -> type:
    """The trainer, fed with random patches, which notes how long its steps and its cuts take."""

    class Watched(trainer_class):
        def get_dataloaders(self):
            self.step_seconds, self.epoch_steps, self.cut_seconds, self.step_losses = [], [], [], []
            # Pictures say nothing here and take longer than such a training.
            self.logger.plot_progress_png = self._plot = lambda *_: None
            return RandomPatches(self, 0), RandomPatches(self, 1)

        def on_epoch_start(self):
            before, begun = count_channels(self.bare_network), now(self.device)
            super().on_epoch_start()
            elapsed = now(self.device) - begun
            if count_channels(self.bare_network) < before:
                self.cut_seconds.append(elapsed)
            self.step_seconds = []

        def train_step(self, batch):
            begun = now(self.device)
            result = super().train_step(batch)
            self.step_seconds.append(now(self.device) - begun)
            self.step_losses.append(float(result["loss"]))
            return result

        def on_epoch_end(self):
            self.epoch_steps.append(statistics.median(self.step_seconds))
            super().on_epoch_end()
            latest = Path(self.output_folder) / "checkpoint_latest.pth"
            if self.current_epoch == 2 and latest.is_file():
                shutil.copy(latest, latest.with_name(INTERRUPTED))

    Watched.__name__ = Watched.__qualname__ = trainer_class.__name__  # nnU-Net finds a model's trainer by it
    return Watched


class RandomPatches:
    """What nnU-Net's data loaders yield, two batches in turn, in pinned memory as theirs are."""

    def __init__(self, trainer, seed: int):
        generator = torch.Generator().manual_seed(seed)
        scales = trainer._get_deep_supervision_scales()
        shape = (trainer.batch_size, 1, *trainer.configuration_manager.patch_size)
        self.batches = itertools.cycle([self._batch(shape, scales, generator, trainer.device) for _ in range(2)])

    def __next__(self) -> dict:
        return next(self.batches)

    @staticmethod
    def _batch(shape, scales, generator: torch.Generator, device: torch.device) -> dict:
        data = torch.randn(shape, generator=generator)
        labels = ((data > 0.3).short() + (data > 1).short()).contiguous()
        steps = [[round(1 / side) for side in scale] for scale in scales]
        target = [labels[(..., *(slice(None, None, s) for s in step))].contiguous() for step in steps]
        if device.type == "cuda":
            data, target = data.pin_memory(), [one.pin_memory() for one in target]
        return {"data": data, "target": target}


def settings_of(name: str, iterations: int, merge: bool | None) -> list[str]:
    """Settings of a short training that cuts, the one to be preferred first: a method need not know a target."""
    length = f"num_epochs=5,num_iterations_per_epoch={iterations},num_val_iterations_per_epoch=1,save_every=1"
    if name == "StockTrainer":
        return [length]
    # Random patches teach nothing, and the loss that guards cuts goes up and down.
    length += f",merge={merge},max_loss_increase=None,max_fraction_per_epoch=None"
    # A method without a target: thresholds that rise as soon as the loss has settled, and a loss that is settled.
    eager = "tau_max=0.9,kappa=2,rho=2,mu=1.0,initial_lr=0"
    return [f"{length},{one}" for one in ("target_macs=0.5", eager)] + [length]


def described_training(trainer) -> dict:
    from nnunet_sauron.pruning import channel_layout

    widths = channel_layout(trainer.bare_network).widths
    result = {
        "settings": trainer.settings_given,
        "finite": all(map(math.isfinite, trainer.step_losses)),
        "last_loss": trainer.step_losses[-1],
        "cuts": len(trainer.cut_seconds),
        "cut_s": statistics.median(trainer.cut_seconds) if trainer.cut_seconds else None,
        "step_s_first_epoch": trainer.epoch_steps[0],
        "step_s_last_epoch": trainer.epoch_steps[-1],
        "channels_left": sum(widths.values()),
    }
    if getattr(trainer, "history", None) and trainer.history():
        records = trainer.history()
        result["macs_left"] = records[-1]["macs"] / records[0]["macs"]
    if trainer.grad_scaler is not None:
        result["loss_scale"] = trainer.grad_scaler.get_scale()
    return result


def compared(whole, resumed) -> str:
    """Whether a resumed training went on as the whole one did; sums on a GPU differ in their order, cuts may follow."""
    from nnunet_sauron.pruning import channel_layout

    same = channel_layout(whole.bare_network).widths == channel_layout(resumed.bare_network).widths
    finite = all(map(math.isfinite, resumed.step_losses))
    epochs = f"{len(resumed.epoch_steps)} of {len(whole.epoch_steps)} epochs"
    if not getattr(whole, "history", None):
        return f"{epochs}, losses {'finite' if finite else 'NOT FINITE'}"
    # What was decided before the interruption must be the same to the channel.
    first = [[record["keep"] for record in one.history()[:2]] for one in (whole, resumed)]
    then = [one.history()[2]["widths"] for one in (whole, resumed)]
    decided = "as decided" if first[0] == first[1] and then[0] == then[1] else "NOT AS DECIDED"
    ending = "same" if same else "other"
    return f"{epochs}, cut {decided}, {ending} widths at the end, losses {'finite' if finite else 'NOT FINITE'}"


def count_channels(network: nn.Module) -> int:
    from nnunet_sauron.pruning import channel_layout

    return sum(channel_layout(network).widths.values())


def build(network: Network) -> nn.Module:
    """The network alone, without deep supervision, as it predicts."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    architecture = plans(network)["configurations"][network.configuration]["architecture"]
    torch.manual_seed(0)
    return get_network_from_plans(
        architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"], 1, 3,
        allow_init=True, deep_supervision=False,
    )  # fmt: skip


def now(device: torch.device) -> float:
    """The time when all work that was given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise TimeoutError if what is inside takes longer."""

    def ring(*_):
        raise TimeoutError(f"took more than {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def describe_machine() -> dict:
    from importlib.metadata import version

    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "gpu": gpu.name if gpu else None,
        "gpu_memory_gib": round(gpu.total_memory / 2**30, 1) if gpu else None,
        "processor": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nnunetv2": version("nnunetv2"),
        "date": time.strftime("%Y-%m-%d"),
    }


def print_tables(rows: Sequence[dict]) -> None:
    """A table for each check and network, with a column for each trainer; what failed below."""
    hidden = ("check", "of", "result", "traceback", "log")
    groups: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        trainer, comma, network = row["of"].partition(", ")
        groups.setdefault((row["check"], network if comma else trainer), {})[trainer if comma else ""] = row
    for (check, network), columns in groups.items():
        print(f"\n{check}, {network}")
        measured = dict.fromkeys(key for row in columns.values() for key in row if key not in hidden)
        print(f"  {'':30s}" + "".join(f"{name.removesuffix('Trainer'):>13s}" for name in columns))
        for key in (key for key in measured if not key.endswith(("settings", "resume", "dice", "fold"))):
            print(f"  {key:30s}" + "".join(f"{formatted(row.get(key)):>13s}" for row in columns.values()))
        for name, row in columns.items():
            for key in (key for key in row if key.endswith(("resume", "dice", "fold"))):
                print(f"  {name or network} {key}: {formatted(row[key])}")
            if row["result"] != "ok":
                print(f"  {name or network}: {row['result']}")
    print(flush=True)


def formatted(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1e6:
        return f"{value / 1e9:.4g} G"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {formatted(v)}" for k, v in value.items() if not isinstance(v, dict))
    return str(value)


def plans(network: Network) -> dict:
    """A plans file as nnU-Net's planner writes it, for this network and isotropic images of one channel."""
    dim, stages = len(network.patch), len(network.widths)
    data, segmentation = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}, {"is_seg": True}
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [80, 80, 80],
        "image_reader_writer": "NibabelIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}},
        "configurations": {
            network.configuration: {
                "data_identifier": f"nnUNetPlans_{network.configuration}",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": network.batch,
                "patch_size": list(network.patch),
                "median_image_size_in_voxels": list(network.patch),
                "spacing": [1.0] * dim,
                "normalization_schemes": ["ZScoreNormalization"],
                "use_mask_for_norm": [False],
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": data,
                "resampling_fn_seg_kwargs": data | segmentation | {"order": 1},
                "resampling_fn_probabilities_kwargs": data | {"order": 1},
                "batch_dice": True,
                "architecture": {
                    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
                    "arch_kwargs": {
                        "n_stages": stages,
                        "features_per_stage": list(network.widths),
                        "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
                        "kernel_sizes": [[3] * dim] * stages,
                        "strides": [[1] * dim] + [[2] * dim] * (stages - 1),
                        "n_conv_per_stage": [2] * stages,
                        "n_conv_per_stage_decoder": [2] * (stages - 1),
                        "conv_bias": True,
                        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
                        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                        "dropout_op": None,
                        "dropout_op_kwargs": None,
                        "nonlin": "torch.nn.LeakyReLU",
                        "nonlin_kwargs": {"inplace": True},
                    },
                    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
                },
            }
        },
    }


def dataset_json() -> dict:
    labels = {"background": 0, "low": 1, "high": 2}
    return {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}


if __name__ == "__main__":
    main()
