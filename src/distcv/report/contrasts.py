"""What sets the runs off from each other: recipes, environments, commits."""

from typing import Any

from distcv.report.page import Table, Text
from distcv.report.records import Group, Record
from distcv.report.tables import NONE
from distcv.results import OPTIONS, short_commit

FIELDS = ("python", "distcv", "cpu", "cores", "threads", "wait_policy", "spin_count", "device",
          "processes", "nodes", "strategy")  # fmt: skip


def recipe_differences(groups: list[Group]) -> Table:
    """The fields in which the recipes differ, a column for each; seeds are no difference."""
    recipes = [group.records[0].run.recipe.model_dump(mode="json") for group in groups]
    fields = [
        name
        for name in recipes[0]
        if name != "seed" and any(recipe[name] != recipes[0][name] for recipe in recipes)
    ]
    rows = [[name, *(_word(recipe[name]) for recipe in recipes)] for name in fields]
    return Table("The fields that differ, beside the seed.", ["", *(g.label for g in groups)], rows)


def environment_differences(groups: list[Group]) -> Table | Text:
    """A row for each value of what differs between the runs' last starts, and who had it."""
    records = [record for group in groups for record in group.records]
    surroundings = [_environment(record) for record in records]
    names = list(dict.fromkeys(name for surrounding in surroundings for name in surrounding))
    rows = []
    for name in names:
        held: dict[str, list[str]] = {}
        for record, surrounding in zip(records, surroundings, strict=True):
            held.setdefault(surrounding.get(name, NONE), []).append(record.name)
        if len(held) > 1:
            rows += [[name, value, ", ".join(who)] for value, who in held.items()]
    if not rows:
        return Text(_same(records))
    return Table("Environments: what differs, and in which runs.", ["", "Value", "Runs"], rows)


def _environment(record: Record) -> dict[str, str]:
    """Fields, versions and options of a run's last start that are known."""
    options = record.starts[-1].get("options", {}) if record.starts else {}
    versions = record.environment("versions") or {}
    found = {"commit": short_commit(record.environment("commit") or NONE)}
    found |= {name: _word(record.environment(name)) for name in FIELDS}
    found |= {name: _word(version) for name, version in versions.items()}
    return found | {name: _word(options[name]) for name in OPTIONS if name in options}


def _same(records: list[Record]) -> str:
    first = records[0]
    torch = (first.environment("versions") or {}).get("torch", NONE)
    commit = short_commit(first.environment("commit") or NONE)
    words = f"commit {commit}, Python {first.environment('python') or NONE}, torch {torch}"
    return f"Environment{' of all runs' if len(records) > 1 else ''}: {words}."


def _word(value: Any) -> str:
    if value is None:
        return NONE
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
