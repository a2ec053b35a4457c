"""The allocator's settings: what a step frees stays mapped for the next."""

import os
import platform
import resource
import subprocess
import sys

import pytest

FREED_AND_TAKEN_AGAIN = """
import resource
from distcv.environment import keep_memory
keep_memory()
bytearray(50_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    bytearray(50_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

OTHERS = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"
}


def page_faults(**environment: str) -> int:
    ran = subprocess.run(
        [sys.executable, "-c", FREED_AND_TAKEN_AGAIN], env=OTHERS | environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(ran.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc than GNU's")
def test_freed_memory_is_kept_unless_the_user_has_chosen() -> None:
    """Training on a CPU would be slower, or the user's own malloc settings would be overridden."""
    touched = 10 * 50_000_000 // resource.getpagesize()
    assert page_faults() < touched / 100
    assert page_faults(MALLOC_MMAP_THRESHOLD_="131072") > touched / 2
    assert page_faults(GLIBC_TUNABLES="glibc.malloc.mmap_threshold=131072") > touched / 2
