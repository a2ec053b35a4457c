"""System metrics of all nodes, gathered where the processes exchange figures anyway."""

import contextlib
import math
import os

import psutil
import torch


class NodeMetrics:
    """Load of the processor, memory and GPUs of every node, in percent.

    Each process adds its share to a row of numbers (:meth:`share`), whose sum over all processes is
    read (:meth:`read`). What can't be told is left out.
    """

    KEYS = ("cpu_percent", "memory_percent", "gpu_percent", "gpu_memory_percent")

    def __init__(self, rank: int, processes: int, device: torch.device) -> None:
        self.on_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.node = int(os.environ.get("GROUP_RANK", rank // self.on_node))
        self.nodes = int(os.environ.get("GROUP_WORLD_SIZE", max(1, processes // self.on_node)))
        self.device = device
        self.keys = self.KEYS if device.type == "cuda" else self.KEYS[:2]
        psutil.cpu_percent()  # it counts from here

    def share(self) -> list[float]:
        """This process's part of the sum: nodes x keys numbers."""
        values = [psutil.cpu_percent(), psutil.virtual_memory().percent]
        if self.device.type == "cuda":
            free, whole = torch.cuda.mem_get_info(self.device)
            busy = math.nan
            with contextlib.suppress(Exception):  # it takes NVIDIA's management library
                busy = float(torch.cuda.utilization(self.device))
            values += [busy, 100 * (1 - free / whole)]
        row = [0.0] * (self.nodes * len(self.keys))
        start = self.node * len(self.keys)
        row[start : start + len(self.keys)] = [value / self.on_node for value in values]
        return row

    def read(self, total: list[float]) -> list[dict[str, float]]:
        """The metrics of each node, from the sum over all processes."""
        width = len(self.keys)
        parts = [total[start : start + width] for start in range(0, len(total), width)]
        told = [zip(self.keys, part, strict=True) for part in parts]
        return [{key: value for key, value in node if math.isfinite(value)} for node in told]
