"""Fixtures that more than one test file uses: the real data, and servers on the loopback."""

import contextlib
import gzip
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import slurm_cluster
from runs import Runs
from wandb_runs import wandb_runs, wandb_server
from wandb_server import WandbServer

from distcv.config import load_recipe
from distcv.data import DATASETS, load_dataset
from distcv.data.cache import load_arrays
from distcv.data.readers import Arrays, idx_header

if TYPE_CHECKING:
    from distcv.bench.loops import OwnLoop

DEAD = "http://127.0.0.1:9/"  # the discard port, where nobody listens


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


@pytest.fixture(scope="session")
def mnist(data_dir: Path) -> Arrays:
    """The real MNIST, fetched if it must be from wherever it can be had."""
    return load_arrays(DATASETS["mnist"], data_dir, print)


@pytest.fixture(scope="session")
def cifar10(data_dir: Path) -> Arrays:
    """The real CIFAR-10, likewise."""
    return load_arrays(DATASETS["cifar10"], data_dir, print)


@pytest.fixture(scope="module")
def own(data_dir: Path, mnist: Arrays) -> "OwnLoop":
    """distcv's own loop, of `gap`."""
    from distcv.bench.loops import OwnLoop
    from distcv.runtime import Runtime

    recipe = load_recipe("gap")
    return OwnLoop(recipe, load_dataset("mnist", data_dir, report=print), Runtime(recipe))


@pytest.fixture(scope="session")
def mnist_idx(mnist: Arrays) -> dict[str, bytes]:
    """The four original files of MNIST, not zipped, by their names."""
    names = [name.removesuffix(".gz") for name, _ in DATASETS["mnist"].files]
    return {
        name: idx_header(tuple(n for n in array.shape if n > 1)) + array.tobytes()
        for name, array in zip(names, mnist, strict=True)
    }


@pytest.fixture(scope="session")
def mnist_gz(mnist_idx: dict[str, bytes]) -> dict[str, bytes]:
    """The four original files of MNIST, zipped anew."""
    return {f"{name}.gz": gzip.compress(data, 1) for name, data in mnist_idx.items()}


class Loopback(ThreadingHTTPServer):
    """Serves bytes by their paths on 127.0.0.1, counts requests, and can stall on purpose.

    With `stall_after` set, each answer stops after so many bytes of its body (and at 0 before its
    first header) until `go_on` is set. With `pause` set, it comes in eight parts, so many seconds
    apart.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = files
        self.requests: Counter[str] = Counter()
        self.stall_after: int | None = None
        self.pause = 0.0
        self.stalled, self.go_on = threading.Event(), threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that hang up, or are killed, are part of the tests


class _Answer(BaseHTTPRequestHandler):
    server: Loopback

    def do_GET(self) -> None:
        server = self.server
        server.requests[self.path] += 1
        body = server.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        if server.stall_after == 0:
            self._stall()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.stall_after is not None:
            self.wfile.write(body[: server.stall_after])
            self._stall()
            body = body[server.stall_after :]
        size = -(-len(body) // 8) if server.pause else len(body)
        for start in range(0, len(body), size or 1):
            time.sleep(server.pause)
            self.wfile.write(body[start : start + size])

    def _stall(self) -> None:
        self.server.stalled.set()
        self.server.go_on.wait()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def loopback(files: dict[str, bytes]) -> Iterator[Loopback]:
    """A `Loopback` server with these files."""
    with Loopback(files) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.go_on.set()
            server.shutdown()


Serve = Callable[[dict[str, bytes]], Loopback]


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
def server() -> Iterator[WandbServer]:
    """A W&B server."""
    with wandb_server() as server:
        yield server


@pytest.fixture
def runs(
    tmp_path: Path,
    data_dir: Path,
    mnist: Arrays,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Runs]:
    """Trainings that W&B follows there."""
    with wandb_runs(tmp_path, data_dir, server, monkeypatch) as runs:
        yield runs


@pytest.fixture(scope="session")
def started_cluster() -> Iterator[slurm_cluster.Cluster]:
    """A Slurm cluster of two nodes for all tests; skips where there can be none."""
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    cluster = slurm_cluster.Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(started_cluster: slurm_cluster.Cluster) -> Iterator[slurm_cluster.Cluster]:
    """That cluster with idle nodes and no jobs, which it has again at the end."""
    yield started_cluster
    started_cluster.cancel_all()
