"""Run under a launcher: trains some steps and says what happened, step by step.

Arguments: a JSON object, then flags of distcv.train. Its keys: ``out`` (file to write), ``data``
(folder), ``steps`` (to train to); ``save`` ([step, folder]: leave a checkpoint there); ``resume``
(checkpoints: restore each in turn, compare the state with it, and train on).
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distcv import checkpoint
from distcv.command import run_command
from distcv.command_line import read_command_line
from distcv.data import load_dataset
from distcv.data.loading import Batch
from distcv.loop import evaluate, train_epoch
from distcv.models import find_model
from distcv.runtime import Runtime
from distcv.training import Progress, Training, build, restore, snapshot

TESTED = 2503  # images: a prime, which no number of processes divides


class NeverStop:
    signalled = False

    def pending(self) -> bool:
        return False


class Seen:
    """Stands before the loader and notes the samples of each part."""

    def __init__(self, training: Training) -> None:
        self.loader, self.processes = training.train_loader, training.runtime.processes
        self.ids: list[list[int]] = []
        training.train_loader = self  # type: ignore[assignment]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            self.ids.append(batch.host_ids.tolist())
            yield batch

    def parts(self, count: int) -> list[str]:
        """Sums of the first parts' samples, over all processes."""
        shares: list[Any] = [self.ids[:count]]
        if self.processes > 1:
            shares = [None] * self.processes
            dist.all_gather_object(shares, self.ids[:count])
        parts = [[index for share in part for index in share] for part in zip(*shares, strict=True)]
        return [hashlib.sha256(str(part).encode()).hexdigest()[:16] for part in parts]


def train(training: Training, progress: Progress, end: int, saved: Any) -> list[dict[str, Any]]:
    """Losses of the steps up to ``end``; a checkpoint is left where ``saved`` says, if it does."""
    rows: list[dict[str, Any]] = []
    at, folder = saved or (None, None)
    training.recipe = training.recipe.model_copy(update={"max_steps": end})

    def save() -> None:
        held = state_of(training, progress)
        if training.runtime.is_main and progress.step == at:
            checkpoint.save(Path(folder), progress.step, held)

    train_epoch(
        training, progress, log_every=1, log=rows.append,
        advance=lambda: None, checkpoint_every=at, save=save, stop=NeverStop(),
    )  # fmt: skip
    return rows


def state_of(training: Training, progress: Progress) -> checkpoint.Checkpoint:
    return snapshot(training, progress, tracker_id="", versions={})


def differing(one: checkpoint.Checkpoint, other: checkpoint.Checkpoint) -> list[str]:
    """Names of the tensors that are not equal, bit for bit; but for what one process alone has."""
    found = []
    for file in ("model", "optimizer", "ema"):
        a, b = one.tensors.get(file, {}), other.tensors.get(file, {})
        found += [
            f"{file}/{name}"
            for name in a.keys() | b.keys()
            if name not in a or name not in b or not torch.equal(a[name], b[name])
        ]
    return found


def main() -> None:
    order = json.loads(sys.argv[1])
    recipe, options = read_command_line(
        prog="", description="", find_model=find_model, args=sys.argv[2:]
    )
    runtime = Runtime(recipe, compile=options.compile, sync_bn=options.sync_bn)
    data = load_dataset(recipe.dataset, Path(order["data"]))
    tested = {"test_images": data.test_images[:TESTED], "test_labels": data.test_labels[:TESTED]}
    data = dataclasses.replace(data, **tested)
    training = build(recipe, data, runtime)
    seen = Seen(training)
    said: dict[str, Any] = {"processes": runtime.processes, "strategy": runtime.strategy.name}
    for path in order.get("resume", ["start"]):
        progress, differs = Progress(), []
        if path != "start":
            held = checkpoint.load(Path(path))
            progress = restore(training, held)
            again = state_of(training, progress)
            differs = differing(held, again) if runtime.is_main else []
        seen.ids.clear()
        rows = train(training, progress, order["steps"], order.get("save"))
        said[path] = {
            "differing": differs,
            "losses": [row["loss"] for row in rows],
            "norms": [row["grad_norm"] for row in rows],
            "samples": seen.parts(len(rows) * recipe.gradient_accumulation_steps),
        }
    evaluation = evaluate(training)
    assert evaluation is not None
    said[path]["test_loss"] = evaluation.loss
    said[path]["mistakes"] = [mistake["sample"] for mistake in evaluation.mistakes]
    if runtime.is_main:
        Path(order["out"]).write_text(json.dumps(said))
    runtime.close()


if __name__ == "__main__":
    run_command(main)
