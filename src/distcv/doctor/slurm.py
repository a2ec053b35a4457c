"""Checks of Slurm, asked by rank 0: how the site treats jobs, and the job that this runs in."""

import os
import re
from collections.abc import Iterator

from distcv.doctor import Arguments, Line
from distcv.runtime.probe import World
from distcv.submit.batch import slurm

ENOUGH_TO_SAVE_S = 30  # between SIGTERM and SIGKILL


def site(world: World, arguments: Arguments) -> Iterator[Line]:
    """Partitions, and whether a job that must go may save and come back."""
    if world.rank:
        return
    states: dict[str, list[str]] = {}
    for row in slurm("sinfo", "--noheader", "--format=%P %D %T").stdout.splitlines():
        name, number, state = row.split()
        states.setdefault(name, []).append(f"{number} {state}")
    yield Line("ok", "; ".join(f"{name}: {', '.join(nodes)}" for name, nodes in states.items()))
    config = _settings(slurm("scontrol", "show", "config").stdout)
    if config.get("JobRequeue") == "0":
        yield Line("warn", "JobRequeue is 0: jobs must ask for it by --requeue, as in slurm/*.sh")
    else:
        yield Line("ok", f"JobRequeue is {config.get('JobRequeue')}: jobs are requeued")
    graces = {"KillWait": config.get("KillWait", "")}
    own = os.environ.get("SLURM_JOB_PARTITION", "").split()
    for row in slurm("scontrol", "show", "partition", *own, "--oneliner").stdout.splitlines():
        partition = _settings(row)
        if partition.get("PreemptMode") in ("REQUEUE", "CANCEL"):  # else its jobs don't have to go
            graces[f"GraceTime of {partition['PartitionName']}"] = partition.get("GraceTime", "")
    for name, seconds in graces.items():
        if seconds.isdigit() and int(seconds) < ENOUGH_TO_SAVE_S:
            yield Line(
                "warn",
                f"{name} is {seconds} s, which may be too short to save in: --checkpoint-every",
            )
        else:
            yield Line("ok", f"{name} is {seconds} s")


def job(world: World, arguments: Arguments) -> Iterator[Line]:
    """The job around this process: nodes, tasks, time left, and who of its nodes came."""
    number = os.environ.get("SLURM_JOB_ID")
    if world.rank:
        return
    if number is None:
        yield Line("ok", "not inside of one")
        return
    names = slurm("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).stdout.split()
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE"))
    left = slurm("squeue", "--noheader", "--jobs", number, "--format=%L").stdout.strip()
    yield Line("ok", f"job {number} on {', '.join(names)}, tasks per node {tasks}, {left} left")
    if _settings(slurm("scontrol", "show", "job", "-o", number).stdout).get("Requeue") == "0":
        yield Line("warn", "this job won't be requeued: sbatch --requeue")
    if absent := [name for name in names if name not in world.hosts.values()]:
        yield Line(
            "wrong",
            f"{', '.join(absent)} did not take part: srun --ntasks-per-node=1 launch/multinode.sh "
            "--module distcv.doctor -- --slurm",
        )


def _settings(text: str) -> dict[str, str]:
    """What scontrol says as NAME=VALUE or NAME = VALUE; of a value, the first word."""
    return dict(re.findall(r"(\w+)[ \t]*=[ \t]*(\S*)", text))
