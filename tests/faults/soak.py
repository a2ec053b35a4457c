"""Start, stop, kill and resume at random, for hours: what is left is exact, and nothing grows."""

import contextlib
import os
import random
import shutil
import signal
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field

import psutil

from faults.core import Child, Nursery, Outcome, Place, exact, free_port, group_env, nursery

TITLE = "A soak: started, stopped, killed and resumed at random"
SECONDS = 2 * 3600, 40  # of the whole suite, and in CI
SETTLED = 20.0  # seconds in a life after which memory is to stay flat
GROWTH = 2.0  # MiB a minute that memory may seem to grow, from sample to sample
STOPS = {"TERM": signal.SIGTERM, "USR2": signal.SIGUSR2, "INT": signal.SIGINT}
KILLS = ["kill all", "kill one"]
EVENTS = [*KILLS, "stop file", *STOPS]


@dataclass
class Life:
    """What was seen of one start's main process, second by second of its life."""

    seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    """Resident, in MiB."""
    files: list[int] = field(default_factory=list)
    """Open file descriptors."""

    def look(self, child: Child, began: float) -> None:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(child.pid)
            memory, files = process.memory_info().rss / 2**20, process.num_fds()
            self.seconds.append(time.monotonic() - began)
            self.memory.append(memory)
            self.files.append(files)

    def settled(self) -> tuple[list[float], list[float], list[int]]:
        first = next((i for i, s in enumerate(self.seconds) if s > SETTLED), len(self.seconds))
        return self.seconds[first:], self.memory[first:], self.files[first:]

    def growth(self) -> float | None:
        """Slope of memory in MiB a minute; None for a life too short to tell."""
        seconds, memory, _ = self.settled()
        if len(seconds) < 20 or seconds[-1] - seconds[0] < SETTLED:
            return None
        return 60 * statistics.linear_regression(seconds, memory).slope


class Soak:
    """One training after the other, each disturbed until it is finished."""

    def __init__(self, place: Place, nurse: Nursery, draw: random.Random) -> None:
        self.place, self.nurse, self.draw = place, nurse, draw
        self.events: Counter[str] = Counter()
        self.lives: list[Life] = []
        self.failures: list[str] = []

    def flags(self, name: str) -> list[str]:
        steps = self.place.many(702, 60)
        return [
            "--model", "tiny_v3", "--dropout", "0.1", "--ema-decay", "0.99", "--translate", "1",
            "--max-steps", str(steps), "--log-every", "10", "--checkpoint-every", "20",
            "--hang-timeout", "20", "--name", name, "--runs-dir", str(self.place.folder / "runs"),
            "--data-dir", str(self.place.data_dir),
        ]  # fmt: skip

    def start(self, name: str, processes: int) -> list[Child]:
        faults = {"ids": str(self.place.folder / "ids" / name)}
        envs: list[dict[str, str]] = [{}]
        if processes > 1:
            envs = group_env(processes, free_port())
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
        children, life, began = self.start(name, processes), Life(), time.monotonic()
        event = self.draw.choice(EVENTS)
        frozen = self.draw.random() < 0.3  # for a second, on the way
        # Mostly short lives; some are long enough to see whether memory grows.
        until = self.draw.choice([4, 8, 16, self.place.many(90, 12)]) * (0.5 + self.draw.random())
        while time.monotonic() - began < until and any(not c.ended.wait(0.25) for c in children):
            life.look(children[0], began)
            if frozen and time.monotonic() - began > until / 2:
                frozen = False
                self.events["freeze and go on"] += 1
                one = self.draw.choice(children)
                one.kill(signal.SIGSTOP)
                time.sleep(1)
                one.kill(signal.SIGCONT)
        if any(child.code is None for child in children):
            self.events[event] += 1
            self.disturb(event, name, children)
        codes = [child.wait(300) for child in children]
        self.lives.append(life)
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
    draw = random.Random(13)
    seconds = place.many(*SECONDS)
    began = time.monotonic()
    digests: Counter[str] = Counter()
    finished = Counter[str]()
    with nursery(place.folder / "logs") as nurse:
        soak = Soak(place, nurse, draw)
        shapes = [1, 2] if place.whole else [1]
        expected = {n: soak.undisturbed(f"whole-{n}", n) for n in shapes}
        number, used = 0, []
        with contextlib.suppress(KeyboardInterrupt):  # asks for what there is so far
            while time.monotonic() - began < seconds or not finished:
                processes = shapes[number % len(shapes)]
                name = f"soaked-{number}-on-{processes}"
                try:
                    same = soak.disturbed(name, processes) == expected[processes]
                except (AssertionError, OSError) as error:
                    soak.failures.append(f"{name}: {error}")
                    same = False
                finished[name] += 1
                digests["exact" if same else "other"] += 1
                if not same:
                    soak.failures.append(f"{name} differs from the run that was left alone")
                folder = place.folder / "runs" / name
                used.append(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 2**20)
                number += 1
                if same:
                    shutil.rmtree(folder)
                    shutil.rmtree(place.folder / "ids" / name)
        left = _left(set(nurse.children))
    growths = [growth for life in soak.lives if (growth := life.growth()) is not None]
    files = [max(life.settled()[2]) - min(life.settled()[2])
             for life in soak.lives if len(life.settled()[2]) > 1]  # fmt: skip
    grown = [growth for growth in growths if growth > GROWTH]
    more = [count for count in files if count > 2]
    lives = len(soak.lives)
    return [
        Outcome(
            "starts, stops and kills in runs that end exact",
            tried=sum(soak.events.values()),
            survived=sum(soak.events.values()) if not soak.failures else 0,
            lost="nothing: every run ends exact" if not soak.failures else "see failures",
            figures={
                "seconds": round(time.monotonic() - began),
                "starts": lives,
                "runs": sum(digests.values()),
                "runs that end exact": digests["exact"],
                "events": dict(soak.events),
                "run folder, MiB at most": round(max(used), 2),
                "processes left": len(left),
            },
            failures=soak.failures + [f"process {pid} is left" for pid in left],
        ),
        Outcome(
            "memory within a life",
            tried=len(growths),
            survived=len(growths) - len(grown),
            lost=f"median {statistics.median(growths):+.2f} MiB a minute"
            if growths
            else f"no life was longer than {2 * SETTLED:.0f} s",
            figures={"largest growth, MiB a minute": round(max(growths), 2)} if growths else {},
            failures=[f"{growth:.2f} MiB a minute" for growth in grown],
        ),
        Outcome(
            "open files within a life",
            tried=len(files),
            survived=len(files) - len(more),
            lost="nothing" if not more else "see failures",
            figures={"most more": max(files, default=0)},
            failures=[f"{count} more open files" for count in more],
        ),
    ]


def _left(groups: set[int]) -> list[int]:
    """Processes of these groups that still run."""
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) in groups and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process.pid)
    return left
