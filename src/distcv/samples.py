"""Pictures of samples: raw, and below as a recipe augments them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from distcv.augment import Augmenter
from distcv.config import Recipe
from distcv.data import ImageData
from distcv.data.loading import ResidentImages

COLUMNS = 10  # samples in a row of the picture


def sample_picture(data: ImageData, recipe: Recipe, rows: int = 4) -> Tensor:
    """A grid: the first training sample of each class, raw, then augmented; again for more classes.

    Returns:
        uint8 (3, H, W), with so many rows of augmented versions.
    """
    from torchvision.utils import make_grid

    images = ResidentImages(data.train_images, data.train_labels, torch.device("cpu"))
    classes = len(data.info.classes)
    ids = torch.tensor([int((data.train_labels == k).nonzero()[0]) for k in range(classes)])
    batch = images.__getitems__(ids)
    augment = Augmenter(recipe, images, data.info)

    def visible(inputs: Tensor) -> Tensor:
        return ((inputs / augment.normalize.inverse + augment.normalize.mean) / 255).clamp(0, 1)

    drawn = [augment(batch, epoch)[0] for epoch in range(rows)]
    tiles = torch.stack([batch.images / 255, *map(visible, drawn)])
    tiles = F.pad(tiles, (0,) * 7 + (-classes % COLUMNS,), value=0.5)
    blocks = tiles.view(rows + 1, -1, COLUMNS, *data.info.shape).transpose(0, 1)
    grid: Tensor = make_grid(blocks.flatten(0, 2), nrow=COLUMNS, padding=2, pad_value=0.5)
    return grid.mul(255).round().to(torch.uint8)
