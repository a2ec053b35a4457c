"""Stopped or killed at random steps and started again, many times in one run, and in one epoch."""

import random
from collections import Counter

from distcv import checkpoint
from faults.core import Outcome, Place, nursery, sample_ids
from faults.small import BATCH, EPOCH, Small

TITLE = "Resumed at random steps"
HOW = ["SIGKILL", "stop file"]


def interrupt(small: Small, name: str, how: str, step: int, processes: int = 1) -> None:
    """One start, which ends after this step or soon after: the next one resumes there."""
    children = small.start(name, processes)
    small.wait_for_step(name, step, lambda: any(child.code is not None for child in children))
    if how == "stop file":
        (small.folder(name) / "STOP").touch()
    else:
        for child in children:
            child.kill_group()
    for child in children:
        code = child.wait(60)
        assert code == (75 if how == "stop file" else -9), f"exit {code}: {child.said()[-300:]}"


def many_resumes(place: Place, small: Small, draw: random.Random) -> Outcome:
    """One run of several epochs, interrupted every few steps."""
    wanted = place.many(20, 5)
    steps = sorted(draw.sample(range(2, small.steps - 5), wanted))
    told: Counter[str] = Counter()
    resumed: set[int] = set()
    failures = []
    for step in steps:
        how = draw.choice(HOW)
        told[how] += 1
        try:
            interrupt(small, "resumed", how, step)
            resumed.update(checkpoint.steps(small.folder("resumed") / "checkpoints")[-1:])
        except AssertionError as error:
            failures.append(f"{how} after step {step}: {error}")
    try:
        small.check("resumed")
    except AssertionError as error:
        failures.append(str(error))
    return Outcome(
        f"interrupted {wanted} times in one run of {small.steps} steps",
        tried=wanted,
        survived=wanted if not failures else 0,
        lost="nothing: the run ends exact" if not failures else "see failures",
        figures={"by": dict(told), "different steps resumed at": len(resumed)},
        failures=failures,
    )


def twice_in_an_epoch(place: Place, small: Small, draw: random.Random, processes: int) -> Outcome:
    """Every image of the epoch is seen once."""
    tried = place.many(5, 1)
    failures = []
    for number in range(tried):
        name = f"epoch-{processes}-{number}"
        try:
            first = draw.randrange(12, EPOCH // 2)  # past a checkpoint
            second = draw.randrange(first + 12, EPOCH - 8)
            for how, step in zip(draw.sample(HOW, 2), (first, second), strict=True):
                interrupt(small, name, how, step, processes)
            small.finish(name, processes)
            steps = [ids for step, ids in sample_ids(small.ids(name)).items() if step < EPOCH]
            seen = Counter(index for ids in steps for index in ids)
            doubled, missing = sum(n > 1 for n in seen.values()), EPOCH * BATCH - len(seen)
            assert len(steps) == EPOCH and not doubled and not missing, (
                f"interrupted after {first} and {second}: {doubled} ids doubled, {missing} missing"
            )
        except AssertionError as error:
            failures.append(f"{name}: {error}")
    return Outcome(
        f"interrupted twice in one epoch, {processes} process{'es' * (processes > 1)}",
        tried=tried,
        survived=tried - len(failures),
        lost=f"nothing: each of {EPOCH * BATCH:,} sample ids once"
        if not failures
        else "see failures",
        failures=failures,
    )


def run(place: Place) -> list[Outcome]:
    draw = random.Random(3)
    with nursery(place.folder / "logs") as nurse:
        long = Small(place, nurse, place.many(2 * EPOCH, 100))
        small = Small(place, nurse, EPOCH)
        return [
            many_resumes(place, long, draw),
            *(twice_in_an_epoch(place, small, draw, n) for n in ((1, 2) if place.whole else (1,))),
        ]
