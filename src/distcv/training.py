"""The parts of one training, built as for one device, wrapped, saved and restored."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distcv.arithmetic import flops_per_image, matmul_flops
from distcv.augment import Augmenter
from distcv.checkpoint import Checkpoint
from distcv.config import InputError, Recipe, validated
from distcv.data import DATASETS, ImageData, Report, Shape, load_dataset
from distcv.data.loading import (
    Batch,
    EvaluationBatches,
    ResidentImages,
    TrainingBatches,
    make_loader,
)
from distcv.models import MODELS, build_model
from distcv.optim import OPTIMIZERS, MovingAverage
from distcv.runtime import Runtime
from distcv.runtime.device import computes_in

EVALUATION_BATCH = 1000
SKIPS = 3  # so many skipped steps in a row are too many


@dataclass
class Progress:
    """How far the training is: all that a resumed run needs beside its tensors."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # in training and evaluation, over all starts of the run
    train_seconds: float = 0.0  # in training alone
    epoch_sums: list[float] = field(default_factory=lambda: [0.0] * 3)  # loss, correct, samples;
    # 0 as soon as the epoch is evaluated
    window_sums: list[float] = field(default_factory=lambda: [0.0] * 3)  # since the last log point
    best_accuracy: float | None = None  # on the test set, in percent
    best_step: int | None = None
    skipped_steps: int = 0  # had no finite loss and gradient, so that they changed nothing
    skipped_in_a_row: int = 0  # of them, the last ones
    rollbacks: int = 0
    lr_factor: float = 1.0  # of the learning rate, for want of finite gradients at the whole of it

    def count_skips(self, skips: list[float]) -> bool:
        """Count the steps that were skipped, told by a number above 0; whether they are too many.

        That is so if three came in a row, the ones before included.
        """
        too_many = False
        for skip in skips:
            self.skipped_steps += skip > 0
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skip > 0 else 0
            too_many = too_many or self.skipped_in_a_row >= SKIPS
        return too_many

    def rolled_back(self, before: "Progress", recipe: Recipe) -> "Progress":
        """That of a training which goes on from ``before`` with a lower learning rate."""
        return dataclasses.replace(
            before,
            skipped_in_a_row=0,
            rollbacks=self.rollbacks + 1,
            lr_factor=self.lr_factor * recipe.rollback_lr_factor,
        )


@dataclass
class Training:
    """The parts of one training: prepared for the strategy, and the plain network beneath."""

    recipe: Recipe
    runtime: Runtime
    network: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: MovingAverage | None
    augment: Augmenter
    batches: TrainingBatches
    train_loader: DataLoader[Batch]
    test_loader: DataLoader[Batch]
    test_labels: Tensor  # int64 (M,), on the host
    classes: int
    parameters: int  # of the whole network
    flops_per_image: float  # of a training step
    matmul_flops: float  # operations a second of a process

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.steps_per_epoch

    @property
    def total_steps(self) -> int:
        whole = self.recipe.epochs * self.steps_per_epoch
        return min(whole, self.recipe.max_steps or whole)

    def utilization(self, images_per_second: float) -> float:
        """Model FLOPs utilization: the share of what a large matmul reaches, over all processes."""
        done = images_per_second * self.flops_per_image / self.runtime.processes
        return done / self.matmul_flops

    def describe(self) -> list[str]:
        """What is trained, and what runs where, in words."""
        recipe, runtime = self.recipe, self.runtime
        parts = runtime.processes * recipe.gradient_accumulation_steps
        least, most = recipe.batch_size // parts, -(-recipe.batch_size // parts)
        share = f"{least}" if least == most else f"{least} or {most}"
        if recipe.gradient_accumulation_steps > 1:
            share += f" x {recipe.gradient_accumulation_steps} parts"
        lines = [
            f"{recipe.model} ({self.parameters:,} parameters) on {recipe.dataset}, "
            f"{recipe.precision}, batch {recipe.batch_size} ({share} a process), "
            f"{self.steps_per_epoch} steps an epoch",
            runtime.describe(),
        ]
        has_norm = any(isinstance(m, nn.BatchNorm2d) for m in self.network.modules())
        if has_norm and runtime.processes > 1 and not runtime.sync_bn:
            lines.append(
                f"BatchNorm sees {share} samples at a time, those of one process: with --sync-bn "
                "it sees those of all, and the curve is that of one process"
            )
        if not computes_in(recipe.precision, runtime.device):
            lines.append(
                f"this processor has no instructions for {recipe.precision} and may be slow in it: "
                "--precision fp32 needs none"
            )
        return lines

    def evaluation_due(self, progress: Progress) -> bool:
        """Whether an epoch, or the last part of one, is trained but not evaluated."""
        ended = progress.step % self.steps_per_epoch == 0 or progress.step == self.total_steps
        return ended and progress.epoch_sums[2] > 0

    def place(self, progress: Progress) -> dict[str, float]:
        """How far a training is: optimizer steps, epochs, samples."""
        return {
            "step": progress.step,
            "epoch": progress.step / self.steps_per_epoch,
            "samples": progress.step * self.recipe.batch_size,
        }


def load_data(recipe: Recipe, data_dir: Path, report: Report) -> ImageData:
    """The recipe's data set."""
    return load_dataset(recipe.dataset, data_dir, shape=image_shape(recipe), report=report)


def image_shape(recipe: Recipe) -> Shape | None:
    """Channels, height, width of synthetic images: those that the network is made for."""
    if recipe.dataset != "synthetic":
        return None
    return DATASETS[MODELS[recipe.model].dataset].shape


def build(recipe: Recipe, data: ImageData, runtime: Runtime) -> Training:
    """Network, optimizer, loaders and moving average, built as for one device and then wrapped.

    Raises:
        InputError: the network can't take the data set's images, or the batch can't be dealt out.
    """
    channels, classes = data.train_images.shape[1], len(data.info.classes)
    torch.manual_seed(recipe.seed)
    network = build_model(recipe.model, channels=channels, classes=classes, dropout=recipe.dropout)
    check_shape(network, recipe, tuple(data.train_images.shape[1:]))
    optimizer = OPTIMIZERS[recipe.optimizer](network, recipe)
    parameters = sum(p.numel() for p in network.parameters())

    fits = runtime.has_room_for(data.train_images.nbytes + data.test_images.nbytes)
    train_images, test_images = (
        ResidentImages(images, labels, runtime.device, fits=fits)
        for images, labels in (
            (data.train_images, data.train_labels),
            (data.test_images, data.test_labels),
        )
    )
    batches = TrainingBatches(
        len(train_images),
        recipe.batch_size,
        processes=runtime.processes,
        accumulation=recipe.gradient_accumulation_steps,
        seed=recipe.seed,
    )
    test_batches = EvaluationBatches(
        len(test_images), EVALUATION_BATCH, processes=runtime.processes
    )
    model, wrapped_optimizer, train_loader, test_loader = runtime.prepare(
        network,
        optimizer,
        make_loader(train_images, batches),
        make_loader(test_images, test_batches),
    )
    return Training(
        recipe=recipe,
        runtime=runtime,
        network=network,
        model=model,
        optimizer=wrapped_optimizer,
        ema=MovingAverage(runtime.averageable(), recipe.ema_decay) if recipe.ema_decay else None,
        augment=Augmenter(recipe, train_images, data.info),
        batches=batches,
        train_loader=train_loader,
        test_loader=test_loader,
        test_labels=data.test_labels,
        classes=classes,
        parameters=parameters,
        flops_per_image=flops_per_image(recipe, tuple(data.train_images.shape[1:]), classes),
        matmul_flops=matmul_flops(runtime),
    )


def check_shape(network: nn.Module, recipe: Recipe, shape: tuple[int, ...]) -> None:
    """Raise InputError if the network can't take images of this (C, H, W)."""
    network.eval()
    try:
        with torch.no_grad():
            network(torch.zeros(1, *shape))
    except RuntimeError:
        made_for = DATASETS[MODELS[recipe.model].dataset].shape
        raise InputError(
            f"model {recipe.model} can't take {recipe.dataset}'s {_by(shape)} images: it is made "
            f"for {_by(made_for)}; choose another --dataset or --model"
        ) from None


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def snapshot(
    training: Training, progress: Progress, *, tracker_id: str, versions: dict[str, Any]
) -> Checkpoint:
    """Everything that a resumed run needs; to be called by all processes, held by the main one."""
    runtime = training.runtime
    tensors = {
        "model": runtime.on_host(runtime.weights()),
        "optimizer": runtime.on_host(runtime.strategy.optimizer_tensors()),
    }
    if training.ema:
        tensors["ema"] = runtime.on_host(runtime.whole(training.ema.average))
    for file, own in own_statistics(training).items():
        of_all = {name: runtime.gather(tensor) for name, tensor in own.items()}
        tensors[file] |= runtime.on_host((name, each.mean(0)) for name, each in of_all.items())
        tensors[f"{file}_statistics"] = runtime.on_host(of_all.items())
    state = {
        "progress": dataclasses.asdict(progress),
        **training.place(progress),
        "seed": training.recipe.seed,
        "scaler": runtime.scaler_state(),
        "strategy": runtime.strategy.name,
        "processes": runtime.processes,
        "tracker_id": tracker_id,
        "config_sha256": training.recipe.sha256,
        "versions": versions,
    }
    return Checkpoint(tensors, state)


def read_progress(state: dict[str, Any]) -> Progress:
    """The progress in a checkpoint's state.

    Raises:
        InputError: there is none of this form.
    """
    read = TypeAdapter(Progress).validate_python
    return validated(lambda: read(state.get("progress")), where="state.json of another version: ")


@torch.no_grad()
def restore(training: Training, held: Checkpoint) -> Progress:
    """Put a checkpoint back into a training that was built; the progress it had.

    Raises:
        InputError: it is another network's, or another version's.
    """
    progress, runtime = read_progress(held.state), training.runtime
    try:
        runtime.strategy.load_weights(held.tensors["model"])
        runtime.strategy.load_optimizer_tensors(held.tensors["optimizer"])
        if training.ema:
            for name, piece in runtime.pieces(held.tensors["ema"]).items():
                training.ema.average[name].copy_(piece)
        for file, own in own_statistics(training).items():
            for name, each in held.tensors.get(f"{file}_statistics", {}).items():
                if len(each) == runtime.processes:
                    own[name].copy_(each[runtime.rank])
        runtime.load_scaler_state(held.state["scaler"])
    except (KeyError, ValueError) as error:
        raise InputError(
            f"a checkpoint of another network or version ({error!r}): choose another --name"
        ) from None
    return progress


def own_statistics(training: Training) -> dict[str, dict[str, Tensor]]:
    """BatchNorm's running statistics, as this process has seen them, and their moving average.

    By file of a checkpoint; empty where all processes have the same. Each process has seen another
    share of every batch, and what the network has learned of them is their mean. It never takes
    their place: rounded, it would depend on when a run was saved.
    """
    if training.runtime.processes == 1 or training.runtime.sync_bn:
        return {}
    own = {n: b for n, b in training.network.named_buffers() if b.is_floating_point()}
    if not own:
        return {}
    if training.ema is None:
        return {"model": own}
    return {"model": own, "ema": {name: training.ema.average[name] for name in own}}


@contextlib.contextmanager
def shared_statistics(training: Training) -> Iterator[None]:
    """The network with the mean of all processes' running statistics; to be entered by all."""
    own = [one for part in own_statistics(training).values() for one in part.values()]
    kept = [one.clone() for one in own]
    for one in own:
        one.copy_(training.runtime.gather(one).mean(0))
    yield
    for one, before in zip(own, kept, strict=True):
        one.copy_(before)


@contextlib.contextmanager
def averaged_weights(training: Training) -> Iterator[None]:
    """The network with the moving average in place of its weights, if there is one."""
    if training.ema:
        training.ema.swap()
        training.runtime.strategy.drop_gathered()
    yield
    if training.ema:
        training.ema.swap()
        training.runtime.strategy.drop_gathered()
