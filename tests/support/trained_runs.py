"""Run folders with a checkpoint, made in a moment: of networks that have only seen the data."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distcv.augment import Normalizer
from distcv.checkpoint import Checkpoint, save
from distcv.config import load_recipe
from distcv.data import DATASETS
from distcv.models import build_model
from distcv.training import Progress

STEP, BEST = 20, 10


def make_trained_run(folder: Path, images: Tensor, **fields: Any) -> Path:
    """A run of the recipe `gap`, or another ``model``, with checkpoints at BEST and STEP.

    The weights are random, BatchNorm's statistics those of ``images`` (uint8), and the second
    checkpoint has the last layer's weights negated.
    """
    recipe = load_recipe(fields.get("model", "gap")).model_copy(update=fields)
    info = DATASETS[recipe.dataset]
    torch.manual_seed(recipe.seed)
    network = build_model(recipe.model, channels=info.shape[0], classes=len(info.classes))
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # the plain mean, here of a single batch
    with torch.no_grad():
        network(Normalizer(info, torch.device("cpu"))(images))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(recipe.to_yaml())
    start = {"commit": "c" * 40, "python": "3.11.7", "device": "cpu", "processes": 1, "nodes": 1}
    (folder / "environment.json").write_text(json.dumps({"starts": [start]}))
    rows = []
    for step, accuracy in ((BEST, 30.0), (STEP, 12.5)):
        progress = Progress(step=step, best_accuracy=30.0, best_step=BEST)
        state = {"step": step, "progress": dataclasses.asdict(progress)}
        weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        save(folder / "checkpoints", step, Checkpoint({"model": weights}, state))
        rows.append({"event": "epoch", "step": step, "epoch": step / 10, "test_accuracy": accuracy,
                     "test_loss": 2.25, "best_test_accuracy": 30.0})  # fmt: skip
        with torch.no_grad():
            last = [part for part in network.modules() if hasattr(part, "weight")][-1]
            last.weight.neg_()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
