"""The run folder: what a run writes, and goes on from."""

import contextlib
import itertools
import json
import os
import secrets
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from distcv.command_line import RunOptions
from distcv.config import InputError, Recipe, check_same_recipe
from distcv.durable import make_folder, replace_file, set_aside, sync
from distcv.environment import describe_environment, slurm_job
from distcv.lease import InUse, Lease
from distcv.runtime import Runtime

T = TypeVar("T")


class RunFolder:
    """``runs/<name>/``: config.yaml, environment.json, metrics.jsonl, checkpoints/, result.json.

    Raises:
        InputError: in use by a live process, or started with another recipe.
        OSError: it can't be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.result = path / "result.json"
        self.lease = Lease(path)
        self.whole_rows = 0  # bytes of metrics.jsonl; a row that was cut may come after them
        self.unwritten = b""  # rows for which there was no room yet

    def open(self, recipe: Recipe, say: Callable[[str], None]) -> None:
        """Create the folder or return to it, and hold it until it is closed.

        ``say`` gets a line for each damaged file that is not used, and one if the folder was a dead
        process's on another host.
        """
        self.say = say
        make_folder(self.checkpoints)
        try:
            # After a requeue, the processes of the job before may take a moment to end.
            job = slurm_job()
            self.lease.take(60 if job and job[1] else 0, say)
        except InUse as holder:
            raise InputError(
                f"run folder {self.path} is in use by another process{holder}: wait, or choose "
                "--name"
            ) from None
        config = self.path / "config.yaml"
        if config.exists():
            check_same_recipe(self.path, recipe)
        else:
            replace_file(config, recipe.to_yaml().encode())
        self.tracker_id = self._tracker_id()

    def close(self) -> None:
        """Let others have the folder."""
        self.lease.release()

    def record_start(
        self, options: RunOptions, runtime: Runtime, newest: Path | None
    ) -> dict[str, Any]:
        """Add this start to environment.json, with what is other than at the one before.

        After a restart by the launcher, also the seconds lost: since the checkpoint that is gone on
        from, or since the former start.

        Raises:
            InputError: Slurm has requeued the job too often without a new checkpoint.
        """
        path = self.path / "environment.json"
        starts = self._read(path, lambda held: [_start(one) for one in held["starts"]]) or []
        now = time.time()
        start: dict[str, Any] = describe_environment() | runtime.record()
        start |= {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(now)),
            "options": options.model_dump(mode="json"),
            "resumes": newest.name if newest else None,
        }
        if starts:
            start["changed"] = _differences(starts[-1], start)
        if starts and runtime.restarts:
            began = datetime.fromisoformat(starts[-1]["time"]).timestamp()
            start["seconds_lost"] = now - (newest.stat().st_mtime if newest else began)
        if job := slurm_job():
            start["slurm"] = {"job": job[0], "requeues": job[1]}
        starts.append(start)
        replace_file(path, _json({"starts": starts}))
        if (idle := _idle_requeues(starts)) > options.idle_requeues:
            raise InputError(
                f"job {start['slurm']['job']} was requeued {idle} times without a new checkpoint "
                f"(it is at {start['resumes'] or 'the start'}): give it more time, a smaller "
                "--checkpoint-every, or more --idle-requeues"
            )
        return start

    def take_room(self, size: int) -> None:
        """Take so many bytes of the disk, where the system can, and give them back at once.

        Raises:
            OSError: they can't be had.
        """
        if not hasattr(os, "posix_fallocate"):
            return
        scratch = self.path / ".room"
        try:
            with scratch.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        finally:
            scratch.unlink(missing_ok=True)

    def cut_metrics(self, step: int, *, evaluation_due: bool = False) -> None:
        """Drop rows that a run resumed after ``step`` will write again.

        Those are the rows of later steps; where the evaluation after ``step`` is due, its too.
        """
        last = step, not evaluation_due
        written = self.metrics.read_bytes() if self.metrics.exists() else b""
        kept = _rows_to(last, written)
        replace_file(self.metrics, kept)
        self.whole_rows, self.unwritten = len(kept), _rows_to(last, self.unwritten)

    def add_row(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl, or keep it until there is room."""
        self.unwritten += json.dumps(row).encode() + b"\n"
        with contextlib.suppress(OSError):
            self._write_rows()

    def sync_rows(self) -> None:
        """See that all rows are on the disk.

        Raises:
            OSError: they can't be written yet, and are kept.
        """
        self._write_rows()
        sync(self.metrics)

    def _write_rows(self) -> None:
        self.lease.check()
        with self.metrics.open("ab") as file:
            file.truncate(min(self.whole_rows, file.tell()))
            file.write(self.unwritten)
            end = file.tell()
        self.whole_rows, self.unwritten = end, b""

    def rows(self) -> list[dict[str, Any]]:
        """The rows so far."""
        written = self.metrics.read_bytes()[: self.whole_rows]
        return [json.loads(row) for row in (written + self.unwritten).splitlines()]

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json."""
        self.lease.check()
        replace_file(self.result, _json(result))

    def read_result(self) -> dict[str, Any] | None:
        """The result of a finished run, or None."""
        figures = "test_accuracy", "epochs"
        return self._read(
            self.result, lambda held: held | {name: float(held[name]) for name in figures}
        )

    def _tracker_id(self) -> str:
        """An id for this run in trackers, the same after every restart; a W&B agent gives its own.

        The agent of a sweep sets ``WANDB_RUN_ID``. A new id gets all rows so far.
        """
        path = self.path / "tracker.json"
        tracker_id = self._read(path, lambda held: str(held["id"]))
        if tracker_id is None:
            tracker_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(6)
            replace_file(path, _json({"id": tracker_id}))
        return tracker_id

    def _read(self, path: Path, part: Callable[[Any], T]) -> T | None:
        """Part of a JSON file, or None; a damaged one is renamed and reported."""
        try:
            return part(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            aside = set_aside(path, "bad")
            self.say(f"{path} is damaged ({error!r}): kept as {aside.name}, not used")
            return None


def _json(held: dict[str, Any]) -> bytes:
    return json.dumps(held, indent=1).encode() + b"\n"


def _start(held: dict[str, Any]) -> dict[str, Any]:
    """One start in environment.json, as far as the next one asks."""
    datetime.fromisoformat(held["time"])
    return {"resumes": held["resumes"], **held}


def _idle_requeues(starts: list[dict[str, Any]]) -> int:
    """Requeues since the last one that found a new checkpoint."""
    place = [(start.get("slurm", {}).get("job"), start["resumes"]) for start in starts]
    same = itertools.takewhile(lambda i: place[i] == place[-1], reversed(range(len(starts))))
    return len({starts[i].get("slurm", {}).get("requeues") for i in same}) - 1


def _differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """What two starts do not share, as [before, now]; options and versions one by one."""

    def flat(start: dict[str, Any]) -> dict[str, Any]:
        inner: dict[str, Any] = start.get("options", {}) | start.get("versions", {})
        passing = {"time", "options", "versions", "resumes", "changed", "seconds_lost", "restarts",
                   "slurm"}  # fmt: skip
        return {k: v for k, v in start.items() if k not in passing} | inner

    old, new = flat(before), flat(now)
    return {k: [old.get(k), v] for k, v in new.items() if old.get(k) != v}


def _rows_to(last: tuple[float, bool], rows: bytes) -> bytes:
    return b"".join(row + b"\n" for row in rows.splitlines() if _row_place(row) <= last)


def _row_place(row: bytes) -> tuple[float, bool]:
    """The step of a row, and whether it tells of the evaluation after it; the last if no row."""
    try:
        held = json.loads(row)
        return float(held["step"]), held["event"] == "epoch"
    except (ValueError, KeyError, TypeError):
        return float("inf"), True
