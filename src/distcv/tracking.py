"""What a run leaves behind and shows: the run folder, the console, W&B and TensorBoard."""

import contextlib
import itertools
import json
import netrc
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import filelock
from tqdm import tqdm

from distcv.command_line import RunOptions
from distcv.config import InputError, Recipe, load_recipe
from distcv.environment import describe_environment, slurm_job
from distcv.preempt import STOPPED
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
            self._check_same(load_recipe(config), recipe)
        else:
            self._write(config, recipe.to_yaml())

    def _check_same(self, before: Recipe, now: Recipe) -> None:
        old, new = before.model_dump(), now.model_dump()
        for name in old:
            if old[name] != new[name]:
                raise InputError(
                    f"run folder {self.path} was started with {name} {old[name]}, now it is "
                    f"{new[name]}: choose another --name, or the same recipe to go on"
                )

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


class Console:
    """The main process's output: a live bar and a line per epoch; without a terminal, lines."""

    QUIET_SECONDS = 30.0  # without a terminal, at most one line in this time besides the epochs'

    def __init__(self, runtime: Runtime, recipe: Recipe) -> None:
        self.shown = runtime.is_main
        self.live = self.shown and sys.stderr.isatty()
        self.epochs, self.batch_size = recipe.epochs, recipe.batch_size
        self.bar: tqdm[Any] | None = None
        self.last_line = time.monotonic()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self.shown:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
            self.last_line = time.monotonic()

    @contextlib.contextmanager
    def epoch(self, epoch: int, done: int, steps: int) -> Iterator[None]:
        """Show a bar over the steps of one epoch (numbered from 1)."""
        self.bar = tqdm(
            desc=f"epoch {epoch}/{self.epochs}",
            initial=done * self.batch_size,
            total=steps * self.batch_size,
            unit=" images",
            unit_scale=True,
            leave=False,
            disable=not self.live,
            dynamic_ncols=True,
        )
        with self.bar:
            yield
        self.bar = None

    def advance(self) -> None:
        """One optimizer step is done."""
        if self.bar is not None:
            self.bar.update(self.batch_size)

    def training(self, row: dict[str, Any]) -> None:
        """Show a row of training metrics."""
        words = f"loss {row['loss']:.4f}  accuracy {row['accuracy']:.2f} %  lr {row['lr']:.4g}"
        if self.live and self.bar is not None:
            self.bar.set_postfix_str(words, refresh=False)
        elif self.shown and time.monotonic() - self.last_line > self.QUIET_SECONDS:
            rate = f"{row['images_per_second']:,.0f} images/s"
            self.say(f"step {row['step']}  epoch {row['epoch']:.2f}  {words}  {rate}")

    def epoch_line(self, row: dict[str, Any]) -> None:
        """Show the figures at the end of an epoch."""
        self.say(
            f"epoch {round(row['epoch'], 2):g}/{self.epochs}  "
            f"train: loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.2f} %  "
            f"test: loss {row['test_loss']:.4f}, accuracy {row['test_accuracy']:.2f} %  "
            f"best {row['best_test_accuracy']:.2f} %  {row['seconds']:.1f} s"
        )


class Trackers:
    """W&B and TensorBoard on the main process, through Accelerate; they never stop a training."""

    def __init__(
        self,
        runtime: Runtime,
        folder: RunFolder,
        recipe: Recipe,
        options: RunOptions,
        console: Console,
    ) -> None:
        self.runtime = runtime
        self.first_step = 0  # W&B has the rows of the steps before it
        self.names: list[str] = []
        if not (options.track and runtime.is_main):
            return
        self.names = sorted(options.track, reverse=True)  # W&B first: only it can fail to start
        init: dict[str, dict[str, Any]] = {}
        if "wandb" in self.names:
            init["wandb"] = _wandb_settings(folder, recipe, options)
        try:
            runtime.start_trackers(self.names, options.project, folder.path / "tensorboard", init)
        except Exception as error:  # a dead server must not end a training
            if "wandb" not in init:
                raise
            console.say(f"W&B is out of reach ({type(error).__name__}): going on offline")
            _go_offline(init["wandb"])
            runtime.start_trackers(self.names, options.project, folder.path / "tensorboard", init)
        if "wandb" in self.names:
            run = runtime.tracker("wandb")
            run.define_metric("epoch")
            run.define_metric("val/*", step_metric="epoch")
            if folder.metrics.exists():  # not the first start
                self.first_step = _first_missing_step(run, folder)
                for row in map(json.loads, folder.metrics.read_text().splitlines()):
                    if row["step"] >= self.first_step:
                        run.log(_tracked(row), step=row["step"])
        if "tensorboard" in self.names:
            text = f"```yaml\n{recipe.to_yaml()}```"
            runtime.tracker("tensorboard").add_text("recipe", text, 0)

    def log(self, row: dict[str, Any]) -> None:
        """Send a row of metrics.jsonl, unless it was sent before the run was killed."""
        if self.names and row["step"] >= self.first_step:
            self.runtime.track(_tracked(row), step=row["step"])

    def close(self, *, stopped: bool = False) -> None:
        """Finish; a stopped run is marked as to be continued.

        A sweep hands such a run out again, but only if its exit code is not 0.
        """
        if "wandb" in self.names and stopped:
            run = self.runtime.tracker("wandb")
            run.mark_preempting()
            run.finish(exit_code=STOPPED)
        self.runtime.end_trackers()


def _tracked(row: dict[str, Any]) -> dict[str, float]:
    """What trackers get of a row of metrics.jsonl."""
    if row["event"] == "train":
        keys = ("loss", "accuracy", "lr", "images_per_second")
        values = {f"train/{key}": row[key] for key in keys}
    else:
        values = {"val/loss": row["test_loss"], "val/accuracy": row["test_accuracy"]}
        # W&B's own summary="max" would forget what was before a restart.
        values["val/best_accuracy"] = row["best_test_accuracy"]
    return values | {"epoch": row["epoch"]}


def _first_missing_step(run: Any, folder: RunFolder) -> int:
    """The first step whose rows W&B lacks: by its server, or offline by the logs on disk.

    A process that is killed takes along what it had not sent (15 s of rows) or written (1 s). And
    no row may be in two logs: ``wandb sync`` would give it another step in the second (0.31).
    """
    logs = folder.path.glob(f"wandb/*run-*-{run.id}/*.wandb")
    if not run.offline:
        for log in logs:
            if log.parent.name.startswith("offline-"):  # not to be synced over what is sent now
                log.with_suffix(".wandb.synced").touch()
        return int(run.starting_step)
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
    env = os.environ | {"WANDB_MODE": "offline"}  # else it looks for the network
    for log in sorted(logs, key=os.path.getmtime, reverse=True):
        shown = subprocess.run([*command, str(log)], env=env, capture_output=True, text=True)
        records = map(json.loads, shown.stdout.splitlines())
        steps = [r["history"]["step"]["num"] for r in records if r["type"] == "history"]
        if steps:
            return int(steps[-1]) + 1
    return 0


def _wandb_settings(folder: RunFolder, recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    """Arguments of ``wandb.init``: online if a key is set, else offline, and never a question."""
    import wandb

    root = str(folder.path.resolve())
    os.environ.setdefault("WANDB_DATA_DIR", root)  # artifacts wait for their sync in the run folder
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
    return {
        "id": folder.tracker_id(),
        "name": folder.path.name,
        "resume": "allow",
        "dir": root,
        "config": recipe.model_dump(mode="json"),
        "group": f"{recipe.model}-{recipe.model_copy(update={'seed': 0}).sha256[:8]}",
        "job_type": "train",
        "tags": [recipe.model, recipe.dataset],
        "mode": mode,
        "settings": wandb.Settings(
            init_timeout=15, finish_timeout=25, x_transaction_log_flush_interval=1
        ),
    }


def _go_offline(settings: dict[str, Any]) -> None:
    import wandb

    wandb.teardown()  # its service still holds the run's id
    settings["mode"] = "offline"


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
