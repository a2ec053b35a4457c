"""What surrounds a measurement: the environment as the user has it, and the flags he gave."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from distcv.environment import user_has_set


def users_environment() -> dict[str, str]:
    """The environment variables as the user set them; to be called before distcv sets its own.

    Accelerate gives its processes one thread each: that is taken out, unless it was the user's.
    """
    found = dict(os.environ)
    if not user_has_set("OMP_NUM_THREADS"):
        found.pop("OMP_NUM_THREADS", None)
    return found


@contextlib.contextmanager
def environment(wanted: dict[str, str]) -> Iterator[None]:
    """Let the processes that are started in here have these environment variables and no others."""
    before = dict(os.environ)
    _set(wanted)
    try:
        yield
    finally:
        _set(before)


def _set(wanted: dict[str, str]) -> None:
    for name in set(os.environ) - set(wanted):
        del os.environ[name]
    os.environ.update(wanted)


def shown_flags(words: list[str]) -> list[str]:
    """The words of a command line, with only the last part of paths that begin at the root."""
    parts = (word.rpartition("=") for word in words)
    return [
        flag + equals + (Path(value).name if Path(value).is_absolute() else value)
        for flag, equals, value in parts
    ]
