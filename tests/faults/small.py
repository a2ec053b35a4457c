"""A training of a few seconds, of one process or several, which the suites on stops disturb."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.core import TINY, Child, Nursery, Place, exact, group_env, wait_until

HANG_TIMEOUT = 4.0  # seconds
BATCH = 32
EPOCH = 10_000 // BATCH  # steps: 9,984 of the 10,000 synthetic images


class Small:
    """Starts it under any name, as often as it takes; knows what it comes to if left alone."""

    def __init__(self, place: Place, nurse: Nursery, steps: int) -> None:
        self.place, self.nurse, self.steps = place, nurse, steps
        self.alone: dict[int, str] = {}

    def flags(self, name: str) -> list[str]:
        return [
            *TINY, "--batch-size", str(BATCH),
            "--dropout", "0.1", "--ema-decay", "0.9", "--max-steps", str(self.steps),
            "--log-every", "1", "--checkpoint-every", "10", "--hang-timeout", str(HANG_TIMEOUT),
            "--name", name, "--runs-dir", str(self.place.folder / "runs"),
            "--data-dir", str(self.place.data_dir),
        ]  # fmt: skip

    def folder(self, name: str) -> Path:
        return self.place.folder / "runs" / name

    def ids(self, name: str) -> Path:
        return self.place.folder / "ids" / name

    def hooks(self, name: str, **more: Any) -> dict[str, Any]:
        """For ``worker.py``: the log of sample ids, and what else is wanted."""
        return {"ids": str(self.ids(name)), **more}

    def start(self, name: str, processes: int = 1, **more: Any) -> list[Child]:
        hooks = self.hooks(name, **more)
        envs = group_env(processes)
        return [self.nurse.start(self.flags(name), faults=hooks, **env) for env in envs]

    def finish(self, name: str, processes: int = 1) -> str:
        """Train on to the end; the digest of what came out."""
        for child in self.start(name, processes):
            code = child.wait(300)
            assert code == 0, f"{name} goes on to exit code {code}: {child.said()[-500:]}"
        return exact(self.folder(name), self.ids(name))

    def check(self, name: str, processes: int = 1) -> None:
        """Train on to the end; AssertionError unless that is what comes out if it is left alone."""
        if processes not in self.alone:
            self.alone[processes] = self.finish(f"alone-{processes}", processes)
        assert self.finish(name, processes) == self.alone[processes], f"{name} is not exact"

    def wait_for_step(self, name: str, step: int, over: Callable[[], bool]) -> None:
        """Wait until metrics.jsonl tells of this step, which it can't once it is over."""
        metrics = self.folder(name) / "metrics.jsonl"

        def come() -> bool:
            steps = re.findall(r'"step": (\d+),', metrics.read_text() if metrics.exists() else "")
            told = any(int(found) >= step for found in steps)
            assert told or not over(), f"over before step {step}"
            return told

        wait_until(come, 120, f"step {step} of {name}")


def wait_for_phase(mark: Path, phase: str, over: Callable[[], bool]) -> None:
    """Wait until a file of ``worker.py`` tells of this phase, which it can't once it is over."""

    def come() -> bool:
        told = mark.exists() and phase in mark.read_text().split()
        assert told or not over(), f"over before the phase {phase}"
        return told

    wait_until(come, 120, phase)
