"""The arithmetic of a training step, and how much of it the device can do."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from distcv.config import Recipe
from distcv.models import build_model
from distcv.runtime import Runtime
from distcv.runtime.device import synchronize


def flops_per_image(recipe: Recipe, shape: tuple[int, ...], classes: int) -> float:
    """Floating-point operations of a training step for one image (C, H, W): two for each
    multiply-add of convolutions and linear layers, forward and backward.

    They are counted on tensors without contents, so the strategy and the compiler change nothing.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = build_model(recipe.model, channels=shape[0], classes=classes)
        network(torch.empty(2, *shape)).sum().backward()  # BatchNorm needs more than one image
    return float(counter.get_total_flops()) / 2


def matmul_flops(runtime: Runtime, repeats: int = 3) -> float:
    """Operations a second of a large square matmul in the run's precision; all processes at once.

    The faster of two kernels for such a product. On a CPU torch.mm is MKL's, which leaves half of
    an AMD processor's vector width unused; a 1x1 convolution is oneDNN's. In fp32 on two cores of
    an EPYC of family 26 they made 175 and 330 GFLOP/s; beside the first, resnet18 had an MFU of
    188 %. On a GPU torch takes TF32 for convolutions of fp32, and not for products.
    """
    on_cpu = runtime.device.type == "cpu"
    size = 1024 if on_cpu else 8192
    dtype = runtime.precision or torch.float32
    if on_cpu and dtype == torch.float16:  # which takes seconds there, for no kernel is made for it
        dtype = torch.float32
    own = torch.Generator(runtime.device).manual_seed(0)
    a, b = (
        torch.randn(size, size, device=runtime.device, dtype=dtype, generator=own) for _ in range(2)
    )
    # As images of 8x8 in channels_last: oneDNN takes no single image on one thread.
    rows, weight = a.view(-1, 8, 8, size).permute(0, 3, 1, 2), b.view(size, size, 1, 1)
    kernels = [partial(torch.mm, a, b), partial(F.conv2d, rows, weight)]
    seconds = min(median_seconds(kernel, repeats) for kernel in kernels)
    del a, b, rows, weight, kernels  # else the peak starts anew at what they hold
    if runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(runtime.device)
    return 2 * size**3 / seconds


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median time of something, after two times that don't count."""
    taken = []
    for _ in range(repeats + 2):
        synchronize()
        began = time.perf_counter()
        run()
        synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[2:])
