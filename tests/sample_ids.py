"""Run under a launcher: writes which samples each optimizer step saw, over all processes.

Arguments: output file, data folder, steps, then flags of distcv.train.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from distcv.command_line import read_command_line, run_command
from distcv.data import load_dataset
from distcv.models import find_model
from distcv.runtime import Runtime
from distcv.training import build


def main() -> None:
    out, data_dir, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    recipe, _ = read_command_line(prog="", description="", find_model=find_model, args=sys.argv[4:])
    runtime = Runtime(recipe)
    training = build(recipe, load_dataset(recipe.dataset, data_dir), runtime)
    batches = iter(training.train_loader)
    seen = []
    for _ in range(steps * recipe.gradient_accumulation_steps):
        mine = next(batches).host_ids.tolist()
        shares = [mine]
        if runtime.processes > 1:
            shares = [None] * runtime.processes
            dist.all_gather_object(shares, mine)
        seen.append([index for share in shares for index in share])
    if runtime.is_main:
        out.write_text(json.dumps({"processes": runtime.processes, "parts": seen}))
    runtime.close()


if __name__ == "__main__":
    run_command(main)
