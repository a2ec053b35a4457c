"""W&B is told when a training diverges and when it hangs."""

import signal
import time

import pytest

from support.runs import Runs
from support.wandb_runs import run_of
from support.wandb_server import WandbServer

FLAGS = ["--model", "gap", "--log-every", "5", "--track", "wandb"]


@pytest.mark.slow
def test_a_loss_that_is_no_number_is_told_and_the_run_has_failed(
    runs: Runs, server: WandbServer
) -> None:
    """A diverged run would send no alert to W&B and would not be marked as failed there."""
    flags = ["--model", "lighter", "--lr", "1e9", "--warmup", "0", "--schedule", "constant"]
    said = runs.run("r", *FLAGS, *flags, expect=2)
    assert "no finite loss" in said
    run = run_of(runs, "r", server)
    [(title, text, level)] = run.alerts
    assert (title, level) == ("diverged", "ERROR") and "no finite loss" in text
    assert run.state == "failed"


@pytest.mark.slow
def test_a_process_that_hangs_is_told_before_the_others_give_up(
    runs: Runs, server: WandbServer
) -> None:
    """Users would hear of a hung rank only after the heartbeat timeout has ended the run."""
    flags = [*FLAGS, "--hang-timeout", "10", "--max-steps", "3000"]
    peer, victim = runs.group("r", 2, *flags)
    runs.wait_for_step("r", 10, peer)
    victim.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while not run_of(runs, "r", server).alerts and time.monotonic() < deadline:
        time.sleep(0.1)
    [(title, text, level)] = run_of(runs, "r", server).alerts
    assert (title, level) == ("stalled", "WARN") and "no step for 5 s" in text
    assert peer.poll() is None, "told too late"
    out, err = peer.communicate(timeout=60)
    victim.kill()
    assert peer.returncode != 0 and "no sign of life" in out + err
