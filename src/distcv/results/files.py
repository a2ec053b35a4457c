"""Result files: what runs came to, kept in a clone, one file for each recipe of ``configs/``.

``results/<recipe>.json`` is a list of its runs' results, by seed; ``results/curves/<recipe>.jsonl``
has a row for each epoch of each of them.
"""

import json
import os
import socket
import statistics
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from distcv.command_line import write_file
from distcv.config import InputError, Recipe, load_recipe
from distcv.results import (
    DETAILS,
    OPTIONS,
    Run,
    differences,
    duration,
    grouped,
    hardware,
    read_rows,
    read_starts,
    without_seed,
)

CURVE = (
    "step", "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds",
)  # fmt: skip

RESULT = {
    "model", "params", "dataset", "seed", "epochs", "steps", "test_accuracy", "best_test_accuracy",
    "seconds", "device", "precision", "commit", "config_sha256", "environment",
}  # fmt: skip
NONE = "–"

Row = dict[str, Any]


class Measured(NamedTuple):
    """What is known of a recipe of ``configs/``."""

    name: str
    recipe: Recipe
    results: list[Row]
    """The runs' results; empty if nothing is measured yet."""
    curves: dict[int, list[Row]]
    """The rows of each run's epochs, by seed; empty where they weren't kept."""

    @property
    def accuracies(self) -> list[float]:
        """Test accuracy at the last epoch, in percent."""
        return [result["test_accuracy"] for result in self.results]

    @property
    def hardware(self) -> str:
        """What the runs ran on; each kind once."""
        kinds = (hardware((r | r.get("environment", {})).get) for r in self.results)
        return " or ".join(dict.fromkeys(kinds))

    @property
    def flags(self) -> str:
        """The flags of some of the runs beside their recipe, as ` --compile`, or nothing."""
        options = dict.fromkeys(name for r in self.results for name in r.get("options", []))
        return "".join(f" --{name.replace('_', '-')}" for name in options)

    @property
    def with_flags(self) -> str:
        """Those flags in a sentence, as `, with --compile`, or nothing."""
        return f", with{self.flags}" if self.flags else ""

    @property
    def time(self) -> str:
        """Mean of training and evaluation, as `43 s`; a dash where the hardware wasn't the same."""
        if not self.results or " or " in self.hardware:
            return NONE
        return duration(statistics.mean(result["seconds"] for result in self.results))


def result_file(clone: Path, name: str) -> Path:
    """Where a recipe's results are."""
    return clone / f"results/{name}.json"


def curve_file(clone: Path, name: str) -> Path:
    """Where its runs' curves are."""
    return clone / f"results/curves/{name}.jsonl"


def recipes(clone: Path) -> dict[str, Recipe]:
    """The recipes of a clone, by name.

    Raises:
        InputError: it is none, or a recipe is wrong.
    """
    found = {path.stem: load_recipe(path) for path in sorted((clone / "configs").glob("*.yaml"))}
    if not found:
        raise InputError(f"no recipes in {clone / 'configs'}: do this in a clone of distcv")
    return found


def read_measured(clone: Path, name: str, recipe: Recipe) -> Measured:
    """Read the files of a recipe, as far as there are any.

    Raises:
        InputError: one of them is damaged.
    """
    results: list[Row] = []
    curves: dict[int, list[Row]] = {}
    path = result_file(clone, name)
    try:
        if path.exists():
            results = sorted(map(_checked, json.loads(path.read_text())), key=lambda r: r["seed"])
        path = curve_file(clone, name)
        for line in path.read_text().splitlines() if path.exists() else []:
            row = json.loads(line)
            row |= {key: float(row[key]) for key in CURVE}
            curves.setdefault(int(row["seed"]), []).append(row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error!r}): collect its runs again") from None
    return Measured(name, recipe, results, curves)


def _checked(result: Row) -> Row:
    """The result if all is in it that is used; else a KeyError or a TypeError."""
    if missing := sorted(RESULT - result.keys()):
        raise KeyError(*missing)
    numbers = ("test_accuracy", "best_test_accuracy", "seconds", "epochs")
    return result | {key: float(result[key]) for key in numbers} | {"seed": int(result["seed"])}


def collect(runs: list[Run], clone: Path) -> list[str]:
    """Put finished runs into the files of their recipes; lines on what was done.

    A run belongs to the recipe that it equals but for the seed. It takes the place of the result of
    its seed; results of another state of the recipe are dropped.

    Raises:
        InputError: two runs of one recipe and seed; a file can't be read or written.
    """
    said, known = [], recipes(clone)
    plain = {without_seed(recipe) for recipe in known.values()}
    finished = [(run, _unfit(run.result, run.recipe, plain)) for run in runs if run.result]
    fit = [run for run, why in finished if not why]
    for name, recipe in known.items():
        own = [run for run in fit if without_seed(run.recipe) == without_seed(recipe)]
        if own:
            said.append(_add(clone, read_measured(clone, name, recipe), own))
    return said + [f"left out {run.folder}: {why}" for run, why in finished if why]


def _unfit(result: Row, recipe: Recipe, plain: set[Recipe]) -> str:
    """Why a finished run becomes no row, if so; ``plain`` are the recipes that there are."""
    if not _is_of(result, recipe):
        return "its result is not that of its config.yaml"
    if missing := sorted(RESULT - result.keys()):
        return f"its result has no {', '.join(missing)}"
    return "" if without_seed(recipe) in plain else "of no recipe in configs/"


def _add(clone: Path, measured: Measured, runs: list[Run]) -> str:
    """Write both files of a recipe with these runs among those that it has; a line on it."""
    seeds = Counter(run.recipe.seed for run in runs)
    if twice := [str(run.folder) for run in runs if seeds[run.recipe.seed] > 1]:
        raise InputError(
            f"runs of {measured.name} with the same seed: {', '.join(twice)}: name one"
        )
    kept = {
        r["seed"]: r
        for r in measured.results
        if _is_of(r, measured.recipe.model_copy(update={"seed": r["seed"]}))
    }
    results = kept | {run.recipe.seed: _result(run) for run in runs}
    curves = {seed: measured.curves.get(seed, []) for seed in kept}
    curves |= {run.recipe.seed: _curve(run) for run in runs}
    order = sorted(results)
    rows = [{"seed": seed} | row for seed in order for row in curves[seed]]
    _write("--collect", result_file(clone, measured.name), _as_json([results[s] for s in order]))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    _write("--collect", curve_file(clone, measured.name), lines)
    dropped = len(measured.results) - len(kept)
    gone = f", {dropped} of an earlier state of the recipe dropped" if dropped else ""
    return f"{result_file(clone, measured.name)}: seeds {', '.join(map(str, order))}{gone}"


def _is_of(result: Row, recipe: Recipe) -> bool:
    return bool(result.get("config_sha256") == recipe.sha256)


def _result(run: Run) -> Row:
    """A run's result, but for details, with options that changed how some of it was computed."""
    figures = {k: v for k, v in (run.result or {}).items() if k not in DETAILS}
    starts = read_starts(run.folder)
    options = [name for name in OPTIONS if any(s.get("options", {}).get(name) for s in starts)]
    return figures | ({"options": options} if options else {})


def _curve(run: Run) -> list[Row]:
    rows = [row for row in read_rows(run.folder) if row["event"] == "epoch"]
    return [{key: row[key] for key in CURVE} for row in rows if row.keys() >= set(CURVE)]


def write_results(path: Path, runs: list[Run]) -> None:
    """Write the results of finished runs, but for details, as a list by recipe and seed.

    Where there are several recipes for a model and its data, `recipe` says in what they differ.

    Raises:
        InputError: the file can't be written.
    """
    rows = []
    for run in (run for group in grouped(runs) for run in group if run.result is not None):
        differs = differences(run.recipe, runs)
        rows.append(_result(run) | ({"recipe": differs} if differs else {}))
    _write("--json", path, _as_json(rows))


def _as_json(rows: list[Row]) -> str:
    return json.dumps(rows, indent=1) + "\n"


def _write(flag: str, path: Path, text: str) -> None:
    # Tasks of a job array that end at the same time, on several nodes, write the same file.
    scratch = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")

    def write() -> None:
        scratch.write_text(text)
        scratch.replace(path)

    write_file(flag, path, write)
