"""What is measured of the loops: rates side by side, arithmetic, time by part."""

import contextlib
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.autograd.profiler import record_function

from distcv.bench.loops import OwnLoop
from distcv.runtime.device import synchronize

PARTS = ("data", "augmentation", "forward", "backward", "optimizer")


class Loop(Protocol):
    """A loop that runs for a while and says how far it came."""

    name: str

    def run(self, seconds: float) -> tuple[int, float]: ...


def rates(loops: Sequence[Loop], *, repeats: int, seconds: float) -> dict[str, list[float]]:
    """Images/s of each loop in each repeat, the loops taking turns after a warm-up of each.

    Each is warmed up twice: a large network's first steps are slow, and one may last longer than
    the time that was asked for.
    """
    for loop in [*loops, *loops]:
        loop.run(seconds / 2)
    found: dict[str, list[float]] = {loop.name: [] for loop in loops}
    for _ in range(repeats):
        for loop in loops:
            images, elapsed = loop.run(seconds)
            found[loop.name].append(images / elapsed)
    return found


def ratio(over: list[float], under: list[float]) -> float:
    """Median of the ratios of neighbours, which share whatever slowed the machine down."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def parts(own: OwnLoop, seconds: float) -> dict[str, float]:
    """Share of each part in the time of distcv's loop, by torch's profiler; the rest is `other`.

    On a GPU these are the times of its kernels in 20 steps: a profile of seconds takes minutes to
    add up. The profiler itself slows small networks down. Empty where it saw no kernels.
    """
    on_gpu = torch.cuda.is_available() and own.training.runtime.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    profile = torch.profiler.profile(activities=kinds)
    # On a GPU the backward pass has a thread of its own, whose kernels would be nobody's.
    one_thread = torch.autograd.set_multithreading_enabled(False)
    with one_thread, _named_parts(own), profile, record_function("whole"):
        if on_gpu:
            own.run(0, steps=20)
        else:
            own.run(seconds)
        synchronize()
    totals = dict.fromkeys((*PARTS, "whole"), 0.0)
    for event in profile.key_averages():
        if event.key in totals:
            time_ = event.device_time_total if on_gpu else event.cpu_time_total
            totals[event.key] = max(totals[event.key], time_)
    if not totals["whole"]:
        return {}
    shares = {part: totals[part] / totals["whole"] for part in PARTS}
    return shares | {"other": 1 - sum(shares.values())}


class _Named:
    """Stands for an object and gives its calls a name in the profile.

    The network isn't changed: torch.compile would compile it anew.
    """

    def __init__(self, name: str, inner: Any) -> None:
        self.name, self.inner = name, inner

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with record_function(self.name):
            return self.inner(*arguments, **options)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.inner, attribute)


class _NamedBatches:
    """Stands for a loader and gives its fetches a name in the profile."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            with record_function("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


@contextlib.contextmanager
def _named_parts(own: OwnLoop) -> Iterator[None]:
    """Give the parts of a step their names in the profile."""
    training: Any = own.training
    before = {name: getattr(training, name) for name in ("train_loader", "augment", "model")}
    training.train_loader = _NamedBatches(training.train_loader)
    training.augment = _Named("augmentation", training.augment)
    training.model = _Named("forward", training.model)
    training.runtime.backward = _Named("backward", training.runtime.backward)
    training.runtime.step = _Named("optimizer", training.runtime.step)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(training, name, value)
        del training.runtime.backward, training.runtime.step
