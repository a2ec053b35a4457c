"""Pictures of what was measured, black on white."""

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from distcv.config import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "os^Dv*PX"


def check_plot(file: Path) -> None:
    """Raise InputError if matplotlib has no such format."""
    from matplotlib.backend_bases import FigureCanvasBase

    endings = sorted(FigureCanvasBase.get_supported_filetypes())
    if file.suffix.lower().removeprefix(".") not in endings:
        raise InputError(f"--plot {file}: the ending must be one of {', '.join(endings)}")


def draw(record: dict[str, Any], file: Path) -> None:
    """Write the picture of what a JSON of this tool holds."""
    picture(record).savefig(file, dpi=150)


def picture(record: dict[str, Any]) -> "Figure":
    """The picture of what a JSON of this tool holds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    recipe = record["recipe"]
    what = f"{recipe['model']} on {recipe['dataset']}, {recipe['precision']}"
    where = record["device"] if record.get("device", "cpu") != "cpu" else record["cpu"]
    figure.suptitle(f"{what}, batch {recipe['batch_size']} · {where}", fontsize=11)
    if "trainings" in record:
        _curves(figure, record)
    elif "scaling" in record:
        _scaling(figure, record)
    else:
        _loops(figure, record)
    return figure


def _loops(figure: "Figure", record: dict[str, Any]) -> None:
    """Bars of the loops' images/s, and of the parts of distcv's time."""
    has_parts = "parts" in record
    rows = figure.subplots(1 + has_parts, squeeze=False)[:, 0]
    rates: dict[str, list[float]] = record["images_per_second"]
    most = max(max(found) for found in rates.values())
    for place, (name, found) in enumerate(rates.items()):
        middle = median(found)
        spread = [[middle - min(found)], [max(found) - middle]]
        rows[0].barh(place, middle, xerr=spread, capsize=4, color="0.85", edgecolor="black")
        said = f"{middle:,.0f}"
        if name in record["ratio"]:
            said += f"   distcv is {record['ratio'][name]:.3g} x as fast"
        rows[0].text(max(found) + 0.015 * most, place, said, va="center")
    rows[0].set_yticks(range(len(rates)), list(rates))
    repeats = len(rates["distcv"])
    rows[0].set_xlabel(f"images/s: median, least and most of {repeats} measurements")
    rows[0].xaxis.set_major_formatter("{x:,.0f}")
    rows[0].set_xlim(0, 1.6 * most)
    if has_parts:
        parts: dict[str, float] = record["parts"]
        rows[1].barh(
            list(parts), [100 * s for s in parts.values()], color="0.85", edgecolor="black"
        )
        for place, share in enumerate(parts.values()):
            rows[1].text(100 * share + 0.5, place, f"{100 * share:.1f} %", va="center")
        rows[1].set_xlabel("share of distcv's time, percent")
        rows[1].set_xlim(0, 112 * max(parts.values()))
    for axes in rows:
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)


def _scaling(figure: "Figure", record: dict[str, Any]) -> None:
    """Images/s over processes for each strategy, beside what the first number of them promises.

    On a CPU that is in proportion to the threads of all processes, else to the processes.
    """
    axes, rows = figure.subplots(), record["scaling"]
    for number, name in enumerate(dict.fromkeys(row["strategy"] for row in rows)):
        own = sorted((r for r in rows if r["strategy"] == name), key=lambda r: r["processes"])
        counts = [row["processes"] for row in own]
        middles = [row["images_per_second"] for row in own]
        low = [row["images_per_second"] - min(row["repeats"]) for row in own]
        high = [max(row["repeats"]) - row["images_per_second"] for row in own]
        axes.errorbar(counts, middles, [low, high], capsize=4, label=name, **_line(number))
        used = [r["processes"] * (r["threads"] if record["device"] == "cpu" else 1) for r in own]
        ideal = [middles[0] * units / used[0] for units in used]
        axes.plot(counts, ideal, "k--", linewidth=1, label="" if number else "ideal")
    counts = sorted({row["processes"] for row in rows})
    axes.set_xticks(counts, [f"{n}" for n in counts])
    axes.set_xlabel("processes")
    axes.set_ylabel("images/s: median, least and most")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    _finish(figure, axes)
    axes.set_ylim(bottom=0)


def _curves(figure: "Figure", record: dict[str, Any]) -> None:
    """Test accuracy over seconds for each seed, and the targets."""
    axes = figure.subplots()
    accuracies = [accuracy for row in record["trainings"] for _, accuracy in row["curve"]]
    for number, row in enumerate(record["trainings"]):
        seconds, accuracy = zip(*row["curve"], strict=True)
        axes.plot(seconds, accuracy, label=f"seed {row['seed']}", **_line(number))
    for target in record["targets"]:
        axes.axhline(target, color="black", linestyle=":", linewidth=1)
        transform = axes.get_yaxis_transform()  # x is a share of the axes' width
        axes.text(0.01, target, f"{target:g} %", va="bottom", transform=transform)
    # The first epochs of a long training would press the rest together.
    lowest = min(record["targets"])
    top = max(*accuracies, *record["targets"])
    bottom = min(lowest, max(min(accuracies), lowest - 5))
    axes.set_ylim(bottom - 0.05 * (top - bottom), top + 0.08 * (top - bottom))
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of training and evaluation")
    axes.set_ylabel("test accuracy, percent")
    _finish(figure, axes)


def _line(number: int) -> dict[str, Any]:
    """The looks of a line: told apart by its marker."""
    marker = MARKERS[number % len(MARKERS)]
    return {
        "marker": marker,
        "markersize": 5,
        "color": "black",
        "markerfacecolor": "white",
        "linewidth": 1,
    }


def _finish(figure: "Figure", axes: "Axes") -> None:
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside right center")
