"""How a command ends: its exit code, and one line for whoever got it wrong."""

import io
import os
import select
import sys
from collections.abc import Callable
from typing import TextIO

from distcv.config import InputError
from distcv.environment import without_password


def printable(text: str) -> str:
    """A text without what a terminal obeys or can't show, by escapes; line ends stay.

    Long lines lose their middle.
    """
    shown = "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
    lines = shown.split("\n")
    return "\n".join(f"{x[:1500]} … {x[-500:]}" if len(x) > 2003 else x for x in lines)


def _unread(stream: TextIO) -> bool:
    """Whether a stream is a pipe whose reader has gone, such as ``head``."""
    pipe = select.poll()
    pipe.register(stream, 0)  # asks for nothing: only errors are told
    return bool(pipe.poll(0))


def _say(error: str) -> None:
    print(f"error: {printable(without_password(error))}", file=sys.stderr)


def die(message: str) -> None:
    """Print one line and end this process, whatever its other threads are in."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's ``main`` and leave with its exit code; 2 and one line for wrong input.

    Of several processes, rank 0 speaks; once they are joined, the first of each node, since what
    is wrong may be wrong on one node only. An error without a message is a peer's, who says it. A
    file that can't be read or written is wrong input, too, of whichever process.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # ASCII has no ±
    try:
        code = main() or 0
    except InputError as error:
        joined = "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
        if str(error) and os.environ.get("LOCAL_RANK" if joined else "RANK", "0") == "0":
            _say(str(error))
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        if not _unread(sys.stdout):
            raise
        os._exit(141)  # as SIGPIPE ends other programs
    except OSError as error:
        if error.filename is None:  # of a connection, say
            raise
        _say(f"{error.filename}: {error.strerror or error}: mend that, or choose another")
        code = 2
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # a full disk: the interpreter's end would make it 120
        os._exit(code)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Not by way of the interpreter's end: after DDP on gloo it ended in SIGABRT in 1 of 14
        # tries (torch 2.15), though the process group had been left in good order.
        os._exit(code)
    sys.exit(code)
