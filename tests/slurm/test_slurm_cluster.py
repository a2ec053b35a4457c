"""The Slurm cluster that other tests use: its nodes and their loss, preemption, its own end."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from support import slurm_cluster
from support.runs import ROOT
from support.slurm_cluster import Cluster


def until(condition: Callable[[], bool], timeout: float = 20) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def write_script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/bash\n{text}")
    return str(path)


# On each of two nodes: listen, ask for the other by its name, and wait to be asked.
MEET = """
import os, socket, time
name = socket.gethostname()
server = socket.create_server(("", 5000))
other = socket.gethostbyname({"node1": "node2", "node2": "node1"}[name])
while True:
    try:
        with socket.create_connection((other, 5000), timeout=10):
            break
    except ConnectionRefusedError:
        time.sleep(0.1)
server.accept()
print(name, socket.gethostbyname(name), other, os.environ["CUDA_VISIBLE_DEVICES"])
"""


def test_two_nodes_have_names_and_addresses_and_meet_in_a_job(cluster: Cluster) -> None:
    """Faults that users meet only across nodes would stay hidden on the test cluster."""
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=8", "--gpus-per-node=2"]
    said = cluster.run(*srun, sys.executable, "-c", MEET)
    one, two = cluster.network[10], cluster.network[11]
    assert sorted(said.splitlines()) == [f"node1 {one} {two} 0,1", f"node2 {two} {one} 0,1"]


def test_a_node_reaches_this_machine_and_shares_its_files_but_no_memory(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Code that relies on /dev/shm across nodes would pass here and fail for users."""
    with socket.create_server((cluster.address, 0)) as server:
        connect = f"echo hello > /dev/tcp/{cluster.address}/{server.getsockname()[1]}"
        cluster.on("node1", "bash", "-c", connect)
        connection, sender = server.accept()
        with connection:
            assert connection.recv(5) == b"hello" and sender[0] == str(cluster.network[10])
    cluster.on("node1", "touch", str(tmp_path / "file"), "/dev/shm/of-node1")
    assert (tmp_path / "file").exists() and not Path("/dev/shm/of-node1").exists()
    assert "of-node1" not in cluster.on("node2", "ls", "/dev/shm")


@pytest.mark.slow
def test_jobs_of_a_node_that_crashes_start_again(cluster: Cluster, tmp_path: Path) -> None:
    """The test cluster would not requeue jobs as users' clusters do after a node failure."""
    text = 'echo "start ${SLURM_RESTART_COUNT:-0}"; [ -n "$SLURM_RESTART_COUNT" ] || sleep 76543'
    script = write_script(tmp_path / "job.sh", text)
    output = ["--open-mode=append", f"--output={tmp_path}/%j.out"]
    anywhere = cluster.sbatch(*output, script)
    cluster.wait(anywhere, "RUNNING")
    node = cluster.job(anywhere)["NodeList"]
    there = cluster.sbatch(*output, f"--nodelist={node}", script)
    cluster.wait(there, "RUNNING")

    def sleepers() -> int:
        return sum("76543" in (p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))

    until(lambda: sleepers() == 2)
    cluster.crash(node)
    assert sleepers() == 0
    cluster.wait(anywhere, "COMPLETED", restarts=1)
    assert cluster.job(anywhere)["NodeList"] != node
    assert cluster.wait(there, "PENDING", restarts=1) == cluster.state(there)
    cluster.boot(node)
    cluster.wait(there, "COMPLETED", restarts=1)
    assert cluster.job(there)["NodeList"] == node
    for job in (anywhere, there):
        assert (tmp_path / f"{job}.out").read_text() == "start 0\nstart 1\n"


# The step leaves a second late, so that this shell is told of a TERM that is sent to both.
PREEMPTED = """\
trap 'echo batch: TERM' TERM
echo "start ${SLURM_RESTART_COUNT:-0}"
[ -z "$SLURM_RESTART_COUNT" ] || exit 0
on_term='echo step: TERM; sleep 1; exit 75'
srun bash -c "trap '$on_term' TERM; echo ready; while :; do sleep 0.1; done" &
while kill -0 $! 2>/dev/null; do wait $!; done  # each signal to this shell ends a wait
wait $!
echo "step: $?"
[ "$SLURM_JOB_PARTITION" = low0 ] || scontrol requeue "$SLURM_JOB_ID"
"""


@pytest.mark.slow
def test_a_preempted_job_gets_term_and_starts_again(cluster: Cluster, tmp_path: Path) -> None:
    """The test cluster would not preempt jobs as users' clusters do, by SIGTERM and requeue."""
    script = write_script(tmp_path / "job.sh", PREEMPTED)
    logs, jobs = {}, {}
    for partition, node in (("low", "node1"), ("low0", "node2")):
        logs[partition] = log = tmp_path / f"{partition}.out"
        words = [f"--partition={partition}", f"--nodelist={node}", "--open-mode=append"]
        jobs[partition] = cluster.sbatch(*words, f"--output={log}", "--error=/dev/null", script)
        until(lambda log=log: log.is_file() and "ready" in log.read_text())
    high = cluster.sbatch("-phigh", "-N2", "--exclusive", "-o/dev/null", "--wrap", "sleep 1")
    assert cluster.wait(high, "COMPLETED") == "COMPLETED"
    for job in jobs.values():
        cluster.wait(job, "COMPLETED", restarts=1)
        assert cluster.job(job)["Restarts"] == "1"

    # With a time of grace the step alone is told at first; this job then requeues itself.
    lines = logs["low"].read_text().splitlines()
    assert lines[:4] == ["start 0", "ready", "step: TERM", "step: 75"] and lines[-1] == "start 1"
    # Without one all are told, and Slurm requeues.
    lines = logs["low0"].read_text().splitlines()
    assert {"step: TERM", "batch: TERM", "step: 75"} < set(lines) and lines[-1] == "start 1"


def test_a_job_that_ends_otherwise_is_told_with_its_log(cluster: Cluster, tmp_path: Path) -> None:
    """Contributors would see a failed Slurm test without the job's state and log."""
    script = write_script(tmp_path / "job.sh", "echo last words; exit 3")
    job = cluster.sbatch(script, cwd=tmp_path)
    with pytest.raises(AssertionError, match=r"(?s)'FAILED'.*'3:0'.*last words.*slurmctld\.log"):
        cluster.wait(job, "COMPLETED")
    with pytest.raises(AssertionError, match="Invalid job id"):
        cluster.job("987654")


def test_cancel_all_ends_jobs_that_will_not_and_those_that_wait(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Jobs left from one Slurm test would hold the nodes that a contributor's next test needs."""
    stubborn = write_script(tmp_path / "job.sh", "trap '' TERM; while :; do sleep 1; done")
    tasks = cluster.sbatch("--array=0-1", stubborn, cwd=tmp_path)
    held = cluster.sbatch("--hold", stubborn, cwd=tmp_path)
    cluster.wait(f"{tasks}_1", "RUNNING")
    with pytest.raises(AssertionError, match="2 records"):
        cluster.job(tasks)
    begin = time.monotonic()
    cluster.cancel_all()
    assert time.monotonic() - begin < 15, "it waited for KillWait"
    assert cluster.run("squeue", "-h") == "" and cluster.state(held) == "CANCELLED"


# A cluster whose start fails, and one whose process is killed.
BAD_START = """
slurm_cluster.NODE = "read -r; exit 1"
try:
    cluster.start()
except AssertionError as error:
    assert "isn't usable" in str(error)
finally:
    cluster.stop()
"""
KILLED = "cluster.start(); os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize("life", [BAD_START, KILLED])
def test_nothing_is_left_of_a_cluster(cluster: Cluster, life: str) -> None:
    """An aborted Slurm test would leave daemons, bridges and folders on a user's machine."""
    begin = (
        "import os, signal\nfrom support import slurm_cluster\ncluster = slurm_cluster.Cluster(1)"
    )
    code = f"{begin}\nprint(cluster.bridge, cluster.folder, flush=True)\n{life}"
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == (-9 if life == KILLED else 0), ran.stderr
    bridge, folder = ran.stdout.split()

    def processes() -> list[psutil.Process]:
        return [p for p in psutil.process_iter(["environ"])
                if folder in (p.info["environ"] or {}).get("SLURM_CONF", "")]  # fmt: skip

    def left() -> bool:
        if life == KILLED:  # the next start does this; the kernel may still be at the nodes
            slurm_cluster.remove_left_overs()
        return Path("/sys/class/net", bridge).exists() or Path(folder).exists()

    until(lambda: not processes())
    until(lambda: not left())
    assert cluster.run("sinfo", "-h", "-o%T", "-pdebug") == "idle\n", "the other one lives"


@pytest.mark.slow
def test_without_slurm_a_test_is_skipped_and_says_what_to_install(tmp_path: Path) -> None:
    """Contributors without Slurm would see a failure instead of the packages to install."""
    test = test_two_nodes_have_names_and_addresses_and_meet_in_a_job.__name__
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{test}"],
        env=os.environ | {"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0 and "1 skipped" in ran.stdout, ran.stdout + ran.stderr
    assert "slurmctld, slurmd" in ran.stdout
    assert "apt-get install slurmctld slurmd slurm-client munge iproute2" in ran.stdout
