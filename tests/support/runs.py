"""Starting trainings as processes of their own, with run folders to look at."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from distcv import checkpoint
from support.forked import ONE_THREAD, Forked

ROOT = Path(__file__).resolve().parents[2]
TRAIN = [sys.executable, "-m", "distcv.train"]
# Before a command: files without the right to be read can't be read, by root neither.
RIGHTS_HOLD = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"][: 2 * (not os.getuid())]

Process = subprocess.Popen[str] | Forked

# What Accelerate tells the processes of launch/*.yaml (runtime/test_launch_files.py); but shards
# from 1,000 parameters on, so that these small networks are sharded at all.
STRATEGY: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP",
        "FSDP_MIN_NUM_PARAMS": "1000",
    },
}
for stage in "123":
    STRATEGY[f"zero{stage}"] = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage,
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    }


def launched(processes: int, *options: str, file: str = "cpu") -> list[str]:
    """The command that starts this many processes by Accelerate and one of the launch files."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    config = ["--config_file", str(ROOT / f"launch/{file}.yaml"), "--num_processes"]
    return [*launcher, *config, str(processes), *options]


def free_port() -> str:
    """A port of this machine that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def ranks(processes: int) -> list[dict[str, str]]:
    """What a launcher adds to the environment of each of several processes on this machine.

    Tests that are not about launchers do without one, whose start costs as much again.
    """
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    head = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        world | head | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)
    ]


def end(process: Process) -> None:
    """SIGKILL a process and all that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        for each in [*root.children(recursive=True), root]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.communicate()


def stopped_in(function: str, asked: Path, call: int = 1) -> list[str]:
    """The command of a training for which the file ``asked`` appears as this function of the loop
    begins for that time.
    """
    code = (
        "import itertools, pathlib, distcv.loop as loop, distcv.train as train\n"
        f"{function}, calls = loop.{function}, itertools.count(1)\n"
        "def hooked(*args, **kwargs):\n"
        f"    if next(calls) == {call}:\n"
        f"        pathlib.Path({str(asked)!r}).touch()\n"
        f"    return {function}(*args, **kwargs)\n"
        f"loop.{function} = hooked\n"
        "train.command()"
    )
    return [sys.executable, "-c", code]


class Runs:
    """Starts trainings whose run folders lie in one temporary folder."""

    def __init__(self, folder: Path, data_dir: Path) -> None:
        self.folder = folder
        self.flags = ["--runs-dir", str(folder), "--data-dir", str(data_dir)]
        self.said = folder.with_name(f"{folder.name}-said")
        self.started: list[Process] = []

    def start(
        self, name: str, *flags: str, command: list[str] | None = None, **env: str
    ) -> Process:
        """Start ``distcv.train``: as a fork, or by a ``command`` as a user does, like ``TRAIN``."""
        flags, env = ("--name", name, *self.flags, *flags), os.environ | ONE_THREAD | env
        process: Process
        if command is None:
            process = Forked("distcv.train", flags, env, self.said / str(len(self.started)))
        else:
            process = subprocess.Popen(
                [*command, *flags], env=env, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
        self.started.append(process)
        return process

    def run(
        self, name: str, *flags: str, command: list[str] | None = None, expect: int = 0, **env: str
    ) -> str:
        """Run to the end; what it printed."""
        process = self.start(name, *flags, command=command, **env)
        out, err = process.communicate(timeout=540)
        assert process.returncode == expect, f"exit {process.returncode}\n{out}\n{err}"
        return out + err

    def group(
        self, name: str, processes: int, *flags: str, command: list[str] | None = None, **env: str
    ) -> list[Process]:
        """Start several processes that train together on the CPU, without a launcher."""
        if "ACCELERATE_USE_DEEPSPEED" not in env:  # which Accelerate starts only without it
            env |= {"ACCELERATE_USE_CPU": "true"}  # as launch/cpu.yaml says
        return [self.start(name, *flags, command=command, **env, **own) for own in ranks(processes)]

    def together(self, name: str, processes: int, *flags: str, **env: str) -> str:
        """Run such a group to the end; what all printed."""
        group = self.group(name, processes, *flags, **env)
        said = "\n".join(each for one in group for each in one.communicate(timeout=540))
        assert [process.returncode for process in group] == [0] * processes, said
        return said

    def end(self) -> None:
        """End what a failed test has left at work."""
        for process in self.started:
            if process.poll() is None:
                end(process)

    def wait_for_step(self, name: str, step: int, process: Process | None = None) -> None:
        """Wait until a run has logged this step, or a later one, while the process lives."""
        deadline = time.monotonic() + 540
        while time.monotonic() < deadline:
            if any(found >= step for found in self.logged_steps(name)):
                return
            assert process is None or process.poll() is None, "it should have been at work still"
            time.sleep(0.01)
        raise AssertionError(f"{name} did not come to step {step}")

    def logged_steps(self, name: str) -> list[int]:
        """The steps of the rows that a run, which may be at work, has written."""
        metrics = self.folder / name / "metrics.jsonl"
        text = metrics.read_text() if metrics.exists() else ""
        return [int(step) for step in re.findall(r'"step": (\d+),', text)]

    def result(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.folder / name / "result.json").read_text()))

    def starts(self, name: str) -> list[dict[str, Any]]:
        environment = json.loads((self.folder / name / "environment.json").read_text())
        return list(environment["starts"])

    def rows(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def learned(self, name: str) -> dict[str, str]:
        """SHA-256 of each tensor file of the last checkpoint."""
        folder = self.folder / name / "checkpoints"
        last = folder / f"step-{checkpoint.steps(folder)[-1]:08d}"
        manifest = json.loads((last / "MANIFEST.json").read_text())
        return {k: v["sha256"] for k, v in manifest.items() if k.endswith(".safetensors")}

    def untimed_rows(self, name: str) -> list[dict[str, Any]]:
        timed = {"seconds", "images_per_second", "mfu", "memory_mib"}
        return [{k: v for k, v in row.items() if k not in timed} for row in self.rows(name)]
