"""Whole runs as processes of their own, on real data."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distcv import checkpoint
from support.runs import ROOT, TRAIN, Process, Runs, launched, stopped_in
from support.shared import made_once, shared_folder

SHORT = ["--model", "gap", "--max-steps", "30", "--log-every", "10"]


@pytest.fixture
def runs(tmp_path: Path, data_dir: Path, mnist: object) -> Iterator[Runs]:
    runs = Runs(tmp_path / "runs", data_dir)
    yield runs
    runs.end()


@pytest.fixture(scope="module")
def short_runs(
    tmp_path_factory: pytest.TempPathFactory, data_dir: Path, mnist: object
) -> Iterator[Runs]:
    """Where the run `short` is."""
    runs = Runs(tmp_path_factory.mktemp("runs"), data_dir)
    yield runs
    runs.end()


@pytest.fixture(scope="module")
def short(short_runs: Runs) -> str:
    """A short finished run, started as a user does, and what it printed."""
    return short_runs.run("short", *SHORT, command=TRAIN)


@pytest.mark.slow
def test_run_folder_holds_everything(short_runs: Runs, short: str) -> None:
    """A run folder would lack results, versions, metrics or the checkpoint that users rely on."""
    folder = short_runs.folder / "short"
    result = short_runs.result("short")
    promised = (
        "model params dataset seed epochs steps test_accuracy test_loss best_test_accuracy "
        "best_epoch seconds images_per_second device processes strategy commit config_sha256"
    ).split()
    assert set(promised) <= set(result)
    assert result["params"] == 9490 and result["steps"] == 30 and result["processes"] == 1
    assert 10 < result["test_accuracy"] <= 100, "percent"
    assert result["epochs"] == pytest.approx(30 / 468)
    by_class = result["class_accuracy"]
    assert list(by_class) == list("0123456789")
    environment = json.loads((folder / "environment.json").read_text())
    assert len(environment["starts"]) == 1
    assert environment["starts"][0]["versions"]["torch"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert result["commit"].removesuffix("-dirty") == head.stdout.strip()
    steps = [row["step"] for row in short_runs.rows("short") if row["event"] == "train"]
    assert steps == [10, 20, 30]
    last = short_runs.rows("short")[-1]
    assert last["event"] == "epoch" and last["test_accuracy"] == result["test_accuracy"]
    assert last["samples"] == 30 * 128
    assert checkpoint.steps(folder / "checkpoints") == [30]
    assert "test accuracy" in short and "epoch" in short and "\x1b" not in short


@pytest.mark.slow
def test_the_run_s_own_config_repeats_it_bit_for_bit(short_runs: Runs, short: str) -> None:
    """A run's own config.yaml would not reproduce its weights."""
    short_runs.run(
        "again", "--recipe", str(short_runs.folder / "short/config.yaml"), "--log-every", "10"
    )
    assert short_runs.learned("again") == short_runs.learned("short")
    assert short_runs.untimed_rows("again") == short_runs.untimed_rows("short")


@pytest.mark.slow
def test_another_seed_is_another_run(short_runs: Runs, short: str) -> None:
    """`--seed` would be ignored, and a mean over seeds would count one run several times."""
    short_runs.run("seed1", *SHORT, "--seed", "1")
    assert short_runs.learned("seed1") != short_runs.learned("short")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "instructions"),
    [("fp32", "fpu"), ("bf16", "avx512bw"), ("fp16", "avx512_fp16")],
)
def test_a_precision_without_instructions_is_told_of(
    runs: Runs, precision: str, instructions: str
) -> None:
    """Users would not learn that their CPU is slow in a precision, or be warned without cause."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    if "fpu" not in flags or "avx_ne_convert" in flags or torch.accelerator.is_available():
        pytest.skip("only x86 names its instructions so, and some computes both without AVX-512")
    short = ["--model", "gap", "--dataset", "synthetic", "--max-steps", "1"]
    out = runs.run(f"in-{precision}", *short, "--precision", precision)
    assert (f"no instructions for {precision}" in out) == (instructions not in flags)


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(short_runs: Runs, short: str) -> None:
    """A repeated command would train a finished run again and overwrite its result."""
    before = (short_runs.folder / "short/result.json").read_bytes()
    assert "finished" in short_runs.run("short", *SHORT)
    assert (short_runs.folder / "short/result.json").read_bytes() == before


@pytest.mark.slow
def test_a_run_folder_of_another_recipe_is_refused(short_runs: Runs, short: str) -> None:
    """A changed flag would be ignored or mixed into a run that another recipe has begun."""
    said = short_runs.run("short", *SHORT, "--lr", "0.05", expect=2)
    assert said.count("\n") == 1 and "lr 0.1, now it is 0.05" in said


HARD = [
    "--model", "gap", "--batch-size", "32", "--max-steps", "120", "--log-every", "20",
    "--checkpoint-every", "15", "--dropout", "0.1", "--ema-decay", "0.9", "--rotate", "10",
    "--gradient-accumulation-steps", "2",
]  # fmt: skip


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, data_dir: Path, mnist: object) -> Runs:
    """A run `whole` with these flags that nothing has touched."""
    runs = Runs(shared_folder(tmp_path_factory) / "train", data_dir.resolve())
    made_once(runs.folder, lambda _: runs.run("whole", *HARD))
    return runs


def kill_when(runs: Runs, name: str, process: Process, step: int) -> None:
    """SIGKILL a run once it has logged this step, which is not one of its checkpoints'."""
    runs.wait_for_step(name, step, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it should have been at work still"


@pytest.mark.slow
def test_killed_and_started_again_it_ends_bit_identical(runs: Runs, uninterrupted: Runs) -> None:
    """A run that is killed and resumed would reach other weights, or log steps twice."""
    for step in (20, 40, 80):
        kill_when(runs, "killed", runs.start("killed", *HARD), step)
    assert "resuming after step" in runs.run("killed", *HARD)
    assert runs.learned("killed") == uninterrupted.learned("whole")
    assert "ema.safetensors" in runs.learned("killed")
    assert runs.untimed_rows("killed") == uninterrupted.untimed_rows("whole"), "each row once"
    starts = json.loads((runs.folder / "killed/environment.json").read_text())["starts"]
    assert len(starts) == 4


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGUSR2", "file"])
def test_asked_to_stop_it_saves_and_goes_on_later(
    how: str, runs: Runs, uninterrupted: Runs
) -> None:
    """A run stopped by a signal or a STOP file would fail, or resume to other weights."""
    process = runs.start(how, *HARD, command=TRAIN if how == "SIGTERM" else None)
    runs.wait_for_step(how, 1, process)
    if how == "file":
        (runs.folder / how / "STOP").touch()
    else:
        process.send_signal(getattr(signal, how))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    assert f"--name {how}" in out and "Traceback" not in err
    runs.run(how, *HARD)
    assert runs.learned(how) == uninterrupted.learned("whole")
    assert runs.untimed_rows(how) == uninterrupted.untimed_rows("whole")


def test_a_loss_that_is_not_a_number_ends_the_run(runs: Runs) -> None:
    """A diverged run would train on for hours, or save checkpoints with broken weights."""
    flags = ["--model", "lighter", "--lr", "1e9", "--checkpoint-every", "1", "--max-steps", "9"]
    said = runs.run("diverged", *flags, expect=2)
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    step = int(re.findall(r"no finite loss and gradient .* by step (\d+), lr", line)[0])
    assert all(s < step for s in checkpoint.steps(runs.folder / "diverged/checkpoints"))
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "then"),
    [("at its last step", "train_epoch"), ("in its evaluation", "shared_statistics")],
)
def test_a_stop_at_an_epoch_s_end_leaves_the_evaluation_for_later(
    moment: str, then: str, runs: Runs, tmp_path: Path
) -> None:
    """A stop at the end of an epoch would wait for an evaluation, or skip it for good."""
    asked = tmp_path / "asked"
    command = stopped_in(then, asked)
    flags = ["--model", "gap", "--max-steps", "1"]
    said = runs.run(moment, *flags, command=command, expect=75, DISTCV_STOP_FILE=str(asked))
    assert asked.read_text() == "stopped after step 1\n"
    assert not re.search(r"^epoch ", said, re.MULTILINE), "no evaluation has ended"
    assert [row["event"] for row in runs.rows(moment)] == ["train"]
    assert "test accuracy" in runs.run(moment, *flags)
    runs.run("one step", *flags)
    assert runs.learned(moment) == runs.learned("one step")
    assert runs.untimed_rows(moment) == runs.untimed_rows("one step")


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(runs: Runs, uninterrupted: Runs) -> None:
    """One damaged checkpoint would keep a run from resuming, or be loaded as it is."""
    kill_when(runs, "damaged", runs.start("damaged", *HARD), 60)
    folder = runs.folder / "damaged/checkpoints"
    newest = folder / f"step-{checkpoint.steps(folder)[-1]:08d}"
    with (newest / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 255]))
    said = runs.run("damaged", *HARD)
    assert f"checkpoint {newest.name} is damaged" in said
    assert (folder / f"bad-{newest.name}").is_dir()
    assert runs.learned("damaged") == uninterrupted.learned("whole")


def test_a_second_process_on_the_same_run_folder_is_refused(runs: Runs) -> None:
    """Two processes would write to one run folder and corrupt the run."""
    first = runs.start("shared", *SHORT[:2], "--max-steps", "400")
    try:
        lock = runs.folder / "shared/config.yaml"
        while not lock.exists() and first.poll() is None:
            time.sleep(0.02)
        said = runs.run("shared", *SHORT[:2], "--max-steps", "400", expect=2)
        assert "in use by another process" in said and said.count("\n") == 1
    finally:
        first.kill()
        first.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_evaluate_every_sample_once(runs: Runs, processes: int) -> None:
    """Test accuracy on several processes would count some samples twice or not at all."""
    said = runs.together(f"p{processes}", processes, *SHORT)
    result = runs.result(f"p{processes}")
    assert result["processes"] == processes and result["strategy"] == "ddp"
    assert f"{processes} processes on 1 node" in said
    # Of exactly 10,000 samples, accuracy in percent is a whole number of hundredths.
    assert round(result["test_accuracy"] * 100, 6) == round(result["test_accuracy"] * 100)
    counts = {"0": 980, "1": 1135, "2": 1032, "3": 1010, "4": 982,
              "5": 892, "6": 958, "7": 1028, "8": 974, "9": 1009}  # fmt: skip
    right = sum(result["class_accuracy"][k] * n / 100 for k, n in counts.items())
    assert right == pytest.approx(100 * result["test_accuracy"])


@pytest.mark.slow
def test_processes_leave_together_when_the_input_is_wrong(short_runs: Runs, short: str) -> None:
    """A wrong flag under a launcher would hang or abort, or repeat its error for every rank."""
    launch = [*launched(2), "-m", "distcv.train"]
    said = short_runs.run("short", *SHORT, "--lr", "0.05", command=launch, expect=1)
    assert said.count("error: run folder") == 1
    # The launcher may end the second one before it leaves by itself.
    assert "exitcode  : 2" in said and "SIGABRT" not in said


@pytest.mark.slow
def test_plain_torchrun_works_too(runs: Runs) -> None:
    """Users of torchrun could not train on several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    runs.run("torchrun", *SHORT, command=[*command, "-m", "distcv.train"])
    assert runs.result("torchrun")["processes"] == 2


@pytest.mark.slow
def test_resnet18_on_cifar10_learns_in_20_steps(runs: Runs, cifar10: object) -> None:
    """Users would train ResNet-18 on CIFAR-10 for hours and it would not learn."""
    flags = ["--model", "resnet18", "--max-steps", "20", "--batch-size", "16"]
    flags += ["--precision", "fp32", "--log-every", "5"]
    process = runs.start("resnet18", *flags, command=TRAIN)
    runs.wait_for_step("resnet18", 20, process)
    process.send_signal(signal.SIGTERM)  # its evaluation takes as long as the steps
    out, err = process.communicate(timeout=200)
    assert process.returncode == 75, out + err
    assert "resnet18 (11,173,962 parameters) on cifar10" in out
    losses = [row["loss"] for row in runs.rows("resnet18") if row["event"] == "train"]
    assert losses[-1] < losses[0] - 0.15, losses


@pytest.mark.slow
def test_half_precision_follows_full_precision(runs: Runs) -> None:
    # Without an instruction for it a CPU takes ten times as long in bf16: a small data set.
    """Training in bf16 would reach other losses than fp32, or silently compute in fp32."""
    flags = ["--model", "gap", "--dataset", "synthetic", "--max-steps", "15", "--log-every", "5"]
    for precision in ("fp32", "bf16"):
        runs.run(precision, *flags, "--precision", precision)
    full, half = (
        [row["loss"] for row in runs.rows(name) if row["event"] == "train"]
        for name in ("fp32", "bf16")
    )
    assert half != full
    assert half == pytest.approx(full, rel=2e-2)  # 0.2 %


@pytest.mark.slow
def test_compiled_it_learns_the_same(runs: Runs) -> None:
    """A run with --compile would follow another loss curve than one without."""
    flags = [*SHORT, "--lr", "0.01"]  # rounding grew to 2.6 % in 30 steps at the recipe's 0.1
    runs.run("compiled", *flags, "--compile", command=TRAIN)
    runs.run("eager", *flags)
    compiled, eager = (
        [row["loss"] for row in runs.rows(name) if row["event"] == "train"]
        for name in ("compiled", "eager")
    )
    assert compiled == pytest.approx(eager, rel=1e-2)


@pytest.mark.slow
def test_synthetic_data_needs_no_file(tmp_path: Path) -> None:
    """Users without any data files could not try a training."""
    runs = Runs(tmp_path / "runs", tmp_path / "nothing")
    runs.run("s", *SHORT[:2], "--dataset", "synthetic", "--max-steps", "60", "--warmup", "0.1")
    assert runs.result("s")["test_accuracy"] > 50


@pytest.mark.slow
def test_trackers_offline_without_network_or_key(runs: Runs) -> None:
    """Without network or key, a run would fail or keep no W&B and TensorBoard logs."""
    said = runs.run(
        "tracked", *SHORT, "--track", "wandb", "tensorboard",
        WANDB_API_KEY="", WANDB_BASE_URL="http://127.0.0.1:9", HOME=str(runs.folder / "home"),
    )  # fmt: skip
    assert "Traceback" not in said
    folder = runs.folder / "tracked"
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    events = list(folder.glob("tensorboard/**/events.out.tfevents.*"))
    assert len(events) == 1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(events[0].parent))
    accumulator.Reload()
    assert [e.step for e in accumulator.Scalars("train/loss")] == [10, 20, 30]
    accuracy = accumulator.Scalars("val/accuracy")[0].value
    assert accuracy == pytest.approx(runs.result("tracked")["test_accuracy"])


@pytest.mark.slow
def test_a_dead_wandb_server_does_not_end_the_training(runs: Runs) -> None:
    """A W&B server that does not answer would end the training, or its rows would be lost."""
    said = runs.run(
        "dead", *SHORT, "--track", "wandb", WANDB_API_KEY="0" * 40,
        WANDB_BASE_URL="http://127.0.0.1:9", HOME=str(runs.folder / "home"),
    )  # fmt: skip
    assert "going on offline" in said
    assert list((runs.folder / "dead").glob("wandb/offline-run-*/*.wandb"))
    assert runs.result("dead")["steps"] == 30


def test_threads_are_chosen_unless_the_user_has() -> None:
    """A user's thread settings would be overwritten, or ranks would run too many threads."""
    code = (
        "import os; from distcv.environment import *; set_thread_environment();"
        "print(*map(os.environ.get, ['OMP_NUM_THREADS', 'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT']));"
        "print(available_cores())"
    )

    def chosen(**env: str) -> list[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env=clean | env,
            capture_output=True,
            text=True,
            check=True,
        )
        return ran.stdout.split()

    threads, *waiting, cores = chosen()
    assert threads == cores and waiting == ["PASSIVE", "1000"]
    assert chosen(LOCAL_WORLD_SIZE=cores)[0] == "1"
    assert chosen(LOCAL_WORLD_SIZE="64")[0] == "1"
    assert chosen(OMP_NUM_THREADS="3", OMP_WAIT_POLICY="ACTIVE")[:3] == ["3", "ACTIVE", "None"]
    assert chosen(GOMP_SPINCOUNT="100")[1:3] == ["None", "100"]


@pytest.mark.slow
@pytest.mark.parametrize("threads", [None, "3"])
def test_threads_of_a_launcher_are_not_taken_for_the_user_s(
    threads: str | None, tmp_path: Path
) -> None:
    """Under accelerate launch each process would use one thread and leave cores idle."""
    script = tmp_path / "show.py"
    script.write_text(
        "import os; from distcv.environment import *; set_thread_environment();"
        "print(f'threads {os.environ[\"OMP_NUM_THREADS\"]} of {available_cores()};')"
    )
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    for processes in (1, 2):
        ran = subprocess.run(
            [*launched(processes), str(script)], capture_output=True, text=True, check=True,
            env=env | ({"OMP_NUM_THREADS": threads} if threads else {}),
        )  # fmt: skip
        # Two processes may write at once, so lines are no guide.
        shown = re.findall(r"threads (\d+) of (\d+);", ran.stdout)
        assert len(shown) == processes
        for chosen, cores in shown:
            assert chosen == (threads or str(max(1, int(cores) // processes)))
