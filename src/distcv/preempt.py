"""Requests to stop: a signal, a file or a lost launcher asks, the loop answers at a step's end."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from distcv.environment import launched

STOPPED = 75  # exit code of a run that was stopped and can go on: EX_TEMPFAIL of sysexits.h
NOT_SAVED = 74  # exit code of one that stopped since it couldn't be saved: EX_IOERR
STOP_FILE = "STOP"  # in the run folder: asks
ANSWER_FILE = "STOPPED"  # there, and instead of it, from the answer to the next start
JOB_STOP_FILE = "DISTCV_STOP_FILE"  # variable: a second file, by which a batch script asks
CLOCKS_DIFFER = 60.0  # s, at most, a file server's and a node's

SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR2") if hasattr(signal, name)
]


class StopRequest:
    """Remembers whether this process was asked to stop; nothing else happens in the handler.

    To be made before anything slow: a signal that comes earlier ends the process. A second
    interrupt from the keyboard ends it at once, except while it saves, and except under a
    launcher: there the first may come twice, and its peers would be left alone.
    """

    def __init__(self) -> None:
        self.signalled = self.saving = False
        self.launcher = os.getppid() if launched() else None
        self.in_script = bool(os.environ.get(JOB_STOP_FILE))
        self.answers: dict[Path, Path] = {}  # of the files that ask: where each is answered
        if self.in_script:
            file = Path(os.environ[JOB_STOP_FILE])
            self.answers[file] = file
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        at_once = self.signalled and not self.saving and self.launcher is None
        self.signalled = True
        if number == signal.SIGINT and at_once:
            raise KeyboardInterrupt

    def watch(self, run_dir: Path) -> None:
        """Look for a file STOP in the run folder too, once the answer to a former one is removed.

        To be called on the main process, which holds the folder.
        """
        (run_dir / ANSWER_FILE).unlink(missing_ok=True)
        self.answers[run_dir / STOP_FILE] = run_dir / ANSWER_FILE

    def pending(self) -> bool:
        """Whether a signal came, a file that asks to stop lies there, or the launcher is gone.

        SIGUSR2 ends torchrun, and SIGTERM an `accelerate launch` of one process, which leave their
        processes behind (torch 2.14, accelerate 1.15).
        """
        return self.signalled or self.orphaned() or any(file.exists() for file in self.answers)

    def orphaned(self) -> bool:
        """Whether a launcher has started this process, and is gone."""
        return self.launcher not in (None, os.getppid())

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While in here, nothing but a SIGKILL ends the process: it is saving."""
        self.saving = True
        try:
            yield
        finally:
            self.saving = False

    def answer(self, step: int) -> int:
        """Say in the files that the run has stopped; the exit code with which to leave.

        It is 75, but 0 where a launcher would take that for a failure and a script reads the file:
        ``launch/multinode.sh`` then leaves with 75. Without such a script, the answer in the run
        folder keeps a launcher's restart from undoing the stop.
        """
        self.ignore()
        try:
            for asked, answer in self.answers.items():
                answer.write_text(f"stopped after step {step}\n")
                if answer != asked:
                    asked.unlink(missing_ok=True)
        except OSError:
            return STOPPED  # the script can't read of it
        return 0 if self.in_script and launched() else STOPPED

    def ignore(self) -> None:
        """From now on a signal changes nothing: it is settled with which exit code to leave."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def answered(run_dir: Path, launched_at: float) -> bool:
    """Whether the run was stopped after a launch at this time (s), and not in one before."""
    with contextlib.suppress(FileNotFoundError):
        return (run_dir / ANSWER_FILE).stat().st_mtime > launched_at - CLOCKS_DIFFER
    return False
