"""What to measure when there is a GPU: ``python tests/gpu.py``, about eight minutes.

Trains ResNet-18 on CIFAR-10 in bf16, eager and compiled, and under every strategy (one process a
GPU), then its whole recipe over some seeds, and every MNIST network for an epoch; prints a table,
and writes results/gpu.json with machine and versions. ``--small`` does the same shortly, with small
networks, where there is no GPU.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from distcv.models import MODELS

ROOT = Path(__file__).resolve().parents[1]
STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
COLUMNS = ("epochs", "test_accuracy", "seconds", "images_per_second", "wall_seconds")


def plan(small: bool, seeds: int) -> dict[str, list[str]]:
    """Name and flags of each training, in order of worth."""
    network = "gap" if small else "resnet18"
    bf16 = ["--model", network, "--precision", "bf16"]
    brief = ["--max-steps", "8"] if small else ["--epochs", "3"]
    trainings = {
        f"{network} bf16": [*bf16, *brief],
        f"{network} bf16 compiled": [*bf16, *brief, "--compile"],
        f"{network} bf16 compiled, cached": [*bf16, *brief, "--compile", "--seed", "1"],
        f"{network} fp32": ["--model", network, *brief],
    }
    for file in STRATEGIES[1:2] if small else STRATEGIES:
        trainings[f"{network} bf16 {file}"] = [*bf16, *brief]
    whole = ["--max-steps", "8"] if small else []
    for seed in range(seeds):
        trainings[f"{network} recipe, seed {seed}"] = [*bf16, *whole, "--seed", str(seed)]
    for name, model in MODELS.items():
        if model.dataset == "mnist" and (not small or name == "gap"):
            brief = ["--max-steps", "8"] if small else ["--epochs", "1"]
            trainings[f"{name} fp32"] = ["--model", name, *brief]
    return trainings


def train(name: str, flags: list[str], runs: Path, data: Path) -> dict[str, Any]:
    """Run one training; its result with the wall time, start of the process included."""
    run = name.replace(" ", "-").replace(",", "")
    command, file = [sys.executable], name.split()[-1]
    if file in STRATEGIES:
        launch = ["-m", "accelerate.commands.launch", "--config_file", f"{ROOT}/launch/{file}.yaml"]
        command += [*launch, "--num_processes", str(max(1, torch.cuda.device_count()))]
    command += ["-m", "distcv.train", *flags, "--name", run]
    began = time.perf_counter()
    ended = subprocess.run(
        [*command, "--runs-dir", str(runs), "--data-dir", str(data)], capture_output=True, text=True
    )
    wall = time.perf_counter() - began
    if ended.returncode:
        return {"training": name, "flags": flags, "failed": ended.stderr[-2000:]}
    result = json.loads((runs / run / "result.json").read_text())
    return {"training": name, "flags": flags, "wall_seconds": wall} | result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--seeds", type=int, default=5, help="whole trainings of ResNet-18")
    parser.add_argument("--budget", type=float, default=540, help="seconds; none starts after that")
    parser.add_argument("--out", type=Path, default=ROOT / "results/gpu.json")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    began, rows = time.perf_counter(), []
    print(f"{'training':36}" + "".join(f"{column:>19}" for column in COLUMNS), flush=True)
    for name, flags in plan(arguments.small, arguments.seeds).items():
        if time.perf_counter() - began > arguments.budget:
            print(f"{name:36} no time left")
            continue
        rows.append(train(name, flags, arguments.runs_dir, arguments.data_dir))
        cells = [f"{rows[-1][c]:19,.2f}" for c in COLUMNS if c in rows[-1]]
        print(f"{name:36}" + ("".join(cells) or rows[-1]["failed"]), flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
