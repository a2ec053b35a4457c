"""Augmentation of whole batches on the device; each sample's chance is f(seed, epoch, id).

An operation takes raw images (uint8, or float in 0 … 255, of shape (N, C, H, W)) and what the
recipe says of it, and draws its numbers for each sample by a counter, so they are the same
wherever and with whichever neighbours a sample is processed.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distcv.config import InputError, Recipe
from distcv.counter_rng import hash_int, hash_tensor, uniform
from distcv.data import DatasetInfo
from distcv.data.loading import Batch, ResidentImages


@dataclass(frozen=True)
class Chance:
    """Source of the random numbers of one batch: ids (N,) in one epoch under one seed.

    ``host_ids`` are the same on the CPU, for operations that choose their kernels by chance.
    """

    seed: int
    epoch: int
    ids: Tensor
    host_ids: Tensor

    def on_host(self) -> "Chance":
        """The same numbers, computed on the CPU without waiting for the device."""
        return Chance(self.seed, self.epoch, self.host_ids, self.host_ids)

    def __call__(self, stream: str) -> Tensor:
        """A float32 in [0, 1) for each sample (N,); each stream name gives other numbers."""
        return uniform(self._key(stream), self.ids)

    def integers(self, stream: str, low: int, high: int) -> Tensor:
        """An int64 in low … high, both included, for each sample (N,)."""
        return low + (hash_tensor(self._key(stream), self.ids) * (high - low + 1) >> 32)

    def between(self, stream: str, limit: float) -> Tensor:
        """A float32 in [-limit, limit) for each sample (N,)."""
        return (2 * self(stream) - 1) * limit

    def _key(self, stream: str) -> int:
        return hash_int(self.seed, self.epoch, zlib.crc32(stream.encode()))


def flip(images: Tensor, recipe: Recipe, chance: Chance) -> Tensor:
    """Mirror left to right: half of the samples by chance, or each one in every second epoch.

    Alternating flip: K. Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU" (2024).
    """
    if recipe.flip == "alternating":
        first = replace(chance, epoch=0)("flip") < 0.5
        mirrored = first if chance.epoch % 2 == 0 else ~first
    else:
        mirrored = chance("flip") < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def translate(images: Tensor, recipe: Recipe, chance: Chance) -> Tensor:
    """Shift by whole pixels in both directions, the border filled with zeros or by reflection."""
    reach, (height, width) = recipe.translate, images.shape[-2:]
    if recipe.translate_mode == "reflect":
        padded = F.pad(images.float(), (reach,) * 4, mode="reflect").to(images.dtype)
    else:
        padded = F.pad(images, (reach,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    down = chance.integers("translate-y", 0, 2 * reach)
    right = chance.integers("translate-x", 0, 2 * reach)
    return windows[torch.arange(len(images), device=images.device), :, down, right]


def affine(images: Tensor, recipe: Recipe, chance: Chance) -> Tensor:
    """Rotate, zoom and shear about the centre, bilinear, zeros outside."""
    angle = torch.deg2rad(chance.between("rotate", recipe.rotate))
    zoom = 1 + chance.between("scale", recipe.scale)
    slant = torch.tan(torch.deg2rad(chance.between("shear", recipe.shear)))
    cos, sin, zero = angle.cos() / zoom, angle.sin() / zoom, torch.zeros_like(angle)
    rows = [
        torch.stack([cos, cos * slant - sin, zero], 1),
        torch.stack([sin, sin * slant + cos, zero], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    warped: Tensor = F.grid_sample(images.float(), grid, align_corners=False)
    return warped


def trivial_augment(images: Tensor, recipe: Recipe, chance: Chance) -> Tensor:
    """TrivialAugment (wide): one of 14 operations at one of 31 strengths for each sample.

    Müller and Hutter (2021); the operations are torchvision's. Samples with the same operation
    and strength are processed together.
    """
    from distcv.trivial_augment import OPERATIONS  # torchvision takes a second to load

    on_host = chance.on_host()
    operation = on_host.integers("ta-op", 0, len(OPERATIONS) - 1)
    strength = on_host.integers("ta-size", 0, 30)
    sign = on_host.integers("ta-sign", 0, 1)
    images = images.to(torch.uint8).clone()
    groups = torch.stack([operation, strength, sign], 1)
    for group in torch.unique(groups, dim=0):
        members = (groups == group).all(1).nonzero().squeeze(1).to(images.device)
        apply = OPERATIONS[int(group[0])]
        share = float(group[1]) / 30 * (1 if group[2] else -1)
        images[members] = apply(images[members], share)
    return images


# In the order in which they are applied: name, whether the recipe asks for it, function.
AUGMENTS: dict[str, tuple[Callable[[Recipe], bool], Callable[[Tensor, Recipe, Chance], Tensor]]] = {
    "trivial_augment": (lambda recipe: recipe.trivial_augment, trivial_augment),
    "flip": (lambda recipe: recipe.flip != "none", flip),
    "translate": (lambda recipe: recipe.translate > 0, translate),
    "affine": (lambda recipe: bool(recipe.rotate or recipe.scale or recipe.shear), affine),
}


def cutout(images: Tensor, recipe: Recipe, chance: Chance) -> Tensor:
    """Set a square to zero in normalised images, which is the mean colour.

    DeVries and Taylor (2017); as there, the centre is anywhere and the square may be cut off.
    """
    height, width = images.shape[-2:]
    top = chance.integers("cutout-y", 0, height - 1) - recipe.cutout // 2
    left = chance.integers("cutout-x", 0, width - 1) - recipe.cutout // 2
    box = _boxes(top, top + recipe.cutout, left, left + recipe.cutout, images)
    return images.masked_fill(box, 0.0)


def _boxes(top: Tensor, bottom: Tensor, left: Tensor, right: Tensor, images: Tensor) -> Tensor:
    """True inside each sample's box (N, 1, H, W); edges (N,), the end not included."""
    y = torch.arange(images.shape[-2], device=images.device).view(1, -1, 1)
    x = torch.arange(images.shape[-1], device=images.device).view(1, 1, -1)
    top, bottom, left, right = (edge.view(-1, 1, 1) for edge in (top, bottom, left, right))
    return ((y >= top) & (y < bottom) & (x >= left) & (x < right)).unsqueeze(1)


class Augmenter:
    """Turns fetched training batches into the network's inputs and targets.

    Raises:
        InputError: the recipe shifts images away, or blanks the whole of them.
    """

    def __init__(self, recipe: Recipe, data: ResidentImages, info: DatasetInfo) -> None:
        side = min(info.shape[1:])
        for name, size, limit in (
            ("translate", recipe.translate, side),
            ("cutout", recipe.cutout, 2 * side),
        ):
            if size >= limit:
                raise InputError(
                    f"{name} {size} leaves nothing of images with sides of {side} pixels: "
                    f"use less than {limit}"
                )
        self.recipe, self.data, self.classes = recipe, data, len(info.classes)
        self.normalize = Normalizer(info, data.device)
        self.operations = [apply for wanted, apply in AUGMENTS.values() if wanted(recipe)]
        self.weights: tuple[int, Tensor] | None = None

    def __call__(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
        """Inputs float32 (N, C, H, W), and targets: labels (N,) or, mixed, probabilities (N, K)."""
        inputs = self._augmented(batch, epoch)
        if not (self.recipe.mixup or self.recipe.cutmix):
            return inputs, batch.labels
        chance = self._chance(batch, epoch)
        partner_ids = chance.on_host().integers("partner", 0, len(self.data) - 1)
        partners = self.data.__getitems__(partner_ids)
        others = self._augmented(partners, epoch)
        weight = self._mixing_weights(epoch)[batch.ids]
        if self.recipe.mixup:
            inputs = torch.lerp(others, inputs, weight.view(-1, 1, 1, 1))
        else:
            inputs, weight = _paste_boxes(inputs, others, weight, chance)
        labels = F.one_hot(batch.labels, self.classes).float()
        other_labels = F.one_hot(partners.labels, self.classes).float()
        return inputs, torch.lerp(other_labels, labels, weight.unsqueeze(1))

    def _chance(self, batch: Batch, epoch: int) -> Chance:
        return Chance(self.recipe.seed, epoch, batch.ids, batch.host_ids)

    def _augmented(self, batch: Batch, epoch: int) -> Tensor:
        chance = self._chance(batch, epoch)
        images = batch.images
        for apply in self.operations:
            images = apply(images, self.recipe, chance)
        inputs = self.normalize(images)
        return cutout(inputs, self.recipe, chance) if self.recipe.cutout else inputs

    def _mixing_weights(self, epoch: int) -> Tensor:
        """Each sample's share of itself (N,), drawn from Beta(a, a): Zhang et al. (2018)."""
        if self.weights is None or self.weights[0] != epoch:
            a = self.recipe.mixup or self.recipe.cutmix
            key = [self.recipe.seed, epoch]
            drawn = np.random.default_rng(key).beta(a, a, len(self.data)).astype(np.float32)
            self.weights = epoch, torch.from_numpy(drawn).to(self.data.device)
        return self.weights[1]


def _paste_boxes(
    inputs: Tensor, others: Tensor, weight: Tensor, chance: Chance
) -> tuple[Tensor, Tensor]:
    """CutMix (Yun et al. 2019): the box's area is 1 - weight, less what lies outside the image."""
    height, width = inputs.shape[-2:]
    half = (1 - weight).sqrt() / 2
    y, x = chance("cutmix-y") * height, chance("cutmix-x") * width
    box = _boxes(
        (y - half * height).round(),
        (y + half * height).round(),
        (x - half * width).round(),
        (x + half * width).round(),
        inputs,
    )
    return torch.where(box, others, inputs), 1 - box.float().mean((1, 2, 3))


class Normalizer:
    """Raw images (0 … 255) to float32 with the training set's mean 0 and deviation 1 a channel."""

    def __init__(self, info: DatasetInfo, device: torch.device) -> None:
        def per_channel(values: tuple[float, ...]) -> Tensor:
            return torch.tensor(values, device=device).view(1, -1, 1, 1) * 255

        self.mean, self.inverse = per_channel(info.mean), 1 / per_channel(info.std)

    def __call__(self, images: Tensor) -> Tensor:
        return images.to(torch.float32).sub_(self.mean).mul_(self.inverse)
