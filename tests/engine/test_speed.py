"""Laws of speed that hold on any machine: no step waits for the device, and commands start soon."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from distcv import loop, optim
from distcv.config import Recipe, load_recipe, recipe_names
from distcv.data import ImageData
from distcv.models import MODELS
from distcv.runtime import Runtime
from distcv.training import Progress, Training, build, load_data
from support.runs import ONE_THREAD
from support.trajectory import NeverStop

FIRST, STEPS = 3, 5  # steps 1 and 2 look for a stop request; 4 and 5 are counted, then comes a log
aten = torch.ops.aten

# Operators for which the host has to know what a GPU has computed.
READING = {
    aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten.bincount,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.lift_fresh,
}  # fmt: skip
# The same in Python, where a CPU's tensor goes by no operator.
READING_METHODS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu}


class Operators(TorchDispatchMode):
    """Notes operators that would wait for a GPU. ``lift_fresh`` makes a tensor of Python numbers,
    whose copy to a GPU waits.
    """

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found, self.paused = found, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        by_mask = packet in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if by_mask and packet is not aten.index:
            by_mask = args[2].numel() > 1  # a single value is filled in without a list of places
        if (packet in READING or by_mask) and not self.paused:
            self.found.append(str(packet))
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Notes what reads a tensor's memory, or copies it to the host, past the operators."""

    def __init__(self, operators: Operators) -> None:
        super().__init__()
        self.operators = operators

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING_METHODS or (func is Tensor.to and args[1:2] == ("cpu",)):
            self.operators.found.append(func.__name__)
        # On a CPU alone, one_hot looks whether the labels are in range.
        self.operators.paused = func is F.one_hot
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.operators.paused = False


@contextlib.contextmanager
def noted() -> Iterator[list[str]]:
    """The waits in here, by name.

    A stand-in for a GPU, which doesn't see copies by ``.to(device)``: both sides are the CPU here.
    ``torch.cuda.set_sync_debug_mode`` does.
    """
    operators = Operators([])
    with Methods(operators), operators:
        yield operators.found


def train(training: Training, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """The first steps of an epoch; the steps between ``begin`` and ``end`` are no log points."""
    progress = Progress()
    at = {FIRST: begin, STEPS: end}
    training.recipe = training.recipe.model_copy(update={"max_steps": STEPS})
    losses: list[float] = []
    loop.train_epoch(
        training, progress, log_every=STEPS, log=lambda row: losses.append(row["loss"]),
        advance=lambda: at.get(progress.step, lambda: None)(),
        checkpoint_every=None, save=lambda: None, stop=NeverStop(),
    )  # fmt: skip
    assert len(losses) == 1 and progress.step == STEPS


def waits(training: Training) -> list[str]:
    """What waited in the steps between."""
    seen: list[str] = ["the steps did not come to their end"]
    with noted() as found:
        train(training, found.clear, lambda: seen.__setitem__(slice(None), found))
    return seen


@pytest.fixture(autouse=True)
def every_step_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """No look by time, and an augmentation in each step."""
    monkeypatch.setattr(loop, "LOOK_SECONDS", 1e9)
    monkeypatch.setattr(loop, "AUGMENTED_AT_ONCE", 1)


@cache
def synthetic(model: str) -> ImageData:
    """Images of the shape that a network is made for."""
    return load_data(Recipe(model=model, dataset="synthetic"), Path(), print)


def training_of(recipe: Recipe) -> Training:
    home = "resnet18" if MODELS[recipe.model].dataset == "cifar10" else "gap"
    return build(recipe, synthetic(home), Runtime(recipe))


# All but trivial_augment, which no recipe has: it chooses its kernels by numbers on the host, and
# the lists of samples and the matrices that it then copies to the device make the host wait.
ALL = {
    "flip": "random", "translate": 2, "rotate": 10, "scale": 0.1, "shear": 5, "cutout": 6,
    "ema_decay": 0.9, "clip_norm": 1.0,
}  # fmt: skip
CASES = {name: load_recipe(name) for name in recipe_names()} | {
    name: load_recipe("gap").model_copy(update=changes)
    for name, changes in {
        "all and mixup": ALL | {"mixup": 0.2},
        "all and cutmix, alternating, reflected": ALL
        | {"cutmix": 1.0, "flip": "alternating", "translate_mode": "reflect"},
        "accumulation": ALL | {"mixup": 0.2, "gradient_accumulation_steps": 2},
        "dropout in bf16": {"dropout": 0.1, "precision": "bf16"},
        "fp16": {"precision": "fp16", "clip_norm": 1.0},
        "adamw": {"optimizer": "adamw"},
        "muon": {"optimizer": "muon"},
    }.items()
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_no_step_between_log_points_reads_from_the_device(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps would wait for the GPU, which would then idle, and every training would be slower."""
    monkeypatch.setattr(optim, "_joinable", lambda _: True)  # as on a GPU
    recipe = CASES[case].model_copy(update={"dataset": "synthetic", "batch_size": 4})
    assert waits(training_of(recipe)) == []


@pytest.mark.parametrize("case", CASES)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA itself says it where there is one")
def test_cuda_sees_no_wait_between_log_points(case: str) -> None:
    """A wait that only CUDA itself can see would slow down every training on a GPU."""
    recipe = CASES[case].model_copy(update={"dataset": "synthetic", "batch_size": 64})
    debug = torch.cuda.set_sync_debug_mode
    try:
        train(training_of(recipe), lambda: debug("error"), lambda: debug("default"))
    finally:
        debug("default")


@pytest.fixture(scope="module")
def gap() -> Training:
    return training_of(load_recipe("gap").model_copy(update={"batch_size": 4}))


@pytest.mark.parametrize(
    ("name", "wait"),
    {
        "aten._local_scalar_dense": lambda x: x.sum().item(),
        "aten.equal": lambda x: torch.equal(x, x),
        "aten.nonzero": lambda x: x.nonzero(),
        "aten.index": lambda x: x[x > 0],
        "aten.index_put_": lambda x: x.clone().__setitem__(x > 0, x[x > 0]),
        "aten.masked_select": lambda x: x.masked_select(x > 0),
        "aten.lift_fresh": lambda x: torch.tensor([1.0], device=x.device),
        "tolist": lambda x: x.tolist(),
        "__array__": lambda x: __import__("numpy").asarray(x),
        "cpu": lambda x: x.cpu(),
        "to": lambda x: x.to("cpu"),
    }.items(),
)
def test_a_wait_that_is_put_into_the_loop_is_seen(
    name: str, wait: Callable[[Tensor], object], gap: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check for waits would miss one, and users would get a slower training loop."""
    augment = gap.augment

    def waiting(batch: Any, epoch: int) -> tuple[Tensor, Tensor]:
        inputs, targets = augment(batch, epoch)
        wait(inputs)
        return inputs, targets

    monkeypatch.setattr(gap, "augment", waiting)
    assert waits(gap).count(name) == STEPS - FIRST, "once in each step between the log points"


HEAVY = {"torch", "torchvision", "accelerate", "deepspeed", "wandb", "numpy", "PIL", "matplotlib"}


@pytest.mark.alone
@pytest.mark.parametrize("command", ["train", "bench"])
def test_help_comes_soon_and_loads_nothing_heavy(command: str) -> None:
    """`--help` would take seconds, since torch or another large package would be imported first."""
    code = (
        f"import atexit, sys; from distcv.{command} import command; sys.argv[1:] = ['--help']\n"
        f"atexit.register(lambda: print({HEAVY} & set(sys.modules), file=sys.stderr)); command()"
    )
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds.append(time.perf_counter() - began)
        assert ran.returncode == 0 and f"python -m distcv.{command} " in ran.stdout
        assert ran.stderr == "set()\n"
    assert min(seconds) < 1.6, "0.8 s is what it should take; twice that on a busy machine"


@pytest.mark.slow
@pytest.mark.alone
def test_the_first_step_comes_within_eight_seconds(
    tmp_path: Path, data_dir: Path, mnist: object
) -> None:
    """A user would wait for more than eight seconds before the first step of a small network."""
    out = tmp_path / "figures.json"
    flags = ["--model", "gap", "--only-own", "--seconds", "0.1", "--repeats", "1"]
    folders = ["--json", str(out), "--data-dir", str(data_dir.resolve())]
    subprocess.run(
        [sys.executable, "-m", "distcv.bench", *flags, *folders],
        check=True, capture_output=True, env=os.environ | ONE_THREAD, timeout=60,
    )  # fmt: skip
    assert 0.5 < json.loads(out.read_text())["seconds_to_first_step"] <= 8
