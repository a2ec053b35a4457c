"""The page as HTML in one file, and as Markdown beside PNG files."""

import base64
import html
import re
from pathlib import Path

from distcv.report.page import Block, Chart, Charts, Gallery, Page, Table, Text

FOLDER = Path(__file__).parent


def to_html(page: Page) -> str:
    """The page with its style, charts and pictures in it."""
    import jinja2
    import markupsafe

    def named(chart: Chart) -> markupsafe.Markup:
        said = markupsafe.escape(chart.alt)
        return markupsafe.Markup(
            chart.svg.replace("<svg ", f'<svg role="img" aria-label="{said}" ', 1)
        )

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["named"] = named
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.filters["kind"] = lambda block: type(block).__name__
    style = (FOLDER / "style.css").read_text()
    return environment.get_template("page.html.j2").render(page=page, style=style)


def to_markdown(page: Page) -> str:
    """The same, for places that show Markdown; its pictures are the PNG files beside it."""
    parts = [
        f"# {_plain(page.title)}",
        "\n".join(f"- **{_plain(a)}**{_plain(b)}" for a, b in page.summary),
    ]
    for section in page.sections:
        parts.append(f"## {_plain(section.title)}")
        for block in section.blocks:
            parts.append(_block(block))
    return "\n\n".join([*parts, _plain(page.foot)]) + "\n"


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return _plain(block.words)
    if isinstance(block, Table):
        lines = [block.head, ["---"] * len(block.head), *block.rows]
        rows = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
        return f"{rows}\n\n{_plain(block.caption)}"
    if isinstance(block, Charts):
        return "\n\n".join(_image(c.name, c.alt, c.caption) for c in block.charts)
    if isinstance(block, Gallery):
        return _image(block.name, block.alt, block.caption)
    summary = html.escape(block.summary)
    return (
        f"<details><summary>{summary}</summary>\n\n```yaml\n{block.text.strip()}\n```\n\n</details>"
    )


def _image(name: str, alt: str, caption: str) -> str:
    return f"![{_plain(alt)}]({name}.png)\n\n{_plain(caption)}"


def _cell(words: str) -> str:
    return _plain(words).replace("|", "\\|")


def _plain(words: str) -> str:
    """Words that Markdown shows as they are."""
    return re.sub(r"([\\`*_<>\[\]])", r"\\\1", words)
