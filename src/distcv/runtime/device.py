"""The device and its memory."""

import itertools
from collections.abc import Iterable

import psutil
import torch
from torch import Tensor

ALIGNMENT = 64  # numbers; kernels may ask for 16 bytes


def synchronize() -> None:
    """Wait for the device, if there is one beside the CPU."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def memory(device: torch.device) -> int:
    """The most bytes that tensors took on this GPU; without one, those of the process now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def computes_in(precision: str, device: torch.device) -> bool:
    """Whether the processor has instructions for this precision, as far as oneDNN knows.

    Of another device it is taken for granted.
    """
    if device.type != "cpu" or precision == "fp32" or not torch._C._has_mkldnn:
        return True
    return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported")())


def joined(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Move tensors into one row of memory a type, so that few operations copy them all.

    They stay the same objects, and become views of the rows, which are returned.
    """
    rows = []
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    for alike in by_type.values():
        sizes = (-(-t.numel() // ALIGNMENT) * ALIGNMENT for t in alike)
        *starts, end = itertools.accumulate(sizes, initial=0)
        rows.append(alike[0].new_zeros(end))
        for tensor, start in zip(alike, starts, strict=True):
            place = rows[-1][start : start + tensor.numel()].view(tensor.shape)
            tensor.data = place.copy_(tensor)
    return rows
