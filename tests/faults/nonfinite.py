"""Losses and gradients that are not finite: skipped by all ranks, and never learned from."""

import itertools
import json
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

from distcv import checkpoint
from faults.core import (
    Child,
    Nursery,
    Outcome,
    Place,
    group_env,
    learned,
    nursery,
    wait_until,
)
from support.runs import STRATEGY

TITLE = "A loss or gradient that is not finite"
STEPS = 12
SKIPPED = [0, 3, 4, 8]  # the first step makes the optimizer's state
THREE = [5, 6, 7]
TIMED = {"seconds", "images_per_second", "mfu", "memory_mib"}
OPTIMIZERS = {"sgd": "0.02", "adamw": "0.001", "muon": "0.001"}  # with a learning rate
SMALL = [
    ("single", "sgd", 2, "loss"), ("single", "muon", 1, "gradient"),
    ("ddp", "adamw", 1, "gradient"), ("ddp", "sgd", 2, "loss"),
]  # fmt: skip


class Shape(NamedTuple):
    """How a run is trained."""

    strategy: str
    optimizer: str
    parts: int

    @property
    def ranks(self) -> int:
        return 1 if self.strategy == "single" else 2

    def flags(self) -> list[str]:
        return [
            "--model", "gap", "--dataset", "synthetic", "--batch-size", "16", "--dropout", "0.1",
            "--ema-decay", "0.9", "--log-every", "1", "--schedule", "constant",
            "--optimizer", self.optimizer, "--lr", OPTIMIZERS[self.optimizer],
            "--gradient-accumulation-steps", str(self.parts),
        ]  # fmt: skip

    def env(self) -> list[dict[str, str]]:
        if self.ranks == 1:
            return [{}]
        group = [one | STRATEGY[self.strategy] for one in group_env(self.ranks)]
        if self.strategy.startswith("zero"):  # which Accelerate starts only if this is not said
            for one in group:
                del one["ACCELERATE_USE_CPU"]
        return group


class Suite:
    """Starts runs, and keeps those that others are compared with."""

    def __init__(self, place: Place, nurse: Nursery) -> None:
        self.folder, self.data_dir, self.nurse = nurse.folder / "runs", place.data_dir, nurse
        self.draw = random.Random(7)
        self.expected: dict[Any, Path] = {}
        self.numbers = itertools.count()

    def start(self, name: str, shape: Shape, *flags: str, **faults: Any) -> list[Child]:
        where = ["--name", name, "--runs-dir", str(self.folder), "--data-dir", str(self.data_dir)]
        return [
            self.nurse.start([*shape.flags(), *where, *flags], faults=faults, **env)
            for env in shape.env()
        ]

    def run(self, name: str, shape: Shape, *flags: str, expect: int = 0, **faults: Any) -> str:
        """Run to the end, by all ranks; what the first one printed."""
        children = self.start(name, shape, *flags, **faults)
        codes = [child.wait(600) for child in children]
        said = "\n".join(child.said() for child in children)
        assert set(codes) == {expect}, f"exit codes {codes}, not {expect}:\n{said}"
        return children[0].said()

    def without(self, shape: Shape, *flags: str, **without: Any) -> Path:
        """The run folder of a run that is never disturbed, as it should come out."""
        key = (shape, flags, str(without))
        if key not in self.expected:
            name = f"expected-{next(self.numbers)}"
            self.run(name, shape, *flags, without=without)
            self.expected[key] = self.folder / name
        return self.expected[key]

    def spoil(self, name: str, shape: Shape, what: str, steps: list[int], **more: Any) -> Any:
        """What is to be spoilt, at random as far as it matters not."""
        return {
            "what": what,
            "value": self.draw.choice(["nan", "inf"]),
            "rank": self.draw.randrange(shape.ranks),
            "part": self.draw.randrange(shape.parts),
            "steps": steps,
            "out": str(self.folder / f"seen-{name}"),
            **more,
        }

    def changes(self, name: str, shape: Shape, steps: list[int]) -> int:
        """How many of the spoilt steps changed the weights of a rank; all were looked at."""
        seen = []
        for rank in range(shape.ranks):
            lines = (self.folder / f"seen-{name}" / f"rank-{rank}.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            looked = [row for row in rows if "changed" in row]
            assert {row["step"] for row in looked} == set(steps), f"rank {rank} saw {looked}"
            seen.append(([row.get("skipped") for row in rows], sum(r["changed"] for r in looked)))
        assert all(one[0] == seen[0][0] for one in seen), f"skipped on the ranks: {seen}"
        return sum(changed for _, changed in seen)


def rows(run: Path) -> list[dict[str, Any]]:
    """What a run has logged, but for times."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]


def skips(place: Place) -> list[Outcome]:
    """Runs in which some steps are spoilt end as runs without these steps."""
    with nursery(place.folder / "skips") as nurse:
        return [_skips(Suite(place, nurse), place)]


def _skips(suite: Suite, place: Place) -> Outcome:
    cases = SMALL
    if place.whole:
        strategies = ["single", "ddp", "fsdp2", "zero2", "zero3"]
        every = itertools.product(strategies, OPTIMIZERS, (1, 2), ("loss", "gradient"))
        cases = [c for c in every if not (c[0].startswith("zero") and c[1] == "muon")]
    failures, survived, committed = [], 0, 0
    for number, (strategy, optimizer, parts, what) in enumerate(cases):
        name, shape = f"skips-{number}", Shape(strategy, optimizer, parts)
        spoilt = suite.spoil(name, shape, what, SKIPPED)
        case = f"{strategy}, {optimizer}, {parts} parts, {what} {spoilt['value']}"
        try:
            limit = ("--max-steps", str(STEPS))
            expected = suite.without(shape, *limit, omit=SKIPPED)
            said = suite.run(name, shape, *limit, spoil=spoilt)
            committed += suite.changes(name, shape, SKIPPED)
            assert f"{len(SKIPPED)} skipped so far" in said, said
            assert rows(suite.folder / name)[-2]["skipped_steps"] == len(SKIPPED)
            same = learned(suite.folder / name) == learned(expected)
            assert same, "not what a run without these steps has learned"
            survived += len(SKIPPED)
        except AssertionError as error:
            failures.append(f"{case}: {error}")
    return Outcome(
        "not finite on one rank: skipped by all",
        tried=len(cases) * len(SKIPPED),
        survived=survived,
        lost="these steps' samples",
        figures={"runs": len(cases), "bad updates committed": committed},
        failures=failures,
    )


def three(place: Place) -> list[Outcome]:
    """The third in a row stops a run, or rolls it back to a lower learning rate."""
    with nursery(place.folder / "three") as nurse:
        return [_three(Suite(place, nurse), place)]


def _three(suite: Suite, place: Place) -> Outcome:
    shapes = [Shape("single", "sgd", 1), Shape("ddp", "sgd", 1)]
    if place.whole:
        shapes += [Shape(name, "adamw", 1) for name in ("single", "ddp", "fsdp2", "zero2", "zero3")]
    failures, survived, committed, number = [], 0, 0, 0
    for shape in shapes:
        for try_one in (stops, rolls_back, rolls_back_to_the_start, gives_up):
            number += 1
            name = f"three-{number}"
            try:
                committed += try_one(suite, name, shape)
                survived += 1
            except AssertionError as error:
                failures.append(f"{try_one.__name__}, {shape}: {error}")
        if not place.whole:
            break
    return Outcome(
        "three in a row: the run stops, or rolls back",
        tried=number,
        survived=survived,
        lost="steps since the last checkpoint",
        figures={"bad updates committed": committed},
        failures=failures,
    )


def stops(suite: Suite, name: str, shape: Shape) -> int:
    """It ends with exit code 2 and the reason, and the checkpoints are those from before."""
    flags = ("--max-steps", str(STEPS), "--checkpoint-every", "5")
    said = suite.run(
        name, shape, *flags, expect=2, spoil=suite.spoil(name, shape, "loss", THREE)
    )  # fmt: skip
    assert "error: no finite loss and gradient in 3 steps" in said, said
    assert "--clip-norm" in said and "Traceback" not in said, said
    assert checkpoint.steps(suite.folder / name / "checkpoints") == [5]
    return suite.changes(name, shape, THREE)


def rolls_back(suite: Suite, name: str, shape: Shape) -> int:
    flags = ("--max-steps", str(STEPS), "--checkpoint-every", "4")
    back = ("--nonfinite", "rollback", "--rollback-lr-factor", "0.25")
    spoilt = suite.spoil(name, shape, "gradient", THREE, rollbacks=1)
    expected = suite.without(shape, *flags, slower_from=4, factor=0.25)
    said = suite.run(name, shape, *flags, *back, spoil=spoilt)
    assert "rolled back to step 4" in said, said
    same = learned(suite.folder / name) == learned(expected)
    assert same, "not what a run with a lower rate from there has learned"
    assert rows(suite.folder / name) == rows(expected), "rows"
    return suite.changes(name, shape, THREE)


def rolls_back_to_the_start(suite: Suite, name: str, shape: Shape) -> int:
    """Twice, where there is no other checkpoint yet."""
    flags = ("--max-steps", str(STEPS), "--checkpoint-every", str(STEPS))
    spoilt = suite.spoil(name, shape, "loss", THREE, rollbacks=2)
    expected = suite.without(shape, *flags, slower_from=0, factor=0.25)
    said = suite.run(name, shape, *flags, "--nonfinite", "rollback", spoil=spoilt)
    assert said.count("rolled back to step 0") == 2, said
    same = learned(suite.folder / name) == learned(expected)
    assert same, "not what a run with a lower rate has learned"
    return suite.changes(name, shape, THREE)


def gives_up(suite: Suite, name: str, shape: Shape) -> int:
    """After three rollbacks it stops after all."""
    flags = ("--max-steps", str(STEPS), "--checkpoint-every", "4", "--nonfinite", "rollback")
    said = suite.run(
        name, shape, *flags, expect=2, spoil=suite.spoil(name, shape, "loss", THREE)
    )  # fmt: skip
    assert said.count("rolled back to step 4") == 3, said
    assert "error: no finite loss and gradient in 3 steps" in said, said
    return suite.changes(name, shape, THREE)


def kills(place: Place) -> list[Outcome]:
    """Killed at a random instant after a rollback, and started again: it ends the same."""
    with nursery(place.folder / "kills") as nurse:
        return [_kills(Suite(place, nurse), place)]


def _kills(suite: Suite, place: Place) -> Outcome:
    shapes = [Shape("single", "sgd", 1)]
    if place.whole:
        shapes += [Shape(name, "adamw", 1) for name in ("ddp", "fsdp2", "zero2")]
    flags = ("--max-steps", "40", "--checkpoint-every", "4", "--nonfinite", "rollback")
    failures, survived, tried, in_time = [], 0, 0, 0
    for shape in shapes:
        expected = suite.without(shape, *flags, slower_from=4, factor=0.5)
        for _ in range(place.many(10, 2)):
            tried += 1
            name = f"killed-{tried}"
            spoilt = suite.spoil(name, shape, "gradient", THREE, rollbacks=1)
            try:
                children = suite.start(name, shape, *flags, spoil=spoilt)
                wait_until(lambda c=children[0]: "rolled back" in c.said(), 300, "rollback")
                time.sleep(suite.draw.uniform(0, 0.5))
                for child in children:
                    child.kill_group()
                for child in children:
                    in_time += child.wait(60) < 0 and child is children[0]
                suite.run(name, shape, *flags, spoil=spoilt)
                same = learned(suite.folder / name) == learned(expected)
                assert same, "not what a run left alone has learned"
                assert rows(suite.folder / name) == rows(expected), "rows"
                survived += 1
            except AssertionError as error:
                failures.append(f"{shape}: {error}")
    return Outcome(
        "kill -9 of all ranks after a rollback: resumed, exact",
        tried=tried,
        survived=survived,
        lost="steps since the last checkpoint",
        figures={"killed before they were finished": in_time},
        failures=failures,
    )


def run(place: Place) -> list[Outcome]:
    return [*skips(place), *three(place), *kills(place)]
