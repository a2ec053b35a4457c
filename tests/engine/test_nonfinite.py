"""Steps without a finite loss and gradient: skipped, told, and too many in a row."""

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distcv import checkpoint, loop
from distcv.checkpoint import Checkpoint
from distcv.config import InputError, Recipe
from distcv.data import ImageData
from distcv.loop import Diverged, train_epoch
from distcv.optim import OPTIMIZERS, Kept
from distcv.runtime import Runtime
from distcv.runtime.device import joined
from distcv.saving import place_before
from distcv.training import Progress, Training, build, load_data
from support.runs import Runs, stopped_in
from support.trajectory import differing, state_of

RECIPE = Recipe(
    model="gap", dataset="synthetic", batch_size=8, lr=0.02, dropout=0.1, ema_decay=0.9,
    clip_norm=1.0,
)  # fmt: skip
STEPS = 7
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def data() -> ImageData:
    whole = load_data(RECIPE, Path(), print)
    return dataclasses.replace(
        whole, train_images=whole.train_images[:80], train_labels=whole.train_labels[:80]
    )


class Until:
    """Asks to stop after so many steps."""

    signalled = False

    def __init__(self, steps: int, progress: Progress) -> None:
        self.steps, self.progress = steps, progress

    def pending(self) -> bool:
        return self.progress.step >= self.steps


class Trained:
    """A training of a few steps, with what it logged."""

    def __init__(self, recipe: Recipe, data: ImageData) -> None:
        self.training: Training = build(recipe, data, Runtime(recipe))
        self.progress = Progress()
        self.rows: list[dict[str, Any]] = []

    def to(self, step: int, log_every: int = 1) -> "Trained":
        stop: Any = Until(step, self.progress)
        train_epoch(
            self.training, self.progress, log_every=log_every, log=self.rows.append,
            advance=lambda: None, checkpoint_every=None, save=lambda: None, stop=stop,
        )  # fmt: skip
        return self

    def past(self, steps: set[int]) -> "Trained":
        """To the end, as if these steps (from 0) were not there."""
        for step in sorted(steps):
            if step > self.progress.step:
                self.to(step)
            self.progress.step = step + 1
        return self.to(STEPS)

    def unlike(self, other: "Trained") -> list[str]:
        """Names of tensors that differ."""
        return differing(
            state_of(self.training, self.progress), state_of(other.training, other.progress)
        )


def spoil_losses(monkeypatch: pytest.MonkeyPatch, one: Trained, steps: set[int], bad: float,
                 part: int = 0) -> None:  # fmt: skip
    """Multiply the loss of one part of these steps."""
    original: Callable[..., Tensor] = torch.nn.functional.cross_entropy
    calls = [0]

    def spoilt(*args: Any, **kwargs: Any) -> Tensor:
        loss = original(*args, **kwargs)
        turn = calls[0] % one.training.recipe.gradient_accumulation_steps
        calls[0] += 1
        return loss * bad if one.progress.step in steps and turn == part else loss

    monkeypatch.setattr(loop.F, "cross_entropy", spoilt)


def spoil_gradients(
    monkeypatch: pytest.MonkeyPatch, one: Trained, steps: set[int], bad: float
) -> None:
    """Write to a single number of the last gradient of these steps."""
    runtime = one.training.runtime
    clip = runtime.clip

    def spoilt(*args: Any) -> None:
        clip(*args)
        if one.progress.step in steps:
            runtime.strategy.gradients()[-1].view(-1)[-1] = bad

    monkeypatch.setattr(runtime, "clip", spoilt)


CASES = {
    "sgd": {},
    "sgd without momentum": {"momentum": 0.0, "nesterov": False},
    "adamw": {"optimizer": "adamw", "lr": 1e-3},
    "muon": {"optimizer": "muon", "lr": 1e-3},
    "accumulation": {"gradient_accumulation_steps": 2},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_skipped_step_leaves_everything_as_it_was(
    what: str, case: str, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One NaN or infinity would corrupt weights, optimizer state, BatchNorm or the averages."""
    recipe = RECIPE.model_copy(update=CASES[case])
    steps = {0, 3, 4}  # the first step makes the optimizer's state
    expected = Trained(recipe, data).past(steps)
    one = Trained(recipe, data)
    if what == "loss":
        spoil_losses(monkeypatch, one, steps, INF, recipe.gradient_accumulation_steps - 1)
    else:
        spoil_gradients(monkeypatch, one, steps, NAN)
    one.to(STEPS)
    assert one.unlike(expected) == []
    assert one.rows[-1]["loss"] == expected.rows[-1]["loss"]
    assert one.progress.skipped_steps == 3 and one.progress.skipped_in_a_row == 0
    assert [row["step"] for row in one.rows] == [2, 3, 6, 7], "nothing to tell of the others"
    assert [row["skipped_steps"] for row in one.rows] == [1, 1, 3, 3]


def test_an_infinite_loss_whose_gradient_is_finite_is_skipped_too(
    data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step with an infinite loss would still update the weights if its gradient is finite."""
    expected = Trained(RECIPE, data).past({2})
    one = Trained(RECIPE, data)
    original = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        loop.F, "cross_entropy",
        lambda *args, **kwargs: original(*args, **kwargs) + (INF if one.progress.step == 2 else 0),
    )  # fmt: skip
    one.to(STEPS)
    assert one.progress.skipped_steps == 1 and one.unlike(expected) == []


@pytest.mark.slow
def test_an_overflow_of_fp16_is_not_counted_but_a_bad_loss_is(
    data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fp16, normal overflows of the loss scale would be taken for divergence."""
    one = Trained(RECIPE.model_copy(update={"precision": "fp16"}), data)
    runtime = one.training.runtime
    backward = runtime.backward
    monkeypatch.setattr(
        runtime, "backward", lambda loss: backward(loss * (1e38 if one.progress.step < 4 else 1))
    )
    spoil_losses(monkeypatch, one, {5}, NAN)
    one.to(5)
    assert one.progress.skipped_steps == 0
    before = state_of(one.training, one.progress)
    one.to(6)
    assert one.progress.skipped_steps == 1
    assert differing(before, state_of(one.training, one.progress)) == []


@pytest.mark.parametrize("log_every", [1, 4, 100])
def test_three_in_a_row_are_too_many(
    log_every: int, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A diverged run would waste hours on NaN losses instead of stopping with a remedy."""
    monkeypatch.setattr(loop, "LOOK_SECONDS", 1e9)
    one = Trained(RECIPE.model_copy(update={"max_steps": 9}), data)
    spoil_losses(monkeypatch, one, {1, 2, 4, 5, 6}, NAN)
    with pytest.raises(Diverged, match=r"by step \d, lr 0.0\d+: lower --lr"):
        one.to(9, log_every)
    assert one.progress.step == min(9, -(-7 // log_every) * log_every)
    assert one.progress.skipped_steps == 5


def test_they_are_counted_over_the_end_of_an_epoch(
    data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that diverges at an epoch's end would go on, since the count would start anew."""
    one = Trained(RECIPE, data)
    assert one.training.steps_per_epoch == 10
    spoil_losses(monkeypatch, one, {8, 9, 10}, NAN)
    one.to(10)
    one.progress.epoch_sums = [0.0] * 3
    assert one.progress.skipped_in_a_row == 2
    with pytest.raises(Diverged):
        one.to(11)


def test_skips_are_counted_one_by_one() -> None:
    """Runs on several processes would stop too early: one skipped step would count twice."""
    progress = Progress(skipped_steps=4, skipped_in_a_row=2)
    assert not progress.count_skips([0, 2, 2])  # a sum over two processes
    assert (progress.skipped_steps, progress.skipped_in_a_row) == (6, 2)
    assert progress.count_skips([1, 0])
    assert (progress.skipped_steps, progress.skipped_in_a_row) == (7, 0)
    back = progress.rolled_back(progress, Recipe(rollback_lr_factor=0.1))
    back = back.rolled_back(progress, Recipe())
    assert (back.rollbacks, back.lr_factor, back.skipped_steps) == (2, 0.05, 7)


@pytest.mark.parametrize("fused", [True, False])
def test_sgd_keeps_momentum_and_weights_where_it_is_told_to(fused: bool) -> None:
    """A step without a finite gradient would leave NaN in SGD's weights and momentum for good."""
    p, like = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    ours = OPTIMIZERS["sgd"](torch.nn.ParameterList([p]), Recipe(weight_decay=0.1))  # type: ignore
    theirs = torch.optim.SGD([like], lr=0.1, momentum=0.9, nesterov=True)
    for group in ours.param_groups:
        group["fused"] = fused
    for step, bad in enumerate([1.0, 0.0, 1.0, 0.0]):
        ours.found_inf = torch.tensor(bad)  # type: ignore[attr-defined]
        p.grad = torch.full((3,), NAN if bad else float(step))
        ours.step()
        if not bad:
            like.grad = torch.full((3,), float(step))
            theirs.step()
    assert torch.equal(p, like)


def test_tensors_that_share_memory_stay_the_same_objects() -> None:
    """BatchNorm would keep the statistics of a skipped step, or lose those of a good one."""
    network = torch.nn.BatchNorm2d(3)
    tensors = list(network.buffers())
    rows = joined(network.buffers())
    assert sorted(row.dtype.is_floating_point for row in rows) == [False, True]
    kept = Kept(rows)
    network(torch.randn(4, 3, 2, 2))
    assert all(a is b for a, b in zip(tensors, network.buffers(), strict=True))
    assert int(network.num_batches_tracked) == 1  # type: ignore[arg-type]
    kept.put_back_if(torch.tensor(False))
    assert float(network.running_mean.abs().sum()) > 0  # type: ignore[union-attr]
    kept.put_back_if(torch.tensor(True))
    assert torch.equal(network.running_mean, torch.zeros(3))  # type: ignore[arg-type]
    assert torch.equal(network.running_var, torch.ones(3))  # type: ignore[arg-type]
    assert int(network.num_batches_tracked) == 0  # type: ignore[arg-type]


def test_without_a_finite_gradient_at_any_loss_scale_a_training_ends(
    data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An fp16 run without any finite gradient would run to its end and learn nothing."""
    one = Trained(RECIPE.model_copy(update={"precision": "fp16"}), data)
    runtime = one.training.runtime
    runtime.load_scaler_state(runtime.scaler_state() | {"scale": 4.0})
    backward = runtime.backward
    monkeypatch.setattr(runtime, "backward", lambda loss: backward(loss * INF))
    one.to(2)
    with pytest.raises(Diverged, match="no finite gradient at any loss scale down to 1, by step 3"):
        one.to(STEPS)
    assert one.progress.skipped_steps == 0


EXPLODES = ["--model", "gap", "--dataset", "synthetic", "--batch-size", "16", "--momentum", "0",
            "--no-nesterov", "--schedule", "constant", "--warmup", "0", "--lr", "1e30",
            "--log-every", "1"]  # fmt: skip
ROLLS_BACK = ["--nonfinite", "rollback", "--rollback-lr-factor", "1e-32"]  # to a rate of 0.01


@pytest.mark.slow
def test_a_test_loss_that_is_not_finite_is_no_result(tmp_path: Path) -> None:
    """A diverged run would write a result.json, and its NaN loss would count as a result."""
    runs = Runs(tmp_path, tmp_path)
    said = runs.run("r", *EXPLODES, "--max-steps", "1", expect=2)
    assert "error: the test loss is not finite after step 1: lower --lr" in said
    assert not (tmp_path / "r/result.json").exists()
    assert [row["event"] for row in runs.rows("r")] == ["train"]
    said = runs.run("back", *EXPLODES, "--max-steps", "1", *ROLLS_BACK)
    assert "rolled back to step 0" in said
    assert [row["event"] for row in runs.rows("back")] == ["train", "epoch"]
    assert math.isfinite(runs.result("back")["test_loss"])


@pytest.mark.slow
def test_a_rollback_passes_over_a_checkpoint_with_spoilt_weights(tmp_path: Path) -> None:
    """A rollback would return to diverged weights until its three tries are used up."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs = Runs(tmp_path, tmp_path)
    said = runs.run(
        "r", *EXPLODES, "--max-steps", "6", "--checkpoint-every", "1", *ROLLS_BACK,
        "--track", "tensorboard",
    )  # fmt: skip
    assert "no step from checkpoint step-00000001 went well: kept as diverged-step-00000001" in said
    assert said.count("rolled back") == 1 and "rolled back to step 0, learning rate times" in said
    assert (tmp_path / "r/checkpoints/diverged-step-00000001").is_dir()
    steps = list(range(1, 7))
    rows = [row for row in runs.rows("r") if row["event"] == "train"]
    assert [row["step"] for row in rows] == steps
    assert [row["lr"] for row in rows] == pytest.approx([0.01] * 6)
    events = EventAccumulator(str(tmp_path / "r/tensorboard/distcv"))
    events.Reload()
    seen = events.Scalars("train/lr")
    assert [event.step for event in seen] == steps
    assert [event.value for event in seen] == pytest.approx([0.01] * 6)
    assert events.Tags()["images"] == ["samples"]


@pytest.mark.slow
def test_a_stop_after_a_rollback_behind_the_start_is_saved(tmp_path: Path) -> None:
    """A run stopped after a rollback to before its start would lose the steps since."""
    runs, flags = Runs(tmp_path, tmp_path), [*EXPLODES, "--max-steps", "6", *ROLLS_BACK]
    for call in (1, 4):  # steps 2, 3 and 4 have no finite loss, then it is the first one's turn
        command = stopped_in("lr_at", tmp_path / "r/STOP", call)
        assert "stopped after step 1;" in runs.run("r", *flags, command=command, expect=75)
    assert checkpoint.steps(tmp_path / "r/checkpoints") == [0, 1]
    assert runs.rows("r")[-1]["lr"] == pytest.approx(0.01)
    assert "resuming after step 1" in runs.run("r", *flags)


@pytest.mark.slow
def test_a_rollback_on_a_full_disk_stops_the_run_unsaved(tmp_path: Path) -> None:
    """On a full disk, a rollback would end in a traceback or in a run that can't be resumed."""
    code = (
        "import errno, os, distcv.run_folder as run_folder, distcv.train as train\n"
        "cut = run_folder.RunFolder.cut_metrics\n"
        "def full(self, step, **more):\n"
        "    if self.whole_rows:\n"
        "        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.metrics))\n"
        "    cut(self, step, **more)\n"
        "run_folder.RunFolder.cut_metrics = full\n"
        "train.command()"
    )
    runs, flags = Runs(tmp_path, tmp_path), [*EXPLODES, "--max-steps", "1", *ROLLS_BACK]
    said = runs.run("r", *flags, command=[sys.executable, "-c", code], expect=74)
    assert "not rolled back (" in said and "No space left on device: make room" in said
    assert "stopped unsaved; to go on: the same command with --name r" in said
    runs.run("r", *flags)
    assert math.isfinite(runs.result("r")["test_loss"])


def saved(folder: Path, progress: Progress, growth: int | None = None) -> Path:
    scaler = {} if growth is None else {"scale": 4.0, "_growth_tracker": growth}
    state = {"progress": dataclasses.asdict(progress), "scaler": scaler}
    return checkpoint.save(folder, progress.step, Checkpoint({}, state))


def test_the_place_to_go_back_to_is_one_from_which_a_step_went_well(tmp_path: Path) -> None:
    """A rollback would pick a checkpoint that diverges again, or rename the only usable one."""
    said = list[str]()
    for step in (0, 4, 8):
        saved(tmp_path, Progress(step=step))
    progress = Progress(step=11, skipped_steps=3)
    assert place_before(tmp_path, progress, said.append) == tmp_path / "step-00000004"
    assert said == ["no step from checkpoint step-00000008 went well: kept as "
                    "diverged-step-00000008"]  # fmt: skip
    progress.step = 12
    saved(tmp_path, Progress(step=8))
    assert place_before(tmp_path, progress, said.append) == tmp_path / "step-00000008"
    # The only whole one is not renamed.
    progress.step = 11
    for step in (0, 4):
        (tmp_path / f"step-{step:08d}/state.json").write_text("{}")
    assert place_before(tmp_path, progress, said.append) == tmp_path / "step-00000008"


def test_of_fp16_none_amid_overflows_is_gone_back_to(tmp_path: Path) -> None:
    """With fp16, a rollback would pick a checkpoint saved amid overflows and diverge again."""
    for step, growth in ((0, 0), (4, 4), (6, 0), (8, 0)):
        saved(tmp_path, Progress(step=step), growth)
    assert place_before(tmp_path, Progress(step=11), print) == tmp_path / "step-00000004"


def test_a_rollback_factor_above_one_is_refused() -> None:
    """A typo in --rollback-lr-factor would raise the learning rate after each divergence."""
    with pytest.raises((InputError, ValueError), match="rollback_lr_factor"):
        Recipe(rollback_lr_factor=1.5)
