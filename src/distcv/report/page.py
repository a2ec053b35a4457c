"""What a report is made of, whether it becomes HTML or Markdown."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    words: str


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows."""

    caption: str
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Chart:
    """A plot: inline in the page, a PNG file beside it."""

    name: str
    """Of the PNG file, without its ending."""
    caption: str
    alt: str
    """What a reader who can't see it should know."""
    svg: str
    png: bytes


@dataclass(frozen=True)
class Picture:
    """A small image of a gallery."""

    alt: str
    lines: list[str]
    """Below it."""
    png: bytes


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side; for Markdown, one PNG file that holds them all."""

    name: str
    caption: str
    alt: str
    pictures: list[Picture]
    sheet: bytes
    crisp: bool = True
    """Whether the pixels are to be seen as squares."""


@dataclass(frozen=True)
class Details:
    """Plain text that is folded away."""

    summary: str
    text: str


@dataclass(frozen=True)
class Charts:
    """Charts side by side where there is room."""

    charts: list[Chart]


Block = Text | Table | Charts | Gallery | Details


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Page:
    """The whole report."""

    title: str
    summary: list[tuple[str, str]]
    """A sentence for each recipe: what stands out of it, and the rest."""
    sections: list[Section] = field(default_factory=list)
    foot: str = ""

    def pictures(self) -> dict[str, bytes]:
        """Contents of the PNG files by their names."""
        blocks = [block for section in self.sections for block in section.blocks]
        charts = [c for block in blocks if isinstance(block, Charts) for c in block.charts]
        galleries = [block for block in blocks if isinstance(block, Gallery)]
        return {f"{c.name}.png": c.png for c in charts} | {
            f"{g.name}.png": g.sheet for g in galleries
        }
