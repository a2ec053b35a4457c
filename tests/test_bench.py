"""The measuring tool: that each loop does what it is named for, and the figures are those."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ONE_THREAD, ROOT

from distcv.bench import measure, table
from distcv.bench.loops import BareLoop, ConventionalLoop, OwnLoop
from distcv.config import load_recipe
from distcv.data import load_dataset
from distcv.models import build_model
from distcv.runtime import Runtime


@pytest.fixture(scope="module")
def own(data_dir: Path, mnist: object) -> OwnLoop:
    recipe = load_recipe("gap")
    return OwnLoop(recipe, load_dataset("mnist", data_dir, report=print), Runtime(recipe))


def weights(loop: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in loop.parameters()])


def test_the_own_loop_trains_and_says_how_far_it_came(own: OwnLoop) -> None:
    before, first = weights(own.training.network), own.progress.step
    images, seconds = own.run(0.3)
    assert images == (own.progress.step - first) * 128 > 0
    assert 0.3 <= seconds < 3
    assert not torch.equal(before, weights(own.training.network))


def test_the_own_loop_begins_again_at_the_end_of_its_recipe(own: OwnLoop) -> None:
    own.progress.step = own.training.total_steps - 1
    images, _ = own.run(0.3)
    assert 0 < own.progress.step < own.training.total_steps
    assert images == (own.progress.step + 1) * 128


def test_the_bare_loop_computes_all_and_learns_nothing(own: OwnLoop) -> None:
    bare = BareLoop(own.training.recipe, own)
    before = weights(own.training.network)
    images, seconds = bare.run(0.2)
    assert images % 128 == 0 and images > 0 and 0.2 <= seconds < 3
    assert torch.equal(before, weights(own.training.network))
    buffers = [state["momentum_buffer"] for state in bare.optimizer.state.values()]
    assert len(buffers) == len(list(own.training.network.parameters()))
    assert all(buffer.any() for buffer in buffers), "each weight had a gradient"


def test_the_conventional_loop_trains_on_normalised_pictures(
    own: OwnLoop, data_dir: Path, mnist: object
) -> None:
    data = load_dataset("mnist", data_dir, report=print)
    loop = ConventionalLoop(load_recipe("gap"), data, torch.device("cpu"))
    picture, label = loop.pictures[7]
    assert picture.shape == (1, 28, 28) and label == int(data.train_labels[7])
    assert abs(torch.stack([loop.pictures[i][0] for i in range(200)]).mean()) < 0.1
    before = weights(loop.model)
    images, _ = loop.run(0.2)
    assert images % 128 == 0 and images > 0
    assert not torch.equal(before, weights(loop.model))


def test_operations_are_counted_forward_and_backward(own: OwnLoop) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        build_model("gap", channels=1, classes=10, dropout=0.0)(torch.empty(1, 1, 28, 28))
    forward = counter.get_total_flops()
    found = measure.flops_per_image(BareLoop(own.training.recipe, own))
    assert 2.5 * forward < found < 3 * forward, "all but the gradient of the images"


def test_the_parts_make_up_the_whole_and_the_loop_is_as_before(own: OwnLoop) -> None:
    loader, augment = own.training.train_loader, own.training.augment
    shares = measure.parts(own, 0.5)
    assert set(shares) == {*measure.PARTS, "other"}
    assert sum(shares.values()) == pytest.approx(1) and all(s > 0 for s in shares.values())
    assert shares["forward"] + shares["backward"] > 0.3
    assert own.training.train_loader is loader and own.training.augment is augment
    assert "forward" not in vars(own.training.model)


def test_a_ratio_is_that_of_neighbours() -> None:
    assert measure.ratio([10, 1, 9], [20, 2, 10]) == 0.5


def bench(*flags: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run(
        [sys.executable, "-m", "distcv.bench", "--model", "gap", *flags],
        cwd=ROOT, env=os.environ | ONE_THREAD, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert ran.returncode == expect, ran.stdout + ran.stderr
    return ran


@pytest.mark.slow
def test_the_command_prints_what_it_writes(tmp_path: Path, data_dir: Path, mnist: object) -> None:
    out = tmp_path / "new/figures.json"
    flags = ["--seconds", "0.3", "--repeats", "2", "--json", str(out), "--batch-size", "64"]
    said = bench(*flags, "--data-dir", str(data_dir.resolve())).stdout
    figures = json.loads(out.read_text())
    assert figures["recipe"]["batch_size"] == 64 and figures["versions"]["torch"]
    assert {name: len(r) for name, r in figures["images_per_second"].items()} == {
        "distcv": 2, "bare": 2, "conventional": 2,
    }  # fmt: skip
    assert "\n".join(table(load_recipe("gap"), "", figures)[3:]) in said
    assert set(figures["ratio"]) == {"bare", "conventional"}


@pytest.mark.slow
def test_seconds_to_an_accuracy(tmp_path: Path, data_dir: Path, mnist: object) -> None:
    out = tmp_path / "figures.json"
    flags = ["--max-steps", "60", "--runs", "2", "--json", str(out)]
    bench("--to-accuracy", "20", *flags, "--data-dir", str(data_dir.resolve()))
    rows = json.loads(out.read_text())["trainings"]
    assert [row["seed"] for row in rows] == [0, 1]
    assert all(row["last_accuracy"] > 20 and row["seconds"] > 0 for row in rows)


@pytest.mark.slow
def test_scaling_over_processes(tmp_path: Path, data_dir: Path, mnist: object) -> None:
    out = tmp_path / "figures.json"
    flags = ["--processes", "1", "2", "--strategies", "cpu", "--seconds", "0.5", "--repeats", "2"]
    bench(*flags, "--json", str(out), "--data-dir", str(data_dir.resolve()))
    rows = json.loads(out.read_text())["scaling"]
    assert [row["processes"] for row in rows] == [1, 2]
    assert all(row["images_per_second"] > 0 for row in rows)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    for flags, said in (
        (["--sceonds", "3"], "error: unknown flag '--sceonds': did you mean '--seconds'?\n"),
        (["--processes", "2", "--strategies", "dpd"],
         "error: --strategies dpd: there is no dpd.yaml in launch/\n"),
    ):  # fmt: skip
        assert bench(*flags, expect=2).stderr == said
