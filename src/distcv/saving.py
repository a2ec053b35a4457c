"""Saving a training at its save points, and what happens where that fails."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from distcv import checkpoint
from distcv.checkpoint import Checkpoint
from distcv.config import InputError
from distcv.durable import set_aside
from distcv.preempt import StopRequest
from distcv.run_folder import RunFolder
from distcv.tracking import Console, Trackers
from distcv.training import Progress, Training, read_progress, restore, snapshot

T = TypeVar("T")

FAILURES = 3  # saves in a row that fail before a run stops
ROLLBACKS = 3  # of one run, at most


class NotSaved(Exception):
    """A run stops since it can't be saved; raised by all processes together, once it is said."""


class Saver:
    """Saves a training; where the disk is full or fails, all processes go on, or stop, together.

    Args:
        keep: steps of checkpoints that are not to be deleted.
        last: name of the last checkpoint so far.
    """

    def __init__(
        self,
        training: Training,
        folder: RunFolder,
        trackers: Trackers,
        console: Console,
        stop: StopRequest,
        *,
        versions: dict[str, Any],
        keep: set[int],
        last: str | None,
    ) -> None:
        self.training, self.folder = training, folder
        self.trackers, self.console, self.stop = trackers, console, stop
        self.versions, self.keep, self.last = versions, keep, last
        self.failures = 0  # in a row

    def save(self, progress: Progress, *, stopping: bool = False) -> None:
        """Save, by all processes together; after a failure it is tried again the next time.

        Raises:
            NotSaved: the third failure in a row, or the first one if there is no next time.
        """
        with self.stop.held():
            self._save(progress, stopping)

    def _save(self, progress: Progress, stopping: bool) -> None:
        runtime = self.training.runtime
        tracker_id = self.folder.tracker_id if runtime.is_main else ""
        held = snapshot(self.training, progress, tracker_id=tracker_id, versions=self.versions)
        try:
            runtime.on_main(lambda: self._commit(progress, held))
        except InputError as problem:
            self.failures += 1
            self.console.say(
                f"step {progress.step} is not saved ({problem}); "
                f"last checkpoint: {self.last or 'none yet'}"
            )
            if stopping or self.failures == FAILURES:
                self.trackers.close(stopped=True)
                self._stop()
        else:
            self.failures = 0

    def _commit(self, progress: Progress, held: Checkpoint) -> None:
        """Write the checkpoint; the rows up to it first, which a resumed run won't write again."""
        folder = self.folder.checkpoints
        self.folder.sync_rows()
        check = self.folder.lease.check
        self.last = checkpoint.save(folder, progress.step, held, check=check).name
        checkpoint.prune(folder, keep={progress.best_step, *self.keep})

    def roll_back(self, progress: Progress, why: Exception) -> Progress | None:
        """Go back to the newest checkpoint with a lower learning rate, by all processes together.

        One from which no step went well is renamed, if there is one before, which is taken. What is
        gone back to is written anew, so that a run that is resumed from it goes the same way. None
        if the run is to stop instead: that is the recipe's choice, or rollbacks didn't help.

        Raises:
            NotSaved: the run folder can't be brought to where the run goes back to.
        """
        recipe, runtime, folder = self.training.recipe, self.training.runtime, self.folder
        if recipe.nonfinite == "stop" or progress.rollbacks == ROLLBACKS:
            return None
        say = self.console.say
        path = self._in_folder(lambda: place_before(folder.checkpoints, progress, say))
        if path is None:
            return None
        before = progress.rolled_back(restore(self.training, checkpoint.load(path)), recipe)
        runtime.wait()  # until all have read what is written anew below
        due = self.training.evaluation_due(before)
        self._in_folder(lambda: folder.cut_metrics(before.step, evaluation_due=due))
        what = f"rolled back to step {before.step}, learning rate times {before.lr_factor:g}"
        say(f"{why}; {what}")
        self._in_folder(lambda: self.trackers.rolled_back(what))
        self.save(before)
        return before

    def _in_folder(self, action: Callable[[], T]) -> T:
        """Let the main process do something in the run folder, or stop the run."""
        try:
            done: T = self.training.runtime.on_main(action)
        except InputError as problem:
            self.console.say(f"not rolled back ({problem})")
            self.trackers.close(stopped=True)
            self._stop()
        return done

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json, by all processes together.

        Raises:
            NotSaved: it can't be written; the run is finished the next time.
        """
        try:
            self.training.runtime.on_main(lambda: self.folder.write_result(result))
        except InputError as problem:
            self.console.say(f"the result is not saved ({problem})")
            self._stop()

    def _stop(self) -> NoReturn:
        name = self.folder.path.name
        self.console.say(f"stopped unsaved; to go on: the same command with --name {name}")
        raise NotSaved


def place_before(folder: Path, progress: Progress, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint from which a step went well, else the oldest whole one.

    Those after it are renamed and ``say`` gets a line for each, as for damaged ones. None if there
    is no whole one.
    """
    if (path := checkpoint.newest(folder, say)) is None:
        return None
    for older in checkpoint.candidates(folder)[1:]:
        if went_well_from(checkpoint.load_state(path), progress):
            break
        if checkpoint.damage(older) is None:
            aside = set_aside(path, "diverged")
            say(f"no step from checkpoint {path.name} went well: kept as {aside.name}")
            path = older
    return path


def went_well_from(state: dict[str, Any], progress: Progress) -> bool:
    """Whether a step from a checkpoint with this state changed the weights.

    The loss scaler of fp16 leaves out steps by itself; it tells only whether it did so last.
    """
    before = read_progress(state)
    amid_overflows = before.step > 0 and state["scaler"].get("_growth_tracker") == 0
    skipped = progress.skipped_steps - before.skipped_steps
    return progress.step - before.step > skipped and not amid_overflows
