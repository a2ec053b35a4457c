"""How the tests are dealt out to processes (pytest-xdist), and which of them run alone.

Many tests wait for Slurm, a server or a peer, so there are more workers than cores, each of which
computes in one thread. Tests that share a fixture of their module stay together on one worker; all
others go wherever a worker is free, the slow ones first. A test marked `alone` measures time: no
other test runs beside it.
"""

import fcntl
import os
import signal
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

WORKERS_PER_CORE = 2
HELD = "TEST_RUN_LOCK_HELD"  # in the environment of what a test starts, such as another pytest


def pytest_configure(config: pytest.Config) -> None:
    """Let each worker compute in one thread, as torch reads when it is loaded; hear Ctrl-C."""
    if hasattr(config, "workerinput"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A shell ignores it for what runs in the background, and what is ignored is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Workers for folders; none for single files, which then start at once."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # pytest-xdist reads it
    if not any(Path(argument.split("::")[0]).is_dir() for argument in config.args):
        return 0
    waiting = config.option.markexpr != "not slow"  # what is not slow hardly waits
    return (WORKERS_PER_CORE if waiting else 1) * len(os.sched_getaffinity(0))


def is_alone(item: pytest.Item | None) -> bool:
    return item is not None and item.get_closest_marker("alone") is not None


def group_of(item: pytest.Item) -> str | None:
    """The name of the tests that it stays together with, or None if any worker may run it."""
    if is_alone(item):
        return "alone"
    definitions = item._fixtureinfo.name2fixturedefs.values()  # type: ignore[attr-defined]
    if any(one.scope == "module" for several in definitions for one in several):
        return item.nodeid.split("::")[0]
    return None


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Name the groups; tests that run alone come first, then the slow ones and their groups."""
    groups = {item: group_of(item) for item in items}
    slow = {groups[item] for item in items if item.get_closest_marker("slow")} - {None}

    def rank(item: pytest.Item) -> tuple[int, int]:
        """Of slow tests, groups come first; others are mixed: some wait while some compute."""
        if is_alone(item):
            return 0, 0
        if groups[item] in slow or "faults" in item.path.parts:
            return 1, 0
        if item.get_closest_marker("slow"):
            return 2, zlib.crc32(item.nodeid.encode()) if hasattr(config, "workerinput") else 0
        return 3, 0

    for item, group in groups.items():
        if group:
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=rank)


class RunLock:
    """A lock that each test holds: shared, or exclusive if it runs alone."""

    def __init__(self) -> None:
        self.descriptor: int | None = None

    def take(self, root: Path, *, exclusive: bool) -> None:
        """Wait for it in a queue, so that no later test begins before one that runs alone.

        It is a lock on the folder tests/; the queue is one on the folder above.
        """
        queue = os.open(root, os.O_RDONLY)
        fcntl.flock(queue, fcntl.LOCK_EX)
        self.descriptor = os.open(root / "tests", os.O_RDONLY)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        os.close(queue)
        os.environ[HELD] = "1"

    def release(self) -> None:
        assert self.descriptor is not None
        del os.environ[HELD]
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)  # forks that are left have it open, too
        os.close(self.descriptor)
        self.descriptor = None


run_lock = RunLock()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Hold the lock from a test's first fixture to its last; once for all that run alone."""
    if run_lock.descriptor is None and HELD not in os.environ:
        run_lock.take(item.config.rootpath, exclusive=is_alone(item))
    try:
        return (yield)
    finally:
        if run_lock.descriptor is not None and not (is_alone(item) and is_alone(nextitem)):
            run_lock.release()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell the ten files whose tests took longest, added up over all workers."""
    seconds = Counter[str]()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.split("::")[0]] += report.duration
    if len(seconds) > 1:
        terminalreporter.section("slowest files")
        for file, taken in seconds.most_common(10):
            terminalreporter.line(f"{taken:7.1f} s  {file}")
