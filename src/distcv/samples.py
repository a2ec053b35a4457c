"""Pictures of samples: raw, and below as a recipe augments them."""

import torch
from torch import Tensor

from distcv.augment import Augmenter
from distcv.config import Recipe
from distcv.data import ImageData
from distcv.data.loading import ResidentImages

COLUMNS = 10  # samples in a row of the picture


def sample_picture(data: ImageData, recipe: Recipe, rows: int = 4) -> Tensor:
    """A grid: the first training sample of each of the first classes, raw, then augmented.

    Returns:
        uint8 (3, H, W), with so many rows of augmented versions.
    """
    from torchvision.utils import make_grid

    images = ResidentImages(data.train_images, data.train_labels, torch.device("cpu"))
    shown = range(min(COLUMNS, len(data.info.classes)))
    ids = torch.tensor([int((data.train_labels == k).nonzero()[0]) for k in shown])
    batch = images.__getitems__(ids)
    augment = Augmenter(recipe, images, data.info)

    def visible(inputs: Tensor) -> Tensor:
        return ((inputs / augment.normalize.inverse + augment.normalize.mean) / 255).clamp(0, 1)

    drawn = [augment(batch, epoch)[0] for epoch in range(rows)]
    tiles = torch.cat([batch.images / 255, *map(visible, drawn)])
    grid: Tensor = make_grid(tiles, nrow=len(shown), padding=2, pad_value=0.5)
    return grid.mul(255).round().to(torch.uint8)
