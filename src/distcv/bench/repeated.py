"""Whole trainings and launches, one after the other: to an accuracy, and on more processes."""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from distcv.bench import Arguments
from distcv.config import InputError, Recipe, resource_dir


def to_accuracy(flags: list[str], recipe: Recipe, target: float, runs: int) -> dict[str, Any]:
    """Train over so many seeds; when each first reached the target at an epoch's end, and its last.

    Seconds are those of training and evaluation, as in metrics.jsonl. No test-time augmentation.
    """
    rows = []
    print(f"{'seed':>6}{'epochs to it':>14}{'seconds':>10}{'last accuracy':>16}{'seconds':>10}")
    with tempfile.TemporaryDirectory() as place:
        for seed in range(recipe.seed, recipe.seed + runs):
            name = f"seed-{seed}"
            own = ["--seed", str(seed), "--name", name, "--runs-dir", place]
            _run([sys.executable, "-m", "distcv.train", *flags, *own])
            lines = (Path(place) / name / "metrics.jsonl").read_text().splitlines()
            epochs = [row for row in map(json.loads, lines) if row["event"] == "epoch"]
            reached = next((row for row in epochs if row["test_accuracy"] >= target), None)
            row = {
                "seed": seed,
                "epochs": reached and reached["epoch"],
                "seconds": reached and reached["seconds"],
                "last_accuracy": epochs[-1]["test_accuracy"],
                "last_seconds": epochs[-1]["seconds"],
            }
            rows.append(row)
            cells = (
                f"{row['epochs']:14.1f}{row['seconds']:10.1f}" if reached else f"{'-':>14}{'-':>10}"
            )
            print(
                f"{seed:6}{cells}{row['last_accuracy']:16.2f}{row['last_seconds']:10.1f}",
                flush=True,
            )
    reached_in = [row["seconds"] for row in rows if row["seconds"] is not None]
    print(f"{target:g} % at an epoch's end: {len(reached_in)} of {runs}, {_spread(reached_in)} s")
    print(f"last epoch: {_spread([row['last_accuracy'] for row in rows])} %, no augmentation")
    return {"target": target, "trainings": rows}


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def scaling(flags: list[str], arguments: Arguments) -> dict[str, Any]:
    """distcv's loop under each strategy on each number of processes, one after the other."""
    rows = []
    print(f"{'strategy':10}{'processes':>10}{'images/s':>12}{'of the first':>14}")
    for strategy in arguments.strategies:
        config = resource_dir("launch") / f"{strategy}.yaml"
        if not config.is_file():
            raise InputError(f"--strategies {strategy}: there is no {config.name} in launch/")
        for processes in arguments.processes:
            launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
            launcher += [str(config), "--num_processes", str(processes), "-m", "distcv.bench"]
            with tempfile.TemporaryDirectory() as place:
                out = Path(place) / "figures.json"
                own = ["--only-own", "--repeats", str(arguments.repeats), "--json", str(out)]
                own += ["--seconds", str(arguments.seconds)]
                _run([*launcher, *flags, *own])
                found = json.loads(out.read_text())
            rate = statistics.median(found["images_per_second"]["distcv"])
            rows.append({"strategy": strategy, "processes": processes, "images_per_second": rate})
            share = rate / rows[0]["images_per_second"]
            print(f"{strategy:10}{processes:10}{rate:12,.0f}{share:14.3f}", flush=True)
    return {"scaling": rows}


def _run(command: list[str]) -> None:
    """Run a command; InputError with its last word if it fails."""
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        errors = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
        last = (errors or ran.stderr.splitlines() or [f"exit code {ran.returncode}"])[-1]
        raise InputError(last.removeprefix("error: "))
