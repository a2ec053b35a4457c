"""Two recipes, or one recipe on two machines, side by side: ``python -m distcv.compare A B``.

Runs of one seed see the same samples in the same order, so both sides are compared seed by seed:
what chance does to both drops out of the difference.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from pydantic import Field

from distcv.command import printable, run_command
from distcv.command_line import parse_arguments, write_file
from distcv.config import InputError, Recipe, Strict
from distcv.intervals import difference_interval
from distcv.results import (
    OPTIONS,
    Run,
    differences,
    grouped,
    read_runs,
    read_starts,
    short_commit,
    spread,
)

MEASURES = {  # field of result.json: its name here, and digits
    "test_accuracy": ("test accuracy (%)", 2),
    "test_loss": ("test loss", 4),
    "seconds": ("seconds", 1),
    "images_per_second": ("images/s", 0),
}
TIMED = ("seconds", "images_per_second")
# Of a start's record: what is no part of its surroundings, or is shown otherwise.
PASSING = {"time", "options", "versions", "resumes", "changed", "seconds_lost", "restarts", "slurm",
           "commit", "host"}  # fmt: skip

Start = dict[str, Any]


class Arguments(Strict):
    """What to compare with what."""

    a: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="A")] = Field(
        description="A run folder, or a folder of one recipe's runs (its seeds)."
    )
    b: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="B")] = Field(
        description="Another one, which is compared with A."
    )
    json_file: Annotated[Path | None, tyro.conf.arg(name="json", metavar="FILE")] = Field(
        None, description="Write the comparison to this file, too."
    )


class Side(NamedTuple):
    """The finished runs of one recipe."""

    folder: Path
    recipe: Recipe
    results: dict[int, dict[str, Any]]
    """The contents of result.json, by seed."""
    starts: list[Start]
    """Those that environment.json tells of, of all runs."""
    notes: list[str]
    """A line for each run that is left out."""


def main() -> None:
    """Print the table of both sides and what it shows, then what else sets them apart."""
    arguments = parse_arguments(
        Arguments,
        prog="distcv.compare",
        description="Test accuracy, loss and time of two recipes, paired over the seeds that both "
        "have, with the 95 % confidence interval of the difference B - A.",
    )
    if arguments.a.resolve() == arguments.b.resolve():
        raise InputError(f"{arguments.a} and {arguments.b} are the same folder: give two")
    a, b = read_side(arguments.a), read_side(arguments.b)
    found = comparison(a, b)
    print(printable("\n".join([*a.notes, *b.notes, *report(found)])))
    if path := arguments.json_file:
        write_file("--json", path, lambda: path.write_text(json.dumps(found, indent=1) + "\n"))


def read_side(folder: Path) -> Side:
    """The finished runs in a folder.

    Raises:
        InputError: there are none, or of several recipes, or two of one seed.
    """
    runs, notes = read_runs((folder,))
    notes += [f"left out {run.folder}: not finished" for run in runs if run.result is None]
    finished = [run for run in runs if run.result is not None]
    if not finished:
        raise InputError("; ".join([f"no finished run in {folder}", *notes]) + ": train first")
    groups = grouped(finished)
    if len(groups) > 1:
        named = "; ".join(_named(group, finished) for group in groups)
        raise InputError(f"{folder} has runs of {len(groups)} recipes: {named}: give one's runs")
    results: dict[int, dict[str, Any]] = {}
    for run in groups[0]:
        if run.recipe.seed in results:
            raise InputError(
                f"{folder} has two runs of seed {run.recipe.seed}, one of them {run.folder.name}: "
                "move one elsewhere"
            )
        results[run.recipe.seed] = run.result or {}
    starts = [start for run in groups[0] for start in read_starts(run.folder)]
    return Side(folder, groups[0][0].recipe, results, starts, notes)


def _named(group: list[Run], others: list[Run]) -> str:
    recipe, folders = group[0].recipe, ", ".join(run.folder.name for run in group)
    words = (recipe.model, "on", recipe.dataset, differences(recipe, others))
    return f"{' '.join(filter(None, words))} ({folders})"


def comparison(a: Side, b: Side) -> dict[str, Any]:
    """All that is said of two sides, in plain JSON types.

    A figure's ``interval`` is null where there are too few runs for one. Figures of time are there
    only if all runs had the same hardware. A single seed in common makes no pairs where both sides
    have others.
    """
    common = sorted(a.results.keys() & b.results.keys())
    if len(common) == 1 < min(len(a.results), len(b.results)):
        common = []
    comparable = hardware(a) == hardware(b) and len(hardware(a)) == 1
    results = [*a.results.values(), *b.results.values()]
    fields = [
        field
        for field in MEASURES
        if all(math.isfinite(result.get(field, math.nan)) for result in results)
    ]
    figures = {
        field: _figure(
            [a.results[seed][field] for seed in common or sorted(a.results)],
            [b.results[seed][field] for seed in common or sorted(b.results)],
            paired=bool(common),
        )
        for field in fields
        if comparable or field not in TIMED
    }
    recipes = [side.recipe.model_dump(mode="json", exclude={"seed"}) for side in (a, b)]
    places = [surroundings(side) for side in (a, b)]
    return {
        "a": _described(a),
        "b": _described(b),
        "paired_seeds": common,
        "figures": figures,
        "recipe": _differing(*recipes),
        "environment": _differing(*places),
    }


def _described(side: Side) -> dict[str, Any]:
    commits = {str(start.get("commit")) for start in side.starts}
    commits = commits or {str(result.get("commit")) for result in side.results.values()}
    return {
        "folder": str(side.folder),
        "model": side.recipe.model,
        "dataset": side.recipe.dataset,
        "seeds": sorted(side.results),
        "commits": sorted(commits),
        "hardware": hardware(side),
    }


def hardware(side: Side) -> list[str]:
    """On what the runs ran, as far as it decides on their speed; in words, each once."""
    found = set()
    for start in side.starts:
        names = ["device", "processes", "nodes"]
        if start.get("device") == "cpu":
            names += ["cpu", "threads"]
        found.add(", ".join(f"{name} {start.get(name)}" for name in names))
    return sorted(found)


def surroundings(side: Side) -> dict[str, list[str]]:
    """Versions, machine, processes and options of all starts: the values of each, each once."""
    values: dict[str, set[str]] = {}
    for start in side.starts:
        options = {name: start.get("options", {}).get(name) for name in OPTIONS}
        record = {name: value for name, value in start.items() if name not in PASSING}
        for name, value in (record | start.get("versions", {}) | options).items():
            values.setdefault(name, set()).add(str(value))
    return {name: sorted(found) for name, found in values.items()}


def _differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    names = [*a, *(name for name in b if name not in a)]
    return {name: [a.get(name), b.get(name)] for name in names if a.get(name) != b.get(name)}


def _figure(a: list[float], b: list[float], paired: bool) -> dict[str, Any]:
    difference, interval = statistics.mean(b) - statistics.mean(a), None
    if min(len(a), len(b)) > 1:
        _, low, high = difference_interval(a, b, paired)
        if high - low > 1e-9:  # by chance, no value may differ from the others
            interval = [low, high]
    return {"a": _moments(a), "b": _moments(b), "difference": difference, "interval": interval}


def _moments(values: list[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"values": values, "mean": statistics.mean(values), "std": deviation}


def report(found: dict[str, Any]) -> list[str]:
    """The comparison in lines of text."""
    a, b, common = found["a"], found["b"], found["paired_seeds"]
    lines = [
        f"{name}  {side['folder']}: {side['model']} on {side['dataset']}, {_seeds(side['seeds'])}"
        for name, side in (("A", a), ("B", b))
    ]
    for name, side in (("A", a), ("B", b)):
        if common and (alone := [seed for seed in side["seeds"] if seed not in common]):
            which = ", ".join(map(str, alone))
            lines.append(f"left out of {name}, as the other side has no such seed: {which}")
    lines += [
        f"paired over {_seeds(common)}"
        if common
        else "not paired, for want of common seeds (Welch's interval)",
        "last epoch, whole test set, no test-time augmentation; mean ± standard deviation",
        "",
        _row("", "A", "B", "B - A", "95 % interval"),
        *(_row(name, *_cells(found["figures"][field], digits))
          for field, (name, digits) in MEASURES.items() if field in found["figures"]),
        "",
        verdict(found["figures"]["test_accuracy"]),
    ]  # fmt: skip
    if a["dataset"] != b["dataset"]:
        lines.append("the accuracies are of two data sets: their difference says little")
    if "seconds" not in found["figures"]:
        ran = (" and ".join(side["hardware"]) or "unknown hardware" for side in (a, b))
        lines.append(f"times are not comparable: A ran on {', B on '.join(ran)}")
    for kind in ("recipe", "environment"):
        lines += ["", kind + (":" if found[kind] else ": no difference")]
        lines += [f"  {name}: {_shown(x)} -> {_shown(y)}" for name, (x, y) in found[kind].items()]
    same = ": the same" if a["commits"] == b["commits"] else ""
    return [*lines, "", f"commit{same}", *(f"  {_commits(s)}" for s in ((a,) if same else (a, b)))]


def verdict(figure: dict[str, Any]) -> str:
    """What the difference in test accuracy shows, in words."""
    difference, interval = figure["difference"], figure["interval"]
    digits = _digits(figure, MEASURES["test_accuracy"][1])
    side = "above" if difference > 0 else "below"
    words = f"B is {abs(difference):.{digits}f} points of test accuracy {side} A"
    if round(difference, digits) == 0:
        words = "B has the test accuracy of A"
    if len(figure["a"]["values"]) == 1 or len(figure["b"]["values"]) == 1:
        return f"{words}; a single run has no interval: this may be chance"
    if interval is None:
        return f"{words}; nothing varies over these seeds: more of them are needed for an interval"
    low, high = interval
    ends = f"{words}; the 95 % interval, {low:+.{digits}f} to {high:+.{digits}f},"
    if _differ(figure):
        return f"{ends} excludes 0: the two differ"
    return f"{ends} includes 0: no difference is shown"


def _differ(figure: dict[str, Any]) -> bool:
    interval = figure["interval"]
    return interval is not None and not interval[0] <= 0 <= interval[1]


def _digits(figure: dict[str, Any], digits: int) -> int:
    """Two more where a difference that is no chance would be rounded away."""
    vanishes = abs(figure["difference"]) < 0.5 * 10**-digits
    return digits + 2 * (vanishes and _differ(figure))


def _row(name: str, *cells: str) -> str:
    a, b, difference, interval = cells
    return f"{name:<18}{a:>18}{b:>18}{difference:>12}{interval:>22}"


def _cells(figure: dict[str, Any], digits: int) -> list[str]:
    digits = _digits(figure, digits)
    cells = [spread(figure[side]["values"], f".{digits}f") for side in ("a", "b")]
    ends = figure["interval"] or ()
    interval = " to ".join(f"{end:+.{digits}f}" for end in ends)
    return [*cells, f"{figure['difference']:+.{digits}f}", interval or "-"]


def _seeds(seeds: list[int]) -> str:
    return f"n = {len(seeds)} (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})"


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _commits(side: dict[str, Any]) -> str:
    return ", ".join(map(short_commit, side["commits"]))


def command() -> None:
    """Entry point: :func:`main`, and its exit code."""
    run_command(main)


if __name__ == "__main__":
    command()
