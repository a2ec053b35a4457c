"""The report from top to bottom."""

from collections.abc import Iterator
from pathlib import Path

from distcv import __version__
from distcv.data import find_dataset
from distcv.report.charts import Line, Series, accuracy_limits, curves, spans_decades
from distcv.report.contrasts import environment_differences, recipe_differences
from distcv.report.galleries import Images, heat_maps, worst_mistakes
from distcv.report.matrices import class_chart, confusion_chart
from distcv.report.page import Block, Chart, Charts, Details, Page, Section, Text
from distcv.report.records import Group, finite, read_groups
from distcv.report.tables import results_table, runs_table, summary
from distcv.results import Run

# Of the "train" rows: key, title, what the figure is.
COURSE = (
    ("lr", "Learning rate", "Learning rate of the step."),
    ("grad_norm", "Gradient norm", "L2 norm of the whole gradient, before clipping."),
    ("images_per_second", "Throughput, images/s", "Training alone, between two log points."),
    ("memory_mib", "Memory, MiB", "Of the first process; on a GPU, the highest of tensors so far."),
)
MOST_POINTS = 250  # of a line; a screen has no more


def compose(runs: list[Run], data_dir: Path, target: float | None) -> Page:
    """All sections, each with what the runs have for it."""
    groups = read_groups(runs)
    images = Images(data_dir)
    models = ", ".join(dict.fromkeys(run.recipe.model for run in runs))
    datasets = ", ".join(dict.fromkeys(run.recipe.dataset for run in runs))
    sections = [
        Section("Results", [results_table(groups, target)]),
        Section("Accuracy and loss", list(_learning(groups, target))),
        Section("Classes", list(_classes(groups))),
        Section("Worst mistakes", _each(groups, "mistakes", images)),
        Section("Where the networks look (Grad-CAM)", _each(groups, "grad-cam", images)),
        Section("Course of the training", list(_course(groups))),
        Section("Runs", [runs_table(groups), environment_differences(groups)]),
        *(
            [Section("Differences of the recipes", [recipe_differences(groups)])]
            * (len(groups) > 1)
        ),
        Section("Recipes", list(_recipes(groups))),
    ]
    return Page(
        title=f"{models} on {datasets}",
        summary=[summary(group, target) for group in groups],
        sections=sections,
        foot=f"Made by distcv {__version__}, python -m distcv.report.",
    )


def _series(groups: list[Group], rows: str, key: str) -> list[Series]:
    """The lines of all groups; one without any is kept for its place among the colours."""
    found = []
    for group in groups:
        lines = {r.name: _thinned(finite(getattr(r, rows), key)) for r in group.records}
        counted = [r.name for r in group.shown or group.records]
        found.append(
            Series(
                group.label,
                [line for name, line in lines.items() if line and name in counted],
                [line for name, line in lines.items() if line and name not in counted],
            )
        )
    return found


def _thinned(line: Line) -> Line:
    """At most so many points, the first and the last among them."""
    if len(line) <= MOST_POINTS:
        return line
    every = -(-len(line) // MOST_POINTS)
    return [*line[:-1:every], line[-1]]


def _learning(groups: list[Group], target: float | None) -> Iterator[Block]:
    """Train and test accuracy on one scale, side by side; then the losses."""
    several = any(len(group.records) > 1 for group in groups)
    seeds = " Thin: each run; thick: the mean of the finished ones." if several else ""
    charts = []
    for what in ("accuracy", "loss"):
        test, train = (_series(groups, "epochs", f"{part}_{what}") for part in ("test", "train"))
        both = [series for series in (*test, *train) if series.lines]
        if not both:
            continue
        logarithmic = what == "loss" and spans_decades(both)
        limits = accuracy_limits(both, target) if what == "accuracy" else None
        for part, series in (("train", train), ("test", test)):
            unit = ", percent" if what == "accuracy" else ", log scale" if logarithmic else ""
            note = "Augmented images, during the epoch." if part == "train" else "Whole test set."
            low = min((y for one in series for line in one.lines for _, y in line), default=0.0)
            if limits and low < limits[0]:
                note += " The first epochs lie below the picture."
            if target is not None and (what, part) == ("accuracy", "test"):
                note += f" Dotted: the target, {target:g} %."
            charts.append(
                curves(
                    f"{part}-{what}",
                    f"{part.capitalize()} {what}{unit}",
                    series,
                    caption=note + seeds,
                    limits=limits,
                    logarithmic=logarithmic,
                    target=target if (what, part) == ("accuracy", "test") else None,
                )
            )
    yield Charts(charts) if charts else Text("No epoch was finished yet.")


def _classes(groups: list[Group]) -> Iterator[Block]:
    charts: list[Chart] = []
    datasets = list(dict.fromkeys(group.records[0].run.recipe.dataset for group in groups))
    for dataset in datasets:
        own = [(n, g) for n, g in enumerate(groups) if g.records[0].run.recipe.dataset == dataset]
        title = "Test accuracy by class" + (f": {dataset}" if len(datasets) > 1 else "")
        if chart := class_chart(f"class-accuracy-{dataset}", title, own):
            charts.append(chart)
    missing = []
    for number, group in enumerate(groups, start=1):
        row = find_dataset(group.records[0].run.recipe.dataset)
        title = "Confusion" + (f": {group.label}" if len(groups) > 1 else "")
        if chart := confusion_chart(f"confusion-{number}", title, group, row.classes):
            charts.append(chart)
        else:
            missing.append(group.label)
    if charts:
        yield Charts(charts)
    if missing:
        yield Text(
            f"No confusion matrix for {'; '.join(missing)}: not finished, or by an older version."
        )


def _each(groups: list[Group], what: str, images: Images) -> list[Block]:
    """One gallery or more for each group; a sentence that holds for several is said once."""
    blocks: list[Block] = []
    for number, group in enumerate(groups, start=1):
        name = f"{what}-{number}"
        if what == "mistakes":
            blocks.append(worst_mistakes(group, name, images))
        else:
            blocks += heat_maps(group, name, images)
    return list(dict.fromkeys(blocks)) if all(isinstance(b, Text) for b in blocks) else blocks


def _course(groups: list[Group]) -> Iterator[Block]:
    charts, missing = [], []
    for key, title, caption in COURSE:
        series = _series(groups, "steps", key)
        if any(one.lines for one in series):
            logarithmic = key == "grad_norm" and spans_decades(series)
            name = key.replace("_", "-")
            shown = f"{title}, log scale" if logarithmic else title
            charts.append(curves(name, shown, series, caption=caption, logarithmic=logarithmic))
        else:
            missing.append(title.split(",")[0].lower())
    if charts:
        yield Charts(charts)
    if missing:
        yield Text(f"Not recorded by these runs: {', '.join(missing)}.")


def _recipes(groups: list[Group]) -> Iterator[Block]:
    for group in groups:
        seeds = ", ".join(str(record.seed) for record in group.records)
        recipe = group.records[0].run.recipe.to_yaml()
        yield Details(f"{group.label}: the whole recipe (seeds {seeds})", recipe)
