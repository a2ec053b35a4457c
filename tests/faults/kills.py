"""kill -9 around the writing of checkpoints, and a loss of power."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import torch

from distcv import checkpoint
from distcv.checkpoint import Checkpoint
from distcv.config import InputError, load_recipe
from distcv.data.readers import one_line
from distcv.run_folder import RunFolder
from faults.core import (
    TINY,
    Child,
    Nursery,
    Outcome,
    Place,
    exact,
    group_env,
    nursery,
    wait_until,
)
from faults.power import Disk, Tree, build, read_calls, written
from faults.traced import CALLS, missing, traced

TITLE = "kill -9 and loss of power around the writing of checkpoints"
EVERY = 2  # steps between checkpoints


def run(place: Place) -> list[Outcome]:
    return [*instants(place), *system_calls(place)]


def instants(place: Place) -> list[Outcome]:
    """Killed at random instants."""
    with nursery(place.folder / "nursery-1") as nurse:
        return [
            random_instants(place, nurse, 1, place.many(285, 6)),
            random_instants(place, nurse, 2, place.many(15, 1)),
        ]


def system_calls(place: Place) -> list[Outcome]:
    """Killed, or without power, before and after each system call."""
    if lack := missing():
        return [Outcome("kill -9 and loss of power at each system call", 0, 0, "", {}, lack)]
    with nursery(place.folder / "nursery-2") as nurse:
        return [each_call(place, nurse), power_loss(place, nurse)]


class Killed:
    """One training, killed again and again until it is finished; then the next one."""

    def __init__(self, place: Place, nurse: Nursery, processes: int) -> None:
        self.place, self.nurse, self.processes = place, nurse, processes
        self.steps = place.many(120, 30)
        self.draw = random.Random(1)
        began = time.monotonic()
        self.untouched = self.finish("untouched")
        self.seconds = time.monotonic() - began
        self.tried = self.lost = 0  # kills, and steps at worst
        self.places = Counter[str]()

    def start(self, name: str) -> list[Child]:
        place = self.place
        flags = [
            *TINY, "--dropout", "0.1", "--ema-decay", "0.9", "--batch-size", "32",
            "--max-steps", str(self.steps), "--log-every", "1", "--checkpoint-every", str(EVERY),
            "--name", name, "--runs-dir", str(place.folder / f"runs-{self.processes}"),
            "--data-dir", str(place.data_dir),
        ]  # fmt: skip
        faults = {"ids": str(self.ids(name))}
        return [self.nurse.start(flags, faults=faults, **env) for env in group_env(self.processes)]

    def run_folder(self, name: str) -> Path:
        return self.place.folder / f"runs-{self.processes}" / name

    def ids(self, name: str) -> Path:
        return self.place.folder / f"ids-{self.processes}" / name

    def finish(self, name: str) -> str:
        """Train to the end without a kill; the sum of what came of it."""
        for child in self.start(name):
            code = child.wait(600)
            assert code == 0, f"exit {code}: {child.said()}"
        rows = RunFolder(self.run_folder(name)).metrics.read_text()
        steps = [int(step) for step in re.findall(r'"train", "step": (\d+),', rows)]
        assert steps == list(range(1, self.steps + 1)), f"rows of steps {steps}"
        return exact(self.run_folder(name), self.ids(name))

    def life(self, name: str) -> bool:
        """One start and, at a random instant of it, the kill; False if it was finished before."""
        children, folder = self.start(name), self.run_folder(name) / "checkpoints"
        if self.draw.random() < 0.5:
            time.sleep(self.draw.uniform(0, self.seconds))
            where = "at any instant"
        else:
            at, saves, seen = self.draw.randint(1, 4), 0, ""
            while saves < at and any(child.code is None for child in children):
                writing = _hidden(folder)
                saves += bool(writing) and writing != seen
                seen = writing
                time.sleep(0.001)
            time.sleep(self.draw.uniform(0, 0.03))
            where = "while a checkpoint was written"
        committed = _last_step(folder)
        alive = [child.code is None for child in children]
        for child in children:
            child.kill_group()
        codes = [child.wait(60) for child in children]
        if not all(alive):
            assert codes == [0] * len(codes), f"exit {codes}: {children[0].said()}"
            return False
        self.tried += 1
        self.places[where] += 1
        self.check(folder, committed)
        return True

    def check(self, folder: Path, committed: int) -> None:
        """The last checkpoint of before the kill, or a newer one, is whole."""
        whole = [one for one in checkpoint.candidates(folder) if checkpoint.damage(one) is None]
        found = int(whole[0].name.rsplit("-", 1)[1]) if whole else 0
        assert found >= committed, f"step {found} is left of {committed}"
        with contextlib.suppress(OSError):
            rows = (folder.parent / "metrics.jsonl").read_text()
            done = re.findall(r'"step": (\d+),', rows)
            self.lost = max(self.lost, int(done[-1]) - found if done else 0)


def random_instants(place: Place, nurse: Nursery, processes: int, kills: int) -> Outcome:
    """Killed at random instants, half of them while a checkpoint is written; then finished."""
    killed, failures, trainings = Killed(place, nurse, processes), list[str](), 0
    began = time.monotonic()
    while killed.tried < kills and len(failures) < 5:
        trainings += 1
        name = f"run-{trainings}"
        try:
            while killed.tried < kills and killed.life(name):
                pass
            if killed.finish(name) != killed.untouched:
                failures.append(f"{name} is not exact")
        except (AssertionError, OSError) as error:
            failures.append(f"{name}: {one_line(error)[-300:]}")
    return Outcome(
        f"kill -9 of all of {processes} process{'es' * (processes > 1)}",
        killed.tried,
        killed.tried - len(failures),
        f"at most {killed.lost} steps, done again",
        {
            **killed.places,
            "trainings": trainings,
            "exact at the end": trainings - len(failures),
            "seconds a kill": round((time.monotonic() - began) / max(1, killed.tried), 1),
        },
        failures,
    )


def each_call(place: Place, nurse: Nursery) -> Outcome:
    """Killed before each system call that changes a file, in a save and in one of the same step.

    What is before one call is after another.
    """
    template = place.folder / "template"
    for step in (10, 20):
        held = Checkpoint({"model": {"w": torch.full((5000,), 0.0)}}, {})
        checkpoint.save(template / "checkpoints", step, held)
    trace = place.folder / "calls"
    counts = Counter[str]()
    _saves(nurse, template, place.folder / "saves", "-o", str(trace), "-e", _traced(*CALLS))
    for line in trace.read_text().splitlines():
        if call := re.match(r"\d+ +(\w+)\(", line):
            counts[call[1]] += 1
    failures = []
    for call, count in counts.items():
        for number in range(1, count + 1):
            run = place.folder / f"saves-{call}-{number}"
            options = ("-o", os.devnull, "-e", _traced(call))
            kill = ("-e", f"inject={call}:signal=KILL:when={number}")
            try:
                said = _saves(nurse, template, run, *options, *kill, expect=-signal.SIGKILL)
                _check_saves(run / "checkpoints", said.count("saved"))
            except (AssertionError, OSError) as error:
                failures.append(f"before {call} {number}: {one_line(error)[-300:]}")
            shutil.rmtree(run)
    tried = sum(counts.values())
    return Outcome(
        "kill -9 before and after each system call of a save, and of one of the same step",
        tried, tried - len(failures), "nothing that was committed", dict(counts), failures,
    )  # fmt: skip


def _traced(*calls: str) -> str:
    return f"trace={','.join(calls)}"


def _saves(nurse: Nursery, template: Path, run: Path, *strace: str, expect: int = 0) -> str:
    """What ``saves`` of worker.py prints in a copy of a run folder, under strace."""
    shutil.copytree(template, run)
    child = nurse.start([], faults={"saves": str(run), "still": "saving"})
    with traced(child, *strace):
        pass
    assert child.code == expect, f"exit {child.code}: {child.said()}"
    return child.said()


def _check_saves(folder: Path, saved: int) -> None:
    """The checkpoint is the one of before or the new one; and the next save leaves order."""
    assert not (half := _half(folder)), half
    found = checkpoint.newest(folder, print)
    assert found, "nothing is left"
    value = float(checkpoint.load(found).tensors["model"]["w"][0])
    assert value in (saved, saved + 1), f"that of save {value:g}, when {saved} were committed"
    assert (value == 0) == (found.name == "step-00000020"), f"{value} in {found.name}"
    checkpoint.save(folder, 30, checkpoint.load(found))
    checkpoint.prune(folder, keep=set())
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["step-00000020", "step-00000030"], f"left: {left}"


def power_loss(place: Place, nurse: Nursery) -> Outcome:
    """A training, stopped at its end and gone on with, replayed on a disk that forgets.

    So its last step is saved twice, before and after its evaluation.
    """
    runs, mark = place.folder / "power", place.folder / "mark"
    runs.mkdir()
    flags = [
        *TINY, "--batch-size", "32", "--max-steps", "4", "--log-every", "1",
        "--checkpoint-every", "1", "--name", "r", "--runs-dir", str(runs),
        "--data-dir", str(place.data_dir),
    ]  # fmt: skip
    calls = []
    for life, code in ((1, 75), (2, 0)):
        faults = {"still": "init", "mark": str(mark), "hold": {"last": 1}}
        child = nurse.start(flags, faults=faults)
        trace = place.folder / f"trace-{life}"
        # Without a limit to the strings, and a file for each thread.
        options = ("-ff", "-y", "-s", str(2**20), "-o", str(trace), "-e", _traced(*CALLS))
        with traced(child, *options):
            if life == 1:
                wait_until(lambda: "last" in mark.read_text(), 120, "last step")
                child.kill(signal.SIGTERM)
        assert child.code == code, f"exit {child.code}: {child.said()}"
        calls += read_calls(Path(f"{trace}.{child.pid}"))
    disk, saves, committed = Disk(runs), iter((1, 2, 3, 4, 4)), 0
    states, failures = set[tuple[int, int, bool]](), list[str]()
    for number, call in enumerate(calls, 1):
        disk.make(call)
        data = written(call)
        if data and data[0] == mark and data[1] == b"saved\n":
            committed = next(saves)
        for tree in disk.after_power_loss(all_orders=place.whole):
            at_end = number == len(calls)
            key = hash(frozenset(tree.items())), committed, at_end
            if key in states:
                continue
            states.add(key)
            problem = _check_power(tree, place.folder / "after", committed, at_end)
            if problem:
                failures.append(f"after call {number}, {call.name}: {problem}")
    assert committed == 4, "no save was seen"
    return Outcome(
        "loss of power after each system call of a training",
        len(states), len(states) - len(failures), "nothing that was committed",
        {"system calls": len(calls)}, failures,
    )  # fmt: skip


def _check_power(tree: Tree, folder: Path, committed: int, at_end: bool) -> str | None:
    """What is wrong with what a power loss has left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    build(tree, folder)
    run = folder / "r"
    try:
        if (run / "config.yaml").exists():
            load_recipe(run / "config.yaml")
        for file in set(run.glob("*.json")) - {run / "lease.json"}:
            json.loads(file.read_bytes())
        if at_end and not (run / "result.json").exists():
            return "the result is lost"
        if half := _half(run / "checkpoints"):
            return half
        found = checkpoint.newest(run / "checkpoints", print)
        step = int(checkpoint.load_state(found)["step"]) if found else 0
        rows = RunFolder(run)
        if step:
            rows.cut_metrics(step)
        trained = [row["step"] for row in rows.rows() if row["event"] == "train"] if step else []
    except (InputError, ValueError, OSError) as error:
        return one_line(error)
    if step < committed:
        return f"step {step} is left of {committed}"
    return None if trained == list(range(1, step + 1)) else f"rows of steps {trained} of {step}"


def _half(folder: Path) -> str:
    """Checkpoints that are there, but not whole."""
    found = {one.name: checkpoint.damage(one) for one in checkpoint.candidates(folder)}
    return ", ".join(f"{name}: {problem}" for name, problem in found.items() if problem)


def _hidden(folder: Path) -> str:
    """The name under which a checkpoint is being written, or nothing."""
    with contextlib.suppress(OSError):
        return next((path.name for path in folder.glob(".step-*")), "")
    return ""


def _last_step(folder: Path) -> int:
    steps = checkpoint.steps(folder)
    return steps[-1] if steps else 0
