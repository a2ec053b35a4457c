"""A report of runs, to be looked at: ``python -m distcv.report runs/a runs/b``.

One HTML file that needs nothing beside it, the same as Markdown, and a PNG file of each plot.
"""

import re
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field

from distcv.command import printable, run_command
from distcv.command_line import parse_arguments
from distcv.config import InputError, Strict
from distcv.environment import set_thread_environment
from distcv.results import Run, read_runs

GENERATOR = '<meta name="generator" content="distcv.report">'


class Arguments(Strict):
    """What is reported, and where it is written."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = Field(
        (Path("runs"),), description="Run folders, or folders that hold them."
    )
    output: Path | None = Field(
        None, description="Folder of the report; default: report/, in the run folder if it is one."
    )
    data_dir: Path = Field(Path("data"), description="Folder in which data sets are kept.")
    target: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None, description="Test accuracy in percent that the runs were to reach."
    )


def main() -> None:
    """Read the runs, compose the page, write it in both forms."""
    arguments = parse_arguments(
        Arguments,
        prog="distcv.report",
        description="Report runs: index.html, which holds all its pictures, report.md, PNG files.",
    )
    runs, skipped = read_runs(arguments.runs)
    if skipped:
        print(printable("\n".join(skipped)))
    if not runs:
        raise InputError(f"no runs in {', '.join(map(str, arguments.runs))}: train first")
    set_thread_environment()
    from distcv.report.compose import compose
    from distcv.report.render import to_html, to_markdown

    folder = arguments.output or _default_folder(runs)
    stale = _earlier_report(folder)
    page = compose(runs, arguments.data_dir, arguments.target)
    files = page.pictures() | {
        "report.md": to_markdown(page).encode(),
        "index.html": to_html(page).encode(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in stale - files.keys():
            (folder / name).unlink(missing_ok=True)
        for name, contents in files.items():
            (folder / name).write_bytes(contents)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}: choose another --output") from None
    print(
        f"{folder / 'index.html'} ({len(files['index.html']) / 1e6:.2f} MB), report.md and "
          f"{len(files) - 2} PNG files")  # fmt: skip


def _earlier_report(folder: Path) -> set[str]:
    """The pictures of an earlier report there, which is replaced.

    Raises:
        InputError: the folder holds another page.
    """
    page, text = folder / "index.html", folder / "report.md"
    if page.exists() and GENERATOR not in page.read_text(errors="replace"):
        raise InputError(f"{page} is no report of distcv: choose another --output")
    if not page.exists() or not text.exists():
        return set()
    return set(re.findall(r"\]\(([\w-]+\.png)\)", text.read_text(errors="replace")))


def _default_folder(runs: list[Run]) -> Path:
    return runs[0].folder / "report" if len(runs) == 1 else Path("report")


def command() -> None:
    """Entry point: :func:`main`, and its exit code."""
    run_command(main)
