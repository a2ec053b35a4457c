"""Requests to stop: a signal or a file in the run folder asks, the loop answers at a step's end."""

import signal
from pathlib import Path
from types import FrameType

STOPPED = 75  # exit code of a run that was stopped and can go on: EX_TEMPFAIL of sysexits.h
STOP_FILE = "STOP"


class StopRequest:
    """Remembers whether this process was asked to stop; nothing else happens in the handler.

    A second interrupt from the keyboard ends the program at once.
    """

    def __init__(self, run_dir: Path) -> None:
        self.file = run_dir / STOP_FILE
        self.file.unlink(missing_ok=True)
        self.signalled = False
        self.previous = {
            number: signal.signal(number, self._remember)
            for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR2", None))
            if number is not None
        }

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signalled:
            raise KeyboardInterrupt
        self.signalled = True

    def pending(self) -> bool:
        """Whether a signal came or the file ``STOP`` lies in the run folder."""
        return self.signalled or self.file.exists()

    def note(self) -> None:
        """Leave the file behind, so that a launcher's restart does not undo the stop."""
        self.file.touch()

    def restore(self) -> None:
        """Give the signals back to their former handlers."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
