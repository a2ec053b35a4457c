"""Trainings that W&B follows: their surroundings, and what the server must have of them."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distcv import checkpoint
from distcv.data.readers import Arrays
from support.runs import ONE_THREAD, Process, Runs, end
from support.wandb_server import WandbServer
from support.wandb_store import Run, config_in

EXACT = ("loss", "accuracy", "lr", "grad_norm")  # of a row of training, what is not measured
MEASURED = ("images_per_second", "mfu", "memory_mib")
TABLES = ("confusion_matrix_table", "class_accuracy", "mistakes")


@contextlib.contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server, and at the end a check that it lacked nothing."""
    server = WandbServer()
    yield server
    server.close()
    assert server.unknown == set(), "the client asked for more than the server has"


def be_client(server: WandbServer, monkeypatch: pytest.MonkeyPatch, **own: str) -> None:
    """Let the environment be that of a client of this server, with further variables."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in (server.environment | own).items():
        monkeypatch.setenv(name, value)


@contextlib.contextmanager
def wandb_runs(
    folder: Path, data_dir: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Runs]:
    """Starts trainings which have that server's key; what they log, they send within a second."""
    own = {"HOME": str(folder / "home"), "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"}
    be_client(server, monkeypatch, **own, **ONE_THREAD)
    runs = Runs(folder / "runs", data_dir.resolve())
    yield runs
    runs.end()


def kill(process: Process) -> None:
    """SIGKILL a training and W&B's processes, as Slurm does."""
    end(process)
    assert process.returncode == -signal.SIGKILL, "it should have been at work still"


def sync(runs: Runs, name: str) -> None:
    """Send the logs of a run's offline starts, by our command."""
    command = [sys.executable, "-m", "distcv.sync", str(runs.folder / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def wandb_sync(runs: Runs, name: str) -> None:
    """Likewise, by W&B's own one."""
    folders = map(str, sorted(runs.folder.glob(f"{name}/wandb/offline-run-*")))
    command = [sys.executable, "-m", "wandb", "sync", *folders]
    env = os.environ | {"WANDB_DATA_DIR": str(runs.folder / name)}
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=120)


def run_of(runs: Runs, name: str, server: WandbServer) -> Run:
    """The only run that the server has, which must be this one."""
    [run] = server.runs.values()
    assert run.id == json.loads((runs.folder / name / "tracker.json").read_text())["id"]
    return run


def rows_on_disk(runs: Runs, name: str) -> list[dict[str, Any]]:
    """metrics.jsonl as W&B should have it, one row a step, without what is measured."""
    steps: dict[int, dict[str, Any]] = {}
    for row in runs.rows(name):
        values = steps.setdefault(row["step"], {"_step": row["step"]})
        values["epoch"] = row["epoch"]
        if row["event"] == "train":
            values |= {f"train/{key}": row[key] for key in EXACT}
        else:
            values |= {"val/loss": row["test_loss"], "val/accuracy": row["test_accuracy"]}
            values["val/best_accuracy"] = row["best_test_accuracy"]
    return list(steps.values())


def rows_on_server(run: Run) -> list[dict[str, Any]]:
    """Its rows, likewise; what is measured must be there, and is left out with pictures, tables."""
    rows = []
    for row in run.history:
        measured = {f"train/{key}" for key in MEASURED}
        assert measured <= row.keys() or "train/loss" not in row
        out = {"_timestamp", "_runtime", "samples", *TABLES, *measured}
        rows.append({key: value for key, value in row.items() if key not in out})
    return rows


def check_whole(
    runs: Runs,
    name: str,
    server: WandbServer,
    *,
    starts: int,
    steps: Iterable[int] = range(5, 81, 5),
) -> None:
    """After so many starts: one finished run, one config, each row of metrics.jsonl once."""
    run = run_of(runs, name, server)
    assert [row["_step"] for row in run.history] == list(steps)
    assert rows_on_server(run) == rows_on_disk(runs, name)
    assert run.state == "finished"
    assert run.summary["val/best_accuracy"] == runs.result(name)["best_test_accuracy"]
    begun = [upsert for upsert in server.sent("UpsertBucket") if upsert.get("host")]
    assert len(begun) == starts
    assert {upsert["displayName"] for upsert in begun} == {name}
    assert {upsert["jobType"] for upsert in begun} == {"train"}
    assert len({upsert["groupName"] for upsert in begun}) == 1
    assert [sorted(upsert["tags"]) for upsert in begun] == starts * [["gap", "mnist"]]
    configs = [config_in(upsert) for upsert in begun]
    assert configs == starts * [configs[0]] and configs[0]["model"] == "gap"
    assert configs[0]["commit"] == runs.result(name)["commit"]
    assert run.config == configs[0]


def pixels(png: bytes) -> Any:
    """The numbers of a picture, (H, W) or (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(png)))


def check_findings(runs: Runs, name: str, server: WandbServer, mnist: Arrays) -> None:
    """What W&B has beside rows of numbers: pictures, tables, the model, an alert; each once."""
    run, result = run_of(runs, name, server), runs.result(name)
    begun = [row["samples"] for row in run.history if "samples" in row]
    assert len(begun) == 1 and "samples" in run.history[0], "with the first row, once"
    assert pixels(run.files[begun[0]["path"]]).shape[2] == 3
    assert [key for row in run.history[:-1] for key in row if key in TABLES] == []
    assert all(run.history[-1][key]["path"] in run.files for key in TABLES)
    assert "confusion_matrix" in run.files["config.yaml"].decode(), "the chart of the table"

    tables = {a.name.removeprefix(f"run-{run.id}-"): a for a in server.artifacts}
    names = list(result["class_accuracy"])
    confusion = [[-1] * len(names) for _ in names]
    for row in tables["confusion_matrix_table"].table():
        confusion[names.index(row["Actual"])][names.index(row["Predicted"])] = row["nPredictions"]
    assert confusion == result["confusion"]
    classes = tables["class_accuracy"].table()
    assert {row["class"]: row["accuracy"] for row in classes} == result["class_accuracy"]
    mistakes = tables["mistakes"].table()
    assert len(mistakes) == len(result["mistakes"]) > 0
    for shown, mistake in zip(mistakes, result["mistakes"], strict=True):
        assert shown["label"] == names[mistake["label"]]
        assert shown["label"] == names[mnist.test_labels[mistake["sample"]]]
        assert shown["predicted"] == names[mistake["predicted"]]
        assert shown["confidence"] == mistake["confidence"]
        assert (pixels(shown["image"]) == mnist.test_images[mistake["sample"]][0]).all()

    [model] = [artifact for artifact in server.artifacts if artifact.type == "model"]
    assert (model.name, model.aliases) == (f"model-{name}", ["best", "latest"])
    last = runs.folder / name / "checkpoints"
    last = last / f"step-{checkpoint.steps(last)[-1]:08d}"
    files = {path.name: path.read_bytes() for path in last.iterdir()}
    assert model.files == files | {"config.yaml": (runs.folder / name / "config.yaml").read_bytes()}
    [(title, text, level)] = run.alerts
    assert (title, level) == ("finished", "INFO") and f"{result['test_accuracy']:.2f} %" in text
