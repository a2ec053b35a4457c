"""Mirrors and home sites, all on the loopback: honest, lying, silent, absent."""

import contextlib
import gzip
import hashlib
import json
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from distcv.data import sources
from distcv.data.readers import Arrays
from support.clock import unhindered_seconds
from support.data_files import (
    CIFAR10,
    MNIST,
    cifar_batches,
    fetch,
    put_files,
    python2_pickle,
    refusal,
    same,
    sha256,
    spoil,
    tar_gz,
)
from support.loopback import DEAD, Serve

# A mirror


def mirrored(files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"/mnist/{name}": data for name, data in files.items()}


@pytest.fixture
def use_mirror(monkeypatch: pytest.MonkeyPatch, offline: None) -> Callable[[str], None]:
    return lambda url: monkeypatch.setenv("DISTCV_MIRROR", url)


def test_mirror(
    tmp_path: Path,
    serve: Serve,
    use_mirror: Callable[[str], None],
    mnist: Arrays,
    mnist_gz: dict[str, bytes],
) -> None:
    """Users who set DISTCV_MIRROR would get no data from it, or download files twice."""
    server = serve(mirrored(mnist_gz))
    use_mirror(server.url + "/")
    arrays, said = fetch(MNIST, tmp_path)
    assert same(arrays, mnist)
    assert said[-1] == "mnist: verified, from mirror (DISTCV_MIRROR)"
    assert server.requests == dict.fromkeys(server.files, 1)
    assert json.loads((tmp_path / "distcv/mnist.json").read_text())["source"].startswith("mirror")


def test_mirror_in_the_file_system(
    tmp_path: Path, use_mirror: Callable[[str], None], mnist: Arrays, mnist_gz: dict[str, bytes]
) -> None:
    """Users without a network could not name a shared folder as their mirror."""
    put_files(tmp_path / "mirror/mnist", mnist_gz)
    use_mirror((tmp_path / "mirror").as_uri())
    assert same(fetch(MNIST, tmp_path / "data")[0], mnist)


@pytest.mark.slow
def test_a_lying_mirror_is_refused_and_the_next_source_taken(
    tmp_path: Path,
    serve: Serve,
    use_mirror: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    mnist: Arrays,
    mnist_idx: dict[str, bytes],
    mnist_gz: dict[str, bytes],
) -> None:
    """A mirror with wrong labels would be accepted, or the home site not tried after it."""
    name = "t10k-labels-idx1-ubyte"
    lie = {f"{name}.gz": gzip.compress(spoil(mnist_idx[name]))}
    use_mirror(serve(mirrored({**mnist_gz, **lie})).url)
    assert "test_labels: SHA-256 is" in refusal(tmp_path)["mirror"]
    assert not list((tmp_path / "distcv").glob("*.uint8*"))

    be_home_site(monkeypatch, serve(mirrored(mnist_gz)).url, mnist_gz)
    arrays, said = fetch(MNIST, tmp_path)
    assert same(arrays, mnist)
    assert (
        "could not be had from mirror" in said[1] and said[-1] == "mnist: verified, from home site"
    )


def test_a_silent_mirror_times_out(
    tmp_path: Path,
    serve: Serve,
    use_mirror: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    mnist_gz: dict[str, bytes],
) -> None:
    """A mirror that stops answering would make the user wait without end."""
    monkeypatch.setattr(sources, "TIMEOUT_S", 0.3)
    for stall_after in (0, 500):
        server = serve(mirrored(mnist_gz))
        server.stall_after = stall_after
        use_mirror(server.url)
        start = unhindered_seconds()
        assert "train-images-idx3-ubyte.gz: timed out" in refusal(tmp_path)["mirror"]
        assert unhindered_seconds() - start < 5
        assert server.stalled.is_set()


def test_a_mirror_without_the_files(
    tmp_path: Path, serve: Serve, use_mirror: Callable[[str], None]
) -> None:
    """Users would not learn that their mirror lacks the files (HTTP 404)."""
    use_mirror(serve({}).url)
    assert "train-images-idx3-ubyte.gz: HTTP Error 404" in refusal(tmp_path)["mirror"]


def test_a_mirror_that_sends_too_much_or_too_slowly(
    tmp_path: Path,
    serve: Serve,
    use_mirror: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    mnist_gz: dict[str, bytes],
) -> None:
    """A mirror could fill the user's disk or delay the start of training for hours."""
    use_mirror(serve(mirrored(mnist_gz)).url)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "MAX_DOWNLOAD", 100_000)
        assert "more than 100,000 bytes" in refusal(tmp_path)["mirror"]
    monkeypatch.setattr(sources, "DOWNLOAD_S", 0)
    assert "bytes came in 0 s" in refusal(tmp_path)["mirror"]


def test_a_mirror_that_hangs_up(tmp_path: Path, use_mirror: Callable[[str], None]) -> None:
    """A lost connection would be reported as a damaged file, and users would blame the mirror."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        use_mirror(f"http://127.0.0.1:{listener.getsockname()[1]}")

        def answer() -> None:
            listener.accept()[0].close()  # the connection that only tries the address
            connection, _ = listener.accept()
            connection.recv(1000)
            connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 5000\r\n\r\nabc")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        assert "it ended after 3 of 5,000 bytes" in refusal(tmp_path)["mirror"]
        thread.join()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:port", "http://[::1", "http://a\tb:1/", "http://\u2028.invalid"]
)
def test_malformed_mirrors_are_one_more_reason(
    url: str, tmp_path: Path, use_mirror: Callable[[str], None]
) -> None:
    """A malformed DISTCV_MIRROR would cause a traceback, and no other source would be tried."""
    use_mirror(url)
    assert len(refusal(tmp_path)["mirror"]) > len("- mirror (DISTCV_MIRROR): ")


def test_mirror_through_a_proxy(
    tmp_path: Path,
    serve: Serve,
    use_mirror: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    mnist: Arrays,
    mnist_gz: dict[str, bytes],
) -> None:
    """Users behind an HTTP proxy could not reach their mirror."""
    base = "http://behind-the-proxy.invalid"
    proxy = serve({base + path: data for path, data in mirrored(mnist_gz).items()})
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it keeps the proxies of the first call
    use_mirror(base)
    assert same(fetch(MNIST, tmp_path)[0], mnist)


@pytest.mark.parametrize("url", ["ftp://h/", "/some/folder", "https://user:secret@host/x", "h:9"])
def test_mirrors_of_other_kinds_are_refused(
    url: str, tmp_path: Path, use_mirror: Callable[[str], None]
) -> None:
    """A mirror's password would appear in the log, or users would not learn which URLs work."""
    use_mirror(url)
    reason = refusal(tmp_path)["mirror"]
    assert "must be an http, https or file URL" in reason and "secret" not in reason


@contextlib.contextmanager
def full_listener() -> Iterator[tuple[str, int]]:
    """An address that drops all who knock, as a firewall does: its queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        address = listener.getsockname()
        for _ in range(2):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(address)
        yield address


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that makes every host name stand for these addresses."""

    def stand_for(*addresses: tuple[str, int]) -> None:
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    return stand_for


@pytest.mark.slow
def test_dropped_packets_cost_one_timeout_whatever_the_number_of_addresses(
    tmp_path: Path,
    offline: None,
    monkeypatch: pytest.MonkeyPatch,
    names: Callable[..., None],
    mnist_gz: dict[str, bytes],
) -> None:
    """Behind a firewall that drops packets, users would wait for each address of a host."""
    monkeypatch.setattr(sources, "TIMEOUT_S", 0.6)
    url = "http://example.invalid"
    be_home_site(monkeypatch, url, mnist_gz)
    monkeypatch.setenv("DISTCV_MIRROR", url)
    with full_listener() as address:
        names(*[address] * 8)
        start = unhindered_seconds()
        reasons = refusal(tmp_path)
        # Both sources; eight addresses each would take 10 s.
        assert 1 < unhindered_seconds() - start < 4
    for source in ("mirror", "home"):
        assert "no connection to example.invalid: timed out" in reasons[source]


def test_one_dead_address_leaves_time_for_the_next(
    monkeypatch: pytest.MonkeyPatch, names: Callable[..., None]
) -> None:
    """A host would be given up after one dead address, although its next address answers."""
    monkeypatch.setattr(sources, "TIMEOUT_S", 1)
    with full_listener() as dead, socket.create_server(("127.0.0.1", 0)) as alive:
        names(dead, alive.getsockname())
        sources._reach("https://example.invalid/file")


# The home site


def be_home_site(
    monkeypatch: pytest.MonkeyPatch, url: str, files: dict[str, bytes], *before: str
) -> None:
    """Make torchvision believe that MNIST is at home under this URL, after others."""
    from torchvision import datasets

    monkeypatch.setattr(datasets.MNIST, "mirrors", [*before, f"{url}/mnist/"])
    md5s = [(name, hashlib.md5(data).hexdigest()) for name, data in files.items()]
    monkeypatch.setattr(datasets.MNIST, "resources", md5s)


def test_home_site_through_torchvision(
    tmp_path: Path,
    serve: Serve,
    offline: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    mnist: Arrays,
    mnist_gz: dict[str, bytes],
) -> None:
    """Users would get no data from the home site when torchvision's first URL is down."""
    server = serve(mirrored(mnist_gz))
    be_home_site(monkeypatch, server.url, mnist_gz, DEAD)  # its first mirror is down
    arrays, said = fetch(MNIST, tmp_path)
    assert same(arrays, mnist)
    assert said[-1] == "mnist: verified, from home site"
    assert set(server.requests) == set(server.files)
    assert capfd.readouterr() == ("", "")  # no progress bar
    assert socket.getdefaulttimeout() is None


def test_home_site_that_sends_something_else(
    tmp_path: Path,
    serve: Serve,
    offline: None,
    monkeypatch: pytest.MonkeyPatch,
    mnist_idx: dict[str, bytes],
    mnist_gz: dict[str, bytes],
) -> None:
    """A login page or a forged file from the home site would be taken for MNIST."""
    server = serve(mirrored({**mnist_gz, "train-labels-idx1-ubyte.gz": b"<html>login</html>"}))
    be_home_site(monkeypatch, server.url, mnist_gz)
    assert "File not found or corrupted" in refusal(tmp_path)["home"]  # by its MD5
    lie = gzip.compress(spoil(mnist_idx["train-labels-idx1-ubyte"]))
    files = {**mnist_gz, "train-labels-idx1-ubyte.gz": lie}
    be_home_site(monkeypatch, serve(mirrored(files)).url, files)  # as if the MD5 had been forged
    assert "train_labels: SHA-256 is" in refusal(tmp_path)["home"]


def test_home_site_that_says_nothing_times_out(
    tmp_path: Path,
    serve: Serve,
    offline: None,
    monkeypatch: pytest.MonkeyPatch,
    mnist_gz: dict[str, bytes],
) -> None:
    """A home site that does not answer would make the user wait without end."""
    monkeypatch.setattr(sources, "TIMEOUT_S", 0.3)
    server = serve(mirrored(mnist_gz))
    server.stall_after = 0
    be_home_site(monkeypatch, server.url, mnist_gz)
    start = unhindered_seconds()
    assert "timed out" in refusal(tmp_path)["home"]
    assert unhindered_seconds() - start < 5


@pytest.mark.slow
def test_home_site_of_cifar10(
    tmp_path: Path,
    serve: Serve,
    offline: None,
    monkeypatch: pytest.MonkeyPatch,
    cifar10: Arrays,
) -> None:
    """CIFAR-10 could not be had from its home site, or a forged archive would be accepted."""
    from torchvision import datasets

    name = "cifar-10-python.tar.gz"
    archive = tar_gz(cifar_batches(cifar10, python2_pickle))
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{serve({f'/k/{name}': archive}).url}/k/{name}")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive).hexdigest())
    assert f"{name}: SHA-256 is" in refusal(tmp_path, CIFAR10)["home"]
    info = replace(CIFAR10, files=((name, sha256(archive)),))
    assert same(fetch(info, tmp_path)[0], cifar10)
