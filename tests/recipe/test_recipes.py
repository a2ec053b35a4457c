"""Every recipe that comes with distcv trains the network it names, on the real data."""

import math
from pathlib import Path
from typing import Any

import pytest

from distcv.config import load_recipe, recipe_names
from distcv.data import load_dataset
from distcv.loop import train_epoch
from distcv.models import MODELS
from distcv.runtime import Runtime
from distcv.training import Progress, build
from support.trajectory import NeverStop


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe_names())
def test_recipe_trains(name: str, data_dir: Path, mnist: object, cifar10: object) -> None:
    """A recipe of distcv would fail in its first steps, or leave some weights untrained."""
    shipped = load_recipe(name)
    recipe = shipped.model_copy(update={"max_steps": 2, "batch_size": 16})
    training = build(recipe, load_dataset(recipe.dataset, data_dir), Runtime(recipe))
    before = [p.detach().clone() for p in training.network.parameters()]
    assert sum(p.numel() for p in before) == MODELS[recipe.model].params
    progress, rows = Progress(), []

    def never() -> None:
        raise AssertionError("nothing is due to be saved")

    def log(row: dict[str, Any]) -> None:
        rows.append(row)

    completed = train_epoch(
        training, progress, log_every=1, log=log, advance=lambda: None,
        checkpoint_every=None, save=never, stop=NeverStop(),
    )  # fmt: skip
    assert completed and progress.step == 2
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["lr"] > 0 for row in rows)
    moved = [
        bool((p.detach() != b).any())
        for p, b in zip(training.network.parameters(), before, strict=True)
    ]
    assert all(moved), "every parameter is trained"
