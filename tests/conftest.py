"""Fixtures that more than one test file uses: the real data, and servers on the loopback.

What loads torch is imported where it is needed: a file that needs no torch starts without.
"""

import contextlib
import gzip
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.loopback import DEAD, Serve, loopback

if TYPE_CHECKING:
    from distcv.bench.loops import OwnLoop
    from distcv.data.readers import Arrays
    from support.runs import Runs
    from support.slurm_cluster import Cluster
    from support.wandb_server import WandbServer


pytest_plugins = ["support.parallel"]


@pytest.fixture(autouse=True)
def no_process_of_wandb_is_left() -> Iterator[None]:
    """A test that uses W&B's client ends its process, which others would look for."""
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()
    os.environ.pop("WANDB_SERVICE", None)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the real data sets, which are fetched into it when a test first asks for them.

    It is `data/` beside `tests/`, unless DISTCV_TEST_DATA names another.
    """
    default = Path(__file__).resolve().parents[1] / "data"
    return Path(os.environ.get("DISTCV_TEST_DATA", default))


def load(name: str, data_dir: Path) -> "Arrays":
    """A real data set, fetched if it must be from wherever it can be had."""
    from distcv.data import DATASETS
    from distcv.data.cache import load_arrays

    return load_arrays(DATASETS[name], data_dir, print)


@pytest.fixture(scope="session")
def mnist(data_dir: Path) -> "Arrays":
    return load("mnist", data_dir)


@pytest.fixture(scope="session")
def cifar10(data_dir: Path) -> "Arrays":
    return load("cifar10", data_dir)


@pytest.fixture(scope="module")
def own(data_dir: Path, mnist: "Arrays") -> "OwnLoop":
    """distcv's own loop, of `gap`."""
    from distcv.bench.loops import OwnLoop
    from distcv.config import load_recipe
    from distcv.data import load_dataset
    from distcv.runtime import Runtime

    recipe = load_recipe("gap")
    return OwnLoop(recipe, load_dataset("mnist", data_dir, report=print), Runtime(recipe))


@pytest.fixture(scope="session")
def mnist_idx(mnist: "Arrays") -> dict[str, bytes]:
    """The four original files of MNIST, not zipped, by their names."""
    from distcv.data import DATASETS
    from distcv.data.readers import idx_header

    names = [name.removesuffix(".gz") for name, _ in DATASETS["mnist"].files]
    return {
        name: idx_header(tuple(n for n in array.shape if n > 1)) + array.tobytes()
        for name, array in zip(names, mnist, strict=True)
    }


@pytest.fixture(scope="session")
def mnist_gz(mnist_idx: dict[str, bytes]) -> dict[str, bytes]:
    """The four original files of MNIST, zipped anew."""
    return {f"{name}.gz": gzip.compress(data, 1) for name, data in mnist_idx.items()}


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A function that starts a `Loopback` server with these files; it ends with the test."""
    with contextlib.ExitStack() as at_the_end:
        yield lambda files: at_the_end.enter_context(loopback(files))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No npm, no mirror, and home sites that refuse the connection."""
    from torchvision import datasets

    empty = tmp_path / "empty-path"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.delenv("DISTCV_MIRROR", raising=False)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [DEAD])
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [DEAD])
    monkeypatch.setattr(datasets.CIFAR10, "url", DEAD + datasets.CIFAR10.filename)
    monkeypatch.setattr(datasets.CIFAR100, "url", DEAD + datasets.CIFAR100.filename)


@pytest.fixture
def server() -> Iterator["WandbServer"]:
    """A W&B server."""
    from support.wandb_runs import wandb_server

    with wandb_server() as server:
        yield server


@pytest.fixture
def runs(
    tmp_path: Path,
    data_dir: Path,
    mnist: "Arrays",
    server: "WandbServer",
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator["Runs"]:
    """Trainings that W&B follows there."""
    from support.wandb_runs import wandb_runs

    with wandb_runs(tmp_path, data_dir, server, monkeypatch) as runs:
        yield runs


@pytest.fixture(scope="session")
def started_cluster() -> Iterator["Cluster"]:
    """A Slurm cluster of two nodes for all tests of this worker; skips where there can be none."""
    from support.slurm_cluster import Cluster, missing

    if reason := missing():
        pytest.skip(reason)
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(started_cluster: "Cluster") -> Iterator["Cluster"]:
    """That cluster with idle nodes and no jobs, which it has again at the end."""
    yield started_cluster
    started_cluster.cancel_all()
