"""Disks that are full, read-only, at their quota, or fail: before step 1 and in mid-run."""

import contextlib
import os
import random
import re
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from distcv import checkpoint
from distcv.data.readers import one_line
from distcv.preempt import NOT_SAVED
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
from faults.small_disks import can_mount, full, limited, no_inodes, read_only, small_disk
from faults.traced import missing, traced, wait_still

TITLE = "Disk full, read-only, quota, I/O error"
STEPS, EVERY = 15, 3
FAULTS = {  # system calls, and how they fail
    "write": ("ENOSPC", "EDQUOT", "EIO"),
    "fsync": ("EIO", "ENOSPC", "EDQUOT"),
    "rename": ("EROFS", "ENOSPC", "EIO"),
    "mkdir": ("ENOSPC", "EROFS", "EDQUOT"),
    "openat": ("EROFS", "ENOSPC", "EDQUOT"),
    "ftruncate": ("EIO",),
}
TENSORS = ("model.safetensors", "optimizer.safetensors")
LOST = "steps since the last checkpoint, done again"
Change = contextlib.AbstractContextManager[object]


def run(place: Place) -> list[Outcome]:
    return [*before_step_1(place), *in_mid_run(place)]


def before_step_1(place: Place) -> list[Outcome]:
    """Refused."""
    with nursery(place.folder / "nursery-1") as nurse:
        disk = Disk(place, nurse)
        return [refused(disk, 1), refused(disk, 2)]


def in_mid_run(place: Place) -> list[Outcome]:
    """Gone on with, or stopped."""
    with nursery(place.folder / "nursery-2") as nurse:
        disk = Disk(place, nurse)
        return [real_disks(disk), failing_calls(disk, 1), failing_calls(disk, 2)]


class Disk:
    """Trainings on disks that are disturbed, and the same left alone."""

    def __init__(self, place: Place, nurse: Nursery) -> None:
        self.place, self.nurse = place, nurse
        self.can_mount = can_mount(place.folder / "mount")
        self.untouched: dict[int, str] = {}
        self.templates: dict[int, Path] = {}

    def start(self, folder: Path, processes: int, still: str = "") -> list[Child]:
        """Start the training in ``folder``; its main process stops before ``still``."""
        flags = [
            *TINY, "--batch-size", "32", "--max-steps", str(STEPS),
            "--log-every", "1", "--checkpoint-every", str(EVERY), "--name", "r",
            "--runs-dir", str(folder / "runs"), "--data-dir", str(self.place.data_dir),
        ]  # fmt: skip
        ids = str(self.place.folder / "ids" / folder.name)
        return [
            self.nurse.start(flags, faults={"ids": ids, "still": still * (rank == 0)}, **env)
            for rank, env in enumerate(group_env(processes))
        ]

    def finish(self, folder: Path, processes: int) -> str:
        """Train to the end; the sum of what came of it."""
        for child in self.start(folder, processes):
            code = child.wait(300)
            assert code == 0, f"exit {code}: {child.said()}"
        rows = (folder / "runs/r/metrics.jsonl").read_text()
        steps = [int(step) for step in re.findall(r'"train", "step": (\d+),', rows)]
        assert steps == list(range(1, STEPS + 1)), f"rows of steps {steps}"
        return exact(folder / "runs/r", self.place.folder / "ids" / folder.name)

    def prepare(self, processes: int) -> None:
        """Train once undisturbed, and once up to the first checkpoint."""
        if processes in self.untouched:
            return
        self.untouched[processes] = self.finish(
            self.place.folder / f"untouched-{processes}", processes
        )
        template = self.place.folder / f"template-{processes}"
        first = checkpoint.place(template / "runs/r/checkpoints", EVERY)
        children = self.start(template, processes)
        wait_until(first.exists, 120, "checkpoint")
        for child in children:
            child.kill_group()
            child.wait(60)
        for later in set(first.parent.iterdir()) - {first}:
            shutil.rmtree(later)
        self.templates[processes] = template

    def begun(self, folder: Path, processes: int) -> Path:
        """A copy of the training that has its first checkpoint; its run folder."""
        self.prepare(processes)
        template, ids = self.templates[processes], self.place.folder / "ids"
        shutil.copytree(template / "runs", folder / "runs")
        shutil.copytree(ids / template.name, ids / folder.name)
        return folder / "runs/r"

    def untried(self) -> dict[str, str]:
        """What is left out here."""
        return {} if self.can_mount else {"not tried": "what takes a mount, not allowed here"}

    def went_on(self, folder: Path, children: list[Child]) -> bool:
        """Whether it went on to its end, else it stopped cleanly; the checkpoints are whole."""
        codes = {child.wait(200) for child in children}
        said = children[0].said()
        assert codes in ({0}, {NOT_SAVED}), f"exit {codes}: {said[-500:]}"
        assert "Traceback" not in said, said[-500:]
        assert ("stopped unsaved" in said) == (codes == {NOT_SAVED}), said[-500:]
        for one in checkpoint.candidates(folder / "runs/r/checkpoints"):
            assert (problem := checkpoint.damage(one)) is None, f"{one.name}: {problem}"
        assert checkpoint.steps(folder / "runs/r/checkpoints"), "no checkpoint is left"
        return codes == {0}


class Refused(NamedTuple):
    """A disk on which no training can start."""

    what: str
    words: str
    """In the one line that says so."""
    disturbed: Callable[[Path], Change] = lambda folder: contextlib.nullcontext()
    """Makes it so of the folder of the run folders."""
    call: str = ""
    """A system call that fails; with its error, and how often it is made before step 1."""
    error: str = ""
    times: int = 1
    limit: int = resource.RLIM_INFINITY
    """Bytes that a file may have."""
    mounts: bool = False


def full_disk(folder: Path) -> Change:
    stack = contextlib.ExitStack()
    stack.enter_context(small_disk(folder, size="2m"))
    stack.enter_context(full(folder))
    return stack


NOTHING_LEFT = "No space left on device: make room"
REFUSED = (
    Refused("a full disk", NOTHING_LEFT, full_disk, mounts=True),
    Refused("too little room", "MB needed for checkpoints: make room",
            lambda folder: small_disk(folder, size="1m"), mounts=True),
    Refused("no inode left", NOTHING_LEFT,
            lambda folder: small_disk(folder, nr_inodes="3"), mounts=True),
    Refused("a read-only disk", "Read-only file system: mend", read_only, mounts=True),
    Refused("a file instead of the folder", "File exists: mend",
            lambda folder: contextlib.nullcontext(folder.rmdir() or folder.touch())),
    Refused("a quota", "Disk quota exceeded, 1 MB needed", call="fallocate", error="EDQUOT"),
    Refused("a limit to the size of a file", "File too large, 1 MB needed", limit=10**5),
    Refused("fsync fails", "Input/output error: mend", call="fsync", error="EIO", times=10),
    Refused("rename fails", "Read-only file system: mend", call="rename", error="EROFS", times=4),
    Refused("mkdir fails", "quota exceeded: make room", call="mkdir", error="EDQUOT", times=2),
)  # fmt: skip


def refused(disk: Disk, processes: int) -> Outcome:
    """Before step 1: one line and exit code 2, on all processes."""
    draw, kinds, failures, tried = random.Random(3), Counter[str](), list[str](), 0
    chosen = [one for one in REFUSED if disk.can_mount or not one.mounts]
    for one in chosen if processes == 1 else chosen[:2]:
        for again in range(disk.place.many(one.times, 1)):
            tried, name = tried + 1, f"refused-{processes}-{tried}"
            try:
                number = again + 1 if disk.place.whole else draw.randint(1, one.times)
                _refuse(disk, disk.place.folder / name, one, number, processes)
                kinds[one.what] += 1
            except (AssertionError, OSError) as error:
                failures.append(f"{one.what}: {one_line(error)[-400:]}")
    return Outcome(
        f"before step 1, {processes} process{'es' * (processes > 1)}: one line, exit code 2",
        tried, tried - len(failures), "nothing", dict(kinds) | disk.untried(), failures,
    )  # fmt: skip


def _refuse(disk: Disk, folder: Path, one: Refused, number: int, processes: int) -> None:
    runs = folder / "runs"
    runs.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(one.disturbed(runs))
        children = disk.start(folder, processes, still="init")
        if one.call:
            inject = f"inject={one.call}:error={one.error}:when={number}"
            options = ("-o", os.devnull, "-e", f"trace={one.call}", "-e", inject)
            stack.enter_context(traced(children[0], *options))
        else:
            wait_still(children[0])
            resource.prlimit(children[0].pid, resource.RLIMIT_FSIZE, (one.limit, -1))
            children[0].kill(signal.SIGCONT)
        codes = {child.wait(120) for child in children}
    said = "".join(child.said() for child in children)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert codes == {2} and len(errors) == 1 and "Traceback" not in said, f"exit {codes}: {said}"
    assert one.words in errors[0], errors[0]


class Disturbed(NamedTuple):
    """What happens to the disk of a training under way."""

    what: str
    change: Callable[[Path, Child], Change]
    """Makes it so, of the disk's folder and the main process."""
    mended: bool = False
    """Whether it is over after the first save that has failed."""


DISTURBED = (
    Disturbed("full", lambda folder, _: full(folder)),
    Disturbed("full for a while", lambda folder, _: full(folder), mended=True),
    Disturbed("read-only", lambda folder, _: read_only(folder / "runs/r")),
    Disturbed("read-only for a while", lambda folder, _: read_only(folder / "runs/r"), mended=True),
    Disturbed("without inodes", lambda folder, _: no_inodes(folder)),
    Disturbed("limited in the size of a file", lambda _, child: limited(child.pid)),
    Disturbed("limited so for a while", lambda _, child: limited(child.pid), mended=True),
)


def real_disks(disk: Disk) -> Outcome:
    """A small disk is filled, or made read-only, under a training."""
    ends, failures, tried = Counter[str](), list[str](), 0
    small = DISTURBED[:3]
    for number, one in (
        enumerate(DISTURBED if disk.place.whole else small) if disk.can_mount else ()
    ):
        folder, tried = disk.place.folder / f"disk-{number}", tried + 1
        try:
            with small_disk(folder, size="8m", nr_inodes="200"):
                disk.begun(folder, 1)
                ends[_end(_disturb(disk, folder, one))] += 1
        except (AssertionError, OSError) as error:
            failures.append(f"{one.what}: {one_line(error)[-400:]}")
    return Outcome(
        "in mid-run, a small disk is full, read-only, without inodes; with room again, exact",
        tried, tried - len(failures), LOST, dict(ends) | disk.untried(), failures,
    )  # fmt: skip


def _end(went_on: bool) -> str:
    return "went on to the end" if went_on else "stopped with exit code 74"


def _disturb(disk: Disk, folder: Path, one: Disturbed) -> bool:
    """Whether the training went on."""
    (child,) = disk.start(folder, 1, still="training")
    wait_still(child)
    with one.change(folder, child):
        child.kill(signal.SIGCONT)
        wait_until(lambda: "is not saved" in child.said(), 120, "failed save")
        if not one.mended:
            assert not disk.went_on(folder, [child]), "it has ended as if all was well"
    went_on = disk.went_on(folder, [child])
    assert disk.finish(folder, 1) == disk.untouched[1], "not exact"
    return went_on


def failing_calls(disk: Disk, processes: int) -> Outcome:
    """System calls on the files of a training fail: once, some times in a row, or from then on."""
    draw, figures = random.Random(processes), Counter[str]()
    failures, tried = missing(), 0
    many = disk.place.many(60, 6) if processes == 1 else disk.place.many(12, 1)
    for number in range(0 if failures else many):
        call = list(FAULTS)[number % len(FAULTS)]
        error, first = draw.choice(FAULTS[call]), draw.randint(1, 6)
        last = draw.choice(["", f"..{first + draw.randint(1, 8)}", "+"])
        if number == 0:
            first, last = 1, "+"  # no save succeeds
        folder, tried = disk.place.folder / f"calls-{processes}-{number}", tried + 1
        try:
            run = disk.begun(folder, processes)
            children = disk.start(folder, processes, still="training")
            inject = f"inject={call}:error={error}:when={first}{last}"
            options = ("-o", os.devnull, "-e", f"trace={call}", "-e", inject)
            with traced(children[0], *options, *_paths(run)):
                figures[_end(disk.went_on(folder, children))] += 1
            figures["saves that failed"] += children[0].said().count("is not saved")
            assert disk.finish(folder, processes) == disk.untouched[processes], "not exact"
        except (AssertionError, OSError) as problem:
            failures.append(f"{call} {first}{last}, {error}: {one_line(problem)[-400:]}")
    return Outcome(
        f"in mid-run, {processes} process{'es' * (processes > 1)}: write, fsync, rename, mkdir or "
        "open fails with ENOSPC, EDQUOT, EIO, EROFS; later on, exact",
        tried, tried - len(failures), LOST, dict(figures), failures,
    )  # fmt: skip


def _paths(run: Path) -> Iterator[str]:
    """strace's options for what is written in a run folder."""
    yield from ("-P", str(run), "-P", str(run / "checkpoints"))
    for name in ("metrics.jsonl", ".result.json.new", "result.json"):
        yield from ("-P", str(run / name))
    for step in range(EVERY, STEPS + 1, EVERY):
        final = checkpoint.place(run / "checkpoints", step)
        hidden = final.with_name(f".{final.name}.new")
        yield from ("-P", str(final), "-P", str(hidden))
        for name in (checkpoint.MANIFEST, "state.json", *TENSORS):
            yield from ("-P", str(hidden / name))
