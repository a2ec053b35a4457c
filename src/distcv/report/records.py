"""What is read of the run folders, and the groups that one recipe's seeds form."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distcv.results import Run, differences, grouped, read_rows, read_starts

Row = dict[str, Any]
LARGEST = 1e30  # that is drawn: beyond are infinity, and what an axis overflows by


@dataclass(frozen=True)
class Record:
    """One run with its metrics."""

    name: str
    """The run folder's name, unlike those of the other runs."""
    run: Run
    epochs: list[Row]
    """Rows of metrics.jsonl at the ends of epochs."""
    steps: list[Row]
    """Rows of the log points between."""
    starts: list[Row]
    """The starts in environment.json."""

    @property
    def seed(self) -> int:
        return self.run.recipe.seed

    @property
    def result(self) -> Row:
        """The contents of result.json, empty as long as the run is not finished."""
        return self.run.result or {}

    def environment(self, name: str) -> Any:
        """A field of the last start, or of the result where there is no record of starts."""
        for place in (*self.starts[-1:], self.result, self.result.get("environment", {})):
            if place.get(name) is not None:
                return place[name]
        return None


@dataclass(frozen=True)
class Group:
    """The runs of one recipe, in the order of their seeds."""

    label: str
    records: list[Record]

    @property
    def finished(self) -> list[Record]:
        """Finished runs, one of each seed: another one is no further sample."""
        first: dict[int, Record] = {}
        for record in self.records:
            if record.result:
                first.setdefault(record.seed, record)
        return list(first.values())

    @property
    def repeated(self) -> list[Record]:
        """Finished runs of seeds that are counted already."""
        return [r for r in self.records if r.result and r not in self.finished]

    @property
    def shown(self) -> list[Record]:
        """The runs whose figures stand for the group: the finished ones, else all that began."""
        return self.finished or [r for r in self.records if finite(r.epochs, "test_accuracy")]

    def results(self, key: str) -> list[Any]:
        """An entry of the result files, of those that have it."""
        return [record.result[key] for record in self.finished if record.result.get(key)]


def read_groups(runs: list[Run]) -> list[Group]:
    """The runs with their metrics, in groups of one recipe each."""
    names = dict(zip((run.folder for run in runs), _names([r.folder for r in runs]), strict=True))
    recipes = grouped(runs)
    labels = _labels(recipes, runs)
    return [
        Group(label, [_read(names[run.folder], run) for run in group])
        for label, group in zip(labels, recipes, strict=True)
    ]


def _read(name: str, run: Run) -> Record:
    rows = read_rows(run.folder)
    return Record(
        name,
        run,
        [row for row in rows if row["event"] == "epoch"],
        [row for row in rows if row["event"] == "train"],
        read_starts(run.folder),
    )


def _names(folders: list[Path]) -> list[str]:
    """Names of run folders; with the one that they lie in where one name occurs twice."""
    paths = [folder.resolve() for folder in folders]
    for parts in (1, 2):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{number}/{path.name}" for number, path in enumerate(paths, start=1)]


def _labels(recipes: list[list[Run]], runs: list[Run]) -> list[str]:
    """A name for each recipe: its network, its data if they differ, and what else sets it off."""
    several = len({run.recipe.dataset for run in runs}) > 1
    labels = []
    for group in recipes:
        recipe = group[0].recipe
        where = f" on {recipe.dataset}" if several else ""
        what = differences(recipe, runs)
        labels.append(f"{recipe.model}{where}" + (f", {what}" if what else ""))
    seen: Counter[str] = Counter()
    for number, label in enumerate(labels):
        seen[label] += 1  # `differences` names no more than four fields
        labels[number] += f" ({seen[label]})" if seen[label] > 1 else ""
    return labels


def finite(rows: list[Row], key: str) -> list[tuple[float, float]]:
    """(epoch, value) of the rows that have values there that can be drawn."""
    found = ((row["epoch"], row.get(key)) for row in rows)
    drawn = ((x, y) for x, y in found if isinstance(y, int | float))
    return [(x, y) for x, y in drawn if abs(x) < LARGEST and abs(y) < LARGEST]
