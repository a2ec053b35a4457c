"""Submit a batch template to Slurm, checked first: ``python -m distcv.submit slurm/resnet18.sh``.

What would fail after hours in the queue fails here at once, in one line.
"""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import tyro
from pydantic import Field

from distcv.command import run_command
from distcv.command_line import CommandLine, flag_value, parse_known_arguments
from distcv.config import InputError, Recipe, Strict, check_same_recipe
from distcv.data import find_dataset
from distcv.results import last_row
from distcv.submit.batch import (
    Job,
    gpus_per_node,
    log_path,
    read_job,
    run_folders,
    seconds_in,
    shown_command,
    slurm,
    split_words,
    training,
)


class SlurmOptions(Strict):
    """Options of sbatch by their own names; they win over the template's #SBATCH lines."""

    nodes: str | None = Field(None, description="Number of nodes.")
    gpus_per_node: str | None = Field(None, description="GPUs of each node, as 8 or h100:8.")
    cpus_per_task: str | None = Field(None, description="Cores for all processes of a node.")
    mem: str | None = Field(None, description="Memory of each node, as 64G.")
    time: str | None = Field(None, description="Time limit, as 30 (minutes), 2:00:00 or 1-12.")
    partition: str | None = Field(None, description="Partition; default: the cluster's own.")
    account: str | None = Field(None, description="Account that the job is charged to.")
    qos: str | None = Field(None, description="Quality of service.")
    constraint: str | None = Field(None, description="Features that the nodes must have.")
    array: str | None = Field(None, description="Task numbers of a job array, as 0-9 or 0-9%2.")
    job_name: str | None = Field(None, description="Name of the job.")
    output: str | None = Field(None, description="Log file; %j is the job id, %x the job's name.")
    dependency: str | None = Field(None, description="What must come first, as afterok:123.")
    nodelist: str | None = Field(None, description="Nodes that the job must have.")
    exclude: str | None = Field(None, description="Nodes that the job must not have.")
    reservation: str | None = Field(None, description="Reservation to run in.")


class Arguments(SlurmOptions):
    """The template, Slurm's options, and what is done with the job."""

    template: tyro.conf.Positional[Path] = Field(description="Batch template, as slurm/mnist.sh.")
    sbatch: str = Field("", description="Other options of sbatch, as '--mail-type=END --mem=0'.")
    dry_run: bool = Field(False, description="Check and show everything, submit nothing.")
    watch: bool = Field(False, description="Follow the job to its end; exit code 1 if it fails.")


def main() -> int:
    """Check, show, submit, watch; the exit code."""
    args = sys.argv[1:]
    if "--sbatch" in args[:-1]:  # a value that begins with dashes needs a = before it
        i = args.index("--sbatch")
        args[i : i + 2] = [f"--sbatch={args[i + 1]}"]
    arguments, passed = parse_known_arguments(
        Arguments,
        prog="distcv.submit",
        description="Submit a batch template to Slurm, checked first. Flags that are not listed "
        "here go to the template, as flags of distcv.train.",
        args=args,
        others=CommandLine,
    )
    fields = arguments.model_dump(include=set(SlurmOptions.model_fields), exclude_none=True)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]
    words += split_words(arguments.sbatch, "--sbatch")
    job = read_job(arguments.template, words, passed)

    def say(label: str, line: object) -> None:
        print(f"{label:<10}  {line}", flush=True)

    for label, line in checks(job):
        say(label, line)
    if arguments.dry_run:
        return 0
    job_id = slurm("sbatch", "--parsable", *job.command).stdout.strip().split(";")[0]
    say("submitted", f"job {job_id}")
    say("log", log_path(job, job_id))
    for folder in run_folders(job, job_id, [min(job.tasks), max(job.tasks)] if job.tasks else []):
        say("run folder", folder)
    if not arguments.watch:
        return 0
    from distcv.submit.watch import watch

    try:
        return watch(job, job_id)
    except KeyboardInterrupt:
        print(f"\nwatching ended, job {job_id} goes on: scancel {job_id} would end it")
        return 130


def checks(job: Job) -> Iterator[tuple[str, str]]:
    """Check one thing after the other; of each a label and what was found.

    Raises:
        InputError: the first thing that is wrong.
    """
    for option in ("output", "error"):
        folder = Path(log_path(job, "%j", option)).parent
        if not folder.is_dir():
            raise InputError(f"--{option}: Slurm makes no folders: mkdir -p {folder}")
    command = shown_command(job, job.tasks[0] if job.tasks else None)
    array = f", {len(job.tasks)} tasks" if job.tasks else ""
    yield "template", f"{job.template}, job {job.name}{array}"
    if command and (found := training(command)):
        recipe, options = found
        yield "recipe", f"{recipe.model} on {recipe.dataset}, {recipe.epochs} epochs"
        from distcv.data.cache import check_cached  # compute nodes often can't fetch it

        yield "data", check_cached(find_dataset(recipe.dataset), options.data_dir)
        yield "batch", batch_line(recipe, job.nodes, processes_per_node(job, command))
        if options.name is None:
            raise InputError(
                f"{job.template}: no --name, so each requeue would begin a new run: put "
                '--name "$SLURM_JOB_NAME-$SLURM_JOB_ID" before "$@"'
            )
        yield "run folder", folder_line(options.runs_dir / options.name, recipe)
    else:
        yield "recipe", "not checked: the template doesn't show flags of distcv.train"
    if "time" in job.options:
        yield "time", time_line(job.options["time"], job.options.get("signal"))
    yield "partition", partition_line(job.options.get("partition"))
    answer = " ".join(slurm("sbatch", "--test-only", *job.command).stderr.split())
    yield "sbatch", re.sub(r"^sbatch: Job \d+ to", "would", answer)
    yield "command", shlex.join(["sbatch", *job.command])
    if command:
        yield "runs", shlex.join(command)


def processes_per_node(job: Job, command: list[str]) -> int:
    """As launch/multinode.sh counts them: its own option, the GPUs of a node, or one."""
    said = flag_value(command[: command.index("--")], "processes-per-node") or ""
    return max(1, int(said) if said.isdigit() else gpus_per_node(job))


def batch_line(recipe: Recipe, nodes: int, per_node: int) -> str:
    """How the batch is dealt out, which training refuses if a process would get no sample.

    Raises:
        InputError: training would refuse it.
    """
    batch, parts = recipe.batch_size, recipe.gradient_accumulation_steps
    processes = nodes * per_node
    if batch < processes * parts:
        raise InputError(
            f"batch_size {batch} is less than {processes} processes x {parts} accumulation steps: "
            "raise --batch-size or use fewer"
        )
    if batch > (samples := find_dataset(recipe.dataset).train):
        raise InputError(f"batch_size {batch} exceeds the {samples} training samples: lower it")
    least, most = batch // (processes * parts), -(-batch // (processes * parts))
    share = f"{least}" if least == most else f"{least} to {most}"
    split = f" in {parts} parts" if parts > 1 else ""
    place = f"{processes} process{'es' * (processes > 1)} ({nodes} node{'s' * (nodes > 1)}"
    return f"{batch}{split}: {share} a process on {place} x {per_node})"


def folder_line(folder: Path, recipe: Recipe) -> str:
    """What the run folder means for the run: a new one, or one that it goes on in."""
    if not (folder / "config.yaml").exists():
        return f"{folder}, new"
    check_same_recipe(folder, recipe)
    if (folder / "result.json").exists():
        return f"{folder} is finished, the job will end at once"
    row = last_row(folder)
    return f"{folder} exists, the run resumes (newest step: {row['step'] if row else 'none'})"


def time_line(limit: str, signal: str | None) -> str:
    """The time limit, and how long before it the training is told to save.

    Raises:
        InputError: it is over before that.
    """
    seconds = seconds_in(limit)
    if signal is None or seconds is None:
        return f"limit {limit}"
    ahead = re.search(r"@(\d+)$", signal)
    lead = int(ahead[1]) if ahead else 60  # Slurm's default
    if seconds <= lead:
        raise InputError(
            f"--time {limit} leaves nothing before the signal {lead} s ahead of the limit "
            f"(--signal={signal}): raise --time"
        )
    return f"limit {limit}, told to save {lead} s before it"


def partition_line(partition: str | None) -> str:
    """Idle nodes and time limit of the partition, or of the default one."""
    chosen = ["--partition", partition] if partition else []
    lines = []
    for row in slurm("sinfo", "--noheader", *chosen, "--format=%P %a %F %l").stdout.splitlines():
        name, state, nodes, limit = row.split()
        _, idle, _, total = nodes.split("/")
        if partition or name.endswith("*"):
            name = name.removesuffix("*")
            lines.append(f"{name} is {state}, {idle} of {total} nodes idle, limit {limit}")
    return "; ".join(lines) or "none is the default"


def command() -> None:
    """Entry point: :func:`main`, and its exit code."""
    run_command(main)


if __name__ == "__main__":
    command()
