"""The batch scripts on a real Slurm: jobs that are stopped in any way end as if left alone."""

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distcv import checkpoint
from support.runs import ROOT, Runs
from support.shared import made_once, shared_folder
from support.slurm_cluster import Cluster
from support.wandb_runs import rows_on_disk, rows_on_server, sync
from support.wandb_server import ENTITY, WandbServer

pytestmark = pytest.mark.slow

FLAGS = [
    "--model", "gap", "--dataset", "synthetic", "--batch-size", "16", "--max-steps", "400",
    "--log-every", "10", "--checkpoint-every", "50", "--dropout", "0.1",
]  # fmt: skip
# As in the strategies' tests: a rate at which rounding isn't amplified, no BatchNorm.
SMOOTH = ["--model", "lighter", "--optimizer", "adamw", "--lr", "0.0003", "--batch-size", "65",
          "--max-steps", "20", "--log-every", "1"]  # fmt: skip


class Site:
    """A folder like a clone's, from which jobs are submitted to the cluster."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        self.runs = Runs(folder / "runs", folder / "data")
        self.slow_steps = folder / "slow-steps"

    def slow_down(self, seconds: float = 0.1) -> None:
        """Let each step wait so long, for what takes Slurm longer than a small training."""
        self.slow_steps.write_text(str(seconds))

    def go_on(self) -> None:
        """Let steps be as fast as they are."""
        self.slow_steps.unlink()

    def submit(self, *words: str, **env: str) -> str:
        """sbatch with these words; the job's number."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        found = os.pathsep.join([str(ROOT / "tests/support/slow_steps"), str(ROOT / "src")])
        fixed = {"VIRTUAL_ENV": sys.prefix, "PYTHONPATH": found, "PATH": path}
        more = fixed | {"SLOW_STEPS": str(self.slow_steps), "OMP_NUM_THREADS": "1"} | env
        return self.cluster.sbatch(*words, cwd=self.folder, **more)

    def log(self, job: str) -> str:
        """What a job has printed so far."""
        (path,) = self.folder.glob(f"*-{job}.out")
        return path.read_text()

    def finish(self, job: str, restarts: int = 0) -> None:
        """Wait until a job has done well, having been requeued exactly so often."""
        self.cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout=400)
        record = self.cluster.job(job)
        found = record["JobState"], int(record["Restarts"])
        assert found == ("COMPLETED", restarts), self.log(job)


@pytest.fixture
def folder(tmp_path: Path, data_dir: Path, mnist: object) -> Path:
    made = tmp_path / "site"
    made.mkdir()
    for name in ("launch", "slurm"):
        (made / name).symlink_to(ROOT / name)
    (made / "data").symlink_to(data_dir.resolve())
    return made


@pytest.fixture
def site(folder: Path, cluster: Cluster) -> Site:
    return Site(folder, cluster)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Runs:
    """A run `whole` with FLAGS that nothing has touched."""
    runs = Runs(shared_folder(tmp_path_factory) / "slurm", data_dir.resolve())
    made_once(runs.folder, lambda _: runs.run("whole", *FLAGS))
    return runs


def ends_as_if_left_alone(site: Site, name: str, whole: Runs) -> None:
    assert site.runs.learned(name) == whole.learned("whole"), "weights, optimizer"
    assert site.runs.untimed_rows(name) == whole.untimed_rows("whole"), "each row once"


def test_two_nodes_learn_the_curve_of_one(site: Site) -> None:
    """Training on two Slurm nodes would give another loss curve than on one.

    Both jobs use the templates as they are, with resources from the command line.
    """
    two = site.submit("--nodes=2", "slurm/resnet18.sh", *SMOOTH)
    one = site.submit("slurm/mnist.sh", *SMOOTH)
    for job in (two, one):
        site.finish(job)
    assert "2 processes on 2 nodes" in site.log(two) and "1 process on 1 node" in site.log(one)
    curves = [
        [row["loss"] for row in site.runs.rows(name) if row["event"] == "train"]
        for name in (f"resnet18-{two}", f"mnist-{one}")
    ]
    assert len(curves[0]) == 20 and curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_a_job_at_its_time_limit_goes_on_by_itself(site: Site, whole: Runs) -> None:
    """A job at its time limit would not be requeued, or would reach other weights.

    Told ahead by SIGUSR2, or not until SIGTERM, half a minute after which SIGKILL would come.
    """
    site.slow_down(0.2)  # Slurm looks every 30 s whose end is near
    told, untold = (site.submit("slurm/mnist.sh", *FLAGS) for _ in range(2))
    for job, end in ((told, "now+100"), (untold, "now")):  # the script asks for 120 s ahead
        site.runs.wait_for_step(f"mnist-{job}", 10)
        site.cluster.run("scontrol", "update", f"JobId={job}", f"EndTime={end}")
    for job in (told, untold):
        site.cluster.wait(job, "PENDING", timeout=90)
        site.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
        assert re.search(rf"job {job}: stopped after step \d+, requeued", site.log(job))
    site.go_on()
    assert "DUE TO TIME LIMIT" in site.log(untold) and "TIME LIMIT" not in site.log(told)
    for job in (told, untold):
        site.finish(job, restarts=1)
        assert "resuming after step" in site.log(job)
        ends_as_if_left_alone(site, f"mnist-{job}", whole)


def test_a_preempted_job_comes_back(site: Site, whole: Runs) -> None:
    """A preempted job would not come back, or would end with other weights or repeated rows.

    With a grace period, in which it leaves by itself, and without.
    """
    site.slow_down()
    jobs = [
        site.submit(f"--partition={partition}", "slurm/mnist.sh", *FLAGS)
        for partition in ("low", "low0")
    ]
    for job in jobs:
        site.runs.wait_for_step(f"mnist-{job}", 60)
    urgent = site.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1")
    site.finish(urgent)
    site.go_on()
    for job in jobs:
        site.finish(job, restarts=1)
        assert "resuming after step" in site.log(job)
        ends_as_if_left_alone(site, f"mnist-{job}", whole)
    assert "requeued" in site.log(jobs[0]).replace("not requeued", "")
    assert "not requeued by itself (COMPLETING" in site.log(jobs[1])


def test_only_the_preempted_task_of_an_array_comes_back(site: Site, whole: Runs) -> None:
    """Preempting one seed of an array would restart the other seeds, or end this one for good.

    The last task to end prints mean and deviation over all.
    """
    site.slow_down()
    array = site.submit(
        "--partition=low", "--array=0-1", "--exclusive", "slurm/seeds.sh", *FLAGS
    )  # fmt: skip
    tasks = [f"{array}_{seed}" for seed in (0, 1)]
    site.cluster.wait(tasks[0], "RUNNING")
    seeds = Runs(site.folder / f"runs/seeds-{array}", site.folder / "data")
    for seed in (0, 1):
        seeds.wait_for_step(f"seed-{seed}", 20)
    node = site.cluster.job(tasks[0])["NodeList"]
    urgent = site.submit("--partition=high", f"--nodelist={node}", "--exclusive", "--wrap=sleep 1")
    site.finish(urgent)
    site.go_on()
    site.finish(tasks[0], restarts=1)
    site.finish(tasks[1])
    assert seeds.learned("seed-0") == whole.learned("whole")
    accuracies = [seeds.result(f"seed-{seed}")["test_accuracy"] for seed in (0, 1)]
    mean = sum(accuracies) / 2
    deviation = abs(accuracies[0] - accuracies[1]) / 2**0.5
    assert f"{mean:.2f} ± {deviation:.2f}" in site.log(tasks[0])


def test_a_cancelled_array_goes_on_in_its_folder(site: Site, whole: Runs) -> None:
    """A cancelled array, submitted again with RUNS_DIR, would begin anew in another folder."""
    words = ["--array=0", "--exclusive", "slurm/seeds.sh", *FLAGS]
    site.slow_down()
    array = site.submit(*words)
    seeds = Runs(site.folder / f"runs/seeds-{array}", site.folder / "data")
    seeds.wait_for_step("seed-0", 20)
    site.cluster.run("scancel", array)
    site.cluster.wait(f"{array}_0", "CANCELLED", timeout=120)
    site.go_on()
    again = site.submit(*words, RUNS_DIR=f"runs/seeds-{array}")
    site.finish(f"{again}_0")
    assert "resuming after step" in site.log(f"{again}_0")
    assert seeds.learned("seed-0") == whole.learned("whole")
    assert seeds.untimed_rows("seed-0") == whole.untimed_rows("whole")
    assert not (site.folder / f"runs/seeds-{again}").exists()


def test_a_job_goes_on_after_its_node_died(site: Site, whole: Runs) -> None:
    """A node failure would end the run, or the requeued job would reach other weights."""
    site.slow_down()
    job = site.submit("slurm/mnist.sh", *FLAGS)
    site.runs.wait_for_step(f"mnist-{job}", 60)
    site.cluster.crash(site.cluster.job(job)["NodeList"])
    site.go_on()
    site.finish(job, restarts=1)
    assert "resuming after step" in site.log(job)
    ends_as_if_left_alone(site, f"mnist-{job}", whole)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch-size", "0"], "error: --batch-size 0"),
        (
            ["--dropout", "0", "--model", "lighter", "--lr", "1e9"],
            "error: no finite loss",
        ),
    ],
)
def test_a_failure_is_not_requeued(flags: list[str], said: str, site: Site) -> None:
    """A job with a wrong flag or a diverged run would be requeued, and fail again each time."""
    job = site.submit("slurm/mnist.sh", *FLAGS, *flags)
    site.cluster.wait(job, "FAILED", timeout=60)
    assert site.cluster.job(job)["Restarts"] == "0"
    assert said in site.log(job) and "not requeued" in site.log(job)
    assert not list(site.folder.glob(".stop-*"))


def test_a_cancelled_job_saves_and_stays_away(site: Site) -> None:
    """A cancelled job would start again by itself, or leave no checkpoint to resume from."""
    site.slow_down()
    job = site.submit("slurm/mnist.sh", *FLAGS)
    site.runs.wait_for_step(f"mnist-{job}", 20)
    site.cluster.run("scancel", job)
    site.cluster.wait(job, "CANCELLED")
    (step,) = re.findall(r"stopped after step (\d+), not requeued", site.log(job))
    held = checkpoint.steps(site.runs.folder / f"mnist-{job}/checkpoints")
    assert held[-1] == int(step), "saved where it stopped"
    time.sleep(3)
    assert site.cluster.state(job) == "CANCELLED"


def test_a_job_that_makes_no_progress_is_given_up(site: Site) -> None:
    """A job that is always killed before a checkpoint would use up node hours without end."""
    site.slow_down()
    job = site.submit("slurm/mnist.sh", *FLAGS, "--max-steps", "4000", "--checkpoint-every", "4000",
                      "--idle-requeues", "1")  # fmt: skip
    for requeue in range(2):
        site.runs.wait_for_step(f"mnist-{job}", 10)
        (site.runs.folder / f"mnist-{job}/metrics.jsonl").unlink()
        node = site.cluster.job(job)["NodeList"]
        site.cluster.run("scontrol", "requeue", job)
        site.cluster.on(node, "pkill", "-KILL", "-f", "distcv.train")  # before it can save
        site.cluster.wait(job, "RUNNING", restarts=requeue + 1)
    site.cluster.wait(job, "FAILED")
    assert f"error: job {job} was requeued 2 times without a new checkpoint" in site.log(job)
    assert site.cluster.job(job)["Restarts"] == "2"


def test_the_doctor_looks_at_the_nodes_of_a_job(site: Site) -> None:
    """Users could not check that the nodes of a Slurm job work together before they train."""
    doctor = ["launch/multinode.sh", "--module", "distcv.doctor", "--", "--slurm"]
    job = site.submit("--nodes=2", "--ntasks-per-node=1", "--output=doctor-%j.out",
                      f"--wrap=srun {' '.join(doctor)}")  # fmt: skip
    site.finish(job)
    said = site.log(job)
    assert re.search(r"ok +exchange +gloo: sum right", said) and "wrong" not in said
    assert re.search(r"ok +runs folder .*shared and locked.*", said)
    assert f"job {job} on node1, node2" in said and "2 processes on 2 hosts" in said


@pytest.fixture
def server(cluster: Cluster) -> Iterator[WandbServer]:
    """A W&B server that the nodes reach."""
    server = WandbServer(cluster.address)
    yield server
    server.close()


def test_a_requeued_job_goes_on_with_its_run_in_wandb(
    site: Site, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A requeued job would appear in W&B as a new run, or with rows missing or repeated.

    Two requeues, online and offline, and one of a sweep's agent: one run each, each row once.
    """
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(site.folder))
    flags = [*FLAGS, "--track", "wandb"]
    site.slow_down(0.05)
    online = site.submit("slurm/mnist.sh", *flags)
    offline = site.submit("slurm/mnist.sh", *flags, WANDB_MODE="offline")
    train = [sys.executable, "-m", "distcv.train", *flags, "${args}"]
    sweep = server.add_sweep(train, [{"lr": 0.05}])
    agent = site.submit("--array=0", "slurm/sweep.sh", f"{ENTITY}/distcv/{sweep}") + "_0"
    names = {online: f"mnist-{online}", offline: f"mnist-{offline}", agent: f"gap-{sweep}-1"}
    for jobs, step in (((online, offline, agent), 20), ((online, offline), 150)):
        for job in jobs:
            site.runs.wait_for_step(names[job], step)
            site.cluster.run("scontrol", "requeue", job)
    site.go_on()
    for job, restarts in ((online, 2), (offline, 2), (agent, 1)):
        site.finish(job, restarts)
    states = [run.state for run in server.runs.values()]
    assert states == ["finished", "finished"], "\n".join(map(site.log, (online, offline)))
    sync(site.runs, names[offline])
    assert len(server.runs) == 3 and server.unknown == set()
    by_name = {run.fields["displayName"]: run for run in server.runs.values()}
    for name in names.values():
        assert rows_on_server(by_name[name]) == rows_on_disk(site.runs, name)
        assert by_name[name].state == "finished"
    groups = {by_name[names[job]].fields["groupName"] for job in (online, offline)}
    assert len(groups) == 1, "one recipe, one group"
