"""docs/reliability.md, made of the files in results/faults/."""

import importlib
import json
from pathlib import Path
from typing import Any

from distcv.results import short_commit

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results/faults"
PAGE = ROOT / "docs/reliability.md"
# In the order of the page.
SUITES = (
    "kills", "ranks", "resumes", "stops", "disk", "damage", "nonfinite", "trackers", "two_jobs",
    "bad_input", "fuzz", "hostile", "cache", "memory", "soak",
)  # fmt: skip
HEAD = """\
# Reliability

What was done to trainings, how often, and what was lost. `python tests/faults` tries it again,
`python tests/faults --mutants` what its last section tells; both write this page from their results
in [results/faults/](../results/faults). CI tries a smaller number of each kind. Nothing here is
typed in.

A run is *exact* if one SHA-256 over its weights, its optimizer state and the list of the samples of
each step is that of the same run left alone. What may be lost is work since the last checkpoint: it
is done again, to the same bits.
"""
MUTANTS_HEAD = """\
## Would these tests notice?

One guard after the other is taken out of the program; its suite, as small as CI tries it, has to
fail.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(part for name in SUITES for part in _suite(name)), *_mutants()])


def _suite(name: str) -> list[str]:
    title = importlib.import_module(f"faults.{name}").TITLE
    held = read(name)
    if held is None:
        return [f"## {title}\n", "Not measured yet.\n"]
    rows = ["| fault | tried | survived | lost | measured |", "|---|---|---|---|---|"]
    grids: list[str] = []
    for one in held["outcomes"]:
        figures = {k: v for k, v in one["figures"].items() if k != "grid"}
        cells = (
            one["fault"], f"{one['tried']:,}", f"{one['survived']:,}", one["lost"], _words(figures),
        )  # fmt: skip
        rows.append(f"| {' | '.join(map(_cell, cells))} |")
        if "grid" in one["figures"]:
            grids += ["", *_grid(one["figures"]["grid"])]
    return [f"## {title}\n", *rows, *grids, "", _measured(name, held)]


def _mutants() -> list[str]:
    held = read("mutants")
    if held is None:
        return [MUTANTS_HEAD, "Not measured yet."]
    rows = ["| taken out | suite | noticed |", "|---|---|---|"]
    for one in held["mutants"]:
        rows.append(f"| {one['without']} | `{one['suite']}` | {'yes' if one['found'] else 'NO'} |")
    killed = sum(one["found"] is not None for one in held["mutants"])
    rows += ["", f"Noticed: {killed} of {len(held['mutants'])}.", "", _measured("mutants", held)]
    return [MUTANTS_HEAD, *rows]


def read(name: str) -> Any:
    """The results of a suite, or None if there are none."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def _grid(grid: dict[str, dict[str, str]]) -> list[str]:
    """A table of words by row and column."""
    columns = list(dict.fromkeys(column for row in grid.values() for column in row))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in grid.items():
        lines.append(f"| {name} | {' | '.join(row.get(column, '–') for column in columns)} |")
    return lines


def _words(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_word(value)}" for name, value in figures.items())


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return f"({_words(value)})"
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _measured(name: str, held: dict[str, Any]) -> str:
    """Where and with what a file was measured, mutants each by the program of its own commit."""
    took = f"{held['seconds']:,.0f} s, " if "seconds" in held else ""
    cores = f"{held['cores']} core{'s' * (held['cores'] > 1)}"
    machine = f"{cores} of {held['cpu']}, torch {held['versions']['torch']}"
    rows = held.get("mutants", [held])
    of = ", ".join(dict.fromkeys(short_commit(row["commit"]) for row in rows))
    return f"[{name}.json](../results/faults/{name}.json): {took}{machine}, commit {of}.\n"
