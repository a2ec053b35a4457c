"""The training loop that tutorials show, run as people run it: in a process of its own, without
any setting that distcv makes for its own processes.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from distcv.bench.clock import timed
from distcv.bench.surroundings import environment
from distcv.config import InputError, Recipe
from distcv.data import ImageData, load_dataset
from distcv.environment import available_cores
from distcv.models import build_model

Measured = tuple[int, float]  # images and seconds


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


class TutorialLoop:
    """Worker processes, transforms of single pictures, fp32, a number read in every step."""

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
        self.running_loss = 0.0

    def epochs(self) -> Iterator[list[Tensor]]:
        """Batches without end; an epoch's last, smaller one is left out."""
        while True:
            yield from DataLoader(
                self.pictures,
                batch_size=self.batch_size,
                shuffle=True,
                num_workers=self.workers,
                drop_last=True,
            )

    def run(self, seconds: float) -> Measured:
        """Train for about so long; images and seconds. The workers have ended then."""
        self.model.train()
        batches = self.epochs()

        def step() -> None:
            images, labels = next(batches)
            self.optimizer.zero_grad()
            loss = self.loss(self.model(images.to(self.device)), labels.to(self.device))
            loss.backward()
            self.optimizer.step()
            self.running_loss += loss.item()

        step()  # the start of the workers isn't counted
        return timed(step, seconds, self.batch_size)


class ConventionalLoop:
    """That loop in a process of its own, which idles between the measurements.

    To be closed. It ends with this process too: when nobody can ask it any more.

    Raises:
        InputError: the process failed or was killed.
    """

    name = "conventional"

    def __init__(
        self,
        recipe: Recipe,
        data_dir: Path,
        shape: tuple[int, ...],
        device: torch.device,
        users_environment: dict[str, str],
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        # Not a daemon: those may have no worker processes.
        self.process = context.Process(target=serve, args=(theirs, recipe, data_dir, shape, device))
        with environment(users_environment):
            self.process.start()
        theirs.close()
        self._ask(0.0)  # wait until it is ready

    def run(self, seconds: float) -> Measured:
        """Train for about so long; images and seconds."""
        return self._ask(seconds)

    def _ask(self, seconds: float) -> Measured:
        try:
            self.connection.send(seconds)
            answer: Measured | str = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            answer = f"its process ended with exit code {self.process.exitcode}"
        if isinstance(answer, str):
            raise InputError(
                f"the conventional loop failed: {answer}; --only-own measures without it"
            )
        return answer

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.join()


def serve(
    connection: "Connection[Any, Any]",
    recipe: Recipe,
    data_dir: Path,
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    """The process's work: run for as long as asked each time, until nobody can ask any more."""
    # A process that was spawned would spawn the workers too: each would import torch, for 3 s.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    try:
        chosen: Any = shape if recipe.dataset == "synthetic" else None
        loop = TutorialLoop(recipe, load_dataset(recipe.dataset, data_dir, shape=chosen), device)
        while True:
            seconds = connection.recv()
            connection.send(loop.run(seconds) if seconds else (0, 0.0))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        connection.send(f"{type(error).__name__}: {first_line}")
