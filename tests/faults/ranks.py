"""One of two processes is killed or frozen: the other one leaves, says who it was, and fails.

Without a launcher, which would see a death by itself. Both are then started again, in the same run
folder, until the next fault.
"""

import contextlib
import random
import re
import signal
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from faults.core import Child, Outcome, Place, nursery
from faults.small import HANG_TIMEOUT, Small, wait_for_phase

TITLE = "One process of two killed or frozen"
STEPS = 60
LIMIT = 3 * HANG_TIMEOUT  # seconds: silence is noticed a beat later, and the machine may be busy
# A frozen one goes on once its peer has left, or is killed.
KINDS = {"SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}


class Fault(NamedTuple):
    kind: str
    victim: int
    """Its rank."""
    phase: str
    step: int = 0
    """Of the training phase: the step after which it comes."""

    def __str__(self) -> str:
        where = f"after step {self.step}" if self.step else f"in the {self.phase}"
        return f"{self.kind} to rank {self.victim} {where}"


@dataclass
class Seen:
    """What came of the faults of one kind."""

    seconds: list[float] = field(default_factory=list)
    """Until the peer had left."""
    phases: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    tried: int = 0


def plan(draw: random.Random) -> list[Fault]:
    """Four faults of one run: each kind to each rank, in training, saving and evaluation."""
    faults = [(kind, victim) for kind in KINDS for victim in (0, 1)]
    draw.shuffle(faults)
    first, second = draw.randrange(5, 20), draw.randrange(30, 45)
    places = [("training", first), ("training", second), ("saving", 0), ("evaluation", 0)]
    return [Fault(*fault, *place) for fault, place in zip(faults, places, strict=True)]


def strike(small: Small, name: str, number: int, fault: Fault, draw: random.Random) -> float:
    """One start, to its fault; the seconds until the peer had left.

    Raises:
        AssertionError: it left too late, with exit code 0, or without the victim's rank.
    """
    mark = small.place.folder / f"{name}-{number}.mark"
    hold = {} if fault.step else {fault.phase: 0.5}
    children = small.start(name, 2, mark=str(mark), hold=hold)

    def over() -> bool:
        return any(child.code is not None for child in children)

    try:
        if fault.step:
            small.wait_for_step(name, fault.step, over)
        else:
            wait_for_phase(mark, fault.phase, over)
        victim, peer = children[fault.victim], children[1 - fault.victim]
        victim.kill(KINDS[fault.kind])
        began = time.monotonic()
        code = peer.wait(LIMIT)
        took = time.monotonic() - began
        assert code != 0, "the peer left with exit code 0"
        assert names(peer, fault.victim), f"the rank is not named: {peer.said()[-300:]}"
        if fault.kind == "SIGSTOP" and draw.random() < 0.5:
            victim.kill(signal.SIGCONT)
            assert victim.wait(LIMIT) != 0, "thawed, it left with exit code 0"
        return took
    finally:
        for child in children:
            child.kill()
            child.wait(60)


def names(child: Child, rank: int) -> bool:
    """Whether a process says of this rank that it is lost."""
    said = child.said()
    found = re.search(rf"^error: (?:rank \d+ lost touch with )?rank {rank}\b", said, re.MULTILINE)
    return bool(found) or (rank == 0 and "error: the rendezvous (rank 0's node)" in said)


def run(place: Place) -> list[Outcome]:
    draw = random.Random(2)
    seen = {kind: Seen() for kind in KINDS}
    with nursery(place.folder / "logs") as nurse:
        small = Small(place, nurse, STEPS)
        for number in range(place.many(10, 1)):
            name = f"struck-{number}"
            faults = plan(draw)
            for place_in_run, fault in enumerate(faults):
                kind = seen[fault.kind]
                kind.tried += 1
                kind.phases[fault.phase] += 1
                try:
                    kind.seconds.append(strike(small, name, place_in_run, fault, draw))
                except AssertionError as error:
                    kind.failures.append(f"{fault}: {error}")
            try:
                small.check(name, 2)
            except AssertionError as error:
                for kind in seen.values():
                    kind.failures.append(f"after {', '.join(map(str, faults))}: {error}")
    return [outcome(kind, one) for kind, one in seen.items()]


def outcome(kind: str, seen: Seen) -> Outcome:
    figures = {"in": dict(seen.phases), "--hang-timeout, s": HANG_TIMEOUT}
    with contextlib.suppress(statistics.StatisticsError):
        figures |= {
            "s until the peer had left, median": round(statistics.median(seen.seconds), 1),
            "at most": round(max(seen.seconds), 1),
        }
    exact = not any("exact" in line for line in seen.failures)
    return Outcome(
        f"{kind} of one process of two; both started again",
        tried=seen.tried,
        survived=seen.tried - min(seen.tried, len(seen.failures)),
        lost="nothing: every run ends exact" if exact else "see failures",
        figures=figures,
        failures=seen.failures,
    )
