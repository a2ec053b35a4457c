"""Who holds a run folder: a lock of the kernel, and beside it a lease that other hosts can see.

The kernel's lock (flock) is free as soon as its holder is dead, and says the truth within a host.
Between hosts it may not: some file systems of clusters lock on each node for itself (Lustre with
localflock, NFS with nolock), some not at all. So the holder also keeps a file whose counter it
advances every few seconds. Who finds the lease of another host watches the counter by its own
clock; it compares no times, so that it doesn't matter how wrong the hosts' clocks are.

filelock has a lease, too, but takes over by an exchange of two names, which NFS refuses (4.3.1).
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock

from distcv.command import die

BEAT_SECONDS = 4.0
STILL_BEATS = 5  # a holder that misses so many counts as dead
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class InUse(Exception):
    """Another process holds the folder: " (host …, process …)", or nothing if that isn't known."""


class Lease:
    """A folder that this process alone holds, from `take` to `release`.

    A process that stood still (SIGSTOP, a paused machine) for so long that another host took over
    is ended by ``give_up`` as soon as it runs again; so is one whose lease somebody has removed.
    """

    def __init__(self, folder: Path, *, give_up: Callable[[str], None] = die) -> None:
        self.folder, self.path = folder, folder / "lease.json"
        # A file in the place of a lock, as filelock would use, outlives a host that dies.
        self.lock = filelock.FileLock(folder / "lock", fallback_to_soft=False, thread_local=False)
        boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
        self.here = {"host": socket.gethostname(), "boot": boot}
        self.token, self.beats, self.held = secrets.token_hex(16), 0, False
        self._give_up, self._leaving = give_up, threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def take(self, wait: float, say: Callable[[str], None]) -> None:
        """Hold the folder; ``say`` gets a line if it is taken from a holder that is dead.

        Args:
            wait: seconds in which a holder that lives may still let go.

        Raises:
            InUse: another process holds it.
            OSError: the folder can't be written.
        """
        deadline = time.monotonic() + wait
        locked = self._lock(wait)
        try:
            while not self._claim(locked, say):
                if time.monotonic() >= deadline:
                    raise InUse(_who(self._read()))
        except BaseException:
            self.lock.release()
            raise
        self.held = True
        self._thread.start()

    def check(self) -> None:
        """Give up if another process has taken over; to be called before anything is written."""
        if self.held:
            with contextlib.suppress(OSError):  # what can't be read says nothing
                self._compare(self._read())

    def release(self) -> None:
        """Let go, if this process holds the folder."""
        if self.held:
            self.held = False
            self._end.set()
            self._thread.join(BEAT_SECONDS)  # it may not come back from the file system
            with contextlib.suppress(OSError):
                if _record(self._read()).get("token") == self.token:
                    self.path.unlink()
        self.lock.release()

    def _lock(self, wait: float) -> bool:
        """Get the kernel's lock; whether there is such a thing on this file system."""
        try:
            self.lock.acquire(timeout=wait)
        except filelock.Timeout:
            raise InUse(_who(self._read())) from None
        except NotImplementedError:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return False
        return True

    def _claim(self, locked: bool, say: Callable[[str], None]) -> bool:
        """Write the own lease where there is none, or only that of a dead holder; else False."""
        seen = self._read()
        if seen is None:
            return self._create()
        # Who held this host's lock, and does no longer, is dead: also if its number is used again.
        if locked and self.here.items() <= _record(seen).items():
            return self._replace(seen)
        if (now := self._watch(seen)) != seen:
            return now is None and self._create()
        if not self._replace(seen):
            return False
        # Another may have done so in the same moment; the last one has it.
        time.sleep(BEAT_SECONDS)
        if won := _record(self._read()).get("token") == self.token:
            say(
                f"run folder {self.folder} is taken over: its holder{_who(seen)} gave no sign of "
                f"life for {STILL_BEATS * BEAT_SECONDS:g} s"
            )
        return won

    def _watch(self, seen: bytes) -> bytes | None:
        """What the lease changes to, or ``seen`` if it doesn't within some beats."""
        until = time.monotonic() + STILL_BEATS * BEAT_SECONDS
        now: bytes | None = seen
        while now == seen and time.monotonic() < until:
            time.sleep(BEAT_SECONDS / 4)
            now = self._read()
        return now

    def _create(self) -> bool:
        try:
            with self.path.open("xb") as file:
                file.write(self._text())
        except FileExistsError:
            return False
        except OSError:
            self.path.unlink(missing_ok=True)  # it would be empty
            raise
        return True

    def _replace(self, seen: bytes) -> bool:
        temporary = self.path.with_name(f".lease.{self.token}")
        try:
            temporary.write_bytes(self._text())
            if self._read() != seen:
                return False
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _beat(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            self.beats += 1
            try:
                # In place: a rename could overwrite what another has put here meanwhile.
                with self.path.open("r+b") as file:
                    self._compare(file.read())
                    file.seek(0)
                    file.write(self._text())
                    file.truncate()
            except FileNotFoundError:
                self._compare(None)
            except OSError:
                pass  # a disk that is full for a while ends no training

    def _compare(self, seen: bytes | None) -> None:
        """Give up if that is another's lease, or none; one that is damaged says nothing."""
        if seen is None or _record(seen).get("token", self.token) != self.token:
            by = _who(seen) or ", or its lease.json removed,"
            with self._leaving:  # one line, of two threads
                self._give_up(
                    f"run folder {self.folder} was taken over{by} while this process stood still: "
                    "it ends, and leaves the folder as it is"
                )

    def _read(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def _text(self) -> bytes:
        own = self.here | {"pid": os.getpid(), "token": self.token, "beats": self.beats}
        return json.dumps(own).encode() + b"\n"


def _record(seen: bytes | None) -> dict[str, Any]:
    """What a lease says; empty if it is damaged or something else."""
    try:
        record = json.loads(seen or b"")
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _who(seen: bytes | None) -> str:
    match _record(seen):
        case {"host": str(host), "pid": int(pid)}:
            return f" (host {host}, process {pid})"
    return ""
