"""Processes that die, hang, stop or never came; and runs that go on in another shape."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from distcv.config import InputError
from distcv.runtime.launch import join
from support.runs import ROOT, STRATEGY, Process, Runs, launched, ranks, stopped_in

FLAGS = [
    "--model", "gap", "--batch-size", "32", "--max-steps", "90", "--log-every", "5",
    "--checkpoint-every", "20", "--dropout", "0.1", "--ema-decay", "0.9",
]  # fmt: skip


def launch(file: str, *options: str) -> list[str]:
    """The command that trains in two processes by one of the launch files."""
    return [*launched(2, *options, file=file), "-m", "distcv.train"]


@pytest.fixture
def runs(tmp_path: Path, data_dir: Path, mnist: object) -> Iterator[Runs]:
    runs = Runs(tmp_path / "runs", data_dir)
    yield runs
    runs.end()


def worker(launcher: Process, rank: int) -> psutil.Process:
    for child in psutil.Process(launcher.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            return child
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["cpu", "zero3"])
def test_a_killed_process_is_replaced_and_nothing_is_lost(file: str, runs: Runs) -> None:
    """A run whose process is killed would not restart, or would reach other weights.

    SIGKILL at a random step; the same weights in the end, bit for bit, with dropout on.
    """
    name, step, rank = f"{file}-killed", random.randrange(25, 80), random.randrange(2)
    strategy = STRATEGY["ddp" if file == "cpu" else file]
    runs.together(f"{file}-whole", 2, *FLAGS, **strategy)
    process = runs.start(name, *FLAGS, command=launch(file, "--max_restarts", "1"))
    runs.wait_for_step(name, step, process)
    worker(process, rank).kill()
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err
    assert "resuming after step" in out, f"killed rank {rank} at step {step}: {out}{err}"
    assert runs.learned(name) == runs.learned(f"{file}-whole")
    assert runs.untimed_rows(name) == runs.untimed_rows(f"{file}-whole")
    first, second = runs.starts(name)
    assert first["restarts"] == 0 and second["restarts"] == 1 and not second["changed"]
    assert 0 < second["seconds_lost"] < 60
    print(f"rank {rank} killed after step {step}: {second['seconds_lost']:.1f} s lost")


@pytest.mark.slow
def test_a_hanging_process_is_noticed_and_named(runs: Runs) -> None:
    """A frozen process would block the run far beyond --hang-timeout, and no line would name it."""
    peer, victim = runs.group("hang", 2, *FLAGS, "--hang-timeout", "4")
    runs.wait_for_step("hang", 10, peer)
    victim.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        _, err = peer.communicate(timeout=30)
        assert 3 < time.monotonic() - stopped < 15
    finally:
        victim.kill()
    assert peer.returncode != 0
    assert re.search(rf"error: rank 1 \(host .*, process {victim.pid}\) .* no sign of life", err)


@pytest.mark.slow
def test_a_stop_is_no_failure_to_restart_from_and_the_run_goes_on_in_another_shape(
    runs: Runs,
) -> None:
    """A launcher would restart a stopped run, or the run could not change its strategy.

    Two processes, stopped; then FSDP2 on three, stopped; then one process to the end.
    """
    # As in the strategies' tests: a rate at which rounding isn't amplified.
    flags = ["--model", "lighter", "--optimizer", "adamw", "--lr", "0.00003", "--batch-size", "65",
             "--max-steps", "60", "--log-every", "1"]  # fmt: skip

    def stop_at(step: int, processes: list[Process]) -> None:
        runs.wait_for_step("shape", step, processes[0])
        (runs.folder / "shape/STOP").touch()
        said = "".join(text for one in processes for text in one.communicate(timeout=120))
        assert said.count("stopped after step") == 1, said

    runs.run("shape-whole", *flags)
    stop_at(12, [runs.start("shape", *flags, command=launch("cpu", "--max_restarts", "1"))])
    stop_at(30, runs.group("shape", 3, *flags, **STRATEGY["fsdp2"]))
    said = runs.run("shape", *flags)
    assert "processes 3 -> 1" in said and "strategy fsdp2 -> single" in said
    changed = [start.get("changed", {}) for start in runs.starts("shape")]
    assert changed[-2]["strategy"] == ["ddp", "fsdp2"] and changed[-2]["processes"] == [2, 3]
    assert changed[-1]["strategy"] == ["fsdp2", "single"]
    one, many = (
        [row["loss"] for row in runs.rows(name) if row["event"] == "train"]
        for name in ("shape-whole", "shape")
    )
    assert len(many) == 60 and many == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_a_stop_is_seen_between_two_rows(runs: Runs) -> None:
    """With a large --log-every, a stop request would wait until the end of the epoch.

    Processes agree on it every two seconds, however many steps there are from row to row.
    """
    flags = ["--model", "gap", "--max-steps", "4000", "--log-every", "4000"]
    command = stopped_in("lr_at", runs.folder / "between/STOP", call=30)
    process, peer = runs.group("between", 2, *flags, command=command)
    out, err = process.communicate(timeout=200)
    peer.communicate(timeout=60)
    assert process.returncode == peer.returncode == 75
    (step,) = re.findall(r"stopped after step (\d+)", out)
    assert 30 <= int(step) < 468, f"{out}{err}: only at an epoch's end"


@pytest.mark.slow
def test_a_launcher_that_starts_fewer_processes_is_found_out(runs: Runs, tmp_path: Path) -> None:
    """With MULTI_CPU in a launch file, a user who asked for two processes would train on one."""
    file = tmp_path / "mpi.yaml"
    text = (ROOT / "launch/cpu.yaml").read_text()
    file.write_text(text.replace("MULTI_GPU", "MULTI_CPU"))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    process = runs.start("fewer", *FLAGS, command=[*launcher, "-m", "distcv.train"])
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: accelerate launch was asked for 2 processes and started 1" in err


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(2))
def test_a_process_that_never_comes_is_not_waited_for_without_end(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If one node never starts, the others would wait for it without end and without a word."""
    for name, value in ranks(2)[rank].items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(InputError, match=r"the 2 processes .* did not meet: .*[Tt]imed out"):
        join(timedelta(seconds=2))
    assert time.monotonic() - began < 20


LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | LAUNCHED
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"} | LAUNCHED
REFUSED = [
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, [], "accelerate launch has started"),
    (FSDP2 | {"FSDP_VERSION": "1"}, [], "fsdp_version 1 is not supported"),
    (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, [], "fsdp_offload_params is not supported"),
    (ZERO, ["--optimizer", "muon"], "optimizer muon works on whole matrices"),
    (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, [], "zero_stage 0"),
    (ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, [], "deepspeed_config_file"),
    (
        ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
        [],
        "offload_optimizer_device is not supported",
    ),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, [], "MEGATRON_LM, which is not supported"),
]


@pytest.mark.parametrize(("env", "flags", "expected"), REFUSED)
def test_what_can_t_work_is_refused_before_the_first_step(
    env: dict[str, str], flags: list[str], expected: str, runs: Runs
) -> None:
    """An unsupported launch setting would be ignored or end in a traceback."""
    said = runs.run("refused", *FLAGS, *flags, expect=2, **env)
    assert said.count("\n") == 1 and expected in said
    assert not (runs.folder / "refused").exists()


@pytest.mark.slow
def test_the_start_says_what_runs_where(runs: Runs) -> None:
    """The first lines of a run would not show how it is split, nor advise --sync-bn."""
    said = runs.together("where", 2, *FLAGS[:2], "--max-steps", "2", "--batch-size", "65")
    assert "fp32, batch 65 (32 or 33 a process), 923 steps an epoch" in said
    assert "2 processes on 1 node, cpu, ddp, 1 thread each" in said
    assert "--sync-bn" in said


@pytest.mark.slow
def test_restarts_share_the_name_that_the_first_start_took() -> None:
    """A run without --name would begin anew in another folder after each restart."""
    code = "from distcv.environment import launch_time; print(launch_time())"
    env = os.environ | {"TORCHELASTIC_RESTART_COUNT": "0"}
    taken = []
    for _ in range(2):
        ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        taken.append(float(ran.stdout))
        time.sleep(1.1)
    assert taken[0] == taken[1] == psutil.Process().create_time()
