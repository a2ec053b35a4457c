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

SHORT = ["--model", "gap", "--max-steps", "30", "--log-every", "10"]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, data_dir: Path, mnist: object, cifar10: object
) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("runs"), data_dir)
    yield runs
    runs.end()


@pytest.fixture(scope="module")
def short(runs: Runs) -> str:
    """A short finished run, started as a user does, and what it printed."""
    return runs.run("short", *SHORT, command=TRAIN)


def test_run_folder_holds_everything(runs: Runs, short: str) -> None:
    folder = runs.folder / "short"
    result = runs.result("short")
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
    steps = [row["step"] for row in runs.rows("short") if row["event"] == "train"]
    assert steps == [10, 20, 30]
    last = runs.rows("short")[-1]
    assert last["event"] == "epoch" and last["test_accuracy"] == result["test_accuracy"]
    assert last["samples"] == 30 * 128
    assert checkpoint.steps(folder / "checkpoints") == [30]
    assert "test accuracy" in short and "epoch" in short and "\x1b" not in short


def test_the_run_s_own_config_repeats_it_bit_for_bit(runs: Runs, short: str) -> None:
    runs.run("again", "--recipe", str(runs.folder / "short/config.yaml"), "--log-every", "10")
    assert runs.learned("again") == runs.learned("short")
    assert runs.untimed_rows("again") == runs.untimed_rows("short")


def test_another_seed_is_another_run(runs: Runs, short: str) -> None:
    runs.run("seed1", *SHORT, "--seed", "1")
    assert runs.learned("seed1") != runs.learned("short")


@pytest.mark.parametrize(
    ("precision", "instructions"),
    [("fp32", "fpu"), ("bf16", "avx512bw"), ("fp16", "avx512_fp16")],
)
def test_a_precision_without_instructions_is_told_of(
    runs: Runs, precision: str, instructions: str
) -> None:
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    if "fpu" not in flags or "avx_ne_convert" in flags or torch.accelerator.is_available():
        pytest.skip("only x86 names its instructions so, and some computes both without AVX-512")
    short = ["--model", "gap", "--dataset", "synthetic", "--max-steps", "1"]
    out = runs.run(f"in-{precision}", *short, "--precision", precision)
    assert (f"no instructions for {precision}" in out) == (instructions not in flags)


def test_a_finished_run_is_not_trained_again(runs: Runs, short: str) -> None:
    before = (runs.folder / "short/result.json").read_bytes()
    assert "finished" in runs.run("short", *SHORT)
    assert (runs.folder / "short/result.json").read_bytes() == before


def test_a_run_folder_of_another_recipe_is_refused(runs: Runs, short: str) -> None:
    said = runs.run("short", *SHORT, "--lr", "0.05", expect=2)
    assert said.count("\n") == 1 and "lr 0.1, now it is 0.05" in said


HARD = [
    "--model", "gap", "--epochs", "1", "--max-steps", "120", "--log-every", "20",
    "--checkpoint-every", "15", "--dropout", "0.1", "--ema-decay", "0.9", "--rotate", "10",
    "--gradient-accumulation-steps", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(runs: Runs) -> None:
    runs.run("whole", *HARD)


def kill_when(runs: Runs, name: str, process: Process, step: int) -> None:
    """SIGKILL a run once it has logged this step, which is not one of its checkpoints'."""
    runs.wait_for_step(name, step, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it should have been at work still"


@pytest.mark.slow
def test_killed_and_started_again_it_ends_bit_identical(runs: Runs, uninterrupted: None) -> None:
    for step in (20, 40, 80):
        kill_when(runs, "killed", runs.start("killed", *HARD), step)
    assert "resuming after step" in runs.run("killed", *HARD)
    assert runs.learned("killed") == runs.learned("whole")
    assert "ema.safetensors" in runs.learned("killed")
    assert runs.untimed_rows("killed") == runs.untimed_rows("whole"), "each row once"
    starts = json.loads((runs.folder / "killed/environment.json").read_text())["starts"]
    assert len(starts) == 4


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGUSR2", "file"])
def test_asked_to_stop_it_saves_and_goes_on_later(
    how: str, runs: Runs, uninterrupted: None
) -> None:
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
    assert runs.learned(how) == runs.learned("whole")
    assert runs.untimed_rows(how) == runs.untimed_rows("whole")


def test_a_loss_that_is_not_a_number_ends_the_run(runs: Runs) -> None:
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
    asked = tmp_path / "asked"
    command = stopped_in(then, asked)
    flags = ["--model", "gap", "--max-steps", "1"]
    said = runs.run(moment, *flags, command=command, expect=75, DISTCV_STOP_FILE=str(asked))
    assert asked.read_text() == "stopped after step 1\n" and "epoch" not in said.split("folder")[1]
    assert [row["event"] for row in runs.rows(moment)] == ["train"]
    assert "test accuracy" in runs.run(moment, *flags)
    runs.run("one step", *flags)
    assert runs.learned(moment) == runs.learned("one step")
    assert runs.untimed_rows(moment) == runs.untimed_rows("one step")


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(runs: Runs, uninterrupted: None) -> None:
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
    assert runs.learned("damaged") == runs.learned("whole")


def test_a_second_process_on_the_same_run_folder_is_refused(runs: Runs) -> None:
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
def test_processes_leave_together_when_the_input_is_wrong(runs: Runs, short: str) -> None:
    launch = [*launched(2), "-m", "distcv.train"]
    said = runs.run("short", *SHORT, "--lr", "0.05", command=launch, expect=1)
    assert said.count("error: run folder") == 1
    # The launcher may end the second one before it leaves by itself.
    assert "exitcode  : 2" in said and "SIGABRT" not in said


@pytest.mark.slow
def test_plain_torchrun_works_too(runs: Runs) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    runs.run("torchrun", *SHORT, command=[*command, "-m", "distcv.train"])
    assert runs.result("torchrun")["processes"] == 2


@pytest.mark.slow
def test_resnet18_on_cifar10_learns_in_60_steps(runs: Runs) -> None:
    flags = ["--model", "resnet18", "--max-steps", "60", "--batch-size", "64"]
    flags += ["--precision", "fp32", "--log-every", "15"]
    process = runs.start("resnet18", *flags, command=TRAIN, OMP_NUM_THREADS="2")
    runs.wait_for_step("resnet18", 60, process)
    process.send_signal(signal.SIGTERM)  # its evaluation takes as long as the steps
    out, err = process.communicate(timeout=200)
    assert process.returncode == 75, out + err
    assert "resnet18 (11,173,962 parameters) on cifar10" in out
    losses = [row["loss"] for row in runs.rows("resnet18") if row["event"] == "train"]
    assert losses[-1] < losses[0] - 0.15, losses


def test_half_precision_follows_full_precision(runs: Runs) -> None:
    # Without an instruction for it a CPU takes ten times as long in bf16: a small data set.
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
    flags = [*SHORT, "--lr", "0.01"]  # rounding grew to 2.6 % in 30 steps at the recipe's 0.1
    runs.run("compiled", *flags, "--compile", command=TRAIN)
    runs.run("eager", *flags)
    compiled, eager = (
        [row["loss"] for row in runs.rows(name) if row["event"] == "train"]
        for name in ("compiled", "eager")
    )
    assert compiled == pytest.approx(eager, rel=1e-2)


def test_synthetic_data_needs_no_file(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs", tmp_path / "nothing")
    runs.run("s", *SHORT[:2], "--dataset", "synthetic", "--max-steps", "60", "--warmup", "0.1")
    assert runs.result("s")["test_accuracy"] > 50


def test_trackers_offline_without_network_or_key(runs: Runs) -> None:
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


def test_a_dead_wandb_server_does_not_end_the_training(runs: Runs) -> None:
    said = runs.run(
        "dead", *SHORT, "--track", "wandb", WANDB_API_KEY="0" * 40,
        WANDB_BASE_URL="http://127.0.0.1:9", HOME=str(runs.folder / "home"),
    )  # fmt: skip
    assert "going on offline" in said
    assert list((runs.folder / "dead").glob("wandb/offline-run-*/*.wandb"))
    assert runs.result("dead")["steps"] == 30


def test_threads_are_chosen_unless_the_user_has() -> None:
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
