"""The cache of data sets, filled by many processes at once while things go wrong."""

import gzip
import hashlib
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from distcv.data import DATASETS
from distcv.data.cache import load_arrays
from distcv.data.readers import Arrays, idx_header
from faults.core import Outcome, Place
from faults.fetcher import Order, load
from support.data_files import sha256, spoil
from support.forked import forked
from support.loopback import DEAD, Loopback, loopback

TITLE = "The data cache"
PROCESSES = 8
NAMES = [name for name, _ in DATASETS["mnist"].files]
WAIT = 120.0  # seconds for eight processes, on a machine that is busy with other things


class Served(NamedTuple):
    """A data set as a mirror has it, its row, and what its parts have to be."""

    files: dict[str, bytes]
    row: dict[str, Any]
    sums: str


def served(mnist: Arrays, train: int, test: int) -> Served:
    """The first images of MNIST."""
    parts = Arrays(
        mnist.train_images[:train], mnist.train_labels[:train],
        mnist.test_images[:test], mnist.test_labels[:test],
    )  # fmt: skip
    idx = [idx_header(tuple(n for n in p.shape if n > 1)) + p.tobytes() for p in parts]
    row = {"train": train, "test": test, "sums": tuple(map(sha256, idx)), "npm": None}
    sums = " ".join(["sums", *(hashlib.sha256(part).hexdigest() for part in parts)])
    zipped = {f"/mnist/{n}": gzip.compress(d, 1) for n, d in zip(NAMES, idx, strict=True)}
    return Served(zipped, row, sums)


class Trial:
    """Eight processes that ask for one data set at once."""

    def __init__(self, folder: Path, data: Served, server: Loopback) -> None:
        self.folder, self.data, self.server = folder, data, server
        (folder / "said").mkdir(parents=True)
        self.processes: list[Any] = []

    def start(self, count: int = PROCESSES, **fields: Any) -> None:
        begin = time.time() + 0.2
        for _ in range(count):
            said = self.folder / "said" / str(len(self.processes))
            order = Order(
                self.folder / "data", said, self.data.row, self.server.url, begin, **fields
            )
            self.processes.append(forked(load, order))

    def said(self, number: int) -> str:
        file = self.folder / "said" / str(number)
        return file.read_text() if file.exists() else ""

    def kill_fetching(self, chance: random.Random) -> int | None:
        """Kill the process that fetches, at some instant; its number, or None if all have ended."""
        wait = chance.random() * 0.4
        while any(process.is_alive() for process in self.processes):
            for number, process in enumerate(self.processes):
                if "fetching" in self.said(number) and process.is_alive():
                    time.sleep(wait)
                    process.kill()
                    process.join()
                    return number
            time.sleep(0.002)
        return None

    def end(self) -> Counter[str]:
        """How many have right bytes, were refused, killed; and what must never be."""
        deadline = time.monotonic() + WAIT
        ends = Counter[str]()
        for number, process in enumerate(self.processes):
            process.join(max(0.1, deadline - time.monotonic()))
            lines = self.said(number).splitlines() or [""]
            if lines[-1] == self.data.sums:
                ends["right"] += 1
            elif lines[-1].startswith("sums"):
                ends["WRONG BYTES"] += 1
            elif process.exitcode == 2 and lines[-1].startswith("refused"):
                ends["refused"] += 1
            else:
                ends["killed" if process.exitcode == -9 else f"ended by {process.exitcode}"] += 1
            process.kill()
        return ends

    def again(self) -> str | None:
        """What is wrong with the folder afterwards, if anything: a new process must do with it."""
        self.server.files = dict(self.data.files)
        self.start(1)
        ends = self.end()
        if "sums" not in self.said(len(self.processes) - 1):
            return f"no bytes afterwards: {self.said(len(self.processes) - 1)[-200:]}"
        left = [path.name for path in (self.folder / "data/distcv").glob(".*")]
        return f"left behind: {left}" if left or "WRONG BYTES" in ends else None


def trial(
    place: Place, name: str, data: Served, count: int,
    disturb: Callable[[Trial, random.Random], None], allowed: set[str],
) -> Outcome:  # fmt: skip
    """So many trials, each disturbed in its way; they may end in these ways alone."""
    chance, totals, failures = random.Random(12), Counter[str](), []
    for number in range(count):
        with loopback(dict(data.files)) as server:
            one = Trial(place.folder / name.replace(" ", "-") / str(number), data, server)
            disturb(one, chance)
            ends = one.end()
            if ends.keys() - allowed:
                wrong: str | None = f"processes ended: {dict(ends)}"
            elif disturb is nothing and set(server.requests.values()) != {1}:
                wrong = f"asked for more than once: {dict(server.requests)}"
            else:
                wrong = one.again()
        totals += ends
        if wrong:
            failures.append(f"trial {number}: {wrong}")
    lost = "nothing: no wrong byte was handed out" if not failures else "see the failures"
    figures = {f"processes {end}": totals[end] for end in sorted(totals)}
    return Outcome(name, count, count - len(failures), lost, figures, failures)


# What goes wrong


def nothing(one: Trial, chance: random.Random) -> None:
    one.start()


def killed(one: Trial, chance: random.Random) -> None:
    one.server.pause = 0.02
    one.start()
    one.kill_fetching(chance)


def killed_twice(one: Trial, chance: random.Random) -> None:
    killed(one, chance)
    one.kill_fetching(chance)


def bad_cache(one: Trial, chance: random.Random) -> None:
    """A byte, of the data or of the note, is another than when it was written."""
    one.start(1)
    assert one.end() == {"right": 1}
    file = one.folder / "data/distcv" / chance.choice(["mnist.uint8", "mnist.uint8", "mnist.json"])
    data = bytearray(file.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)
    one.start()


def lies(data: Served, chance: random.Random) -> dict[str, bytes]:
    """The files with one of them other than it should be."""
    name = chance.choice(sorted(data.files))
    right = data.files[name]
    place = chance.randrange(len(right))
    flipped = bytearray(gzip.decompress(right))
    flipped[chance.randrange(16, len(flipped)) if len(flipped) > 16 else 8] ^= 1
    other = chance.choice(sorted(set(data.files) - {name}))
    lie = chance.choice([
        right[:place] + bytes([right[place] ^ 1 << chance.randrange(8)]) + right[place + 1 :],
        gzip.compress(bytes(flipped), 1),
        spoil(right),
        right[:place],
        b"",
        b"<html><title>Log in</title></html>",
        gzip.compress(b"<html>"),
        data.files[other],
        right + b"\0",
        bytes(1 << 25),
    ])  # fmt: skip
    return {**data.files, name: lie}


def lying(one: Trial, chance: random.Random) -> None:
    one.server.files = lies(one.data, chance)
    one.start()


def lying_at_first(one: Trial, chance: random.Random) -> None:
    """The next process that asks is told the truth."""
    one.server.files, one.server.pause = lies(one.data, chance), 0.01
    one.start()
    while not any("could not be had" in one.said(n) for n in range(PROCESSES)):
        if not any(process.is_alive() for process in one.processes):
            return
        time.sleep(0.002)
    one.server.files = dict(one.data.files)


def full_disk(one: Trial, chance: random.Random) -> None:
    """Three of the processes can't write so much, wherever it stops them."""
    size = sum(map(len, one.data.files.values()))
    one.start(3, largest_file=chance.randrange(size))
    one.start(PROCESSES - 3)


def trained(place: Place, data: Served) -> Outcome:
    """Trainings whose mirror has one wrong byte, or whose cache has."""
    failures = []
    flags = ["--model", "gap", "--max-steps", "1", "--runs-dir", str(place.folder / "runs")]
    with loopback(dict(data.files)) as server:
        name = f"/mnist/{NAMES[0]}"
        server.files[name] = gzip.compress(spoil(gzip.decompress(data.files[name])), 1)
        nowhere = {"PATH": "/nonexistent", "https_proxy": DEAD, "no_proxy": "127.0.0.1"}
        env = os.environ | {"DISTCV_MIRROR": server.url, "OMP_NUM_THREADS": "1"} | nowhere

        def train() -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "distcv.train", *flags]
            more = ["--data-dir", str(place.folder / "trained"), "--name", "r"]
            return subprocess.run([*command, *more], env=env, capture_output=True, text=True)

        first = train()
        steps = (place.folder / "runs/r/metrics.jsonl").exists()
        if first.returncode != 2 or "SHA-256 is" not in first.stderr or steps:
            failures.append(f"a lying mirror: exit {first.returncode}, {first.stderr[-300:]}")
        server.files = dict(data.files)
        load_arrays(DATASETS["mnist"], place.data_dir, print)
        second = train()
        if second.returncode != 0:
            failures.append(f"an honest one: exit {second.returncode}, {second.stderr[-300:]}")
    return Outcome("a training with a lying mirror", 1, 1 - len(failures), "nothing", {}, failures)


def kills(place: Place) -> list[Outcome]:
    """Nothing goes wrong, or those that fetch are killed."""
    data, (few, many) = small(place), (place.many(50, 2), place.many(50, 3))
    told = {"right", "killed"}
    return [
        trial(place, "8 processes at once", data, few, nothing, {"right"}),
        trial(place, "the one that fetches is killed", data, many, killed, told),
        trial(place, "two of them, one after the other", data, few, killed_twice, told),
    ]


def wrong_bytes(place: Place) -> list[Outcome]:
    """What is served, or was kept, is not what it should be, or can't be kept."""
    data, (few, many) = small(place), (place.many(50, 2), place.many(50, 3))
    told = {"right", "refused"}
    return [
        trial(place, "a changed byte in the cache", data, few, bad_cache, {"right"}),
        trial(place, "a lying mirror", data, many, lying, told),
        trial(place, "a mirror that lies at first", data, few, lying_at_first, told),
        trial(place, "a disk that is full for three", data, few, full_disk, told),
    ]


def whole_mnist(place: Place) -> list[Outcome]:
    """The data set as it is, and a training of it."""
    mnist = load_arrays(DATASETS["mnist"], place.data_dir, print)
    data, count = served(mnist, 60_000, 10_000), place.many(5, 1)
    return [
        trial(place, "the whole MNIST, one killed", data, count, killed, {"right", "killed"}),
        trained(place, data),
    ]


def small(place: Place) -> Served:
    return served(load_arrays(DATASETS["mnist"], place.data_dir, print), 600, 100)


def run(place: Place) -> list[Outcome]:
    """Whoever gets bytes gets the right ones; whoever can't is told so."""
    return [*kills(place), *wrong_bytes(place), *whole_mnist(place)]
