"""The script for a GPU: all its steps, tiny, on a CPU; what it does with a step that fails."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

import gpu
from gpu import FULL, MNIST, SMALL, Step
from support.runs import ONE_THREAD, ROOT


@pytest.mark.slow
def test_the_gpu_measurements_are_ready_to_run(
    tmp_path: Path, data_dir: Path, mnist: object
) -> None:
    """Ten minutes on a GPU would be lost to a script whose steps do not run."""
    out = tmp_path / "gpu.json"
    folders = ["--out", str(out), "--data-dir", str(data_dir)]
    ran = subprocess.run(
        [sys.executable, str(ROOT / "tests/gpu.py"), "--small", *folders],
        capture_output=True, text=True, env=os.environ | ONE_THREAD, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    record = json.loads(out.read_text())
    assert record["versions"]["torch"] and record["cpu"]
    assert list(record["steps"]) == [step.name for step in gpu.plan(SMALL)]
    for name, row in record["steps"].items():
        figures = row["figures"]
        if "trainings" in figures:
            assert figures["trainings"][0]["seed"] == 0 and figures["trainings"][0]["curve"]
        else:
            assert gpu.rate_of(figures) > 0, name
        assert row["wall_seconds"] > 0
    assert record["steps"]["strategy fsdp2"]["figures"]["strategy"] == "fsdp2"
    ratios = record["steps"]["bench"]["figures"]["ratio"]
    assert set(ratios) == {"bare", "conventional"}
    assert [one["target"] in ran.stdout for one in record["targets"]] == [True] * 20
    assert str(ROOT) not in out.read_text() and str(tmp_path) not in out.read_text()


def python(name: str, code: str, seconds: float = 0) -> Step:
    return Step(name, [sys.executable, "-c", code], seconds)


def runs_still(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_a_step_that_fails_or_hangs_is_recorded_and_the_others_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step that fails or hangs would cost the user all later measurements on the GPU."""
    write = 'import sys; open(sys.argv[-1], "w").write(\'{"images_per_second": 7}\')'
    hang = (
        "import subprocess; child = subprocess.Popen(['sleep', '99'], start_new_session=True)\n"
        "print(child.pid, flush=True); child.wait()"
    )
    steps = [
        python("fails", "import sys; sys.exit(f'error: unknown flag {sys.argv[1]!r}')"),
        python("says nothing", ""),
        python("hangs", hang),
        python("good", write),
        python("too long", write, seconds=1000),
    ]
    run = gpu.run
    monkeypatch.setattr(gpu, "run", lambda step, folders, limit: run(step, folders, limit - 28))
    rows = gpu.measure(steps, tmp_path / "new/gpu.json", ["--fake"], 100)
    assert rows == json.loads((tmp_path / "new/gpu.json").read_text())["steps"]
    assert rows["fails"]["failed"] == ["error: unknown flag '--fake'", "exit code 1"]
    assert rows["says nothing"]["failed"] == ["no figures"]
    child, problem = rows["hangs"]["failed"]
    assert problem == "no end after 2 s" and not runs_still(int(child))
    assert rows["hangs"]["wall_seconds"] < 10
    assert rows["good"]["figures"] == {"images_per_second": 7}
    assert rows["too long"]["failed"] == ["no time left"]

    # A second call goes on with what has no figures.
    steps[3:] = [python("good", write), python("too long", write)]
    again: list[str] = []

    def quick(step: Step, folders: list[str], limit: float) -> dict[str, Any]:
        again.append(step.name)
        return {"wall_seconds": 1.0, "figures": {"images_per_second": 8}}

    monkeypatch.setattr(gpu, "run", quick)
    gpu.measure(steps, tmp_path / "new/gpu.json", [], 100)
    assert again == ["fails", "says nothing", "hangs", "too long"]

    # What was measured by another command is measured again.
    again.clear()
    rows = gpu.measure([python("good", write + "  ")], tmp_path / "new/gpu.json", [], 100)
    assert again == ["good"] == list(rows)


def made_up(rate: float, bare: float, accuracy: float, seconds: float) -> dict[str, Any]:
    """Rows of a session whose every figure is one of these."""
    loops = {"images_per_second": {"distcv": [rate]}, "ratio": {"bare": bare, "conventional": 9}}
    curve = [[30 + seconds * epoch / 4, accuracy] for epoch in (1, 2, 3, 4)]  # 30 s of compilation
    training = {"last_accuracy": accuracy, "last_seconds": 30 + seconds, "curve": curve}
    rows: dict[str, Any] = {"bench": loops, "bench compiled": loops}
    rows |= {f"94 %, seed {seed}": {"trainings": [training]} for seed in range(5)}
    rows |= {f"network {name}": {"images_per_second": {"distcv": [2e6]}} for name in MNIST}
    return {name: {"figures": figures} for name, figures in rows.items()}


def test_the_targets_are_judged_by_the_figures() -> None:
    """Users would read that a speed or accuracy target holds although it was missed."""

    def verdicts(rows: dict[str, Any]) -> list[bool | None]:
        return [one["holds"] for one in gpu.judge(rows)]

    others = [None, None, *[True] * len(MNIST)]
    good = made_up(rate=90e3, bare=0.96, accuracy=94.1, seconds=19)
    assert verdicts(good) == [True] * 5 + others
    assert gpu.judge(good)[4]["measured"] == "94.10 % in 19.0 s, n = 5"
    few = {name: row for name, row in good.items() if "seed 4" not in name}
    assert verdicts(few)[4] is False, "a mean of four"
    slow = verdicts(made_up(rate=59e3, bare=0.94, accuracy=94.1, seconds=21))
    assert slow == [False, True, False, False, False, *others]
    assert verdicts(made_up(rate=70e3, bare=1, accuracy=93.9, seconds=19))[2:5] == [
        True, False, False,
    ]  # fmt: skip
    for row in good.values():
        row["command"] = "python -m distcv.bench --dataset synthetic"
    assert verdicts(good) == [None] * len(gpu.judge({})), "of other data nothing is judged"
    assert verdicts({}) == [None] * len(gpu.judge({}))


def test_what_is_called_warm_is_measured_behind_a_cold_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warm and cold start times would be wrong, as the compile cache would not match them."""
    cache, done = tmp_path / "cache", []
    monkeypatch.setattr(gpu, "CACHE", cache)

    def run(step: Step, folders: list[str], limit: float) -> dict[str, Any]:
        done.append((step.name, cache.exists()))
        cache.mkdir(exist_ok=True)
        fails = {"failed": ["exit code 1"]} if done == first else None
        return {"wall_seconds": 1.0, **(fails or {"figures": {"images_per_second": 8}})}

    monkeypatch.setattr(gpu, "run", run)
    first = [(gpu.COLD, False), (gpu.WARM, True)]
    steps = [python(name, "") for name in (gpu.COLD, gpu.WARM, "bench compiled")]
    rows = gpu.measure(steps, tmp_path / "gpu.json", [], 100)
    assert done == [*first, ("bench compiled", True)] and "failed" in rows[gpu.WARM]
    done.clear()
    first.clear()
    gpu.measure(steps, tmp_path / "gpu.json", [], 100)
    assert done == [(gpu.COLD, False), (gpu.WARM, True)], "again, from an empty cache"
    done.clear()
    gpu.measure(steps, tmp_path / "gpu.json", [], 100)
    assert not done


@pytest.mark.slow
def test_the_whole_plan_is_understood_by_the_commands() -> None:
    """A mistake in a step's flags would show up only on the GPU and cost that measurement.

    Each step's flags are read by the parsers of the commands themselves.
    """
    from distcv.bench import Arguments
    from distcv.command_line import CommandLine, parse_known_arguments, read_command_line
    from distcv.models import find_model

    steps = gpu.plan(FULL)
    assert len({step.name for step in steps}) == len(steps) == 6 + 15 + len(MNIST) + 5
    for step in steps:
        at = next(i for i, word in enumerate(step.command) if word.startswith("distcv."))
        module, flags = step.command[at], step.command[at + 1 :]
        if module == "distcv.bench":
            _, flags = parse_known_arguments(
                Arguments, prog=module, description="", args=flags, others=CommandLine
            )
        recipe, _ = read_command_line(prog="", description="", find_model=find_model, args=flags)
        assert step.epochs in (0, recipe.epochs)
        assert recipe.precision == "bf16"
