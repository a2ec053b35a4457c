"""File formats: IDX, CIFAR's pickled batches, sheets of images in PNG; and the sums of a data set.

Whatever is read here may come from a stranger. Sizes are compared with the table before anything is
allocated, archives are read by the names of their members and never unpacked, pickles can name
nothing but the few harmless pieces defined here, and nothing is handed out before its SHA-256 (or
that of the file it came in) agrees with the table.
"""

import gzip
import hashlib
import io
import pickle
import pickletools
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from distcv.config import InputError
from distcv.data import DatasetInfo
from distcv.files import parse_json

# What files, archives and their formats raise when they are not as they should be; the tarfile of
# Python 3.11 answers some headers with one of the general ones. InputError is a ValueError.
READING_ERRORS = (
    OSError, EOFError, MemoryError, ValueError, LookupError, ArithmeticError, zlib.error,
    struct.error, tarfile.TarError,
)  # fmt: skip
MAX_MEMBER = 1 << 26  # bytes; the largest member of any archive here has 47 million
MAX_MEMBERS = 1000  # of an archive; tarfile keeps a header of each
MAX_STEPS = 1 << 20  # of a pickle, and places in its memo, of which five bytes can ask for 32 GB
MAX_LABELS = 1 << 20  # bytes of JSON; 50,000 labels have a quarter of it


class Arrays(NamedTuple):
    """A data set as uint8 arrays; images are (N, C, H, W), labels (N,)."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def array_shapes(info: DatasetInfo) -> list[tuple[int, ...]]:
    """The shapes that the `Arrays` of this data set have, in their order."""
    return [(info.train, *info.shape), (info.train,), (info.test, *info.shape), (info.test,)]


def one_line(error: BaseException) -> str:
    """An error's message on one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def naming(file: str) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into an InputError that begins with its name.

    Raises:
        InputError: in place of the errors of files, archives and formats.
    """
    try:
        yield
    except READING_ERRORS as error:
        raise InputError(f"{file}: {one_line(error)}") from error


# Sums


def idx_header(shape: tuple[int, ...]) -> bytes:
    """The header of an IDX file that holds uint8 values in an array of this shape."""
    return struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)


def part_digest(info: DatasetInfo, shape: tuple[int, ...]) -> Any:
    """A SHA-256 object ready to be fed the bytes of a part of the data set, which has this shape.

    The published sums of IDX files include the header, whose channel dimension is left out.
    """
    if info.format != "idx":
        return hashlib.sha256()
    return hashlib.sha256(idx_header((shape[0], *shape[2:])))


def check_arrays(info: DatasetInfo, arrays: Arrays) -> tuple[str, ...]:
    """Compare the arrays with the table; return the SHA-256 of each.

    Raises:
        InputError: an array has another shape or sum, or a label is out of range.
    """
    sums = []
    for part, array, shape in zip(Arrays._fields, arrays, array_shapes(info), strict=True):
        if array.shape != shape or array.dtype != np.uint8:
            raise InputError(f"{part}: {array.dtype} {array.shape} instead of uint8 {shape}")
        if array.ndim == 1 and array.max() >= len(info.classes):
            raise InputError(f"{part}: label {array.max()} of {len(info.classes)} classes")
        digest = part_digest(info, shape)
        digest.update(np.ascontiguousarray(array))
        sums.append(digest.hexdigest())
        if info.sums and sums[-1] != info.sums[len(sums) - 1]:
            raise InputError(f"{part}: {_wrong_sum(sums[-1], info.sums[len(sums) - 1])}")
    return tuple(sums)


def check_file(path: Path, sha256: str) -> None:
    """Raise InputError unless the file has this SHA-256."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise InputError(f"{_wrong_sum(found, sha256)} ({path.stat().st_size:,} bytes)")


def _wrong_sum(found: str, expected: str) -> str:
    return f"SHA-256 is {found[:12]}… instead of {expected[:12]}…"


# IDX


def parse_idx(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The uint8 array in an IDX file, as a view of `data`.

    Source of the format: Y. LeCun, C. Cortes, C. Burges, "The MNIST database".

    Raises:
        InputError: it is no IDX file of uint8 values, has other dimensions than `shape`, or more
            or fewer bytes than they need.
    """
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != 8 or len(data) < 4 + 4 * data[3]:
        raise InputError(f"no IDX file of unsigned bytes (it begins with {data[:4].hex(' ')})")
    found = struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
    if found != shape:
        raise InputError(f"its header claims the dimensions {found} instead of {shape}")
    header = len(idx_header(shape))
    if len(data) != header + int(np.prod(shape)):
        raise InputError(f"{len(data):,} bytes instead of {header + int(np.prod(shape)):,}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_idx(path: Path, shape: tuple[int, ...], sha256: str | None = None) -> np.ndarray:
    """Read an IDX file, zipped if its name ends in .gz, whose array has this shape.

    No more is unzipped than an array of this shape needs.

    Raises:
        InputError: it has another SHA-256 than the one given, or `parse_idx` refuses it.
        OSError, EOFError, zlib.error: it can't be read or unzipped.
    """
    if sha256:
        check_file(path, sha256)
    limit = len(idx_header(shape)) + int(np.prod(shape)) + 1
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        return parse_idx(file.read(limit), shape)


# CIFAR


class _Dtype:
    """Stands in for numpy.dtype in a pickle: unsigned bytes, or nothing."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of {code!r}")

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and alignment, which single bytes don't have


class _Array:
    """Stands in for numpy.ndarray in a pickle: keeps the bytes and their shape."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, column_major, raw = state
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array without a dtype")
        flat = np.frombuffer(raw, np.uint8)
        self.values = flat.reshape(shape, order="F" if column_major else "C")


def _latin1(text: str, _encoding: str) -> bytes:
    """Stands in for _codecs.encode, by which protocol 2 writes bytes as text."""
    return text.encode("latin1")


_BATCH_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,  # before numpy 2
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
}


class _BatchUnpickler(pickle.Unpickler):
    """Knows no names but those in a pickled dictionary of lists and uint8 arrays.

    Not even numpy's own functions are called with what the file says.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _BATCH_NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR batch needs")
        return _BATCH_NAMES[module, name]


def read_cifar_batch(file: BinaryIO, label_key: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one pickled batch of CIFAR's Python version, without executing what it contains.

    Source of the format: A. Krizhevsky, "The CIFAR-10 dataset", its section "Python version".

    Returns:
        Pixels, uint8 (N, 3072), and labels, uint8 (N,).

    Raises:
        InputError: it is no such pickle, or names anything that a batch does not need.
    """
    try:
        for step, (opcode, index, _) in enumerate(pickletools.genops(file)):
            asked = (index or 0) if opcode.name.endswith("PUT") else step
            if asked >= MAX_STEPS:
                raise pickle.UnpicklingError(f"it asks for {asked:,} places in memory")
        file.seek(0)
        entries = _BatchUnpickler(file, encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: entries[key] for key in entries}
        return batch["data"].values, _label_array(batch[label_key])
    except Exception as error:  # a damaged pickle can raise any of them
        raise InputError(f"no CIFAR batch: {type(error).__name__}: {one_line(error)}") from error


def _label_array(values: Any) -> np.ndarray:
    if not isinstance(values, list):  # bytes(n) would be n zeros
        raise TypeError(f"the labels are a {type(values).__name__}")
    return np.frombuffer(bytes(values), np.uint8)


def parse_sheet(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """Decode a PNG that holds one RGB image of 32x32 pixels in each row.

    Args:
        data: the PNG file.
        size: width and height the sheet must have, in pixels.

    Returns:
        uint8 (height, 3, 32, 32).

    Raises:
        InputError: it is no PNG in RGB, or has another size, which is known before decoding.
    """
    from PIL import Image

    if len(data) < 24 or data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        raise InputError("no PNG file")
    if (found := struct.unpack(">II", data[16:24])) != size:
        raise InputError(f"a sheet of {found[0]}x{found[1]} pixels instead of {size[0]}x{size[1]}")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.mode != "RGB":
                raise InputError(f"a sheet in mode {image.mode} instead of RGB")
            pixels = np.asarray(image)
    except (SyntaxError, ValueError, struct.error) as error:  # PIL's ways to refuse a broken file
        raise InputError(f"no readable PNG: {one_line(error)}") from error
    return pixels.reshape(-1, 1024, 3).transpose(0, 2, 1).reshape(-1, 3, 32, 32)


def parse_json_labels(data: bytes) -> np.ndarray:
    """The labels in a JSON list of numbers from 0 to 255, as uint8 (N,).

    Raises:
        InputError: it is anything else.
    """
    try:
        if len(data) > MAX_LABELS:
            raise ValueError(f"more than {MAX_LABELS:,} bytes")
        return _label_array(parse_json(data.decode()))
    except (ValueError, TypeError) as error:
        raise InputError(f"no list of labels: {one_line(error)}") from error


class _Zipped(gzip.GzipFile):
    """A zipped archive of which no more is read at once than a member may have.

    What tarfile takes for one more header can claim any size, and is read whole.
    """

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_MEMBER:
            raise InputError(f"a header claims {size or 0:,} bytes")
        return super().read(size)


def read_members(path: Path, sha256: str, names: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Yield name and contents of these members of a .tar.gz, in the order they lie there.

    One pass, since going back in a zipped archive means to unzip it again; one member in memory.

    Raises:
        InputError: the archive has another SHA-256, or a member is missing or too large.
        OSError, EOFError, zlib.error, tarfile.TarError: it can't be read.
    """
    check_file(path, sha256)
    missing = set(names)
    with _Zipped(path) as zipped, tarfile.open(fileobj=zipped, mode="r:") as archive:
        for number, member in enumerate(archive):
            if number >= MAX_MEMBERS:
                raise InputError(f"it has more than {MAX_MEMBERS:,} members")
            if member.name not in missing or not member.isreg():
                continue
            if member.size > MAX_MEMBER:
                raise InputError(f"{member.name} claims {member.size:,} bytes")
            missing.remove(member.name)
            file = archive.extractfile(member)
            assert file is not None  # it is a regular file
            yield member.name, file.read()
            if not missing:
                return
    raise InputError(f"it lacks {', '.join(sorted(missing))}")
