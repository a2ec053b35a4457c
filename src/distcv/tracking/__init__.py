"""What a run shows while it goes on: the console here and there, W&B, TensorBoard and trackio."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distcv.command_line import RunOptions
from distcv.config import Recipe
from distcv.preempt import STOPPED
from distcv.run_folder import RunFolder
from distcv.runtime import Runtime
from distcv.tracking import wandb_run
from distcv.tracking.console import Console
from distcv.tracking.stall import StallWatch

__all__ = ["Console", "Trackers"]

ALERT_SECONDS = 2.0  # for an alert to leave, before a process that fails ends


class Trackers:
    """The trackers of a run, on the main process, through Accelerate; they never stop a training.

    Args:
        commit: the commit of the code that trains, or None.
        samples: makes a picture of samples, uint8 (C, H, W), for the first row.
    """

    def __init__(
        self,
        runtime: Runtime,
        folder: RunFolder,
        recipe: Recipe,
        options: RunOptions,
        console: Console,
        *,
        commit: str | None = None,
        samples: Callable[[], Any] | None = None,
    ) -> None:
        self.runtime, self.folder, self.console = runtime, folder, console
        self.recipe, self.options = recipe, options
        self.commit, self.samples = commit, samples
        self.first_step = 0  # W&B has the rows of the steps before it
        self.held: dict[str, Any] = {}
        self.media: dict[str, Any] = {}  # what only W&B takes, for the next row
        self.stall: StallWatch | None = None
        # W&B first: only it can fail to start
        self.names = sorted(options.track, reverse=True) if runtime.is_main else []
        if self.names:
            self._open()

    @property
    def wandb(self) -> Any:
        """W&B's run, or None where it isn't followed."""
        return self.runtime.tracker("wandb") if "wandb" in self.names else None

    def _open(self) -> None:
        """Start the trackers; send W&B what it lacks of the rows so far."""
        init: dict[str, dict[str, Any]] = {}
        if "wandb" in self.names:
            init["wandb"] = wandb_run.settings(self.folder, self.recipe, self.options, self.commit)
        if "trackio" in self.names:
            init["trackio"] = _trackio_settings(self.folder, self.recipe)
        place = self.options.project, self.folder.path / "tensorboard"
        try:
            self.runtime.start_trackers(self.names, *place, init)
        except Exception as error:  # a dead server must not end a training
            if "wandb" not in init:
                raise
            self.console.say(f"W&B is out of reach ({type(error).__name__}): going on offline")
            wandb_run.forget_service()
            init["wandb"]["mode"] = "offline"
            self.runtime.start_trackers(self.names, *place, init)
        rows = []
        if self.folder.metrics.exists():  # not the first start
            rows = [json.loads(row) for row in self.folder.metrics.read_text().splitlines()]
        picture = self.samples() if self.samples and not rows else None
        if run := self.wandb:
            run.define_metric("epoch")
            run.define_metric("val/*", step_metric="epoch")
            self.held, self.media = {}, {}
            if rows:
                self.first_step = wandb_run.first_missing_step(run, self.folder)
            if self.first_step == 0 and self.samples:
                picture = self.samples() if picture is None else picture
                self.media = {"samples": wandb_run.image(picture)}
            for row in rows:
                self._send(row, run.log)
        if "tensorboard" in self.names:
            writer = self.runtime.tracker("tensorboard")
            writer.add_text("recipe", f"```yaml\n{self.recipe.to_yaml()}```", 0)
            if picture is not None:
                writer.add_image("samples", picture, 0)

    def log(self, row: dict[str, Any]) -> None:
        """Send a row of metrics.jsonl, unless it was sent before the run was killed."""
        self._attempt(lambda: self._send(row, self.runtime.track))
        if self.stall is None and self.wandb:  # from now on: a first step may compile for minutes
            limit = self.options.hang_timeout / 2  # in time, before the processes give up
            self.stall = StallWatch(self.runtime.idle_seconds, limit, self._stalled)

    def _send(self, row: dict[str, Any], send: Callable[..., None]) -> None:
        if row["step"] < self.first_step:
            return
        self.held |= _tracked(row)
        # W&B takes one row a step: that of an epoch's last step waits for the evaluation, before
        # which the run may be stopped.
        last = row["epoch"] % 1 == 0 or row["step"] == self.recipe.max_steps
        if row["event"] == "epoch" or not last:
            if self.media:
                self.wandb.log(self.media, step=row["step"])
            send(self.held, step=row["step"])
            self.first_step, self.held, self.media = row["step"] + 1, {}, {}

    def show_result(self, result: dict[str, Any], pictures: Any, *, last: Path, best: Path) -> None:
        """Charts, tables, the model, and an alert that the run is finished.

        Args:
            result: the contents of result.json.
            pictures: the test images of its mistakes, uint8 (N, C, H, W).
            last: the last checkpoint.
            best: that of the best test accuracy.
        """

        def show() -> None:
            if not (run := self.wandb):
                return
            step = result["steps"]
            # Into the row of the last step, unless that was sent by a process that was killed then.
            run.log(wandb_run.findings(result, pictures), step=max(step, run.step))
            keys = ("test_accuracy", "best_test_accuracy", "seed", "steps")
            figures = {key: result[key] for key in keys}
            if not wandb_run.log_models(run, self.folder, last, best, figures):
                self.console.say(
                    "W&B does not answer: what it lacks is in the run folder; later, "
                    f"python -m distcv.sync {self.folder.path}"
                )
            text = f"test accuracy {result['test_accuracy']:.2f} % in {result['seconds']:.0f} s"
            run.alert("finished", f"{self.folder.path.name}: {text}", level="INFO")

        self._attempt(show)

    def close(self, *, stopped: bool = False) -> None:
        """Finish; a stopped run is marked as to be continued.

        A sweep hands such a run out again, but only if its exit code is not 0.
        """

        def finish() -> None:
            if stopped and (run := self.wandb):
                run.mark_preempting()
                run.finish(exit_code=STOPPED)
            self.runtime.end_trackers()

        self._close_watch()
        self._attempt(finish)

    def fail(self, problem: str) -> None:
        """Tell that the training has diverged, and finish the run as failed."""

        def finish() -> None:
            if run := self.wandb:
                run.alert("diverged", f"{self.folder.path.name}: {problem}", level="ERROR")
                run.finish(exit_code=2)
            self.runtime.end_trackers()

        self._close_watch()
        self._attempt(finish)

    def _close_watch(self) -> None:
        if self.stall:
            self.stall.close()

    def _stalled(self, seconds: float) -> None:
        """Tell that no step has ended for so long; called by another thread."""
        text = f"{self.folder.path.name}: no step for {seconds:.0f} s"
        self.console.say(f"stalled: {text}")
        if run := self.wandb:
            run.alert("stalled", text, level="WARN")
            time.sleep(ALERT_SECONDS)

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
                wandb_run.forget_service()
                self._open()
                action()
        except Exception as error:
            self.names = []
            self.console.say(
                f"trackers are given up ({type(error).__name__}): metrics.jsonl goes on without"
            )


def _trackio_settings(folder: RunFolder, recipe: Recipe) -> dict[str, Any]:
    """Arguments of ``trackio.init``."""
    return {
        "name": folder.path.name,
        "resume": "allow",
        "config": recipe.model_dump(mode="json"),
    }


def _tracked(row: dict[str, Any]) -> dict[str, float]:
    """What trackers get of a row of metrics.jsonl."""
    if row["event"] == "train":
        keys = (
            "loss", "accuracy", "lr", "grad_norm", "images_per_second", "mfu", "memory_mib",
        )  # fmt: skip
        values = {f"train/{key}": row[key] for key in keys if row.get(key) is not None}
        for number, node in enumerate(row.get("nodes", [])):
            values |= {f"system/node{number}/{key}": value for key, value in node.items()}
    else:
        values = {"val/loss": row["test_loss"], "val/accuracy": row["test_accuracy"]}
        # W&B's own summary="max" would forget what was before a restart.
        values["val/best_accuracy"] = row["best_test_accuracy"]
    return values | {"epoch": row["epoch"]}
