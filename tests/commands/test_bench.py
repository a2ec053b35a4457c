"""The measuring tool: that each loop does what it is named for, and the figures are those."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from distcv.arithmetic import flops_per_image, matmul_flops, median_seconds
from distcv.bench import Arguments, main, measure, plot, repeated
from distcv.bench.loops import OwnLoop
from distcv.bench.side_by_side import table
from distcv.config import InputError, load_recipe
from distcv.models import build_model
from support.forked import Forked
from support.runs import ONE_THREAD, ROOT, STRATEGY, ranks


def test_operations_are_counted_forward_and_backward() -> None:
    """The reported MFU would be wrong, as FLOPs would omit the backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        build_model("gap", channels=1, classes=10, dropout=0.0)(torch.empty(1, 1, 28, 28))
    forward = counter.get_total_flops()
    found = flops_per_image(load_recipe("gap"), (1, 28, 28), 10)
    assert 2.5 * forward < found < 3 * forward, "all but the gradient of the images"


@pytest.mark.slow
def test_the_parts_make_up_the_whole_and_the_loop_is_as_before(own: OwnLoop) -> None:
    """Time shares would not add up to the whole, or profiling would change the timed loop."""
    training = own.training
    before = training.train_loader, training.augment, training.model
    shares = measure.parts(own, 0.5)
    assert set(shares) == {*measure.PARTS, "other"}
    assert sum(shares.values()) == pytest.approx(1) and all(s > 0 for s in shares.values())
    assert shares["forward"] + shares["backward"] > 0.3
    after = training.train_loader, training.augment, training.model
    assert all(a is b for a, b in zip(after, before, strict=True))
    assert not {"backward", "step"} & set(vars(training.runtime))


@pytest.mark.alone
def test_no_convolution_is_faster_than_the_matmul_that_it_is_compared_with(own: OwnLoop) -> None:
    """Users would see an MFU far above 100 %, as the matmul peak would be measured too low."""
    images, weight = torch.randn(64, 256, 8, 8), torch.randn(256, 256, 3, 3)
    images, weight = (t.contiguous(memory_format=torch.channels_last) for t in (images, weight))
    seconds = median_seconds(lambda: F.conv2d(images, weight, padding=1), 9)
    done = 2 * 64 * 256 * 256 * 9 * 8 * 8 / seconds
    assert done < 1.6 * matmul_flops(own.training.runtime)


def test_a_ratio_is_that_of_neighbours() -> None:
    """A slow moment of the machine would distort the reported ratio between two loops."""
    assert measure.ratio([10, 1, 9], [20, 2, 10]) == 0.5


RECORD: dict[str, Any] = {
    "recipe": load_recipe("gap").model_dump(mode="json"), "device": "cpu", "cpu": "AMD EPYC",
}  # fmt: skip


def test_the_picture_shows_rates_ratios_and_parts() -> None:
    """The benchmark plot would show other rates, ratios or time shares than were measured."""
    rates = {"distcv": [90.0, 100.0, 120.0], "bare": [200.0, 200.0, 200.0]}
    record = RECORD | {"images_per_second": rates, "ratio": {"bare": 0.5}, "parts": {"data": 0.25}}
    above, below = plot.picture(record).axes
    assert [bar.get_width() for bar in above.patches] == [100, 200]
    assert [text.get_text() for text in above.texts] == ["100", "200   distcv is 0.5 x as fast"]
    assert [bar.get_width() for bar in below.patches] == [25]


def test_the_picture_of_scaling_shows_each_strategy_and_what_is_ideal() -> None:
    """The scaling plot would hold CPU runs to a speedup that their cores cannot give."""
    rows = [
        {"strategy": name, "processes": n, "threads": 2 // n, "images_per_second": 10.0 * n,
         "repeats": [9.0 * n, 11.0 * n]} for name in ("ddp", "fsdp2") for n in (1, 2)
    ]  # fmt: skip
    for device, ideal in (("cpu", [10, 10]), ("a GPU", [10, 20])):
        (axes,) = plot.picture(RECORD | {"scaling": rows, "device": device}).axes
        dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert [list(line.get_ydata()) for line in dashed] == [ideal, ideal]


def test_the_picture_of_accuracies_shows_each_seed_and_target(tmp_path: Path) -> None:
    """The plot of accuracy over time would lack a seed or a target, or could not be drawn."""
    curves = {3: [[1.0, 90.0], [2.0, 95.0]], 4: [[1.5, 91.0], [2.5, 96.0]]}
    trainings = [{"seed": seed, "curve": curve} for seed, curve in curves.items()]
    record = RECORD | {"targets": [50.0, 94.0], "trainings": trainings}
    (axes,) = plot.picture(record).axes
    drawn = {str(line.get_label()): list(line.get_ydata()) for line in axes.lines}
    assert drawn["seed 3"] == [90, 95] and drawn["seed 4"] == [91, 96]
    assert [text.get_text() for text in axes.texts] == ["50 %", "94 %"]
    file = tmp_path / "curves.png"
    plot.draw(record, file)  # a layout that finds no room is a warning, and so an error
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_machine_that_slows_down_changes_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down would make larger process counts look worse than they are."""
    rates, order = iter([104.0, 103.0, 102.0, 101.0]), []

    def launched(_f: object, _a: object, strategy: str, n: int, _e: object) -> dict[str, Any]:
        order.append((strategy, n))
        return {"images_per_second": {"distcv": [next(rates)]}, "threads": "1", "device": "cpu"}

    monkeypatch.setattr(repeated, "_launched", launched)
    rows = repeated.scaling([], Arguments(processes=(1, 2)), {})["scaling"]
    assert order == [("ddp", 1), ("ddp", 2), ("ddp", 2), ("ddp", 1)]
    assert rows[0]["images_per_second"] == rows[1]["images_per_second"] == 102.5


def bench(*flags: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run(
        [sys.executable, "-m", "distcv.bench", "--model", "gap", *flags],
        cwd=ROOT, env=os.environ | ONE_THREAD, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert ran.returncode == expect, ran.stdout + ran.stderr
    return ran


@pytest.mark.slow
def test_the_command_prints_what_it_writes(tmp_path: Path, data_dir: Path, mnist: object) -> None:
    """The benchmark's JSON would disagree with the printed table, or contain the user's paths."""
    out = tmp_path / "new/figures.json"
    flags = ["--seconds", "0.3", "--repeats", "2", "--json", str(out), "--batch-size", "64"]
    flags += ["--plot", str(tmp_path / "new/figures.svg")]
    ran = bench(*flags, "--data-dir", str(data_dir.resolve()))
    assert ran.stderr == "", "the profiler says nothing of its own"
    figures = json.loads(out.read_text())
    assert figures["recipe"]["batch_size"] == 64 and figures["versions"]["torch"]
    assert {name: len(r) for name, r in figures["images_per_second"].items()} == {
        "distcv": 2, "bare": 2, "conventional": 2,
    }  # fmt: skip
    assert "\n".join(table(load_recipe("gap"), "", figures)[2:]) in ran.stdout
    assert set(figures["ratio"]) == {"bare", "conventional"}
    assert 0 < figures["first_step_seconds"] < figures["seconds_to_first_step"]
    assert figures["command"][:5] == ["python", "-m", "distcv.bench", "--model", "gap"]
    assert str(tmp_path) not in out.read_text()
    assert "<svg" in (tmp_path / "new/figures.svg").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_the_bare_loop_runs_under_each_strategy(
    strategy: str, tmp_path: Path, data_dir: Path, mnist: object
) -> None:
    """Users of FSDP2 or ZeRO-3 could not compare distcv's speed and memory with a bare loop."""
    if strategy == "zero3":
        pytest.importorskip("deepspeed")
    out = tmp_path / "figures.json"
    flags = ["--model", "gap", "--seconds", "0.2", "--repeats", "1", "--json", str(out)]
    flags += ["--gradient-accumulation-steps", "2", "--data-dir", str(data_dir)]
    environments = [os.environ | ONE_THREAD | STRATEGY[strategy] | one for one in ranks(2)]
    started = [
        Forked("distcv.bench", flags, env, tmp_path / str(rank))
        for rank, env in enumerate(environments)
    ]
    said = [process.communicate(timeout=200) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    figures = json.loads(out.read_text())
    assert figures["strategy"] == strategy
    assert set(figures["images_per_second"]) == {"distcv", "bare"}
    assert 0.3 < figures["ratio"]["bare"] < 2 and 0.5 < figures["memory"]["ratio"] < 3
    assert figures["memory"]["resident_bytes"] == 70_000 * (28 * 28 + 8)


@pytest.mark.slow
def test_seconds_to_accuracies(tmp_path: Path, data_dir: Path, mnist: object) -> None:
    """`--to-accuracy` would report wrong times, or targets that no run has reached."""
    out = tmp_path / "figures.json"
    flags = ["--max-steps", "60", "--batch-size", "32", "--runs", "2", "--json", str(out)]
    ran = bench("--to-accuracy", "20", "100", *flags, "--data-dir", str(data_dir.resolve()))
    figures = json.loads(out.read_text())
    assert figures["targets"] == [20, 100]
    assert [row["seed"] for row in figures["trainings"]] == [0, 1]
    for row in figures["trainings"]:
        assert list(row["reached"]) == ["20"]
        last = [row["last_seconds"], row["last_accuracy"]]
        assert row["curve"] == [last] and last[1] > 20
        assert 0 < row["reached"]["20"]["seconds"] == last[0] < row["wall_seconds"]
    assert "20 % at an epoch's end: 2 of 2" in ran.stdout
    assert "100 % at an epoch's end: 0 of 2" in ran.stdout
    assert "no test-time augmentation" in ran.stdout


@pytest.mark.slow
def test_scaling_over_processes(tmp_path: Path, data_dir: Path, mnist: object) -> None:
    """`--processes` would fail, or report a rate outside its own measurements."""
    out = tmp_path / "figures.json"
    flags = ["--processes", "2", "--strategies", "cpu", "--seconds", "0.5", "--repeats", "2"]
    bench(*flags, "--json", str(out), "--data-dir", str(data_dir.resolve()))
    (row,) = json.loads(out.read_text())["scaling"]
    assert row["processes"] == 2 and row["threads"] == 1 and len(row["repeats"]) == 2
    assert row["images_per_second"] == statistics.median(row["repeats"]) > 0


def test_an_unknown_flag_is_one_line() -> None:
    """A typo in a benchmark flag would give a traceback instead of the flag that was meant."""
    said = "error: unknown flag '--sceonds': did you mean '--seconds'?\n"
    assert bench("--sceonds", "3", expect=2).stderr == said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--processes 2 --strategies dpd", "--strategies dpd: there is no dpd.yaml in launch/"),
        ("--plot figures.doc", "--plot figures.doc: the ending must be one of .* png, .*"),
        ("--json /dev/null/x", "--json /dev/null/x: it can't be written: choose another file"),
        ("--json /dev", "--json /dev: it can't be written: choose another file"),
        ("--plot /dev/null/x.png", "--plot /dev/null/x.png: it can't be written: .*"),
        ("--to-accuracy 94 101", "--to-accuracy 101.*: .* less than or equal to 100"),
    ],
)
def test_what_can_not_work_is_refused_before_anything_is_measured(
    flags: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that cannot be written would be reported only after the figures are lost."""
    monkeypatch.setattr(sys, "argv", ["bench", "--model", "gap", *flags.split()])
    with pytest.raises(InputError, match=f"^{said}$"):
        main()


def test_under_a_launcher_no_other_processes_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark under accelerate launch would start each training once per rank."""
    monkeypatch.setattr(sys, "argv", ["bench", "--model", "gap", "--to-accuracy", "99"])
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(InputError, match=r"^--to-accuracy starts processes by itself: leave"):
        main()
