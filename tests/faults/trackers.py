"""Trackers that fail: W&B's server, or its process, at the start and in mid-run; files that go.

Real clients of W&B talk to a server of our own on the loopback. The time of a step says little on
a busy machine; so what is measured is the share of the training's seconds that its thread spent in
the trackers.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import psutil
import pytest

from faults.core import Child, Nursery, Outcome, Place, nursery, wait_until
from support.runs import Runs
from support.wandb_runs import be_client, rows_on_disk, rows_on_server, run_of, sync, wandb_server
from support.wandb_server import WandbServer

TITLE = "Trackers that fail"
SHARE, EXIT = 1.0, 30.0  # at most: percent of the training, seconds from the last row to the end
PATIENCE = 900.0


class Fault(NamedTuple):
    name: str
    mid_run: bool = False
    """In mid-run, or from the start on."""
    server: Callable[[WandbServer], None] = lambda server: None
    """What is done to the server."""
    address: str | None = None
    """Where it is said to be."""
    kill: bool = False
    """Whether W&B's process gets a SIGKILL."""

    def __str__(self) -> str:
        return f"{self.name}, {'in mid-run' if self.mid_run else 'at the start'}"


def breaks(server: WandbServer) -> None:
    server.fail(10**9)


ALL = [
    Fault("the server hangs", True, WandbServer.hang),
    Fault("the server answers 500", True, breaks),
    Fault("its address resolves nowhere", address="http://nowhere.invalid"),
    Fault("W&B's process is killed", True, kill=True),
    Fault("the server hangs", False, WandbServer.hang),
    Fault("the server answers 500", False, breaks),
    Fault("the server is gone", True, WandbServer.refuse),
    Fault("W&B's process is killed", False, kill=True),
]
SMALL = ALL[:1] + ALL[3:4]


@dataclass
class Measured:
    """Of all trainings with one fault."""

    shares: list[float] = field(default_factory=list)
    exits: list[float] = field(default_factory=list)
    rows: int = 0
    failures: list[str] = field(default_factory=list)

    def outcome(self, fault: str, tried: int, lost: str) -> Outcome:
        return Outcome(
            fault,
            tried=tried,
            survived=tried - len(self.failures),
            lost="see failures" if self.failures else lost,
            figures={
                "held up the training by, % at most": round(max(self.shares, default=0), 3),
                "s from the last row to the end, at most": round(max(self.exits, default=0), 1),
                "rows": self.rows,
            },
            failures=self.failures,
        )


class Tracked:
    """Trainings with trackers; of the default recipe, and with the default interval of rows."""

    def __init__(self, place: Place, nurse: Nursery, patch: pytest.MonkeyPatch) -> None:
        self.place, self.nurse, self.patch = place, nurse, patch
        self.runs = Runs(place.folder / "runs", place.data_dir.resolve())
        self.steps = place.many(468, 120)
        self.own = {
            "HOME": str(place.folder / "home"), "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"
        }  # fmt: skip

    def start(self, name: str, *trackers: str, **env: str) -> Child:
        flags = ["--model", "gap", "--max-steps", str(self.steps), "--name", name, *self.runs.flags]
        hooks = {"tracked": str(self.place.folder / f"{name}.tracked")}
        return self.nurse.start([*flags, "--track", *trackers], faults=hooks, **self.own, **env)

    def wait_for_the_middle(self, name: str) -> None:
        self.runs.wait_for_step(name, self.steps // 2)

    def ends(self, name: str, training: Child, measured: Measured) -> None:
        """Wait for its end, and see what the trackers have cost it."""
        code = training.wait(PATIENCE)
        ended = time.time()
        assert code == 0, f"exit {code}: {training.said()[-500:]}"
        assert self.runs.result(name)["steps"] == self.steps
        lines = (self.place.folder / f"{name}.tracked").read_text().splitlines()
        each, waited = zip(*(map(float, line.split()) for line in lines), strict=True)
        # Neither counts the time in which other programs had the processors.
        seconds = self.runs.result(name)["seconds"] - (waited[-1] - waited[0])
        share = 100 * sum(each) / seconds
        leaving = ended - (self.runs.folder / name / "metrics.jsonl").stat().st_mtime
        measured.shares.append(share)
        measured.exits.append(leaving)
        measured.rows += len(each)
        assert share < SHARE, f"the trackers held it up by {share:.2f} % of its time"
        assert leaving < EXIT, f"{leaving:.0f} s from the last row to the end"

    def at_wandb(self, name: str, fault: Fault, measured: Measured) -> None:
        """One fault; then the server is well, and must get each row once."""
        with wandb_server() as server:
            be_client(server, self.patch, **self.own)
            if not fault.mid_run:
                fault.server(server)
            address = {"WANDB_BASE_URL": fault.address or server.url}
            training = self.start(name, "wandb", **(server.environment | address))
            if fault.mid_run:
                self.wait_for_the_middle(name)
                fault.server(server)
            if fault.kill:
                kill_process(training)
            self.ends(name, training, measured)
            assert "Traceback" not in training.said(), training.said()[-500:]
            server.heal()
            sync(self.runs, name)
            got = rows_on_server(run_of(self.runs, name, server))
            rows = [row for row in got if row.keys() - {"_step"}]  # not that of the result
            assert rows == rows_on_disk(self.runs, name), f"{len(rows)} rows after the sync"

    def files_gone(self, name: str, tracker: str, measured: Measured) -> None:
        """A tracker's files are deleted in mid-run, and their folder's name is taken.

        TensorBoard's own thread prints a traceback.
        """
        training = self.start(name, tracker)
        self.wait_for_the_middle(name)
        files = {"tensorboard": self.runs.folder / name / "tensorboard",
                 "trackio": self.runs.folder / ".trackio"}[tracker]  # fmt: skip
        shutil.rmtree(files)
        files.write_text("in the way")
        self.ends(name, training, measured)
        files.unlink()


def kill_process(training: Child) -> None:
    """SIGKILL to W&B's process, once there is one."""

    def found() -> list[psutil.Process]:
        children = psutil.Process(training.pid).children(recursive=True)
        return [one for one in children if one.name().startswith("wandb")]

    wait_until(found, 120, "process of W&B")
    for one in found():
        one.kill()


@contextlib.contextmanager
def attempt(measured: Measured) -> Iterator[None]:
    """Whatever goes wrong in here, the other faults are tried."""
    try:
        yield
    except Exception as error:
        measured.failures.append(f"{type(error).__name__}: {error}")


def run(place: Place) -> list[Outcome]:
    outcomes = []
    times = place.many(2, 1)
    faults = [Fault("nothing fails"), *ALL] if place.whole else SMALL
    with pytest.MonkeyPatch.context() as patch, nursery(place.folder / "nursery") as nurse:
        tracked = Tracked(place, nurse, patch)
        for number, fault in enumerate(faults):
            measured = Measured()
            for again in range(times):
                with attempt(measured):
                    tracked.at_wandb(f"{number}-{again}", fault, measured)
            outcomes.append(measured.outcome(str(fault), times, "nothing: W&B has each row once"))
        for tracker in ("tensorboard", "trackio")[: place.many(2, 1)]:
            measured = Measured()
            with attempt(measured):
                tracked.files_gone(tracker, tracker, measured)
            outcomes.append(
                measured.outcome(
                    f"the files of {tracker} are deleted and their name is taken, in mid-run",
                    1,
                    "its own rows; metrics.jsonl has them",
                )
            )
    return outcomes
