"""Children of a nursery under strace, which records, fails or kills at their system calls."""

import contextlib
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from faults.core import Child, wait_until

# Those that change files, on any processor: "?" leaves out what it doesn't have.
CALLS = (
    "openat", "write", "ftruncate", "fsync", "fallocate", "?mkdir", "mkdirat", "?rename",
    "?renameat", "renameat2", "?unlink", "unlinkat", "?rmdir",
)  # fmt: skip
MISSING = "strace is not there: apt-get install strace"


def missing() -> list[str]:
    """What a suite without strace has to say."""
    return [] if shutil.which("strace") else [MISSING]


def wait_still(child: Child) -> None:
    """Wait until a child has stopped itself."""

    def stopped() -> bool:
        assert child.code is None, child.said()
        return Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"

    wait_until(stopped, 120, "still child")


@contextlib.contextmanager
def traced(child: Child, *options: str) -> Iterator[None]:
    """Attach strace to a child that is ``still``, let it go on, and wait for its end."""
    wait_still(child)
    tracer = subprocess.Popen(
        ["strace", "-f", "-p", str(child.pid), *options], stderr=subprocess.PIPE, text=True
    )
    try:
        assert tracer.stderr is not None
        said = tracer.stderr.readline()
        assert "attached" in said, said
        child.kill(signal.SIGCONT)
        yield
        child.wait(300)
    finally:
        child.kill_group()
        tracer.communicate(timeout=60)
