"""Secrets of the user's surroundings are in no file, no output and no request of a training."""

import base64
import json
import subprocess
from pathlib import Path

import pytest

from support.runs import ROOT, TRAIN, Runs
from support.wandb_runs import sync
from support.wandb_server import KEY, WandbServer

FLAGS = [
    *("--model", "gap", "--max-steps", "4", "--log-every", "2"),
    *("--track", "wandb", "tensorboard"),
]
IN_ENVIRONMENT = ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "GITHUB_TOKEN", "MY_PASSWORD"]


def planted(where: str) -> str:
    """A secret that tells where it was planted."""
    return f"s3cr3t-of-{where.lower().replace('_', '-')}-0815"


@pytest.fixture
def runs(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Starts trainings in a git repository with secrets around it and in it."""
    for name in IN_ENVIRONMENT:
        monkeypatch.setenv(name, planted(name))
    monkeypatch.setenv("DISTCV_MIRROR", f"https://user:{planted('mirror')}@127.0.0.1:9/")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    own = tmp_path / "work"
    own.mkdir()
    monkeypatch.chdir(own)
    (own / "notes.txt").write_text("nothing\n")
    remote = f"https://user:{planted('remote')}@host.invalid/repo.git"
    user = ["-c", "user.name=A User", "-c", "user.email=user@host.invalid"]
    for command in (
        ["init", "-q"],
        ["remote", "add", "origin", remote],
        ["add", "notes.txt"],
        [*user, "commit", "-q", "-m", "notes"],
    ):
        subprocess.run(["git", *command], check=True)
    (own / "notes.txt").write_text(f"{planted('uncommitted')}\n")
    return runs


def forms(secret: str) -> list[bytes]:
    """A secret as it is, and in base64, wherever it begins in what was encoded."""
    found = [secret.encode()]
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + secret.encode())
        # Without the characters that hold bits of what is before and after it.
        found.append(encoded[-(-8 * before // 6) : 8 * (before + len(secret)) // 6])
    return found


def find_secrets(folder: Path, said: str, server: WandbServer) -> list[str]:
    """Where secrets are, in files below a folder, output, and requests.

    The API key belongs into one header.
    """
    names = [*IN_ENVIRONMENT, "mirror", "remote", "uncommitted", "url"]
    secrets = {name: forms(planted(name)) for name in names} | {"key": forms(KEY)}
    places = {
        str(path): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and folder / "work" not in path.parents
    }
    places["the output"] = said.encode()
    for number, request in enumerate(server.requests):
        place = f"request {number}, {request.operation or request.path}"
        places[f"{place}: address"] = f"{request.path}?{request.query}".encode()
        places[f"{place}: body"] = request.body
        for name, value in request.headers.items():
            if name != "authorization":
                places[f"{place}: {name}"] = value.encode()
    return [
        f"{name} is in {place}"
        for name, all_forms in secrets.items()
        for place, text in places.items()
        if any(form in text for form in all_forms)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_training_tells_no_secret_of_its_surroundings(
    mode: str, runs: Runs, server: WandbServer, mnist: object, tmp_path: Path
) -> None:
    """Tokens and passwords in the user's environment would leak into run files or to W&B."""
    said = runs.run("r", *FLAGS, WANDB_MODE=mode)
    if mode == "offline":
        sync(runs, "r")
    [run] = server.runs.values()
    assert run.state == "finished"
    seen = json.loads(run.files["wandb-metadata.json"])
    assert seen["git"]["remote"] == "https://host.invalid/repo.git", "the repository was looked at"
    assert any(path.name.startswith("events.out") for path in runs.folder.rglob("*"))
    assert find_secrets(tmp_path, said, server) == []


@pytest.mark.slow
def test_the_address_of_a_server_may_hold_a_password(
    runs: Runs, server: WandbServer, mnist: object, tmp_path: Path
) -> None:
    """A password in WANDB_BASE_URL would end up in the output, in files or in requests."""
    address = server.url.replace("://", f"://user:{planted('url')}@")
    said = runs.run("r", *FLAGS, WANDB_BASE_URL=address)
    assert find_secrets(tmp_path, said, server) == []


@pytest.mark.parametrize(
    "flags",
    [
        ["--recipe", "https://user:{}@host.invalid/x.yaml"],
        ["--model", "https://user:{}@host.invalid/x.yaml"],
        ["--token={}"],
        ["--token", "{}"],
        ["--model", "gap", "--lr", "https://user:{}@host.invalid/"],
    ],
)
def test_a_wrong_argument_is_refused_without_the_password_in_it(flags: list[str]) -> None:
    """A mistyped command would print its password or token to the terminal and to job logs."""
    command = [*TRAIN, *(flag.format(planted("flag")) for flag in flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "error" in done.stderr
    assert planted("flag") not in done.stdout + done.stderr


def test_secrets_are_found_where_they_are(tmp_path: Path, server: WandbServer) -> None:
    """Leaked secrets would stay unnoticed: the tests above would pass whatever a run writes."""
    for shift in range(3):
        text = base64.b64encode(b"u" * shift + planted("remote").encode() + b":tail")
        (tmp_path / "file").write_bytes(b"before" + text + b"after")
        assert find_secrets(tmp_path, "", server) == [f"remote is in {tmp_path / 'file'}"]
    (tmp_path / "file").unlink()
    assert find_secrets(tmp_path, f"said {KEY}", server) == ["key is in the output"]
