"""Start, stop, kill and resume at random, for hours: what is left is exact."""

import contextlib
import os
import random
import shutil
import signal
import time
from collections import Counter

import psutil

from faults.core import (
    Child,
    Nursery,
    Outcome,
    Place,
    exact,
    group_env,
    nursery,
    wait_until,
)

TITLE = "A soak: started, stopped, killed and resumed at random"
SECONDS = 2 * 3600, 8  # of the whole suite, and in CI
STOPS = {"TERM": signal.SIGTERM, "USR2": signal.SIGUSR2, "INT": signal.SIGINT}
KILLS = ["kill all", "kill one"]
EVENTS = [*KILLS, "stop file", *STOPS]


class Soak:
    """One training after the other, each disturbed until it is finished."""

    def __init__(self, place: Place, nurse: Nursery, draw: random.Random) -> None:
        self.place, self.nurse, self.draw = place, nurse, draw
        self.events: Counter[str] = Counter()
        self.starts = 0
        self.failures: list[str] = []

    def flags(self, name: str) -> list[str]:
        steps = self.place.many(702, 60)
        return [
            "--recipe", "gap", "--model", "tiny_v3",
            "--dropout", "0.1", "--ema-decay", "0.99", "--translate", "1",
            "--max-steps", str(steps), "--log-every", "10", "--checkpoint-every", "20",
            "--hang-timeout", "20", "--name", name, "--runs-dir", str(self.place.folder / "runs"),
            "--data-dir", str(self.place.data_dir),
        ]  # fmt: skip

    def start(self, name: str, processes: int) -> list[Child]:
        faults = {"ids": str(self.place.folder / "ids" / name)}
        envs = group_env(processes)
        return [self.nurse.start(self.flags(name), faults=faults, **env) for env in envs]

    def digest(self, name: str) -> str:
        return exact(self.place.folder / "runs" / name, self.place.folder / "ids" / name)

    def undisturbed(self, name: str, processes: int) -> str:
        for child in self.start(name, processes):
            code = child.wait(3600)
            assert code == 0, f"exit {code}: {child.said()}"
        return self.digest(name)

    def disturbed(self, name: str, processes: int) -> str:
        """Train to the end, through one event after the other."""
        while not (self.place.folder / "runs" / name / "result.json").exists():
            self.live(name, processes)
        return self.digest(name)

    def live(self, name: str, processes: int) -> None:
        """One start, to its end or to an event that ends it."""
        children, began = self.start(name, processes), time.monotonic()
        event = self.draw.choice(EVENTS)
        frozen = self.draw.random() < 0.3  # for a second, on the way
        # A run of CI's size is over within seconds.
        lives = [4, 8, 16, 90] if self.place.whole else [2, 4, 8]
        until = self.draw.choice(lives) * (0.5 + self.draw.random())
        while time.monotonic() - began < until and any(not c.ended(0.25) for c in children):
            if frozen and time.monotonic() - began > until / 2:
                frozen = False
                self.events["freeze and go on"] += 1
                one = self.draw.choice(children)
                one.kill(signal.SIGSTOP)
                time.sleep(1)
                one.kill(signal.SIGCONT)
        # Before they have joined it takes a launcher to end one whose peer is dead.
        wait_until(
            lambda: "run folder" in children[0].said() or any(c.code is not None for c in children),
            300, "start",
        )  # fmt: skip
        if any(child.code is None for child in children):
            self.events[event] += 1
            self.disturb(event, name, children)
        codes = [child.wait(300) for child in children]
        self.starts += 1
        if event not in KILLS and not set(codes) <= {0, 75}:
            said = children[0].said()[-300:]
            self.failures.append(f"{name}: {event}: exit codes {codes}: {said}")

    def disturb(self, event: str, name: str, children: list[Child]) -> None:
        one = self.draw.choice(children)
        if event == "kill all":
            for child in children:
                child.kill_group()
        elif event == "kill one":
            one.kill()
        elif event == "stop file":
            folder = self.place.folder / "runs" / name
            if folder.exists():
                (folder / "STOP").touch()
        else:
            one.kill(STOPS[event])


def run(place: Place) -> list[Outcome]:
    with nursery(place.folder / "logs") as nurse:
        return [disturbed_runs(place, nurse)]


def disturbed_runs(place: Place, nurse: Nursery) -> Outcome:
    """One run after the other, for so long, and until one was ended on its way and went on.

    Ctrl-C asks for what there is so far.
    """
    seconds, began = place.many(*SECONDS), time.monotonic()
    soak, exact_runs, used = Soak(place, nurse, random.Random(13)), 0, [0.0]
    shapes = [1, 2] if place.whole else [1]
    expected = {n: soak.undisturbed(f"whole-{n}", n) for n in shapes}
    runs = 0
    with contextlib.suppress(KeyboardInterrupt):
        while time.monotonic() - began < seconds or (soak.starts <= runs and not soak.failures):
            processes = shapes[runs % len(shapes)]
            name = f"soaked-{runs}-on-{processes}"
            runs += 1
            try:
                if soak.disturbed(name, processes) == expected[processes]:
                    exact_runs += 1
                else:
                    soak.failures.append(f"{name} differs from the run that was left alone")
            except (AssertionError, OSError) as error:
                soak.failures.append(f"{name}: {error}")
            folder = place.folder / "runs" / name
            used.append(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 2**20)
            shutil.rmtree(folder)
            shutil.rmtree(place.folder / "ids" / name)
    nurse.close()  # a run may be under way
    left = _left({child.pid for child in nurse.children})
    faults = sum(soak.events.values())
    return Outcome(
        "stops, kills and freezes in runs that end exact",
        tried=faults,
        survived=faults if not soak.failures else 0,
        lost="nothing: every run ends exact" if not soak.failures else "see failures",
        figures={
            "seconds": round(time.monotonic() - began),
            "starts": soak.starts,
            "runs that end exact": exact_runs,
            "faults": dict(sorted(soak.events.items())),
            "run folder, MiB at most": round(max(used), 2),
            "processes left": len(left),
        },
        failures=soak.failures + [f"process {pid} is left" for pid in left],
    )


def _left(groups: set[int]) -> list[int]:
    """Processes of these groups that still run."""
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) in groups and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process.pid)
    return left
