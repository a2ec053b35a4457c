"""Follow a job of Slurm to its end: its states, and the newest figures of its run."""

import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from distcv.config import InputError
from distcv.results import last_row, read_runs
from distcv.results.listing import report
from distcv.submit.batch import Job, run_folders, slurm

ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "REVOKED", "TIMEOUT", "UNKNOWN",
}  # fmt: skip
SOONEST, LATEST = 2.0, 10.0  # seconds between two questions to Slurm, which answers to all users


class Task(NamedTuple):
    """A job or a task of a job array, as squeue sees it."""

    state: str
    reason: str = ""
    nodes: str = ""
    restarts: str = "0"

    def __str__(self) -> str:
        place = f" on {self.nodes}" if self.nodes else f" ({self.reason})" if self.reason else ""
        requeued = f", restart {self.restarts}" if self.restarts != "0" else ""
        return self.state + place + requeued


def watch(job: Job, job_id: str) -> int:
    """Print what changes until the job ends; the exit code: 0 if all was COMPLETED, else 1."""
    ids = [f"{job_id}_{number}" for number in job.tasks] or [job_id]
    tasks = dict.fromkeys(ids, Task("PENDING"))
    folders = run_folders(job, job_id, job.tasks)
    said, shown, pause = "", "", SOONEST
    live = sys.stdout.isatty()
    with tqdm(bar_format="{desc}", leave=False, disable=not live, file=sys.stdout) as bar:
        while True:
            try:
                tasks |= poll(job_id, {i for i in ids if tasks[i].state not in ENDED})
                line = summary(tasks)
            except InputError as error:  # slurmctld may be away for a while, the job goes on
                line = f"{error}; asking again"
            pause = min(LATEST, pause * 1.25) if line == said else SOONEST
            if line != said:
                tqdm.write(f"{time.strftime('%H:%M:%S')}  {line}")
                sys.stdout.flush()
                said = line
            if all(task.state in ENDED for task in tasks.values()):
                break
            figures = newest(folders[0]) if folders and not job.tasks else ""
            if figures not in ("", shown):  # none for a moment, while a resumed run cuts its rows
                shown = figures
                bar.set_description_str(figures)
                if bar.disable:
                    print(figures, flush=True)
            time.sleep(pause)
    for line in results(folders):
        print(line)
    return 0 if all(task.state == "COMPLETED" for task in tasks.values()) else 1


def poll(job_id: str, unfinished: set[str]) -> dict[str, Task]:
    """Ask squeue for the tasks of a job, and sacct for those that it has forgotten.

    Raises:
        InputError: Slurm gives no answer.
    """
    columns = "JobArrayID:|,State:|,Reason:|,NodeList:|,RestartCnt:|"
    try:
        said = slurm("squeue", "-h", "-r", "-t", "all", "-j", job_id, "-O", columns).stdout
    except InputError as error:
        if "Invalid job id" not in str(error):  # it says so when the last record was purged
            raise
        said = ""
    tasks = {}
    for line in said.splitlines():
        task_id, state, reason, nodes, restarts, *_ = line.split("|")
        tasks[task_id] = Task(state, reason if reason != "None" else "", nodes, restarts)
    return tasks | {task_id: Task(accounted(task_id)) for task_id in unfinished - tasks.keys()}


def accounted(task_id: str) -> str:
    """The state that Slurm's accounting knows; UNKNOWN where there is none."""
    try:
        said = slurm("sacct", "-n", "-X", "-P", "-j", task_id, "-o", "State").stdout
    except InputError:
        return "UNKNOWN"
    return said.split()[0] if said.split() else "UNKNOWN"  # "CANCELLED by 1000"


def summary(tasks: dict[str, Task]) -> str:
    """A job's state, or how many tasks of an array are in which."""
    if len(tasks) == 1:
        return str(next(iter(tasks.values())))
    counts = Counter(task.state for task in tasks.values())
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))


def newest(folder: Path) -> str:
    """The newest figures of a run in one line, or nothing."""
    row = last_row(folder)
    if row is None:
        return ""
    test = "test_" if row["event"] == "epoch" else ""
    return (
        f"step {row['step']}  epoch {row['epoch']:.2f}  {test.replace('_', ' ')}loss "
        f"{row[f'{test}loss']:.4f}  accuracy {row[f'{test}accuracy']:.2f} %"
    )


def results(folders: list[Path]) -> list[str]:
    """What the runs have come to, as far as they left a folder."""
    runs, skipped = read_runs(tuple(folder for folder in folders if folder.is_dir()))
    if len(runs) == 1 and (result := runs[0].result):
        return [f"test accuracy {result['test_accuracy']:.2f} %, result in {runs[0].folder}"]
    return [*report(runs), *skipped]
