"""What a run shows while it goes on: the console, W&B and TensorBoard."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from distcv.command_line import RunOptions
from distcv.config import Recipe
from distcv.environment import wandb_key
from distcv.preempt import STOPPED
from distcv.run_folder import RunFolder
from distcv.runtime import Runtime


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
        self.runtime, self.folder, self.console = runtime, folder, console
        self.recipe, self.options = recipe, options
        self.first_step = 0  # W&B has the rows of the steps before it
        self.held: dict[str, float] = {}
        # W&B first: only it can fail to start
        self.names = sorted(options.track, reverse=True) if runtime.is_main else []
        if self.names:
            self._open()

    def _open(self) -> None:
        """Start the trackers; send W&B what it lacks of the rows so far."""
        init: dict[str, dict[str, Any]] = {}
        if "wandb" in self.names:
            init["wandb"] = _wandb_settings(self.folder, self.recipe, self.options)
        place = self.options.project, self.folder.path / "tensorboard"
        try:
            self.runtime.start_trackers(self.names, *place, init)
        except Exception as error:  # a dead server must not end a training
            if "wandb" not in init:
                raise
            self.console.say(f"W&B is out of reach ({type(error).__name__}): going on offline")
            _forget_service()
            init["wandb"]["mode"] = "offline"
            self.runtime.start_trackers(self.names, *place, init)
        if "wandb" in self.names:
            run = self.runtime.tracker("wandb")
            run.define_metric("epoch")
            run.define_metric("val/*", step_metric="epoch")
            if self.folder.metrics.exists():  # not the first start
                self.first_step, self.held = _first_missing_step(run, self.folder), {}
                for row in map(json.loads, self.folder.metrics.read_text().splitlines()):
                    self._send(row, run.log)
        if "tensorboard" in self.names:
            text = f"```yaml\n{self.recipe.to_yaml()}```"
            self.runtime.tracker("tensorboard").add_text("recipe", text, 0)

    def log(self, row: dict[str, Any]) -> None:
        """Send a row of metrics.jsonl, unless it was sent before the run was killed."""
        self._attempt(lambda: self._send(row, self.runtime.track))

    def _send(self, row: dict[str, Any], send: Callable[..., None]) -> None:
        if row["step"] < self.first_step:
            return
        self.held |= _tracked(row)
        # W&B takes one row a step: that of an epoch's last step waits for the evaluation, before
        # which the run may be stopped.
        last = row["epoch"] % 1 == 0 or row["step"] == self.recipe.max_steps
        if row["event"] == "epoch" or not last:
            send(self.held, step=row["step"])
            self.first_step, self.held = row["step"] + 1, {}

    def close(self, *, stopped: bool = False) -> None:
        """Finish; a stopped run is marked as to be continued.

        A sweep hands such a run out again, but only if its exit code is not 0.
        """

        def finish() -> None:
            if "wandb" in self.names and stopped:
                run = self.runtime.tracker("wandb")
                run.mark_preempting()
                run.finish(exit_code=STOPPED)
            self.runtime.end_trackers()

        self._attempt(finish)

    def _attempt(self, action: Callable[[], None]) -> None:
        """Do something with the trackers; whatever they raise, the training goes on.

        They are opened once more first. W&B's process, for one, is ended by the SIGTERM that some
        Slurm sites (proctrack/linuxproc) send to all processes of a job.
        """
        if not self.names:
            return
        try:
            try:
                action()
            except Exception:
                _forget_service()
                self._open()
                action()
        except Exception as error:
            self.names = []
            self.console.say(
                f"trackers are given up ({type(error).__name__}): metrics.jsonl goes on without"
            )


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
    mode = os.environ.get("WANDB_MODE") or ("online" if wandb_key() else "offline")
    return {
        "id": folder.tracker_id(),
        "name": folder.path.name,
        "resume": "allow",
        "reinit": "create_new",
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


def _forget_service() -> None:
    """Let go of W&B's process, which may be dead, or still hold the run's id."""
    if "wandb" in sys.modules:
        with contextlib.suppress(Exception):
            sys.modules["wandb"].teardown()
