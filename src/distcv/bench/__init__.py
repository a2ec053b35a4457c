"""Measure how fast a training is, beside what could be: ``python -m distcv.bench --model gap``.

Three loops of the same network take turns in one run: distcv's own, a bare one on a batch that lies
ready (the ceiling), and the conventional one with worker processes.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field

from distcv.bench.surroundings import shown_flags, users_environment
from distcv.command import run_command
from distcv.command_line import (
    CommandLine,
    check_file,
    parse_known_arguments,
    read_command_line,
    write_file,
)
from distcv.config import InputError, Strict
from distcv.data import find_dataset
from distcv.environment import describe_environment, launched, set_thread_environment
from distcv.models import find_model


class Arguments(Strict):
    """What is measured; all flags of distcv.train's recipe may follow."""

    seconds: float = Field(4.0, gt=0, description="Seconds of each measurement.")
    repeats: int = Field(
        5, ge=1, description="Measurements of each loop, of which the medians are."
    )
    only_own: bool = Field(False, description="Measure distcv's own loop alone.")
    to_accuracy: tuple[Annotated[float, Field(gt=0, le=100)], ...] = Field(
        (), description="Measure seconds and epochs to these test accuracies instead."
    )
    runs: int = Field(5, ge=1, description="Trainings for --to-accuracy, of as many seeds.")
    processes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="Measure images/s on each of these numbers of processes instead."
    )
    strategies: tuple[str, ...] = Field(
        ("ddp",), description="Launch files in launch/ for --processes, without their ending."
    )
    json_file: Annotated[Path | None, tyro.conf.arg(name="json", metavar="FILE")] = Field(
        None, description="Write all figures to this file."
    )
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = Field(
        None, description="Draw the figures; the ending says the format, such as .png or .svg."
    )


def main() -> int:
    """Measure one thing, print a table, write the JSON and the plot."""
    arguments, rest = parse_known_arguments(
        Arguments,
        prog="distcv.bench",
        description="Measure a training's speed. Other flags are those of distcv.train.",
        others=CommandLine,
    )
    recipe, options = read_command_line(
        prog="distcv.bench", description="", find_model=find_model, args=rest
    )
    find_model(recipe.model)
    find_dataset(recipe.dataset)
    _check(arguments)
    users = users_environment()
    # Before torch is loaded: no lines of its profiler, which are of interest to its authors only.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    set_thread_environment()
    if arguments.to_accuracy:
        from distcv.bench.repeated import to_accuracy

        figures = to_accuracy(rest, recipe, arguments.to_accuracy, arguments.runs, users)
    elif arguments.processes:
        from distcv.bench.repeated import scaling

        figures = scaling(rest, arguments, users)
    else:
        from distcv.bench.side_by_side import side_by_side

        figures = side_by_side(arguments, recipe, options, users)
    if not figures:
        return 0
    command = ["python", "-m", "distcv.bench", *shown_flags(sys.argv[1:])]
    record = {"command": command, "recipe": recipe.model_dump(mode="json")}
    record |= {**describe_environment(), **figures}
    del record["host"], record["system"]  # a result file is to be shown
    if file := arguments.json_file:
        write_file("--json", file, lambda: file.write_text(json.dumps(record, indent=1) + "\n"))
    if picture := arguments.plot:
        from distcv.bench.plot import draw

        write_file("--plot", picture, lambda: draw(record, picture))
    return 0


def _check(arguments: Arguments) -> None:
    """Raise InputError for what would fail after the measurement, or be measured wrongly."""
    check_file("--json", arguments.json_file)
    check_file("--plot", arguments.plot)
    if arguments.plot:
        from distcv.bench.plot import check_plot

        check_plot(arguments.plot)
    if arguments.processes:
        from distcv.bench.repeated import check_strategies

        check_strategies(arguments.strategies)
    if launched() and (arguments.to_accuracy or arguments.processes):
        flag = "--to-accuracy" if arguments.to_accuracy else "--processes"
        raise InputError(f"{flag} starts processes by itself: leave accelerate launch away")


def command() -> None:
    """Entry point: :func:`main`, and its exit code."""
    run_command(main)
