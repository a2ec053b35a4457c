"""Requests to stop, one by one; ``faults/stops.py`` tries each under each launcher."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distcv import checkpoint
from distcv.preempt import JOB_STOP_FILE, SIGNALS, STOPPED, StopRequest, answered
from faults.core import wait_until
from support.runs import TRAIN, Runs

SHORT = ["--model", "gap", "--max-steps", "30", "--log-every", "10"]


@pytest.fixture
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Not started by a launcher or a script; the signals' handlers are put back."""
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", JOB_STOP_FILE):
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data_dir: Path, mnist: object) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), data_dir)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered(number: signal.Signals, handlers: None) -> None:
    """Ctrl-C, SIGTERM or SIGUSR2 would not stop a run, or would end it unsaved."""
    stop = StopRequest()
    assert not stop.pending()
    signal.raise_signal(number)
    assert stop.pending()


def test_a_second_interrupt_ends_the_program_but_not_while_it_saves(handlers: None) -> None:
    """A second Ctrl-C would have no effect, or would interrupt a save."""
    stop = StopRequest()
    with stop.held():
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_under_a_launcher_the_same_interrupt_may_come_twice(
    handlers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C under a launcher, which can deliver it twice, would end the run unsaved."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    stop = StopRequest()
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    assert stop.pending()


def test_once_the_exit_code_is_settled_no_signal_changes_it(handlers: None, tmp_path: Path) -> None:
    """A late signal would change exit code 75, and a batch script would not requeue the job."""
    stop = StopRequest()
    stop.watch(tmp_path)
    assert stop.answer(7) == STOPPED
    for number in SIGNALS * 2:
        signal.raise_signal(number)
    assert (tmp_path / "STOPPED").read_text() == "stopped after step 7\n"


def test_each_request_is_answered_once(handlers: None, tmp_path: Path) -> None:
    """One STOP file would stop the next start of the run as well, or a request would be lost."""
    for asked in ("while the run starts", "between a stop and the next start"):
        (tmp_path / "STOP").touch()
        stop = StopRequest()
        stop.watch(tmp_path)
        assert stop.pending() and not answered(tmp_path, 0), asked
        stop.answer(7)
        assert answered(tmp_path, time.time()) and not (tmp_path / "STOP").exists()
    stop = StopRequest()
    stop.watch(tmp_path)
    assert not stop.pending() and not list(tmp_path.iterdir())


def test_a_stop_of_an_earlier_launch_does_not_end_this_one(handlers: None, tmp_path: Path) -> None:
    """A stop of an earlier launch would keep today's launcher from restarting a failed run."""
    stop = StopRequest()
    stop.watch(tmp_path)
    stop.answer(7)
    long_ago = time.time() - 3600
    os.utime(tmp_path / "STOPPED", (long_ago, long_ago))
    assert answered(tmp_path, long_ago - 10) and not answered(tmp_path, time.time())


def test_a_process_whose_launcher_is_gone_asks_itself_to_stop(tmp_path: Path) -> None:
    """A training whose launcher has died would go on unattended and keep its GPUs."""
    child = (
        "import pathlib, time; from distcv.preempt import StopRequest; stop = StopRequest()\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "assert not stop.pending(); (folder / 'started').touch()\n"
        "while not stop.pending(): time.sleep(0.01)\n"
        "(folder / 'noticed').touch()"
    )
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    launcher = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"LOCAL_RANK": "0"})
    wait_until((tmp_path / "started").exists, 60, "start")
    launcher.terminate()
    launcher.wait()
    wait_until((tmp_path / "noticed").exists, 60, "notice of the end")


@pytest.mark.slow
def test_a_signal_while_torch_is_loaded_is_answered_before_step_1(runs: Runs) -> None:
    """A stop request in the first seconds of a run would kill it without the exit code 75."""
    process = runs.start("early", *SHORT, command=TRAIN)
    proc = Path(f"/proc/{process.pid}")
    wait_until(lambda: caught(proc / "status") & 1 << signal.SIGTERM - 1, 60, "handler")
    assert "torch" not in (proc / "maps").read_text(), "it is loaded already"
    process.terminate()
    out, err = process.communicate(timeout=200)
    assert process.returncode == STOPPED and "stopped after step 0" in out, out + err
    assert not checkpoint.steps(runs.folder / "early/checkpoints"), "there is nothing to save"


def caught(status: Path) -> int:
    """The signals that a process has handlers for, bit by bit."""
    (mask,) = [line for line in status.read_text().splitlines() if line.startswith("SigCgt")]
    return int(mask.split()[1], 16)


@pytest.mark.slow
def test_a_stop_before_step_1_of_a_resumed_run_leaves_its_checkpoint_alone(runs: Runs) -> None:
    """A run stopped right after its resume would needlessly rewrite its only checkpoint."""
    process = runs.start("again", *SHORT)
    runs.wait_for_step("again", 10, process)
    process.terminate()
    out, err = process.communicate(timeout=200)
    assert process.returncode == STOPPED, out + err
    folder = runs.folder / "again/checkpoints"
    (step,) = checkpoint.steps(folder)
    before = (folder / f"step-{step:08d}").stat().st_ino
    (runs.folder / "again/STOP").touch()
    assert f"stopped after step {step};" in runs.run("again", *SHORT, expect=STOPPED)
    assert [path.stat().st_ino for path in folder.iterdir()] == [before]
