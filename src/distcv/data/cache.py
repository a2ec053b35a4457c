"""The cache: a data set's verified bytes in one flat file, memory-mapped by every process.

`<data_dir>/distcv/<name>.uint8` holds training pixels, training labels, test pixels and test labels
one after the other; `<name>.json` beside it says what they are. Both are written in a scratch
folder, flushed to the disk and renamed, the JSON last, by the one process that holds
`<name>.lock`; readers need no lock.
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from distcv.config import InputError
from distcv.data import DatasetInfo, Report
from distcv.data.layouts import read_folder
from distcv.data.readers import Arrays, array_shapes, one_line, part_digest
from distcv.data.sources import fetch
from distcv.durable import sync
from distcv.files import read_json

FORMAT = 1  # raise it when the layout of the file changes
LOCK_NOTICE_S = 3.0  # a wait that lasts longer than this is reported
LOCK_WAIT_S = 7200.0  # longer than all sources together may take


def load_arrays(info: DatasetInfo, data_dir: Path, report: Report) -> Arrays:
    """Map the data set from the cache, filling it first from the nearest source if need be.

    In a folder that can't be written, a valid cache is mapped as anywhere else; without one, the
    original files are read into memory if they lie there.

    Raises:
        InputError: no source delivers the data, or there is no cache and no way to write one.
    """
    folder = data_dir / "distcv"
    with contextlib.suppress(OSError, InputError):  # judged again under the lock
        return open_cache(info, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(info, folder, report):
            return _open_or_fill(info, data_dir, folder, report)
    except OSError as error:
        try:
            arrays = read_folder(info, data_dir)
        except (InputError, OSError) as reason:
            raise InputError(
                f"dataset {info.name}: can't write {folder} ({one_line(error)}), and the files in "
                f"{data_dir} won't do ({one_line(reason)}): choose a folder that can be written"
            ) from None
        report(f"{info.name}: can't write {folder} ({one_line(error)}): read without a cache")
        return arrays


def _open_or_fill(info: DatasetInfo, data_dir: Path, folder: Path, report: Report) -> Arrays:
    """Under the lock: another process may have filled the cache, or died while it did."""
    for left_behind in folder.glob(f".{info.name}.*.tmp"):
        shutil.rmtree(left_behind, ignore_errors=True)
    try:
        return open_cache(info, folder)
    except FileNotFoundError:
        report(f"{info.name}: not in {folder} yet, fetching it")
    except InputError as error:
        path = _data_file(info, folder)
        aside = path.with_name(f"{path.name}.damaged")
        kept = ""
        if path.exists():  # the JSON may be all that is left
            path.replace(aside)
            kept = f"; set aside as {aside.name}"
        report(f"{info.name}: {error}{kept}; fetching the data again")
    scratch = Path(tempfile.mkdtemp(prefix=f".{info.name}.", suffix=".tmp", dir=folder))
    try:
        arrays, sums, source = fetch(info, data_dir, scratch, report)
        _write(info, folder, scratch, arrays, _record(info, sums, source))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report(f"{info.name}: verified, from {source}")
    return open_cache(info, folder)


@contextlib.contextmanager
def _lock(info: DatasetInfo, folder: Path, report: Report) -> Iterator[None]:
    path = folder / f"{info.name}.lock"
    lock = filelock.FileLock(path)  # a file in its place will do where there are no locks
    try:
        lock.acquire(timeout=LOCK_NOTICE_S)
    except filelock.Timeout:
        report(f"{info.name}: waiting for the process that holds {path}")
        try:
            lock.acquire(timeout=LOCK_WAIT_S)
        except filelock.Timeout:
            raise InputError(
                f"dataset {info.name}: {path} was held for {LOCK_WAIT_S:.0f} s: "
                "end the process that holds it, or remove the file if there is none"
            ) from None
    try:
        yield
    finally:
        lock.release()


def _data_file(info: DatasetInfo, folder: Path) -> Path:
    return folder / f"{info.name}.uint8"


def _record(info: DatasetInfo, sums: Any, source: Any) -> dict[str, Any]:
    """What the JSON file says; the sums are those of the four parts, as in `DatasetInfo.sums`."""
    return {
        "format": FORMAT,
        "name": info.name,
        "shape": list(info.shape),
        "train": info.train,
        "test": info.test,
        "sha256": dict(zip(Arrays._fields, sums, strict=True)),
        "source": source,
    }


def open_cache(info: DatasetInfo, folder: Path) -> Arrays:
    """Verify the cached bytes and map them, copy-on-write; no lock and no write access needed.

    Raises:
        FileNotFoundError: nothing is cached.
        InputError: what is cached is damaged, incomplete, or another data set.
    """
    path, note = _data_file(info, folder), folder / f"{info.name}.json"
    if not path.exists() and not note.exists():
        raise FileNotFoundError(path)
    try:
        found = read_json(note)
        sums = [found["sha256"][part] for part in Arrays._fields]
        if found != _record(info, sums, found["source"]):
            raise InputError(f"{note}: it describes other data than this version expects")
        # The table has the last word, so that a forged note can't vouch for forged data.
        return _map(info, path, info.sums or sums)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{note}: no valid cache: {one_line(error)}") from error


def check_cached(info: DatasetInfo, data_dir: Path) -> str:
    """Verify that a data set is cached, without fetching it; where it is, in words.

    Raises:
        InputError: it isn't, or is damaged; with the command that fetches it.
    """
    folder = data_dir / "distcv"
    if info.format == "none":
        return f"{info.name} needs no files"
    remedy = f"python -m distcv.data --dataset {info.name} --data-dir {data_dir}"
    try:
        open_cache(info, folder)
    except FileNotFoundError:
        raise InputError(f"{info.name} is not in {folder}: {remedy}") from None
    except (InputError, OSError) as error:
        raise InputError(f"{error}: {remedy}") from None
    return f"{info.name} in {folder}, verified"


def _map(info: DatasetInfo, path: Path, sums: Any) -> Arrays:
    shapes = array_shapes(info)
    sizes = [math.prod(shape) for shape in shapes]
    with path.open("rb") as file:
        if (size := os.fstat(file.fileno()).st_size) != sum(sizes):
            raise InputError(f"{path}: {size:,} bytes instead of {sum(sizes):,}")
        # Read rather than hashed through the mapping: a failing disk is then an OSError, no signal.
        buffer = memoryview(bytearray(1 << 20))
        for part, shape, left, expected in zip(Arrays._fields, shapes, sizes, sums, strict=True):
            digest = part_digest(info, shape)
            while left and (count := file.readinto(buffer[: min(left, len(buffer))])):
                digest.update(buffer[:count])
                left -= count
            if digest.hexdigest() != expected:
                raise InputError(f"{path}: the bytes of {part} are damaged")
        # The open file, not its name: the bytes that were hashed are the ones that are mapped.
        flat = np.memmap(file, np.uint8, mode="c")
    ends = np.cumsum(sizes)
    parts = [flat[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    return Arrays(*(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)))


def _write(
    info: DatasetInfo, folder: Path, scratch: Path, arrays: Arrays, record: dict[str, Any]
) -> None:
    data, note = scratch / "data", scratch / "note"
    with data.open("wb") as file:
        for array in arrays:
            file.write(np.ascontiguousarray(array).data)
        file.flush()
        os.fsync(file.fileno())
    with note.open("w", encoding="utf-8") as text:
        json.dump(record, text, indent=2)
        text.flush()
        os.fsync(text.fileno())
    data.replace(_data_file(info, folder))
    note.replace(folder / f"{info.name}.json")
    sync(folder)
