"""Text files that a stranger may have written, read whole or refused."""

import json
import stat
from pathlib import Path
from typing import Any

LIMIT = 1 << 24  # bytes; JSON takes up to thirty times as much in memory


def read_text(path: Path, limit: int = LIMIT) -> str:
    """The text of a file in UTF-8.

    Raises:
        OSError: it is not there, or can't be read.
        ValueError: it is no regular file (one of the others could be waited for without end), has
            more than ``limit`` bytes, or is not in UTF-8.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"more than {limit:,} bytes")
    return data.decode()


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        OSError, ValueError: see :func:`read_text` and :func:`parse_json`.
    """
    return parse_json(read_text(path))
