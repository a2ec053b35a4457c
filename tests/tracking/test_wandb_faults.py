"""A W&B server that fails while a training goes on: the training is neither slowed nor lost."""

import statistics
import time

import pytest

from distcv.data.readers import Arrays
from support.runs import Runs
from support.wandb_runs import check_findings, check_whole, run_of, sync
from support.wandb_server import WandbServer

FLAGS = ["--model", "gap", "--track", "wandb", "--log-every", "10"]


@pytest.mark.slow
def test_a_server_that_fails_for_a_while_gets_all_in_the_end(
    runs: Runs, server: WandbServer, mnist: Arrays
) -> None:
    process = runs.start("r", *FLAGS, "--max-steps", "200")
    runs.wait_for_step("r", 50, process)
    server.fail(3)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert server.failures == 0, "the server should have failed"
    check_whole(runs, "r", server, starts=1, steps=range(10, 201, 10))
    check_findings(runs, "r", server, mnist)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["hangs", "dies"])
def test_a_server_that_is_gone_costs_no_speed_and_half_a_minute_at_most(
    fault: str, runs: Runs, server: WandbServer, mnist: Arrays
) -> None:
    process = runs.start("r", *FLAGS, "--max-steps", "300")
    runs.wait_for_step("r", 150, process)
    last = max(row["step"] for row in runs.rows("r"))
    if fault == "hangs":
        server.hang()
    else:
        server.refuse()
    out, err = process.communicate(timeout=120)
    ended = time.time()
    assert process.returncode == 0, out + err
    assert runs.result("r")["steps"] == 300
    assert run_of(runs, "r", server).state == "running", "of the end it should not know"
    # The last row is written just before W&B gets the result.
    assert ended - (runs.folder / "r/metrics.jsonl").stat().st_mtime < 30
    rows = [row for row in runs.rows("r") if row["event"] == "train"]
    # Not the first row, in which caches are cold, nor the one in which the fault began.
    before = [row["images_per_second"] for row in rows if 10 < row["step"] <= last]
    after = [row["images_per_second"] for row in rows if row["step"] > last + 10]
    # On a busy machine a tenth is noise; a step that waited for the server would be far slower.
    assert statistics.median(after) >= 0.75 * statistics.median(before)
    server.heal()
    sync(runs, "r")
    check_findings(runs, "r", server, mnist)
    steps = [row["_step"] for row in run_of(runs, "r", server).history]
    assert steps == [*range(10, 301, 10), 301], "each row once; the result was logged offline"
