"""Accelerate's trackers: W&B, TensorBoard, trackio."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import LoggerType


class AccelerateTrackers:
    """Started, written to and ended through an accelerator, on the main process."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def start(
        self, names: Sequence[str], project: str, folder: Path, options: dict[str, dict[str, Any]]
    ) -> None:
        """Start these; TensorBoard's files go to ``folder``.

        Raises whatever a tracker raises; a second call then starts all of them anew.
        """
        self.accelerator.trackers.clear()
        self.accelerator.project_configuration.logging_dir = str(folder)
        self.accelerator.log_with = [LoggerType(name) for name in names]
        self.accelerator.init_trackers(project, init_kwargs=options)

    def run(self, name: str) -> Any:
        """The tracker's own run object on the main process, a blank object elsewhere."""
        return self.accelerator.get_tracker(name, unwrap=True)

    def log(self, name: str, values: dict[str, float], step: int) -> None:
        """Send values to a tracker that was started."""
        self.accelerator.get_tracker(name).log(values, step=step)

    def end(self) -> None:
        """Let the trackers finish what they have to send."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
