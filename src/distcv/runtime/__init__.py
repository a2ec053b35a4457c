"""Processes, devices, precision: the only room that knows Accelerate and DeepSpeed."""

import contextlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distcv.command import die
from distcv.config import InputError, Recipe
from distcv.counter_rng import hash_int
from distcv.durable import explain
from distcv.environment import keep_memory
from distcv.runtime.device import joined, use_channels_last
from distcv.runtime.heartbeat import Heartbeat, own_store
from distcv.runtime.launch import choose_strategy, start
from distcv.runtime.nodes import NodeMetrics
from distcv.runtime.sync_bn import convert
from distcv.runtime.trackers import AccelerateTrackers

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Runtime:
    """Where and how one training is executed, on this process and on its peers.

    Raises:
        InputError: a strategy that is not supported or can't be combined with the recipe, or
            processes that were started but did not join.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        compile: bool = False,
        sync_bn: bool = False,
        hang_timeout: float = 120.0,
        node_metrics: bool = False,
    ) -> None:
        self.strategy = choose_strategy(recipe)
        self.accelerator = start(recipe, self.strategy)
        self.trackers = AccelerateTrackers(self.accelerator)
        self.device: torch.device = self.accelerator.device
        self.processes: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.is_main: bool = self.accelerator.is_main_process
        self.heartbeat: Heartbeat | None = None
        if self.processes > 1:
            self.heartbeat = Heartbeat(own_store(), self.rank, self.processes, timeout=hang_timeout)
            self.heartbeat.start()
        self.beaten = time.monotonic()
        where = self.rank, self.processes, self.device
        self.node_metrics = NodeMetrics(*where) if node_metrics else None
        self.accumulation = recipe.gradient_accumulation_steps
        self.seed, self.has_dropout = recipe.seed, recipe.dropout > 0
        self.compile, self.sync_bn = compile, sync_bn and self.processes > 1
        self.precision = AUTOCAST[recipe.precision]
        self.norm: Any = math.nan
        self.one = torch.ones((), device=self.device)
        if recipe.precision == "fp16" and not self.strategy.has_engine:
            self.accelerator.scaler = torch.amp.GradScaler(self.device.type)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        else:
            keep_memory()

    @property
    def nodes(self) -> int:
        """Nodes (machines) that take part."""
        return max(1, self.processes // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    @property
    def restarts(self) -> int:
        """How often the launcher has started this group of processes anew after a failure."""
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))

    def beat(self, step: int | None = None) -> None:
        """Note that this process gets on; tell the peers which step it is at."""
        self.beaten = time.monotonic()
        if self.heartbeat and step is not None:
            self.heartbeat.beat(step)

    def idle_seconds(self) -> float:
        """Seconds since the last :meth:`beat`; may be asked by another thread."""
        return time.monotonic() - self.beaten

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

        A compiled network has a graph of its own for each size of a batch, of which there are few;
        DDP splits it at its buckets, whose exchange so runs beside the backward pass.
        """
        network.to(self.device)
        use_channels_last(network, self.device, weights=self.strategy.keeps_memory_format)
        if self.sync_bn:
            convert(network, self.device)
        self.strategy.adopt(network, optimizer)
        if self.compile:
            network.compile(dynamic=False)
        with warnings.catch_warnings():
            # torch 2.15 renames broadcast_buffers; Accelerate knows only the old name.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            prepared = self.accelerator.prepare(network, optimizer, *loaders)
        self.strategy.wrapped(prepared[0], prepared[1])
        self.statistics = joined(network.buffers())
        return tuple(prepared)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Half precision where it is safe; weights, gradients and their exchange stay fp32."""
        if self.precision is None or self.strategy.has_engine:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The network's whole parameters and buffers by name; by all processes together."""
        yield from self.whole(self.strategy.pieces())
        yield from self.strategy.network.named_buffers()

    def averageable(self) -> dict[str, Tensor]:
        """What a moving average follows: this process's pieces of the weights, and statistics."""
        buffers = self.strategy.network.named_buffers()
        return self.strategy.pieces() | {n: b for n, b in buffers if b.is_floating_point()}

    def whole(self, pieces: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors of pieces such as those of :meth:`averageable`; by all together."""
        weights = self.strategy.pieces()
        for name, piece in pieces.items():
            yield name, self.strategy.whole(name, piece) if name in weights else piece

    def pieces(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """The reverse of :meth:`whole`: what this process holds of whole tensors."""
        weights = self.strategy.pieces()
        return {n: self.strategy.piece(n, t) if n in weights else t for n, t in whole.items()}

    def on_host(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors in the main process's memory, one after the other; elsewhere nothing is kept."""
        return {name: t.detach().cpu() for name, t in tensors if self.is_main}

    def seed_step(self, step: int, part: int) -> None:
        """Make dropout a function of seed, step, accumulation part and rank."""
        if self.has_dropout:
            torch.manual_seed(hash_int(self.seed, step, part, self.rank))

    def accumulate(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """One part of a batch; gradients are shared among the processes in the last part only."""
        part: contextlib.AbstractContextManager[Any] = self.accelerator.accumulate(model)
        return part

    def loss_share(self, loss_sum: Tensor, batch_size: int) -> Tensor:
        """This part's share of the mean loss over the global batch.

        Gradients are averaged over processes and Accelerate divides by the number of parts, so
        the sum is scaled up by both: the result is exact for shares of unequal size too.

        The gradient of a loss that is not finite is made not finite too, which it might be.
        """
        share = self.processes * self.accumulation / batch_size
        return loss_sum * (loss_sum.detach() * 0 + share)

    def backward(self, loss: Tensor) -> None:
        if self.accelerator.sync_gradients:
            self.strategy.before_step()
        self.accelerator.backward(loss)

    @torch.no_grad()
    def nonfinite(self, losses: Tensor) -> Tensor:
        """Whether a batch has no finite gradient, or no finite sum of losses, on any process.

        To be called after the backward pass of its last part. With fp16 the losses alone count:
        its scaler deals with gradients, of which some have to overflow. A float (), 0 or 1, the
        same on all processes; nobody waits for it.
        """
        found = torch.zeros((), device=self.device)
        if self._scaler:
            found += ~(losses.abs() < math.inf)
        elif self.strategy.has_engine:
            found += float(self.strategy.overflow())
        else:  # the loss scaler's check of all gradients at once; they are multiplied by 1
            gradients = self.strategy.gradients()
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, self.one)
        if self.processes > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return found

    def step(self, optimizer: Any, nonfinite: Tensor | None = None) -> None:
        """One optimizer step, left out if ``nonfinite`` is 1; clears the gradients.

        Accelerate's wrapper scales losses and calls DeepSpeed. Where neither is needed it costs 3 %
        of `gap`'s time, since it looks through the file system for optional packages.
        """
        if self._scaler or self.strategy.has_engine:
            optimizer.step()
            optimizer.zero_grad()
            self.strategy.stepped()
        else:
            self.strategy.step(nonfinite)
            self.strategy.optimizer.zero_grad()

    def clip(self, model: nn.Module, norm: float) -> None:
        """Scale the whole gradient down to this norm, if it is larger; DeepSpeed has done so."""
        if self.strategy.has_engine:
            return
        if self._scaler:  # Accelerate, told nothing of fp16, would take the scaled gradient
            self._scaler.unscale_(self.strategy.optimizer)
        self.norm = self.accelerator.clip_grad_norm_(model.parameters(), norm)

    def gradient_norm(self) -> float | None:
        """L2 norm of the whole gradient before it was clipped last; waits for the device.

        None where it is not finite, as in a step that the loss scaler of fp16 leaves out.
        """
        norm = float(self.strategy.gradient_norm(self.norm))
        return norm if math.isfinite(norm) else None

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, the same on each; to be called by all of them."""
        if self.processes > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes (processes, …); to be called by all of them."""
        parts = [torch.empty_like(tensor) for _ in range(self.processes)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def scale_is_spent(self) -> bool:
        """Whether fp16 had no finite gradient at any loss scale down to 1; waits for the device."""
        return self._scaler is not None and self._scaler.get_scale() < 1

    def scaler_state(self) -> dict[str, Any]:
        """State of the fp16 loss scaler, plain numbers; empty in other precisions."""
        return dict(self._scaler.state_dict()) if self._scaler else {}

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        if self._scaler and state:
            self._scaler.load_state_dict(state)

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return self.strategy.scaler(self.accelerator)

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
            InputError: if ``action`` raised it or an OSError; without a message on the other
                processes.
        """
        value, refused = None, None
        if self.is_main:
            try:
                value = action()
            except InputError as error:
                refused = error
            except OSError as error:
                refused = InputError(explain(error))
        value, failed = self.from_main((value, refused is not None))
        if refused is not None:
            raise refused
        if failed:
            raise InputError
        return value

    def close(self) -> None:
        """Leave the process group together; nothing can be shared afterwards.

        Without the barrier, a peer's early leave ended a process by SIGABRT in half of all tries
        (gloo, torch 2.15).
        """
        if dist.is_initialized():
            self.wait()
            if self.heartbeat:
                self.heartbeat.close()
            dist.destroy_process_group()

    @contextlib.contextmanager
    def peers_named(self) -> Iterator[None]:
        """End with one line that names a peer, if an exchange with the others fails in here."""
        try:
            yield
        except RuntimeError as error:
            if self.heartbeat is None or not _is_lost_connection(error):
                raise
            first = str(error).splitlines()[0]
            die(f"rank {self.rank} lost touch with {self.heartbeat.describe()} ({first})")

    def describe(self) -> str:
        """One line: what runs where."""
        nodes, threads = self.nodes, torch.get_num_threads()
        return (
            f"{self.processes} process{'es' * (self.processes > 1)} on {nodes} "
            f"node{'s' * (nodes > 1)}, {self.device_name}, {self.strategy.name}, "
            f"{threads} thread{'s' * (threads > 1)} each"
        )

    def record(self) -> dict[str, Any]:
        """The same for environment.json."""
        return {
            "device": self.device_name,
            "processes": self.processes,
            "nodes": self.nodes,
            "strategy": self.strategy.name,
            "restarts": self.restarts,
        }


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether an exchange between processes failed: gloo's errors have no type of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
