"""Damaged files: in checkpoints, in their place, and in the run folder around them."""

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from distcv import checkpoint
from distcv.checkpoint import MANIFEST, Checkpoint
from distcv.command_line import RunOptions
from distcv.config import InputError, Recipe
from distcv.data.readers import one_line
from distcv.models import build_model
from distcv.run_folder import RunFolder
from distcv.runtime import Runtime
from distcv.training import Progress
from faults.core import Outcome, Place

TITLE = "Damaged checkpoints and run folders"
BEFORE, LAST, NEXT = (f"step-{step:08d}" for step in (10, 20, 30))


def run(place: Place) -> list[Outcome]:
    return [*changed_bytes(place), *odd_folders(place), *run_folder_files(place)]


def filled(folder: Path, *steps: int) -> Path:
    """A folder of checkpoints with a network's weights, optimizer state and moving average."""
    for step in steps:
        torch.manual_seed(step)
        weights = dict(build_model("tiny_v3", channels=1, classes=10).state_dict())
        momentum = {f"{name}:momentum_buffer": torch.randn(3, 5) for name in weights}
        tensors = {"model": weights, "optimizer": momentum, "ema": weights}
        state = {"progress": asdict(Progress(step=step)), "step": step, "scaler": {}}
        checkpoint.save(folder, step, Checkpoint(tensors, state))
    return folder


def changed_bytes(place: Place) -> list[Outcome]:
    """Each file of a checkpoint cut, or one bit of it flipped, at offsets drawn at random."""
    folder, draw = filled(place.folder / "changed", 10, 20), random.Random(6)
    offsets = place.many(1000, 40)
    files = sorted((folder / LAST).iterdir())

    def cut(data: bytes, offset: int) -> bytes:
        return data[:offset]

    def flip(data: bytes, offset: int) -> bytes:
        bit = 1 << draw.randrange(8)
        return data[:offset] + bytes([data[offset] ^ bit]) + data[offset + 1 :]

    def wipe(data: bytes, offset: int) -> bytes:  # what a disk gives back that lost a block
        return data[:offset].ljust(len(data), b"\0")

    outcomes = []
    for what, change in (("cut off", cut), ("with a bit flipped", flip), ("ending in zeros", wipe)):
        failures, tried = [], 0
        for file in files:
            data = file.read_bytes()
            whole = data.rstrip(b"\0")
            for _ in range(offsets):
                offset = draw.randrange(len(whole))
                file.write_bytes(change(data, offset))
                tried += 1
                if problem := _passes_by(folder):
                    failures.append(f"{file.name} {what} at {offset}: {problem}")
                file.write_bytes(data)
        outcomes.append(
            Outcome(
                f"a file of the newest checkpoint {what}",
                tried, tried - len(failures), "the damaged checkpoint, which is kept aside",
                {"files": len(files), "offsets in each": offsets}, failures,
            )
        )  # fmt: skip
    return outcomes


def _passes_by(folder: Path) -> str | None:
    """What is wrong with how the damaged newest checkpoint is passed by; puts it back."""
    reported = list[str]()
    found = checkpoint.newest(folder, reported.append)
    aside = folder / f"bad-{LAST}"
    if not aside.exists():
        return "it was not noticed"
    aside.rename(folder / LAST)
    if found != folder / BEFORE:
        return f"{found} was taken"
    return None if len(reported) == 1 and "\n" not in reported[0] else f"said: {reported}"


class Odd(NamedTuple):
    """Something that lies in a checkpoints folder, and which checkpoint is right then."""

    what: str
    make: Callable[[Path], object]
    right: str | None = BEFORE
    reports: int = 1


def manifest(change: Callable[[dict[str, object]], object]) -> Callable[[Path], object]:
    """Change what the newest checkpoint's manifest says."""

    def edit(folder: Path) -> None:
        file = folder / LAST / MANIFEST
        said = json.loads(file.read_text())
        change(said)
        file.write_text(json.dumps(said))

    return edit


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something in the place of a file of the newest checkpoint, or of the whole of it."""

    def change(folder: Path) -> None:
        path = folder / LAST / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return change


def link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def copy(name: str) -> Callable[[Path], object]:
    """The newest checkpoint once more, by another name."""
    return lambda folder: shutil.copytree(folder / LAST, folder / name)


def linked(folder: Path) -> None:
    """A link to a file with the right bytes: they could change at any time."""
    file = folder / LAST / WEIGHTS
    file.symlink_to(file.rename(folder / "elsewhere"))


def replaced(folder: Path) -> None:
    (folder / LAST).rename(folder / f"replaced-{LAST}")


def strange_names(folder: Path) -> None:
    for name in ("step-", "step-x", "step-0000003", "xstep-00000030", "step-00000030 "):
        (folder / name).mkdir()
    (folder / "notes.txt").write_text("step-00000030")


WEIGHTS = "model.safetensors"
ODD = (
    Odd("its manifest is gone", lambda f: (f / LAST / MANIFEST).unlink()),
    Odd("its manifest is a folder", instead(MANIFEST, Path.mkdir)),
    Odd("its manifest is 100 MB", instead(MANIFEST, lambda p: p.touch() or os.truncate(p, 10**8))),
    Odd("its manifest has no end", instead(MANIFEST, lambda p: p.write_text("[" * 10**5))),
    Odd("its manifest is a list", instead(MANIFEST, lambda p: p.write_text("[]"))),
    Odd("its manifest names a file that isn't there", manifest(lambda m: m.update(x={}))),
    Odd("its manifest leaves a file out", manifest(lambda m: m.pop("ema.safetensors"))),
    Odd("its manifest names ../x", manifest(lambda m: m.update({"../x": m.pop("state.json")}))),
    Odd("its manifest names /etc/passwd", manifest(lambda m: m.update({"/etc/passwd": {}}))),
    Odd("its manifest has a number for a file", manifest(lambda m: m.update({WEIGHTS: 3}))),
    Odd("it has a file more", lambda f: (f / LAST / "pickle.pt").touch()),
    Odd("its weights are a link", linked),
    Odd("its weights are a dangling link", instead(WEIGHTS, link("nothing"))),
    Odd("its weights are /dev/zero", instead(WEIGHTS, link("/dev/zero"))),
    Odd("its weights are a pipe", instead(WEIGHTS, os.mkfifo)),
    Odd("its weights are a folder", instead(WEIGHTS, Path.mkdir)),
    Odd("it is an empty folder", instead("", Path.mkdir)),
    Odd("it is a file", instead("", Path.touch)),
    Odd("it is a dangling link", instead("", link("nothing"))),
    Odd("it is a link to itself", instead("", link(LAST))),
    Odd("it is a link to the one before", instead("", link(BEFORE))),
    Odd("a later one is an empty folder", lambda f: (f / NEXT).mkdir(), LAST),
    Odd("one has a step of 200 digits", lambda f: (f / f"step-{'9' * 200}").mkdir(), LAST),
    Odd("a later one was being written", copy(f".{NEXT}.new"), LAST, 0),
    Odd("a later one was being deleted", copy(f".{NEXT}.old"), LAST, 0),
    Odd("a later one was set aside", copy(f"bad-{NEXT}"), LAST, 0),
    Odd("folders have names that are almost right", strange_names, LAST, 0),
    Odd("it was being replaced", replaced, LAST, 0),
    Odd("it was replaced by what is empty", lambda f: (replaced(f), (f / LAST).mkdir()), LAST),
    Odd("what it has replaced is there", copy(f"replaced-{LAST}"), LAST, 0),
    Odd("all are empty", lambda f: [file.unlink() for file in f.glob("*/*")], None, 2),
    Odd("nothing is there", lambda f: [shutil.rmtree(one) for one in f.iterdir()], None, 0),
)


def odd_folders(place: Place) -> list[Outcome]:
    """Odd things in a checkpoints folder: the right one is taken, and the next one can be saved."""
    template, failures = filled(place.folder / "template", 10, 20), list[str]()
    for number, odd in enumerate(ODD):
        folder = place.folder / f"odd-{number}"
        shutil.copytree(template, folder)
        odd.make(folder)
        reported = list[str]()
        try:
            found = checkpoint.newest(folder, reported.append)
            assert (found.name if found else None) == odd.right, f"{found} was taken"
            assert len(reported) == odd.reports, f"said: {reported}"
            checkpoint.prune(filled(folder, 30), keep=set())
            found = checkpoint.newest(folder, reported.append)
            assert found == folder / NEXT and len(reported) == odd.reports, "the next one is lost"
        except (AssertionError, OSError, ValueError) as error:
            failures.append(f"{odd.what}: {one_line(error)}")
    return [
        Outcome(
            "manifest gone, dangling names, junk folders, leftovers: the right one is taken",
            len(ODD), len(ODD) - len(failures), "what was damaged, which is kept aside",
            failures=failures,
        )
    ]  # fmt: skip


def run_folder_files(place: Place) -> list[Outcome]:
    """Each file around the checkpoints cut, or a bit of it flipped: one line says it."""
    path, draw, failures, tried = place.folder / "run", random.Random(7), list[str](), 0
    options = RunOptions(), Runtime(Recipe())
    folder = RunFolder(path)
    folder.open(Recipe(), print)
    folder.record_start(*options, None)
    folder.add_row({"event": "train", "step": 1, "epoch": 0.5})
    folder.write_result({"test_accuracy": 99.0, "epochs": 1})
    folder.close()
    kinds = Counter[str]()
    for file in ("config.yaml", "environment.json", "tracker.json", "result.json", "metrics.jsonl"):
        data = (path / file).read_bytes()
        for _ in range(place.many(100, 10)):
            offset, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
            flipped = data[:offset] + bytes([data[offset] ^ bit]) + data[offset + 1 :]
            (path / file).write_bytes(draw.choice([data[:offset], flipped]))
            folder, said, tried = RunFolder(path), list[str](), tried + 1
            try:
                folder.open(Recipe(), said.append)
                folder.read_result()
                if file == "environment.json":
                    folder.record_start(*options, None)
                folder.cut_metrics(1)
                folder.rows()
            except InputError as error:
                said.append(str(error))
            except Exception as error:
                failures.append(f"{file}: {error!r}")
            finally:
                folder.close()
            # Of a value that is changed and still right, it is the folder that is told.
            if len(said) > 1 or any("\n" in line or str(path) not in line for line in said):
                failures.append(f"{file}: said {said}")
            kinds[f"told of {file}"] += bool(said)
            (path / file).write_bytes(data)
    return [
        Outcome(
            "a file of the run folder cut off, or with a bit flipped: refused, or kept aside",
            tried, tried - len(failures), "the damaged file, which is kept", dict(kinds), failures,
        )
    ]  # fmt: skip
