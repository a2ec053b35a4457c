"""DeepSpeed ZeRO as a strategy: one flat row of numbers a group of parameters, cut into pieces."""

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator, DeepSpeedPlugin
from torch import Tensor

from distcv.config import Recipe
from distcv.runtime.strategies import Tensors, WholeCopies

AUTOCAST = {"fp32": "bfloat16", "bf16": "bfloat16", "fp16": "float16"}


class Zero(WholeCopies):
    """DeepSpeed ZeRO: stage 1 cuts the optimizer's state, 2 the gradients too, 3 the weights too.

    Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models"
    (2020). The engine works in fp32 and casts as autocast does, so that its arithmetic is that of
    the other strategies.
    """

    keeps_memory_format = False  # parameters are views of one flat tensor
    has_engine = True
    scale = 1.0  # of the last step's loss

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        import deepspeed

        # An exchange through shared memory, for inference, is compiled at the first start on a CPU.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.plugin = _ZeroPlugin()
        self.stage: int = self.plugin.zero_stage
        self.name = f"zero{self.stage}"

    def accelerator_options(self) -> dict[str, Any]:
        config = self.plugin.deepspeed_config
        config |= {
            # Accelerate would fill in a norm of 1.
            "gradient_clipping": self.recipe.clip_norm or 0.0,
            "gradient_accumulation_steps": self.recipe.gradient_accumulation_steps,
            "train_micro_batch_size_per_gpu": 1,  # only DeepSpeed's own logs use it
            "torch_autocast": {
                "enabled": self.recipe.precision != "fp32",
                "dtype": AUTOCAST[self.recipe.precision],
                "lower_precision_safe_modules": [],  # gradients travel in fp32, as under DDP
            },
        }
        # No parameter stays whole between steps, so that each is read and written in one way.
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
        return {"deepspeed_plugin": self.plugin}

    def joined(self, accelerator: Accelerator) -> None:
        # It says at every start that an optimizer of torch is not its own.
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # It calls exchanges by names that torch 2.14 warns of, at every call.
        warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)

    def wrapped(self, model: Any, optimizer: Any) -> None:
        self.engine, self.zero = model, optimizer.optimizer

    def scaler(self, accelerator: Accelerator) -> torch.amp.GradScaler | None:
        scaler: torch.amp.GradScaler | None = self.zero.torch_autocast_gradscaler
        return scaler

    # Of the loss scaler of fp16 DeepSpeed's clipping knows nothing, nor the scaler of an overflow:
    # the scale would never fall (0.19.8). Accelerate has it step at the end of the backward pass.

    # It leaves out a step without a finite gradient by itself, and on all processes: it reads the
    # norm in every step, for which it waits.

    def overflow(self) -> bool:
        return bool(self.zero.overflow)

    def before_step(self) -> None:
        if scaler := self.zero.torch_autocast_gradscaler:
            self.scale = scaler.get_scale()
            self.zero.clip_grad = (self.recipe.clip_norm or 0.0) * self.scale

    def stepped(self) -> None:
        if (scaler := self.zero.torch_autocast_gradscaler) and self.zero.overflow:
            scaler.update(new_scale=scaler.get_scale() * scaler.get_backoff_factor())

    def gradient_norm(self, clipped: Any) -> Any:
        return self.engine.get_global_grad_norm() / self.scale

    def pieces(self) -> Tensors:
        if self.stage < 3:
            return super().pieces()
        return {name: p.ds_tensor.detach() for name, p in self._parameters().items()}

    def whole(self, name: str, piece: Tensor) -> Tensor:
        if self.stage < 3:
            return piece
        p: Any = self.network.get_parameter(name)
        parts = [torch.empty_like(piece) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, piece.contiguous())
        return torch.cat(parts)[: p.ds_numel].view(p.ds_shape)

    def piece(self, name: str, whole: Tensor) -> Tensor:
        if self.stage < 3:
            return whole
        p: Any = self.network.get_parameter(name)
        size = p.ds_tensor.numel()
        flat = F.pad(whole.flatten(), (0, size * dist.get_world_size() - whole.numel()))
        return flat.narrow(0, size * dist.get_rank(), size)

    def drop_gathered(self) -> None:
        if self.stage == 3:
            self.engine.empty_partition_cache()  # weights that are whole at the moment are old

    def load_weights(self, tensors: Tensors) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        super().load_weights(tensors)
        # The optimizer keeps weights of its own, which it copies to the network's in every step.
        for name, p in self._parameters().items():
            if self.stage < 3:
                safe_set_full_fp32_param(p, tensors[name].to(p.device))
            else:
                safe_set_local_fp32_param(p, self.piece(name, tensors[name].to(p.device)))

    def optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_state()
        slots: dict[str, Any] = next(iter(self.optimizer.state.values()), {})
        for name, p in self._parameters().items():
            for slot, value in slots.items():
                if isinstance(value, Tensor):
                    # A counter is one for all weights.
                    whole = safe_get_full_optimizer_state(p, slot) if value.ndim else value.clone()
                    yield f"{name}:{slot}", whole

    def load_optimizer_tensors(self, tensors: Tensors) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        params = self._parameters()
        for flat in self._flat_weights():  # what it has by now, where there was none at the start
            for value in self.optimizer.state[flat].values():
                if isinstance(value, Tensor):
                    value.zero_()
        for slot, value in {key.rsplit(":", 1)[1]: value for key, value in tensors.items()}.items():
            for flat in self._flat_weights():  # the state of a new optimizer is empty
                state = self.optimizer.state[flat]
                if value.ndim == 0:
                    state[slot] = value.to(flat.device, copy=True)  # fused kernels need it there
                elif slot not in state:
                    state[slot] = torch.zeros_like(flat)
        self._link_state()
        for key, value in tensors.items():
            name, slot = key.rsplit(":", 1)
            if value.ndim and self.stage < 3:
                safe_set_full_optimizer_state(params[name], value.to(params[name].device), slot)
            elif value.ndim:
                piece = self.piece(name, value.to(params[name].device))
                safe_set_local_optimizer_state(params[name], piece, slot)

    def _link_state(self) -> None:
        """Tell the parameters where their optimizer state is.

        Stages 1 and 2 do it once, after the step of the first group of parameters, when the others
        have no state yet (DeepSpeed 0.19.8).
        """
        if self.stage < 3 and self.optimizer.state:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _parameters(self) -> dict[str, Any]:
        """The network's parameters, to which stage 3 gives attributes: ds_tensor and others."""
        return dict(self.network.named_parameters())

    def _flat_weights(self) -> list[Tensor]:
        """The optimizer's own weights: all that this process keeps of a group, in one row."""
        if self.stage < 3:
            return list(self.zero.single_partition_of_fp32_groups)
        return list(self.zero.fp32_partitioned_groups_flat)


class _ZeroPlugin(DeepSpeedPlugin):  # type: ignore[misc]
    """Accelerate's settings, without the tie to transformers, which would have to be installed."""

    def set_deepspeed_weakref(self) -> None:
        pass
