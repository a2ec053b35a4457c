"""Signs of life: processes that are stopped, slow or leaving, and the clock by itself."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from distcv.runtime.heartbeat import Heartbeat, own_store
from support.runs import ONE_THREAD, ROOT, free_port

TIMEOUT = 2.0


def worker(scenario: str, folder: Path) -> None:
    """One of two processes. A scenario ``rank<r> <acts>`` says what is done by one of them."""
    rank = int(os.environ["RANK"])
    chosen, act = rank == int(scenario[4]), scenario[6:]
    log = os.open(folder / f"{scenario} log{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    (folder / f"{scenario} pid{rank}").write_text(str(os.getpid()))
    dist.init_process_group("gloo")
    heartbeat = Heartbeat(own_store(), rank, 2, timeout=TIMEOUT)
    heartbeat.start()
    heartbeat.beat(7)
    while "step 7" not in heartbeat.describe():
        time.sleep(0.05)
    dist.barrier()
    if act == "leaves first":
        time.sleep(2.5 * TIMEOUT)
        if chosen:
            heartbeat.close()
        time.sleep(1.5 * TIMEOUT)
        heartbeat.close()
    elif chosen:
        os.kill(os.getpid(), signal.SIGKILL if act == "dies" else signal.SIGSTOP)
    elif act == "freezes":
        dist.barrier()  # for ever
    else:
        time.sleep(60)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def plain(folder: Path, scenarios: list[str]) -> None:
    """Start worlds of two without a launcher; forked, so that torch is imported only once."""
    names = {}
    for scenario in scenarios:
        port = free_port()
        for rank in "01":
            pid = os.fork()
            if pid == 0:
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ |= {"RANK": rank, "WORLD_SIZE": "2"}
                worker(scenario, folder)
            names[pid] = f"{scenario} exit{rank}"
    while names:
        pid, status = os.wait()
        (folder / names.pop(pid)).write_text(str(os.waitstatus_to_exitcode(status)))


class Worlds:
    """What the processes of all scenarios leave in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def process(self, name: str) -> psutil.Process | None:
        """A process by the file of its number, if it still runs and is not another by now."""
        with suppress(FileNotFoundError, psutil.Error):
            process = psutil.Process(int((self.folder / name).read_text()))
            if str(self.folder) in process.cmdline():
                return process
        return None

    def last_words(self, scenario: str, rank: int) -> str:
        """Wait until a process has ended; what it wrote to stderr."""
        deadline = time.monotonic() + 60
        log, pid = f"{scenario} log{rank}", f"{scenario} pid{rank}"
        while not (self.folder / pid).exists() or self.process(pid):
            assert time.monotonic() < deadline, f"{scenario}: rank {rank} goes on and on"
            time.sleep(0.05)
        return (self.folder / log).read_text()

    def exit_code(self, scenario: str, rank: int) -> int:
        """How a process without a launcher has ended."""
        path, deadline = self.folder / f"{scenario} exit{rank}", time.monotonic() + 60
        while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return int(path.read_text())


UNDER_TORCHRUN = ["rank1 freezes", "rank0 freezes"]
PLAIN = ["rank0 freezes alone", "rank0 dies", "rank0 leaves first", "rank1 leaves first"]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    """All scenarios, started at once: most of their time is sleep."""
    worlds = Worlds(tmp_path_factory.mktemp("worlds"))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    commands = [[*torchrun, __file__, str(worlds.folder), name] for name in UNDER_TORCHRUN]
    commands.append([__file__, str(worlds.folder), *PLAIN])
    environment = os.environ | ONE_THREAD | {"PYTHONPATH": str(ROOT / "tests")}
    with (worlds.folder / "launchers").open("w") as log:
        launchers = [
            subprocess.Popen([sys.executable, *command], env=environment, stdout=log, stderr=log)
            for command in commands
        ]
    try:
        yield worlds
    finally:
        for path in worlds.folder.glob("* pid?"):
            if process := worlds.process(path.name):
                process.kill()
        for launcher in launchers:
            launcher.kill()
            launcher.wait()


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [1, 0])
def test_a_frozen_process_is_named(frozen: int, worlds: Worlds) -> None:
    """A frozen process would block the run, and no line would say on which host it is."""
    scenario = f"rank{frozen} freezes"
    words = worlds.last_words(scenario, 1 - frozen)
    process = worlds.process(f"{scenario} pid{frozen}")
    assert process and process.status() == psutil.STATUS_STOPPED
    who = rf"rank {frozen} \(host {re.escape(socket.gethostname())}, process {process.pid}\)"
    how = r"has given no sign of life for [2-4] s, last at step 7: it hangs, or its node is gone"
    assert re.search(rf"^error: {who} {how}$", words, re.MULTILINE), words


@pytest.mark.slow
@pytest.mark.parametrize("act", ["freezes alone", "dies"])
def test_a_rendezvous_that_is_gone_is_said(act: str, worlds: Worlds) -> None:
    """If rank 0's node is lost, the other ranks would hang instead of ending with the reason."""
    words = worlds.last_words(f"rank0 {act}", 1)
    line = r"^error: the rendezvous \(rank 0's node\) can't be reached for [2-4] s$"
    assert re.search(line, words, re.MULTILINE), words
    assert worlds.exit_code(f"rank0 {act}", 1) == 1


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1])
def test_slow_processes_are_left_alone_and_leave_in_any_order(first: int, worlds: Worlds) -> None:
    """A slow step, or a rank that ends before the others, would end a healthy run."""
    for rank in range(2):
        words = worlds.last_words(f"rank{first} leaves first", rank)
        assert "error" not in words and "Traceback" not in words
        assert worlds.exit_code(f"rank{first} leaves first", rank) == 0


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def group(processes: int) -> tuple[Clock, list[Heartbeat]]:
    """Heartbeats that have one store and one clock, with a timeout of 10 s; none is started."""
    clock, store = Clock(), dist.HashStore()
    return clock, [
        Heartbeat(store, rank, processes, timeout=10.0, clock=clock) for rank in range(processes)
    ]


def seconds(clock: Clock, many: int, *alive: Heartbeat) -> list[str]:
    """Let these processes live for so many seconds; the problems that the first of them sees."""
    problems = []
    for _ in range(many):
        clock.now += 1
        for heartbeat in reversed(alive):
            heartbeat.exchange()
        if problem := alive[0].problem():
            problems.append(problem)
    return problems


def test_rank_0_watches_all_and_the_others_watch_rank_0() -> None:
    """A rank that falls silent would not be noticed within --hang-timeout."""
    clock, (zero, one, two) = group(3)
    two.beat(41)
    assert not seconds(clock, 30, zero, one, two)
    assert not seconds(clock, 10, zero, one)
    assert seconds(clock, 1, zero, one)[0].startswith("rank 2 (host ")
    clock, (zero, one, two) = group(3)
    assert not seconds(clock, 30, one, zero), "rank 2 is not rank 1's business"
    assert not seconds(clock, 10, one)
    assert seconds(clock, 1, one)[0].startswith("rank 0 (host ")


def test_a_process_that_never_began_is_named_by_its_rank() -> None:
    """A rank that hangs before its first heartbeat would be waited for and never named."""
    clock, (zero, one, _) = group(3)
    assert not seconds(clock, 10, zero, one)
    assert seconds(clock, 1, zero, one) == [
        "rank 2 has given no sign of life for 11 s, before its first step: "
        "it hangs, or its node is gone"
    ]


def test_a_store_that_does_not_answer_is_not_a_peer_s_silence() -> None:
    """A lost connection to rank 0's node would be reported as the failure of a peer."""
    clock, (zero, one) = group(2)
    assert not seconds(clock, 5, zero, one)
    for _ in range(10):
        clock.now += 1
        assert zero.problem() is None
    clock.now += 1
    assert zero.problem() == "the rendezvous (rank 0's node) can't be reached for 11 s"


def test_who_was_stopped_itself_forgives() -> None:
    """A process that was suspended would blame its healthy peers and end the run."""
    clock, (zero, one) = group(2)
    assert not seconds(clock, 5, zero, one)
    clock.now += 1000
    assert zero.problem() is None
    assert not seconds(clock, 10, zero)
    assert len(seconds(clock, 1, zero)) == 1, "from then on, it counts anew"
    # Half the timeout is not a stop, and not yet a reason to complain of a peer that lives.
    clock, (zero, one) = group(2)
    assert not seconds(clock, 3, zero, one)
    clock.now += 5
    assert not seconds(clock, 1, zero) and not seconds(clock, 4, zero)
    assert len(seconds(clock, 1, zero)) == 1


def test_the_likely_cause_is_described() -> None:
    """After a lost connection, the error would name the wrong rank or its wrong step."""
    clock, (zero, one, two) = group(3)
    one.beat(12)
    two.beat(11)
    seconds(clock, 1, zero, one, two)
    assert re.fullmatch(
        r"rank 2 \(host .*, process \d+\), last at step 11, heard of 0 s ago", zero.describe()
    )
    seconds(clock, 4, zero, two)
    assert re.fullmatch(r"rank 1 .*, last at step 12, heard of 4 s ago", zero.describe())


@pytest.mark.slow
def test_a_broken_store_is_told_of_once_and_not_while_leaving() -> None:
    """A broken rendezvous would go unreported, or a run that ends normally would report one."""

    class Broken(dist.HashStore):
        def set(self, key: str, value: str) -> None:
            raise dist.DistNetworkError("Broken pipe")

    told: list[str] = []
    for stays in (True, False):
        heartbeat = Heartbeat(Broken(), 1, 2, timeout=0.5, give_up=told.append)
        heartbeat.start()
        time.sleep(1.0 if stays else 0.2)
        heartbeat.close()
        heartbeat.close()
    assert told == ["the rendezvous (rank 0's node) can't be reached for 1 s"]


def test_each_attempt_has_its_own_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart, old heartbeats would count as new, or nodes would not see each other's."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", free_port())
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    first = own_store()
    first.set("rank0", "…")
    assert own_store().check(["rank0"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert own_store().check(["rank0"]), "without an agent's store, nodes don't agree on the count"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert not own_store().check(["rank0"])


if __name__ == "__main__":
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    worker(names[0], folder) if "RANK" in os.environ else plain(folder, names)
