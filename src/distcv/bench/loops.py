"""Three training loops of one network on one machine, to be timed beside each other."""

import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from distcv.config import Recipe
from distcv.data import ImageData
from distcv.environment import available_cores
from distcv.loop import train_epoch
from distcv.models import build_model
from distcv.optim import OPTIMIZERS
from distcv.preempt import StopRequest
from distcv.runtime import Runtime
from distcv.training import Progress, Training, build

LOG_EVERY = 20  # steps, as RunOptions has it


class Until(StopRequest):
    """Asks to stop when a time has come."""

    def __init__(self) -> None:
        self.deadline = 0.0

    @property
    def signalled(self) -> bool:  # type: ignore[override]
        return time.perf_counter() >= self.deadline

    def pending(self) -> bool:
        return self.signalled


class OwnLoop:
    """distcv's own loop, whole: data, augmentation, schedule, metrics read every 20 steps."""

    name = "distcv"

    def __init__(self, recipe: Recipe, data: ImageData, runtime: Runtime) -> None:
        self.training: Training = build(recipe, data, runtime)
        self.progress = Progress()

    def run(self, seconds: float) -> tuple[int, float]:
        """Train for about so long; images and seconds."""
        progress, stop = self.progress, Until()
        images, began = 0, time.perf_counter()
        stop.deadline = began + seconds
        while True:
            if progress.step == self.training.total_steps:
                progress.step = 0
            first = progress.step
            completed = train_epoch(
                self.training, progress, log_every=LOG_EVERY, log=lambda row: None,
                advance=lambda: None, checkpoint_every=None, save=lambda: None, stop=stop,
            )  # fmt: skip
            images += (progress.step - first) * self.training.recipe.batch_size
            progress.epoch_sums = [0.0] * 3
            if not completed:
                return images, time.perf_counter() - began


class BareLoop:
    """Forward, backward and optimizer on one batch that lies ready: the ceiling of any loop.

    Same network, precision, memory format and optimizer. Its learning rate is 0, so that it doesn't
    learn the one batch by heart, which would change the numbers that it computes with.
    """

    name = "bare"

    def __init__(self, recipe: Recipe, own: OwnLoop) -> None:
        training = own.training
        self.runtime, self.recipe = training.runtime, recipe
        share = recipe.batch_size // self.runtime.processes // recipe.gradient_accumulation_steps
        batch = next(iter(training.train_loader))
        inputs, targets = training.augment(batch, 0)
        self.inputs, self.targets = inputs[:share], targets[:share]
        if self.runtime.device.type == "cuda":
            self.inputs = self.inputs.to(memory_format=torch.channels_last)
        self.model = training.model
        self.optimizer = OPTIMIZERS[recipe.optimizer](
            training.network, recipe.model_copy(update={"lr": 0.0})
        )

    def step(self) -> None:
        """One optimizer step."""
        with self.runtime.autocast():
            logits = self.model(self.inputs).float()
        loss: Tensor = F.cross_entropy(
            logits, self.targets, label_smoothing=self.recipe.label_smoothing
        )
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, seconds: float) -> tuple[int, float]:
        self.model.train()
        return _timed(self.step, seconds, len(self.inputs) * self.runtime.processes, self.runtime)


class Pictures(Dataset[tuple[Tensor, int]]):
    """A training set as pictures, each transformed by itself when it is asked for."""

    def __init__(self, data: ImageData, recipe: Recipe) -> None:
        self.images, self.labels = data.train_images, data.train_labels
        shift = recipe.translate / self.images.shape[-1]
        chosen: list[Callable[..., object]] = []
        if self.images.shape[1] == 3:
            chosen += [transforms.RandomCrop(self.images.shape[-1], padding=4)]
            chosen += [transforms.RandomHorizontalFlip()]
        elif shift:
            chosen += [transforms.RandomAffine(0, translate=(shift, shift))]
        chosen += [transforms.ToTensor(), transforms.Normalize(data.info.mean, data.info.std)]
        self.transform = transforms.Compose(chosen)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.images[index].permute(1, 2, 0).squeeze(-1).numpy()
        return self.transform(Image.fromarray(pixels)), int(self.labels[index])


class ConventionalLoop:
    """The loop that tutorials show: worker processes, transforms of single pictures, fp32, a number
    read in every step.
    """

    name = "conventional"

    def __init__(self, recipe: Recipe, data: ImageData, device: torch.device) -> None:
        self.device, self.batch_size = device, recipe.batch_size
        self.pictures = Pictures(data, recipe)
        self.workers = min(4, available_cores())
        shape = data.train_images.shape
        self.model = build_model(
            recipe.model, channels=shape[1], classes=len(data.info.classes), dropout=recipe.dropout
        ).to(device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=recipe.weight_decay
        )
        self.loss = nn.CrossEntropyLoss()
        self.batches: Iterator[list[Tensor]] = iter(())
        self.running_loss = 0.0

    def step(self) -> None:
        """One optimizer step; an epoch's last, smaller batch is left out."""
        images, labels = next(self.batches)
        if len(images) < self.batch_size:
            self._begin_epoch()
            images, labels = next(self.batches)
        self.optimizer.zero_grad()
        loss = self.loss(self.model(images.to(self.device)), labels.to(self.device))
        loss.backward()
        self.optimizer.step()
        self.running_loss += loss.item()

    def _begin_epoch(self) -> None:
        loader = DataLoader(
            self.pictures, batch_size=self.batch_size, shuffle=True, num_workers=self.workers
        )
        self.batches = iter(loader)

    def run(self, seconds: float) -> tuple[int, float]:
        self.model.train()
        self._begin_epoch()
        self.step()  # the start of the workers isn't counted
        measured = _timed(self.step, seconds, self.batch_size, None)
        self.batches = iter(())  # the workers end, and leave the cores to the others
        return measured


def _timed(
    step: Callable[[], None], seconds: float, batch_size: int, runtime: Runtime | None
) -> tuple[int, float]:
    """Repeat a step for about so long; images and seconds, until the device has done them all."""
    steps, began = 0, time.perf_counter()
    several = runtime is not None and runtime.processes > 1
    while True:
        step()
        steps += 1
        over = time.perf_counter() - began >= seconds
        if several and runtime:
            over = steps % LOG_EVERY == 0 and bool(runtime.from_main(over))
        if over:
            synchronize()
            return steps * batch_size, time.perf_counter() - began


def synchronize() -> None:
    """Wait for the device, if there is one beside the CPU."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
