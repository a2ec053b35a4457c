"""W&B runs survive every restart: real trainings against a server on the loopback."""

import base64
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.runs import ROOT, Runs, stopped_in
from support.wandb_runs import check_whole, kill, run_of, sync, wandb_sync
from support.wandb_server import KEY, WandbServer
from support.wandb_store import ENTITY

TRAINING = ["--model", "gap", "--max-steps", "80", "--track", "wandb"]
SHORT = [*TRAINING, "--batch-size", "32", "--log-every", "5"]
MODES = pytest.mark.parametrize("mode", ["online", "offline"])


def check_key_is_secret(folder: Path, server: WandbServer) -> None:
    """The API key is in the header of requests, and neither in their bodies nor on disk."""
    in_header = base64.b64encode(f"api:{KEY}".encode())
    secrets = [KEY.encode(), in_header]
    assert any(in_header.decode() in r.headers.get("authorization", "") for r in server.requests)
    texts = {request.path: request.body for request in server.requests}
    texts |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert any(path.endswith(".wandb") for path in texts)
    assert [path for path, text in texts.items() if any(s in text for s in secrets)] == []


@pytest.mark.slow
@MODES
def test_a_run_that_is_stopped_twice_is_one_run_in_wandb(
    mode: str, runs: Runs, server: WandbServer
) -> None:
    """A stopped and resumed run would appear in W&B as several runs, or with gaps."""
    for how, step in (("file", 10), ("SIGTERM", 40)):
        process = runs.start("r", *SHORT, WANDB_MODE=mode)
        runs.wait_for_step("r", step, process)
        if how == "file":
            (runs.folder / "r/STOP").touch()
        else:
            process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 75, out + err
        if mode == "online":
            assert run_of(runs, "r", server).state == "preempted"
    runs.run("r", *SHORT, WANDB_MODE=mode)
    if mode == "offline":
        assert server.requests == []
        wandb_sync(runs, "r")
    check_whole(runs, "r", server, starts=3)
    check_key_is_secret(runs.folder, server)


@pytest.mark.slow
@MODES
def test_rows_of_a_run_that_is_killed_are_neither_lost_nor_doubled(
    mode: str, runs: Runs, server: WandbServer
) -> None:
    """After a kill, W&B curves would have gaps, or some steps twice."""
    flags = [*TRAINING, "--log-every", "2", "--checkpoint-every", "20"]
    # Killed at once, rows before the checkpoint are lost that were neither sent nor written.
    process = runs.start("r", *flags, WANDB_MODE=mode, WANDB__FILE_STREAM_TRANSMIT_INTERVAL="15")
    runs.wait_for_step("r", 25, process)
    kill(process)
    # Killed after a pause in which all rows but the last two are sent or written, those after the
    # checkpoint would be there twice.
    process = runs.start("r", *flags, WANDB_MODE=mode)
    runs.wait_for_step("r", 46, process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    kill(process)
    if mode == "online":
        assert run_of(runs, "r", server).history[-1]["_step"] > 40
    said = runs.run("r", *flags, WANDB_MODE=mode)
    assert "resuming after step 40" in said
    if mode == "offline":
        wandb_sync(runs, "r")
    check_whole(runs, "r", server, starts=3, steps=range(2, 81, 2))


@pytest.mark.slow
def test_a_stop_before_an_evaluation_does_not_part_its_row(
    runs: Runs, server: WandbServer, tmp_path: Path
) -> None:
    """A run stopped before its evaluation would lack that epoch's accuracy in W&B."""
    flags = [*SHORT, "--max-steps", "1"]
    asked = tmp_path / "asked"
    for command in (stopped_in("train_epoch", asked), None):  # the second time before it begins
        runs.run("r", *flags, command=command, expect=75, DISTCV_STOP_FILE=str(asked))
        assert [row["event"] for row in runs.rows("r")] == ["train"]
    runs.run("r", *flags)
    check_whole(runs, "r", server, starts=3, steps=[1])


@pytest.mark.slow
def test_a_run_that_began_offline_is_whole_once_it_is_online(
    runs: Runs, server: WandbServer
) -> None:
    """A run begun offline would lack its first rows online, or a later sync would change them."""
    process = runs.start("r", *SHORT, WANDB_MODE="offline")
    runs.wait_for_step("r", 10, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    runs.run("r", *SHORT)
    check_whole(runs, "r", server, starts=1)
    wandb_sync(runs, "r")
    check_whole(runs, "r", server, starts=1)


@pytest.mark.slow
def test_of_several_processes_one_has_the_trackers(runs: Runs, server: WandbServer) -> None:
    """Each rank would open a W&B run and an event file of its own for the same training."""
    runs.together("r", 2, *SHORT, "--track", "wandb", "tensorboard")
    check_whole(runs, "r", server, starts=1)
    assert len(list(runs.folder.glob("r/tensorboard/**/events.out.tfevents.*"))) == 1


class Agent:
    """`wandb agent --count 1` on a sweep over two learning rates, which trains as users would."""

    def __init__(self, runs: Runs, server: WandbServer) -> None:
        train = [sys.executable, "-m", "distcv.train", *SHORT, *runs.flags, "${args}"]
        parameters = [{"lr": lr, "weight_decay": 1e-3} for lr in (0.05, 0.1)]
        self.sweep = server.add_sweep(train, parameters)
        self.folder = runs.folder.parent

    def start(self, *flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "wandb", "agent", "--count", "1", *flags]
        path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen(
            [*command, f"{ENTITY}/distcv/{self.sweep}"],
            cwd=self.folder, env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def wait(self, process: subprocess.Popen[str]) -> None:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out


@pytest.mark.slow
def test_a_sweep_s_run_that_was_stopped_is_gone_on_with_by_the_next_agent(
    runs: Runs, server: WandbServer
) -> None:
    """A preempted run of a sweep would be lost, as the next agent would begin another one."""
    agent = Agent(runs, server)
    id = f"{agent.sweep}-1"
    name = f"gap-{id}"
    process = agent.start()
    runs.wait_for_step(name, 10, process)
    (runs.folder / name / "STOP").touch()
    agent.wait(process)
    assert server.run(id).state == "preempted" and server.run(id).exit_code == 75
    process = agent.start("--forward-signals")  # without it, SIGTERM ends the agent only
    runs.wait_for_step(name, 40, process)
    process.send_signal(signal.SIGTERM)
    agent.wait(process)
    assert server.run(id).state == "preempted" and server.run(id).exit_code == 75
    agent.wait(agent.start())
    check_whole(runs, name, server, starts=3)
    assert server.run(id).config["lr"] == 0.05 and server.run(id).config["weight_decay"] == 1e-3
    assert server.run(id).fields["sweep"] == agent.sweep
    assert len(server.sweeps[agent.sweep].waiting) == 1, "the other one was not begun"
    check_key_is_secret(runs.folder, server)


@pytest.mark.slow
def test_disabled_nothing_is_asked_and_nothing_written(runs: Runs, server: WandbServer) -> None:
    """WANDB_MODE=disabled would still contact the server or write a wandb folder."""
    server.fail(1000)
    flags = [*TRAINING, "tensorboard", "--log-every", "5", "--max-steps", "10"]
    runs.run("r", *flags, WANDB_MODE="disabled")
    assert server.requests == []
    folder = runs.folder / "r"
    assert not (folder / "wandb").exists() and (folder / "tensorboard").exists()
    assert runs.result("r")["steps"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("key", ["0" * 40, "short"])
def test_a_wrong_key_is_refused_before_the_first_step(
    key: str, runs: Runs, server: WandbServer
) -> None:
    """A wrong W&B key would go unnoticed, and hours of training would not reach the server."""
    said = runs.run("r", *SHORT, expect=2, WANDB_API_KEY=key)
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line == (
        "error: --track wandb: W&B at 127.0.0.1 refuses the key: see WANDB_API_KEY, or call "
        "wandb login --relogin: mend it, or leave one out"
    )
    assert "Traceback" not in said and "offline" not in said
    assert runs.rows("r") == [] and server.runs == {}


@pytest.mark.slow
def test_a_wrong_key_does_not_end_a_run_that_goes_on(runs: Runs, server: WandbServer) -> None:
    """A requeued run could not resume once W&B refuses its key."""
    process = runs.start("r", *SHORT)
    runs.wait_for_step("r", 10, process)
    (runs.folder / "r/STOP").touch()
    process.communicate(timeout=60)
    said = runs.run("r", *SHORT, WANDB_API_KEY="0" * 40)
    assert "wandb login --relogin: going on offline" in said
    assert runs.result("r")["steps"] == 80
    sync(runs, "r")
    assert run_of(runs, "r", server).history[-1]["_step"] >= 80
