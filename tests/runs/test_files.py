"""Text and JSON of strangers: read whole or refused, and nothing is waited for."""

import os
from pathlib import Path

import pytest

from distcv.files import parse_json, read_json, read_text


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    """A pipe or a device in place of a file would make a command hang."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/zero")
    for place in (tmp_path, tmp_path / "fifo", tmp_path / "link"):
        with pytest.raises(ValueError, match="not a regular file"):
            read_text(place)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none")


def test_size_and_encoding_have_a_limit(tmp_path: Path) -> None:
    """A huge file would exhaust the memory instead of being refused."""
    file = tmp_path / "file"
    file.write_bytes("± 1".encode())
    assert read_text(file, 4) == "± 1"
    with pytest.raises(ValueError, match="more than 3 bytes"):
        read_text(file, 3)
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="can't decode"):
        read_text(file)
    os.truncate(file, 1 << 40)  # sparse
    with pytest.raises(ValueError, match="more than 16,777,216 bytes"):
        read_json(file)


def test_json_that_is_nested_too_deeply_is_a_value_error(tmp_path: Path) -> None:
    """A deeply nested JSON file would end a command in the traceback of a RecursionError."""
    for text in ("[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json(text)
    (tmp_path / "file").write_text('{"a": [1]}')
    assert read_json(tmp_path / "file") == {"a": [1]}
