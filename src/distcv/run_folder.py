"""The run folder: what a run writes, and goes on from."""

import itertools
import json
import os
import secrets
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import filelock

from distcv.command_line import RunOptions
from distcv.config import InputError, Recipe, check_same_recipe
from distcv.environment import describe_environment, slurm_job
from distcv.runtime import Runtime


class RunFolder:
    """``runs/<name>/``: config.yaml, environment.json, metrics.jsonl, checkpoints/, result.json.

    Raises:
        InputError: not writable, in use by a live process, or started with another recipe.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.result = path / "result.json"
        self.lock = filelock.FileLock(path / "lock")

    def open(self, recipe: Recipe) -> None:
        """Create the folder or return to it, and hold it until this process ends."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # After a requeue, the processes of the job before may take a moment to end.
            job = slurm_job()
            self.lock.acquire(timeout=60 if job and job[1] else 0)
        except filelock.Timeout:
            raise InputError(
                f"run folder {self.path} is in use by another process: wait, or choose --name"
            ) from None
        except OSError as error:
            raise InputError(
                f"run folder {self.path}: {error.strerror}: choose --runs-dir"
            ) from None
        config = self.path / "config.yaml"
        if config.exists():
            check_same_recipe(self.path, recipe)
        else:
            self._write(config, recipe.to_yaml())

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
        starts = json.loads(path.read_text())["starts"] if path.exists() else []
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
        self._write(path, json.dumps({"starts": starts}, indent=1))
        if (idle := _idle_requeues(starts)) > options.idle_requeues:
            raise InputError(
                f"job {start['slurm']['job']} was requeued {idle} times without a new checkpoint "
                f"(it is at {start['resumes'] or 'the start'}): give it more time, a smaller "
                "--checkpoint-every, or more --idle-requeues"
            )
        return start

    def cut_metrics(self, step: int) -> None:
        """Drop rows of steps after ``step``, which a resumed run will write again."""
        if self.metrics.exists():
            rows = self.metrics.read_text().splitlines(keepends=True)
            self._write(self.metrics, "".join(row for row in rows if _row_step(row) <= step))

    def add_row(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json."""
        self._write(self.result, json.dumps(result, indent=1) + "\n")

    def read_result(self) -> dict[str, Any] | None:
        """The result of a finished run, or None."""
        if not self.result.exists():
            return None
        return dict(json.loads(self.result.read_text()))

    def tracker_id(self) -> str:
        """An id for this run in trackers, the same after every restart; a W&B agent gives its own.

        The agent of a sweep sets ``WANDB_RUN_ID``.
        """
        path = self.path / "tracker.json"
        if not path.exists():
            new = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(6)
            self._write(path, json.dumps({"id": new}))
        return str(json.loads(path.read_text())["id"])

    @staticmethod
    def _write(path: Path, text: str) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text)
        temporary.replace(path)


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


def _row_step(row: str) -> float:
    """The step of a row; infinity for one that was cut off in writing."""
    try:
        return float(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
