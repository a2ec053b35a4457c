"""Grad-CAM: where in an image a network finds its class.

Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization" (ICCV 2017).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def grad_cam(
    network: nn.Module, logits_of: Callable[[Tensor], Tensor], images: Tensor
) -> tuple[Tensor, Tensor]:
    """Heat maps of the classes predicted, from the last convolution whose map is a map still.

    The map's channels are weighted by the mean gradient of the class's logit, summed, and what
    speaks against the class is cut off.

    Args:
        network: in evaluation mode, so that the images of a batch don't influence each other.
        logits_of: the network on raw images, differentiable.
        images: raw images (N, C, H, W).

    Returns:
        Maps (N, H, W) from 0 to 1, the highest of each image 1 unless all of it is 0; and the
        logits (N, K).

    Raises:
        ValueError: no convolution of the network gives more than one pixel.
    """
    seen: list[Tensor] = []

    def remember(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if min(output.shape[-2:]) > 1:
            seen[:] = [output]

    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    hooks = [module.register_forward_hook(remember) for module in convolutions]
    try:
        with torch.enable_grad():
            # A copy, since the network's own weights are frozen and its normalization is in place.
            logits = logits_of(images.float().requires_grad_().clone())
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError("no convolution gives a map of more than one pixel")
    maps = seen[0]
    (gradient,) = torch.autograd.grad(logits.max(dim=1).values.sum(), maps)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    heat = (weights * maps.detach()).sum(dim=1, keepdim=True).relu()
    heat = F.interpolate(heat, size=images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    peak = heat.amax(dim=(1, 2), keepdim=True)
    return heat / peak.clamp(min=torch.finfo(heat.dtype).tiny), logits.detach()
