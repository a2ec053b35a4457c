"""Two jobs on one run folder, on one host and on two, and the leases that dead holders leave.

"Hosts" are processes with host names of their own, and without locks between them: so a file system
looks on which each node locks for itself. Their clocks are wrong by a day.
"""

import contextlib
import os
import random
import signal
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults.core import Child, Outcome, Place, exact, nursery
from faults.small import Small, wait_for_phase

TITLE = "Two jobs on one run folder"
STEPS, SAVED = 40, 30
DAY = 86_400
BEAT = 0.4  # seconds; in use it is 4
FOREVER = 3600.0
PATIENCE = 120.0
NO_LEASE = ["", "{", "[1]", '{"host": 7}', "\0" * 4096, "not ours\n"]


def on(host: str, clock: float = 0) -> dict[str, Any]:
    """The hook that puts a start on a host."""
    return {"host": {"name": host, "clock": clock, "beat": BEAT}}


class Faults:
    """Tries faults of one kind, and remembers what came of them."""

    def __init__(self, small: Small) -> None:
        self.small, self.failures = small, list[str]()
        self.tried = 0
        self.seconds: list[float] = []

    @contextlib.contextmanager
    def fault(self, name: str) -> Iterator[None]:
        """One fault; its run must end exact, and whatever goes wrong in here is a failure."""
        self.tried += 1
        try:
            yield
            if 1 not in self.small.alone:
                self.small.alone[1] = self.small.finish("alone")
            came = exact(self.small.folder(name), self.small.ids(name))
            assert came == self.small.alone[1], "it is not exact"
        except (AssertionError, OSError, IndexError) as error:
            self.failures.append(f"{name}: {str(error) or type(error).__name__}")

    def outcome(self, fault: str, lost: str, **figures: Any) -> Outcome:
        if self.seconds:
            figures["seconds, median"] = round(statistics.median(self.seconds), 1)
        return Outcome(
            fault,
            tried=self.tried,
            survived=self.tried - len(self.failures),
            lost="see failures" if self.failures else lost,
            figures=figures,
            failures=self.failures,
        )


def ends(child: Child, code: int) -> str:
    """Wait for the end of a start; what it printed."""
    found = child.wait(PATIENCE)
    assert found == code, f"exit {found}, not {code}: {child.said()[-500:]}"
    return child.said()


def refused(child: Child, holder: str) -> None:
    """A start must end with exit code 2 and one line that names the holder."""
    said = ends(child, 2)
    assert said.count("\n") == 1 and f"in use by another process{holder}" in said, said


def who(host: str, child: Child) -> str:
    return f" (host {host}, process {child.pid})"


def taken_over(said: str, holder: str) -> None:
    """A start must have said so, in one line."""
    assert said.count("taken over") == 1 and f"its holder{holder} gave no sign of life" in said, (
        said
    )


def lease(small: Small, name: str) -> Path:
    return small.folder(name) / "lease.json"


def held(small: Small, name: str, phase: str, *hosts: str) -> Child:
    """A start that lingers in a phase, on this host or another."""
    mark = small.place.folder / f"{name}.mark"
    hooks = on(*hosts) if hosts else {}
    [child] = small.start(name, mark=str(mark), hold={phase: FOREVER}, **hooks)
    wait_for_phase(mark, phase, child.ended)
    return child


def at_once(small: Small, pairs: int) -> Outcome:
    """Two are started at the same instant: one trains."""
    faults = Faults(small)
    for number in range(pairs):
        with faults.fault(name := f"pair-{number}"):
            both = small.start(name) + small.start(name)
            codes = sorted(child.wait(PATIENCE) for child in both)
            assert codes == [0, 2], f"exits {codes}: {both[0].said()} {both[1].said()}"
            refused(next(child for child in both if child.code == 2), "")
    return faults.outcome("two started at the same instant, on one host", "nothing")


def while_it_trains(small: Small, times: int) -> Outcome:
    """The second is refused; the first is killed, and the next goes on without waiting."""
    faults = Faults(small)
    for number in range(times):
        with faults.fault(name := f"here-{number}"):
            first = held(small, name, "evaluation")
            refused(small.start(name)[0], who(socket.gethostname(), first))
            first.kill()
            first.wait(PATIENCE)
            began = time.monotonic()
            said = ends(small.start(name)[0], 0)
            faults.seconds.append(time.monotonic() - began)
            assert f"resuming after step {SAVED}" in said and "taken over" not in said, said
    return faults.outcome(
        "a second one while the first trains; then kill -9 and a start at once, on one host",
        f"the steps since the checkpoint ({STEPS - SAVED} of {STEPS})",
    )


def at_once_on_two_hosts(small: Small, pairs: int, draw: random.Random) -> Outcome:
    """Two hosts without common locks; there is no lease, or that of a dead host."""
    faults = Faults(small)
    for number in range(pairs):
        with faults.fault(name := f"hosts-{number}"):
            if number % 2:
                dead = held(small, name, "training", "c")
                dead.kill()
                dead.wait(PATIENCE)
            clocks = draw.sample([-DAY, 0, DAY], 2)
            hooks = [on("a", clocks[0]), on("b", clocks[1])]
            both = [child for hook in hooks for child in small.start(name, **hook)]
            codes = sorted(child.wait(PATIENCE) for child in both)
            assert codes == [0, 2], f"exits {codes}: {both[0].said()} {both[1].said()}"
            refused(next(child for child in both if child.code == 2), "")
    return faults.outcome("two started at the same instant, on two hosts without common locks",
                          "nothing")  # fmt: skip


def dead_host(small: Small, skews: list[tuple[int, int]]) -> Outcome:
    """A second host is refused as long as the first lives, and takes over when it is dead."""
    faults = Faults(small)
    for skew, clock in skews:
        with faults.fault(name := f"dead-{skew}-{clock}"):
            first = held(small, name, "evaluation", "a")
            refused(small.start(name, **on("b", clock))[0], who("a", first))
            first.kill()
            first.wait(PATIENCE)
            then = time.time() + skew
            os.utime(lease(small, name), (then, then))
            began = time.monotonic()
            said = ends(small.start(name, **on("b", clock))[0], 0)
            faults.seconds.append(time.monotonic() - began)
            taken_over(said, who("a", first))
            assert f"resuming after step {SAVED}" in said, said
    return faults.outcome(
        "the lease of a dead host, dated a day back, now, a day ahead; the next host's clock is "
        "off by a day as well",
        f"the steps since the checkpoint ({STEPS - SAVED} of {STEPS})",
    )


def damaged(small: Small, texts: list[str]) -> Outcome:
    """A lease that was cut, or is something else, keeps nobody out."""
    faults = Faults(small)
    for number, text in enumerate(texts):
        with faults.fault(name := f"damaged-{number}"):
            small.folder(name).mkdir(parents=True)
            lease(small, name).write_text(text)
            taken_over(ends(small.start(name, **on("a"))[0], 0), "")
    return faults.outcome("an empty, damaged or foreign lease", "nothing")


def frozen(small: Small, phases: list[str]) -> Outcome:
    """The first is stopped, a second host takes over; the first runs again, and writes nothing."""
    faults = Faults(small)
    for number, phase in enumerate(phases):
        with faults.fault(name := f"frozen-{number}"):
            first = frozen_in(small, name, phase)
            second = held(small, name, "evaluation", "b")
            before = contents(small.folder(name))
            began = time.monotonic()
            first.kill(signal.SIGCONT)
            said = ends(first, 1)
            faults.seconds.append(time.monotonic() - began)
            assert said.count("was taken over") == 1 and "Traceback" not in said, said
            assert f"was taken over{who('b', second)} while" in said, said
            assert contents(small.folder(name)) == before, "it has written something"
            second.kill()
            second.wait(PATIENCE)
            ends(small.start(name, **on("b"))[0], 0)
    return faults.outcome(
        "stopped (SIGSTOP) while another host takes over, then let run again: it ends",
        "nothing: not a byte of the folder changes",
        phases=len(set(phases)),
    )


def frozen_in(small: Small, name: str, phase: str) -> Child:
    """A start on host a that stands still: in a phase that lasts a moment, or on its way."""
    mark = small.place.folder / f"{name}-first.mark"
    hold = {"training": 0.0, phase: 1.0}
    [child] = small.start(name, mark=str(mark), hold=hold, **on("a"))
    if phase == "training":
        small.wait_for_step(name, 5, child.ended)
    else:
        wait_for_phase(mark, phase, child.ended)
    child.kill(signal.SIGSTOP)
    return child


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of all files but the lease, in which the holder's beat counts."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.name != "lease.json" and path != folder
    }


def run(place: Place) -> list[Outcome]:
    draw = random.Random(9)
    days = [-DAY, 0, DAY]
    skews = [(skew, clock) for skew in days for clock in days]
    phases = ["saving", "training", "evaluation"] * 7
    with nursery(place.folder / "nursery") as nurse:
        small = Small(place, nurse, STEPS)
        return [
            at_once(small, place.many(20, 3)),
            while_it_trains(small, place.many(10, 1)),
            at_once_on_two_hosts(small, place.many(20, 2), draw),
            dead_host(small, skews if place.whole else [(-DAY, DAY), (DAY, 0)]),
            damaged(small, NO_LEASE[: place.many(len(NO_LEASE), 1)]),
            frozen(small, phases[: place.many(20, 2)]),
        ]
