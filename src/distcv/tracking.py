"""What a run leaves behind and shows: the run folder, the console, W&B and TensorBoard."""

import contextlib
import json
import netrc
import os
import secrets
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
from distcv.environment import describe_environment
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
            self.lock.acquire(timeout=0)
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
        self._write(path, json.dumps({"starts": [*starts, start]}, indent=1))
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
        """An id for this run in trackers, the same after every restart."""
        path = self.path / "tracker.json"
        if not path.exists():
            self._write(path, json.dumps({"id": secrets.token_hex(6)}))
        return str(json.loads(path.read_text())["id"])

    @staticmethod
    def _write(path: Path, text: str) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text)
        temporary.replace(path)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """What two starts do not share, as [before, now]; options and versions one by one."""

    def flat(start: dict[str, Any]) -> dict[str, Any]:
        inner: dict[str, Any] = start.get("options", {}) | start.get("versions", {})
        passing = {"time", "options", "versions", "resumes", "changed", "seconds_lost", "restarts"}
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
        self.names = sorted(options.track, reverse=True)  # W&B first: only it can fail to start
        init: dict[str, dict[str, Any]] = {}
        if "wandb" in self.names and runtime.is_main:
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
            run.define_metric("val/accuracy", step_metric="epoch", summary="max")
        if "tensorboard" in self.names:
            text = f"```yaml\n{recipe.to_yaml()}```"
            runtime.tracker("tensorboard").add_text("recipe", text, 0)

    def log(self, row: dict[str, Any]) -> None:
        """Send a row of metrics.jsonl."""
        if not self.names:
            return
        if row["event"] == "train":
            keys = ("loss", "accuracy", "lr", "images_per_second")
            values = {f"train/{key}": row[key] for key in keys}
        else:
            values = {"val/loss": row["test_loss"], "val/accuracy": row["test_accuracy"]}
        self.runtime.track(values | {"epoch": row["epoch"]}, step=row["step"])

    def close(self, *, stopped: bool = False) -> None:
        """Finish; a stopped run is marked as to be continued."""
        if "wandb" in self.names and stopped:
            self.runtime.tracker("wandb").mark_preempting()
        self.runtime.end_trackers()


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
