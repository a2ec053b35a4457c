"""Memory of tensors that a training loop needs."""

import json
import tempfile
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distcv.bench.loops import BareLoop, OwnLoop
from distcv.runtime.device import synchronize
from distcv.training import Training


def memory(own: OwnLoop, bare: BareLoop | None) -> dict[str, Any]:
    """Bytes of tensors of each loop, on this process: those that stay, and the most in a step.

    What stays is network and optimizer, and the moving average or the batch that lies ready. The
    data set on the device is counted apart.
    """
    training, device = own.training, own.training.runtime.device
    own_state = [*_state(training), *(training.ema.average.values() if training.ema else ())]
    # Of two steps, since what the first one leaves is there in the second one.
    own_step = step_bytes(device, lambda: own.run(0, steps=2))
    figures: dict[str, Any] = {"distcv": {"stays": size(own_state), "step": own_step}}
    if bare is not None:

        def steps() -> None:
            bare.step()
            bare.step()

        ready = [tensor for part in bare.parts for tensor in part]
        figures["bare"] = {
            "stays": size([*_state(training), *ready]),
            "step": step_bytes(device, steps),
        }
        over, under = (sum(figures[name].values()) for name in ("distcv", "bare"))
        figures["ratio"] = over / under
    figures["resident_bytes"] = resident_bytes(training)
    return figures


def resident_bytes(training: Training) -> int:
    """Bytes of the training and test set as far as they lie on the device."""
    sets: list[Any] = [training.augment.data, training.test_loader.dataset]
    kind = training.runtime.device.type
    return size(t for held in sets for t in (held.images, held.labels) if t.device.type == kind)


def _state(training: Training) -> list[Tensor]:
    """Tensors of this process that stay from step to step: weights, statistics, optimizer state."""
    strategy = training.runtime.strategy
    groups, slots = strategy.optimizer.param_groups, strategy.optimizer.state.values()
    return [
        *strategy.pieces().values(),
        *training.network.buffers(),
        *(p for group in groups for p in group["params"]),
        *(value for slot in slots for value in slot.values() if isinstance(value, Tensor)),
    ]


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of what these tensors lie in, each counted once."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    storages = (tensor.untyped_storage() for tensor in local)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def step_bytes(device: torch.device, run: Callable[[], object]) -> int:
    """The most bytes of tensors that are alive at a time while something runs, beyond those before.

    On a GPU they are counted by torch's allocator, on a CPU from the allocations in its profile.
    """
    if device.type == "cuda":
        synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    taken = sorted((e for e in events if e["name"] == "[memory]"), key=lambda event: event["ts"])
    return max(accumulate(event["args"]["Bytes"] for event in taken), default=0)
