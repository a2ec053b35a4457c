"""What a run shows while it goes on: the console here and there, W&B, TensorBoard and trackio."""

import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distcv.command_line import RunOptions
from distcv.config import InputError, Recipe
from distcv.preempt import STOPPED
from distcv.run_folder import RunFolder
from distcv.runtime import Runtime
from distcv.tracking import trackio_run, wandb_run
from distcv.tracking.console import Console
from distcv.tracking.stall import StallWatch

__all__ = ["Console", "Trackers"]

ALERT_SECONDS = 2.0  # for an alert to leave, before a process that fails ends


class Trackers:
    """The trackers of a run, on the main process, through Accelerate.

    Once they are open they never stop a training. A thread of its own does all that has to do with
    them, one after the other: the training doesn't wait where one is slow, or is opened once more.

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
        # By tracker, the first step whose row it lacks: after a kill not that of the checkpoint.
        self.first_steps: dict[str, int] = {}
        self.rows: list[dict[str, Any]] = []  # all so far
        self.held: dict[str, Any] = {}  # of a row that waits for another one of its step
        self.held_for_wandb: dict[str, Any] = {}  # a picture, for its first row
        self.wandb_begins = 0  # the first step that W&B lacked when it was opened last
        self.stall: StallWatch | None = None
        # W&B's stand-in for a run would do, but for what its server is asked at the end.
        off = {"wandb"} if os.environ.get("WANDB_MODE") == "disabled" else set()
        self.names = sorted({*options.track} - off, reverse=True) if runtime.is_main else []
        self.thread = ThreadPoolExecutor(1)

    def open(self) -> None:
        """Start following; to be called by the main process.

        Raises:
            InputError: a tracker can't be started, other than for want of W&B's server.
        """
        if not self.names:
            return
        self.rows = self.folder.rows()
        try:
            self.thread.submit(self._open).result()
        except Exception as error:
            problem = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"--track {' '.join(self.names)}: {problem}: mend it, or leave one out"
            ) from None

    @property
    def wandb(self) -> Any:
        """W&B's run, or None where it isn't followed."""
        return self.runtime.trackers.run("wandb") if "wandb" in self.names else None

    def _open(self, *, offline: bool = False) -> None:
        """Start the trackers; send them what they lack of the rows so far."""
        rows = self.rows  # none at the first start
        events = self.folder.path / "tensorboard"
        options: dict[str, dict[str, Any]] = {}
        group = f"{self.recipe.model}-{self.recipe.model_copy(update={'seed': 0}).sha256[:8]}"
        config = self.recipe.model_dump(mode="json") | {"commit": self.commit}
        if "wandb" in self.names:
            options["wandb"] = wandb_run.settings(self.folder, self.recipe, config, group)
            if offline:
                options["wandb"]["mode"] = "offline"
        if "trackio" in self.names:
            options["trackio"] = trackio_run.settings(self.folder, config, group, new=not rows)
        if "tensorboard" in self.names:
            options["tensorboard"] = {"purge_step": 0}  # it gets all rows again
        try:
            self._start(events, options)
        except Exception as error:  # a dead server must not end a training
            if "wandb" not in options:
                raise
            problem = f"W&B is out of reach ({type(error).__name__})"
            if options["wandb"]["mode"] != "offline" and (refusal := wandb_run.refusal()):
                if not rows:
                    raise refusal from None
                problem = str(refusal)  # a run that goes on may do so with nobody there
            self.console.say(f"{problem}: going on offline")
            wandb_run.forget_service()
            options["wandb"]["mode"] = "offline"
            self._start(events, options)
        if run := self.wandb:
            run.define_metric("epoch")
            run.define_metric("val/*", step_metric="epoch")
            missing = wandb_run.first_missing_step(run, self.folder) if rows else 0
            self.first_steps["wandb"] = self.wandb_begins = missing
        if "trackio" in self.names:
            missing = 0
            if rows:
                missing = trackio_run.first_missing_step(self.options.project, self.folder)
            self.first_steps.setdefault("trackio", missing)
        self._send_all()

    def _start(self, events: Path, options: dict[str, dict[str, Any]]) -> None:
        with trackio_run.quiet():
            self.runtime.trackers.start(self.names, self.options.project, events, options)

    def _send_all(self) -> None:
        """Send what is missing so far; TensorBoard, which was started anew, lacks all of it."""
        if "tensorboard" in self.names:
            self.first_steps["tensorboard"] = 0
            text = f"```yaml\n{self.recipe.to_yaml()}```"
            self.runtime.trackers.run("tensorboard").add_text("recipe", text, 0)
        self._show_samples()
        self.held = {}
        for row in self.rows:
            self._send(row)

    def _show_samples(self) -> None:
        """A picture of samples, for those that take pictures and have no row yet."""
        new = {"wandb", "tensorboard"} & {n for n in self.names if self.first_steps[n] == 0}
        if not new or self.samples is None:
            return
        picture = self.samples()
        if "wandb" in new:
            self.held_for_wandb = {"samples": wandb_run.image(picture)}
        if "tensorboard" in new:
            self.runtime.trackers.run("tensorboard").add_image("samples", picture, 0)

    def log(self, row: dict[str, Any]) -> None:
        """Send a row of metrics.jsonl, unless it was sent before the run was killed."""
        if not self.names:
            return
        self.rows.append(row)
        self._attempt(lambda: self._send(row))
        # From now on: a first step may be compiled for minutes, and so may a first evaluation.
        compiled = row["event"] == "epoch" or not self.options.compile
        if self.stall is None and "wandb" in self.names and compiled:
            limit = self.options.hang_timeout / 2  # in time, before the processes give up
            self.stall = StallWatch(self.runtime.idle_seconds, limit, self._stalled)

    def rolled_back(self, what: str) -> None:
        """Take back the rows that were cut from metrics.jsonl, where a tracker can.

        TensorBoard is told to forget them. W&B and trackio, whose steps only rise, keep them, and
        lack those of the same steps that come instead. To be called by the main process.

        Raises:
            OSError: the rows can't be read.
        """
        if not self.names:
            return
        self.rows = self.folder.rows()

        def tell() -> None:
            if "tensorboard" in self.names:
                writer = self.runtime.trackers.run("tensorboard")
                writer.close()
                writer.purge_step = 0  # heeded when it opens its next file
            self._send_all()
            if run := self.wandb:
                run.alert("rolled back", f"{self.folder.path.name}: {what}", level="WARN")

        self._attempt(tell)

    def _send(self, row: dict[str, Any]) -> None:
        if row["step"] < min(self.first_steps.values()):
            return
        self.held |= _tracked(row)
        if self._waits(row):
            return
        for name in self.names:
            if row["step"] >= self.first_steps[name]:
                if name == "wandb" and self.held_for_wandb:
                    self.wandb.log(self.held_for_wandb, step=row["step"])
                    self.held_for_wandb = {}
                self.runtime.trackers.log(name, self.held, row["step"])
                self.first_steps[name] = row["step"] + 1
        self.held = {}

    def _waits(self, row: dict[str, Any]) -> bool:
        """Whether a row is sent together with a later one of its step.

        W&B takes one row a step: that of an epoch's last step waits for the evaluation, before
        which the run may be stopped.
        """
        last = row["epoch"] % 1 == 0 or row["step"] == self.recipe.max_steps
        return bool(last and row["event"] != "epoch")

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
            if not run.offline and not wandb_run.answers():  # tables would ask it, for a minute
                self.console.say(
                    "W&B does not answer: what it lacks is in the run folder; later, "
                    f"python -m distcv.sync {self.folder.path}"
                )
                wandb_run.forget_service()
                self._open(offline=True)
                run = self.wandb
            # Into the row of the last step, unless that is in another log, or was sent by a process
            # that was killed then.
            step = max(result["steps"], run.step, self.wandb_begins)
            told = run.summary.get("mistakes") is not None  # before it was killed
            if not told:
                run.log(wandb_run.findings(result, pictures), step=step)
            keys = ("test_accuracy", "best_test_accuracy", "seed", "steps")
            figures = {key: result[key] for key in keys}
            wandb_run.log_models(run, self.folder, last, best, figures)
            text = f"test accuracy {result['test_accuracy']:.2f} % in {result['seconds']:.0f} s"
            if not told:
                run.alert("finished", f"{self.folder.path.name}: {text}", level="INFO")

        self._close_watch()  # no step ends while a model is sent
        self._attempt(show).result()

    def close(self, *, stopped: bool = False) -> None:
        """Finish; a stopped run is marked as to be continued.

        A sweep hands such a run out again, but only if its exit code is not 0.
        """

        def finish() -> None:
            if stopped and (run := self.wandb):
                run.mark_preempting()
                run.finish(exit_code=STOPPED)
            self._end()

        self._close_watch()
        self._attempt(finish).result()

    def fail(self, problem: str) -> None:
        """Tell that the training has diverged, and finish the run as failed."""

        def finish() -> None:
            if run := self.wandb:
                run.alert("diverged", f"{self.folder.path.name}: {problem}", level="ERROR")
                run.finish(exit_code=2)
            self._end()

        self._close_watch()
        self._attempt(finish).result()

    def _end(self) -> None:
        with trackio_run.quiet():
            self.runtime.trackers.end()
            if "trackio" in self.names:
                trackio_run.finish()

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

    def _attempt(self, action: Callable[[], None]) -> Future[None]:
        """Do something with the trackers, after all else; whatever they raise, training goes on."""
        return self.thread.submit(self._do, action)

    def _do(self, action: Callable[[], None]) -> None:
        """Do it in the trackers' thread; they are opened once more if it fails.

        W&B's process, for one, is ended by the SIGTERM that some Slurm sites (proctrack/linuxproc)
        send to all processes of a job.
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
            with contextlib.suppress(Exception):
                self._end()
            self.names = []
            self.console.say(
                f"trackers are given up ({type(error).__name__}): metrics.jsonl goes on without"
            )


def _tracked(row: dict[str, Any]) -> dict[str, float]:
    """What trackers get of a row of metrics.jsonl."""
    if row["event"] == "train":
        keys = (
            "loss", "accuracy", "lr", "grad_norm", "images_per_second", "mfu", "memory_mib",
        )  # fmt: skip
        values = {f"train/{key}": row[key] for key in keys if row.get(key) is not None}
        for number, node in enumerate(row.get("nodes", [])):
            values |= {f"nodes/{number}/{key}": value for key, value in node.items()}
    else:
        values = {"val/loss": row["test_loss"], "val/accuracy": row["test_accuracy"]}
        # W&B's own summary="max" would forget what was before a restart.
        values["val/best_accuracy"] = row["best_test_accuracy"]
    return values | {"epoch": row["epoch"]}
