"""Telling somebody that a training does not get on."""

import threading
from collections.abc import Callable


class StallWatch:
    """Calls ``tell`` once if a training has been idle for longer than ``limit`` seconds.

    A thread of its own asks ``idle`` for the seconds since the last step.
    """

    def __init__(
        self, idle: Callable[[], float], limit: float, tell: Callable[[float], None]
    ) -> None:
        self.idle, self.limit, self.tell = idle, limit, tell
        self.end = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Watch no longer."""
        self.end.set()

    def _watch(self) -> None:
        while not self.end.wait(self.limit / 10):
            if (seconds := self.idle()) > self.limit:
                self.tell(seconds)
                return
