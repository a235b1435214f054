"""PruningTrainer in process, on nnU-Net's own training loop with random patches."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed

from nnunet_sauron.analysis.clusterability.plots import NOTE_ON_WIDTHS
from nnunet_sauron.methods.delta import delta_opt
from nnunet_sauron.methods.sauron import PublishedSauron, Sauron
from nnunet_sauron.methods.similar_channels import mean_distances
from nnunet_sauron.methods.thresholds import Threshold
from nnunet_sauron.pruning import channel_layout, merge_channels, merging, position_weights, remove_channels
from nnunet_sauron.trainers import CompressedTrainer, SauronTrainer
from nnunet_sauron.trainers.log_lines import epoch_line
from nnunet_sauron.trainers.removal import remove

from ..contracts.pruned_network import make_multiples
from ..old_torch import compiles_hooks, scales_gradients_on_cpu
from . import small
from .small import OnRandomPatches, RandomPatches, SmallTrainer, log_of, plans, small_trainer


def trained(folder, trainer_class=SmallTrainer, widths=(6, 8, 10), **changes):
    trainer = small_trainer(folder, type("T", (trainer_class,), {"__name__": "T", **changes}), widths=widths)
    trainer.run_training()
    return trainer


def test_channels_go_between_epochs_and_never_at_the_end(folder):
    trainer = trained(folder, cut_from=0.3, cut_until=0.7)
    widths = [sum(record["widths"].values()) for record in trainer.history()]
    # Cuts are decided after epochs 1, 2 and 3 of 6 and made before the next one.
    assert widths[0] == widths[1] > widths[2] > widths[3] > widths[4] == widths[5]
    assert channel_layout(trainer.network).widths == trainer.history()[-1]["widths"]
    assert [bool(record["keep"]) for record in trainer.history()] == [False, True, True, True, False, False]


def test_checkpoint_holds_the_network_that_was_validated_and_what_goes_next(folder):
    trainer = trained(folder, num_epochs=3)
    for name, epochs in (("checkpoint_final.pth", 3), ("checkpoint_best.pth", None)):
        checkpoint = torch.load(Path(trainer.output_folder) / name, weights_only=False)
        history = checkpoint["logging"]["pruning"]
        assert len(history) == checkpoint["current_epoch"] == (epochs or len(history))
        first = next(iter(history[-1]["widths"]))
        width = checkpoint["network_weights"][f"{first}.conv.weight"].shape[0]
        assert width == history[-1]["widths"][first]
    assert history[0]["keep"]


class Interrupted(SmallTrainer):
    """Stops after an epoch, as a crash would."""

    stop_after = 2

    def on_epoch_end(self):
        super().on_epoch_end()
        if self.current_epoch > self.stop_after:
            raise KeyboardInterrupt


def test_resumed_run_makes_the_same_cut(folder):
    with pytest.raises(KeyboardInterrupt):
        trained(folder, Interrupted)
    latest = next(folder.rglob("checkpoint_latest.pth"))
    before = torch.load(latest, weights_only=False)
    resumed = small_trainer(folder, type("T", (SmallTrainer,), {}))
    resumed.load_checkpoint(str(latest))
    assert resumed.current_epoch == 3
    assert channel_layout(resumed.network).widths == before["logging"]["pruning"][-1]["widths"]
    for parameter, state in resumed.optimizer.state.items():
        assert state["momentum_buffer"].shape == parameter.shape
    resumed.run_training()
    decided = before["logging"]["pruning"][-1]
    after = {name: len(decided["keep"].get(name, range(width))) for name, width in decided["widths"].items()}
    assert resumed.history()[3]["widths"] == after
    assert resumed.history()[:3] == before["logging"]["pruning"]
    assert len(resumed.history()) == 6
    assert_thresholds_replay(resumed)


def assert_thresholds_replay(trainer) -> None:
    """The recorded thresholds are those of one uninterrupted sequence of updates."""
    series = trainer.series()
    for name in trainer.dense_widths:
        rho = trainer.pruning_settings.threshold(trainer.num_epochs).rho
        tau = Threshold(trainer.pruning_settings.tau_max, trainer.pruning_settings.kappa, rho)
        for epoch, record in enumerate(trainer.history()):
            if record["held"] is None:
                losses = [series["train_losses"][e] + trainer.history()[e]["regulariser"] for e in range(epoch + 1)]
                tau.update(losses, series["val_losses"][: epoch + 1],
                           [trainer.history()[e]["widths"][name] for e in range(epoch + 1)])  # fmt: skip
            assert record["state"]["tau"][name] == pytest.approx(tau.value)
            assert record["state"]["waiting"][name] == tau.waiting


def test_thresholds_follow_the_recorded_losses(folder):
    class Noisy(SmallTrainer):
        def on_train_epoch_end(self, outputs):
            for output in outputs:
                output["loss"] = np.asarray([1.0, 0.5, 0.8, 0.7, 0.75, 0.6, 0.72, 0.71][self.current_epoch])
            super().on_train_epoch_end(outputs)

        def on_validation_epoch_end(self, outputs):
            for output in outputs:
                output["loss"] = np.asarray([0.5, 0.6, 0.55, 0.4, 0.5, 0.45, 0.41, 0.42][self.current_epoch])
            super().on_validation_epoch_end(outputs)

    trainer = trained(folder, Noisy, num_epochs=8, max_loss_increase=10.0, cut_until=1.0, min_channels=8)
    steps = [record["state"]["tau_steps"]["encoder.stages.1.0.convs.0"] for record in trainer.history()]
    assert steps[-1] >= 2
    assert_thresholds_replay(trainer)


def test_best_checkpoint_wider_than_the_final_network_loads(folder):
    class BestFirst(SmallTrainer):
        def on_epoch_end(self):
            super().on_epoch_end()
            self._best_ema = 9.0

    trainer = trained(folder, BestFirst, num_epochs=4)
    best = Path(trainer.output_folder) / "checkpoint_best.pth"
    widths = torch.load(best, weights_only=False)["logging"]["pruning"][-1]["widths"]
    assert sum(widths.values()) > sum(channel_layout(trainer.network).widths.values())
    trainer.load_checkpoint(str(best))
    assert channel_layout(trainer.network).widths == widths
    trainer.optimizer.zero_grad()
    trainer.train_step(next(RandomPatches(trainer, 5)))


def test_the_loss_is_nnunets_plus_lambda_times_the_mean_delta_opt(folder):
    trainer = small_trainer(folder, type("T", (SmallTrainer,), {"Method": Sauron, "lambda_": 0.7}))
    trainer.on_train_start()
    maps = []
    layers = [name for unit in channel_layout(trainer.network).units for name in unit.feature_maps]
    for name in layers:
        trainer.network.get_submodule(name).register_forward_hook(lambda m, i, out: maps.append(out.detach().clone()))
    trainer.on_train_epoch_start()
    batch = next(RandomPatches(trainer, 3))
    trainer.network.train()
    with torch.no_grad():
        plain = trainer.loss.loss(trainer.network(batch["data"]), batch["target"]).item()
        expected = 0.7 * torch.stack([delta_opt(h) for h in maps]).mean().item()
    trainer.method.before_step()
    result = trainer.train_step(batch)
    assert len(maps) == 2 * len(layers)
    assert result["regulariser"] == pytest.approx(expected, rel=1e-4)
    assert result["loss"] == pytest.approx(plain, rel=1e-4)
    # The gradient holds the term, too: without it the step would go elsewhere.
    assert expected > 0.01
    trainer.network.eval()
    with torch.no_grad():
        assert trainer.loss(trainer.network(batch["data"]), batch["target"]) == pytest.approx(
            trainer.loss.loss(trainer.network(batch["data"]), batch["target"]).item()
        )


def test_lambda_0_prunes_only(folder):
    trainer = trained(folder, lambda_=0.0, num_epochs=3)
    assert [record["regulariser"] for record in trainer.history()] == [0.0] * 3
    assert sum(trainer.history()[-1]["widths"].values()) < sum(trainer.dense_widths.values())


def test_what_clusterability_advises_keeps_delta_opt_to_the_end_and_cuts_nothing(folder, monkeypatch):
    (advised,) = re.findall(r'nnunet_sauron="(.*?)"', NOTE_ON_WIDTHS)
    monkeypatch.setenv("nnunet_sauron", f"{advised},delta_opt_every=1,num_epochs=3")
    trainer = small_trainer(folder, type("T", (OnRandomPatches, SauronTrainer), {}))
    trainer.run_training()
    history = trainer.history()
    assert len(history) == 3 and all(record["regulariser"] > 0 and not record["keep"] for record in history)


def test_redundant_channels_are_those_below_the_threshold_but_the_reference(folder):
    class Seen(PublishedSauron):
        def redundant(self, training):
            for threshold in self._thresholds.values():
                threshold.steps = threshold.kappa  # tau = tau_max
            drawn = []
            taken = replace(training, batches=lambda n: drawn.append(list(training.batches(n))) or drawn[-1])
            wishes = super().redundant(taken)
            inputs = [batch for of_draw in drawn for batch in of_draw]
            assert len(inputs) == self.settings.prune_batches == 2
            references = set()
            for name, distances in mean_distances(self._network, inputs).items():
                channels = wishes[name]
                below = [
                    sorted((c for c, score in enumerate(row) if score < 0.9 and c != r), key=row.__getitem__)
                    for r, row in enumerate(distances.tolist())
                ]
                # More than one where no other channel is near.
                found = {r for r, expected in enumerate(below) if channels == expected}
                assert found
                references |= found
            assert len(references) > 1
            return wishes

    trainer = trained(folder, num_epochs=3, tau_max=0.9, Method=Seen)
    assert sum(trainer.history()[-1]["widths"].values()) < sum(trainer.dense_widths.values())


def test_cuts_are_held_while_the_training_loss_is_worse_than_its_lowest(folder):
    class Worse(SmallTrainer):
        def on_train_epoch_end(self, outputs):
            for output in outputs:
                output["loss"] = np.asarray([1.0, 0.5, 0.7, 0.52, 0.5, 0.5][self.current_epoch])
            super().on_train_epoch_end(outputs)

    trainer = trained(folder, Worse, max_loss_increase=0.1)
    assert [bool(record["keep"]) for record in trainer.history()] == [True, True, False, True, False, False]
    assert "0.700 is more than 0.1 above its lowest, 0.500" in trainer.history()[2]["held"]
    log = log_of(trainer)
    assert "above its lowest" in log


@pytest.mark.parametrize("merge", [True, False])
def test_a_cut_of_multiples_that_merges_leaves_the_output_as_it_was(folder, monkeypatch, merge):
    class Copies(PublishedSauron):
        def redundant(self, training):
            widths = training.widths_now
            return {name: [c for c in range(width) if c not in originals[name]] for name, width in widths.items()}

    def watched(trainer, keep):
        outputs.append(output(trainer.network))
        remove(trainer, keep)
        outputs.append(output(trainer.network))

    def output(network):
        with torch.no_grad():
            return network.eval()(torch.ones(1, 1, 16, 16).cumsum(-1))[0]

    outputs = []
    monkeypatch.setattr("nnunet_sauron.trainers.pruning.remove", watched)
    trainer = small_trainer(folder, type("T", (SmallTrainer,), {
        "Method": Copies, "merge": merge, "initial_lr": 0.0, "num_epochs": 3, "max_fraction_per_epoch": None,
    }))  # fmt: skip
    trainer.initialize()
    originals = make_multiples(trainer.network)
    trainer.run_training()
    assert sum(trainer.history()[-1]["widths"].values()) < sum(trainer.history()[0]["widths"].values())
    before, after = outputs[:2]
    assert torch.allclose(before, after, atol=1e-4) == merge
    assert trainer.settings_now()["merge"] == merge


@pytest.mark.parametrize("regions", [False, True])
def test_a_cut_that_merges_counts_positions_by_how_unsure_the_network_is(folder, monkeypatch, regions):
    """What a trainer makes of a cut is what `merge_channels` makes of it on the same batches, with these weights."""
    trainer = small_trainer(folder, type("T", (SmallTrainer,), {"merge": True, "merge_batches": 2}))
    trainer.initialize()
    # The network's outputs stay the same; what they mean is another matter.
    monkeypatch.setattr(type(trainer.label_manager), "has_regions", property(lambda _: regions))
    loader = RandomPatches(trainer, 0)
    batches = [next(loader)["data"] for _ in range(2)]
    trainer.dataloader_train = iter([{"data": batch} for batch in batches])
    before = copy.deepcopy(trainer.network)
    keep = {name: list(range(width // 2)) for name, width in channel_layout(before).widths.items()}
    remove(trainer, keep)
    results = {}
    for name, kind in (("these", regions), ("other", not regions), ("none", None)):
        results[name] = copy.deepcopy(before)
        weights = None if kind is None else position_weights(before, batches, regions=kind)
        merge_channels(results[name], keep, batches, weights=weights)
    key = "encoder.stages.0.0.convs.1.conv.weight"
    same = {
        name: torch.equal(net.state_dict()[key], trainer.network.state_dict()[key]) for name, net in results.items()
    }
    assert same == {"these": True, "other": False, "none": False}


class CountedPatches(RandomPatches):
    drawn = 0

    def __next__(self) -> dict:
        self.drawn += 1
        return super().__next__()


@pytest.mark.parametrize(
    ("widths", "given", "drawn"), [((6, 8, 10), None, 6), ((6, 8, 160), None, 20), ((6, 8, 160), 11, 11)]
)
def test_a_cut_that_merges_fits_on_as_many_batches_as_its_layers_need(folder, widths, given, drawn):
    """Patches of 16 x 16, two a batch: 16 positions a patch in the deepest of three stages."""
    trainer = small_trainer(folder, type("T", (SmallTrainer,), {"merge": True, "merge_batches": given}), widths=widths)
    trainer.initialize()
    trainer.dataloader_train = loader = CountedPatches(trainer, 0)
    remove(trainer, {"encoder.stages.0.0.convs.0": [0, 1]})
    assert loader.drawn == drawn
    log = log_of(trainer)
    assert f"least squares on {drawn} batches" in log


def test_too_few_batches_to_merge_on_are_refused_before_anything_is_written(folder):
    attributes = {"merge": True, "merge_batches": 9}
    with pytest.raises(ValueError, match=r"merge_batches=9 of 2 patches are too few.*at least 10, or None"):
        small_trainer(folder, type("T", (SmallTrainer,), attributes), widths=(6, 8, 160))
    assert not list((folder / "results").rglob("*"))
    small_trainer(folder, type("T", (SmallTrainer,), {**attributes, "merge": False}), widths=(6, 8, 160))


def test_a_rank_needs_as_many_batches_as_its_part_of_them_asks_for(folder, monkeypatch):
    attributes = {"merge": True, "merge_batches": 19}
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    small_trainer(folder, type("T", (SmallTrainer,), attributes), widths=(6, 8, 160))
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="merge_batches=19 of 1 patches.*at least 20"):
        small_trainer(folder, type("T", (SmallTrainer,), attributes), widths=(6, 8, 160))


def test_where_there_is_no_float64_channels_are_dropped(folder, monkeypatch):
    monkeypatch.setattr("nnunet_sauron.trainers.removal.empty_cache", lambda device: None)  # there is no such device
    trainer = small_trainer(folder, type("T", (SmallTrainer,), {"merge": True}))
    trainer.initialize()
    trainer.device = torch.device("mps")
    dropped = copy.deepcopy(trainer.network)
    keep = {"encoder.stages.0.0.convs.0": [0, 1]}
    remove(trainer, keep)
    remove_channels(dropped, keep)
    after = trainer.network.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in dropped.state_dict().items())
    log = log_of(trainer)
    assert "dropped, not merged" in log


@pytest.mark.parametrize("limit", [0, 1 << 28], ids=["unit by unit", "one pass"])
@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), torch.linalg.LinAlgError("singular"),
              RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_where_a_fit_fails_half_way_the_rest_is_dropped(folder, monkeypatch, error, limit):
    monkeypatch.setattr("nnunet_sauron.pruning.merging.VALUES_IN_ONE_PASS", limit)
    trainer = small_trainer(folder, type("T", (SmallTrainer,), {"merge": True, "num_epochs": 3}))
    fitted, calls = merging.fitted, []

    def fails(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise error
        return fitted(*arguments)

    monkeypatch.setattr(merging, "fitted", fails)
    trainer.run_training()
    assert len(calls) > 4  # a later cut merges again
    widths = trainer.history()[-1]["widths"]
    assert sum(widths.values()) < sum(trainer.history()[0]["widths"].values())
    assert channel_layout(trainer.network).widths == widths
    for parameter, state in trainer.optimizer.state.items():
        assert state["momentum_buffer"].shape == parameter.shape
    log = log_of(trainer)
    assert f"dropped, not merged, since the fit failed: {error}" in log


def test_settings_that_stay_are_stored_once(folder):
    trainer = trained(folder, num_epochs=3)
    stored = torch.load(Path(trainer.output_folder) / "checkpoint_final.pth", weights_only=False)["logging"]["settings"]
    assert len(stored) == 3 and len({id(record) for record in stored}) == 1
    assert stored[0]["num_epochs"] == 3


def test_settings_come_from_the_class_then_from_the_environment(folder, monkeypatch):
    monkeypatch.setenv("nnunet_sauron", "num_epochs=2, min_channels=5,rho=3,enable_deep_supervision=False")
    trainer = trained(folder, min_channels=3, lambda_=0.25)
    assert trainer.num_epochs == 2 and len(trainer.history()) == 2
    settings = trainer.kept_settings()[-1]
    assert (settings["min_channels"], settings["lambda_"], settings["rho"]) == (5, 0.25, 3)
    assert trainer.enable_deep_supervision is False
    log = log_of(trainer)
    assert "lambda_=0.25" in log and "min_channels=5" in log


@pytest.mark.parametrize(
    ("text", "said"),
    [("lamda=1", r"(?s)'lamda=1' is not a setting.*num_epochs=None.*lambda_=0.5"),
     ("lambda_=x", "lambda_ must be a number"),
     ("num_epochs=2.5", "num_epochs must be a whole number"), ("tau_max=0", "tau_max must be in"),
     ("num_epochs", "not a setting"),
     ("enable_deep_supervision=maybe", "True or False")],
)  # fmt: skip
def test_bad_settings_stop_before_anything_is_written(folder, monkeypatch, text, said):
    monkeypatch.setenv("nnunet_sauron", text)
    with pytest.raises(ValueError, match=said):
        small_trainer(folder)
    assert not any((folder / "results").iterdir())


def test_checkpoint_that_cannot_be_used_is_refused_with_a_reason(folder):
    trainer = trained(folder, num_epochs=2)
    final = Path(trainer.output_folder) / "checkpoint_final.pth"
    other = small_trainer(folder, type("Other", (SmallTrainer,), {}), widths=(6, 8, 10, 12))
    with pytest.raises(ValueError, match="does not fit: it was made by T"):
        other.load_checkpoint(str(final))
    final.write_bytes(final.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"checkpoint_final\.pth cannot be read: truncated"):
        trainer.load_checkpoint(str(final))
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        trainer.load_checkpoint(str(final.with_name("none.pth")))


@pytest.mark.parametrize("name", ["SmallTrainer", "CompressedTrainer"])
def test_plans_made_anew_are_noticed_when_a_training_is_continued(folder, monkeypatch, name):
    path = Path(trained(folder, num_epochs=2).output_folder) / "checkpoint_final.pth"
    trainer_class = SmallTrainer if name == "SmallTrainer" else type(name, (OnRandomPatches, CompressedTrainer), {})

    def continued(**changes):
        of_plans = plans()
        configuration = of_plans["configurations"]["2d"]
        for key, value in changes.items():
            (configuration if key in configuration else configuration["architecture"]["arch_kwargs"])[key] = value
        monkeypatch.setattr(small, "plans", lambda *_: of_plans)
        trainer = small_trainer(folder, trainer_class)
        trainer.load_checkpoint(str(path))
        return log_of(trainer)

    assert "was trained with plans" not in continued()
    assert "had patch_size=[16, 16] (now [8, 16])" in continued(patch_size=[8, 16])
    with pytest.raises(ValueError, match=r"whose network had nonlin=torch.nn.LeakyReLU \(now torch.nn.ReLU\)"):
        continued(nonlin="torch.nn.ReLU")


def test_checkpoint_that_cannot_be_written_leaves_the_old_one(folder, monkeypatch):
    trainer = trained(folder, num_epochs=2)
    final = Path(trainer.output_folder) / "checkpoint_final.pth"
    before = final.read_bytes()

    def full_disk(checkpoint, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match=r"Could not write .*checkpoint_final\.pth.*No space left.*--c"):
        trainer.save_checkpoint(str(final))
    assert final.read_bytes() == before
    assert not list(final.parent.glob("*.tmp"))


def test_the_log_tells_what_is_removed_and_what_is_left(folder):
    trainer = trained(folder, num_epochs=3)
    line = epoch_line(trainer.history()[1], trainer.dense_widths, trainer.dense_cost)
    left, dense = sum(trainer.history()[1]["widths"].values()), sum(trainer.dense_widths.values())
    assert line.startswith(f"{left} of {dense} channels")
    removed = sum(trainer.history()[1]["widths"].values()) - sum(trainer.history()[2]["widths"].values())
    assert f"Removed before the next epoch: {removed} channels" in line and "more layers" in line
    assert "No cut before the next epoch: outside" in epoch_line(
        trainer.history()[2], trainer.dense_widths, trainer.dense_cost
    )
    assert "GMACs" in line and "M parameters" in line


@scales_gradients_on_cpu
def test_gradient_scaling_goes_on_through_cuts(folder):
    class Scaled(SmallTrainer):
        scale = 2.0**10

        def initialize(self):
            torch.manual_seed(0)
            super().initialize()
            if self.scale is not None:
                # On CUDA nnU-Net makes it itself; the scaler's own arithmetic is the same on the CPU.
                self.grad_scaler = torch.amp.GradScaler("cpu", init_scale=self.scale)

    scaled = trained(folder, Scaled, num_epochs=4)
    plain = trained(folder, Scaled, num_epochs=4, scale=None)
    assert scaled.grad_scaler.get_scale() == Scaled.scale
    assert sum(scaled.history()[-1]["widths"].values()) < sum(scaled.dense_widths.values())
    for a, b in zip(scaled.network.parameters(), plain.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_a_name_is_stored_once_however_long_the_history(folder):
    trainer = trained(folder, num_epochs=3)
    names = [list(record["widths"]) + list(record["state"]["tau"]) for record in trainer.history()]
    assert all(a is b for epoch in names[1:] for a, b in zip(epoch, names[0], strict=True))


@pytest.mark.parametrize("cuts", [True, False])
def test_after_the_cuts_the_learning_rate_starts_again(folder, cuts):
    fewest = {} if cuts else {"min_channels": 100}
    trainer = trained(folder, cut_until=0.5, rate_after_cuts=2, initial_lr=0.004, **fewest)
    assert (sum(trainer.history()[-1]["widths"].values()) < sum(trainer.dense_widths.values())) == cuts
    plain = [0.004 * (1 - epoch / 6) ** 0.9 for epoch in range(6)]
    again = [0.008 * (1 - epoch / 3) ** 0.9 for epoch in range(3)]
    assert trainer.series()["lrs"] == pytest.approx([*plain[:3], *again] if cuts else plain)
    assert trainer.kept_settings()[-1]["rate_after_cuts"] == 2


def test_pruning_png_is_drawn_beside_progress_png(folder):
    trainer = trained(folder, num_epochs=2, draws=True)
    for name in ("pruning.png", "progress.png"):
        assert (Path(trainer.output_folder) / name).read_bytes()[:4] == b"\x89PNG"


@compiles_hooks
def test_compiled_network_learns_the_same_and_is_cut(folder, monkeypatch):
    class Compiled(SmallTrainer):
        def _do_i_compile(self):
            return True  # nnU-Net itself never compiles on the CPU

        def initialize(self):
            torch.manual_seed(0)
            super().initialize()

    class Eager(Compiled):
        def _do_i_compile(self):
            return False

    # The compiler's back end is not what is tested, and takes minutes; dynamo and autograd's tracing are.
    torch._dynamo.utils.counters.clear()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: real(model, backend="aot_eager"))
    small = {"num_epochs": 2}  # one cut, and graphs before and after it
    compiled, eager = trained(folder, Compiled, **small), trained(folder, Eager, **small)
    assert isinstance(compiled.network, torch._dynamo.OptimizedModule)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert [r["widths"] for r in compiled.history()] == [r["widths"] for r in eager.history()]
    assert sum(compiled.history()[-1]["widths"].values()) < sum(compiled.dense_widths.values())
    assert [r["regulariser"] for r in compiled.history()] == pytest.approx(
        [r["regulariser"] for r in eager.history()], rel=1e-3
    )
    for a, b in zip(compiled.bare_network.parameters(), eager.bare_network.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-2)


class TestContinuing:
    """What `--c` and `--val` do in a shell without the variable, or with another one."""

    GIVEN = "num_epochs=4,min_channels=3,initial_lr=0.02,save_every=1,snapshot_every=2"

    def continued(self, folder, monkeypatch, variable: str | None, checkpoint="checkpoint_final.pth"):
        if variable is None:
            monkeypatch.delenv("nnunet_sauron", raising=False)
        else:
            monkeypatch.setenv("nnunet_sauron", variable)
        trainer = small_trainer(folder, type("T", (SmallTrainer,), {"__name__": "T"}))
        trainer.load_checkpoint(str(Path(trainer.output_folder) / checkpoint))
        return trainer

    @pytest.fixture
    def begun(self, folder, monkeypatch):
        monkeypatch.setenv("nnunet_sauron", self.GIVEN)
        return trained(folder)

    def test_settings_come_from_the_checkpoint(self, folder, monkeypatch, begun):
        trainer = self.continued(folder, monkeypatch, None)
        assert trainer.settings_now() == begun.settings_now()
        assert (trainer.num_epochs, trainer.initial_lr, trainer.pruning_settings.min_channels) == (4, 0.02, 3)
        assert trainer.method.settings.min_channels == 3 and trainer.method.num_epochs == 4
        assert trainer.lr_scheduler.max_steps == 4 and trainer.optimizer.param_groups[0]["initial_lr"] == 0.02

    def test_also_of_a_time_when_the_history_held_them(self, folder, monkeypatch, begun):
        path = Path(begun.output_folder) / "checkpoint_final.pth"
        checkpoint = torch.load(path, weights_only=False)
        settings = checkpoint["logging"].pop("settings")
        for record, of_epoch in zip(checkpoint["logging"]["pruning"], settings, strict=True):
            record["settings"] = of_epoch
        torch.save(checkpoint, path)
        trainer = self.continued(folder, monkeypatch, None)
        assert trainer.settings_now() == begun.settings_now()
        assert trainer.kept_settings() == settings
        trainer.run_training()  # which writes the finished training's checkpoint anew
        assert self.continued(folder, monkeypatch, None).settings_now() == begun.settings_now()

    def test_a_finished_training_stays_finished(self, folder, monkeypatch, begun):
        trainer = self.continued(folder, monkeypatch, None)
        before = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
        trainer.run_training()
        assert len(trainer.history()) == 4
        assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.network.state_dict().items())

    def test_also_one_that_was_set_up_before(self, folder, monkeypatch, begun):
        monkeypatch.delenv("nnunet_sauron")
        trainer = small_trainer(folder, type("T", (SmallTrainer,), {"__name__": "T"}))
        trainer.initialize()
        trainer.load_checkpoint(str(Path(begun.output_folder) / "checkpoint_final.pth"))
        assert trainer.settings_now() == begun.settings_now()
        assert trainer.lr_scheduler.max_steps == 4 and trainer.method.num_epochs == 4
        assert channel_layout(trainer.network).widths == channel_layout(begun.network).widths

    def test_what_cannot_change_is_refused_with_both_values(self, folder, monkeypatch, begun):
        with pytest.raises(ValueError, match=r"min_channels=3 \(now 2\), num_epochs=4 \(now 9\).*without --c"):
            self.continued(folder, monkeypatch, "num_epochs=9,min_channels=2,initial_lr=0.02")

    def test_what_can_change_is_taken(self, folder, monkeypatch, begun):
        trainer = self.continued(folder, monkeypatch, "save_every=7,num_epochs=4")
        assert trainer.save_every == 7 and trainer.num_epochs == 4 and trainer._snapshots._every == 2


@pytest.mark.parametrize("spelling", ["nnUNet_sauron", "NNUNET_SAURON"])
def test_another_spelling_of_the_variable_is_refused(folder, monkeypatch, spelling):
    monkeypatch.setenv(spelling, "num_epochs=2")
    with pytest.raises(ValueError, match=f"{spelling} is not read: it is spelled nnunet_sauron"):
        small_trainer(folder)


def test_an_unknown_setting_gets_the_nearest_one_and_a_line_for_each(folder, monkeypatch):
    monkeypatch.setenv("nnunet_sauron", "num_epoch=2")
    with pytest.raises(ValueError, match=r"'num_epoch=2' is not a setting.*did you mean num_epochs\?") as error:
        small_trainer(folder)
    assert "\n    num_epochs=None\n" in str(error.value)
