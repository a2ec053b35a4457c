"""``distcv.train`` as it is, with hooks for the fault suites: ``python -m faults.worker FLAGS``.

The variable FAULTS holds a JSON object; each key is a hook:

- ``ids``: folder; each start leaves ``START-rank-RANK.jsonl`` there, the sample ids of each step.
- ``mark``: file; gets a line at the start of each phase: init (before the processes are joined),
  training, evaluation, saving, saved (after it), last (at the end of the last step).
- ``hold``: {phase: seconds}; how long to wait at the first start of that phase.
- ``spoil``, ``without``: see ``spoil.py``.
- ``host``: {name, clock, beat}; as on another host of that name, whose clock is off by so many
  seconds: it is alone with its locks, as on a file system where each node locks for itself. A beat
  of a run folder's lease takes so many seconds.
- ``still``: a phase, at the first start of which the process stops until it gets a SIGCONT.
- ``saves``: a run folder; instead of a training, step 30 is saved there twice.
- ``held``: file; gets a row at the start of each epoch: what the process holds, see ``memory.py``.
- ``train``: so many training samples instead of all that the synthetic set has.
- ``tracked``: file; gets a line for each row: the seconds for which the trackers held up the
  training, and those for which it had no processor until then.
"""

import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from faults.memory import note_held
from faults.spoil import spoil, without


def main(flags: list[str]) -> None:
    """Install the hooks, then train; leaves by SystemExit with the exit code."""
    faulthandler.enable()
    faults = json.loads(os.environ.get("FAULTS", "{}"))
    import distcv.checkpoint
    import distcv.loop
    import distcv.runtime
    import distcv.train
    from distcv.command import run_command
    from distcv.data import DATASETS

    rank = int(os.environ.get("RANK", "0"))
    held: set[str] = set()

    def phase(name: str) -> None:
        if "mark" in faults and rank == 0:
            with Path(faults["mark"]).open("a") as file:
                file.write(name + "\n")
        if name not in held:
            held.add(name)
            if faults.get("still") == name:
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(faults.get("hold", {}).get(name, 0))

    def before(owner: Any, attribute: str, name: str) -> None:
        original = getattr(owner, attribute)

        def hooked(*args: Any, **kwargs: Any) -> Any:
            phase(name)
            value = original(*args, **kwargs)
            if name == "saving":
                phase("saved")
            return value

        setattr(owner, attribute, hooked)

    if "spoil" in faults:
        spoil(rank, **faults["spoil"])
    if "without" in faults:
        without(**faults["without"])
    if "train" in faults:
        DATASETS["synthetic"] = replace(DATASETS["synthetic"], train=faults["train"])
    if "tracked" in faults:
        time_trackers(Path(faults["tracked"]))
    if "host" in faults:
        be_host(**faults["host"])
    train_epoch: Callable[..., bool] = distcv.loop.train_epoch
    number = [0]

    def hooked_epoch(training: Any, progress: Any, **kwargs: Any) -> bool:
        phase("training")
        if "held" in faults:
            note_held(Path(faults["held"]))
        advance = kwargs["advance"]

        def hooked_advance() -> None:
            advance()
            if progress.step == training.total_steps:
                phase("last")

        kwargs["advance"] = hooked_advance
        if "ids" in faults:
            if number[0] == 0:
                number[0] = 1 + sum(1 for _ in Path(faults["ids"]).glob(f"*-rank-{rank}.jsonl"))
            file = Path(faults["ids"]) / f"{number[0]}-rank-{rank}.jsonl"
            training.train_loader = Noted(training, progress.step, file)
        try:
            return train_epoch(training, progress, **kwargs)
        finally:
            if "ids" in faults:
                training.train_loader = training.train_loader.loader

    distcv.loop.train_epoch = hooked_epoch
    before(distcv.runtime, "Runtime", "init")
    before(distcv.loop, "evaluate", "evaluation")
    before(distcv.checkpoint, "save", "saving")
    if "ids" in faults:
        Path(faults["ids"]).mkdir(parents=True, exist_ok=True)
    if "saves" in faults:
        phase("saving")
        saves(Path(faults["saves"]))
        sys.exit(0)
    sys.argv = ["distcv.train", *flags]
    run_command(distcv.train.main)


def be_host(name: str, clock: float, beat: float) -> None:
    """Be a process on this host; its clock is off by ``clock`` seconds."""
    import fcntl
    import socket

    import distcv.lease

    now = time.time
    time.time = lambda: now() + clock
    socket.gethostname = lambda: name
    fcntl.flock = lambda descriptor, operation: None
    distcv.lease.BEAT_SECONDS = beat


def saves(run: Path) -> None:
    """Save step 30 twice, with other weights; tell after each."""
    import torch

    from distcv import checkpoint
    from distcv.run_folder import RunFolder

    folder = RunFolder(run)
    for number in (1, 2):
        folder.add_row({"step": 30})
        folder.sync_rows()
        held = checkpoint.Checkpoint({"model": {"w": torch.full((5000,), number)}}, {})
        checkpoint.save(folder.checkpoints, 30, held)
        print("saved", flush=True)
        checkpoint.prune(folder.checkpoints, keep=set())


def time_trackers(file: Path) -> None:
    """Note how long each row takes the training, and how long it has had no processor."""
    from distcv.tracking import Trackers
    from support.clock import run_queue_seconds, unhindered_seconds

    log = Trackers.log

    def timed(self: Any, row: dict[str, Any]) -> None:
        began = unhindered_seconds()
        log(self, row)
        with file.open("a") as lines:
            lines.write(f"{unhindered_seconds() - began} {run_queue_seconds()}\n")

    Trackers.log = timed  # type: ignore[method-assign]


class Noted:
    """Stands before a training's loader and writes down the samples of each step."""

    def __init__(self, training: Any, step: int, file: Path) -> None:
        self.loader, self.step, self.file = training.train_loader, step, file
        self.parts = training.recipe.gradient_accumulation_steps

    def __iter__(self) -> Iterator[Any]:
        with self.file.open("a") as file:
            for part, batch in enumerate(self.loader):
                row = {"step": self.step + part // self.parts, "ids": batch.host_ids.tolist()}
                file.write(json.dumps(row) + "\n")
                file.flush()
                yield batch


if __name__ == "__main__":
    main(sys.argv[1:])
