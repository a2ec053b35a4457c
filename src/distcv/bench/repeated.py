"""Whole trainings and launches, one after the other: to an accuracy, and on more processes."""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distcv.bench import Arguments
from distcv.config import InputError, Recipe, resource_dir
from distcv.results import spread


def to_accuracy(
    flags: list[str], recipe: Recipe, targets: Sequence[float], runs: int, env: dict[str, str]
) -> dict[str, Any]:
    """Train over so many seeds; when each first reached each target, at an epoch's end.

    Seconds are those of training and evaluation, as in metrics.jsonl; wall seconds those of the
    whole process. No test-time augmentation.
    """
    names = [f"{target:g}" for target in targets]
    heads = "".join(f"{f'epochs to {name} %':>18}{'seconds':>9}" for name in names)
    print(f"{'seed':>6}{heads}{'last accuracy':>15}{'seconds':>9}{'wall seconds':>14}", flush=True)
    rows = []
    for seed in range(recipe.seed, recipe.seed + runs):
        row = _training(flags, seed, targets, env)
        rows.append(row)
        cells = "".join(
            f"{found['epoch']:18g}{found['seconds']:9.1f}" if found else f"{'-':>18}{'-':>9}"
            for found in map(row["reached"].get, names)
        )
        print(
            f"{seed:6}{cells}{row['last_accuracy']:15.2f}{row['last_seconds']:9.1f}"
            f"{row['wall_seconds']:14.1f}",
            flush=True,
        )
    print()
    for name in names:
        found = [row["reached"][name] for row in rows if name in row["reached"]]
        epochs, seconds = (spread([each[key] for each in found]) for key in ("epoch", "seconds"))
        print(f"{name} % at an epoch's end: {len(found)} of {runs}, {epochs} epochs, {seconds} s")
    last, wall = (spread([row[key] for row in rows]) for key in ("last_accuracy", "wall_seconds"))
    print(
        f"last epoch: {last} %, no test-time augmentation; wall time with process start: {wall} s; "
        f"mean ± standard deviation, n = {runs}"
    )
    return {"targets": list(targets), "trainings": rows}


def _training(
    flags: list[str], seed: int, targets: Sequence[float], env: dict[str, str]
) -> dict[str, Any]:
    """One training in a process of its own; its row of the figures."""
    with tempfile.TemporaryDirectory() as place:
        own = ["--seed", str(seed), "--name", "run", "--runs-dir", place]
        began = time.perf_counter()
        _run([sys.executable, "-m", "distcv.train", *flags, *own], env)
        wall = time.perf_counter() - began
        lines = (Path(place) / "run" / "metrics.jsonl").read_text().splitlines()
    epochs = [row for row in map(json.loads, lines) if row["event"] == "epoch"]
    reached = {}
    for target in targets:
        first = next((row for row in epochs if row["test_accuracy"] >= target), None)
        if first:
            reached[f"{target:g}"] = {"epoch": first["epoch"], "seconds": first["seconds"]}
    return {
        "seed": seed,
        "reached": reached,
        "last_accuracy": epochs[-1]["test_accuracy"],
        "last_seconds": epochs[-1]["seconds"],
        "wall_seconds": wall,
        "curve": [[row["seconds"], row["test_accuracy"]] for row in epochs],
    }


def check_strategies(strategies: Sequence[str]) -> None:
    """Raise InputError if there is no launch file of one of these names."""
    for name in strategies:
        if not (resource_dir("launch") / f"{name}.yaml").is_file():
            raise InputError(f"--strategies {name}: there is no {name}.yaml in launch/")


def scaling(flags: list[str], arguments: Arguments, env: dict[str, str]) -> dict[str, Any]:
    """distcv's loop under each strategy on each number of processes.

    All are measured in turn, then in the opposite order with the other half of the repeats, so that
    a drift of the machine's speed falls on all of them.
    """
    pairs = list(itertools.product(arguments.strategies, arguments.processes))
    rows: list[dict[str, Any]] = [
        {"strategy": strategy, "processes": processes, "repeats": []}
        for strategy, processes in pairs
    ]
    for row in [*rows, *reversed(rows)]:
        found = _launched(flags, arguments, row["strategy"], row["processes"], env)
        row["repeats"] += found["images_per_second"]["distcv"]
        row["threads"], device = int(found["threads"]), found["device"]
    heads = f"{'strategy':10}{'processes':>10}{'threads each':>14}{'images/s':>12}"
    print(f"{heads}{'of the first':>14}")
    for row in rows:
        row["images_per_second"] = statistics.median(row["repeats"])
        share = row["images_per_second"] / rows[0]["images_per_second"]
        print(
            f"{row['strategy']:10}{row['processes']:10}{row['threads']:14}"
            f"{row['images_per_second']:12,.0f}{share:14.3f}"
        )
    return {"scaling": rows, "device": device}


def _launched(
    flags: list[str], arguments: Arguments, strategy: str, processes: int, env: dict[str, str]
) -> dict[str, Any]:
    """The figures of this tool on so many processes, with half of the repeats."""
    config = resource_dir("launch") / f"{strategy}.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launcher += ["--num_processes", str(processes), "-m", "distcv.bench"]
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "figures.json"
        own = ["--only-own", "--repeats", str(-(-arguments.repeats // 2)), "--json", str(out)]
        own += ["--seconds", str(arguments.seconds)]
        _run([*launcher, *flags, *own], env)
        return dict(json.loads(out.read_text()))


def _run(command: list[str], env: dict[str, str]) -> None:
    """Run a command; InputError with its last word if it fails."""
    ran = subprocess.run(command, capture_output=True, text=True, env=env)
    if ran.returncode:
        errors = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
        last = (errors or ran.stderr.splitlines() or [f"exit code {ran.returncode}"])[-1]
        raise InputError(last.removeprefix("error: "))
