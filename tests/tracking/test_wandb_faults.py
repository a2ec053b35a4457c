"""A W&B server that fails while a training goes on: the training is neither slowed nor lost."""

import statistics
import time

import pytest

from distcv.data.readers import Arrays
from support.clock import unhindered_seconds
from support.runs import Process, Runs
from support.wandb_runs import check_findings, check_whole, run_of, sync
from support.wandb_server import WandbServer

FLAGS = ["--model", "gap", "--batch-size", "32", "--track", "wandb", "--log-every", "10"]


@pytest.mark.slow
def test_a_server_that_fails_for_a_while_gets_all_in_the_end(
    runs: Runs, server: WandbServer, mnist: Arrays
) -> None:
    """A short outage of W&B would leave gaps in a run's curves, tables or model files."""
    process = runs.start("r", *FLAGS, "--max-steps", "200")
    runs.wait_for_step("r", 50, process)
    server.fail(3)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert server.failures == 0, "the server should have failed"
    check_whole(runs, "r", server, starts=1, steps=range(10, 201, 10))
    check_findings(runs, "r", server, mnist)


def note_rows(runs: Runs, process: Process, came: dict[int, float], until: int) -> dict[int, float]:
    """Wait for the row of a step; when each row came, by the training's own clock, by step."""
    came = dict(came)
    while until not in came:
        assert process.poll() is None, "it should have been at work still"
        now = unhindered_seconds(process.pid)
        for step in runs.logged_steps("r"):
            came.setdefault(step, now)
        time.sleep(0.01)
    return came


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["hangs", "dies"])
def test_a_server_that_is_gone_costs_no_speed_and_half_a_minute_at_most(
    fault: str, runs: Runs, server: WandbServer, mnist: Arrays
) -> None:
    """A W&B server that goes down would slow every step, or delay the end of a run by minutes."""
    process = runs.start("r", *FLAGS, "--max-steps", "300")
    begun = note_rows(runs, process, {}, until=150)
    last = max(begun)
    if fault == "hangs":
        server.hang()
    else:
        server.refuse()
    came = note_rows(runs, process, begun, until=300)
    out, err = process.communicate(timeout=120)
    ended = time.time()
    assert process.returncode == 0, out + err
    assert runs.result("r")["steps"] == 300
    assert run_of(runs, "r", server).state == "running", "of the end it should not know"
    # The last row is written just before W&B gets the result.
    assert ended - (runs.folder / "r/metrics.jsonl").stat().st_mtime < 30
    took = {step: came[step] - came[step - 10] for step in came if step - 10 in came}
    # Not the first row, in which caches are cold, nor the one in which the fault began.
    before = [seconds for step, seconds in took.items() if step <= last]
    after = [seconds for step, seconds in took.items() if step > last + 10]
    # A tenth is noise; a step that waited for the server would be far slower.
    assert statistics.median(after) <= statistics.median(before) / 0.75
    server.heal()
    sync(runs, "r")
    check_findings(runs, "r", server, mnist)
    steps = [row["_step"] for row in run_of(runs, "r", server).history]
    assert steps == [*range(10, 301, 10), 301], "each row once; the result was logged offline"
