"""The fourteen operations of TrivialAugment (wide), Müller and Hutter (2021), by torchvision."""

from collections.abc import Callable

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import functional as TF


def _affine(image: Tensor, *, shift: tuple[int, int] = (0, 0),
            shear: tuple[float, float] = (0.0, 0.0)) -> Tensor:  # fmt: skip
    """Sheared by these shares, which leaves the upper left corner where it is, not the centre."""
    degrees = [float(np.degrees(np.arctan(share))) for share in shear]
    moved: Tensor = TF.affine(
        image, angle=0.0, translate=list(shift), scale=1.0, shear=degrees, center=[0, 0]
    )
    return moved


# Each takes images and a strength in -1 … 1; those without direction use its size alone.
OPERATIONS: list[Callable[[Tensor, float], Tensor]] = [
    lambda image, s: image,
    lambda image, s: _affine(image, shear=(0.99 * s, 0.0)),
    lambda image, s: _affine(image, shear=(0.0, 0.99 * s)),
    lambda image, s: _affine(image, shift=(int(32 * s), 0)),
    lambda image, s: _affine(image, shift=(0, int(32 * s))),
    lambda image, s: TF.rotate(image, 135.0 * s),
    lambda image, s: TF.adjust_brightness(image, 1 + 0.99 * s),
    lambda image, s: TF.adjust_saturation(image, 1 + 0.99 * s),
    lambda image, s: TF.adjust_contrast(image, 1 + 0.99 * s),
    lambda image, s: TF.adjust_sharpness(image, 1 + 0.99 * s),
    lambda image, s: TF.posterize(image, 8 - round(6 * abs(s))),
    lambda image, s: TF.solarize(image, 255.0 * (1 - abs(s))),
    lambda image, s: TF.autocontrast(image),
    lambda image, s: TF.equalize(image),
]
