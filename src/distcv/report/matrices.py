"""Accuracy class by class, and what was taken for what."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distcv.report.charts import COLORS, MARKERS, TEXT, make
from distcv.report.page import Chart
from distcv.report.records import Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CLASSES = 20  # that are drawn one by one
Counts = list[list[int]]  # row: label, column: prediction


def class_chart(name: str, title: str, groups: Sequence[tuple[int, Group]]) -> Chart | None:
    """Points for the accuracy of each class, with the least and the most of a group's runs.

    Of more classes than fit, those that go worst. None if no run has a result.

    Args:
        name: of the file.
        title: above the points.
        groups: those of one data set, each with its number among all, which gives its looks.
    """
    held = [
        (number, group.label, found)
        for number, group in groups
        if (found := group.results("class_accuracy"))
    ]
    if not held:
        return None
    means: dict[str, list[float]] = {}
    for _, _, found in held:
        for k in found[0]:
            means.setdefault(k, []).append(sum(one[k] for one in found) / len(found))
    names = list(means)
    if len(names) > MOST_CLASSES:
        names = sorted(names, key=lambda k: min(means[k]))[:MOST_CLASSES]
    worst = min(means, key=lambda k: min(means[k]))

    def draw(axes: "Axes") -> None:
        for place, (number, label, found) in enumerate(held):
            known = [k for k in names if k in found[0]]
            rows = [names.index(k) + 0.5 * ((place + 0.5) / len(held) - 0.5) for k in known]
            middle = [sum(one[k] for one in found) / len(found) for k in known]
            low = [min(one[k] for one in found) for k in known]
            high = [max(one[k] for one in found) for k in known]
            color = COLORS[number % len(COLORS)]
            axes.hlines(rows, low, high, color=color, linewidth=1)
            axes.plot(middle, rows, MARKERS[number % len(MARKERS)], color=color, markersize=5,
                      label=label)  # fmt: skip
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel("percent of the class predicted right")
        axes.locator_params("x", nbins=5)

    some = "" if len(names) == len(means) else f" The {len(names)} worst of {len(means)} classes."
    return make(
        name,
        title,
        draw,
        caption="Mean over the runs; the line goes from the least to the most of them." + some,
        alt=f"{title}; the lowest is {min(means[worst]):.2f} % for class {worst}.",
        labels=[label for _, label, _ in held] if len(groups) > 1 else [],
        height=0.9 + 0.23 * len(names),
    )


def confusion_of(group: Group) -> Counts | None:
    """Sum of the group's confusion matrices, None if its results have none."""
    found: list[Counts] = group.results("confusion")
    if not found:
        return None
    return [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*found, strict=True)]


def confusion_chart(name: str, title: str, group: Group, classes: Sequence[str]) -> Chart | None:
    """The confusion matrix: counts of mistakes, and on the diagonal percent of the class."""
    counts = confusion_of(group)
    if counts is None:
        return None
    runs = len(group.results("confusion"))
    pairs = sorted(
        ((n, label, guess) for label, row in enumerate(counts) for guess, n in enumerate(row)
         if label != guess and n),
        key=lambda pair: (-pair[0], pair[1:]),
    )  # fmt: skip
    often = ", ".join(f"{classes[a]} taken for {classes[b]} ({n})" for n, a, b in pairs[:3])
    summed = f"Summed over {runs} runs. " if runs > 1 else ""
    few = len(classes) <= MOST_CLASSES
    narrow = max(map(len, classes)) <= 3  # such names leave room for a decimal
    how = "Numbers of test images; on the diagonal, percent predicted right. " if few else ""
    caption = f"{summed}{how}Most often: {often or 'nothing'}."
    most = max((n for n, *_ in pairs), default=1)

    def draw(axes: "Axes") -> None:
        axes.grid(False)
        if few:
            _cells(axes, counts, most, digits=int(narrow))
        else:
            _image(axes, counts, most)
        axes.set_ylabel("label")
        axes.set_xlabel("prediction")
        axes.xaxis.set_label_position("top")
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        if few:
            axes.set_xticks(range(len(classes)), classes, rotation=0 if narrow else 90)
            axes.set_yticks(range(len(classes)), classes)
        axes.spines[:].set_visible(False)
        axes.set_aspect("equal")

    return make(name, title, draw, caption=caption, alt=f"{title}. Most often: {often}.",
                height=3.9)  # fmt: skip


def _cells(axes: "Axes", counts: Counts, most: int, digits: int) -> None:
    """A square for each pair of classes that occurs, its opacity by the share of the most."""
    from matplotlib.patches import Rectangle

    for label, row in enumerate(counts):
        for guess, n in enumerate(row):
            if label == guess:
                share, color = 0.25, COLORS[0]
                words = f"{100 * n / (sum(row) or 1):.{digits}f}".replace("100.0", "100")
            else:
                share, color, words = 0.08 + 0.42 * n / most, COLORS[1], f"{n}"
            if n or label == guess:
                corner = (guess - 0.48, label - 0.48)
                axes.add_patch(
                    Rectangle(corner, 0.96, 0.96, facecolor=color, alpha=share, linewidth=0)
                )
                axes.text(guess, label, words, ha="center", va="center", color=TEXT)
    axes.set_xlim(-0.5, len(counts) - 0.5)
    axes.set_ylim(len(counts) - 0.5, -0.5)


def _image(axes: "Axes", counts: Counts, most: int) -> None:
    """A pixel for each pair of classes; the diagonal is left out, it would outshine the rest."""
    import numpy as np

    table = np.array(counts, dtype=float)
    np.fill_diagonal(table, 0)
    pixels = np.zeros((*table.shape, 4))
    pixels[..., :3] = [int(COLORS[1][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    pixels[..., 3] = np.sqrt(table / most)
    axes.imshow(pixels, interpolation="none")
