"""Finished runs as a table of means over their seeds: ``python -m distcv.results runs``.

Others may be writing their run folders meanwhile: what can't be read yet is left out and said.
"""

import contextlib
import json
import os
import socket
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from pydantic import Field

from distcv.command_line import parse_arguments, run_command, write_file
from distcv.config import InputError, Recipe, Strict, load_recipe

DETAILS = {"confusion", "mistakes"}  # of a result, which stay in the run folder
OPTIONS = ("compile", "sync_bn")  # of a run, those that change how it computes
FIELDS_SHOWN = 4  # of those in which recipes differ
HEAD = ("model", "dataset", "recipe", "n", "test accuracy (%)", "min", "max", "seconds")


class Arguments(Strict):
    """What to read and where to write."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = Field(
        (Path("runs"),), description="Run folders, or folders that hold them."
    )
    json_file: Annotated[Path | None, tyro.conf.arg(name="json", metavar="FILE")] = Field(
        None, description="Write the results of the finished runs to this file, too."
    )


class Run(NamedTuple):
    """What is read of one run folder."""

    folder: Path
    recipe: Recipe
    result: dict[str, Any] | None
    """The contents of result.json, None as long as the run is not finished."""


def main() -> None:
    """Print a row for each recipe, then what else is to be said."""
    arguments = parse_arguments(
        Arguments,
        prog="distcv.results",
        description="Test accuracy at the last epoch, mean and sample standard deviation over "
        "the seeds of each recipe.",
    )
    runs, skipped = read_runs(arguments.runs)
    print("\n".join([*report(runs), *skipped]))
    if not runs:
        raise InputError(f"no runs in {', '.join(map(str, arguments.runs))}: train first")
    if arguments.json_file:
        write_results(arguments.json_file, runs)


def read_runs(places: tuple[Path, ...]) -> tuple[list[Run], list[str]]:
    """The runs in these folders, each once, and a line for each folder that can't be read.

    Raises:
        InputError: there is no such folder.
    """
    runs, skipped = {}, []
    for place in places:
        if not place.is_dir():
            raise InputError(f"no folder {place}: give run folders, or a folder that holds some")
        for folder in _candidates(place):
            try:
                runs[folder.resolve()] = read_run(folder)
            except (OSError, InputError) as error:
                skipped.append(f"skipped {folder}: {error}")
    return list(runs.values()), skipped


def _candidates(place: Path, depth: int = 2) -> list[Path]:
    """The folder itself if it is a run's, or a half-made one's, else those in it.

    Down to the second level: the runs of a job array lie in a folder of their own.
    """
    if depth == 0 or (place / "config.yaml").exists():
        return [place]
    with contextlib.suppress(OSError):
        inside = [path for path in place.iterdir() if path.is_dir() and path.name[0] != "."]
        if inside:
            return [found for path in sorted(inside) for found in _candidates(path, depth - 1)]
    return [place]


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        InputError or OSError: it is not one, or not yet, or damaged.
    """
    config, path = folder / "config.yaml", folder / "result.json"
    if not config.exists():
        raise InputError("no config.yaml")
    recipe = load_recipe(config)
    if not path.exists():
        return Run(folder, recipe, None)
    try:
        result = json.loads(path.read_text())
        result |= {key: float(result[key]) for key in ("test_accuracy", "seconds")}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path.name} is damaged: {error!r}") from None
    return Run(folder, recipe, result)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The whole rows of a run's metrics.jsonl; the last one may be being written."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and {"event", "step", "epoch"} <= row.keys():
                rows.append(row)
    return rows


def last_row(folder: Path) -> dict[str, Any] | None:
    """The newest of them, or None."""
    rows = read_rows(folder)
    return rows[-1] if rows else None


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """What environment.json tells of a run's starts; nothing if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return [dict(s) for s in json.loads((folder / "environment.json").read_text())["starts"]]
    return []


def short_commit(commit: str) -> str:
    """The first twelve digits, with `-dirty` if the clone was changed."""
    return f"{commit[:12]}{commit[40:]}"


def grouped(runs: list[Run]) -> list[list[Run]]:
    """Runs whose recipes are the same but for the seed, together and in the order of seeds."""
    groups: dict[Recipe, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.recipe.model, run.recipe.dataset)):
        groups.setdefault(_without_seed(run.recipe), []).append(run)
    return [sorted(group, key=lambda run: run.recipe.seed) for group in groups.values()]


def _without_seed(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"seed": 0})


def differences(recipe: Recipe, runs: list[Run]) -> str:
    """What sets a recipe off from the others of its model and data set, as `lr 0.1, epochs 20`."""
    fields = recipe.model_dump(exclude={"seed"})
    others = [run.recipe.model_dump() for run in runs]
    rivals = [o for o in others if all(o[key] == fields[key] for key in ("model", "dataset"))]
    names = [name for name in fields if any(o[name] != fields[name] for o in rivals)]
    words = [f"{name} {fields[name]}" for name in names[:FIELDS_SHOWN]]
    return ", ".join(words + ["…"] * (len(names) > FIELDS_SHOWN))


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Mean ± sample standard deviation; the value of a single run, a dash if there is none."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):{form}}"
    return f"{mean} ± {statistics.stdev(values):{form}}" if len(values) > 1 else mean


def report(runs: list[Run]) -> list[str]:
    """The lines of the table, of runs of one seed or of several commits, of unfinished runs."""
    rows: list[tuple[str, ...]] = [HEAD]
    notes: list[str] = []
    for group in grouped(runs):
        results = [run.result for run in group if run.result is not None]
        if not results:
            continue
        recipe = group[0].recipe
        accuracy = [result["test_accuracy"] for result in results]
        rows.append(
            (
                recipe.model,
                recipe.dataset,
                differences(recipe, runs),
                str(len(results)),
                spread(accuracy),
                f"{min(accuracy):.2f}",
                f"{max(accuracy):.2f}",
                f"{statistics.mean(result['seconds'] for result in results):.1f}",
            )
        )
        notes += list(_notes([run for run in group if run.result is not None]))
    unfinished = [_progress(run) for run in runs if run.result is None]
    return [*(aligned(rows) if len(rows) > 1 else []), *notes, *unfinished]


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of words as lines of columns: the first three from the left, figures from the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = "<<<>>>>>"
    return [
        "  ".join(
            f"{word:{side}{width}}" for word, side, width in zip(row, sides, widths, strict=True)
        )
        for row in rows
    ]


def _notes(group: list[Run]) -> list[str]:
    """What makes the runs of a recipe no plain sample over seeds of one program."""
    label = f"{group[0].recipe.model} on {group[0].recipe.dataset}"
    lines = []
    for seed, count in Counter(run.recipe.seed for run in group).items():
        if count > 1:
            names = ", ".join(str(run.folder) for run in group if run.recipe.seed == seed)
            lines.append(f"{label}: seed {seed} counts {count} times: {names}")
    commits = {str(run.result.get("commit")) for run in group if run.result is not None}
    if len(commits) > 1:
        short = ", ".join(map(short_commit, sorted(commits)))
        lines.append(f"{label}: runs of {len(commits)} commits: {short}")
    return lines


def _progress(run: Run) -> str:
    row = last_row(run.folder)
    epochs = run.recipe.epochs
    reached = f"step {row['step']}, epoch {row['epoch']:.2f} of {epochs}" if row else "no step yet"
    return f"unfinished {run.folder}: {reached}"


def write_results(path: Path, runs: list[Run]) -> None:
    """Write the contents of all result.json, but for details, as a list by recipe and seed.

    Where there are several recipes for a model and its data, `recipe` says in what they differ.

    Raises:
        InputError: the file can't be written.
    """
    rows = []
    for run in (run for group in grouped(runs) for run in group if run.result is not None):
        differs = differences(run.recipe, runs)
        figures = {k: v for k, v in (run.result or {}).items() if k not in DETAILS}
        rows.append(figures | ({"recipe": differs} if differs else {}))
    # Tasks of a job array that end at the same time, on several nodes, write the same file.
    scratch = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")

    def write() -> None:
        scratch.write_text(json.dumps(rows, indent=1) + "\n")
        scratch.replace(path)

    write_file("--json", path, write)


def command() -> None:
    """Entry point: :func:`main`, and its exit code."""
    run_command(main)


if __name__ == "__main__":
    command()
