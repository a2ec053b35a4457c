"""Recipes and command lines that are no such thing, by the thousand."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from distcv.command_line import RunOptions
from distcv.config import Recipe, load_recipe
from faults.bad_cases import (
    ALIASES,
    BOMBS,
    COMMANDS,
    Case,
    command_lines,
    other_command_lines,
    recipes,
)
from faults.commands import Answer, answer, command
from faults.core import Outcome, Place

TITLE = "Wrong input"
SLOW = 20.0  # seconds for one answer, on a machine that is busy with other things


def wrong_refusal(got: Answer, names: tuple[str, ...]) -> str | None:
    """What is wrong with a refusal, if anything is."""
    if got.code != 2:
        return f"exit {got.code}"
    if not got.err.startswith("error: ") or got.err.count("\n") != 1 or got.out:
        return f"not one line: {got.err[:200]!r}"
    if not all(c.isprintable() for c in got.err[:-1]):
        return f"not printable: {got.err[:200]!r}"
    if not any(name in got.err for name in names):
        return f"names none of {names!r:.100}: {got.err[:200]!r}"
    return f"took {got.seconds:.0f} s" if got.seconds > SLOW else None


def wrong_recipe(printed: str, file: Path) -> str | None:
    """What is wrong with a recipe that was accepted, if anything is."""
    file.write_text(printed)
    recipe = load_recipe(file)
    if recipe.to_yaml() != printed:
        return "it does not go round"
    for name, info in Recipe.model_fields.items():
        value = getattr(recipe, name)
        for rule in info.metadata if value is not None else ():
            for bound, holds in BOUNDS.items():
                limit = getattr(rule, bound, None)
                if limit is not None and not holds(value, limit):
                    return f"{name} = {value} is out of range"
    return None


BOUNDS: dict[str, Callable[[Any, Any], bool]] = {
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
}  # fmt: skip


def tried(
    fault: str,
    cases: st.SearchStrategy[Case],
    wanted: int,
    ask: Callable[[Case], tuple[Answer, str | None]],
) -> Outcome:
    """Generate inputs until so many were refused; ``ask`` judges those that were accepted."""
    failures: list[str] = []
    counts: Counter[str] = Counter()
    seconds: list[float] = []
    for number in range(20):
        left = wanted - counts["refused"]
        if left <= 0:
            break

        @seed(number)
        @settings(
            max_examples=left,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cases)
        def each(case: Case) -> None:
            got, wrong = ask(case)
            seconds.append(got.seconds)
            if got.code != 0:
                wrong = wrong_refusal(got, case.names)
            elif case.certain:
                wrong = "accepted"
            counts["accepted" if got.code == 0 else "refused"] += 1
            if wrong:
                failures.append(f"{case.given!r:.200}: {wrong}")

        each()
    figures = {
        "generated": counts.total(),
        "valid after all": counts["accepted"],
        "slowest answer in s": round(max(seconds), 2),
    }
    survived = counts["refused"] - len(failures)
    return Outcome(fault, counts["refused"], survived, "nothing", figures, failures)


def bad_recipes(place: Place) -> list[Outcome]:
    """Files that are no recipes."""
    from distcv import train

    file, again = place.folder / "recipe.yaml", place.folder / "again.yaml"

    def ask(case: Case) -> tuple[Answer, str | None]:
        file.write_bytes(case.given)
        got = answer(train.main, "--print-config", "--recipe", str(file))
        return got, wrong_recipe(got.out, again) if got.code == 0 else None

    failures = []
    listed = [Case(data, ("recipe",)) for data in BOMBS]
    listed += [Case(data, ("an alias",)) for data in ALIASES]
    for case in listed:
        got, _ = ask(case)
        if wrong := wrong_refusal(got, case.names):
            failures.append(f"{case.given!r:.100}: {wrong}")
    survived = len(listed) - len(failures)
    return [
        Outcome("a file that is no recipe", len(listed), survived, "nothing", failures=failures),
        tried("a wrong recipe", recipes(), place.many(4500, 300), ask),
    ]


def bad_flags(place: Place) -> list[Outcome]:
    """Command lines of distcv.train that are wrong; nothing is trained."""
    from distcv import train

    again = place.folder / "flags.yaml"
    accepted: list[tuple[Recipe, RunOptions]] = []

    def note(recipe: Recipe, options: RunOptions) -> int:
        accepted.append((recipe, options))
        return 0

    def ask(case: Case) -> tuple[Answer, str | None]:
        accepted.clear()
        with mock.patch.object(train, "train", note):
            got = answer(train.main, *case.given)
        return got, wrong_recipe(accepted[0][0].to_yaml(), again) if accepted else None

    return [tried("a wrong command line", command_lines(), place.many(4500, 120), ask)]


def bad_flags_of_others(place: Place) -> list[Outcome]:
    """Command lines of the other commands; they go no further than to read them."""

    class Accepted(BaseException):
        pass

    def ask(case: Case) -> tuple[Answer, str | None]:
        name, flags = case.given
        module = command(name)
        read = next(n for n in ("parse_known_arguments", "parse_arguments") if hasattr(module, n))
        original = getattr(module, read)

        def stop_after(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            raise Accepted

        try:
            with mock.patch.object(module, read, stop_after):
                return answer(module.main, *COMMANDS[name], *flags), None
        except Accepted:
            return Answer(0, "", "", 0.0), None

    cases = other_command_lines()
    return [tried("a wrong command line of another command", cases, place.many(1000, 60), ask)]


def in_processes(place: Place) -> list[Outcome]:
    """Some of them as a shell would start them."""
    file = place.folder / "recipe.yaml"
    file.write_bytes(b"[" * 3000)
    lines = [
        ["--recipe", str(file)], ["--lr", "\udc80"], ["--seed", "9" * 5000],
        ["--name", "\x1b[2J"], ["--\udcff=1"], ["--recipe", "/dev/zero"], ["--epochs", "\u202e"],
        ["--batch-size", "-1"], ["--lr-milestones", "x"], ["--recipe", "x" * 5000],
    ]  # fmt: skip
    failures = []
    lines = lines[: place.many(len(lines), 3)]
    for flags in lines:
        ran = subprocess.run(
            [sys.executable, "-m", "distcv.train", *flags], capture_output=True, timeout=120
        )
        got = Answer(ran.returncode, ran.stdout.decode(), ran.stderr.decode(), 0.0)
        if wrong := wrong_refusal(got, ("error",)):
            failures.append(f"{flags!r:.100}: {wrong}")
    survived = len(lines) - len(failures)
    return [Outcome("the same in processes", len(lines), survived, "nothing", failures=failures)]


def run(place: Place) -> list[Outcome]:
    """Each is to end with exit code 2 and one line that names what is wrong."""
    parts = (bad_recipes, bad_flags, bad_flags_of_others, in_processes)
    return [outcome for part in parts for outcome in part(place)]
