"""What a training holds at the start of each epoch does not grow: memory, Python objects, files.

The memory is what malloc has handed out and not got back, to the byte: what is resident moves by
tens of MiB with the holes of its heap, which hide a leak as well as they feign one.
"""

import ctypes
import gc
import json
import math
import statistics
import sys
from pathlib import Path

import psutil

from faults.core import TINY, Outcome, Place, nursery

TITLE = "What a training holds, from epoch to epoch"
SETTLED = 2  # epochs after which what is used again and again is there
# What is held: its growth an epoch, and its most less its least, at most.
BOUNDS = {
    "memory in use, MiB": (0.01, math.inf),
    "Python objects": (200, math.inf),
    "open files": (0.5, 2),
    "threads": (0.5, 2),
}


class _Mallinfo2(ctypes.Structure):
    """The C library's own account, mallinfo(3), in bytes and counts."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost",
    )]  # fmt: skip


def note_held(file: Path) -> None:
    """Add a row: what this process holds now."""
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    now, process = mallinfo2(), psutil.Process()
    row = {
        "memory in use, MiB": (now.uordblks + now.hblkhd) / 2**20,
        "Python objects": sys.getallocatedblocks(),
        "open files": process.num_fds(),
        "threads": process.num_threads(),
    }
    with file.open("a") as rows:
        rows.write(json.dumps(row) + "\n")


def run(place: Place) -> list[Outcome]:
    epochs, file = place.many(60, 6), place.folder / "held"
    faults = {"held": str(file), "train": place.many(10_000, 4_000)}
    with nursery(place.folder / "logs") as nurse:
        nurse.run([
            *TINY, "--epochs", str(epochs),
            "--ema-decay", "0.9", "--dropout", "0.1", "--checkpoint-every", "20", "--name", "held",
            "--runs-dir", str(place.folder / "runs"), "--data-dir", str(place.data_dir),
        ], seconds=3600, faults=faults)  # fmt: skip
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == epochs
    return [_outcome(name, [row[name] for row in rows]) for name in BOUNDS]


def _outcome(name: str, held: list[float]) -> Outcome:
    """Of what one epoch after the other holds, whether it grows."""
    settled = held[SETTLED:]
    growth = statistics.linear_regression(range(len(settled)), settled).slope
    slope, spread = BOUNDS[name]
    steady = growth <= slope and max(settled) - min(settled) <= spread
    return Outcome(
        name,
        tried=1,
        survived=int(steady),
        lost=f"{growth:+.4f} an epoch",
        figures={"epochs": len(held), "at most": round(max(held), 1)},
        failures=[] if steady else [f"{held}"],
    )
