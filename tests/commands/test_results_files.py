"""Result files, what is made of them, what the check finds: in made-up clones and in this one."""

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from distcv.command_line import read_command_line
from distcv.config import InputError, load_recipe
from distcv.models import MODELS, find_model
from distcv.results import analysis, read_runs
from distcv.results.check import problems
from distcv.results.documents import Aim, read_documents
from distcv.results.files import Measured, collect
from distcv.results.page import command
from distcv.results.tables import write_tables
from support.report_runs import COMMIT, make_run
from support.runs import ROOT

ACCURACIES = {0: (97.5, 99.44, 99.31), 1: (97.25, 99.0, 99.39)}
DOCUMENTS = {
    "gap": {"document": "001", "title": "GAP", "parameters": 9490, "epochs": 20,
            "train_accuracy": 98.81, "test_accuracy": 98.99, "printed": 99.99,
            "target": "add pooling", "note": "A misprint.",
            "aim": {"accuracy": 99.3, "runs": 2}},
    "tiny_v1": {"document": "000", "title": "v1", "aim": {"accuracy": 99.5, "runs": 5}},
}  # fmt: skip
README = "# Mine\n\n<!-- gap -->\n<!-- end -->\nmore\n\n<!-- results -->\nold\n<!-- end -->\n"


def change_recipe(clone: Path, name: str, **fields: Any) -> None:
    path = clone / f"configs/{name}.yaml"
    lines = path.read_text().splitlines() if path.exists() else ["# What.", "# Command:  none"]
    head = [line for line in lines if line.startswith("#")]
    values = yaml.safe_load("\n".join(lines)) or {}
    path.write_text("\n".join(head) + "\n" + yaml.safe_dump(values | fields))


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone with two networks, one of which has a document's recipe; nothing is measured."""
    for folder in ("configs", "results", "docs"):
        (tmp_path / "clone" / folder).mkdir(parents=True)
    clone = tmp_path / "clone"
    (clone / "README.md").write_text(README)
    (clone / "results/documents.yaml").write_text(yaml.safe_dump(DOCUMENTS, sort_keys=False))
    change_recipe(clone, "gap", **(load_recipe("gap").model_dump(mode="json") | {"epochs": 3}))
    document = load_recipe("gap_document").model_dump(mode="json") | {"epochs": 3}
    change_recipe(clone, "gap_document", **document)
    change_recipe(clone, "tiny_v1", **load_recipe("tiny_v1").model_dump(mode="json"))
    return clone


def finish(clone: Path, name: str, seed: int, accuracies: tuple[float, ...], at: str = "") -> Path:
    """The folder of a finished run of three epochs, of a recipe in the clone."""
    recipe = load_recipe(clone / f"configs/{name}.yaml").model_copy(update={"seed": seed})
    folder = clone.parent / "runs" / (at or f"{name}-{seed}")
    start = {"options": {"compile": True, "sync_bn": False}}
    fields = recipe.model_dump(exclude={"model"})
    make_run(folder, recipe.model, accuracies=accuracies, start=start, **fields)
    result = json.loads((folder / "result.json").read_text())
    result |= {"config_sha256": recipe.sha256, "precision": recipe.precision}
    result["environment"] = {"cpu": "AMD EPYC", "cores": 2, "threads": "2",
                             "versions": {"torch": "2.15.0"}}  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def gather(clone: Path) -> list[str]:
    said = collect(read_runs((clone.parent / "runs",))[0], clone)
    write_tables(clone)
    return said


@pytest.fixture
def measured(clone: Path) -> Path:
    """The clone with two runs of gap."""
    for seed, accuracies in ACCURACIES.items():
        finish(clone, "gap", seed, accuracies)
    assert gather(clone) == [f"{clone}/results/gap.json: seeds 0, 1"]
    return clone


def run(clone: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distcv.results", *words]
    return subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
def test_finished_runs_become_rows_by_one_command(clone: Path) -> None:
    """`--collect` would leave wrong numbers in docs/results.md, README.md or the recipe's head."""
    for seed, accuracies in ACCURACIES.items():
        finish(clone, "gap", seed, accuracies)
    collected = run(clone, "../runs", "--collect")
    assert collected.returncode == 0, collected.stderr
    assert "results/gap.json: seeds 0, 1" in collected.stdout
    checked = run(clone, "--check")
    assert (checked.returncode, checked.stderr) == (0, "") and "in order" in checked.stdout
    last = [accuracies[-1] for accuracies in ACCURACIES.values()]
    mean = f"{statistics.mean(last):.2f} ± {statistics.stdev(last):.2f}"
    page = (clone / "docs/results.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| ours | [`gap`]"))
    assert [cell.strip() for cell in row.split("|")[3:-1]] == [
        f"[{mean}](../results/gap.json)", "2", "98.85 ± 0.06", "3", "44 s", "AMD EPYC, 2 cores",
        "fp32", COMMIT[:12],
    ]  # fmt: skip
    assert "| document | – | 98.99 (printed as 99.99) | 1 | 98.81 | 20 |" in page
    best = [max(accuracies) for accuracies in ACCURACIES.values()]
    at_best = f"{statistics.mean(best):.2f} ± {statistics.stdev(best):.2f}"
    assert f"`gap`: {mean} % (n = 2; at the best epochs {at_best}), 0.36 points above" in page
    assert "above the document's best epoch, aim reached. " in page
    assert (
        "for seed in 0 1; do python -m distcv.train --recipe gap --seed $seed --name gap-" in page
    )
    assert "gap-$seed --compile; done" in page
    readme = (clone / "README.md").read_text()
    assert readme.startswith("# Mine\n") and "old" not in readme
    assert f"It reaches test accuracy {mean} % (mean ± standard deviation, n = 2" in readme
    assert f"[{mean}](results/gap.json) (n = 2)" in readme
    head = (clone / "configs/gap.yaml").read_text()
    assert f"# Accuracy: {mean} %, n = 2 seeds, last epoch, no test-time augmentation.\n" in head
    assert run(clone, "--tables").stdout.strip() == "nothing to change"


def test_what_is_not_measured_says_so(measured: Path) -> None:
    """A reader could take a recipe that was never run for a reproduced one."""
    page, readme = ((measured / name).read_text() for name in ("docs/results.md", "README.md"))
    assert (
        "| reproduced | [`gap_document`](../configs/gap_document.yaml) | not measured yet" in page
    )
    assert "`tiny_v1`: not measured yet." in page and "| – | – | not measured yet |" not in page
    assert "| `tiny_v1` | 24,986 | MNIST | – |  | not measured yet |" in readme
    assert "# Accuracy: not measured yet.\n" in (measured / "configs/tiny_v1.yaml").read_text()
    document = (measured / "configs/gap_document.yaml").read_text()
    assert "# Document: best test accuracy 98.99 % in 20 epochs.\n# Accuracy: not mea" in document


def test_files_hold_results_and_curves_and_no_details(measured: Path) -> None:
    """Clones would grow by the confusion matrix of every run, or lack the curves of its epochs."""
    results = json.loads((measured / "results/gap.json").read_text())
    assert [result["seed"] for result in results] == [0, 1]
    assert not {"confusion", "mistakes"} & results[0].keys() and results[0]["options"] == [
        "compile"
    ]
    lines = (measured / "results/curves/gap.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["seed"], row["epoch"]) for row in rows] == [
        (s, e) for s in (0, 1) for e in (1, 2, 3)
    ]
    assert [row["test_accuracy"] for row in rows] == [a for one in ACCURACIES.values() for a in one]
    assert set(rows[0]) == {"seed", "step", "epoch", "train_loss", "train_accuracy", "test_loss",
                            "test_accuracy", "seconds"}  # fmt: skip


def test_later_runs_join_those_that_are_there(measured: Path) -> None:
    """Adding one seed would delete the seeds before it, or count a run of another recipe."""
    shutil.rmtree(measured.parent / "runs")
    finish(measured, "gap", 3, (97.0, 98.0, 99.2))
    finish(measured, "gap", 1, (97.0, 98.0, 99.1))
    other = finish(measured, "gap", 7, (97.0, 98.0, 99.2), at="other")
    (other / "config.yaml").write_text(load_recipe("gap").model_copy(update={"lr": 9.0}).to_yaml())
    change_recipe(measured, "passing", **load_recipe("gap").model_dump(mode="json") | {"lr": 0.5})
    passing = finish(measured, "passing", 0, (97.0, 98.0, 99.2))
    (measured / "configs/passing.yaml").unlink()
    make_run(measured.parent / "runs/open", epochs=3, finished=False)
    said = gather(measured)
    assert said == [
        f"{measured}/results/gap.json: seeds 0, 1, 3",
        f"left out {other}: its result is not that of its config.yaml",
        f"left out {passing}: of no recipe in configs/",
    ]
    results = json.loads((measured / "results/gap.json").read_text())
    assert [result["test_accuracy"] for result in results] == [99.31, 99.1, 99.2]
    assert problems(measured) == []
    assert "| 3 (seeds 0, 1, 3) |" in (measured / "docs/results.md").read_text()


def test_results_of_an_earlier_state_of_a_recipe_go(measured: Path) -> None:
    """Published means would mix runs from before and after a change of the recipe."""
    shutil.rmtree(measured.parent / "runs")
    change_recipe(measured, "gap", lr=0.25)
    finish(measured, "gap", 4, (97.0, 98.0, 99.2))
    (said,) = gather(measured)
    assert said.endswith("results/gap.json: seeds 4, 2 of an earlier state of the recipe dropped")
    assert problems(measured) == []


def test_a_result_that_lacks_what_the_page_needs_takes_no_place(measured: Path) -> None:
    """A result that lacks needed fields would overwrite a good one and break the page."""
    before = (measured / "results/gap.json").read_text()
    path = measured.parent / "runs/gap-0/result.json"
    result = json.loads(path.read_text())
    del result["best_test_accuracy"], result["epochs"]
    path.write_text(json.dumps(result))
    assert gather(measured) == [
        f"{measured}/results/gap.json: seeds 0, 1",
        f"left out {path.parent}: its result has no best_test_accuracy, epochs",
    ]
    assert (measured / "results/gap.json").read_text() == before
    assert problems(measured) == []


def test_what_computed_a_part_of_a_run_is_among_its_options(clone: Path) -> None:
    """A run that used `--compile` only before a resume would be published as one without it."""
    path = finish(clone, "gap", 0, ACCURACIES[0]) / "environment.json"
    starts = json.loads(path.read_text())["starts"]
    resumed = starts[0] | {"options": {"compile": False}}
    path.write_text(json.dumps({"starts": [*starts, resumed]}))
    gather(clone)
    (result,) = json.loads((clone / "results/gap.json").read_text())
    assert result["options"] == ["compile"]
    head = (clone / "configs/gap.yaml").read_text()
    assert "on AMD EPYC, 2 cores, fp32, torch 2.15.0, with --compile.\n" in head


def test_a_recipe_on_other_data_is_no_row_of_the_network_s_document(clone: Path) -> None:
    """A Fashion-MNIST accuracy would appear among the results of a network trained on MNIST."""
    gap = load_recipe("gap").model_dump(mode="json") | {"epochs": 3}
    change_recipe(clone, "mine", **gap | {"dataset": "fashion_mnist"})
    change_recipe(clone, "faster", **gap | {"lr": 0.2})
    finish(clone, "mine", 0, (80.0, 85.0, 90.0))
    finish(clone, "faster", 0, ACCURACIES[0])
    gather(clone)
    page = (clone / "docs/results.md").read_text()
    assert "mine" not in page and "`faster`: 99.31 % (n = 1; " in page
    assert "aim" not in page.split("`faster`: 99.31")[1].split("\n")[0], "it has none of its own"
    assert "# Accuracy: 90.00 %, n = 1 seed" in (clone / "configs/mine.yaml").read_text()
    assert problems(clone) == []


def test_a_recipe_that_does_not_tell_its_command_is_named(clone: Path) -> None:
    """A recipe without its command would stop `--tables` without the name of the file to fix."""
    (clone / "configs/mine.yaml").write_text("model: gap\nlr: 0.3\n")
    wrong = "configs/mine.yaml: no line that tells its command: put '# Command:  python -m "
    assert [line[: len(wrong)] for line in problems(clone)] == [wrong]
    ended = run(clone, "--tables")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"error: {wrong}") and ended.stderr.count("\n") == 1


def test_of_two_runs_with_one_seed_the_user_chooses(measured: Path) -> None:
    """The luckier of two runs with one seed could be published without anyone's choice."""
    again = finish(measured, "gap", 1, (97.0, 98.0, 99.9), at="lucky")
    with pytest.raises(InputError, match=f"runs of gap with the same seed: .*, {again}: name one"):
        gather(measured)


def test_our_recipe_is_set_against_the_document_s(measured: Path) -> None:
    """Readers would see a wrong gain over the document's recipe, or not which settings changed."""
    for seed in (0, 1):
        finish(measured, "gap_document", seed, (96.0, 97.0, 98.9 + seed / 10))
    gather(measured)
    page = (measured / "docs/results.md").read_text()
    assert "`gap` is 0.40 points above the document's recipe (95 % interval of the diff" in page
    assert "lr 0.01 → 0.1, nesterov False → True" in page
    assert "translate 0 → 1, rotate 0.0 → 10.0, scale 0.0 → 0.1." in page
    theirs = "`gap_document`: 98.95 ± 0.07 % (n = 2; at the best epochs 98.95 ± 0.07), 0.04 points"
    assert f"{theirs} below the document's best epoch." in page


def edit(path: str, old: str, new: str) -> Any:
    def change(clone: Path) -> None:
        text = (clone / path).read_text()
        assert old in text
        (clone / path).write_text(text.replace(old, new, 1))

    return change


def two_of_one_seed(clone: Path) -> None:
    path = clone / "results/gap.json"
    results = json.loads(path.read_text())
    path.write_text(json.dumps([*results, results[1]]))


def stranger(path: str) -> Any:
    return lambda clone: (clone / path).write_text("[]")


def less_a_seed(clone: Path) -> None:
    path = clone / "results/curves/gap.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))


FAULTS = {
    "results/curves/gap.jsonl: seed 1: test_accuracy is 99.39, that of the result is 99.99": edit(
        "results/gap.json", '"test_accuracy": 99.39', '"test_accuracy": 99.99'
    ),
    "results/gap.json: seed 0: config_sha256 is {old}, that of configs/gap.yaml is {new}: meas": (
        lambda clone: change_recipe(clone, "gap", lr=0.3)
    ),
    "results/gap.json: seed 0: epochs is 3.0, that of configs/gap.yaml is 4: measure again": (
        lambda clone: change_recipe(clone, "gap", epochs=4)
    ),
    "results/gap.json: seed 0: params is 9491, that of configs/gap.yaml is 9490: measure": edit(
        "results/gap.json", '"params": 9490', '"params": 9491'
    ),
    "results/gap.json: seed 1 counts 2 times": two_of_one_seed,
    "results/curves/gap.jsonl: seed 1 is in one of results and curves only": less_a_seed,
    "results/curves/gap.jsonl: seed 0: epochs [1.0, 1.0, 3.0] are not in order": edit(
        "results/curves/gap.jsonl", '"epoch": 2.0', '"epoch": 1.0'
    ),
    "results/gapp.json: no recipe configs/gapp.yaml: rename or remove it": stranger(
        "results/gapp.json"
    ),
    "results/curves/tiny_v1.jsonl: no results/tiny_v1.json: collect": stranger(
        "results/curves/tiny_v1.jsonl"
    ),
    "results/gap.json is damaged (JSONDecodeError": edit("results/gap.json", "[", ""),
    "results/gap.json is damaged (KeyError('params')": edit(
        "results/gap.json", '"params"', '"size"'
    ),
    "results/curves/gap.jsonl is damaged (KeyError('test_loss')": edit(
        "results/curves/gap.jsonl", "test_loss", "loss"
    ),
    "docs/results.md:1: '# Result', the result files make '# Results': python -m": edit(
        "docs/results.md", "# Results", "# Result"
    ),
    "README.md:4: 'It reaches test accuracy 99.95": edit(
        "README.md", "accuracy 99.35", "accuracy 99.95"
    ),
    "configs/gap.yaml:4: '# Time:     4 s of": edit("configs/gap.yaml", ":     44 s", ":     4 s"),
    "configs/tiny_v1.yaml:3: '# Accuracy: 99.90 %', the result files make '# Accuracy: not m": edit(
        "configs/tiny_v1.yaml", "not measured yet.", "99.90 %"
    ),
    "README.md: no place '<!-- gap --> … <!-- end -->': put it in": edit(
        "README.md", "- gap -", "-"
    ),
    "results/documents.yaml: no configs/tiny_v2.yaml: add the recipe": edit(
        "results/documents.yaml", "tiny_v1", "tiny_v2"
    ),
}


@pytest.mark.parametrize("said", FAULTS)
def test_the_check_finds(said: str, measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edited accuracies, stale results or damaged files would pass `--check` and be published."""
    monkeypatch.chdir(measured)
    assert problems(Path()) == []
    sums = [load_recipe("configs/gap.yaml").sha256]
    FAULTS[said](measured)
    sums.append(load_recipe("configs/gap.yaml").sha256)
    found = problems(Path())
    expected = said.replace("{old}", sums[0]).replace("{new}", sums[1])
    assert any(line.startswith(expected) for line in found), found
    assert all("\n" not in line for line in found)


def test_the_check_fails_with_a_line_for_each_problem(measured: Path) -> None:
    """`--check` would exit with 0 despite wrong results, or show only the first fault."""
    edit("docs/results.md", "# Results", "# Result")(measured)
    two_of_one_seed(measured)
    checked = run(measured, "--check")
    assert checked.returncode == 2
    (first, second, third, _) = [line.split(":")[0] for line in checked.stderr.splitlines()]
    assert first == "results/gap.json" and {second, third} == {"docs/results.md", "README.md"}


def test_elsewhere_than_in_a_clone_it_is_one_line(tmp_path: Path) -> None:
    """A user who runs `--check` outside a clone would get a traceback instead of the reason."""
    checked = run(tmp_path, "--check")
    assert checked.returncode == 2
    assert checked.stderr == "error: no recipes in configs: do this in a clone of distcv\n"


def test_results_without_curves_say_so(measured: Path) -> None:
    """A reader would not learn why a recipe's results come without an analysis."""
    (measured / "results/curves/gap.jsonl").unlink()
    write_tables(measured)
    assert (
        "`gap`: the curves of these runs were not kept."
        in (measured / "docs/results.md").read_text()
    )
    assert problems(measured) == []


def test_what_runs_ran_on_is_in_their_row_and_command() -> None:
    """Readers would repeat GPU runs with the wrong launcher, or see a mean of CPU and GPU times."""
    cpu = {"device": "cpu", "cpu": "AMD EPYC", "cores": 2, "threads": "1", "seconds": 90.0}
    gpus = {"device": "NVIDIA H100", "processes": 2, "strategy": "ddp", "seconds": 4.0}
    first, second = cpu | {"seed": 0}, gpus | {"seed": 1, "options": ["compile", "sync_bn"]}
    one = Measured("gap", load_recipe("gap"), [first], {})
    assert (one.hardware, one.time) == ("AMD EPYC, 2 cores, 1 thread", "1 min 30 s")
    other = Measured("gap", load_recipe("gap"), [second], {})
    assert (other.hardware, other.time) == ("2 x NVIDIA H100 (ddp)", "4 s")
    assert command(other) == (
        "for seed in 1; do accelerate launch --config_file launch/ddp.yaml --num_processes 2 "
        "-m distcv.train --recipe gap --seed $seed --name gap-$seed --compile --sync-bn; done\n"
    )
    both = Measured("gap", load_recipe("gap"), [first, second], {})
    assert both.hardware == f"{one.hardware} or {other.hardware}"
    assert both.time == "–", "a mean over both says nothing"


def curve(*epochs: tuple[float, float, float]) -> list[dict[str, float]]:
    """Rows of (train accuracy, test accuracy, test loss)."""
    keys = ("train_accuracy", "test_accuracy", "test_loss")
    return [{"epoch": i} | dict(zip(keys, e, strict=True)) for i, e in enumerate(epochs, start=1)]


SHIFTED = [curve((90.0, 98.0, 0.05), (99.0, last, 0.02)) for last in (99.4, 99.6)]
OVERFITTED = [curve((98.0, 98.5, 0.05), (99.9, 99.2, 0.02), (100.0, 99.1, 0.03))]


@pytest.mark.parametrize(
    ("curves", "said"),
    [
        (
            OVERFITTED,
            "overfits: train is 0.90 points above test (100.00 and 99.10 %); test loss rises from "
            "0.0200 (epoch 2) to 0.0300; the last epoch is 0.10 points below the best (epoch 2)",
        ),
        (
            SHIFTED,
            "no overfitting: train is 0.50 points below test (99.00 and 99.50 %), being measured "
            "on images made harder by shifts and rotations and zoom; test loss ends at 0.0200, its "
            "lowest is 0.0200 (epoch 2); no epoch is better than the last",
        ),
    ],
)
def test_analysis_in_words(curves: list[list[dict[str, float]]], said: str, measured: Path) -> None:
    """The page would call an overfitted network free of overfitting, or the reverse."""
    results = [{"seed": seed} for seed in range(len(curves))]
    one = Measured("gap", load_recipe("gap"), results, dict(enumerate(curves)))
    assert analysis.analysis(one) == said


def test_what_a_recipe_averages_is_tested_and_not_trained() -> None:
    """Readers would not learn that train accuracy is measured before the weights are averaged."""
    recipe = load_recipe("gap_document").model_copy(update={"ema_decay": 0.999})
    said = analysis.analysis(Measured("gap", recipe, [{"seed": 0}], {0: SHIFTED[0]}))
    assert said.split("; ")[0] == (
        "no overfitting: train is 0.40 points below test (99.00 and 99.40 %), being measured on "
        "images made harder by dropout and with the weights before their averaging"
    )


def test_a_test_loss_that_label_smoothing_keeps_up_is_no_overfitting() -> None:
    """A reader would take the higher test loss that label smoothing causes for overfitting."""
    recipe = load_recipe("gap").model_copy(update={"label_smoothing": 0.1})
    said = analysis.analysis(Measured("gap", recipe, [{"seed": 0}], {0: OVERFITTED[0]}))
    assert said.split("; ")[1] == "test loss ends at 0.0300, which label smoothing keeps up"


def test_a_further_recipe_is_named_and_has_an_aim_of_its_own(clone: Path) -> None:
    """A second recipe of a network would be judged by the aim of the first one."""
    change_recipe(clone, "gap_short", **load_recipe("gap").model_dump(mode="json") | {"epochs": 3})
    of_gap = DOCUMENTS["gap"] | {"further_aims": {"gap_short": {"accuracy": 99.4, "runs": 1}}}
    documents = yaml.safe_dump(DOCUMENTS | {"gap": of_gap}, sort_keys=False)
    (clone / "results/documents.yaml").write_text(documents)
    change_recipe(clone, "gap", epochs=8)
    finish(clone, "gap_short", 0, ACCURACIES[0])
    gather(clone)
    page = (clone / "docs/results.md").read_text()
    assert "| [99.31](../results/gap_short.json) (n = 1, `gap_short`) |\n" in page
    assert "aim missed by 0.090 points" in page
    assert "for seed in 0 1; do python -m distcv.train --recipe gap " in page, "as its aim says"


def test_an_aim_is_reached_by_the_mean_as_it_is() -> None:
    """A mean of 99.396 % would be rounded to 99.40 % and published as `aim reached`."""
    aim = Aim(accuracy=99.4, runs=10)
    assert analysis.verdict(99.396, 10, aim) == "aim missed by 0.004 points"
    assert analysis.verdict(statistics.mean([99.4] * 3), 3, aim) == "aim reached by 3 of 10 runs"
    assert analysis.verdict(99.41, 10, aim) == "aim reached"


def test_the_repository_s_results_are_in_order() -> None:
    """The repository would publish numbers that its own result files do not support."""
    assert problems(ROOT) == []


def test_every_network_has_its_document_and_the_document_s_recipe() -> None:
    """A user could not reproduce a network, because its document or that recipe is missing."""
    documents = read_documents(ROOT)
    assert {load_recipe(name).model for name in documents} == set(MODELS)
    for name, said in documents.items():
        model = load_recipe(name).model
        assert load_recipe(f"{name}_document").model == model
        assert said.parameters in (None, MODELS[model].params)
        assert said.epochs in (None, load_recipe(f"{name}_document").epochs)
        assert {load_recipe(other).model for other in said.further_aims} <= {model}


@pytest.mark.slow
def test_commands_of_the_page_pick_their_recipes() -> None:
    """A command copied from docs/results.md would be refused, or would train another recipe."""
    page = (ROOT / "docs/results.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("for seed in ")]
    assert len(lines) >= 2 * len(read_documents(ROOT))
    for line in lines:
        flags = line.split("distcv.train ")[1].removesuffix("; done").replace("$seed", "3").split()
        recipe, options = read_command_line(
            prog="", description="", find_model=find_model, args=flags
        )
        name = flags[flags.index("--recipe") + 1]
        assert recipe == load_recipe(name).model_copy(update={"seed": 3})
        assert options.name == f"{name}-3"
