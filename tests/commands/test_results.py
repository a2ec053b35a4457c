"""The table of finished runs: means over seeds, and what is said of runs that don't count."""

import json
import os
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from distcv import results
from distcv.config import InputError, Recipe, load_recipe
from distcv.results import differences, last_row, read_runs
from distcv.results.listing import report
from support.runs import RIGHTS_HOLD, ROOT, Runs

FILE = json.loads((ROOT / "results/gap.json").read_text())
GAP = [row | {"commit": FILE[0]["commit"]} for row in FILE[:5]]


def make_run(folder: Path, recipe: Recipe, result: dict[str, Any] | None = None) -> Path:
    """A run folder as a training leaves it; without a result, as one that goes on."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(recipe.to_yaml())
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def make_gap_runs(folder: Path, **changes: Any) -> None:
    """Five runs of results/gap.json, with fields of the recipe changed."""
    for result in GAP:
        recipe = load_recipe("gap").model_copy(update={"seed": result["seed"], **changes})
        make_run(folder / f"seed-{result['seed']}", recipe, result)


def table(*words: str, expect: int = 0, **environment: str) -> list[str]:
    """The lines that the command prints, of its errors where it fails."""
    command = [*RIGHTS_HOLD, sys.executable, "-m", "distcv.results", *words]
    env = os.environ | environment
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert ran.returncode == expect, ran.stderr
    return (ran.stderr if expect else ran.stdout).splitlines()


def test_the_published_figures_come_out_of_their_runs(tmp_path: Path) -> None:
    """The table would show a wrong mean or deviation, or `--json` would lose fields of a result."""
    make_gap_runs(tmp_path / "runs")
    head, row = table(str(tmp_path / "runs"), "--json", str(tmp_path / "out/gap.json"))
    assert head.split("  ")[0] == "model" and len(head) == len(row)
    found = [result["test_accuracy"] for result in GAP]
    seconds = statistics.mean(result["seconds"] for result in GAP)
    said = f"{statistics.mean(found):.2f} ± {statistics.stdev(found):.2f} {min(found):.2f}"
    assert row.split() == f"gap mnist 5 {said} {max(found):.2f} {seconds:.1f}".split()
    assert json.loads((tmp_path / "out/gap.json").read_text()) == GAP, "the form of results/"


def test_runs_of_several_recipes_are_rows_of_their_own_that_say_what_differs(
    tmp_path: Path,
) -> None:
    """Runs of different recipes would be averaged together, or their rows would look alike."""
    make_gap_runs(tmp_path / "a")
    make_gap_runs(tmp_path / "b", lr=0.25, epochs=12)
    make_run(tmp_path / "wide", load_recipe("wide"), GAP[0])
    out = tmp_path / "all.json"
    _, first, second, wide = table(*(str(tmp_path / name) for name in ("a", "b", "wide")),
                                   "--json", str(out))  # fmt: skip
    own = load_recipe("gap")
    assert f"  epochs {own.epochs}, lr {own.lr}  " in first
    assert "epochs 12, lr 0.25" in second
    assert wide.split()[:3] == ["wide", "mnist", "1"], "another model is no other recipe"
    said = [row.get("recipe") for row in json.loads(out.read_text())]
    assert said == [f"epochs {own.epochs}, lr {own.lr}"] * 5 + ["epochs 12, lr 0.25"] * 5 + [None]


def test_many_differences_are_cut_short(tmp_path: Path) -> None:
    """A recipe with many changed fields would make the rows wider than a terminal."""
    other = load_recipe("gap").model_copy(
        update={"lr": 0.5, "epochs": 2, "momentum": 0.1, "rotate": 3.0, "scale": 0.1, "shear": 9.0}
    )
    runs, _ = read_runs((make_run(tmp_path / "a", other), make_run(tmp_path / "b", Recipe())))
    words = differences(other, runs).split(", ")
    assert len(words) == results.FIELDS_SHOWN + 1 and words[-1] == "…"


def test_a_single_run_has_no_deviation(tmp_path: Path) -> None:
    """A table of one run would end in an error, or claim a deviation that was not measured."""
    make_run(tmp_path / "one", load_recipe("gap"), GAP[0])
    only = f"{GAP[0]['test_accuracy']:.2f}"
    said = table(str(tmp_path))[1].split()
    assert said == ["gap", "mnist", "1", only, only, only, f"{GAP[0]['seconds']:.1f}"]


def test_runs_of_one_seed_and_of_several_commits_are_said(tmp_path: Path) -> None:
    """Repeated seeds and mixed commits would pass as independent samples of one program."""
    make_gap_runs(tmp_path)
    again = GAP[3] | {"commit": "f" * 40 + "-dirty"}
    make_run(tmp_path / "x", load_recipe("gap").model_copy(update={"seed": 3}), again)
    lines = table(str(tmp_path))
    assert lines[1].split()[2] == "6"
    assert lines[2] == f"gap on mnist: seed 3 counts 2 times: {tmp_path}/seed-3, {tmp_path}/x"
    commits = f"{GAP[0]['commit'][:12]}, ffffffffffff-dirty"
    assert lines[3] == f"gap on mnist: runs of 2 commits: {commits}"


def test_unfinished_runs_are_listed_with_their_newest_step(tmp_path: Path) -> None:
    """A user could not see in the table how far each unfinished run has come."""
    make_gap_runs(tmp_path / "done")
    begun = make_run(tmp_path / "begun", load_recipe("gap"))
    rows = [{"event": "train", "step": s, "epoch": s / 100, "loss": 1.0} for s in (20, 40)]
    torn = '{"event": "train", "step": 60, "ep'
    (begun / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    make_run(tmp_path / "new", load_recipe("gap"))
    assert table(str(tmp_path))[2:] == [
        f"unfinished {begun}: step 40, epoch 0.40 of {load_recipe('gap').epochs}",
        f"unfinished {tmp_path}/new: no step yet",
    ]


DAMAGED = {
    "no config.yaml": {"lock": ""},
    "lr = -1: input should be greater than 0": {"config.yaml": "lr: -1\n"},
    "give a mapping of fields": {"config.yaml": ""},
    "Unterminated string": {"config.yaml": "lr: 1\n", "result.json": '{"test_acc'},
    "seconds is missing": {"config.yaml": "lr: 1\n", "result.json": '{"test_accuracy": 99}'},
    "test_accuracy = -: input should be a valid number": {
        "config.yaml": "lr: 1\n",
        "result.json": '{"test_accuracy": "-"}',
    },
    "should be a valid dictionary": {"config.yaml": "lr: 1\n", "result.json": "[1]"},
    "codec can't decode": {"config.yaml": "lr: 1\n", "result.json": "\udcff"},
}


@pytest.mark.parametrize("reason", DAMAGED)
def test_half_made_and_damaged_folders_are_skipped_with_a_line(reason: str, tmp_path: Path) -> None:
    """One half-written run folder would hide the results of all other runs."""
    make_gap_runs(tmp_path)
    for name, text in DAMAGED[reason].items():
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / name).write_text(text, errors="surrogateescape")
    _, row, line = table(str(tmp_path))
    assert row.split()[2] == "5"
    assert line.startswith(f"skipped {tmp_path}/bad: ") and reason in line


@pytest.mark.parametrize("name", ["", "config.yaml", "result.json"])
def test_what_may_not_be_read_is_skipped_with_a_line(name: str, tmp_path: Path) -> None:
    """A colleague's unreadable run would end the table in an error instead of a skipped line."""
    make_gap_runs(tmp_path / "runs")
    secret = tmp_path / "runs/seed-3" / name
    secret.chmod(0)
    _, row, skipped = table(str(tmp_path / "runs"))
    assert row.split()[2] == "4"
    assert skipped.startswith(f"skipped {tmp_path}/runs/seed-3: ")
    assert f"Permission denied: '{secret}" in skipped
    if not name:
        (line,) = table(str(secret / "deeper"), expect=2)
        said = "Permission denied: mend that, or choose another"
        assert line == f"error: {secret}/deeper: {said}"
        secret.chmod(0o700)


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
)
def test_what_ascii_lacks_is_printed_by_its_escape(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """On a terminal without UTF-8 the table would end in a UnicodeEncodeError."""
    make_gap_runs(tmp_path / "runs")
    _, row = table(str(tmp_path / "runs"), **environment)
    assert row.split()[4] == r"\xb1"


def test_a_folder_is_counted_once_however_it_is_named(tmp_path: Path) -> None:
    """A run that is named twice on the command line would count twice, and n would be too high."""
    make_gap_runs(tmp_path / "runs/array-7")
    inside = tmp_path / "runs/array-7/seed-0/wandb/run-1/files"
    inside.mkdir(parents=True)
    (inside / "config.yaml").write_text("wandb_version: 1\n")
    runs, skipped = read_runs((tmp_path / "runs", tmp_path / "runs/array-7/seed-1"))
    assert len(runs) == 5 and skipped == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{}/none"], "no folder {}/none: give run folders, or a folder that holds some"),
        (["{}/empty"], "no runs in {}/empty: train first"),
        (["{}/runs", "--json", "{}/file/x.json"], "--json {}/file/x.json: "),
        (["{}/runs", "--jsn", "x"], "unknown flag '--jsn': did you mean '--json'?"),
    ],
)
def test_wrong_input_gets_one_line(words: list[str], said: str, tmp_path: Path) -> None:
    """A mistyped folder or flag would give a traceback or an empty table instead of a remedy."""
    make_gap_runs(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (line,) = table(*(word.format(tmp_path) for word in words), expect=2)
    assert line.startswith("error: " + said.format(tmp_path))


@pytest.mark.slow
def test_others_may_write_and_remove_their_folders_meanwhile(tmp_path: Path) -> None:
    """The table would crash at random while trainings write or remove their run folders."""
    make_gap_runs(tmp_path / "runs")
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            folder = make_run(tmp_path / "runs/busy", Recipe(seed=9))
            for size in (0, 10, 200):
                (folder / "metrics.jsonl").write_text(json.dumps(GAP[0])[:size])
                (folder / "result.json").write_text(json.dumps(GAP[0])[:size])
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        lengths = {len(report(read_runs((tmp_path / "runs",))[0])) for _ in range(200)}
    finally:
        done.set()
        writer.join()
    assert lengths <= {2, 3} and lengths, "the table, and at times an unfinished run"


@pytest.mark.slow
def test_a_run_of_the_training_command_is_read(tmp_path: Path) -> None:
    """A run that distcv.train has just finished would be missing from the table."""
    runs = Runs(tmp_path, tmp_path)
    flags = ["--model", "gap", "--dataset", "synthetic", "--max-steps", "4", "--log-every", "2"]
    runs.run("real", *flags)
    ((_, recipe, result),), _ = read_runs((tmp_path,))
    assert result == runs.result("real") and recipe.max_steps == 4
    row = last_row(tmp_path / "real")
    assert row is not None and row["step"] == 4 and row["event"] == "epoch"
    assert f"{result['test_accuracy']:.2f}" in table(str(tmp_path))[1]


def test_the_table_needs_no_torch(tmp_path: Path) -> None:
    """Each call for a table would take the seconds that an import of PyTorch takes."""
    make_gap_runs(tmp_path)
    code = "import sys; from distcv.results import main; main(); sys.exit('torch' in sys.modules)"
    words = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(words, timeout=60, stdout=subprocess.DEVNULL).returncode == 0


def test_a_missing_folder_is_wrong_input_for_callers_too(tmp_path: Path) -> None:
    """Commands that call `read_runs`, such as distcv.report, would accept a missing folder."""
    with pytest.raises(InputError, match="no folder"):
        read_runs((tmp_path / "none",))


@pytest.mark.parametrize(
    "damage",
    [
        {"test_accuracy": "99"},
        {"seconds": None},
        {"confusion": [["<b>"]]},
        {"mistakes": [{"sample": "x"}]},
        {"class_accuracy": 5},
        {"commit": ["\x1b[2J"]},
        {"environment": {"versions": ["torch"]}},
        {"versions": ["torch"]},
    ],
)
def test_a_result_of_another_form_is_skipped(damage: dict[str, Any], tmp_path: Path) -> None:
    """A malformed result.json from someone else could crash the report or put markup into it."""
    make_run(tmp_path / "run", load_recipe("gap"), GAP[0] | damage)
    runs, [skipped] = read_runs((tmp_path,))
    (name,) = damage
    assert not runs and f"result.json is damaged: {name}" in skipped


def test_files_of_a_run_that_could_be_waited_for_are_not_read(tmp_path: Path) -> None:
    """A named pipe or a deeply nested line in a run folder would hang or crash the table."""
    run = make_run(tmp_path / "run", load_recipe("gap"))
    for name in ("result.json", "metrics.jsonl", "environment.json"):
        os.mkfifo(run / name)
    runs, [skipped] = read_runs((tmp_path,))
    assert not runs and "result.json is damaged: not a regular file" in skipped
    assert results.read_rows(run) == results.read_starts(run) == []
    (run / "metrics.jsonl").unlink()
    rows = [
        {"event": "epoch", "step": "\x1b[2J", "epoch": 1},
        {"event": "x", "step": 1, "epoch": 2},
    ]
    lines = [*map(json.dumps, rows), "[" * 100_000]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    assert results.read_rows(run) == rows[1:]


@pytest.mark.parametrize(
    "start", [5, {"versions": []}, {"options": "x"}, {"commit": 5}, {"time": "x"}, {"cores": None}]
)
def test_starts_of_another_form_are_left_out(start: Any, tmp_path: Path) -> None:
    """A damaged start in environment.json would end a report of the run in a traceback."""
    run = make_run(tmp_path / "run", load_recipe("gap"))
    (run / "environment.json").write_text(json.dumps({"starts": [{"cores": 2}]}))
    assert results.read_starts(run) == [{"cores": 2}]
    (run / "environment.json").write_text(json.dumps({"starts": [{"cores": 2}, start]}))
    assert results.read_starts(run) == []


def test_a_reader_that_has_gone_ends_the_command_without_a_word(tmp_path: Path) -> None:
    """A user who pipes the table into `head` would see a traceback of BrokenPipeError."""
    make_gap_runs(tmp_path)
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run(
        [sys.executable, "-u", "-m", "distcv.results", str(tmp_path)],
        stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (141, "")
