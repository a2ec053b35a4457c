"""Checkpoints: one form for every strategy, committed by one rename, read without executing code.

A checkpoint is a folder of safetensors and JSON files with a manifest of their sizes and SHA-256
sums. It is written under a hidden name, synced to disk, the manifest last, then renamed. Where it
takes the place of one of the same step, that one is called ``replaced-step-NNNNNNNN`` meanwhile.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import Tensor

from distcv.config import InputError
from distcv.durable import make_folder, set_aside, sync, write_file
from distcv.files import read_json

MANIFEST = "MANIFEST.json"
NAME = re.compile(r"(?:replaced-)?step-(\d{8,})")
LEFTOVER = re.compile(r"\.(?:replaced-)?step-\d{8,}\.\w+")
MANIFEST_BYTES = 2**20  # at most; it has a few hundred
REMEDY = "move the checkpoint away to go on from the one before"

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by file (``model``, ``optimizer``, ``ema``), and the state in plain JSON types."""

    tensors: dict[str, Tensors]
    state: dict[str, Any]


def save(
    folder: Path, step: int, checkpoint: Checkpoint, *, check: Callable[[], None] = lambda: None
) -> Path:
    """Write ``folder/step-NNNNNNNN`` so that it is there whole or not at all, and stays there.

    ``check`` is called before anything is written, and before the commit.

    Raises:
        OSError: the disk is full or not writable; the checkpoints from before are as they were.
    """
    check()
    final = place(folder, step)
    replaced = final.with_name(f"replaced-{final.name}")
    temporary = final.with_name(f".{final.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(folder)
    temporary.mkdir()
    try:
        manifest = {}
        for name, data in _files(checkpoint):
            write_file(temporary / name, data)
            manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write_file(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        sync(temporary)
        check()
        if os.path.lexists(final):  # the same step again, after a resume: the newer one counts
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        temporary.rename(final)
        sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _files(checkpoint: Checkpoint) -> Iterator[tuple[str, bytes]]:
    """Names and bytes, one after the other: they take as much memory again as the tensors."""
    for name, tensors in checkpoint.tensors.items():
        on_host = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
        yield f"{name}.safetensors", serialized(on_host)
    yield "state.json", json.dumps(checkpoint.state, indent=1).encode()


def newest(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, or None; damaged ones are renamed and reported.

    To be called by the process that holds the run folder: what a killed one left is put in order.

    Raises:
        OSError: the folder can't be read or written.
    """
    _clear(folder)
    for path in candidates(folder):
        problem = damage(path)
        if problem is None:
            return path.rename(place(folder, _step(path)))
        aside = set_aside(path, "bad")
        report(f"checkpoint {path.name} is damaged ({problem}): kept as {aside.name}, not used")
    return None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint whose files are known to be whole; tensors are on the CPU.

    Raises:
        InputError: a file is not of its format.
    """
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            tensors[file.stem] = load_file(file)
        except SafetensorError as error:
            raise InputError(f"{file}: no safetensors ({error}): {REMEDY}") from None
    return Checkpoint(tensors, load_state(path))


def load_state(path: Path) -> dict[str, Any]:
    """The state alone.

    Raises:
        InputError: it is not a JSON object.
    """
    file = path / "state.json"
    try:
        state = read_json(file)
    except ValueError:
        state = None
    if not isinstance(state, dict):
        raise InputError(f"{file}: not a JSON object: {REMEDY}")
    return state


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file's size and SHA-256 is checked."""
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            return "no folder"
        sizes = {}
        for file in path.iterdir():
            status = file.lstat()
            if not stat.S_ISREG(status.st_mode):
                return f"{file.name} is no plain file"
            sizes[file.name] = status.st_size
        if not 0 <= sizes.pop(MANIFEST, -1) <= MANIFEST_BYTES:
            return f"{MANIFEST} is missing or too long"
        manifest = json.loads((path / MANIFEST).read_bytes())
        if sizes.keys() != manifest.keys():
            return f"files differ from {MANIFEST}"
        for name, entry in manifest.items():
            if sizes[name] != entry["bytes"]:
                return f"{name} has the wrong size"
            if _sha256(path / name) != entry["sha256"]:
                return f"{name} has the wrong SHA-256"
    except OSError as error:
        return f"unreadable: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} unreadable: {type(error).__name__}"
    return None


def prune(folder: Path, *, keep: set[int | None], newest: int = 2) -> None:
    """Delete all but the newest checkpoints and those of the steps in ``keep``."""
    kept = set[int]()
    with contextlib.suppress(OSError):  # what can't be deleted now may be the next time
        for path in candidates(folder):
            step = _step(path)
            if step not in kept and (len(kept) < newest or step in keep):
                kept.add(step)
            elif path.is_dir():  # first a hidden name, so that none is seen half deleted
                path.rename(path.with_name(f".{path.name}.old"))
        sync(folder)
        _clear(folder)


def _clear(folder: Path) -> None:
    """Delete what a process that was killed was writing or deleting."""
    for path in folder.glob(".*"):
        if LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def candidates(folder: Path) -> list[Path]:
    """What is named like a checkpoint, the newest first; one that was replaced after its heir."""
    if not folder.exists():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_step(path), path.name), reverse=True)


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, in order."""
    return sorted({_step(path) for path in candidates(folder)})


def place(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, or would lie."""
    return folder / f"step-{step:08d}"


def _step(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
