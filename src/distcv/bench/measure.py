"""What is measured of the loops: rates side by side, arithmetic, time by part, memory."""

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.autograd.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode

from distcv.bench.loops import BareLoop, OwnLoop, synchronize
from distcv.runtime import Runtime

PARTS = ("data", "augmentation", "forward", "backward", "optimizer")


class Loop(Protocol):
    """A loop that runs for a while and says how far it came."""

    name: str

    def run(self, seconds: float) -> tuple[int, float]: ...


def rates(loops: list[Loop], *, repeats: int, seconds: float) -> dict[str, list[float]]:
    """Images/s of each loop in each repeat, the loops taking turns after a warm-up of each."""
    for loop in loops:
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


def flops_per_image(bare: BareLoop) -> float:
    """Floating-point operations of a training step for one image: two for each multiply-add of
    convolutions and linear layers, forward and backward.
    """
    with FlopCounterMode(display=False) as counter:
        bare.step()
    return float(counter.get_total_flops()) / len(bare.inputs)


def matmul_flops(runtime: Runtime, repeats: int = 9) -> float:
    """Operations a second of a large square matmul in the run's precision, median."""
    size = 1024 if runtime.device.type == "cpu" else 8192
    dtype = runtime.precision or torch.float32
    a, b = (torch.randn(size, size, device=runtime.device, dtype=dtype) for _ in range(2))
    taken = []
    for _ in range(repeats + 2):
        synchronize()
        began = time.perf_counter()
        torch.mm(a, b)
        synchronize()
        taken.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(taken[2:])


def parts(own: OwnLoop, seconds: float) -> dict[str, float]:
    """Share of each part in the time of distcv's loop, by torch's profiler; the rest is `other`.

    On a GPU these are the times of its kernels. The profiler itself slows small networks down.
    """
    on_gpu = torch.cuda.is_available() and own.training.runtime.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    profile = torch.profiler.profile(activities=kinds)
    with _named_parts(own), profile, record_function("whole"):
        own.run(seconds)
        synchronize()
    totals = dict.fromkeys((*PARTS, "whole"), 0.0)
    for event in profile.key_averages():
        if event.key in totals:
            time_ = event.device_time_total if on_gpu else event.cpu_time_total
            totals[event.key] = max(totals[event.key], time_)
    shares = {part: totals[part] / totals["whole"] for part in PARTS}
    return shares | {"other": 1 - sum(shares.values())}


@contextlib.contextmanager
def _named_parts(own: OwnLoop) -> Iterator[None]:
    """Give the parts of a step their names in the profile."""
    training = own.training

    def named(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*arguments: Any, **options: Any) -> Any:
            with record_function(name):
                return call(*arguments, **options)

        return inside

    class Batches:
        def __iter__(self) -> Iterator[Any]:
            batches = iter(before["train_loader"])
            while True:
                with record_function("data"):
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

    names = ("train_loader", "augment", "model", "optimizer")
    before = {name: getattr(training, name) for name in names}
    forward, backward, step = (
        training.model.forward,
        training.runtime.backward,
        training.optimizer.step,
    )
    training.train_loader = Batches()  # type: ignore[assignment]
    training.augment = named("augmentation", training.augment)  # type: ignore[assignment]
    training.model.forward = named("forward", forward)
    training.runtime.backward = named("backward", backward)  # type: ignore[method-assign]
    training.optimizer.step = named("optimizer", step)  # type: ignore[method-assign]
    try:
        yield
    finally:
        training.train_loader, training.augment = before["train_loader"], before["augment"]
        del training.model.forward, training.runtime.backward, training.optimizer.step


def peak_bytes(runtime: Runtime, run: Callable[[], object]) -> int:
    """The most memory in use while something runs: on the GPU, or of this process so far."""
    if runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(runtime.device)
        run()
        synchronize()
        return torch.cuda.max_memory_allocated(runtime.device)
    run()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
