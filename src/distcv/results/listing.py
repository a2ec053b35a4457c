"""The runs of some folders as a printed table, and what is said of those that don't count."""

import statistics
from collections import Counter

from distcv.results import Run, differences, grouped, last_row, short_commit, spread

HEAD = ("model", "dataset", "recipe", "n", "test accuracy (%)", "min", "max", "seconds")


def report(runs: list[Run]) -> list[str]:
    """The lines of the table, of runs of one seed or of several commits, of unfinished runs."""
    rows: list[tuple[str, ...]] = [HEAD]
    notes: list[str] = []
    for group in grouped(runs):
        results = [run.result for run in group if run.result is not None]
        if not results:
            continue
        recipe = group[0].recipe
        accuracy = [result["test_accuracy"] for result in results]
        rows.append(
            (
                recipe.model,
                recipe.dataset,
                differences(recipe, runs),
                str(len(results)),
                spread(accuracy),
                f"{min(accuracy):.2f}",
                f"{max(accuracy):.2f}",
                f"{statistics.mean(result['seconds'] for result in results):.1f}",
            )
        )
        notes += list(_notes([run for run in group if run.result is not None]))
    unfinished = [_progress(run) for run in runs if run.result is None]
    return [*(aligned(rows) if len(rows) > 1 else []), *notes, *unfinished]


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of words as lines of columns: the first three from the left, figures from the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = "<<<>>>>>"
    return [
        "  ".join(
            f"{word:{side}{width}}" for word, side, width in zip(row, sides, widths, strict=True)
        )
        for row in rows
    ]


def _notes(group: list[Run]) -> list[str]:
    """What makes the runs of a recipe no plain sample over seeds of one program."""
    label = f"{group[0].recipe.model} on {group[0].recipe.dataset}"
    lines = []
    for seed, count in Counter(run.recipe.seed for run in group).items():
        if count > 1:
            names = ", ".join(str(run.folder) for run in group if run.recipe.seed == seed)
            lines.append(f"{label}: seed {seed} counts {count} times: {names}")
    commits = {str(run.result.get("commit")) for run in group if run.result is not None}
    if len(commits) > 1:
        short = ", ".join(map(short_commit, sorted(commits)))
        lines.append(f"{label}: runs of {len(commits)} commits: {short}")
    return lines


def _progress(run: Run) -> str:
    row = last_row(run.folder)
    epochs = run.recipe.epochs
    reached = f"step {row['step']}, epoch {row['epoch']:.2f} of {epochs}" if row else "no step yet"
    return f"unfinished {run.folder}: {reached}"
