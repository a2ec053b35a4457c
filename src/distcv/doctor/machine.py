"""Checks of packages and devices, and of the processes that work together."""

import contextlib
import ipaddress
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from distcv import __version__
from distcv.doctor import Arguments, Line, one_line
from distcv.environment import available_cores, cpu_name, git_commit
from distcv.runtime import probe
from distcv.runtime.launch import check_devices, check_launcher, stay_on_cpu
from distcv.runtime.probe import World

SHOWN = ("Python", "torch", "torchvision", "accelerate", "deepspeed", "wandb")


def versions(world: World, arguments: Arguments) -> Iterator[Line]:
    """Python and packages, against what pyproject.toml asks for."""
    commit = git_commit()
    yield Line("ok", f"distcv {__version__}{f', commit {commit}' if commit else ''}", "distcv")
    needed = []
    try:
        needed += [f"Python{metadata.metadata('distcv')['Requires-Python']}"]
        needed += metadata.requires("distcv") or []
    except metadata.PackageNotFoundError:
        yield Line("warn", "minimum versions aren't known: pip install -e . in the clone")
    yield from version_lines(needed, _installed)


def _installed(name: str) -> str | None:
    if name == "Python":
        return sys.version.split()[0]
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def version_lines(needed: list[str], installed: Callable[[str], str | None]) -> Iterator[Line]:
    """A line for each package that is shown, and for any other that is missing or too old.

    `needed` are requirements such as `torch>=2.11`; `installed` gives a version, None without one.
    """
    requirements = {
        one.name: one
        for one in map(Requirement, needed)
        if one.marker is None or one.marker.evaluate({"extra": "deepspeed"})
    }
    for name in dict.fromkeys((*SHOWN, *requirements)):
        version, one = installed(name), requirements.get(name)
        if version is None and name == "deepspeed":
            yield Line("ok", "deepspeed is not installed: only launch/zero*.yaml need it", name)
        elif version is None:
            yield Line("wrong", f"{name} is not installed: pip install '{one or name}'", name)
        elif one and not one.specifier.contains(version, prereleases=True):
            way = "install a newer one" if name == "Python" else f"pip install '{one}'"
            yield Line("wrong", f"{name} {version}, distcv needs {one.specifier}: {way}", name)
        elif name in SHOWN:
            yield Line("ok", f"{name} {version}", name)


def devices(world: World, arguments: Arguments) -> Iterator[Line]:
    """GPUs and cores of this node, and whether its processes fit on them."""
    here, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    models = Counter(
        f"{one.name} ({one.total_memory / 2**30:.0f} GiB)"
        for one in map(torch.cuda.get_device_properties, range(count))
    )
    for model, number in models.items():
        unused = ", unused: the launch file says use_cpu" if stay_on_cpu() else ""
        yield Line("ok", f"{number} x {model}{unused}")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")
    if count == 0 and not hidden and (number := _gpus_of_driver()):
        yield Line("wrong", f"the driver has {number} GPUs, torch sees none: {_why_no_gpu()}")
    given = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if arguments.slurm and given.isdigit() and int(given) != count:
        yield Line("wrong", f"Slurm gave {given} GPUs on this node, torch sees {count}")
    cores, threads = available_cores(), torch.get_num_threads()
    text = f"{cores} cores ({cpu_name()}) for {here} x {threads} threads"
    if here * threads > cores:
        yield Line("wrong", f"{text}: ask for more cores, or start fewer processes or threads")
    else:
        yield Line("ok", text)
    check_devices()
    check_launcher(world.processes)


def _gpus_of_driver() -> int:
    """GPUs that NVIDIA's driver offers to this process."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        ran = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
        return sum(line.startswith("GPU ") for line in ran.stdout.splitlines())
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA, install one that has it"
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError as error:
        return one_line(error)
    return f"torch {torch.__version__} may need a newer driver"


def processes(world: World, arguments: Arguments) -> Iterator[Line]:
    """Who came, and who did not."""
    if world.rank:
        return
    hosts = ", ".join(dict.fromkeys(world.hosts.values()))
    yield Line("ok", f"{len(world.hosts)} on {hosts}")
    if missing := [str(rank) for rank in range(world.processes) if rank not in world.hosts]:
        yield Line(
            "wrong",
            f"rank {', '.join(missing)} of {world.processes} did not come within "
            f"{world.timeout:g} s: start all nodes, let them reach {os.environ['MASTER_ADDR']} at "
            f"port {os.environ['MASTER_PORT']}, or raise --timeout",
        )


def exchange(world: World, arguments: Arguments) -> Iterator[Line]:
    """All-reduces among all processes: right, and how fast."""
    missing = len(world.hosts) < world.processes
    if missing or world.processes == 1:
        if world.rank == 0:
            yield Line("ok", f"skipped: {'processes are missing' if missing else 'one process'}")
        return
    try:
        measured = probe.within(world.timeout, lambda: probe.exchange(world))
    except TimeoutError:
        named = [f"{k}={v}" for k, v in os.environ.items() if k.endswith("_SOCKET_IFNAME")]
        yield Line(
            "wrong",
            f"no all-reduce within {world.timeout:g} s: nodes must reach each other at all ports, "
            "through the interface that GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names "
            f"({', '.join(named) or 'neither is set'})",
        )
        return
    if not measured.right:
        yield Line("wrong", f"{measured.backend} gives a wrong sum")
    elif world.rank == 0:
        yield Line(
            "ok",
            f"{measured.backend}: sum right, latency {measured.latency:.2g} s, "
            f"{measured.megabytes} MB in {measured.seconds:.2g} s, "
            f"bus bandwidth {measured.bandwidth:.2g} GB/s",
        )


def head_node(world: World, arguments: Arguments) -> Iterator[Line]:
    """What each of several nodes takes the head's name for."""
    if len(set(world.hosts.values())) == 1 or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    name, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        address = probe.address_of(name)
    except OSError as error:
        yield Line("wrong", f"MASTER_ADDR {name}: {error.strerror}: set --head to its address")
        return
    elsewhere = world.hosts[world.rank] != world.hosts.get(0)
    if elsewhere and ipaddress.ip_address(address.split("%")[0]).is_loopback:
        yield Line(
            "wrong",
            f"MASTER_ADDR {name} is {address} here, which is this node and not the head: set "
            "--head to the address of rank 0's node",
        )
    else:
        yield Line("ok", f"MASTER_ADDR {name} is {address}, port {port} answers")
