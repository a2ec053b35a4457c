"""Small disks, and what can be wrong with a disk."""

import contextlib
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path


def can_mount(folder: Path) -> bool:
    with contextlib.suppress(OSError, subprocess.CalledProcessError), small_disk(folder, size="1m"):
        return True
    return False


@contextlib.contextmanager
def small_disk(folder: Path, **options: str) -> Iterator[Path]:
    """A tmpfs, mounted there."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = ",".join(f"{name}={value}" for name, value in options.items())
    mount = ["mount", "-t", "tmpfs", "-o", chosen, "tmpfs", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """Not a byte is free."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    yield
    filler.unlink(missing_ok=True)


@contextlib.contextmanager
def no_inodes(folder: Path) -> Iterator[None]:
    """No file can be made."""
    scratch = folder / "fillers"
    scratch.mkdir()
    with contextlib.suppress(OSError):
        for number in range(10**6):
            (scratch / str(number)).touch()
    yield
    shutil.rmtree(scratch)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be changed any more; files that are open for writing don't keep it from that."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def limited(pid: int) -> Iterator[None]:
    """A file may have 10 kB."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (10**4, -1))
    yield
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (-1, -1))
