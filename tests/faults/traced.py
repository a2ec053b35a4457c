"""Children of a nursery under strace, which records, fails or kills at their system calls."""

import contextlib
import os
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


@contextlib.contextmanager
def traced(child: Child, *options: str) -> Iterator[None]:
    """Attach strace to a child that is ``still``, let it go on, and wait for its end."""
    stat = Path(f"/proc/{child.pid}/stat")
    wait_until(lambda: stat.read_text().rsplit(")", 1)[1].split()[0] == "T", 120, "still child")
    tracer = subprocess.Popen(
        ["strace", "-f", "-p", str(child.pid), *options], stderr=subprocess.PIPE, text=True
    )
    try:
        assert tracer.stderr is not None
        said = tracer.stderr.readline()
        assert "attached" in said, said
        os.kill(child.pid, signal.SIGCONT)
        yield
        child.wait(300)
    finally:
        child.kill_group()
        tracer.communicate(timeout=60)
