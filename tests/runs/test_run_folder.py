"""The run folder: what was written stays, what is damaged is noticed, rows wait for room."""

import json
from pathlib import Path

import pytest

from distcv.command_line import RunOptions
from distcv.config import InputError, Recipe
from distcv.run_folder import RunFolder
from distcv.runtime import Runtime
from distcv.train import choose_folder

ROW = {"event": "train", "step": 1, "epoch": 0.5}


def opened(path: Path, said: list[str] | None = None) -> RunFolder:
    folder = RunFolder(path)
    folder.open(Recipe(), ([] if said is None else said).append)
    folder.cut_metrics(10)
    return folder


def test_a_damaged_file_is_kept_aside_and_written_anew(tmp_path: Path) -> None:
    """A damaged result.json or tracker.json would end the run in a traceback or be overwritten."""
    folder = opened(tmp_path)
    first = folder.tracker_id
    folder.write_result({"test_accuracy": 99, "epochs": 1})
    assert folder.read_result() == {"test_accuracy": 99.0, "epochs": 1.0}
    folder.close()
    for damage in ("", "{", "[]", "3", '{"id": 1', '{"epochs": 1}', "[" * 10**5):
        for file in ("result.json", "tracker.json"):
            (tmp_path / file).write_text(damage)
        said: list[str] = []
        folder = opened(tmp_path, said)
        assert folder.tracker_id != first and folder.read_result() is None
        assert all("is damaged" in line and "\n" not in line for line in said) and len(said) == 2
        assert not folder.result.exists()
        folder.close()
    assert len(list(tmp_path.glob("bad-*"))) == 14


def test_a_damaged_record_of_starts_is_kept_aside(tmp_path: Path) -> None:
    """A run with a damaged environment.json could not be resumed."""
    from distcv.command_line import RunOptions

    said: list[str] = []
    folder, runtime = opened(tmp_path, said), Runtime(Recipe())
    folder.record_start(RunOptions(), runtime, None)
    file = tmp_path / "environment.json"
    whole = file.read_text()
    for damage in (whole[:-9], whole.replace("resumes", "resumed"), whole.replace("time", "tame")):
        file.write_text(damage)
        assert "changed" not in folder.record_start(RunOptions(), runtime, None)
    assert len(said) == 3 and len(json.loads(file.read_text())["starts"]) == 1
    assert folder.record_start(RunOptions(), runtime, None)["changed"] == {}
    assert len(json.loads(file.read_text())["starts"]) == 2


@pytest.mark.parametrize("damage", [b"", b"lr: [", b"\xff\x00", b"mordel: gap\n"])
def test_a_damaged_recipe_is_refused(damage: bytes, tmp_path: Path) -> None:
    """A damaged config.yaml would end in a traceback, or be replaced by another recipe."""
    opened(tmp_path).close()
    (tmp_path / "config.yaml").write_bytes(damage)
    with pytest.raises(InputError, match=r"config\.yaml: .*: remove it to go on") as refused:
        opened(tmp_path)
    assert "\n" not in str(refused.value)


def test_rows_wait_for_room_and_none_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the disk is full, rows of metrics.jsonl would be lost or cut in half."""
    folder = opened(tmp_path)
    folder.add_row(ROW)
    folder.metrics.rename(tmp_path / "away")
    folder.metrics.mkdir()  # can't be written
    for step in (2, 3):
        folder.add_row(ROW | {"step": step})
    with pytest.raises(OSError, match="Is a directory"):
        folder.sync_rows()
    folder.metrics.rmdir()
    (tmp_path / "away").rename(folder.metrics)
    with folder.metrics.open("a") as file:
        file.write('{"event": "tr')  # what a full disk left of a row
    assert [row["step"] for row in folder.rows()] == [1, 2, 3]
    folder.sync_rows()
    folder.add_row(ROW | {"step": 4})
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] == [row["step"] for row in folder.rows()]


def test_a_resumed_run_drops_what_comes_again_and_what_was_cut(tmp_path: Path) -> None:
    """After a resume, metrics.jsonl would hold steps twice, or lines that are not JSON."""
    folder = opened(tmp_path)
    lines = [json.dumps(ROW | {"step": step}) for step in (1, 5, 2)]
    folder.metrics.write_bytes(
        "\n".join([lines[0], "\0\xff", lines[1], lines[2]]).encode("latin-1")
    )
    folder.cut_metrics(3)
    folder.add_row(ROW | {"step": 3})
    assert [row["step"] for row in folder.rows()] == [1, 2, 3]
    lines = folder.metrics.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_a_run_that_evaluates_again_drops_the_row_of_that_evaluation(tmp_path: Path) -> None:
    """After a kill at an epoch's end, metrics.jsonl would hold that evaluation twice."""
    folder = opened(tmp_path)
    for step, event in ((2, "epoch"), (3, "train"), (3, "epoch")):
        folder.add_row(ROW | {"step": step, "event": event})
    folder.cut_metrics(3)
    assert len(folder.rows()) == 3
    folder.cut_metrics(3, evaluation_due=True)
    assert [(row["step"], row["event"]) for row in folder.rows()] == [(2, "epoch"), (3, "train")]


def test_rows_that_wait_for_room_are_dropped_likewise(tmp_path: Path) -> None:
    """After a rollback on a full disk, rows of undone steps would still enter metrics.jsonl."""
    folder = opened(tmp_path)
    folder.unwritten = b"".join(json.dumps(ROW | {"step": n}).encode() + b"\n" for n in (1, 3))
    folder.cut_metrics(1)
    folder.add_row(ROW | {"step": 2})
    assert [row["step"] for row in folder.rows()] == [1, 2]


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path) -> None:
    """A wrong --runs-dir would end in a traceback instead of a line with the remedy."""
    (tmp_path / "file").write_text("")
    folder, runtime = RunFolder(tmp_path / "file" / "run"), Runtime(Recipe())
    with pytest.raises(InputError, match=r"file: File exists: .*choose") as refused:
        runtime.on_main(lambda: folder.open(Recipe(), print))
    assert "\n" not in str(refused.value)


def test_the_id_that_an_agent_of_wandb_gives_names_the_run_if_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of a W&B sweep would not carry their W&B ids, or would write outside --runs-dir."""
    recipe, options = Recipe(model="gap"), RunOptions(runs_dir=tmp_path)
    monkeypatch.setenv("WANDB_RUN_ID", "1x7")
    assert choose_folder(recipe, options, Runtime(recipe)).path == tmp_path / "gap-1x7"
    monkeypatch.setenv("WANDB_RUN_ID", "../1x7")
    with pytest.raises(InputError, match=r"WANDB_RUN_ID = '\.\./1x7': a run's name is that of one"):
        choose_folder(recipe, options, Runtime(recipe))
