"""What the fault suites share: an outcome to report, trainings that start fast, what "exact" is."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from distcv import checkpoint

HERE = Path(__file__).resolve().parent
WORKER = HERE / "worker.py"


@dataclass(frozen=True)
class Outcome:
    """What came of one kind of fault."""

    fault: str
    """What was done, in a few words."""
    tried: int
    survived: int
    lost: str
    """What was lost at worst, as measured."""
    figures: dict[str, Any] = field(default_factory=dict)
    """What else was measured."""
    failures: list[str] = field(default_factory=list)
    """One line for each fault that was not survived."""


class Place(NamedTuple):
    """Where a suite works, and how much of it is wanted."""

    folder: Path
    """An empty folder of its own."""
    data_dir: Path
    """Folder of the real data sets."""
    whole: bool
    """All of it, or the sized-down version that CI runs."""

    def many(self, whole: int, small: int) -> int:
        """So many in the whole suite, so many in CI."""
        return whole if self.whole else small


@dataclass
class Child:
    """A training that a nursery has started."""

    pid: int
    log: Path
    ended: threading.Event
    code: int | None = None
    """Exit code, negative for a signal; None as long as it runs."""

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill_group(self) -> None:
        """SIGKILL to it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self, seconds: float) -> int:
        assert self.ended.wait(seconds), f"still running after {seconds} s:\n{self.said()}"
        assert self.code is not None
        return self.code

    def said(self) -> str:
        """All that it has printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Nursery:
    """Starts trainings in a fraction of a second, by forks of a process that has loaded torch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.children: dict[int, Child] = {}
        self.lock = threading.Lock()
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "nursery.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.born: list[int] = []
        self.birth = threading.Condition()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            told = json.loads(line)
            with self.birth:
                if "born" in told:
                    self.children[told["born"]] = Child(
                        told["born"], Path(told["log"]), threading.Event()
                    )
                    self.born.append(told["born"])
                    self.birth.notify_all()
                else:
                    child = self.children[told["died"]]
                    child.code = told["code"]
                    child.ended.set()

    def start(self, flags: Sequence[str], *, faults: dict[str, Any] | None = None,
              **env: str) -> Child:  # fmt: skip
        """Start ``distcv.train`` with these flags, as the leader of a process group of its own.

        ``faults`` is for ``worker.py``. What it prints goes to a file.
        """
        assert self.process.stdin is not None
        with self.lock:
            log = self.folder / f"log-{len(self.children)}"
            env = env | {"FAULTS": json.dumps(faults or {})}
            order = {"flags": list(flags), "env": env, "log": str(log)}
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            with self.birth:
                assert self.birth.wait_for(lambda: bool(self.born), 60), "nothing was started"
                return self.children[self.born.pop()]

    def run(self, flags: Sequence[str], *, seconds: float = 300, expect: int = 0,
            faults: dict[str, Any] | None = None, **env: str) -> str:  # fmt: skip
        """Run to the end; what it printed."""
        child = self.start(flags, faults=faults, **env)
        code = child.wait(seconds)
        assert code == expect, f"exit {code}, not {expect}:\n{child.said()}"
        return child.said()

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        for child in self.children.values():
            if child.code is None:
                child.kill_group()
        self.process.stdin.close()
        self.process.wait(30)
        self.listener.join()
        self.process.stdout.close()


@contextlib.contextmanager
def nursery(folder: Path) -> Iterator[Nursery]:
    """A nursery that ends, with all of its children, with the block."""
    one = Nursery(folder)
    try:
        yield one
    finally:
        one.close()


def group_env(processes: int, port: int) -> list[dict[str, str]]:
    """The environment of each of several processes on this machine, as a launcher would set it."""
    return [
        {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
        }
        for rank in range(processes)
    ]  # fmt: skip


def free_port() -> int:
    """A port of 127.0.0.1 at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def last_checkpoint(run: Path) -> Path:
    """The checkpoint of the highest step in a run folder."""
    folder = run / "checkpoints"
    return checkpoint.place(folder, checkpoint.steps(folder)[-1])


def learned(run: Path) -> dict[str, str]:
    """SHA-256 of each tensor file (weights, optimizer, EMA) of a run's last checkpoint."""
    last = last_checkpoint(run)
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(last.glob("*.safetensors"))
    }


def sample_ids(folder: Path) -> dict[int, list[int]]:
    """The samples of each step (from 0) that a run has trained on, over all its starts.

    ``worker.py`` leaves a file for each start and rank in ``folder``. A later start counts from the
    step that it resumed at. Within a step, the ranks' shares come one after the other.
    """
    starts: dict[int, list[Path]] = {}
    for file in folder.glob("*.jsonl"):
        starts.setdefault(int(file.name.split("-")[0]), []).append(file)
    steps: dict[int, list[int]] = {}
    for start in sorted(starts):
        found: dict[int, list[int]] = {}
        for file in sorted(starts[start], key=lambda f: int(f.stem.split("-")[2])):
            for line in file.read_text().splitlines():
                with contextlib.suppress(ValueError):  # cut by a kill
                    row = json.loads(line)
                    found.setdefault(row["step"], []).extend(row["ids"])
        if found:
            first = min(found)
            steps = {step: ids for step, ids in steps.items() if step < first} | found
    return dict(sorted(steps.items()))


def exact(run: Path, ids: Path) -> str:
    """One SHA-256 over weights, optimizer state and sample ids: what "exact" compares."""
    end = checkpoint.steps(run / "checkpoints")[-1]
    # A loader is some batches ahead of the training.
    trained_on = [(step, part) for step, part in sample_ids(ids).items() if step < end]
    told = json.dumps([learned(run), trained_on], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def wait_until(true: Any, seconds: float, what: str) -> None:
    """Wait until a function returns something true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.01)


def survived(outcome: Outcome) -> bool:
    """Whether all that was tried was survived."""
    return outcome.tried == outcome.survived and not outcome.failures
