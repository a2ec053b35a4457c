"""Starting Python modules in a fraction of a second: as forks of a process that has torch loaded.

A start anew takes 5 s of processor time for the imports alone. Tests of what happens before and
while torch is loaded (the command line, the choice of threads, launchers) need such a start.
"""

import atexit
import contextlib
import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # is read when torch is loaded, so it is the same for all

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["support.warm"])


@functools.cache
def _start_server() -> None:
    """What the server has in its environment before it loads torch is the same for all forks."""
    # This one warns at the end of what processes that were killed have left.
    with mock.patch.dict(os.environ, PYTHONWARNINGS="ignore"):
        resource_tracker.ensure_running()
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    own = ONE_THREAD | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with mock.patch.dict(os.environ, own):
        forkserver.ensure_running()


def forked(target: Callable[..., object], *arguments: object) -> BaseProcess:
    """A process that calls a function, and ends with this one at the latest."""
    _start_server()
    process = FORKS.Process(target=target, args=arguments, daemon=True)
    # Else each fork would import the main module anew, which may be pytest.
    with mock.patch.multiple(sys.modules["__main__"], __spec__=None, __file__=None, create=True):
        process.start()
    return process


def _main(module: str, flags: list[str], env: dict[str, str], cwd: Path, said: list[Path]) -> None:
    """In the fork: ``python -m module``, with its output in two files, in a group of its own."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(said, start=1):
        with path.open("a") as file:
            os.dup2(file.fileno(), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [module, *flags]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


class Forked:
    """A process that runs a module; what it has in common with ``subprocess.Popen`` is named so.

    What it prints goes to the files ``said`` with the endings .out and .err.
    """

    def __init__(
        self, module: str, flags: Sequence[str], env: Mapping[str, str], said: Path
    ) -> None:
        self.module = module
        self.printed = [said.with_name(f"{said.name}.{stream}") for stream in ("out", "err")]
        for path in self.printed:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        self.process = forked(_main, module, list(flags), dict(env), Path.cwd(), self.printed)
        assert self.process.pid is not None
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.module, timeout)
        return self.returncode

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """Wait for its end; what it printed to stdout and to stderr."""
        self.wait(timeout)
        out, err = (path.read_text(errors="replace") for path in self.printed)
        return out, err
