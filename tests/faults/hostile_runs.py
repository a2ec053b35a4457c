"""Run folders as nobody would leave them but an enemy: for ``hostile``."""

import io
import json
import os
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from distcv import checkpoint
from support.data_files import Command, sha256
from support.report_runs import START

ESCAPE = "\x1b[2J\x1b]0;owned\x07\r\u202e"
MARKUP = "<img src=x onerror=alert(1)>"
FORMULA = r"$\frac$ $\undefined{"
TEXTS = (ESCAPE, MARKUP, FORMULA, "|`*_[x](javascript:y)", "../../../outside/secret")
DEEP = "[" * 100_000

Change = Callable[[Path], object]


# Checkpoints


def seal(folder: Path) -> None:
    """Give a checkpoint a manifest that is right for whatever lies there."""
    manifest = {}
    for path in sorted(folder.iterdir()):
        if path.name != checkpoint.MANIFEST:
            data = path.read_bytes() if path.resolve().is_file() else b""
            manifest[path.name] = {"bytes": len(data), "sha256": sha256(data)}
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def sealed(change: Change) -> Change:
    """The change, with a manifest that is right after it."""

    def both(folder: Path) -> None:
        change(folder)
        seal(folder)

    return both


def put(name: str, data: bytes | str) -> Change:
    """A change of one file, to these contents."""
    contents = data if isinstance(data, bytes) else data.encode()
    return lambda folder: (folder / name).write_bytes(contents)


def instead(name: str, make: Change) -> Change:
    """A change of one file, to something that is no file."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def link(target: str | Path) -> Change:
    return lambda path: path.symlink_to(target)


def terabyte(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def more_in_manifest(name: str) -> Change:
    def change(folder: Path) -> None:
        manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
        manifest[name] = {"bytes": 30, "sha256": 64 * "0"}
        (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))

    return change


def state(**fields: Any) -> Change:
    """The state with other values."""
    held = {"step": 30, "progress": {"best_step": 30}} | fields
    return sealed(put("state.json", json.dumps(held)))


def safetensors(header: bytes, length: int | None = None) -> Change:
    size = (len(header) if length is None else length).to_bytes(8, "little")
    return sealed(put("model.safetensors", size + header))


def pickled(canary: Path) -> bytes:
    """What torch.load would run."""
    file = io.BytesIO()
    torch.save({"weights": Command(os.system, f"touch {canary}")}, file)
    return file.getvalue()


def checkpoints(outside: Path, canary: Path) -> dict[str, Change]:
    """Changes of a checkpoint's folder."""
    weights, manifest = "model.safetensors", checkpoint.MANIFEST
    tensor = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    return {
        "weights are a pickle": sealed(put(weights, pickled(canary))),
        "a pickle beside": sealed(put("optimizer.safetensors", pickled(canary))),
        "a pickle called .pt": sealed(put("model.pt", pickled(canary))),
        "weights link outside": sealed(instead(weights, link(outside / "secret"))),
        "weights link to a device": sealed(instead(weights, link("/dev/zero"))),
        "weights are a fifo": sealed(instead(weights, os.mkfifo)),
        "weights are a folder": sealed(instead(weights, Path.mkdir)),
        "a fifo beside": sealed(instead("more.safetensors", os.mkfifo)),
        "state is a fifo": sealed(instead("state.json", os.mkfifo)),
        "state links to a device": sealed(instead("state.json", link("/dev/zero"))),
        "manifest is a fifo": instead(manifest, os.mkfifo),
        "manifest links to a device": instead(manifest, link("/dev/zero")),
        "manifest of a terabyte": instead(manifest, terabyte),
        "manifest nested deeply": put(manifest, DEEP),
        "manifest leads out": more_in_manifest("../../../../outside/secret"),
        "manifest leads to a place": more_in_manifest(str(outside / "secret")),
        "state nested deeply": sealed(put("state.json", DEEP)),
        "state is a list": sealed(put("state.json", "[1]")),
        "state is a long number": sealed(put("state.json", "9" * 5000)),
        "state's step is a text": state(step=ESCAPE),
        "state's progress is a text": state(progress=ESCAPE),
        "state's best step is a place": state(progress={"best_step": "../../../outside"}),
        "header of 2^63 bytes": safetensors(b"{}", 1 << 63),
        "header of a gigabyte": safetensors(b"{}", 1 << 30),
        "header nested deeply": safetensors(b'{"a":' * 50_000),
        "a tensor of terabytes": safetensors(json.dumps({"conv.weight": tensor}).encode()),
        "names to be printed": safetensors(
            json.dumps({ESCAPE: tensor | {"shape": [0], "data_offsets": [0, 0]}}).encode()
        ),
    }


# The other files


def result(**fields: Any) -> Change:
    """result.json with other values."""

    def change(folder: Path) -> None:
        held = json.loads((folder / "result.json").read_text())
        (folder / "result.json").write_text(json.dumps(held | fields))

    return change


def row(**fields: Any) -> Change:
    """One more row in metrics.jsonl."""
    held = {"event": "epoch", "step": 40, "epoch": 4.0, "test_accuracy": 50.0} | fields

    def change(folder: Path) -> None:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(held) + "\n")

    return change


def start(**fields: Any) -> Change:
    """environment.json of one start with other values."""
    return put("environment.json", json.dumps({"starts": [START | fields]}))


def files_of_runs() -> dict[str, Change]:
    """Changes of a run's folder."""
    changes: dict[str, Change] = {}
    for name in ("config.yaml", "result.json", "metrics.jsonl", "environment.json"):
        changes |= {
            f"{name} is a fifo": instead(name, os.mkfifo),
            f"{name} links to a device": instead(name, link("/dev/zero")),
            f"{name} is a folder": instead(name, Path.mkdir),
            f"{name} of a terabyte": instead(name, terabyte),
            f"{name} nested deeply": put(name, DEEP),
            f"{name} is no UTF-8": put(name, b"\xff\xfe"),
            f"{name} is a list": put(name, "[1, 2]"),
            f"{name} is a long number": put(name, "9" * 5000),
        }
    for number, text in enumerate(TEXTS):
        changes |= {
            f"recipe with text {number}": put("config.yaml", "model: " + json.dumps(text)),
            f"result with text {number}": result(
                device=text, commit=text, strategy=text, precision=text, model=text, dataset=text,
                class_accuracy={text: 1.0}, environment={"cpu": text, "versions": {text: text}},
            ),
            f"row with text {number}": row(event=text, step=text),
            f"metric with text {number}": row(test_accuracy=text, test_loss=text, loss=text),
            f"start with text {number}": start(
                commit=text, cpu=text, device=text, strategy=text, python=text, distcv=text,
                versions={text: text}, threads=text, options={text: text},
            ),
        }  # fmt: skip
    odd: tuple[Any, ...] = (None, [], {}, "x", -1, 1e308, float("nan"), float("inf"), 10**30, [[]])
    for value in odd:
        fields = ("test_accuracy", "seconds", "confusion", "mistakes", "class_accuracy", "params",
                  "best_epoch", "epochs", "environment", "images_per_second")  # fmt: skip
        changes |= {f"result's {name} is {value!r}": result(**{name: value}) for name in fields}
        changes |= {f"row's {name} is {value!r}": row(**{name: value})
                    for name in ("step", "epoch", "test_accuracy", "event")}  # fmt: skip
        changes |= {f"start's {name} is {value!r}": start(**{name: value})
                    for name in ("commit", "versions", "options", "cpu", "time")}  # fmt: skip
    for sample in (-1, 10**9, 0.5):
        mistake = {"sample": sample, "label": sample, "predicted": sample, "confidence": 1e308}
        changes[f"a mistake in sample {sample}"] = result(mistakes=[mistake])
    return changes


def make(folder: Path, base: Path, change: Change, *, of_checkpoint: bool = False) -> Path:
    """A copy of a run with this change."""
    shutil.copytree(base, folder)
    change(next((folder / "checkpoints").iterdir()) if of_checkpoint else folder)
    return folder


HARMLESS = ("data:image/", "data:,", "#", "https://github.com/")


class Live(HTMLParser):
    """Finds what a browser would run or fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "object", "embed", "base"):
            self.found.append(tag)
        for name, value in attrs:
            fetched = name in ("src", "href", "action") and not (value or "").startswith(HARMLESS)
            if name.startswith("on") or fetched:
                self.found.append(f"{tag} {name}={value}")
