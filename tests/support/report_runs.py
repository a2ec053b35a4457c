"""Run folders to be reported, made without a training."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distcv import checkpoint, report
from distcv.config import load_recipe
from distcv.data import DATASETS
from distcv.models import MODELS, build_model

VERSIONS = {"torch": "2.15.0", "wandb": "0.31.0"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
START = {
    "time": "2026-11-21T18:37:32+0000", "commit": COMMIT, "python": "3.11.7", "distcv": "0.1.0",
    "versions": VERSIONS, "host": "secret-host", "cpu": "AMD EPYC", "cores": 2, "threads": "2",
    "device": "cpu", "processes": 1, "nodes": 1, "strategy": "single",
    "options": {"data_dir": "/secret/place", "compile": False, "sync_bn": False},
}  # fmt: skip
MISTAKES = [
    {"sample": 7, "label": 9, "predicted": 4, "confidence": 0.998},
    {"sample": 11, "label": 6, "predicted": 0, "confidence": 0.75},
]
CONFUSION = [[100 if i == j else 3 * (i == 4 and j == 9) for j in range(10)] for i in range(10)]
NEW = ("confusion", "mistakes")  # entries that older results lack


def make_run(
    folder: Path,
    model: str = "gap",
    seed: int = 0,
    accuracies: tuple[float, ...] = (96.5, 98.9, 99.3),
    *,
    finished: bool = True,
    weights: bool = False,
    without: tuple[str, ...] = (),
    start: dict[str, Any] | None = None,
    **recipe: Any,
) -> Path:
    """A run folder as a training of three epochs leaves it, with weights that learned nothing."""
    folder.mkdir(parents=True)
    own = load_recipe(model).model_copy(update={"seed": seed, "epochs": 3, **recipe})
    (folder / "config.yaml").write_text(own.to_yaml())
    (folder / "environment.json").write_text(json.dumps({"starts": [START | (start or {})]}))
    rows: list[dict[str, Any]] = []
    for epoch, accuracy in enumerate(accuracies, start=1):
        for step in range(10 * epoch - 9, 10 * epoch + 1):
            rows.append(
                {"event": "train", "step": step, "epoch": step / 10, "samples": 128 * step,
                 "loss": 1 / step, "accuracy": 90.0, "lr": 0.1 - step / 400, "grad_norm": 4 / step,
                 "images_per_second": 6000.0, "memory_mib": 400.0, "mfu": None, "seconds": step}
            )  # fmt: skip
        rows.append(
            {"event": "epoch", "step": 10 * epoch, "epoch": float(epoch), "samples": 1280 * epoch,
             "train_loss": 0.5 / epoch, "train_accuracy": accuracy - 0.5, "test_loss": 0.1 / epoch,
             "test_accuracy": accuracy, "best_test_accuracy": max(accuracies), "seconds": 9.0}
        )  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if weights:
        torch.manual_seed(seed)
        classes = len(DATASETS[own.dataset].classes)
        network = build_model(model, channels=DATASETS[own.dataset].shape[0], classes=classes)
        state = {"step": 30, "progress": {"best_step": 30}}
        held = checkpoint.Checkpoint({"model": network.state_dict()}, state)
        checkpoint.save(folder / "checkpoints", 30, held)
    if finished:
        best = max(accuracies)
        result = {
            "model": model, "params": MODELS[model].params, "dataset": own.dataset, "seed": seed,
            "epochs": 3.0, "steps": 30, "test_accuracy": accuracies[-1], "test_loss": 0.1 / 3,
            "best_test_accuracy": best, "best_epoch": float(accuracies.index(best) + 1),
            "class_accuracy": {str(k): accuracies[-1] - k / 10 for k in range(10)},
            "confusion": CONFUSION, "mistakes": MISTAKES, "seconds": 43.0 + seed,
            "images_per_second": 6000.0, "device": "cpu", "processes": 1, "strategy": "single",
            "precision": "fp32", "commit": COMMIT,
        }  # fmt: skip
        for key in without:
            del result[key]
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def make_runs(folder: Path) -> Path:
    """Three seeds of one network, one of another, one by an older version, one not finished."""
    for seed, last in enumerate((99.3, 99.4, 99.5)):
        make_run(folder / f"gap-{seed}", seed=seed, accuracies=(96.5, 98.9, last), weights=True)
    make_run(folder / "other", "gap_9k", accuracies=(95.0, 99.6, 99.2), weights=True)
    make_run(folder / "old", lr=0.3, without=NEW, start={"threads": "1"})
    make_run(folder / "open", seed=7, accuracies=(91.0, 94.0), finished=False)
    return folder


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, words)])
    report.main()


def made_report(base: Path, data_dir: Path) -> Path:
    """The report of `make_runs`, made once below the base of all temporary folders."""
    folder = base / "report-of-six-runs"
    if not folder.exists():
        with pytest.MonkeyPatch.context() as patch:
            call(patch, make_runs(folder / "runs"), "--output", folder / "out", "--target", 99.4,
                 "--data-dir", data_dir)  # fmt: skip
    return folder / "out"
