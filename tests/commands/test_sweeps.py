"""The sweep files of configs/sweeps: what W&B's agent makes of them is what distcv.train takes."""

import itertools
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps import utils

from distcv.command_line import read_command_line
from distcv.config import Recipe, recipe_names
from support.runs import ROOT
from support.wandb_server import ENTITY, WandbServer

FILES = sorted((ROOT / "configs/sweeps").glob("*.yaml"))
SWEEPS = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
# https://docs.wandb.ai/guides/sweeps/sweep-config-keys
KEYS = {"name", "project", "description", "method", "run_cap", "metric", "parameters", "command"}


def samples(parameter: dict[str, Any]) -> list[Any]:
    """The values of a parameter, or the ends of their range."""
    kind = frozenset(parameter)
    if kind == {"distribution", "min", "max"}:
        assert parameter["distribution"] == "log_uniform_values"
        low, high = parameter["min"], parameter["max"]
        assert isinstance(low, float) and isinstance(high, float) and 0 < low < high
        return [low, high]
    assert kind in ({"value"}, {"values"}), f"what is {parameter}?"
    return list(parameter["values"]) if "values" in parameter else [parameter["value"]]


def agents_command(config: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """The command line of the agent for a run of these values, as wandb_agent.py makes it."""
    words = utils.create_sweep_command(list(config["command"]))
    args = {name: {"value": value} for name, value in values.items()}
    macros = utils.create_sweep_command_args({"args": args})
    parts = [macros[w[2:-1]] if w.startswith("${") else [w] for w in map(str, words)]
    return [word for part in parts for word in part]


@pytest.mark.slow
@SWEEPS
def test_each_command_line_is_one_of_a_training(path: Path) -> None:
    """The runs of a sweep would fail on their flags, or train with other values than W&B chose."""
    config = yaml.safe_load(path.read_text())
    assert config.keys() <= KEYS and config["name"] == path.stem
    assert config["method"] in ("bayes", "grid", "random")
    assert config["metric"] == {"name": "val/accuracy", "goal": "maximize"}
    parameters = config["parameters"]
    assert parameters.keys() <= Recipe.model_fields.keys()
    for combined in itertools.product(*map(samples, parameters.values())):
        values = dict(zip(parameters, combined, strict=True))
        command = agents_command(config, values)
        assert command[:3] == ["python", "-m", "distcv.train"]
        recipe, options = read_command_line(
            prog="distcv.train", description="", args=command[3:], find_model=lambda name: None
        )
        assert options.track == ("wandb",) and options.project == config["project"]
        assert recipe.model in recipe_names()
        assert {name: getattr(recipe, name) for name in values} == values


@SWEEPS
def test_the_commands_of_its_head_fit(path: Path) -> None:
    """A command copied from a sweep file would name a wrong file, project or number of tasks."""
    head = [line[1:] for line in path.read_text().splitlines() if line.startswith("#  ")]
    create, local, slurm = (shlex.split(line, comments=True) for line in head)
    assert create == ["wandb", "sweep", str(path.relative_to(ROOT))]
    config = yaml.safe_load(path.read_text())
    assert local[:2] == ["wandb", "agent"] and slurm[0] == "sbatch"
    assert local[-1] == slurm[-1] == f"ENTITY/{config['project']}/ID"
    assert (ROOT / slurm[-2]).is_file()
    runs = config.get("run_cap") or len(config["parameters"]["seed"]["values"])
    assert f"--array=0-{runs - 1}" in slurm


@pytest.mark.slow
def test_wandb_sweep_takes_a_file(server: WandbServer, tmp_path: Path) -> None:
    """`wandb sweep` would refuse gap_lr.yaml, and a user could not start the sweep."""
    sweep = {"name": "abc", "project": {"name": "distcv", "entity": {"name": ENTITY}}}
    answer = {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}
    server.operations["UpsertSweep"] = lambda v: answer
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    process = subprocess.run(
        [sys.executable, "-m", "wandb", "sweep", str(FILES[0])],
        env=own | server.environment | {"HOME": str(tmp_path)}, cwd=tmp_path,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert f"wandb agent {ENTITY}/distcv/abc" in process.stderr
    [sent] = server.sent("UpsertSweep")
    assert sent["projectName"] == "distcv"
    assert yaml.safe_load(sent["config"])["parameters"].keys() == {
        "lr",
        "weight_decay",
        "batch_size",
    }
