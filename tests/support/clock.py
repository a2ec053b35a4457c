"""Seconds without those in which other programs had the processors."""

import time
from pathlib import Path


def run_queue_seconds(process: int | str = "thread-self") -> float:
    """Seconds for which a process's main thread, or this thread, was ready and had no processor.

    Source: proc(5) and sched-stats of the Linux kernel, the second number of schedstat, in ns.
    """
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9


def unhindered_seconds(process: int | str = "thread-self") -> float:
    """A clock that stands still while a process's main thread is ready to run and has to wait.

    What a thread waits for itself (a server, a disk, a lock) counts. Only differences mean
    something. By default it is the clock of the calling thread.
    """
    return time.perf_counter() - run_queue_seconds(process)
