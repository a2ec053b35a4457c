"""Processes, devices, precision and strategy: the only room that knows Accelerate."""

import contextlib
import os
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    LoggerType,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distcv.config import InputError, Recipe
from distcv.counter_rng import hash_int

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
PROCESS_TIMEOUT = timedelta(minutes=10)


class Runtime:
    """Where and how one training is executed, on this process and on its peers.

    Raises:
        InputError: a strategy that is not supported, processes that were started but did not join,
            or a precision that the device has no arithmetic for.
    """

    def __init__(self, recipe: Recipe, *, compile: bool = False) -> None:
        for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
                raise InputError(
                    f"the launch file asks for {name}, which is not supported: set its "
                    "distributed_type to MULTI_GPU"
                )
        # Accelerate joins CPU processes only if it is told that they are to stay on the CPU.
        on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        self.accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=PRECISIONS[recipe.precision],
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=recipe.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            # Batches are dealt out as the samplers list them; nothing is repeated to fill up.
            dataloader_config=DataLoaderConfiguration(even_batches=False, dispatch_batches=False),
            rng_types=[],
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[
                # Buffers are averaged when they are read, not broadcast in every step.
                DistributedDataParallelKwargs(
                    gradient_as_bucket_view=True, broadcast_buffers=False
                ),
                InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT),
            ],
        )
        self.device: torch.device = self.accelerator.device
        self.processes: int = self.accelerator.num_processes
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if self.processes != started:
            raise InputError(
                f"{started} processes were started but {self.processes} joined: check the launch "
                "file's distributed_type and use_cpu"
            )
        self.rank: int = self.accelerator.process_index
        self.is_main: bool = self.accelerator.is_main_process
        self.accumulation = recipe.gradient_accumulation_steps
        self.seed, self.has_dropout = recipe.seed, recipe.dropout > 0
        self.compile = compile
        if recipe.precision == "fp16" and self.device.type != "cuda":
            raise InputError(
                f"precision fp16 needs a CUDA device, here is {self.device.type}: use bf16 or fp32"
            )
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True

    @property
    def strategy(self) -> str:
        """How the processes share the model: ``single``, or Accelerate's name such as ``ddp``."""
        if self.processes == 1:
            return "single"
        kind = str(self.accelerator.distributed_type.value).lower()
        return "ddp" if kind.startswith("multi_") else kind

    @property
    def device_name(self) -> str:
        """The device in words, such as ``cpu`` or ``NVIDIA H200``."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return self.device.type

    def has_room_for(self, size: int) -> bool:
        """Whether a data set of so many bytes takes less than half of the device's free memory."""
        return self.device.type != "cuda" or 2 * size < torch.cuda.mem_get_info(self.device)[0]

    def prepare(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, *loaders: DataLoader[Any]
    ) -> tuple[Any, ...]:
        """Wrap network, optimizer and loaders for the strategy; the network itself stays usable.

        The network is compiled before it is wrapped: DDP's own optimizer would otherwise split the
        graph at its buckets (pytorch issue 139207).
        """
        network.to(self.device)
        if self.device.type == "cuda":
            network.to(memory_format=torch.channels_last)
        trained = torch.compile(network) if self.compile else network
        # The batches are on the device already.
        placement = [True, True] + [False] * len(loaders)
        with warnings.catch_warnings():
            # torch 2.15 renames broadcast_buffers; Accelerate knows only the old name.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return tuple(
                self.accelerator.prepare(trained, optimizer, *loaders, device_placement=placement)
            )

    def seed_step(self, step: int, part: int) -> None:
        """Make dropout a function of seed, step, accumulation part and rank."""
        if self.has_dropout:
            torch.manual_seed(hash_int(self.seed, step, part, self.rank))

    def accumulate(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """One part of a batch; gradients are shared among the processes in the last part only."""
        part: contextlib.AbstractContextManager[Any] = self.accelerator.accumulate(model)
        return part

    @property
    def last_part(self) -> bool:
        """Whether the part under way is the last of its batch."""
        return bool(self.accelerator.sync_gradients)

    def loss_share(self, loss_sum: Tensor, batch_size: int) -> Tensor:
        """This part's share of the mean loss over the global batch.

        Gradients are averaged over processes and Accelerate divides by the number of parts, so
        the sum is scaled up by both: the result is exact for shares of unequal size too.
        """
        return loss_sum * (self.processes * self.accumulation / batch_size)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, model: nn.Module, norm: float) -> None:
        """Scale the whole gradient down to this norm, if it is larger."""
        self.accelerator.clip_grad_norm_(model.parameters(), norm)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, the same on each; to be called by all of them."""
        if self.processes > 1:
            dist.all_reduce(tensor)
        return tensor

    def average(self, tensor: Tensor) -> None:
        """Replace a tensor by its mean over the processes."""
        if self.processes > 1:
            dist.all_reduce(tensor)
            tensor /= self.processes

    def scaler_state(self) -> dict[str, Any]:
        """State of the fp16 loss scaler, plain numbers; empty in other precisions."""
        return dict(self.accelerator.scaler.state_dict()) if self.accelerator.scaler else {}

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        if self.accelerator.scaler and state:
            self.accelerator.scaler.load_state_dict(state)

    def start_trackers(
        self, names: Sequence[str], project: str, folder: Path, options: dict[str, dict[str, Any]]
    ) -> None:
        """Start these of Accelerate's trackers on the main process; TensorBoard's in ``folder``.

        Raises whatever a tracker raises; a second call then starts all of them anew.
        """
        self.accelerator.trackers.clear()
        self.accelerator.project_configuration.logging_dir = str(folder)
        self.accelerator.log_with = [LoggerType(name) for name in names]
        self.accelerator.init_trackers(project, init_kwargs=options)

    def tracker(self, name: str) -> Any:
        """The tracker's own run object on the main process, a blank object elsewhere."""
        return self.accelerator.get_tracker(name, unwrap=True)

    def track(self, values: dict[str, float], step: int) -> None:
        """Send values to all trackers that were started."""
        self.accelerator.log(values, step=step)

    def wait(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()

    def from_main(self, value: Any) -> Any:
        """The main process's value, on all processes."""
        held = [value]
        if self.processes > 1:
            dist.broadcast_object_list(held, src=0)
        return held[0]

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Let the main process do something; all get its value, or leave together with exit code 2.

        Raises:
            InputError: if ``action`` raised it; without a message on the other processes.
        """
        value, refused = None, None
        if self.is_main:
            try:
                value = action()
            except InputError as error:
                refused = error
        value, failed = self.from_main((value, refused is not None))
        if refused is not None:
            raise refused
        if failed:
            raise InputError
        return value

    def end_trackers(self) -> None:
        """Let the trackers finish what they have to send."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def close(self) -> None:
        """Leave the process group together; nothing can be shared afterwards.

        Without the barrier, a peer's early leave ended a process by SIGABRT in half of all tries
        (gloo, torch 2.15).
        """
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def describe(self) -> str:
        """One line: what runs where."""
        nodes = max(1, self.processes // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        return (
            f"{self.processes} process{'es' * (self.processes > 1)} on {nodes} "
            f"node{'s' * (nodes > 1)}, {self.device_name}, {self.strategy}, "
            f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)} each"
        )
