"""Finished runs as a table of means over their seeds: ``python -m distcv.results runs``.

Others may be writing their run folders meanwhile: what can't be read yet is left out and said. In
a clone, runs become rows of docs/results.md (``--collect``), and what stands there is verified
(``--check``).
"""

import contextlib
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt

from distcv.command import printable, run_command
from distcv.command_line import parse_arguments
from distcv.config import InputError, Recipe, Strict, load_recipe, validated
from distcv.files import parse_json, read_json, read_text

DETAILS = {"confusion", "mistakes"}  # of a result, which stay in the run folder
OPTIONS = ("compile", "sync_bn")  # of a run, those that change how it computes
MAX_METRICS = 1 << 28  # bytes
FIELDS_SHOWN = 4  # of those in which recipes differ


class Arguments(Strict):
    """What to read, and what to make of it."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = Field(
        (Path("runs"),), description="Run folders, or folders that hold them."
    )
    json_file: Annotated[Path | None, tyro.conf.arg(name="json", metavar="FILE")] = Field(
        None, description="Write the results of the finished runs to this file, too."
    )
    collect: bool = Field(
        False,
        description="Put the finished runs of recipes in configs/ into results/, then --tables.",
    )
    tables: bool = Field(
        False,
        description="Read no runs; make what is made of results/: docs/results.md and others.",
    )
    check: bool = Field(
        False,
        description="Read no runs; verify results/ and what is made of it. Exit code 2 if not.",
    )


class Mistake(BaseModel):
    """A test image of another class than was predicted; see `evaluate`."""

    sample: NonNegativeInt
    label: NonNegativeInt
    predicted: NonNegativeInt
    confidence: FiniteFloat


class Start(BaseModel):
    """What others rely on in a start that environment.json tells of; see `describe_environment`."""

    model_config = ConfigDict(extra="allow")
    time: Annotated[str, AfterValidator(datetime.fromisoformat)] = "2000-01-01"
    commit: str | None = None
    python: str = ""
    distcv: str = ""
    cpu: str = ""
    device: str = ""
    strategy: str = ""
    threads: str | None = None
    cores: int = 0
    processes: int = 0
    nodes: int = 0
    versions: dict[str, str | None] = {}
    options: dict[str, Any] = {}


class Result(BaseModel):
    """What others rely on in a result.json, which may come from a stranger; see `make_result`."""

    model_config = ConfigDict(extra="allow")
    test_accuracy: FiniteFloat
    seconds: FiniteFloat
    # Older results lack some of these; none is null but the commit.
    test_loss: float = 0
    images_per_second: float = 0
    best_test_accuracy: float = 0
    best_epoch: float = 0
    epochs: float = 0
    steps: int = 0
    params: int = 0
    processes: int = 0
    class_accuracy: dict[str, float] = {}
    confusion: list[list[int]] = []
    mistakes: list[Mistake] = []
    commit: str | None = None
    device: str = ""
    environment: Start = Start()
    versions: dict[str, str | None] = {}


class Run(NamedTuple):
    """What is read of one run folder."""

    folder: Path
    recipe: Recipe
    result: dict[str, Any] | None
    """The contents of result.json, None as long as the run is not finished."""


def main() -> int:
    """Print a row for each recipe, then what else is to be said; or do one of the works on a clone.

    The clone is the folder that this is called in.
    """
    arguments = parse_arguments(
        Arguments,
        prog="distcv.results",
        description="Test accuracy at the last epoch, mean and sample standard deviation over "
        "the seeds of each recipe.",
    )
    if arguments.check:
        return check()
    if not arguments.tables:
        show(arguments)
    if arguments.tables or arguments.collect:
        from distcv.results.tables import write_tables

        print("\n".join(write_tables(Path())))
    return 0


def show(arguments: Arguments) -> None:
    """Print the table of runs, and write them to the files that are asked for.

    Raises:
        InputError: there are no runs, or a file can't be read or written.
    """
    from distcv.results.files import collect, write_results
    from distcv.results.listing import report

    runs, skipped = read_runs(arguments.runs)
    print(printable("\n".join([*report(runs), *skipped])))
    if not runs:
        raise InputError(f"no runs in {', '.join(map(str, arguments.runs))}: train first")
    if arguments.json_file:
        write_results(arguments.json_file, runs)
    if arguments.collect:
        print("\n".join(collect(runs, Path())))


def check() -> int:
    """Print a line for each thing that is wrong with results/ and what is made of it; exit code."""
    from distcv.results.check import problems

    found = problems(Path())
    if not found:
        print("result files, recipes, docs/results.md and README.md are in order")
        return 0
    print("\n".join(found), file=sys.stderr)
    return 2


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
    if depth == 0:
        return [place]
    with contextlib.suppress(OSError):
        if (place / "config.yaml").exists():
            return [place]
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
        result = read_json(path)
        validated(lambda: Result.model_validate(result, strict=True))
    except ValueError as error:
        raise InputError(f"{path.name} is damaged: {error}") from None
    return Run(folder, recipe, result)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The whole rows of a run's metrics.jsonl; the last one may be being written."""
    try:
        lines = read_text(folder / "metrics.jsonl", MAX_METRICS).splitlines()
    except (OSError, ValueError):
        return []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            row = parse_json(line)
            if isinstance(row, dict) and "event" in row and _number(row, "step", "epoch"):
                rows.append(row)
    return rows


def _number(row: dict[str, Any], *keys: str) -> bool:
    return all(isinstance(row.get(key), int | float) for key in keys)


def last_row(folder: Path) -> dict[str, Any] | None:
    """The newest of them, or None."""
    rows = read_rows(folder)
    return rows[-1] if rows else None


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """What environment.json tells of a run's starts; nothing if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        starts = [dict(start) for start in read_json(folder / "environment.json")["starts"]]
        for start in starts:
            Start.model_validate(start, strict=True)
        return starts
    return []


def short_commit(commit: str) -> str:
    """The first twelve digits, with `-dirty` if the clone was changed."""
    return f"{commit[:12]}{commit[40:]}"


def grouped(runs: list[Run]) -> list[list[Run]]:
    """Runs whose recipes are the same but for the seed, together and in the order of seeds."""
    groups: dict[Recipe, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.recipe.model, run.recipe.dataset)):
        groups.setdefault(without_seed(run.recipe), []).append(run)
    return [sorted(group, key=lambda run: run.recipe.seed) for group in groups.values()]


def without_seed(recipe: Recipe) -> Recipe:
    """The recipe with seed 0, by which those of one recipe's runs are the same."""
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


def hardware(record: Callable[[str], Any]) -> str:
    """As `AMD EPYC, 2 cores` or `8 x NVIDIA H200 on 2 nodes (ddp)`.

    Args:
        record: a field of a run's start, or of its result, by its name; None where it isn't known.
    """
    device, processes = record("device"), record("processes") or 1
    if device is None:
        return "unknown"
    nodes = record("nodes") or 1
    spread = f" on {nodes} nodes" if nodes > 1 else ""
    strategy = f" ({record('strategy')})" if processes > 1 else ""
    if device != "cpu":
        return f"{processes} x {device}{spread}{strategy}" if processes > 1 else str(device)
    cores, threads = record("cores"), record("threads")
    words = f"{record('cpu')}, {cores} core{'s' * (cores != 1)}"
    if processes == 1 and threads not in (None, str(cores)):
        words += f", {threads} thread{'s' * (threads != '1')}"
    return f"{words}, {processes} processes{spread}{strategy}" if processes > 1 else words


def duration(seconds: float) -> str:
    """Seconds as `43 s`, `12 min 5 s` or `1 h 42 min`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def command() -> None:
    """Entry point: :func:`main`, and its exit code."""
    run_command(main)
