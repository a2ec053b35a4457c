"""How the processes share a model, and how whole tensors come of the pieces that each one holds.

Strategies with one interface: whole copies (one process, or DDP) here, FSDP2 in ``fsdp.py``, and
DeepSpeed's in ``zero.py``. A checkpoint holds whole tensors under plain names, so each reads what
any other wrote.
"""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distcv.config import Recipe

Tensors = dict[str, Tensor]


class WholeCopies:
    """One process, or a whole copy in each of several, whose gradients are averaged (DDP)."""

    name = "ddp"
    keeps_memory_format = True  # whether weights may lie in memory as channels_last
    has_engine = False  # whether it casts, scales the loss and clips by itself

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def accelerator_options(self) -> dict[str, Any]:
        """Further arguments of Accelerator."""
        return {}

    def joined(self, accelerator: Accelerator) -> None:
        """Called once the processes have joined."""
        if accelerator.num_processes == 1:
            self.name = "single"

    def adopt(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Called before Accelerate wraps the two."""
        self.network, self.optimizer = network, optimizer

    def wrapped(self, model: nn.Module, optimizer: Any) -> None:
        """Called after Accelerate has wrapped the two."""

    def scaler(self, accelerator: Accelerator) -> torch.amp.GradScaler | None:
        """The loss scaler of fp16, or None in other precisions."""
        scaler: torch.amp.GradScaler | None = accelerator.scaler
        return scaler

    def gradients(self) -> list[Tensor]:
        """The gradients before a step, as far as this process holds them."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        return [p.grad for p in params if p.grad is not None]

    def step(self, nonfinite: Tensor | None) -> None:
        """One step of the optimizer, which changes nothing if ``nonfinite``, a float (), is 1."""
        self.optimizer.found_inf = nonfinite  # type: ignore[attr-defined]
        self.optimizer.step()

    def overflow(self) -> bool:
        """Whether an engine has left out the last step, for want of a finite gradient."""
        return False

    def before_step(self) -> None:
        """Called before a step's last backward pass, in which an engine clips and steps."""

    def stepped(self) -> None:
        """Called after a step that an engine or a loss scaler has made, or left out."""

    def gradient_norm(self, clipped: Any) -> Any:
        """The norm of the whole gradient, from what clipping it has returned."""
        return clipped

    def pieces(self) -> Tensors:
        """The parameters, as far as this process holds them, in their live memory."""
        return {name: p.detach() for name, p in self.network.named_parameters()}

    def whole(self, name: str, piece: Tensor) -> Tensor:
        """The whole of a tensor laid out as parameter ``name``; to be called by all processes."""
        return piece

    def piece(self, name: str, whole: Tensor) -> Tensor:
        """This process's piece of a tensor laid out as parameter ``name``."""
        return whole

    def drop_gathered(self) -> None:
        """Drop whole weights that a forward pass left: pieces may have been written to since."""

    def load_weights(self, tensors: Tensors) -> None:
        """Take over whole parameters and buffers."""
        for name, piece in self.pieces().items():
            piece.copy_(self.piece(name, tensors[name]))
        for name, buffer in self.network.named_buffers():
            buffer.copy_(tensors[name])
        self.drop_gathered()

    def optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's state, whole, as ``parameter name:slot``; by all processes together."""
        self.drop_gathered()
        names = {id(p): name for name, p in self.network.named_parameters()}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                for slot, value in self.optimizer.state[p].items():
                    if isinstance(value, Tensor):
                        yield f"{names[id(p)]}:{slot}", self._whole_slot(value)

    def load_optimizer_tensors(self, tensors: Tensors) -> None:
        """Put back what :meth:`optimizer_tensors` gave; rates and decays stay the recipe's."""
        self.drop_gathered()
        params = dict(self.network.named_parameters())
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        index_of = {id(p): index for index, p in enumerate(ordered)}
        state: dict[int, Tensors] = {}
        for key, value in tensors.items():
            name, slot = key.rsplit(":", 1)
            p = params[name]
            counter = value.shape != p.shape
            state.setdefault(index_of[id(p)], {})[slot] = value if counter else self._slot(p, value)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _whole_slot(self, value: Tensor) -> Tensor:
        return value

    def _slot(self, p: Tensor, value: Tensor) -> Tensor:
        # In the weight's memory format: fused kernels take both for the same row of numbers.
        return torch.empty_like(p, dtype=value.dtype).copy_(value)
