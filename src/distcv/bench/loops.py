"""distcv's own loop and a bare one of the same network, to be timed beside each other."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from distcv.bench.clock import LOG_EVERY, timed
from distcv.config import Recipe
from distcv.data import ImageData
from distcv.loop import train_epoch
from distcv.preempt import StopRequest
from distcv.runtime import Runtime
from distcv.training import Progress, Training, build


class Until(StopRequest):
    """Asks to stop when a time has come and so many steps were done."""

    def __init__(self, deadline: float, steps: int) -> None:
        self.deadline, self.steps = deadline, steps

    def count(self) -> None:
        self.steps -= 1

    @property
    def signalled(self) -> bool:  # type: ignore[override]
        return self.steps <= 0 and time.perf_counter() >= self.deadline

    def pending(self) -> bool:
        return self.signalled


class OwnLoop:
    """distcv's own loop, whole: data, augmentation, schedule, metrics read every 20 steps."""

    name = "distcv"

    def __init__(self, recipe: Recipe, data: ImageData, runtime: Runtime) -> None:
        self.training: Training = build(recipe, data, runtime)
        self.progress = Progress()

    def run(self, seconds: float, *, steps: int = 1) -> tuple[int, float]:
        """Train for about so long, and at least so many steps; images and seconds."""
        progress, images, began = self.progress, 0, time.perf_counter()
        stop = Until(began + seconds, steps)
        while True:
            if progress.step == self.training.total_steps:
                progress.step = 0
            first = progress.step
            completed = train_epoch(
                self.training, progress, log_every=LOG_EVERY, log=lambda row: None,
                advance=stop.count, checkpoint_every=None, save=lambda: None, stop=stop,
            )  # fmt: skip
            images += (progress.step - first) * self.training.recipe.batch_size
            progress.epoch_sums = [0.0] * 3
            if not completed:
                return images, time.perf_counter() - began


class BareLoop:
    """Forward, backward and optimizer on one batch that lies ready: the ceiling of any loop.

    Network, optimizer, precision and inputs are those of distcv's own loop; the learning rate is 0,
    so that it doesn't learn the one batch by heart, which would change the numbers that it computes
    with. Accelerate's wrappers are left out where the step needs none of them.
    """

    name = "bare"

    def __init__(self, own: OwnLoop) -> None:
        self.training = training = own.training
        self.runtime, self.recipe = runtime, recipe = training.runtime, training.recipe
        training.batches.seek(0)
        batches = iter(training.train_loader)
        parts = range(recipe.gradient_accumulation_steps)
        self.parts = [training.augment(next(batches), 0) for _ in parts]
        wrapped = len(parts) > 1 or runtime.strategy.has_engine or recipe.precision == "fp16"
        self.backward = runtime.backward if wrapped else torch.autograd.backward
        self.part: Callable[..., contextlib.AbstractContextManager[Any]] = (
            runtime.accumulate if wrapped else contextlib.nullcontext
        )

    def step(self) -> None:
        """One optimizer step."""
        model, optimizer = self.training.model, self.training.optimizer
        recipe, runtime = self.recipe, self.runtime
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for inputs, targets in self.parts:
            with self.part(model):
                with runtime.autocast():
                    logits = model(inputs).float()
                loss_sum = F.cross_entropy(
                    logits, targets, reduction="sum", label_smoothing=recipe.label_smoothing
                )
                self.backward(runtime.loss_share(loss_sum, recipe.batch_size))
        runtime.step(optimizer)

    def run(self, seconds: float) -> tuple[int, float]:
        """Compute for about so long; images and seconds."""
        self.training.model.train()
        agree = self.runtime.from_main if self.runtime.processes > 1 else None
        return timed(self.step, seconds, self.recipe.batch_size, agree)
