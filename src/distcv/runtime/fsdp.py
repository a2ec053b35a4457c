"""FSDP2 (PyTorch's ``fully_shard``) with the interface of the other strategies.

A module of its own, since a training that doesn't use it needn't wait a second for its import.
"""

import warnings
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from distcv.runtime.strategies import Tensors, WholeCopies


class Fsdp2(WholeCopies):
    """Each process holds a part of every parameter's rows (PyTorch FSDP2, ``fully_shard``)."""

    name = "fsdp2"
    keeps_memory_format = False  # FSDP2 refuses parameters that are not contiguous

    def joined(self, accelerator: Accelerator) -> None:
        # Accelerate enters FSDP on GPUs and the like only; its FSDP2 works as well on a CPU.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        # The output of a network that ends in Flatten; nobody writes to it in place.
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view", UserWarning)

    def wrapped(self, model: nn.Module, optimizer: Any) -> None:
        if isinstance(self.optimizer, torch.optim.SGD):  # its fused kernel knows no DTensor
            for group in self.optimizer.param_groups:
                group["fused"], group["foreach"] = False, True
            # Else the loss scaler of fp16 leaves its part to the fused kernel.
            self.optimizer._step_supports_amp_scaling = False

    def gradients(self) -> list[Tensor]:
        return [g.to_local() if isinstance(g, DTensor) else g for g in super().gradients()]

    def gradient_norm(self, clipped: Any) -> Any:
        return clipped.full_tensor() if isinstance(clipped, DTensor) else clipped

    def pieces(self) -> Tensors:
        self.drop_gathered()
        names = [name for name, _ in self.network.named_parameters()]
        return {name: self._sharded(name).to_local().detach() for name in names}

    def whole(self, name: str, piece: Tensor) -> Tensor:
        like = self._sharded(name)
        return DTensor.from_local(
            piece, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        ).full_tensor()

    def piece(self, name: str, whole: Tensor) -> Tensor:
        return self._split(self._sharded(name), whole).to_local()

    def drop_gathered(self) -> None:
        # The outermost part may still be whole after a forward pass, and would be used once more.
        for module in self.network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _sharded(self, name: str) -> DTensor:
        p = self.network.get_parameter(name)
        assert isinstance(p, DTensor)
        return p

    def _split(self, like: DTensor, whole: Tensor) -> DTensor:
        # Every process has read the whole of it: none needs to be sent.
        return distribute_tensor(
            whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None
        )

    def _whole_slot(self, value: Tensor) -> Tensor:
        return value.full_tensor() if isinstance(value, DTensor) else value

    def _slot(self, p: Tensor, value: Tensor) -> Tensor:
        assert isinstance(p, DTensor)
        return self._split(p, value)
