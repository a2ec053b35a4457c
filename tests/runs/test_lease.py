"""Who holds a run folder: on one host, on two whose locks are their own, without locks."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import pytest

from distcv import lease
from distcv.lease import InUse, Lease

BEAT = 0.1
STILL = lease.STILL_BEATS * BEAT
DAY = 86_400


class Host:
    """Makes leases as on a host of this name; its locks are its own, or there are none."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.leases: list[Lease] = []
        self.said: list[str] = []
        self.ends: list[str] = []

    def end(self, why: str) -> None:
        """Stands for the end of its process: the thread that calls goes no further."""
        self.ends.append(why)
        if threading.current_thread() is threading.main_thread():
            raise SystemExit
        threading.Event().wait()

    def lease(self) -> Lease:
        one = Lease(self.folder, give_up=self.end)
        one.here["host"] = self.name
        lock = self.folder / f"lock-of-{self.name}"
        one.lock = filelock.FileLock(lock, fallback_to_soft=False, thread_local=False)
        self.leases.append(one)
        return one

    def take(self, wait: float = 0) -> Lease:
        one = self.lease()
        one.take(wait, self.said.append)
        return one


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Host]]:
    monkeypatch.setattr(lease, "BEAT_SECONDS", BEAT)
    hosts: list[Host] = []

    def make(name: str) -> Host:
        hosts.append(Host(tmp_path, name))
        return hosts[-1]

    yield make
    for one in hosts:
        for held in one.leases:
            held.release()


def die(held: Lease) -> None:
    """What the death of its process does: no more beats, and the kernel's lock is free."""
    held._end.set()
    held._thread.join()
    held.lock.release()


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(BEAT / 10)


def seconds(action: Callable[[], object]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


@pytest.mark.parametrize("second", ["a", "b"])
def test_a_living_holder_is_named(second: str, host: Callable[[str], Host], tmp_path: Path) -> None:
    """Two runs would write to one folder, or a user would not learn which process holds it."""
    held = host("a").take()
    newcomer = host(second)
    for _ in range(2):
        with pytest.raises(InUse, match=rf" \(host a, process {os.getpid()}\)"):
            newcomer.take()
    beats = held.beats
    wait_until(lambda: held.beats > beats + 1)
    assert json.loads((tmp_path / "lease.json").read_text())["token"] == held.token
    held.release()
    assert sorted(path.name for path in tmp_path.iterdir() if "lock" not in path.name) == []
    newcomer.take()
    assert newcomer.said == [], "it has not waited"


@pytest.mark.parametrize("skew", [-DAY, 0, DAY])
def test_a_dead_holder_on_another_host_is_recognised_whatever_the_clocks_say(
    skew: int, host: Callable[[str], Host], tmp_path: Path
) -> None:
    """After a node dies, its run could not continue on another node whose clock differs."""
    die(host("a").take())
    os.utime(tmp_path / "lease.json", (time.time() + skew,) * 2)
    newcomer = host("b")
    assert STILL < seconds(newcomer.take) < 10 * STILL
    [line] = newcomer.said
    assert f"(host a, process {os.getpid()}) gave no sign of life for 0.5 s" in line


def test_a_dead_holder_on_this_host_is_followed_at_once(host: Callable[[str], Host]) -> None:
    """A user who restarts a killed run on the same host would have to wait for 20 seconds."""
    die(host("a").take())  # its number is in use again: by this process
    newcomer = host("a")
    newcomer.take()
    assert newcomer.said == [], "it has not waited"


def test_another_boot_of_this_host_is_another_host(host: Callable[[str], Host]) -> None:
    """A machine with the same host name would take over a run that is still training."""
    old = host("a").lease()
    old.here["boot"] = "before"
    old.take(0, print)
    with pytest.raises(InUse):
        host("a").lease().take(0, print)
    die(old)
    assert seconds(host("a").take) > STILL


def test_a_holder_may_let_go_while_another_waits(host: Callable[[str], Host]) -> None:
    """A requeued job would be refused, since the job before it takes a moment to end."""
    held = host("a").take()
    threading.Timer(6 * BEAT, held.release).start()
    newcomer = host("b")
    assert 3 * BEAT < seconds(lambda: newcomer.take(wait=60)) < 60
    assert newcomer.said == [], "it was not taken over"


def test_a_holder_that_stood_still_finds_out_and_spoils_nothing(
    host: Callable[[str], Host], tmp_path: Path
) -> None:
    """A suspended process that wakes up would write to a run that another host has taken over."""
    frozen = host("a")
    die(held := frozen.take())
    held.check()
    assert frozen.ends == []
    host("b").take()
    with pytest.raises(SystemExit):
        held.check()
    held._end.clear()
    threading.Thread(target=held._beat, daemon=True).start()
    wait_until(lambda: len(frozen.ends) == 2)
    assert f"was taken over (host b, process {os.getpid()}) while" in frozen.ends[0]
    held.release()
    assert json.loads((tmp_path / "lease.json").read_text())["host"] == "b"


@pytest.mark.parametrize("text", ["", "{", "[1]", "hello\n", '{"host": 7}', "\x00" * 4096])
def test_a_damaged_lease_is_watched_like_any_other(
    text: str, host: Callable[[str], Host], tmp_path: Path
) -> None:
    """A damaged lease.json would lock the user out of the run, or let two processes share it."""
    (tmp_path / "lease.json").write_text(text)
    newcomer = host("a")
    assert seconds(newcomer.take) > STILL
    assert len(newcomer.said) == 1
    (tmp_path / "lease.json").write_text(text)  # now it is that of a living one
    with pytest.raises(InUse):
        host("b").take()
    assert newcomer.ends == []
    assert json.loads((tmp_path / "lease.json").read_text())["token"] == newcomer.leases[0].token


def test_a_holder_whose_lease_is_gone_finds_out(
    host: Callable[[str], Host], tmp_path: Path
) -> None:
    """A process whose run was taken over and ended meanwhile would still write to its folder."""
    robbed = host("a")
    held = robbed.take()
    (tmp_path / "lease.json").unlink()  # by another that took over and has ended since
    with pytest.raises(SystemExit):
        held.check()
    wait_until(lambda: len(robbed.ends) == 2)  # of the beat, too
    assert "or its lease.json removed" in robbed.ends[0]
    assert not (tmp_path / "lease.json").exists()


def test_a_beat_that_cannot_be_written_ends_nothing(
    host: Callable[[str], Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full for a moment would end a training that could have gone on."""
    one = host("a")
    held = one.take()

    def full() -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(held, "_text", full)
        beats = held.beats
        wait_until(lambda: held.beats > beats + 1)
    before = (tmp_path / "lease.json").read_text()
    wait_until(lambda: (tmp_path / "lease.json").read_text() != before)
    assert one.ends == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_without_locks_the_lease_decides(
    number: int, host: Callable[[str], Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without locks, two processes would train in the same run folder."""

    def refuse(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    held = host("a").take()
    with pytest.raises(InUse, match="host a"):
        host("a").take()
    die(held)
    newcomer = host("a")
    assert seconds(newcomer.take) > STILL
    assert len(newcomer.said) == 1


@pytest.mark.slow
@pytest.mark.parametrize("dead", [False, True])
def test_of_many_that_come_at_once_one_gets_it(
    dead: bool, host: Callable[[str], Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several jobs that start the same run at once, two would train in its folder, or none."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 5 * BEAT)  # also where a look takes that long
    for _ in range(2):
        if dead:
            die(host("dead").take())
        newcomers = [host(f"host{i}") for i in range(4)]
        start, got = threading.Barrier(len(newcomers)), list[Lease]()

        def come(newcomer: Host, start: threading.Barrier, got: list[Lease]) -> None:
            start.wait()
            with contextlib.suppress(InUse):
                got.append(newcomer.take())

        threads = [threading.Thread(target=come, args=(n, start, got)) for n in newcomers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        [winner] = got
        assert json.loads((tmp_path / "lease.json").read_text())["token"] == winner.token
        assert [end for newcomer in newcomers for end in newcomer.ends] == []
        winner.release()


def test_this_process_is_on_this_host(tmp_path: Path) -> None:
    """The message about a run in use would name a wrong host."""
    own = Lease(tmp_path)
    assert own.here["host"] == socket.gethostname()
    assert own.here["boot"] or not lease.BOOT_ID.exists()
