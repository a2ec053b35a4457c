"""Measure how fast a training is, beside what could be: ``python -m distcv.bench --model gap``.

Three loops of the same network take turns in one run: distcv's own, a bare one on a batch that lies
ready (the ceiling), and the conventional one with worker processes.
"""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import tyro
from pydantic import Field

from distcv.command_line import (
    CommandLine,
    RunOptions,
    parse_known_arguments,
    read_command_line,
    run_command,
)
from distcv.config import InputError, Recipe, Strict
from distcv.data import find_dataset
from distcv.environment import describe_environment, set_thread_environment
from distcv.models import find_model

if TYPE_CHECKING:
    from distcv.runtime import Runtime


class Arguments(Strict):
    """What is measured; all flags of distcv.train's recipe may follow."""

    seconds: float = Field(4.0, gt=0, description="Seconds of each measurement.")
    repeats: int = Field(
        5, ge=1, description="Measurements of each loop, of which the medians are."
    )
    only_own: bool = Field(False, description="Measure distcv's own loop alone.")
    to_accuracy: float | None = Field(
        None, gt=0, le=100, description="Measure seconds and epochs to this test accuracy instead."
    )
    runs: int = Field(5, ge=1, description="Trainings for --to-accuracy, of as many seeds.")
    processes: tuple[int, ...] = Field(
        (), description="Measure images/s on each of these numbers of processes instead."
    )
    strategies: tuple[str, ...] = Field(
        ("ddp",), description="Launch files in launch/ for --processes, without their ending."
    )
    json_file: Annotated[Path | None, tyro.conf.arg(name="json", metavar="FILE")] = Field(
        None, description="Write all figures to this file."
    )


def main() -> int:
    """Measure one thing, print a table, write the JSON."""
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
    set_thread_environment()
    if arguments.to_accuracy is not None:
        from distcv.bench.repeated import to_accuracy

        figures = to_accuracy(rest, recipe, arguments.to_accuracy, arguments.runs)
    elif arguments.processes:
        from distcv.bench.repeated import scaling

        figures = scaling(rest, arguments)
    else:
        figures = side_by_side(arguments, recipe, options)
    if figures and arguments.json_file:
        record = {"recipe": recipe.model_dump(mode="json"), **describe_environment(), **figures}
        try:
            arguments.json_file.parent.mkdir(parents=True, exist_ok=True)
            arguments.json_file.write_text(json.dumps(record, indent=1) + "\n")
        except OSError as error:
            raise InputError(
                f"--json {arguments.json_file}: {error.strerror}: choose another file"
            ) from None
    return 0


def side_by_side(arguments: Arguments, recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    """Figures of the loops in turn; empty but on the main process."""
    from distcv.runtime import Runtime

    runtime = Runtime(
        recipe, compile=options.compile, sync_bn=options.sync_bn, hang_timeout=options.hang_timeout
    )
    with runtime.peers_named():
        figures = _measured(arguments, recipe, options, runtime)
        runtime.close()
    return figures if runtime.is_main else {}


def _measured(
    arguments: Arguments, recipe: Recipe, options: RunOptions, runtime: "Runtime"
) -> dict[str, Any]:
    from distcv.bench import measure
    from distcv.bench.loops import BareLoop, ConventionalLoop, OwnLoop
    from distcv.training import load_data

    data = load_data(recipe, options.data_dir, lambda line: None)
    own = OwnLoop(recipe, data, runtime)
    peak = {"distcv": measure.peak_bytes(runtime, lambda: own.run(0))}  # one step, or one look
    cold = time.time() - psutil.Process().create_time()
    loops: list[measure.Loop] = [own]
    figures: dict[str, Any] = {**runtime.record(), "seconds_to_first_step": cold}
    if not arguments.only_own and runtime.strategy.name in ("single", "ddp"):
        bare = BareLoop(recipe, own)
        loops.append(bare)
        peak["bare"] = measure.peak_bytes(runtime, bare.step)
        figures["flops_per_image"] = measure.flops_per_image(bare)
        if runtime.processes == 1:
            loops.append(ConventionalLoop(recipe, data, runtime.device))
    found = measure.rates(loops, repeats=arguments.repeats, seconds=arguments.seconds)
    figures |= {"images_per_second": found, "peak_bytes": peak}
    figures["ratio"] = {
        name: measure.ratio(found["distcv"], other)
        for name, other in found.items()
        if name != "distcv"
    }
    figures["matmul_flops"] = measure.matmul_flops(runtime)
    if runtime.processes == 1:
        figures["parts"] = measure.parts(own, min(3.0, arguments.seconds))
    if runtime.is_main:
        print("\n".join(table(recipe, runtime.describe(), figures)), flush=True)
    return figures


def table(recipe: Recipe, where: str, figures: dict[str, Any]) -> list[str]:
    """The figures in words."""
    from statistics import median

    lines = [f"{recipe.model} on {recipe.dataset}, {recipe.precision}, batch {recipe.batch_size}"]
    lines += [where, f"process start to first step: {figures['seconds_to_first_step']:.1f} s", ""]
    head = f"{'loop':14}{'images/s':>12}{'least':>12}{'most':>12}{'distcv / it':>14}"
    utilised = "flops_per_image" in figures
    lines.append(head + (f"{'MFU':>8}" if utilised else ""))
    for name, found in figures["images_per_second"].items():
        over = f"{figures['ratio'][name]:14.3f}" if name in figures["ratio"] else " " * 14
        row = f"{name:14}{median(found):12,.0f}{min(found):12,.0f}{max(found):12,.0f}{over}"
        if utilised:
            processes = figures["processes"]
            done = median(found) * figures["flops_per_image"]
            row += f"{100 * done / figures['matmul_flops'] / processes:6.1f} %"
        lines.append(row)
    if utilised:
        lines += [
            "",
            f"{figures['flops_per_image'] / 1e6:,.1f} MFLOP an image; a matmul here makes "
            f"{figures['matmul_flops'] / 1e9:,.0f} GFLOP/s a process",
        ]
    if "parts" in figures:
        shares = (f"{name} {100 * share:.0f} %" for name, share in figures["parts"].items())
        lines.append(f"time by part: {', '.join(shares)}")
    peaks = (f"{name} {size / 1e6:,.0f} MB" for name, size in figures["peak_bytes"].items())
    lines.append(f"peak memory: {', '.join(peaks)}")
    return lines


def command() -> None:
    """Entry point: :func:`main`, and its exit code."""
    run_command(main)
