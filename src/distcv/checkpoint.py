"""Checkpoints: one form for every strategy, committed by one rename, read without executing code.

A checkpoint is a folder of safetensors and JSON files with a manifest of their sizes and SHA-256
sums. It is written under a hidden name, synced to disk, the manifest last, then renamed.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "MANIFEST.json"
NAME = re.compile(r"step-(\d{8,})")

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by file (``model``, ``optimizer``, ``ema``), and the state in plain JSON types."""

    tensors: dict[str, Tensors]
    state: dict[str, Any]


def save(folder: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write ``folder/step-NNNNNNNN`` so that it is there whole or not at all.

    Raises:
        OSError: the disk is full or not writable; nothing is left under the final name.
    """
    final = place(folder, step)
    temporary = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, tensors in checkpoint.tensors.items():
            on_host = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
            save_file(on_host, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps(checkpoint.state, indent=1))
        manifest = {
            path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(temporary.iterdir())
        }
        for path in temporary.iterdir():
            _sync(path)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _sync(temporary / MANIFEST)
        _sync(temporary)
        if final.exists():  # the same step again, after a resume: the newer one counts
            set_aside(final, "replaced")
        temporary.rename(final)
        _sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def newest(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, or None; damaged ones are renamed and reported."""
    for path in sorted(_checkpoints(folder), key=_step, reverse=True):
        problem = damage(path)
        if problem is None:
            return path
        aside = set_aside(path, "bad")
        report(f"checkpoint {path.name} is damaged ({problem}): kept as {aside.name}, not used")
    return None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint whose files are known to be whole; tensors are on the CPU."""
    tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    return Checkpoint(tensors, load_state(path))


def load_state(path: Path) -> dict[str, Any]:
    """The state alone."""
    return dict(json.loads((path / "state.json").read_text()))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file's size and SHA-256 is checked."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = {file.name for file in path.iterdir()} - {MANIFEST}
        if files != set(manifest):
            return f"files differ from {MANIFEST}"
        for name, entry in manifest.items():
            if (path / name).stat().st_size != entry["bytes"]:
                return f"{name} has the wrong size"
            if _sha256(path / name) != entry["sha256"]:
                return f"{name} has the wrong SHA-256"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} unreadable: {type(error).__name__}"
    return None


def prune(folder: Path, *, keep: set[int | None], newest: int = 2) -> None:
    """Delete all but the newest checkpoints and those of the steps in ``keep``."""
    for path in sorted(_checkpoints(folder), key=_step)[:-newest]:
        if _step(path) not in keep:
            shutil.rmtree(path, ignore_errors=True)
    for leftover in folder.glob(".step-*"):  # of a process killed while it was writing
        shutil.rmtree(leftover, ignore_errors=True)


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, in order."""
    return sorted(_step(path) for path in _checkpoints(folder))


def set_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint so that it is not used again, without losing it."""
    number = 0
    while (
        aside := path.with_name(f"{why}-{path.name}" + (f"-{number}" if number else ""))
    ).exists():
        number += 1
    path.rename(aside)
    return aside


def place(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, or would lie."""
    return folder / f"step-{step:08d}"


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]


def _step(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
