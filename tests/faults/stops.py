"""Every way to ask for a stop, under every launcher, in every phase of a run.

A real launcher starts ``worker.py``, which says when it is in a phase and lingers there. Then the
launcher's process gets the signal, as a user or a cluster would send it (under Slurm all processes
of the step, by ``scancel --signal``), or a file STOP appears in the run folder. One process under
python, two under all others. In CI srun is left to ``tests/slurm``.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

import distcv
from distcv import checkpoint
from distcv.preempt import STOPPED
from faults.core import WORKER, Outcome, Place, nursery, wait_until
from faults.small import Small, wait_for_phase
from support.runs import ROOT, launched
from support.slurm_cluster import Cluster, missing

TITLE = "Asked to stop, in every way, under every launcher, in every phase"
SIGNALS = {"TERM": signal.SIGTERM, "USR2": signal.SIGUSR2, "INT": signal.SIGINT}
WAYS = [*SIGNALS, "stop file"]
PHASES = ["init", "training", "evaluation", "saving", "last"]
STEPS = 24
# Where a phase says after which step the run stops; in the others it is the next one.
STOPS_AFTER = {"init": 0, "evaluation": STEPS, "last": STEPS}
HOLD = 1.0, 4.0  # seconds to linger in a phase; the second where it takes scancel to send a signal
PATIENCE = 120.0  # seconds until the launcher has ended, and then the last of its processes
LAUNCHERS = {
    "python": [sys.executable, "-m", WORKER],
    "torchrun": [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", WORKER,
    ],
    "accelerate launch": launched(2, "-m", WORKER),
    "srun": [
        "srun", "--nodes=2", "--ntasks-per-node=1", str(ROOT / "launch/multinode.sh"),
        "--config", "launch/cpu.yaml", "--processes-per-node", "1", "--module", WORKER, "--",
    ],
}  # fmt: skip
# The run's own exit code is 75. It comes through srun, as launch/multinode.sh sees to it. Torchrun,
# which accelerate launch is too for more than one process, knows only failure: TERM and INT it
# hands on, waits for its processes, and ends by an exception of its own; USR2 it doesn't know, and
# dies of it, whereupon its processes notice that they are alone.
THROUGH_TORCHRUN = {"TERM": 1, "INT": 1, "USR2": -signal.SIGUSR2, "stop file": 1}
CODES = {
    "python": dict.fromkeys(WAYS, STOPPED),
    "torchrun": THROUGH_TORCHRUN,
    "accelerate launch": THROUGH_TORCHRUN,
    "srun": dict.fromkeys(WAYS, STOPPED),
}


class Cell(NamedTuple):
    launcher: str
    way: str
    phase: str
    signals: int = 1
    """How often the signal comes, a fifth of a second apart."""

    def __str__(self) -> str:
        return f"{self.launcher}, {self.way}{' thrice' * (self.signals > 1)}, {self.phase}"


WHOLE = [Cell(*one) for one in ((la, w, p) for la in LAUNCHERS for w in WAYS for p in PHASES)]
SMALL = [
    Cell("python", "stop file", "init"),
    Cell("python", "TERM", "evaluation"),
    Cell("torchrun", "USR2", "training"),
    Cell("torchrun", "INT", "last"),
    Cell("accelerate launch", "stop file", "saving"),
]
TWICE = [Cell("python", "INT", "saving", 3)]
TWICE_WHOLE = [Cell(launcher, way, "saving", 3) for launcher in ("python", "torchrun")
               for way in SIGNALS]  # fmt: skip


class Asked:
    """One cell's run: started by its launcher, asked to stop, looked at, and trained to its end."""

    def __init__(self, cell: Cell, small: Small, cluster: Cluster | None) -> None:
        self.cell, self.small, self.cluster = cell, small, cluster
        self.name = re.sub(r"\W", "-", str(cell))
        self.mark = small.place.folder / f"{self.name}.mark"
        self.log = small.place.folder / f"{self.name}.log"
        hold = HOLD[cell.launcher == "srun"]
        hooks = small.hooks(self.name, mark=str(self.mark), hold={cell.phase: hold})
        self.env = cluster.environment if cluster else dict(os.environ)
        # Modules of their own launcher's find the worker; the package is the one that is tested.
        found = [str(Path(distcv.__file__).parents[1]), str(ROOT / "tests")]
        self.env |= {
            "FAULTS": json.dumps(hooks), "PYTHONPATH": os.pathsep.join(found),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip

    def check(self) -> str:
        """AssertionError unless it was saved, told rightly, and goes on exact; one word on it."""
        with self.log.open("w") as log:
            launcher = subprocess.Popen(
                [*LAUNCHERS[self.cell.launcher], *self.small.flags(self.name)],
                stdout=log, stderr=log, env=self.env, start_new_session=True,
            )  # fmt: skip
        try:
            wait_for_phase(self.mark, self.cell.phase, lambda: launcher.poll() is not None)
            for number in range(self.cell.signals):
                time.sleep(0.2 * (number > 0))
                self.ask(launcher)
            code = launcher.wait(PATIENCE)
            wait_until(lambda: not self.processes(), PATIENCE, "end of all processes")
        except (AssertionError, subprocess.TimeoutExpired) as error:
            raise AssertionError(f"{error}: {self.said()}") from None
        finally:
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    process.kill()
            launcher.wait()
        word = self.saved()
        expected = CODES[self.cell.launcher][self.cell.way]
        assert code == expected, f"exit code {code}, not {expected}: {self.said()}"
        self.small.check(self.name, 1 if self.cell.launcher == "python" else 2)
        return word

    def ask(self, launcher: subprocess.Popen[bytes]) -> None:
        if self.cell.way == "stop file":
            folder = self.small.folder(self.name)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "STOP").touch()
        elif self.cluster and self.cell.launcher == "srun":
            self.cluster.run("scancel", f"--signal={self.cell.way}", "--me")
        else:
            with contextlib.suppress(ProcessLookupError):
                launcher.send_signal(SIGNALS[self.cell.way])

    def processes(self) -> list[psutil.Process]:
        """All that belong to this run."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(self.mark) in process.environ().get("FAULTS", ""):
                    found.append(process)
        return found

    def saved(self) -> str:
        """AssertionError unless the run folder holds what it stopped with."""
        folder = self.small.folder(self.name)
        if self.cell.phase == "init" and CODES[self.cell.launcher][self.cell.way] < 0:
            # The launcher died, and with it the store by which its processes would have joined.
            assert not folder.exists(), "they can't have joined"
            return "nothing to save"
        told = folder / "STOPPED"
        answer = re.fullmatch(
            r"stopped after step (\d+)\n", told.read_text() if told.exists() else ""
        )
        assert answer, f"no answer in STOPPED: {self.said()}"
        assert not (folder / "STOP").exists(), "it would be stopped once more"
        assert not (folder / "result.json").exists(), "it was asked to stop, and finished"
        step, held = int(answer[1]), checkpoint.steps(folder / "checkpoints")
        expected = STOPS_AFTER.get(self.cell.phase, step)
        assert step == expected, f"stopped after step {step}, not {expected}"
        if step == 0:
            assert not held, f"checkpoints {held} before step 1"
            return "nothing to save"
        assert held[-1] == step, f"stopped after step {step} with checkpoints {held}"
        assert checkpoint.damage(checkpoint.place(folder / "checkpoints", step)) is None
        return f"saved {step}"

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-600:]


@contextlib.contextmanager
def slurm(wanted: bool) -> Iterator[Cluster | None]:
    if not wanted:
        yield None
        return
    assert (reason := missing()) is None, reason
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def run(place: Place) -> list[Outcome]:
    cells, twice = (WHOLE, TWICE_WHOLE) if place.whole else (SMALL, TWICE)
    with (
        nursery(place.folder / "logs") as nurse,
        slurm(any(cell.launcher == "srun" for cell in cells)) as cluster,
    ):
        small = Small(place, nurse, STEPS)
        return [
            ask_all(cells, "asked to stop once", small, cluster),
            ask_all(twice, "the signal comes three times while it saves", small, cluster),
        ]


def ask_all(cells: list[Cell], fault: str, small: Small, cluster: Cluster | None) -> Outcome:
    grid: dict[str, dict[str, str]] = {}
    failures = []
    for cell in cells:
        code = str(CODES[cell.launcher][cell.way])
        row = grid.setdefault(f"{cell.launcher}, {cell.way}", {"launcher's exit code": code})
        try:
            row[cell.phase] = Asked(cell, small, cluster).check()
        except (AssertionError, OSError) as error:
            row[cell.phase] = "FAILED"
            failures.append(f"{cell}: {error}")
    return Outcome(
        fault,
        tried=len(cells),
        survived=len(cells) - len(failures),
        lost="nothing: each run goes on and ends exact" if not failures else "see failures",
        figures={"grid": grid},
        failures=failures,
    )
