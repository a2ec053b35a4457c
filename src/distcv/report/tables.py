"""The tables and the sentences: numbers of run folders in words, none of them typed in."""

import statistics
from collections.abc import Sequence
from datetime import datetime

from distcv.intervals import mean_interval
from distcv.report.page import Table
from distcv.report.records import Group, Record, finite
from distcv.results import duration, short_commit, spread
from distcv.results import hardware as hardware_in_words
from distcv.results.analysis import behind, fit

NONE = "–"
Point = tuple[float, float]  # epoch, value


def figures(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation; the value of a single run, a dash if there is none."""
    return spread(values, f",.{digits}f") if values else NONE


def results_table(groups: list[Group], target: float | None) -> Table:
    """A column for each recipe, with the lines that the source documents have."""
    columns = [facts(group, target) for group in groups]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(column.get(name, NONE) for column in columns)] for name in names]
    caption = (
        "Accuracies in percent, on the whole test set, without test-time augmentation; mean ± "
        "sample standard deviation over seeds. First, best and last are epochs; the result is the "
        "last one's, since the best is chosen by the test set itself. Train accuracy is that of "
        "augmented images while the epoch goes on."
    )
    return Table(caption, ["", *(group.label for group in groups)], rows)


def facts(group: Group, target: float | None) -> dict[str, str]:
    """The lines of one recipe's column."""
    last = last_accuracies(group)
    lines: dict[str, str] = {}
    if target is not None:
        lines["Target"] = _target(last, target)
    lines["Data"] = group.records[0].run.recipe.dataset
    sizes = sorted(set(group.results("params")))
    lines["Parameters"] = " or ".join(f"{size:,}" for size in sizes) or NONE
    lines["Epochs"] = _epochs(group)
    lines["Runs"] = _runs(group)
    lines["Last test accuracy"] = figures(last)
    if len(group.finished) > 1:
        _, low, high = mean_interval(last)
        lines["95 % interval of mean"] = f"{low:.2f} to {high:.2f}"
    lines["Best test accuracy"] = _with_epochs([_best(r) for r in group.shown])
    test, train = (_points(group, f"{part}_accuracy") for part in ("test", "train"))
    lines["First test accuracy"] = _with_epochs([points[0] for points in test])
    lines["Last train accuracy"] = figures([points[-1][1] for points in train])
    best = [max(points, key=lambda point: point[1]) for points in train]
    lines["Best train accuracy"] = _with_epochs(best)
    lines["First train accuracy"] = _with_epochs([points[0] for points in train])
    for part in ("test", "train"):
        losses = [points[-1][1] for points in _points(group, f"{part}_loss")]
        lines[f"Last {part} loss"] = figures(losses, 4)
    alike = len(set(map(hardware_of, group.finished))) == 1  # else their mean says nothing
    lines["Time"] = duration(statistics.mean(group.results("seconds"))) if alike else NONE
    rates = group.results("images_per_second") if alike else []
    lines["Images per second"] = figures(rates, 0)
    lines["Hardware"] = hardware(group)
    lines["Analysis"] = analysis(group)
    return lines


def last_accuracies(group: Group) -> list[float]:
    """Test accuracy of each run at its last epoch.

    Where none is finished, at the newest epoch that all have reached.
    """
    if group.finished:
        return [_last(record) for record in group.finished]
    epoch = common_epoch(group)
    return [dict(points)[epoch] for points in _points(group, "test_accuracy") if epoch]


def common_epoch(group: Group) -> float:
    """The newest epoch at which all runs were evaluated; 0 if there is none."""
    evaluated = [{epoch for epoch, _ in points} for points in _points(group, "test_accuracy")]
    return max(set.intersection(*evaluated), default=0) if evaluated else 0


def _last(record: Record) -> float:
    if record.result:
        return float(record.result["test_accuracy"])
    return finite(record.epochs, "test_accuracy")[-1][1]


def _best(record: Record) -> Point:
    result = record.result
    if {"best_epoch", "best_test_accuracy"} <= result.keys():
        return result["best_epoch"], result["best_test_accuracy"]
    known = finite(record.epochs, "test_accuracy")
    points = known or [(record.run.recipe.epochs, _last(record))]
    return max(points, key=lambda point: point[1])


def _points(group: Group, key: str) -> list[list[Point]]:
    """The curve of each run that has one."""
    found = [finite(record.epochs, key) for record in group.shown]
    return [points for points in found if points]


def _with_epochs(points: list[Point]) -> str:
    """As `99.38 ± 0.05 (epochs 3 to 4)`."""
    if not points:
        return NONE
    epochs = [f"{epoch:.6g}" for epoch in sorted({epoch for epoch, _ in points})]
    where = f"epoch {epochs[0]}" if len(epochs) == 1 else f"epochs {epochs[0]} to {epochs[-1]}"
    return f"{figures([value for _, value in points])} ({where})"


def _target(accuracies: list[float], target: float) -> str:
    if not accuracies:
        return f"{target:g}"
    reached = sum(accuracy >= target for accuracy in accuracies)
    if len(accuracies) == 1:
        return f"{target:g}: {'reached' if reached else 'not reached'}"
    return f"{target:g}: reached by {reached} of {len(accuracies)} runs"


def _epochs(group: Group) -> str:
    planned = group.records[0].run.recipe.epochs
    done = sorted({f"{epochs:.6g}" for epochs in group.results("epochs")})
    if done and done != [f"{planned}"]:
        return f"{' or '.join(done)} (of {planned})"
    return f"{planned}"


def _runs(group: Group) -> str:
    seeds = ", ".join(str(record.seed) for record in group.finished)
    words = []
    if group.finished:
        words.append(f"n = {len(group.finished)}, seed{'s' * (len(group.finished) > 1)} {seeds}")
    if group.repeated:
        names = ", ".join(record.name for record in group.repeated)
        words.append(f"not counted, being of the same seeds: {names}")
    if open_runs := sum(not record.result for record in group.records):
        words.append(f"{open_runs} not finished")
    return "; ".join(words)


def hardware(group: Group) -> str:
    """What the runs ran on; each kind once."""
    return " or ".join(dict.fromkeys(map(hardware_of, group.finished or group.records)))


def hardware_of(record: Record) -> str:
    """What a run ran on."""
    return hardware_in_words(record.environment)


def analysis(group: Group) -> str:
    """What the figures say, in the words of the source documents."""
    pairs = [
        (points[-1][1], _last(record))
        for record in group.shown
        if (points := finite(record.epochs, "train_accuracy"))
    ]
    if not pairs:
        return NONE
    gap = statistics.mean(train - test for train, test in pairs)
    lost = statistics.mean(_best(record)[1] - _last(record) for record in group.shown)
    return f"{fit(gap)}; {behind(lost)}"


def summary(group: Group, target: float | None) -> tuple[str, str]:
    """A sentence: what and how accurate, then n, size, time, hardware."""
    recipe = group.records[0].run.recipe
    what, last = _with_data(group.label, recipe.dataset), last_accuracies(group)
    if not last:
        return what, ": nothing was evaluated yet."
    accuracy = f"{what}: {figures(last)}\N{NO-BREAK SPACE}%"
    if not group.finished:
        reached = f"{common_epoch(group):.6g} of {recipe.epochs}"
        return accuracy, f" test accuracy at epoch {reached} (n = {len(last)}); not finished."
    words = " test accuracy at the last epoch"
    if len(last) > 1:
        _, low, high = mean_interval(last)
        interval = f"95\N{NO-BREAK SPACE}% interval of the mean {low:.2f} to {high:.2f}"
        words += f" (n = {len(last)} runs; {interval})"
    else:
        words += " (one run)"
    if sizes := group.results("params"):
        words += f", {sizes[0]:,} parameters"
    if len(set(map(hardware_of, group.finished))) == 1:
        words += (
            f", {duration(statistics.mean(group.results('seconds')))} of training and evaluation"
        )
    words += f" on {hardware(group)}."
    return accuracy, words + (f" Target {_target(last, target)}." if target is not None else "")


def _with_data(label: str, dataset: str) -> str:
    """The label with the data set behind the network's name."""
    model, *rest = label.split(", ", 1)
    where = model if " on " in model else f"{model} on {dataset}"
    return ", ".join([where, *rest])


def runs_table(groups: list[Group]) -> Table:
    """A row for each run."""
    head = ["Run", "Recipe", "Seed", "Test accuracy", "Test loss", "Time", "Commit", "Started"]
    rows = []
    for group in groups:
        for record in group.records:
            result = record.result
            accuracy = figures([result["test_accuracy"]]) if result else _so_far(record)
            loss = f"{result['test_loss']:.4f}" if "test_loss" in result else NONE
            time = duration(result["seconds"]) if result else NONE
            commit = short_commit(record.environment("commit") or NONE)
            started = _moment(record)
            rows.append([record.name, group.label, str(record.seed), accuracy, loss, time, commit,
                         started])  # fmt: skip
    return Table("Last epoch; time is that of training and evaluation.", head, rows)


def _moment(record: Record) -> str:
    """When a run was started first, and how often."""
    if not record.starts:
        return NONE
    time = record.starts[0].get("time")
    first = datetime.fromisoformat(time).strftime("%Y-%m-%d %H:%M") if time else NONE
    return f"{first}, {len(record.starts)} starts" if len(record.starts) > 1 else first


def _so_far(record: Record) -> str:
    rows = record.epochs or record.steps
    if not rows:
        return "no step yet"
    row = rows[-1]
    accuracy = f"{row['test_accuracy']:.2f} at " if "test_accuracy" in row else "at "
    return f"{accuracy}epoch {row['epoch']:.6g} of {record.run.recipe.epochs}, not finished"
