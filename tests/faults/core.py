"""What the fault suites share: an outcome to report, trainings that start fast, what "exact" is."""

import contextlib
import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from distcv import checkpoint
from support.forked import ONE_THREAD, Forked
from support.runs import ranks

HERE = Path(__file__).resolve().parent
WORKER = "faults.worker"  # the module that a training runs as
# The smallest network, by plain SGD, on images that need no files.
TINY = ["--recipe", "gap", "--model", "tiny_v3", "--dataset", "synthetic"]


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


class Child(Forked):
    """A training that a suite has started, the leader of a process group of its own."""

    @property
    def code(self) -> int | None:
        """Exit code, negative for a signal; None as long as it runs."""
        return self.returncode

    def ended(self, seconds: float = 0) -> bool:
        """Whether it ends within so many seconds."""
        self.process.join(seconds)
        return self.code is not None

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        self.send_signal(number)

    def kill_group(self) -> None:
        """SIGKILL to it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self, timeout: float) -> int:
        """Wait for its end; AssertionError, with what it was doing, if it doesn't come."""
        if not self.ended(timeout):
            self.kill(signal.SIGABRT)  # it tells the stack of each thread
            self.ended(10)
            raise AssertionError(f"still running after {timeout} s:\n{self.said()}")
        return super().wait(0)

    def said(self) -> str:
        """All that it has printed."""
        return "".join(path.read_text(errors="replace") for path in self.printed)


class Nursery:
    """Starts trainings in a fraction of a second, by forks of a process that has loaded torch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.children: list[Child] = []

    def start(self, flags: Sequence[str], *, faults: dict[str, Any] | None = None,
              **env: str) -> Child:  # fmt: skip
        """Start ``distcv.train`` with these flags.

        ``faults`` is for ``worker.py``.
        """
        env = os.environ | ONE_THREAD | env | {"FAULTS": json.dumps(faults or {})}
        child = Child(WORKER, flags, env, self.folder / f"log-{len(self.children)}")
        self.children.append(child)
        return child

    def run(self, flags: Sequence[str], *, seconds: float = 300, expect: int = 0,
            faults: dict[str, Any] | None = None, **env: str) -> str:  # fmt: skip
        """Run to the end; what it printed."""
        child = self.start(flags, faults=faults, **env)
        code = child.wait(seconds)
        assert code == expect, f"exit {code}, not {expect}:\n{child.said()}"
        return child.said()

    def close(self) -> None:
        """End all of them."""
        for child in self.children:
            if child.code is None:
                child.kill_group()
            child.wait(30)


@contextlib.contextmanager
def nursery(folder: Path) -> Iterator[Nursery]:
    """A nursery that ends, with all of its children, with the block."""
    with contextlib.closing(Nursery(folder)) as one:
        yield one


def group_env(processes: int) -> list[dict[str, str]]:
    """What each process of a training on the CPU has in its environment; nothing if it is alone."""
    if processes == 1:
        return [{}]
    return [one | {"ACCELERATE_USE_CPU": "true"} for one in ranks(processes)]


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
