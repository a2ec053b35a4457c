"""Batch templates of Slurm: their options, and the command that they are going to run."""

import getpass
import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from distcv.command_line import RunOptions, flag_value, read_command_line
from distcv.config import InputError, Recipe, nearest
from distcv.data import find_dataset
from distcv.models import find_model

REQUEUE = "launch/requeue.sh"
SHORT = {
    "C": "constraint", "D": "chdir", "G": "gpus", "J": "job-name", "N": "nodes", "a": "array",
    "e": "error", "n": "ntasks", "o": "output", "p": "partition", "t": "time",
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A template with what stands around it on sbatch's command line."""

    template: Path
    text: str
    """Of the template."""
    words: list[str]
    """Options of sbatch, before the template."""
    passed: list[str]
    """Words for the template, after it."""
    options: dict[str, str]
    """Values by long name: the template's, and over them those of `words`."""

    @property
    def command(self) -> list[str]:
        return [*self.words, str(self.template), *self.passed]

    @property
    def name(self) -> str:
        return self.options.get("job-name", self.template.name)

    @property
    def tasks(self) -> list[int]:
        """Task numbers of an array; empty if it is none."""
        return task_numbers(self.options["array"]) if "array" in self.options else []

    @property
    def nodes(self) -> int:
        """The most of them, if it is a range."""
        return max([1, *map(int, re.findall(r"\d+", self.options.get("nodes", "")))])


def read_job(template: Path, words: list[str], passed: list[str]) -> Job:
    """Read the template.

    Raises:
        InputError: it can't be read, Slurm doesn't see all of its options, or one isn't supported.
    """
    try:
        text = template.read_text(errors="replace")
    except OSError as error:
        known = sorted(map(str, Path("slurm").glob("*.sh")))
        hint = nearest(str(template), known) if known else "submit from the folder of the clone"
        raise InputError(f"template {template}: {error.strerror}: {hint}") from None
    options = directives(text, str(template)) | options_in(words)
    if "chdir" in options:
        raise InputError("--chdir isn't supported: submit from the folder of the clone")
    return Job(template, text, words, passed, options)


def directives(text: str, where: str) -> dict[str, str]:
    """Options in the `#SBATCH` lines of a batch script.

    Raises:
        InputError: there is such a line after the first command, where Slurm ignores it.
    """
    options: dict[str, str] = {}
    command = 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#SBATCH"):
            if command:
                raise InputError(
                    f"{where}, line {number}: Slurm ignores #SBATCH after the first command (line "
                    f"{command}): move it up"
                )
            options |= options_in(split_words(line.removeprefix("#SBATCH"), f"{where}:{number}"))
        elif line.strip() and not line.lstrip().startswith("#"):
            command = command or number
    return options


def split_words(text: str, where: str) -> list[str]:
    """Words as a shell splits them, without a comment at the end.

    Raises:
        InputError: a quotation is not closed; ``where`` says of what.
    """
    try:
        return shlex.split(text, comments=True)
    except ValueError as error:
        raise InputError(f"{where}: {error}: {text.strip()}") from None


def options_in(words: list[str]) -> dict[str, str]:
    """Values of sbatch's options by their long names: `--nodes=4`, `--nodes 4` or `-N 4`."""
    options: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
        elif word.startswith("-"):
            name, value = SHORT.get(word[1:2], word), word[2:]
        else:
            value = word
        options[name] = value
    return options


def task_numbers(array: str) -> list[int]:
    """The task numbers of `--array`: `0-3`, `1,5-9%2` or `0-15:4`.

    Raises:
        InputError: it is none of these.
    """
    numbers: list[int] = []
    for part in array.split("%")[0].split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?(?::(\d+))?", part)
        if found is None:
            raise InputError(f"--array {array}: give task numbers such as 0-9, 1,3,5 or 0-9%2")
        first, last, step = found.groups()
        numbers += range(int(first), int(last or first) + 1, max(1, int(step or 1)))
    return numbers


def seconds_in(limit: str) -> int | None:
    """Seconds of a time limit in one of Slurm's forms; None for UNLIMITED and the like, as 0 is."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if found is None:
        return None
    days, *rest = found.groups()
    numbers = [int(number) for number in rest if number]
    if days is None and len(numbers) < 3:  # minutes, or minutes:seconds
        numbers.insert(0, 0)
    hours, minutes, seconds = (*numbers, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds or None


def gpus_per_node(job: Job) -> int:
    """GPUs that the job asks for on each node; 0 without any.

    Raises:
        InputError: nodes would get more than one task, or not the same number of GPUs.
    """
    asked = job.options
    for option, most in (("ntasks-per-node", 1), ("ntasks", job.nodes)):
        if _number(asked.get(option, "")) > most:
            raise InputError(
                f"--{option} {asked[option]}: one task a node starts all its processes: leave it "
                "away"
            )
    gres = [word for word in asked.get("gres", "").split(",") if word.startswith("gpu")]
    if here := _number(asked.get("gpus-per-node", ",".join(gres))):
        return here
    here, rest = divmod(_number(asked.get("gpus", "")), job.nodes)
    if rest or "gpus-per-socket" in asked:
        raise InputError("each node has to get the same number of GPUs: give --gpus-per-node")
    return here or _number(asked.get("gpus-per-task", ""))


def _number(text: str) -> int:
    """Of `8`, `h100:8` or `h100:4,a100:2`; a kind alone, such as `h100`, is one."""
    numbers = [part.split(":")[-1] for part in text.split(",") if part]
    return sum(int(number) if number.isdigit() else 1 for number in numbers)


def log_path(job: Job, job_id: str, option: str = "output") -> str:
    """The log file with its placeholders resolved; `*` stands for what is each task's own."""
    path = job.options.get(option, "slurm-%A_%a.out" if job.tasks else "slurm-%j.out")
    own = "*" if job.tasks else job_id
    values = {"%x": job.name, "%u": getpass.getuser(), "%A": job_id, "%a": own, "%j": own}
    return re.sub("%[xuAaj]", lambda found: values[found[0]], path)


def shown_command(job: Job, task: int | None) -> list[str] | None:
    """The command that the template will run, with `%j` and `%A` for the ids of job and array.

    A template is run up to `launch/requeue.sh`, which shows the command instead of running it. A
    template without that isn't run; None then.

    Raises:
        InputError: the template fails, or this isn't the folder of the clone.
    """
    if not re.search(rf"^[^#\n]*{REQUEUE}", job.text, re.MULTILINE):
        return None
    if not Path(REQUEUE).is_file():
        raise InputError(f"no {REQUEUE} in {Path.cwd()}: submit from the folder of the clone")
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    env |= {"DISTCV_SHOW_COMMAND": "1", "SLURM_JOB_ID": "%j", "SLURM_JOB_NAME": job.name}
    env |= {"SLURM_NNODES": str(job.nodes), "SLURM_JOB_NUM_NODES": str(job.nodes)}
    env |= {"SLURM_CPUS_PER_TASK": job.options.get("cpus-per-task", "1")}
    env |= {"SLURM_SUBMIT_DIR": str(Path.cwd())}
    if task is not None:
        env |= {"SLURM_ARRAY_JOB_ID": "%A", "SLURM_ARRAY_TASK_ID": str(task)}
    try:
        ran = subprocess.run(
            ["bash", str(job.template), *job.passed],
            env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise InputError(f"{job.template} doesn't come to {REQUEUE} within a minute") from None
    words = ran.stdout.split("\0")[:-1]
    if not words:
        reason = (ran.stderr.strip() or f"exit code {ran.returncode}").splitlines()[-1]
        raise InputError(f"{job.template} doesn't come to {REQUEUE}: {reason}")
    return words


def training(command: list[str] | None) -> tuple[Recipe, RunOptions] | None:
    """Recipe and options in a command `... -- FLAGS`; None if it doesn't run distcv.train."""
    if command is None or "--" not in command:
        return None
    split = command.index("--")
    if flag_value(command[:split], "module") not in (None, "distcv.train"):
        return None
    recipe, options = read_command_line(
        prog="distcv.train", description="", find_model=find_model, args=command[split + 1 :]
    )
    find_model(recipe.model)
    find_dataset(recipe.dataset)
    return recipe, options


def run_folders(job: Job, job_id: str, tasks: list[int]) -> list[Path]:
    """Run folders of these tasks, or of a job that is no array; those named by time are missing.

    A task's own job id, unknown before it starts, is shown as `*`.
    """
    folders = []
    chosen: list[int | None] = [*tasks] or [None]
    own = "*" if job.tasks else job_id
    for task in chosen:
        found = training(shown_command(job, task))
        if found and found[1].name:
            name = str(found[1].runs_dir / found[1].name)
            folders.append(Path(name.replace("%A", job_id).replace("%j", own)))
    return list(dict.fromkeys(folders))


def slurm(*words: str) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands.

    Raises:
        InputError: it is not there, doesn't answer within a minute, or refuses; with its reason.
    """
    try:
        ran = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise InputError(
            f"{words[0]} is not on the PATH: submit from a login node of a Slurm cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise InputError(f"{words[0]} gave no answer within a minute: try it by hand") from None
    if ran.returncode:
        lines = [line.removeprefix(f"{words[0]}: error: ") for line in ran.stderr.splitlines()]
        raise InputError(f"{words[0]}: {'; '.join(lines) or f'exit code {ran.returncode}'}")
    return ran
