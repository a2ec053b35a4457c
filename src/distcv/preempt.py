"""Requests to stop: a signal or a file asks, the loop answers at a step's end."""

import os
import signal
from pathlib import Path
from types import FrameType

from distcv.environment import launched

STOPPED = 75  # exit code of a run that was stopped and can go on: EX_TEMPFAIL of sysexits.h
STOP_FILE = "STOP"
JOB_STOP_FILE = "DISTCV_STOP_FILE"  # variable: a second file, by which a batch script asks

SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR2") if hasattr(signal, name)
]


class StopRequest:
    """Remembers whether this process was asked to stop; nothing else happens in the handler.

    A second interrupt from the keyboard ends the program at once.
    """

    def __init__(self, run_dir: Path) -> None:
        self.files = [run_dir / STOP_FILE]
        self.files[0].unlink(missing_ok=True)
        if JOB_STOP_FILE in os.environ:
            self.files.append(Path(os.environ[JOB_STOP_FILE]))
        self.signalled = False
        self.previous = {number: signal.signal(number, self._remember) for number in SIGNALS}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signalled:
            raise KeyboardInterrupt
        self.signalled = True

    def pending(self) -> bool:
        """Whether a signal came, or a file that asks to stop lies there."""
        return self.signalled or any(file.exists() for file in self.files)

    def answer(self, step: int) -> int:
        """Say in the files that the run has stopped; the exit code with which to leave.

        It is 75, but 0 where a launcher would take that for a failure and a script reads the file:
        ``launch/multinode.sh`` then leaves with 75. Without such a script, the file in the run
        folder keeps a launcher's restart from undoing the stop.
        """
        for file in self.files:
            file.write_text(f"stopped after step {step}\n")
        return 0 if len(self.files) > 1 and launched() else STOPPED

    def restore(self) -> None:
        """Give the signals back to their former handlers."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
