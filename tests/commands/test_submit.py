"""Submitting to Slurm: what is refused before, what is submitted, and what is seen until the end.

Most tests have stubs of Slurm's commands that play a part; the last one has a real cluster.
"""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from distcv.command import run_command
from distcv.config import load_recipe
from distcv.submit import __main__ as submit
from distcv.submit.batch import directives, log_path, options_in, read_job, seconds_in, task_numbers
from support.runs import ROOT
from support.slurm_cluster import Cluster

TEMPLATES = sorted((ROOT / "slurm").glob("*.sh"))
SYNTHETIC = ["--dataset", "synthetic"]

STUBS = {
    "sbatch": """
        printf '%s\\n' "$*" >>"$0.calls"
        if [[ " $* " == *" --test-only "* ]]; then
            [[ -z ${REFUSE:-} ]] || { echo "sbatch: error: $REFUSE" >&2; exit 1; }
            echo "sbatch: Job 9 to start at noon using 2 processors on node1" >&2
        else
            echo "4711;somewhere"
        fi
    """,
    "sinfo": """
        [[ $* == *low* ]] || echo "debug* up 1/1/0/2 7-00:00:00"
        echo "low up 0/4/0/4 1:00:00"
    """,
    # Answers by the files squeue.0, squeue.1 and so on, then again by the last one.
    "squeue": """
        n=$(($(cat "$0.calls" 2>/dev/null || echo -1) + 1))
        [[ -e $0.$n ]] || n=$((n - 1))
        echo "$n" >"$0.calls"
        grep -v '^!' "$0.$n" || { sed 's/^!//' "$0.$n" >&2; exit 1; }
    """,
    "sacct": 'echo "${ACCOUNTED?Slurm accounting storage is disabled}"',
}


class Clone:
    """A folder with the batch templates and what they need, and stubs of Slurm on the PATH."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.bin, self.capsys = folder, folder / "bin", capsys
        (folder / "launch").mkdir()
        shutil.copy(ROOT / "launch/requeue.sh", folder / "launch")
        shutil.copytree(ROOT / "slurm", folder / "slurm")
        self.bin.mkdir()
        for name, text in STUBS.items():
            (self.bin / name).write_text(f"#!/usr/bin/env bash\n{text}")
            (self.bin / name).chmod(0o755)

    def template(self, text: str) -> str:
        (self.folder / "own.sh").write_text(text)
        return "own.sh"

    def submit(self, *words: str, expect: int = 0) -> str:
        """Call the command; what it printed, to stderr where it is refused."""
        sys.argv = ["submit", *words]
        with pytest.raises(SystemExit) as left:
            run_command(submit.main)
        out, err = self.capsys.readouterr()
        assert left.value.code == expect, out + err
        return err if expect == 2 else out

    def check(self, *words: str) -> dict[str, str]:
        """The list that --dry-run prints."""
        lines = self.submit(*words, "--dry-run").splitlines()
        return {line[:12].strip(): line[12:] for line in lines}

    def calls(self) -> list[str]:
        file = self.bin / "sbatch.calls"
        return file.read_text().splitlines() if file.exists() else []

    def states(self, *answers: str) -> None:
        """What squeue says, call after call."""
        for number, answer in enumerate(answers):
            (self.bin / f"squeue.{number}").write_text(answer + "\n")


@pytest.fixture
def clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Clone:
    one = Clone(tmp_path, capsys)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("PATH", f"{one.bin}:{os.environ['PATH']}")
    monkeypatch.setattr("distcv.submit.watch.SOONEST", 0.01)
    return one


# ---- Options ----


def test_directives_are_read_as_slurm_reads_them() -> None:
    """The checks would use options that Slurm ignores, and miss options that it reads."""
    text = (
        "#!/bin/bash\n\n  # words\n#SBATCH --nodes=2 -t 5:00   # a comment\n#SBATCH --requeue\n"
        "##SBATCH --nodes=9\n #SBATCH --nodes=9\n"
        '#SBATCH --comment="two words" --signal B:USR2@120\n#SBATCH -Jname\n\necho done # SBATCH\n'
    )
    assert directives(text, "x") == {
        "nodes": "2", "time": "5:00", "requeue": "", "comment": "two words",
        "signal": "B:USR2@120", "job-name": "name",
    }  # fmt: skip


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_directives_of_the_templates_are_understood(path: Path) -> None:
    """A job from a shipped template would not be told to save, or would not be requeued."""
    said = directives(path.read_text(), path.name)
    assert said["job-name"] == path.stem
    assert said.keys() >= {"nodes", "time", "output", "signal", "requeue", "open-mode"}


def test_a_directive_after_the_first_command_is_refused(clone: Clone) -> None:
    """Slurm would ignore a misplaced `#SBATCH --time`, and the job would get another limit."""
    name = clone.template("#!/bin/bash\n#SBATCH --nodes=1\nset -e\n#SBATCH --time=5\n")
    said = "error: own.sh, line 4: Slurm ignores #SBATCH after the first command (line 3): move"
    assert clone.submit(name, expect=2).startswith(said)


def test_words_of_the_command_line_win_over_directives() -> None:
    """A job with `--nodes=4` would be checked for the number of nodes in the template."""
    job = read_job(ROOT / "slurm/resnet18.sh", ["--nodes=4", "-p", "low", "--mem", "0"], [])
    assert job.nodes == 4
    assert job.options | {"partition": "low", "mem": "0", "gpus-per-node": "1"} == job.options
    assert options_in(["--exclusive", "-N2"]) == {"exclusive": "", "nodes": "2"}


@pytest.mark.parametrize(
    ("array", "numbers"),
    [("0-3", [0, 1, 2, 3]), ("7", [7]), ("1,5-7%2", [1, 5, 6, 7]), ("0-15:5%1", [0, 5, 10, 15])],
)
def test_task_numbers(array: str, numbers: list[int]) -> None:
    """An array such as `1,5-7%2` would be watched and reported with the wrong tasks."""
    assert task_numbers(array) == numbers


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("30", 1800), ("1:30", 90), ("02:00:00", 7200), ("1-0", 86400), ("2-12", 216000),
        ("1-1:01", 90060), ("1-01:01:01", 90061), ("UNLIMITED", None), ("", None),
        ("0", None), ("0:00:00", None), ("0-0", None),
    ],
)  # fmt: skip
def test_time_limits_in_all_of_slurm_s_forms(limit: str, seconds: int | None) -> None:
    """A limit such as `2-12` would be misread, and a valid job would be refused as too short."""
    assert seconds_in(limit) == seconds


@pytest.mark.parametrize(
    ("words", "path"),
    [
        ([], "slurm-12.out"),
        (["--output=logs/%x-%j.txt"], "logs/own.sh-12.txt"),
        (["--array=0-3"], "slurm-12_*.out"),
        (["--array=0-3", "--output=%x-%A_%a.out", "--job-name=s"], "s-12_*.out"),
        (["--array=0-3", "--output=%A-%j.out"], "12-*.out"),
    ],
)
def test_the_log_is_named_as_slurm_will_name_it(words: list[str], path: str, clone: Clone) -> None:
    """A user would be told to read a log file that Slurm never writes."""
    assert log_path(read_job(Path(clone.template("")), words, []), "12") == path


# ---- What is submitted ----


def test_what_is_submitted_is_what_was_checked(clone: Clone) -> None:
    """Slurm would get other options or flags than those that passed the checks."""
    out = clone.submit(
        "--nodes", "4", "slurm/mnist.sh", "--epochs", "100", "--sbatch", "--comment='a b' --mem=0",
        "--lr=0.2", "--job-name", "try", *SYNTHETIC, "--no-nesterov",
    )  # fmt: skip
    tested, submitted = clone.calls()
    words = (
        "--nodes=4 --job-name=try --comment=a b --mem=0 slurm/mnist.sh "
        "--epochs 100 --lr=0.2 --dataset synthetic --no-nesterov"
    )
    assert (tested, submitted) == (f"--test-only {words}", f"--parsable {words}")
    assert f"command     sbatch {words.replace('--comment=a b', repr('--comment=a b'))}\n" in out
    assert "runs        srun launch/multinode.sh -- --name try-%j --epochs 100" in out
    assert out.endswith(
        "submitted   job 4711\nlog         try-4711.out\nrun folder  runs/try-4711\n"
    )


def test_a_dry_run_submits_nothing_and_shows_what_was_found(clone: Clone) -> None:
    """`--dry-run` would submit the job, or hide what the checks found."""
    shown = clone.check("slurm/resnet18.sh", "--nodes", "4", *SYNTHETIC, "--partition", "low")
    assert [call.split()[0] for call in clone.calls()] == ["--test-only"]
    assert (
        shown
        | {
            "template": "slurm/resnet18.sh, job resnet18",
            "recipe": "resnet18 on synthetic, 40 epochs",
            "data": "synthetic needs no files",
            "batch": "512: 128 a process on 4 processes (4 nodes x 1)",
            "run folder": "runs/resnet18-%j, new",
            "time": "limit 02:00:00, told to save 120 s before it",
            "partition": "low is up, 4 of 4 nodes idle, limit 1:00:00",
            "sbatch": "would start at noon using 2 processors on node1",
        }
        == shown
    )


def test_each_task_of_an_array_has_its_run_folder(clone: Clone) -> None:
    """The run folders printed for an array would not be those that its tasks write."""
    out = clone.submit("slurm/seeds.sh", "--array", "2-9", *SYNTHETIC)
    assert "template    slurm/seeds.sh, job seeds, 8 tasks\n" in out
    assert "-- --seed 2 --dataset synthetic --runs-dir" in out
    assert out.endswith(
        "log         seeds-4711_*.out\n"
        "run folder  runs/seeds-4711/seed-2\nrun folder  runs/seeds-4711/seed-9\n"
    )


def test_a_cancelled_array_goes_on_in_its_own_folder(
    clone: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancelled array submitted again with RUNS_DIR would start over in a new folder."""
    monkeypatch.setenv("RUNS_DIR", "runs/seeds-5")
    out = clone.submit("slurm/seeds.sh", "--array", "2-9", *SYNTHETIC)
    assert out.endswith("run folder  runs/seeds-5/seed-2\nrun folder  runs/seeds-5/seed-9\n")


def test_the_job_ids_of_an_array_s_tasks_are_not_guessed(clone: Clone) -> None:
    """A user would look for logs and run folders under job ids that Slurm never assigned."""
    out = clone.submit("slurm/mnist.sh", "--array", "0-3", *SYNTHETIC)
    assert out.endswith("log         mnist-*.out\nrun folder  runs/mnist-*\n")


def test_a_sweep_has_no_recipe_to_check(clone: Clone) -> None:
    """A sweep could not be submitted, because its command has no recipe to check."""
    shown = clone.check("slurm/sweep.sh", "--array", "0-1", "me/project/abc")
    assert shown["recipe"].startswith("not checked")
    assert shown["runs"].endswith("--count 1 me/project/abc")


def test_a_template_that_does_not_show_its_command_is_not_run(clone: Clone) -> None:
    """A dry run would execute a user's whole batch script on the login node."""
    name = clone.template("#!/bin/bash\n# not launch/requeue.sh\ntouch ran\n")
    assert clone.check(name)["recipe"].startswith("not checked")
    assert not (clone.folder / "ran").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "128: 128 a process on 1 process (1 node x 1)"),
        (["--nodes", "3"], "128: 42 to 43 a process on 3 processes (3 nodes x 1)"),
        (["--nodes", "1-2"], "128: 64 a process on 2 processes (2 nodes x 1)"),
        (["--gpus-per-node", "h100:4", "--nodes", "2"],
         "128: 16 a process on 8 processes (2 nodes x 4)"),
        (["--gpus-per-node", "h100"], "128: 128 a process on 1 process (1 node x 1)"),
        (["--gpus-per-node", "h100:4,a100:2"],
         "128: 21 to 22 a process on 6 processes (1 node x 6)"),
        (["--sbatch", "--gres=shard:1,gpu:2"], "128: 64 a process on 2 processes (1 node x 2)"),
        (["--sbatch", "--gpus=h100:8", "--nodes", "2"],
         "128: 16 a process on 8 processes (2 nodes x 4)"),
        (["--sbatch", "-G8"], "128: 16 a process on 8 processes (1 node x 8)"),
        (["--sbatch", "-G 8 --gpus-per-task=2"], "128: 16 a process on 8 processes (1 node x 8)"),
        (["--sbatch", "--gpus-per-task=4", "--nodes", "2"],
         "128: 16 a process on 8 processes (2 nodes x 4)"),
        (["--sbatch", "-n 2 --gpus-per-task=2", "--nodes", "2"],
         "128: 32 a process on 4 processes (2 nodes x 2)"),
        (["--gradient-accumulation-steps", "4", "--nodes", "2"],
         "128 in 4 parts: 16 a process on 2 processes (2 nodes x 1)"),
    ],
)  # fmt: skip
def test_how_the_batch_is_dealt_out(words: list[str], line: str, clone: Clone) -> None:
    """A user would plan with a wrong batch per process for one of the ways to request GPUs."""
    assert clone.check("slurm/mnist.sh", *words, *SYNTHETIC)["batch"] == line


@pytest.mark.parametrize("limit", ["0", "UNLIMITED"])
def test_a_job_may_have_no_time_limit(limit: str, clone: Clone) -> None:
    """`--time UNLIMITED` would be refused as too short to save before the limit."""
    assert clone.check("slurm/mnist.sh", "--time", limit, *SYNTHETIC)["time"] == f"limit {limit}"


# ---- What is refused ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["slurm/mnits.sh"], "template slurm/mnits.sh: No such file or directory: did you mean "
         "'slurm/mnist.sh'?"),
        (["slurm/mnist.sh", "--nodez", "2"], "unknown flag '--nodez': did you mean '--nodes'?"),
        (["slurm/mnist.sh", "--epochz=2"], "unknown flag '--epochz': did you mean '--epochs'?"),
        (["slurm/mnist.sh", "--model", "gab"], "unknown model 'gab': did you mean 'gap'?"),
        (["slurm/mnist.sh", "--epochs", "0"], "--epochs 0: input should be greater than or equal"),
        (["slurm/mnist.sh", "--dataset", "mnits"], "unknown dataset 'mnits': did you mean 'mnist'"),
        (["slurm/mnist.sh", "word"], "unrecognized argument 'word'"),
        (["slurm/mnist.sh", "--batch-size", "3", "--nodes", "2", "--gpus-per-node", "2"],
         "batch_size 3 is less than 4 processes x 1 accumulation steps: raise --batch-size"),
        (["slurm/mnist.sh", "--batch-size", "99999"], "batch_size 99999 exceeds the 10000"),
        (["slurm/mnist.sh", "--time", "2"], "--time 2 leaves nothing before the signal 120 s"),
        (["slurm/mnist.sh", "--output", "logs/%x/%j"],
         "--output: Slurm makes no folders: mkdir -p logs/mnist"),
        (["slurm/mnist.sh", "--sbatch", "--error=none/e"], "--error: Slurm makes no folders"),
        (["slurm/mnist.sh", "--sbatch", "-D /tmp"], "--chdir isn't supported"),
        (["slurm/mnist.sh", "--sbatch", "--comment='a"], "--sbatch: No closing quotation"),
        (["slurm/mnist.sh", "--sbatch", "-n 4", "--nodes", "2"], "--ntasks 4: one task a node"),
        (["slurm/mnist.sh", "--sbatch", "--ntasks-per-node=2"], "--ntasks-per-node 2: one task a"),
        (["slurm/mnist.sh", "--sbatch", "-G3", "--nodes", "2"],
         "each node has to get the same number of GPUs: give --gpus-per-node"),
        (["slurm/seeds.sh", "--array", "1-x"], "--array 1-x: give task numbers such as 0-9"),
    ],
)  # fmt: skip
def test_wrong_input_gets_one_line_and_nothing_is_submitted(
    words: list[str], said: str, clone: Clone
) -> None:
    """A typo in a flag or an option would show only after hours in the queue."""
    more = [] if "--dataset" in words else SYNTHETIC
    err = clone.submit(*words, *more, expect=2)
    assert err.startswith(f"error: {said}") and err.count("\n") == 1
    assert clone.calls() == []


def test_what_slurm_refuses_is_not_submitted(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that Slurm cannot run would be submitted all the same, without Slurm's reason."""
    monkeypatch.setenv("REFUSE", "invalid partition specified: nix")
    err = clone.submit("slurm/mnist.sh", *SYNTHETIC, expect=2)
    assert err == "error: sbatch: invalid partition specified: nix\n"
    assert len(clone.calls()) == 1


def test_without_slurm_it_is_said(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without Slurm, a user would see a traceback instead of where to submit from."""
    for name in STUBS:
        (clone.bin / name).unlink()
    (clone.bin / "bash").symlink_to(shutil.which("bash") or "")
    monkeypatch.setenv("PATH", str(clone.bin))
    err = clone.submit("slurm/mnist.sh", *SYNTHETIC, expect=2)
    assert err == "error: sinfo is not on the PATH: submit from a login node of a Slurm cluster\n"


def test_another_folder_than_the_clone_is_refused(
    clone: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job submitted from outside the clone would fail when it starts, without launch/."""
    (clone.folder / "elsewhere").mkdir()
    monkeypatch.chdir(clone.folder / "elsewhere")
    err = clone.submit("../slurm/mnist.sh", *SYNTHETIC, expect=2)
    assert err.startswith(f"error: no launch/requeue.sh in {clone.folder}/elsewhere: submit from")


def test_a_template_whose_requeues_would_begin_anew_is_refused(clone: Clone) -> None:
    """Each requeue of a job without `--name` would train again from step 0."""
    text = '#!/bin/bash\n. launch/requeue.sh\nrun_or_requeue srun launch/multinode.sh -- {} "$@"\n'
    named = clone.template(text.format('--name "a-$SLURM_JOB_ID"'))
    assert clone.check(named, *SYNTHETIC)["run folder"] == "runs/a-%j, new"
    said = clone.submit(clone.template(text.format("")), *SYNTHETIC, expect=2)
    assert said.startswith("error: own.sh: no --name, so each requeue would begin a new run: put")
    assert not clone.calls()[1:]


def test_a_template_that_fails_is_refused_with_its_reason(clone: Clone) -> None:
    """An error in a user's own template would show only when the job starts."""
    name = clone.template("#!/bin/bash\nset -u\necho $NONE\n. launch/requeue.sh\n")
    err = clone.submit(name, expect=2)
    assert err.startswith("error: own.sh doesn't come to launch/requeue.sh: ")
    assert "NONE: unbound variable" in err


@pytest.mark.usefixtures("mnist")
def test_the_data_must_lie_in_the_cache_whole(clone: Clone, data_dir: Path) -> None:
    """A job would wait in the queue and then fail on a node that cannot download the data."""
    err = clone.submit("slurm/mnist.sh", expect=2)
    remedy = "python -m distcv.data --dataset mnist --data-dir data"
    assert err == f"error: mnist is not in data/distcv: {remedy}\n"
    shown = clone.check("slurm/mnist.sh", "--data-dir", str(data_dir))
    assert shown["data"] == f"mnist in {data_dir}/distcv, verified"
    shutil.copytree(data_dir / "distcv", "data/distcv", ignore=lambda *_: ["cifar10.uint8"])
    with Path("data/distcv/mnist.uint8").open("r+b") as file:
        file.write(b"\x01")
    err = clone.submit("slurm/mnist.sh", expect=2)
    assert "the bytes of train_images are damaged: python -m distcv.data --dataset mnist" in err


def test_a_run_folder_that_exists_is_resumed_or_refused(clone: Clone) -> None:
    """A user would learn only after the queue that the run folder belongs to another recipe."""
    words = ["slurm/mnist.sh", *SYNTHETIC, "--name", "mine"]
    assert clone.check(*words)["run folder"] == "runs/mine, new"
    folder = clone.folder / "runs/mine"
    folder.mkdir(parents=True)
    recipe = load_recipe("gap").model_copy(update={"dataset": "synthetic"})
    (folder / "config.yaml").write_text(recipe.to_yaml())
    (folder / "metrics.jsonl").write_text('{"event": "train", "step": 40, "epoch": 0.5}\n')
    assert clone.check(*words)["run folder"] == (
        "runs/mine exists, the run resumes (newest step: 40)"
    )
    assert "was started with lr 0.1, now it is 0.5" in clone.submit(*words, "--lr", "0.5", expect=2)
    (folder / "result.json").write_text("{}")
    assert "is finished" in clone.check(*words)["run folder"]


# ---- Watching ----

QUEUED = "4711|PENDING|Resources||0|"
RUNNING = "4711|RUNNING|None|node[1-2]|0|"


def finished_run(folder: Path, accuracy: float = 98.5, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    recipe = load_recipe("gap").model_copy(update={"dataset": "synthetic", "seed": seed})
    (folder / "config.yaml").write_text(recipe.to_yaml())
    rows: list[dict[str, object]] = [
        {"event": "train", "step": 20, "epoch": 0.25, "loss": 1.5, "accuracy": 50.0},
        {"event": "epoch", "step": 78, "epoch": 1.0, "test_loss": 0.25, "test_accuracy": 98.5},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = {"test_accuracy": accuracy, "seconds": 3.0, "commit": None}
    (folder / "result.json").write_text(json.dumps(result))


def watched(out: str) -> list[str]:
    """What was printed after the submission, without the times of the day."""
    lines = out[out.index("run folder  runs/mnist-4711\n") :].splitlines()[1:]
    return [line[10:] if line[2:3] == ":" else line for line in lines]


def test_a_job_is_followed_through_a_requeue_to_its_end(clone: Clone) -> None:
    """`--watch` would stop at a requeue or a short outage of Slurm, and miss the result."""
    finished_run(clone.folder / "runs/mnist-4711")
    clone.states(
        QUEUED, QUEUED, RUNNING, RUNNING,
        "!slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "4711|PENDING|BeginTime||1|", "4711|RUNNING|None|node2|1|", "4711|COMPLETED|None|node2|1|",
    )  # fmt: skip
    out = clone.submit("slurm/mnist.sh", *SYNTHETIC, "--watch")
    assert watched(out) == [
        "PENDING (Resources)",
        "step 78  epoch 1.00  test loss 0.2500  accuracy 98.50 %",
        "RUNNING on node[1-2]",
        "squeue: slurm_load_jobs error: Unable to contact slurm controller (connect failure); "
        "asking again",
        "PENDING (BeginTime), restart 1",
        "RUNNING on node2, restart 1",
        "COMPLETED on node2, restart 1",
        "test accuracy 98.50 %, result in runs/mnist-4711",
    ]


def test_figures_are_shown_when_they_are_new(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--watch` would print the same figures again and again, or an empty line after a resume."""
    figures = iter(["step 20", "step 20", "", "step 40"])  # "" while a resumed run cuts its rows
    monkeypatch.setattr("distcv.submit.watch.newest", lambda folder: next(figures))
    clone.states(RUNNING, RUNNING, RUNNING, RUNNING, "4711|COMPLETED|None|node1|0|")
    out = clone.submit("slurm/mnist.sh", *SYNTHETIC, "--watch")
    assert watched(out)[1:-1] == ["step 20", "step 40"]


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"])
def test_a_job_that_does_not_complete_gives_exit_code_1(state: str, clone: Clone) -> None:
    """A script that waits for `--watch` would take a failed job for a completed one."""
    clone.states(RUNNING, f"4711|{state}|NonZeroExitCode|node1|0|")
    out = clone.submit("slurm/mnist.sh", *SYNTHETIC, "--watch", expect=1)
    assert watched(out)[-1] == f"{state} on node1"


@pytest.mark.parametrize(
    ("accounted", "code"), [("COMPLETED", 0), ("CANCELLED by 0", 1), (None, 1)]
)
def test_a_job_that_squeue_has_forgotten_is_looked_up_in_the_accounting(
    accounted: str | None, code: int, clone: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--watch` would never end, or report a wrong state, once squeue has purged the job."""
    if accounted:
        monkeypatch.setenv("ACCOUNTED", accounted)
    clone.states(RUNNING, "!slurm_load_jobs error: Invalid job id specified")
    out = clone.submit("slurm/mnist.sh", *SYNTHETIC, "--watch", expect=code)
    assert watched(out) == ["RUNNING on node[1-2]", (accounted or "UNKNOWN").split()[0]]


def test_of_an_array_the_states_are_counted_and_the_results_shown(clone: Clone) -> None:
    """A user who watches an array would see wrong task counts, or no mean over its seeds."""
    for seed, accuracy in enumerate((98.0, 99.0)):
        finished_run(clone.folder / f"runs/seeds-4711/seed-{seed}", accuracy, seed)

    def tasks(*states: str) -> str:
        return "\n".join(f"4711_{i}|{state}|None|node1|0|" for i, state in enumerate(states))

    clone.states(
        tasks("PENDING", "PENDING"),
        tasks("RUNNING", "PENDING"),
        tasks("COMPLETED", "RUNNING"),
        tasks("COMPLETED", "RUNNING").splitlines()[1],  # the record of the first is purged
        tasks("COMPLETED", "COMPLETED").splitlines()[1],
    )
    out = clone.submit("slurm/seeds.sh", "--array=0-1", *SYNTHETIC, "--watch")
    *states, _, row = out[out.index("runs/seeds-4711/seed-1\n") :].splitlines()[1:]
    assert [line[10:] for line in states] == [
        "2 PENDING",
        "1 PENDING, 1 RUNNING",
        "1 COMPLETED, 1 RUNNING",
        "2 COMPLETED",
    ]
    assert row.split() == "gap synthetic 2 98.50 ± 0.71 98.00 99.00 3.0".split()


def test_the_only_result_of_an_array_is_found_in_its_own_folder(clone: Clone) -> None:
    """The only finished task of an array would be reported with the folder of another task."""
    finished_run(clone.folder / "runs/seeds-4711/seed-1", 99.0, 1)
    clone.states("4711_0|FAILED|None|node1|0|\n4711_1|COMPLETED|None|node1|0|")
    out = clone.submit("slurm/seeds.sh", "--array=0-1", *SYNTHETIC, "--watch", expect=1)
    assert out.endswith("test accuracy 99.00 %, result in runs/seeds-4711/seed-1\n")


def test_ctrl_c_ends_the_watching_only_and_a_terminal_sees_figures_in_place(clone: Clone) -> None:
    """After Ctrl-C a user would not know that the job still runs, or how to cancel it."""
    finished_run(clone.folder / "runs/mnist-4711")
    clone.states(RUNNING)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    words = [sys.executable, "-m", "distcv.submit", "slurm/mnist.sh", *SYNTHETIC, "--watch"]
    process = subprocess.Popen(words, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen = b""

    def read_until(word: bytes) -> None:
        nonlocal seen
        while word not in seen:
            assert select.select([ours], [], [], 20)[0], seen
            seen += os.read(ours, 1000)

    read_until(b"step 78")
    assert b"RUNNING on node[1-2]" in seen
    assert seen[: seen.index(b"step 78")].endswith(b"\r"), "drawn where it can be overwritten"
    process.send_signal(signal.SIGINT)
    read_until(b"would end it")
    assert b"watching ended, job 4711 goes on: scancel 4711 would end it" in seen
    assert process.wait(timeout=20) == 130
    os.close(ours)


# ---- The command ----


@pytest.mark.parametrize("words", [["--help"], ["slurm/mnist.sh", *SYNTHETIC, "--watch"]])
def test_no_torch_is_loaded(words: list[str], clone: Clone) -> None:
    """Each submission on a login node would take the seconds that an import of PyTorch takes."""
    clone.states("4711|COMPLETED|None|node1|0|")
    code = (
        "import atexit, os, sys; from distcv.submit.__main__ import command\n"
        "atexit.register(lambda: 'torch' in sys.modules and os._exit(9)); command()"
    )
    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, timeout=60)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_a_training_on_two_nodes_of_a_real_cluster(cluster: Cluster, tmp_path: Path) -> None:
    """On a real cluster, a job on two nodes could not be submitted and followed to its result."""
    for name in ("launch", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "PATH": path}
    base = [sys.executable, "-m", "distcv.submit", "slurm/mnist.sh", *SYNTHETIC]

    with pytest.raises(AssertionError, match=r"error: sbatch: .* configuration is not available"):
        cluster.run(*base, "--nodes", "3", cwd=tmp_path, **env)
    assert cluster.run("squeue", "-h") == "", "nothing was submitted"

    out = cluster.run(
        *base, "--nodes", "2", "--max-steps", "30", "--log-every", "5", "--watch",
        cwd=tmp_path, **env,
    )  # fmt: skip
    job = out.split("submitted   job ")[1].split()[0]
    assert "batch       128: 64 a process on 2 processes (2 nodes x 1)\n" in out
    assert "debug is up, 2 of 2 nodes idle" in out
    assert "  RUNNING on node[1-2]\n" in out and "  COMPLETED on node[1-2]\n" in out
    result = json.loads((tmp_path / f"runs/mnist-{job}/result.json").read_text())
    assert result["processes"] == 2 and result["steps"] == 30
    last = f"test accuracy {result['test_accuracy']:.2f} %, result in runs/mnist-{job}\n"
    assert out.endswith(last)
    assert "on 2 nodes" in (tmp_path / f"mnist-{job}.out").read_text()
