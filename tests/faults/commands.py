"""Commands, run in this process as they are by themselves."""

import contextlib
import importlib
import io
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

from distcv.command import run_command


class Answer(NamedTuple):
    """What a command has done."""

    code: int | str
    out: str
    err: str
    seconds: float


def answer(main: Callable[[], int | None], *words: str) -> Answer:
    """What a command does with these words, run in this process as it is by itself."""
    out, err, began = io.StringIO(), io.StringIO(), time.perf_counter()
    code: int | str = "no exit code"
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "argv", ["distcv", *words]),
        ):
            run_command(main)
    except SystemExit as end:
        code = 0 if end.code is None else end.code
    except Exception as error:
        code = f"{type(error).__name__}: {error}"
    return Answer(code, out.getvalue(), err.getvalue(), time.perf_counter() - began)


def command(name: str) -> Any:
    """The module that has a command's ``main``."""
    return importlib.import_module(f"distcv.{name}" + ".__main__" * (name in ("data", "submit")))
