"""Plots by matplotlib, as SVG that follows the page's theme and as PNG on white.

All are 4 inches wide with text of 10 points, so that it stays above 11 pixels on a phone whose
page is 328 pixels wide.
"""

import io
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distcv.report.page import Chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, LINE = 4.0, 0.19  # inches, of a plot and of a line of text
# The first four by Okabe and Ito, "Color Universal Design" (2008), the third to the sixth darker or
# lighter: each has a contrast of at least 3 to white and to the dark page. Dashes tell them apart,
# too.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#b85c93", "#8f7400", "#777777")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1, 1.5)),
    (0, (7, 2, 1, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
)
Line = list[tuple[float, float]]
MARKERS = "osD^vP*X"
TEXT, GRID = "#1b1f24", "#d0d7de"  # replaced in the SVG by the colours of the theme
MOST_MARKERS = 20  # points of a line that get one


@dataclass(frozen=True)
class Series:
    """The lines of one group: of each run, (x, y) points in order."""

    label: str
    lines: list[Line]
    open_lines: list[Line] = field(default_factory=list)
    """Of runs that don't count in the mean: they aren't finished, and others are."""

    @property
    def mean(self) -> Line:
        """Over the runs, at the points that all of them have; else the first run's line."""
        columns = [dict(line) for line in self.lines]
        shared = sorted(set.intersection(*map(set, columns))) if columns else []
        if columns and not shared:  # they were logged at other steps
            return self.lines[0]
        return [(x, sum(column[x] for column in columns) / len(columns)) for x in shared]


def style(number: int) -> dict[str, Any]:
    """Colour and dash of the group with this number."""
    return {"color": COLORS[number % len(COLORS)], "linestyle": DASHES[number % len(DASHES)]}


def curves(
    name: str,
    title: str,
    series: Sequence[Series],
    *,
    caption: str,
    limits: tuple[float, float] | None = None,
    logarithmic: bool = False,
    target: float | None = None,
) -> Chart:
    """Lines over epochs: thin ones for the runs of a group, a thick one for their mean."""

    def draw(axes: "Axes") -> None:
        for number, one in enumerate(series):
            thin = [*one.lines, *one.open_lines]
            if len(thin) > 1:
                for line in thin:
                    axes.plot(*zip(*line, strict=True), alpha=0.45, linewidth=0.7,
                              color=style(number)["color"])  # fmt: skip
            if mean := one.mean:
                marked = len(mean) <= MOST_MARKERS
                axes.plot(*zip(*mean, strict=True), linewidth=1.8, label=one.label,
                          marker=MARKERS[number % len(MARKERS)] if marked else "", markersize=4,
                          **style(number))  # fmt: skip
        if target is not None:
            axes.axhline(target, color=TEXT, linewidth=1, linestyle=":")
        if logarithmic:
            log_axis(axes)
        if limits:
            axes.set_ylim(*limits)
        axes.set_xlabel("epoch")
        axes.locator_params("x", integer=True, nbins=7)
        axes.set_xlim(left=0)

    labels = [one.label for one in series if one.lines] if len(series) > 1 else []
    return make(name, title, draw, caption=caption, labels=labels, alt=_spoken(title, series))


def _spoken(title: str, series: Sequence[Series]) -> str:
    """Where the lines begin and end, in words."""
    ends = [
        f"{one.label} from {one.mean[0][1]:.4g} to {one.mean[-1][1]:.4g}"
        for one in series
        if one.mean
    ]
    return f"{title} over epochs: {'; '.join(ends)}."


def log_axis(axes: "Axes") -> None:
    """A logarithmic y axis whose ticks are plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    few = high / low > 200
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if few else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def accuracy_limits(series: Sequence[Series], target: float | None = None) -> tuple[float, float]:
    """A range that shows where the curves end: four times as far from 100 as the worst end."""
    lines = [line for one in series for line in (*one.lines, *one.open_lines)]
    asked = [] if target is None else [target]
    values = [y for line in lines for _, y in line] + asked
    ends = [line[-1][1] for line in lines] + asked
    bottom = max(min(values), 100 - 4 * (100 - min(ends)))
    room = 0.04 * (max(values) - bottom) or 0.5
    return bottom - room, min(max(values) + 2 * room, 100 + room)


def spans_decades(series: Sequence[Series]) -> bool:
    """Whether positive values differ by more than a factor of 10."""
    values = [y for one in series for line in one.lines for _, y in line]
    return bool(values) and min(values) > 0 and max(values) > 10 * min(values)


def make(
    name: str,
    title: str,
    draw: "Callable[[Axes], None]",
    *,
    caption: str,
    alt: str,
    labels: Sequence[str] = (),
    height: float = 2.5,
) -> Chart:
    """Let ``draw`` fill the axes of a new plot; below them a legend if there are labels."""
    import matplotlib
    from matplotlib.figure import Figure

    wrapped = [textwrap.fill(label, 38) for label in labels]
    lines = sum(label.count("\n") + 1 for label in wrapped)
    with matplotlib.rc_context(_settings(name)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name may have letters that the font lacks
        figure = Figure(figsize=(WIDTH, height + LINE * lines), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_title(textwrap.fill(title, 36), loc="left", fontsize=10, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        if wrapped:
            handles, held = axes.get_legend_handles_labels()
            shown = [textwrap.fill(label, 38) for label in held]
            figure.legend(handles, shown, loc="outside lower left", frameon=False, handlelength=3,
                          labelspacing=0.3)  # fmt: skip
        return Chart(name, caption, alt, svg_of(figure, name), png_of(figure))


def _settings(name: str) -> Any:
    return {
        "font.size": 10,
        "axes.labelsize": 10,
        "xtick.labelsize": 10,
        "ytick.labelsize": 10,
        "legend.fontsize": 10,
        "text.color": TEXT,
        "text.parse_math": False,  # a name may have dollar signs
        "axes.labelcolor": TEXT,
        "axes.edgecolor": TEXT,
        "xtick.color": TEXT,
        "ytick.color": TEXT,
        "legend.labelcolor": TEXT,
        "axes.facecolor": "none",
        "axes.grid": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "axes.formatter.use_mathtext": False,
        "axes.unicode_minus": False,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
    }


def png_of(figure: "Figure") -> bytes:
    """The plot on white, 600 pixels wide."""
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return reduced(held.getvalue())


def reduced(png: bytes) -> bytes:
    """The same picture with a palette of at most 128 colours, a third of the bytes."""
    from PIL import Image

    held = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
            held, "PNG", optimize=True
        )
    return held.getvalue()


def svg_of(figure: "Figure", name: str) -> str:
    """The plot as an element of a page: ids of its own, colours and font of the page."""
    held = io.StringIO()
    figure.savefig(held, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = held.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r"<style [^>]*>.*?</style>\s*", "", svg, flags=re.S)  # it would hold for the page
    svg = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1">', svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:)?href="#', f'href="#{name}-', svg)
    svg = svg.replace("xlink:href=", "href=").replace("url(#", f"url(#{name}-")
    # The page's font in place of Matplotlib's, which it names in one of two ways by its version.
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(
        r"font: (\d+ )?([\d.]+px) [^;\"]*",
        lambda found: f"font-weight: {found[1] or 400}; font-size: {found[2]}",
        svg,
    )
    return svg.replace(TEXT, "currentColor").replace(GRID, "var(--rule)").strip()
