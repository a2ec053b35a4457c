"""Seconds without those in which other programs had the processors."""

import time
from pathlib import Path


def unhindered_seconds(process: int | str = "thread-self") -> float:
    """A clock that stands still while a process's main thread is ready to run and has to wait.

    What a thread waits for itself (a server, a disk, a lock) counts. Only differences mean
    something. By default it is the clock of the calling thread. Source: proc(5), sched-stats of the
    Linux kernel: the second number of schedstat is the time spent on a run queue, in ns.
    """
    waited = int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
    return time.perf_counter() - waited
