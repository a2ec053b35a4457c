"""What is wrong with result files and what is made of them, a line for each fault."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from distcv.config import InputError
from distcv.models import MODELS
from distcv.results.files import Measured, curve_file, read_measured, recipes, result_file
from distcv.results.tables import tables


def problems(clone: Path) -> list[str]:
    """Lines that name the file, the field and both values.

    Raises:
        InputError: this is no clone.
    """
    known, found = recipes(clone), list(_strangers(clone))
    for name, recipe in known.items():
        try:
            measured = read_measured(clone, name, recipe)
        except InputError as error:
            found.append(str(error))
        else:
            found += [f"{result_file(clone, name)}{line}" for line in _results(measured)]
            found += [f"{curve_file(clone, name)}{line}" for line in _curves(measured)]
    try:
        found += _tables(clone)
    except InputError as error:
        found += [str(error)] if str(error) not in found else []
    return found


def _strangers(clone: Path) -> Iterator[str]:
    """Lists of results, and curves, that belong to no recipe; others keep other files there."""
    known = recipes(clone)
    for path in sorted((clone / "results").glob("*.json")):
        try:
            is_list = isinstance(json.loads(path.read_text()), list)
        except (OSError, ValueError):
            is_list = False  # said where it is read, if it is a recipe's
        if is_list and path.stem not in known:
            yield f"{path}: no recipe configs/{path.stem}.yaml: rename or remove it"
    for path in sorted((clone / "results/curves").glob("*")):
        if not result_file(clone, path.stem).exists():
            yield f"{path}: no {result_file(clone, path.stem)}: collect its runs again"


def _results(measured: Measured) -> Iterator[str]:
    """Whether the runs are of this recipe, each of a seed of its own."""
    for seed, count in Counter(r["seed"] for r in measured.results).items():
        if count > 1:
            yield f": seed {seed} counts {count} times"
    for result in measured.results:
        recipe = measured.recipe.model_copy(update={"seed": result["seed"]})
        should: dict[str, Any] = {
            "model": recipe.model,
            "dataset": recipe.dataset,
            "params": MODELS[recipe.model].params,
            "precision": recipe.precision,
            "config_sha256": recipe.sha256,
        }
        if recipe.max_steps is None:
            should["epochs"] = recipe.epochs
        for field, value in should.items():
            if result.get(field) != value:
                yield (
                    f": seed {result['seed']}: {field} is {result.get(field)}, "
                    f"that of configs/{measured.name}.yaml is {value}: measure again"
                )


def _curves(measured: Measured) -> Iterator[str]:
    """Whether the curves are those of the results. There may be none: then the tables say so."""
    if not measured.curves:
        return
    results = {r["seed"]: r for r in measured.results}
    for seed in sorted(results.keys() ^ measured.curves.keys()):
        yield f": seed {seed} is in one of results and curves only: collect its runs again"
    for seed in sorted(results.keys() & measured.curves.keys()):
        result, rows = results[seed], measured.curves[seed]
        epochs = [row["epoch"] for row in rows]
        if epochs != sorted(set(epochs)):
            yield f": seed {seed}: epochs {epochs} are not in order"
        for field, value in {
            "test_accuracy": rows[-1]["test_accuracy"],
            "epochs": rows[-1]["epoch"],
            "steps": rows[-1]["step"],
            "best_test_accuracy": max(row["test_accuracy"] for row in rows),
        }.items():
            if result[field] != value:
                yield f": seed {seed}: {field} is {value}, that of the result is {result[field]}"


def _tables(clone: Path) -> Iterator[str]:
    """Files that aren't what the result files make."""
    for path, text in tables(clone).items():
        found = path.read_text(encoding="utf-8") if path.exists() else ""
        pairs = zip_longest(found.splitlines(), text.splitlines())
        for number, (is_, should) in enumerate(pairs, start=1):
            if is_ != should:
                yield (
                    f"{path}:{number}: {_short(is_)}, the result files make {_short(should)}: "
                    "python -m distcv.results --tables"
                )
                break


def _short(line: str | None) -> str:
    return "no line" if line is None else repr(line if len(line) <= 60 else line[:59] + "…")
