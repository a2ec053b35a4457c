"""The launch files, as Accelerate itself reads them and starts processes by them."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.constants import DEEPSPEED_MULTINODE_LAUNCHERS

from support.runs import ROOT

FILES = {path.stem: path for path in sorted((ROOT / "launch").glob("*.yaml"))}
NESTED = [
    (name, section, key)
    for name, path in FILES.items()
    for section, values in yaml.safe_load(path.read_text()).items()
    if isinstance(values, dict)
    for key in values
]
every_file = pytest.mark.parametrize("name", FILES)


def problems(path: Path) -> Iterator[str]:
    """What is wrong in the nested sections, which Accelerate takes as they are."""
    config = load_config_from_file(str(path))
    for section in (config.fsdp_config, config.deepspeed_config):
        for key, value in section.items():
            flag = key
            if section is config.fsdp_config and not key.startswith("fsdp"):
                flag = f"fsdp_{key}"  # so does Accelerate
            if flag in ClusterConfig.__dataclass_fields__:
                yield f"{key} belongs to the top"
            word = str(value).lower() if isinstance(value, bool) else str(value)
            _, unknown = launch_command_parser().parse_known_args([f"--{flag}={word}", "train.py"])
            if unknown:
                yield f"unknown key {key}"


@every_file
def test_accelerate_knows_every_key_and_value(name: str) -> None:
    """A misspelt key in a launch file would be ignored, and users would get the default."""
    assert list(problems(FILES[name])) == []


@pytest.mark.parametrize(("name", "section", "key"), NESTED)
def test_a_nested_typo_is_found(name: str, section: str, key: str, tmp_path: Path) -> None:
    """The check of nested settings would miss a typo, and a strategy would run with a default."""
    values = yaml.safe_load(FILES[name].read_text())
    wrong = f"{key[:-2]}{key[-1]}{key[-2]}"
    values[section][wrong] = values[section].pop(key)
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(values))
    assert list(problems(copy)) == [f"unknown key {wrong}"]


@every_file
def test_what_the_recipe_says_is_not_said_here(name: str) -> None:
    """A launch file would override the recipe's precision, clipping or accumulation."""
    config = load_config_from_file(str(FILES[name]))
    assert config.mixed_precision == "no"
    assert not {"gradient_clipping", "gradient_accumulation_steps"} & config.deepspeed_config.keys()
    assert config.num_machines == 1 and config.main_process_ip is None
    assert config.main_process_port == 0 and config.gpu_ids is None


@every_file
def test_several_nodes_are_not_started_through_pdsh(name: str) -> None:
    """DeepSpeed on several nodes would write the environment, secrets included, to a file."""
    config = load_config_from_file(str(FILES[name]))
    if config.deepspeed_config:
        launcher = config.deepspeed_config["deepspeed_multinode_launcher"]
        assert launcher == "standard" == DEEPSPEED_MULTINODE_LAUNCHERS[1]


def launch(name: str, tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Start a script that prints what its environment says, as one line of JSON."""
    script = tmp_path / "show.py"
    script.write_text(
        "import json, os\n"
        "starts = ('ACCELERATE_', 'FSDP_', 'RANK', 'WORLD_SIZE')\n"
        "said = {k: v for k, v in os.environ.items() if k.startswith(starts)}\n"
        "os.write(1, (json.dumps(said) + '\\n').encode())  # at once, lest lines mix\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_"))}
    return subprocess.run(
        [*command, str(FILES[name]), *options, str(script)],
        env=clean | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


SAID = {
    "cpu": {},
    "ddp": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP",
        "FSDP_MIN_NUM_PARAMS": "1000000",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_OFFLOAD_PARAMS": "false",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
    },
} | {
    f"zero{stage}": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    }
    for stage in (1, 2, 3)
}


@pytest.mark.slow
@every_file
def test_two_processes_start_and_are_told_the_strategy(name: str, tmp_path: Path) -> None:
    """A launch file would fail, print warnings or start another strategy than its name says."""
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: pip install 'distcv[deepspeed]'")
    ran = launch(name, tmp_path, "--num_processes", "2")
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == "", "the launcher has nothing to warn of"
    told = [json.loads(line) for line in ran.stdout.splitlines()]
    assert sorted(one["RANK"] for one in told) == ["0", "1"]
    for one in told:
        assert one["WORLD_SIZE"] == "2" and one["ACCELERATE_MIXED_PRECISION"] == "no"
        assert one | SAID[name] == one
        uses = {k for k in one if k.startswith("ACCELERATE_USE_")} - {"ACCELERATE_USE_CPU"}
        assert uses == {k for k in SAID[name] if k.startswith("ACCELERATE_USE_")}
        assert "ACCELERATE_GRADIENT_CLIPPING" not in one


@pytest.mark.slow
def test_a_file_starts_a_process_for_each_gpu(tmp_path: Path) -> None:
    """`launch/ddp.yaml` would leave GPUs idle, or start where there is none."""
    ran = launch("ddp", tmp_path)
    if torch.cuda.is_available():
        assert len(ran.stdout.splitlines()) == torch.cuda.device_count(), ran.stderr
    else:
        assert ran.returncode == 1 and "Cuda is not available" in ran.stderr


def test_accelerate_understands_the_fsdp2_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 would not shard as `launch/fsdp2.yaml` says, and could run out of GPU memory."""
    for key, value in SAID["fsdp2"].items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    network = torch.nn.Sequential(torch.nn.Linear(1100, 1000), torch.nn.Linear(1000, 10))
    plugin.set_auto_wrap_policy(network)
    assert plugin.auto_wrap_policy.keywords == {"min_num_params": 1_000_000}
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False
