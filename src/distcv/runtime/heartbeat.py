"""Signs of life between processes: one that is frozen, or whose node is gone, ends the others."""

import atexit
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from distcv.command import die

# To reach a store that is known to be up. While torch tries, no other thread of Python's runs.
CONNECT_TIMEOUT = timedelta(seconds=30)


def agent_store() -> bool:
    """Whether the launcher's agent serves the rendezvous, and has since before its processes."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def attempt() -> str:
    """What tells the keys of this start from those of earlier ones in the same store.

    Only an agent's store outlives a start. Where there is none, the count may not be used: the
    agents of several nodes don't agree on it.
    """
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if agent_store() else "0"


def own_store() -> Store:
    """A connection of its own to this launch's rendezvous; each attempt has its own keys.

    To be called once the process group is joined: without an agent that serves the rendezvous, it
    is a server of rank 0's process group that answers.
    """
    store, _, _ = next(rendezvous("env://", timeout=CONNECT_TIMEOUT))
    return PrefixStore(f"distcv-heartbeat/{attempt()}", store)


@dataclass
class Peer:
    """What is known of another process."""

    rank: int
    heard: float  # when a beat of its was last seen, by this process's own clock
    step: int = -1  # its last one; -1 before the first
    place: str = ""  # " (host …, process …)" once it has been heard of
    left: bool = False  # it has closed its heartbeat
    beat: bytes = b""

    @property
    def last_step(self) -> str:
        return f"last at step {self.step}" if self.step >= 0 else "before its first step"


class Heartbeat:
    """Shows the peers that this process lives, and gives up if one has been silent for too long.

    For two processes or more: rank 0 watches all others, they watch rank 0. Silence is measured by
    the watcher's own clock from when it last saw a beat change, at first from `start`; so processes
    are to start within ``timeout`` seconds of each other. A watcher that was stopped itself
    forgives all. A beat says that a process can run, not that it gets on: that is for the
    collectives' own timeout.

    One thread talks to the store and another watches the clock: while the store's server is frozen,
    `check` and `get` don't return, whatever timeout the store has (torch 2.15).
    """

    def __init__(
        self, store: Store, rank: int, processes: int, *, timeout: float,
        give_up: Callable[[str], None] = die, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.rank, self.timeout = rank, timeout
        self.interval = min(1.0, timeout / 5)
        self._store, self._give_up, self._clock = store, give_up, clock
        self._store.set_timeout(timedelta(seconds=timeout))
        self._looked = self._reached = clock()  # the last look at the clock, the last at the store
        watched = range(1, processes) if rank == 0 else [0]
        self._peers = [Peer(other, self._looked) for other in watched]
        self._step, self._beats, self._leaves = -1, 0, False
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=loop, daemon=True) for loop in (self._talk, self._watch)
        ]

    def start(self) -> None:
        """Start beating and watching."""
        self._forgive(self._clock())
        for thread in self._threads:
            thread.start()
        # A thread that comes back from the store while the interpreter ends can abort it.
        atexit.register(self._stop)

    def beat(self, step: int) -> None:
        """The step that the main thread is at."""
        self._step = step

    def close(self) -> None:
        """Leave in good order: the peers expect no more beats. Not for a process that fails."""
        self._leaves = True
        self._stop()

    def describe(self) -> str:
        """One line on the watched process that is silent for longest, else furthest behind."""
        now, usual = self._clock(), 3 * self.interval
        peer = min(self._peers, key=lambda peer: (-max(now - peer.heard, usual), peer.step))
        seen = "has left" if peer.left else f"heard of {now - peer.heard:.0f} s ago"
        return f"rank {peer.rank}{peer.place}, {peer.last_step}, {seen}"

    def exchange(self) -> None:
        """Show a beat and look at those of the peers.

        Raises:
            RuntimeError: the store can't be reached.
        """
        self._beats += 1
        place = f" (host {socket.gethostname()}, process {os.getpid()})"
        beat = {"beats": self._beats, "step": self._step, "place": place, "left": self._leaves}
        self._store.set(f"rank{self.rank}", json.dumps(beat))
        for peer in self._peers:
            key = f"rank{peer.rank}"
            if not self._store.check([key]):  # `get` would wait for it
                continue
            seen = self._store.get(key)
            if seen != peer.beat:
                told = json.loads(seen)
                peer.step, peer.place, peer.left = told["step"], told["place"], told["left"]
                peer.beat, peer.heard = seen, self._clock()
        self._reached = self._clock()

    def problem(self) -> str | None:
        """Why to give up, if there is a reason; to be asked every ``interval`` seconds."""
        now = self._clock()
        if now - self._looked > self.interval + self.timeout / 2:
            self._forgive(now)  # this process was stopped: it can't know what it missed
        self._looked = now
        silent = now - self._reached
        if silent > self.timeout:
            return f"the rendezvous (rank 0's node) can't be reached for {silent:.0f} s"
        peer = min(self._peers, key=lambda peer: (peer.left, peer.heard))
        silent = self._reached - peer.heard  # as far as the store could be asked
        if silent <= self.timeout or peer.left:
            return None
        return (
            f"rank {peer.rank}{peer.place} has given no sign of life for {silent:.0f} s, "
            f"{peer.last_step}: it hangs, or its node is gone"
        )

    def _forgive(self, now: float) -> None:
        self._looked = self._reached = now
        for peer in self._peers:
            peer.heard = now

    def _talk(self) -> None:
        try:
            self.exchange()
            while not self._end.wait(self.interval):
                self.exchange()
            if self._leaves:
                self.exchange()
        except RuntimeError:
            pass  # a broken connection stays broken; the other thread gives up in time

    def _watch(self) -> None:
        while not self._end.wait(self.interval) and not all(peer.left for peer in self._peers):
            problem = self.problem()
            if problem and not self._end.is_set():
                self._give_up(problem)
                return

    def _stop(self) -> None:
        self._end.set()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(1.0)  # it may not come back from the store
