"""What surrounds a run: thread settings made before torch is loaded, and the record of it all."""

import configparser
import contextlib
import ctypes
import importlib.metadata
import netrc
import os
import platform
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from distcv import __version__

_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1  # as in malloc.h: no mapped chunks, nothing given back


def available_cores() -> int:
    """Cores that this process may use (its affinity mask where the system has one)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_thread_environment() -> None:
    """Choose thread count and OpenMP wait policy, unless the user has. Call before torch is loaded.

    One thread a core, shared among the processes of this node. A thread that waits spins for a
    moment, then sleeps. Medians for the gap net on two cores, images/s alone and beside a second
    such training: a moment (1,000 turns) 6,545 and 2,470, no spinning 5,270 and 2,706, spinning
    without end 7,316 and 980; GNU's default is 300,000 turns (AMD EPYC, torch 2.15, n = 6).
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not user_has_set("OMP_NUM_THREADS"):
        os.environ["OMP_NUM_THREADS"] = str(max(1, available_cores() // processes))
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ["GOMP_SPINCOUNT"] = "1000"  # GNU's alone; it has the last word there


def keep_memory() -> None:
    """Let GNU's malloc keep what a training step frees, so that the next finds it mapped.

    By default large tensors are mapped, and cleared page by page, in every step; what that costs
    is in docs/performance.md. Does nothing where there is another malloc, or the user has chosen
    its settings.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    chosen = chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)


def user_has_set(name: str) -> bool:
    """Whether a variable is the user's, not one that a launcher gave to its processes.

    torchrun and accelerate set OMP_NUM_THREADS to 1; what they were started with themselves tells.
    """
    if name not in os.environ or not launched():
        return name in os.environ
    try:
        return name in psutil.Process(os.getppid()).environ()
    except (psutil.Error, OSError):
        return True


def launched() -> bool:
    """Whether torchrun or accelerate launch has started this process."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def slurm_job() -> tuple[str, int] | None:
    """The Slurm job or array task that this process belongs to, and how often it was requeued."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    return job, int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def launch_time() -> float:
    """When this training was started (s): the same in all restarts by an elastic launcher."""
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        with contextlib.suppress(psutil.Error):
            return psutil.Process(os.getppid()).create_time()
    return time.time()


def wandb_server() -> str:
    """Address of the W&B server that runs are logged to: of the environment, or of a login."""
    own = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser() / "settings"
    login = configparser.ConfigParser(default_section="")
    with contextlib.suppress(configparser.Error, OSError):
        login.read([own, Path(os.environ.get("WANDB_DIR", ".")) / "wandb/settings"])
    default = login.get("default", "base_url", fallback="https://api.wandb.ai")
    return without_password(os.environ.get("WANDB_BASE_URL", default)).rstrip("/")


def wandb_key() -> str | None:
    """The key for that server, from WANDB_API_KEY or netrc; never to be printed.

    W&B's client writes and reads it there under the server's name with the port.
    """
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    try:
        keys = netrc.netrc(Path(os.environ.get("NETRC") or "~/.netrc").expanduser())
        found = keys.authenticators(urlsplit(wandb_server()).netloc)
    except (OSError, netrc.NetrcParseError):
        return None
    return found[2] if found else None


def without_password(text: str) -> str:
    """A text without the users' names and passwords of the addresses in it."""
    return re.sub(r"(://)[^/\s]*@", r"\1", text)


def cpu_name() -> str:
    """Model name of the processor, as the system reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Commit of the clone this code runs from, with ``-dirty`` if it was changed.

    None for an installed package, also where a repository of something else lies around it.
    """
    clone = Path(__file__).resolve().parents[2]
    if not (clone / ".git").exists():
        return None
    try:
        said = subprocess.run(
            [
                "git",
                "-C",
                str(clone),
                "describe",
                "--always",
                "--dirty",
                "--abbrev=40",
                "--exclude=*",
            ],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip() or None


def git_remote() -> str | None:
    """Address of the working folder's git remote `origin`, without the user's name and password."""
    try:
        said = subprocess.run(
            ["git", "remote", "get-url", "origin"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return without_password(said.stdout.strip()) or None


def describe_environment() -> dict[str, Any]:
    """Versions, machine and threads of this process. Holds no environment variable but its own."""
    packages = ["torch", "torchvision", "accelerate", "deepspeed", "wandb", "tensorboard"]
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "commit": git_commit(),
        "python": sys.version.split()[0],
        "distcv": __version__,
        "versions": versions,
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": available_cores(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "spin_count": os.environ.get("GOMP_SPINCOUNT"),
    }
