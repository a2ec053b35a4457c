"""The loops that are timed beside each other: that each does what it is named for."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from distcv.bench import memory
from distcv.bench.conventional import ConventionalLoop, TutorialLoop, serve
from distcv.bench.loops import BareLoop, OwnLoop
from distcv.bench.surroundings import shown_flags, users_environment
from distcv.config import InputError, load_recipe
from distcv.data import load_dataset

CPU, MNIST = torch.device("cpu"), (1, 28, 28)


def weights(loop: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in loop.parameters()])


def test_the_own_loop_trains_and_says_how_far_it_came(own: OwnLoop) -> None:
    """Users would read an images/s figure from a loop that does not train or counts wrong."""
    before, first = weights(own.training.network), own.progress.step
    images, seconds = own.run(0.3)
    assert images == (own.progress.step - first) * 128 > 0
    assert 0.3 <= seconds < 3
    assert not torch.equal(before, weights(own.training.network))


def test_the_own_loop_does_as_many_steps_as_it_is_told_at_least(own: OwnLoop) -> None:
    """Memory and GPU profiles would come from fewer steps than they need."""
    assert own.run(0)[0] == 128 and own.run(0, steps=3)[0] == 3 * 128


def test_the_own_loop_begins_again_at_the_end_of_its_recipe(own: OwnLoop) -> None:
    """A benchmark longer than its recipe would stop early or count images wrong."""
    own.progress.step = own.training.total_steps - 1
    images, _ = own.run(0, steps=3)
    assert 0 < own.progress.step < own.training.total_steps
    assert images == (own.progress.step + 1) * 128


def test_the_bare_loop_computes_all_and_learns_nothing(own: OwnLoop) -> None:
    """The ceiling for distcv's speed would be wrong: the bare loop would skip work or learn."""
    bare = BareLoop(own)
    before = weights(own.training.network)
    slots = own.training.runtime.strategy.optimizer.state
    momentum = {p: state["momentum_buffer"].clone() for p, state in slots.items()}
    images, seconds = bare.run(0.2)
    assert images % 128 == 0 and images > 0 and 0.2 <= seconds < 3
    assert torch.equal(before, weights(own.training.network))
    assert len(momentum) == len(list(own.training.network.parameters()))
    for p, buffer in momentum.items():
        assert not torch.equal(buffer, slots[p]["momentum_buffer"]), "each weight had a gradient"


def test_the_own_loop_learns_after_the_bare_one_has_run(own: OwnLoop) -> None:
    """After the bare loop, distcv would be timed at a learning rate of 0."""
    BareLoop(own).step()
    before = weights(own.training.network)
    own.run(0)
    assert not torch.equal(before, weights(own.training.network))


def test_a_loop_is_charged_with_a_tensor_that_it_keeps(
    own: OwnLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The benchmark's memory figures would miss tensors that the training loop holds."""
    bare = BareLoop(own)
    plain = memory.memory(own, bare)
    for name, found in plain.items():
        if name in ("distcv", "bare"):
            assert found["stays"] > 2 * 4 * 9490 and found["step"] > 2**20
    assert 0.5 < plain["ratio"] < 3
    assert plain["resident_bytes"] == 70_000 * (28 * 28 + 8)

    augment, kept = own.training.augment, []

    def keeping(*arguments: Any) -> Any:
        if not kept:
            kept.append(torch.ones(10_000_000))
        return augment(*arguments)

    monkeypatch.setattr(own.training, "augment", keeping)
    monkeypatch.setattr(keeping, "data", augment.data, raising=False)
    charged = memory.memory(own, bare)
    assert charged["distcv"]["step"] - plain["distcv"]["step"] == pytest.approx(4e7, rel=0.02)
    assert charged["bare"]["step"] == pytest.approx(plain["bare"]["step"], rel=0.02)


def test_memory_that_is_given_back_in_a_step_can_be_used_again() -> None:
    """Freed tensors would count towards peak memory, and users would plan for too much."""

    def run() -> None:
        for _ in range(3):
            torch.ones(1_000_000).mul_(2)

    assert memory.step_bytes(CPU, run) == pytest.approx(4e6, rel=0.01)


@pytest.mark.slow
def test_the_tutorial_loop_trains_on_normalised_pictures(data_dir: Path, mnist: object) -> None:
    """The speedup would be measured against a loop that trains on wrong data or not at all."""
    data = load_dataset("mnist", data_dir, report=print)
    loop = TutorialLoop(load_recipe("gap"), data, CPU)
    picture, label = loop.pictures[7]
    assert picture.shape == MNIST and label == int(data.train_labels[7])
    assert abs(torch.stack([loop.pictures[i][0] for i in range(200)]).mean()) < 0.1
    before = weights(loop.model)
    images, _ = loop.run(0.2)
    assert images % 128 == 0 and images > 0
    assert not torch.equal(before, weights(loop.model))


@pytest.fixture
def conventional(
    data_dir: Path, mnist: object, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ConventionalLoop]:
    monkeypatch.setenv("KMP_BLOCKTIME", "7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    users = users_environment()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("KMP_BLOCKTIME", "0")
    loop = ConventionalLoop(load_recipe("gap"), data_dir, MNIST, CPU, users)
    yield loop
    loop.close()
    assert not loop.process.is_alive()


@pytest.mark.slow
def test_the_conventional_loop_has_the_users_environment_and_ends_its_workers(
    conventional: ConventionalLoop,
) -> None:
    """The speedup would be false: the conventional loop would run with distcv's own settings."""
    process = psutil.Process(conventional.process.pid)
    environment = process.environ()
    assert "OMP_NUM_THREADS" not in environment and environment["KMP_BLOCKTIME"] == "7"
    assert os.environ["OMP_NUM_THREADS"] == "1" and os.environ["KMP_BLOCKTIME"] == "0"
    images, seconds = conventional.run(0.2)
    assert images % 128 == 0 and images > 0 and 0.2 <= seconds < 3
    psutil.wait_procs(process.children(), timeout=10)
    assert process.children() == [], "between measurements it has no workers"

    process.kill()
    with pytest.raises(InputError, match=r"^the conventional loop failed: .* exit code -9; --only"):
        conventional.run(0.2)


def test_the_conventional_loops_process_ends_when_nobody_can_ask_any_more(
    data_dir: Path, mnist: object
) -> None:
    """A killed benchmark would leave a process behind that holds memory."""
    ours, theirs = multiprocessing.Pipe()
    arguments = (theirs, load_recipe("gap"), data_dir, MNIST, CPU)
    thread = threading.Thread(target=serve, args=arguments, daemon=True)
    thread.start()
    ours.send(0.0)
    assert ours.poll(60) and ours.recv() == (0, 0.0)
    ours.close()
    thread.join(10)
    assert not thread.is_alive()
    theirs.close()


def test_what_fails_in_the_conventional_loops_process_is_said_in_one_line(tmp_path: Path) -> None:
    """Users would learn that the conventional loop ended, but not why."""
    ours, theirs = multiprocessing.Pipe()
    recipe = load_recipe("gap").model_copy(update={"dataset": "synthetic"})
    serve(theirs, recipe, tmp_path, (1, 0), CPU)
    assert ours.recv() == (
        "InputError: shape (1, 0): give channels, height and width, each at least 1"
    )
    ours.close()
    theirs.close()


def test_the_flags_in_the_figures_hold_no_path_of_the_machine() -> None:
    """A published benchmark file would show user names and folders of the machine."""
    words = ["--model", "gap", "--json=/home/someone/out.json", "--data-dir", "/scratch/data", "-x"]
    shown = ["--model", "gap", "--json=out.json", "--data-dir", "data", "-x"]
    assert shown_flags(words) == shown
