"""What the launcher asked for, the strategy and the processes; and joining them."""

import importlib.util
import os
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from distcv.config import InputError, Recipe
from distcv.runtime.heartbeat import CONNECT_TIMEOUT, agent_store, attempt
from distcv.runtime.strategies import WholeCopies

PROCESS_TIMEOUT = timedelta(minutes=10)  # of one exchange


def stay_on_cpu() -> bool:
    """Whether there is no accelerator, or the launch file says not to use it."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def choose_strategy(recipe: Recipe) -> WholeCopies:
    """The strategy that the launch file asks for.

    Raises:
        InputError: it is none of ours, or can't be combined with the recipe.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, once installed, warns
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return _zero(recipe)
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return _fsdp2(recipe)
    for name in ("MEGATRON_LM", "PARALLELISM_CONFIG"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise InputError(
                f"the launch file asks for {name}, which is not supported: use one of launch/*.yaml"
            )
    return WholeCopies(recipe)


def _fsdp2(recipe: Recipe) -> WholeCopies:
    _need_launcher("FSDP")
    if os.environ.get("FSDP_VERSION") != "2":
        raise InputError(
            f"fsdp_version {os.environ.get('FSDP_VERSION', '1')} is not supported: set it to 2, as "
            "in launch/fsdp2.yaml"
        )
    if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
        raise InputError("fsdp_offload_params is not supported: set it to false in the launch file")
    _need_agreed_device("FSDP2")
    from distcv.runtime.fsdp import Fsdp2

    return Fsdp2(recipe)


def _zero(recipe: Recipe) -> WholeCopies:
    _need_launcher("DeepSpeed")
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            "the launch file asks for DeepSpeed, which is not installed: pip install "
            "'distcv[deepspeed]', or use launch/fsdp2.yaml"
        )
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none").lower() != "none":
        raise InputError(
            "deepspeed_config_file is not supported, since the recipe says most of what it would: "
            "set zero_stage in the launch file, as in launch/zero2.yaml"
        )
    for what in ("OPTIMIZER", "PARAM"):
        if os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none").lower() != "none":
            raise InputError(
                f"offload_{what.lower()}_device is not supported: set it to none in the launch file"
            )
    _need_agreed_device("DeepSpeed")
    if recipe.optimizer == "muon":
        raise InputError(
            "optimizer muon works on whole matrices, of which DeepSpeed makes one flat row: "
            "use launch/ddp.yaml or launch/fsdp2.yaml, or a recipe such as resnet18_sgd"
        )
    stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    if stage not in (1, 2, 3):
        raise InputError(f"zero_stage {stage} in the launch file is none of 1, 2 and 3")
    from distcv.runtime.zero import Zero

    return Zero(recipe)


def _need_launcher(what: str) -> None:
    if "LOCAL_RANK" not in os.environ:
        raise InputError(f"{what} needs processes that accelerate launch has started")


def _need_agreed_device(what: str) -> None:
    if stay_on_cpu() and torch.accelerator.is_available():
        raise InputError(
            f"{what} takes the GPU although the launch file says use_cpu: hide it by "
            "CUDA_VISIBLE_DEVICES=''"
        )


def start(recipe: Recipe, strategy: WholeCopies) -> Accelerator:
    """Join the other processes, by Accelerate and for the strategy.

    Raises:
        InputError: more processes than GPUs, or processes that were started but did not join.
    """
    check_devices()
    join(PROCESS_TIMEOUT)
    on_cpu = stay_on_cpu() and not strategy.has_engine  # Accelerate(cpu=True) knows no DeepSpeed
    backend = {"backend": "gloo"} if stay_on_cpu() and not on_cpu else {}
    accelerator = Accelerator(
        # Accelerate joins CPU processes only if it is told that they are to stay on the CPU.
        cpu=on_cpu,
        device_placement=False,  # network and data are moved when they are made
        mixed_precision="no",  # see Runtime.autocast: the same arithmetic under every strategy
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=recipe.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        # Batches are dealt out as the samplers list them; nothing is repeated to fill up.
        dataloader_config=DataLoaderConfiguration(even_batches=False, dispatch_batches=False),
        rng_types=[],
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            # Buffers are averaged when they are read, not broadcast in every step.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            InitProcessGroupKwargs(**backend),  # for one process; more have joined already
        ],
        **strategy.accelerator_options(),
    )
    check_processes(accelerator)
    strategy.joined(accelerator)
    return accelerator


def join(timeout: timedelta) -> None:
    """Join the other processes, under keys of this attempt alone.

    An elastic launcher's agent keeps a store over restarts, with the addresses of processes that
    are dead: the group found them there and hung in 5 of 6 restarts (torch 2.15, gloo). Accelerate
    1.15 would wait for a process that never comes for longer than it is told to.

    Raises:
        InputError: they have not all come in time.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    current = torch.accelerator.current_accelerator()
    device = "cpu" if stay_on_cpu() or current is None else current.type
    # The agent, if it is gone, would be looked for as long as peers that start late are waited for.
    connect = CONNECT_TIMEOUT if agent_store() else timeout
    try:
        store, rank, processes = next(rendezvous("env://", timeout=connect))
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the {os.environ['WORLD_SIZE']} processes of this launch did not meet: start all of "
            "them with the same MASTER_ADDR and MASTER_PORT, or distcv.doctor in their place, "
            f"which names those that are missing ({str(error).splitlines()[0]})"
        ) from error
    store.set_timeout(timeout)
    dist.init_process_group(
        dist.get_default_backend_for_device(device),
        store=PrefixStore(f"distcv/{attempt()}", store),
        rank=rank,
        world_size=processes,
        timeout=timeout,
    )


def check_processes(accelerator: Accelerator) -> None:
    """Raise InputError unless as many processes joined as were asked for."""
    joined, started = accelerator.num_processes, int(os.environ.get("WORLD_SIZE", "1"))
    if joined != started:
        raise InputError(
            f"{started} processes were started but {joined} joined: check the launch file's "
            "distributed_type and use_cpu"
        )
    check_launcher(joined)


def check_launcher(started: int) -> None:
    """Raise InputError if Accelerate was asked for more processes than it started."""
    if "LOCAL_RANK" not in os.environ and (asked := processes_asked_for()) > started:
        raise InputError(
            f"accelerate launch was asked for {asked} processes and started 1: its file's "
            "distributed_type must be MULTI_GPU (also on a CPU), as in launch/cpu.yaml"
        )


def check_devices() -> None:
    """Raise InputError if this node runs more processes than it has GPUs."""
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if here > gpus > 0 and not stay_on_cpu():
        raise InputError(
            f"{here} processes on this node, which has {gpus} GPU{'s' * (gpus > 1)}: lower "
            "--num_processes"
        )


def processes_asked_for() -> int:
    """Processes named on the command line, or in the file, of the Accelerate that started this one.

    Accelerate starts a single one silently for some settings, MULTI_CPU among them.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return 1
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return 1
    # "accelerate launch", "accelerate-launch" or "-m accelerate.commands.launch"
    ends = [i for i, word in enumerate(words) if word.removesuffix(".py").endswith("launch")]
    if not ends:
        return 1
    said, _ = launch_command_parser().parse_known_args(words[ends[0] + 1 :])
    asked = said.num_processes
    if asked is None and (
        said.config_file or (Path(default_config_file).is_file() and not said.cpu)
    ):
        asked = load_config_from_file(said.config_file).num_processes
    return asked if isinstance(asked, int) else 1
