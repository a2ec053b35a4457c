"""A network out of its run folder, as it was evaluated."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from distcv import checkpoint
from distcv.augment import Normalizer
from distcv.config import InputError, Recipe, load_recipe
from distcv.data import DatasetInfo, dataset_info
from distcv.models import build_model, find_model
from distcv.training import image_shape, read_progress

Which = Literal["last", "best"]


@dataclass(frozen=True)
class TrainedNetwork:
    """A plain network in evaluation mode, fp32, with the weights that were evaluated.

    Those are the moving average's where the recipe has one.
    """

    folder: Path
    recipe: Recipe
    info: DatasetInfo
    """The data set it was trained on: its classes, its (C, H, W)."""
    checkpoint: Path
    step: int
    device: torch.device
    network: nn.Module
    normalize: Normalizer
    """Raw images (0 … 255) to the network's inputs."""

    def logits(self, images: Tensor) -> Tensor:
        """Logits (N, K) of raw images (N, C, H, W), uint8 or floats from 0 to 255."""
        # A copy: normalizing works in place.
        pixels = images.to(self.device, torch.float32, copy=True)
        logits: Tensor = self.network(self.normalize(pixels))
        return logits


def open_run(
    folder: Path, *, which: Which = "last", device: torch.device | str = "cpu"
) -> TrainedNetwork:
    """The network of a run, finished or not, at its last checkpoint or at the most accurate one.

    Raises:
        InputError: no run folder, or no such checkpoint in it that is whole.
    """
    if not (folder / "config.yaml").exists():
        raise InputError(f"no run in {folder}: give a folder that distcv.train has written")
    recipe = load_recipe(folder / "config.yaml")
    find_model(recipe.model)
    path = _find(folder, which)
    held = checkpoint.load(path)
    info = dataset_info(recipe.dataset, image_shape(recipe))
    network = build_model(
        recipe.model, channels=info.shape[0], classes=len(info.classes), dropout=recipe.dropout
    )
    try:
        network.load_state_dict(held.tensors["model"] | held.tensors.get("ema", {}))
        step = int(held.state["step"])
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        # Its files are as they were written, and still not what distcv.train writes.
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{path}: no checkpoint of {recipe.model} ({problem})") from None
    device = torch.device(device)
    return TrainedNetwork(
        folder=folder,
        recipe=recipe,
        info=info,
        checkpoint=path,
        step=step,
        device=device,
        network=network.to(device).eval().requires_grad_(False),
        normalize=Normalizer(info, device),
    )


def _find(folder: Path, which: Which) -> Path:
    """The newest checkpoint that is whole, or the one of the best test accuracy."""
    checkpoints, problems = folder / "checkpoints", list[str]()
    for path in checkpoint.candidates(checkpoints):
        if problem := checkpoint.damage(path):
            problems.append(f"{path.name} is damaged ({problem})")
            continue
        if which == "last":
            return path
        best = read_progress(checkpoint.load_state(path)).best_step
        if best is None:
            problems.append("nothing was evaluated yet")
            break
        path = checkpoint.place(checkpoints, best)
        if not (problem := checkpoint.damage(path)):
            return path
        problems.append(f"{path.name} is damaged ({problem})")
        break
    found = f": {', '.join(problems)}" if problems else ""
    raise InputError(f"no {which} checkpoint in {checkpoints}{found}: train it first")
