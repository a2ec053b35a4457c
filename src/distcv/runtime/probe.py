"""What `distcv.doctor` needs of the processes that it was started on: a store, an exchange.

Answers go through torch's store, not through the process group, which is what is examined.
"""

import json
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from distcv.config import InputError
from distcv.runtime.heartbeat import attempt
from distcv.runtime.launch import PROCESS_TIMEOUT, stay_on_cpu

T = TypeVar("T")

POLL_S = 0.02
PATIENCE = 3  # timeouts: rank 0 waits for missing processes, an exchange and a process that is lost
LAST_WORDS_S = 5.0  # for the other processes to hear the outcome before the store goes


@dataclass
class World:
    """The processes that came, and what they tell each other.

    Waiting is asking again and again: torch's own waiting logs C++ stacks when its time is up.
    """

    rank: int
    processes: int
    timeout: float
    store: Store
    hosts: dict[int, str] = field(default_factory=dict)
    """Of each process that came, by rank; rank 0 takes out those that it doesn't hear any more."""

    def say(self, key: str, value: Any) -> None:
        """Tell the others something that JSON can hold."""
        self.store.set(f"{key}/{self.rank}", json.dumps(value))

    def hear(self, key: str, rank: int, seconds: float) -> Any:
        """What a process has said, waiting for it for so long.

        Raises:
            TimeoutError: it says nothing.
        """
        deadline = time.monotonic() + seconds
        while not self.store.check([f"{key}/{rank}"]):
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {rank} gave no answer within {seconds:g} s")
            time.sleep(POLL_S)
        return json.loads(self.store.get(f"{key}/{rank}"))

    def hear_main(self, key: str) -> Any:
        """What rank 0 has said, however long its own waiting may take."""
        return self.hear(key, 0, PATIENCE * self.timeout)

    def hear_all(self, key: str, seconds: float | None = None) -> dict[int, Any]:
        """What each of those that came has said; those that don't say it in time are lost."""
        deadline = time.monotonic() + (seconds or self.timeout)
        heard = {}
        for rank in list(self.hosts):
            try:
                heard[rank] = self.hear(key, rank, max(0, deadline - time.monotonic()))
            except TimeoutError:
                del self.hosts[rank]
        return heard

    def leave(self, code: int) -> int:
        """Leave together, all with rank 0's exit code; its store may go once they have heard it."""
        if self.rank:
            code = int(self.hear_main("code"))
        else:
            self.say("code", code)
        self.say("heard", True)
        if self.rank == 0:
            self.hear_all("heard", LAST_WORDS_S)
        return code


def host_name() -> str:
    """This node's name, Slurm's own where it has one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def join(timeout: float) -> World:
    """Meet the processes that were started together with this one; one process meets nobody.

    Raises:
        InputError: processes that know nothing of a head node.
        ConnectionError: rank 0's store can't be reached, or be served, within `timeout` seconds.
    """
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return World(0, 1, timeout, HashStore(), {0: host_name()})
    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise InputError("WORLD_SIZE without MASTER_ADDR and MASTER_PORT: use accelerate launch")
    name, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves:
        _wait_for_port(name, port, timeout)
    wait = timedelta(seconds=timeout)
    try:  # in a thread: it waits without end for a server that is none of torch's (2.15)
        store = within(
            timeout, lambda: TCPStore(name, port, None, serves, wait, wait_for_workers=False)
        )
    except (RuntimeError, TimeoutError) as error:
        raise ConnectionError(
            f"rank {rank} on {host_name()}: MASTER_PORT {port} is in use by something else, choose "
            f"another --port ({str(error).splitlines()[0]})"
        ) from None
    world = World(rank, processes, timeout, PrefixStore(f"distcv-doctor/{attempt()}", store))
    world.say("here", host_name())
    if rank == 0:
        world.hosts = dict.fromkeys(range(processes), "")
        world.hosts = world.hear_all("here")
        world.say("hosts", world.hosts)
    else:
        world.hosts = {int(other): host for other, host in world.hear_main("hosts").items()}
    return world


def address_of(name: str) -> str:
    """The IP address that this node knows for a name; OSError if it knows none."""
    return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])


def _wait_for_port(name: str, port: int, timeout: float) -> None:
    """Wait until the head node listens; ConnectionError with what was tried."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((name, port), timeout=max(1, timeout / 5)).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            break
        time.sleep(10 * POLL_S)
    try:
        address = address_of(name)
    except OSError:
        address = "no known address"
    raise ConnectionError(
        f"rank {os.environ['RANK']} on {host_name()} doesn't reach MASTER_ADDR {name} ({address}) "
        f"at MASTER_PORT {port} within {timeout:g} s: {reason}: start rank 0 too, and let --head "
        "be a name or address that every node reaches"
    )


def within(seconds: float, action: Callable[[], T]) -> T:
    """The value of `action`, in a thread of its own; TimeoutError if it takes longer."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(timeout=seconds)
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"no answer within {seconds:g} s") from None


class Exchange(NamedTuple):
    """What all-reduces among the processes were measured to do."""

    backend: str
    right: bool
    """Whether every element of a sum was exact, on this process."""
    latency: float
    """Seconds of the smallest one, median."""
    megabytes: int
    seconds: float
    """Of one of `megabytes` (10^6 bytes), median."""
    bandwidth: float
    """Bus bandwidth in GB/s: the bytes that each process sends, and receives, in a ring."""


def exchange(world: World) -> Exchange:
    """Form the process group as a training does, and measure; on all processes together."""
    current = torch.accelerator.current_accelerator()
    device = torch.device("cpu")
    if current is not None and not stay_on_cpu():
        here = int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
        device = torch.device(current.type, here)
        torch.accelerator.set_device_index(here)
    backend = dist.get_default_backend_for_device(device)
    dist.init_process_group(
        backend,
        # A connection of its own: others wait for their turn while it waits for an answer.
        store=PrefixStore("group", world.store.clone()),
        rank=world.rank,
        world_size=world.processes,
        timeout=PROCESS_TIMEOUT,
    )
    megabytes = 16 if device.type == "cpu" else 64
    # Integers, which fp32 adds exactly; every element tells its place and the rank.
    pattern = torch.arange(megabytes * 10**6 // 4, device=device).remainder(7).float()
    total = pattern + world.rank
    dist.all_reduce(total)
    n = world.processes
    right = torch.equal(total, n * pattern + n * (n - 1) // 2)
    latency = _median_seconds(torch.zeros(1, device=device), 50)
    seconds = _median_seconds(total.zero_(), 5)
    bandwidth = 2 * (n - 1) / n * megabytes / 1000 / seconds
    return Exchange(backend, right, latency, megabytes, seconds, bandwidth)


def _median_seconds(tensor: torch.Tensor, times: int) -> float:
    """Of an all-reduce of zeros, which stay zeros."""
    measured = []
    for _ in range(times + 2):
        began = time.perf_counter()
        dist.all_reduce(tensor)
        if tensor.device.type != "cpu":
            torch.accelerator.synchronize()
        measured.append(time.perf_counter() - began)
    return statistics.median(measured[2:])  # the first ones warm up
