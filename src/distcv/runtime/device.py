"""Questions to the device."""

import psutil
import torch


def synchronize() -> None:
    """Wait for the device, if there is one beside the CPU."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def memory(device: torch.device) -> int:
    """The most bytes that tensors took on this GPU; without one, those of the process now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
