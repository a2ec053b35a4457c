"""TensorBoard and trackio: real trainings that are killed leave each row once."""

import os
import sqlite3
import time
from pathlib import Path

import pytest
import torch

from distcv import train
from distcv.command import run_command
from distcv.runtime.nodes import NodeMetrics
from distcv.tracking.stall import StallWatch
from support.runs import Runs, stopped_in


@pytest.mark.slow
def test_a_killed_run_has_each_row_once_in_tensorboard_and_trackio(
    tmp_path: Path, data_dir: Path, mnist: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill, TensorBoard and trackio would show some steps twice or not at all."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    runs = Runs(tmp_path / "runs", data_dir.resolve())
    flags = ["--model", "gap", "--max-steps", "60", "--log-every", "5", "--checkpoint-every", "20",
             "--track", "trackio", "tensorboard", "--node-metrics"]  # fmt: skip
    process = runs.start("r", *flags)
    runs.wait_for_step("r", 30, process)
    process.kill()
    process.communicate()
    said = runs.run("r", *flags)
    assert "resuming after step 20" in said and "rackio" not in said, "trackio prints much"

    steps = list(range(5, 61, 5))
    rows = {row["step"]: row for row in runs.rows("r") if row["event"] == "train"}
    assert list(rows) == steps
    assert 0 < rows[60]["nodes"][0]["memory_percent"] < 100 and len(rows[60]["nodes"]) == 1
    events = EventAccumulator(str(tmp_path / "runs/r/tensorboard/distcv"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert losses == pytest.approx({step: row["loss"] for step, row in rows.items()}, rel=1e-6)
    assert len(events.Scalars("train/loss")) == 12 and events.Tags()["images"] == ["samples"]
    with sqlite3.connect(tmp_path / "runs/.trackio/distcv.db") as database:
        kept = database.execute("select run_name, step from metrics order by id").fetchall()
    assert kept == [("r", step) for step in steps]
    assert [path for path in home.rglob("*") if path.is_file()] == [], "nothing is for HOME"


@pytest.mark.slow
def test_tensorboard_gets_the_rows_of_a_time_without_it(tmp_path: Path) -> None:
    """TensorBoard would lack the steps of every restart without --track tensorboard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs = Runs(tmp_path, tmp_path)
    flags = ["--model", "gap", "--dataset", "synthetic", "--log-every", "1", "--max-steps", "6"]
    track, stopped = ["--track", "tensorboard"], stopped_in("lr_at", tmp_path / "r/STOP", call=2)
    runs.run("r", *flags, *track, command=stopped, expect=75)
    runs.run("r", *flags, command=stopped, expect=75)
    runs.run("r", *flags, *track)
    rows = [row for row in runs.rows("r") if row["event"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 7))
    events = EventAccumulator(str(tmp_path / "r/tensorboard/distcv"))
    events.Reload()
    seen = events.Scalars("train/loss")
    assert [event.step for event in seen] == list(range(1, 7))
    assert [event.value for event in seen] == pytest.approx([row["loss"] for row in rows])
    assert events.Tags()["images"] == ["samples"]


def test_a_tracker_that_is_not_installed_is_named_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Users without trackio would not see the pip command that installs it."""
    monkeypatch.setattr("sys.argv", ["train", "--model", "gap", "--track", "trackio"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        run_command(train.main)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "distcv[trackio]" in said


def test_the_metrics_of_two_nodes_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Users would see one node's CPU load under another node, or a sum over its ranks."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    processes = [NodeMetrics(rank, 4, torch.device("cpu")) for rank in range(4)]
    load = iter([10.0, 30.0, 50.0, 50.0])
    monkeypatch.setattr("psutil.cpu_percent", lambda: next(load))
    total = [sum(column) for column in zip(*(one.share() for one in processes), strict=True)]
    first, second = processes[0].read(total)
    assert (first["cpu_percent"], second["cpu_percent"]) == (20.0, 50.0)
    assert first["memory_percent"] == pytest.approx(second["memory_percent"], abs=1)


def test_a_stall_is_told_once_and_only_if_there_is_one() -> None:
    """Users would get stall alerts from healthy or finished runs, or none from a stalled run."""
    idle, told = [0.0], list[float]()
    watch = StallWatch(lambda: idle[0], 0.05, told.append)
    time.sleep(0.1)
    assert told == []
    idle[0] = 1.0
    watch.thread.join(5)
    assert told == [1.0] and not watch.thread.is_alive()
    closed = StallWatch(lambda: 1.0, 60, told.append)
    closed.close()
    closed.thread.join(5)
    assert told == [1.0] and not closed.thread.is_alive()


def test_trackio_keeps_what_the_user_has_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs would not reach the user's own trackio folder or Hugging Face Space."""
    from distcv.run_folder import RunFolder
    from distcv.tracking import trackio_run

    monkeypatch.setattr(os, "environ", {"TRACKIO_DIR": "/elsewhere", "TRACKIO_SPACE_ID": "lab/x"})
    options = trackio_run.settings(RunFolder(tmp_path / "r"), {"lr": 0.1}, "group", new=False)
    assert (options["name"], options["resume"]) == ("r", "allow")
    assert os.environ["TRACKIO_DIR"] == "/elsewhere"
    assert "HF_HUB_OFFLINE" not in os.environ, "a Space is on the network"
