"""Files that outlast a kill and a power loss: what was synced is on the disk, its name included."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, so that they outlast a power loss."""
    if not path.parent.is_dir():
        make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Write a file and sync its bytes; its name is on the disk once its folder is synced."""
    with _naming(path), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write a file, or put it in another's place, so that it is the old or the new one, whole."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        write_file(temporary, data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def set_aside(path: Path, why: str) -> Path:
    """Rename a damaged file or folder so that it is not used again, without losing it."""
    number = 0
    while os.path.lexists(
        aside := path.with_name(f"{why}-{path.name}" + (f"-{number}" if number else ""))
    ):
        number += 1
    return path.rename(aside)


def explain(error: OSError) -> str:
    """One line: which file, what is wrong with it, the remedy."""
    remedy = "make room" if error.errno in NO_ROOM else "mend that"
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}: {remedy}, or choose another folder with --runs-dir"


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of an open file don't tell its name."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
