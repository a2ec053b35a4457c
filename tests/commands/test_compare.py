"""Two recipes side by side, and the intervals that this and the report state."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distcv import compare
from distcv.config import InputError, load_recipe
from distcv.intervals import difference_interval, mean_interval
from support.runs import ROOT

# Hours of sleep gained with two drugs by the same ten patients: Student, "The probable error of a
# mean", 1908. The intervals are those that R prints for its copy, `sleep`.
DRUG_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
DRUG_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
PAIRED, WELCH = (1.58, 0.7001142, 2.4598858), (1.58, -0.2054832, 3.3654832)
RESULT = json.loads((ROOT / "results/gap.json").read_text())[0]
START = {
    "commit": "a" * 40, "python": "3.11.7", "versions": {"torch": "2.15.0"}, "cpu": "one CPU",
    "threads": "2", "device": "cpu", "processes": 1, "nodes": 1, "strategy": "single",
    "time": "2026-11-21T18:38:20+0000", "options": {"compile": False, "name": "x"},
}  # fmt: skip


def test_intervals_are_those_of_a_textbook() -> None:
    """Users would publish wrong confidence intervals for means and differences."""
    assert mean_interval(DRUG_1) == pytest.approx((0.75, -0.5297804, 2.0297804))
    assert difference_interval(DRUG_1, DRUG_2, paired=True) == pytest.approx(PAIRED)
    assert difference_interval(DRUG_1, DRUG_2, paired=False) == pytest.approx(WELCH)
    # t at 4 degrees of freedom and 99 % is 4.604 in every table; the deviation here is 1.
    half = 4.604095 / 5**0.5
    values = [8.0, 10.0, 10.0, 10.0, 10.5]
    values = [10 + (v - np.mean(values)) / np.std(values, ddof=1) for v in values]
    assert mean_interval(values, 0.99) == pytest.approx((10, 10 - half, 10 + half))


def test_intervals_of_equal_values_have_no_width_and_of_one_value_there_are_none() -> None:
    """A single run would get a confidence interval, or pairs without a partner a difference."""
    assert difference_interval([1, 1], [2, 2, 2], paired=False) == (1, 1, 1)
    assert difference_interval([1, 3], [2, 4], paired=True) == (1, 1, 1)
    for bad in (lambda: mean_interval([1.0]), lambda: difference_interval([1], [2, 3], False),
                lambda: difference_interval([1, 2], [1, 2, 3], True)):  # fmt: skip
        with pytest.raises(ValueError):
            bad()


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """A 95 % interval would miss the true value more often than one time in 20."""
    draws = np.random.default_rng(0).normal(size=(1500, 8))
    covered = np.zeros(3)
    for row in draws:
        a, b = row[:3].tolist(), (1 + 3 * row[3:]).tolist()  # of unequal size and deviation
        found = [(0, mean_interval(a)), (1, difference_interval(a, b[:3], paired=True)),
                 (1, difference_interval(a, b, paired=False))]  # fmt: skip
        covered += [low <= truth <= high for truth, (_, low, high) in found]
    # Four standard errors; the normal distribution's 1.96 would cover 81 % at n = 3. Welch's is
    # approximate.
    assert (abs(covered / len(draws) - 0.95) < 4 * (0.95 * 0.05 / len(draws)) ** 0.5).all(), covered


def make_runs(
    folder: Path,
    accuracies: list[float],
    *,
    first_seed: int = 0,
    start: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Run folders of one recipe with these accuracies, by consecutive seeds."""
    for seed, accuracy in enumerate(accuracies, first_seed):
        run = folder / f"run-{seed}"
        run.mkdir(parents=True)
        recipe = load_recipe("gap").model_copy(update={"seed": seed, **changes})
        (run / "config.yaml").write_text(recipe.to_yaml())
        (run / "result.json").write_text(json.dumps(RESULT | {"test_accuracy": accuracy}))
        starts = {"starts": [START | (start or {})]}
        (run / "environment.json").write_text(json.dumps(starts))
    return folder


class Compare:
    """Calls the command in this process; the JSON that it wrote, and the lines it printed."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, capsys: Any) -> None:
        self.file, self.patch, self.capsys = folder / "out/found.json", patch, capsys

    def __call__(self, *words: Any) -> tuple[dict[str, Any], list[str]]:
        self.patch.setattr(sys, "argv", ["x", *map(str, words), "--json", str(self.file)])
        compare.main()
        return json.loads(self.file.read_text()), self.capsys.readouterr().out.splitlines()


@pytest.fixture
def compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Compare:
    return Compare(tmp_path, monkeypatch, capsys)


def test_runs_are_paired_by_their_seeds(tmp_path: Path, compared: Compare) -> None:
    """Runs of different seeds would be paired, and chance would hide a real difference."""
    a, b = make_runs(tmp_path / "a", DRUG_1), make_runs(tmp_path / "b", DRUG_2, lr=0.3)
    make_runs(tmp_path / "b/more", [50.0], first_seed=77, lr=0.3)
    found, lines = compared(a, b)
    figure = found["figures"]["test_accuracy"]
    assert (figure["difference"], *figure["interval"]) == pytest.approx(PAIRED)
    assert figure["a"]["values"] == DRUG_1 and figure["b"]["values"] == DRUG_2
    (row,) = [line.split() for line in lines if line.startswith("test accuracy")]
    assert row[3:] == "0.75 ± 1.79 2.33 ± 2.00 +1.58 +0.70 to +2.46".split()
    assert "left out of B, as the other side has no such seed: 77" in lines
    assert "paired over n = 10 (seeds 0, 1, 2, 3, 4, 5, 6, 7, 8, 9)" in lines
    assert any(line.startswith("B is 1.58 points of test accuracy above A") for line in lines)
    assert any(line.endswith("excludes 0: the two differ") for line in lines)
    assert found["recipe"] == {"lr": [0.1, 0.3]} and "  lr: 0.1 -> 0.3" in lines
    assert found["environment"] == {} and "environment: no difference" in lines


def test_a_difference_too_small_for_two_digits_gets_more(tmp_path: Path, compared: Compare) -> None:
    """A real but small difference would be printed as 0.00."""
    a = make_runs(tmp_path / "a", [99.0, 99.5, 99.2])
    b = make_runs(tmp_path / "b", [99.0039, 99.5041, 99.204], lr=0.3)
    lines = compared(a, b)[1]
    assert (
        "B is 0.0040 points of test accuracy above A; the 95 % interval, +0.0038 to +0.0042, "
        "excludes 0: the two differ"
    ) in lines
    (row,) = [line.split() for line in lines if line.startswith("test accuracy")]
    assert row[3:] == "99.2333 ± 0.2517 99.2373 ± 0.2518 +0.0040 +0.0038 to +0.0042".split()


def test_without_common_seeds_they_are_not_paired(tmp_path: Path, compared: Compare) -> None:
    """Runs of unrelated seeds would be paired, and chance would look like a real difference."""
    a = make_runs(tmp_path / "a", DRUG_2)
    found, lines = compared(a, make_runs(tmp_path / "b", DRUG_1, first_seed=10))
    mean, low, high = WELCH
    figure = found["figures"]["test_accuracy"]
    assert (figure["difference"], *figure["interval"]) == pytest.approx((-mean, -high, -low))
    assert "not paired, for want of common seeds (Welch's interval)" in lines
    assert any("1.58 points of test accuracy below A" in line for line in lines)
    assert any(line.endswith("includes 0: no difference is shown") for line in lines)


def test_one_pair_has_a_difference_and_no_interval(tmp_path: Path, compared: Compare) -> None:
    """The difference of a single pair of runs would look proven though it may be chance."""
    a = make_runs(tmp_path / "a", [99.5, 99.0])
    found, lines = compared(a, make_runs(tmp_path / "b", [99.1], first_seed=1) / "run-1")
    figure = found["figures"]["test_accuracy"]
    assert figure["difference"] == pytest.approx(0.1) and figure["interval"] is None
    said = "B is 0.10 points of test accuracy above A; a single run has no interval: "
    assert said + "this may be chance" in lines


def test_times_are_compared_on_the_same_hardware_only(tmp_path: Path, compared: Compare) -> None:
    """A recipe would look faster only because it ran on more processes or a faster machine."""
    a = make_runs(tmp_path / "a", [99.0, 99.1])
    same = make_runs(tmp_path / "same", [99.0, 99.1], start={"versions": {"torch": "2.16.0"}})
    found, lines = compared(a, same)
    assert found["figures"]["seconds"]["a"]["mean"] == RESULT["seconds"]
    assert found["environment"] == {"torch": [["2.15.0"], ["2.16.0"]]}
    more = {"processes": 2, "strategy": "ddp", "commit": "b" * 40 + "-dirty"}
    found, lines = compared(a, make_runs(tmp_path / "two", [99.0, 99.1], start=more))
    assert list(found["figures"]) == ["test_accuracy", "test_loss"]
    here, there = (f"device cpu, processes {n}, nodes 1, cpu one CPU, threads 2" for n in (1, 2))
    assert f"times are not comparable: A ran on {here}, B on {there}" in lines
    assert {"  strategy: single -> ddp", "  processes: 1 -> 2"} < set(lines)
    assert lines[-3:] == ["commit", f"  {'a' * 12}", f"  {'b' * 12}-dirty"]


def test_old_runs_without_a_record_of_their_starts_are_compared(
    tmp_path: Path, compared: Compare
) -> None:
    """Users could not compare old runs that have no environment.json."""
    a, b = make_runs(tmp_path / "a", [99.0, 99.1]), make_runs(tmp_path / "b", [99.0, 99.3])
    for path in (*a.glob("*/environment.json"), *b.glob("*/environment.json")):
        path.unlink()
    _, lines = compared(a, b)
    assert "times are not comparable: A ran on unknown hardware, B on unknown hardware" in lines
    assert lines[-1] == f"  {RESULT['commit'][:12]}", "which the result knows, too"


def test_wrong_input_gets_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compared: Compare
) -> None:
    """Unfinished, mixed or repeated runs would be compared, or give a traceback."""
    monkeypatch.chdir(tmp_path)
    make_runs(Path("a"), [99.0, 99.1])
    make_runs(Path("two/a"), [99.0])
    make_runs(Path("two/b"), [99.0], first_seed=1, lr=0.3)
    make_runs(Path("twice/a"), [99.0])
    make_runs(Path("twice/b"), [99.0])
    make_runs(Path("begun"), [99.0])
    Path("begun/run-0/result.json").unlink()
    for other, said in {
        "a": "a and a are the same folder: give two",
        "none": "no folder none: give run folders, or a folder that holds some",
        "begun": "no finished run in begun; left out begun/run-0: not finished: train first",
        "two": "two has runs of 2 recipes: gap on mnist lr 0.1 (run-0); gap on mnist lr 0.3 "
        "(run-1): give one's runs",
        "twice": "twice has two runs of seed 0, one of them run-0: move one elsewhere",
    }.items():
        with pytest.raises(InputError) as refused:
            compared("a", other)
        assert str(refused.value) == said
    Path("file").touch()
    compared.file = Path("file/found.json")
    with pytest.raises(InputError, match=r"^--json file/found.json: .*: choose another file$"):
        compared("a", "two/a")


@pytest.mark.slow
def test_the_command_needs_no_torch_and_says_by_its_exit_code_what_went_wrong(
    tmp_path: Path,
) -> None:
    """Users would wait for torch to load, and scripts could not detect a failed comparison."""
    a, b = make_runs(tmp_path / "a", [99.0, 99.1]), make_runs(tmp_path / "b", [99.0, 99.3])
    code = "import sys; from distcv.compare import main; main(); sys.exit('torch' in sys.modules)"
    words = [sys.executable, "-c", code, str(a), str(b)]
    assert subprocess.run(words, timeout=60, stdout=subprocess.DEVNULL).returncode == 0
    words = [sys.executable, "-m", "distcv.compare", str(a), str(tmp_path / "none")]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: no folder") and ran.stderr.count("\n") == 1
