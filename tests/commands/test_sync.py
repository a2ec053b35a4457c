"""Runs that were logged offline, sent by ``python -m distcv.sync`` to a server on the loopback."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import wandb

from distcv import lease, sync
from distcv.config import InputError
from distcv.wandb_log import read_records, write_records
from support.wandb_runs import be_client
from support.wandb_server import WandbServer

Sync = Callable[..., tuple[int, list[str]]]
WEIGHTS = b"weights" * 100


@pytest.fixture
def server(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[WandbServer]:
    """A server whose key is known; the working folder is a new one, which holds ``runs``."""
    be_client(server, monkeypatch, HOME=str(tmp_path / "home"), WANDB_SILENT="true")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sync, "ARRIVAL_SECONDS", 1.0)
    wandb.teardown()  # it keeps the environment of its first use
    yield server
    wandb.teardown()


@pytest.fixture
def send(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sync:
    """Runs the command with these arguments; its exit code and its lines."""

    def run(*arguments: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["distcv.sync", *arguments])
        with pytest.raises(SystemExit) as left:
            sync.command()
        said = capsys.readouterr()
        return int(str(left.value.code)), (said.out + said.err).splitlines()

    return run


def log_offline(
    folder: Path, steps: range, monkeypatch: pytest.MonkeyPatch, weights: bytes = b""
) -> Path:
    """One start of a run, as the trackers log it; its log."""
    folder.mkdir(parents=True, exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", str(folder.resolve()))
        settings = wandb.Settings(console="off", x_disable_stats=True)
        run = wandb.init(
            project="p", id=folder.name, name=folder.name, dir=str(folder.resolve()),
            mode="offline", resume="allow", reinit="create_new", settings=settings,
        )  # fmt: skip
        for step in steps:
            run.log({"train/loss": 1 / (step + 1)}, step=step)
        if weights:
            (folder / "weights").write_bytes(weights)
            model = wandb.Artifact(f"model-{folder.name}", type="model")
            model.add_file(str(folder / "weights"))
            run.log_artifact(model, aliases=["best"])
        run.finish()
        wandb.teardown()  # as at a training's end: now all is written
    [log] = Path(run.dir).parent.glob("*.wandb")
    return log


def steps_on_server(server: WandbServer, run: str) -> list[int]:
    return [row["_step"] for row in server.run(run).history]


@pytest.mark.slow
def test_each_log_is_sent_once_in_the_order_of_starts(
    server: WandbServer, send: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of offline runs would reach W&B twice, out of order or not at all."""
    first = log_offline(Path("runs/a"), range(3), monkeypatch)
    second = log_offline(Path("runs/a"), range(3, 5), monkeypatch, WEIGHTS)
    log_offline(Path("runs/array/b"), range(2), monkeypatch)
    os.utime(second, (0, 0))  # copying may change a file's time
    first.write_bytes(first.read_bytes()[:-3])  # as a kill leaves it: only the end is lost
    assert send() == (0, ["runs/a: 2 logs sent, 5 rows", "runs/array/b: 1 log sent, 2 rows"])
    assert steps_on_server(server, "a") == [0, 1, 2, 3, 4]
    assert steps_on_server(server, "b") == [0, 1]
    [model] = server.artifacts
    assert (model.name, model.type, model.aliases) == ("model-a", "model", ["best", "latest"])
    assert model.files == {"weights": WEIGHTS}

    assert send() == (0, ["nothing to send"])
    second.with_suffix(".wandb.synced").unlink()  # as if the sync had been killed at its end
    assert send("runs/a") == (0, ["runs/a: W&B has it all"])
    assert steps_on_server(server, "a") == [0, 1, 2, 3, 4]
    assert not Path("wandb").exists(), "W&B's own notes lie in the run folder"


@pytest.mark.slow
def test_of_a_log_that_was_sent_in_part_the_rest_is_sent(
    server: WandbServer, send: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an interrupted sync, W&B would lack the last rows and the weights for good."""
    log = log_offline(Path("runs/a"), range(5), monkeypatch, WEIGHTS)
    assert send()[0] == 0
    log.with_suffix(".wandb.synced").unlink()
    del server.run("a").streams["wandb-history.jsonl"][4]
    server.run("a").streams["wandb-summary.json"] = {0: '{"_step": 3}'}
    server.stored_artifacts.all.clear()
    assert send() == (0, ["runs/a: 1 log sent, 1 rows"])
    assert steps_on_server(server, "a") == [0, 1, 2, 3, 4]
    assert [model.files["weights"] for model in server.artifacts] == [WEIGHTS]
    assert list(log.parent.glob("*.wandb*")) == [log, log.with_suffix(".wandb.synced")]


@pytest.mark.slow
def test_what_an_online_run_could_not_send_is_sent(
    server: WandbServer, send: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage at the end of an online run would cost the user its last rows and images."""
    settings = wandb.Settings(
        console="off", x_disable_stats=True, x_file_stream_transmit_interval=1, finish_timeout=1,
        x_file_stream_retry_max=1, x_file_stream_retry_wait_min_seconds=0.1,
        x_file_transfer_retry_max=1, x_file_transfer_retry_wait_min_seconds=0.1,
    )  # fmt: skip
    monkeypatch.setenv("WANDB_DATA_DIR", str(Path("runs/a").resolve()))
    Path("runs/a").mkdir(parents=True)
    run = wandb.init(project="p", id="a", dir=str(Path("runs/a").resolve()), settings=settings)
    for step in range(3):
        run.log({"train/loss": 1.0}, step=step)
    deadline = time.monotonic() + 20
    while len(server.run("a").history) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    answer = server.answer
    monkeypatch.setattr(
        server,
        "answer",
        lambda request: (500, {}) if "/graphql" not in request.path else answer(request),
    )
    picture = wandb.Image(np.zeros((8, 8), dtype=np.uint8))
    run.log({"train/loss": 2.0, "samples": picture}, step=3)
    with contextlib.suppress(Exception):
        run.finish()
    wandb.teardown()
    had = len(server.run("a").history)
    assert had < 4

    monkeypatch.setattr(server, "answer", answer)
    assert send() == (0, [f"runs/a: 1 log sent, {4 - had} rows"])
    assert steps_on_server(server, "a") == [0, 1, 2, 3]
    assert server.run("a").history[3]["samples"]["path"] in server.run("a").files
    assert send() == (0, ["nothing to send"])


def test_an_artifact_whose_files_are_gone_is_told(
    server: WandbServer, send: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run would be marked as sent although the files of its artifact are gone."""
    log = log_offline(Path("runs/a"), range(2), monkeypatch, WEIGHTS)
    shutil.rmtree("runs/a/artifacts/staging")
    code, [line] = send()
    assert code == 1 and line.startswith("runs/a: artifact files are gone (1, as ")
    assert "a" not in server.runs and not log.with_suffix(".wandb.synced").exists()
    code, [line] = send("--incomplete")
    assert code == 0
    assert line == "runs/a: 1 log sent, 2 rows, without artifact files that are gone (1)"
    assert steps_on_server(server, "a") == [0, 1]


@pytest.mark.slow
def test_what_the_server_did_not_take_is_told(
    server: WandbServer, send: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows or weights that W&B refused would count as sent and never be sent again."""
    log_offline(Path("runs/a"), range(2), monkeypatch, WEIGHTS)
    log_offline(Path("runs/b"), range(2), monkeypatch)
    answer = server.answer

    def broken(request: Any) -> tuple[int, Any]:
        if "/storage/artifacts" in request.path or "/b/file_stream" in request.path:
            return 403, {}
        return answer(request)

    monkeypatch.setattr(server, "answer", broken)
    code, lines = send()
    assert code == 1 and [line.split("/wandb/")[0] for line in lines] == [
        "runs/a: W&B has the rows of runs/a",
        "runs/b: W&B did not take all rows of runs/b",
    ]
    assert "not artifact model-a" in lines[0]
    assert list(Path("runs").rglob("*.synced")) == []


@pytest.mark.slow
def test_a_run_in_progress_is_left_alone(
    server: WandbServer, send: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log of a running training would be sent in part and marked as complete."""
    for name in "ab":
        log_offline(Path("runs") / name, range(2), monkeypatch)
    with filelock.FileLock("runs/a/lock"):
        code, lines = send("runs")
    assert (code, lines) == (
        1,
        ["runs/a: is in progress: send it when it has ended", "runs/b: 1 log sent, 2 rows"],
    )
    assert list(server.runs) == ["b"]


@pytest.mark.slow
def test_a_run_in_progress_on_another_host_is_left_alone(
    server: WandbServer, send: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training on another host would be marked as sent too early, or after its death never."""
    log_offline(Path("runs/a"), range(2), monkeypatch)
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.3)
    held = lease.Lease(Path("runs/a"), give_up=print)
    held.here["host"] = "far"
    held.lock = filelock.FileLock("far", fallback_to_soft=False, thread_local=False)
    held.take(0, print)  # whose locks aren't seen here
    holder = f"(host far, process {os.getpid()})"
    with contextlib.ExitStack() as end:
        end.callback(held.release)
        wanted = f"runs/a: is in progress {holder}: send it when it has ended"
        assert send("runs") == (1, [wanted])
        assert (server.runs, list(Path("runs").rglob("*.synced"))) == ({}, [])

        held._end.set()  # as if its host had died
        held._thread.join()
        code, lines = send("runs")
    assert (code, lines[1:]) == (0, ["runs/a: 1 log sent, 2 rows"])
    assert f"its holder {holder} gave no sign of life" in lines[0]
    assert not Path("runs/a/lease.json").exists()


@pytest.mark.slow
def test_a_run_that_was_killed_here_is_sent_at_once(
    server: WandbServer, send: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user would wait for the lease timeout before the log of a killed run is sent."""
    log_offline(Path("runs/a"), range(2), monkeypatch)
    left = lease.Lease(Path("runs/a"))
    Path("runs/a/lease.json").write_bytes(left._text())
    assert send("runs") == (0, ["runs/a: 1 log sent, 2 rows"])
    assert not Path("runs/a/lease.json").exists()


def test_without_a_key_or_a_server_nothing_is_sent(
    server: WandbServer, send: Sync, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A user without a key would get a traceback, or see the server's password printed."""
    log = log_offline(Path("runs/a"), range(2), monkeypatch)
    host = "W&B at 127.0.0.1"
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_API_KEY", "0" * 40)
        refused = f"{host} refuses the key: see WANDB_API_KEY, or call wandb login --relogin"
        assert send() == (2, [f"error: {refused}"])
        patch.delenv("WANDB_API_KEY")
        wanted = f"error: no key for {host}: set WANDB_API_KEY, or call wandb login"
        process = subprocess.run(
            [sys.executable, "-m", "distcv.sync"], capture_output=True, text=True
        )
        assert (process.returncode, process.stderr.splitlines()) == (2, [wanted])
    server.fail(1)
    assert send() == (2, [f"error: {host} answers 500: try again later, or see WANDB_BASE_URL"])
    server.refuse()
    code, [line] = send()
    assert code == 2 and line.startswith(f"error: {host} is out of reach")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://user:s3cret@127.0.0.1:{server.server_port}")
    code, [line] = send()
    assert code == 2 and "s3cret" not in line
    assert not log.with_suffix(".wandb.synced").exists()
    assert send("elsewhere")[0] == 2


@pytest.mark.slow
def test_the_server_may_hang_in_the_middle(
    server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A W&B server that stops answering would make the sync wait forever."""
    monkeypatch.setattr(sync, "ANSWER_SECONDS", 2.0)
    log = log_offline(Path("runs/a"), range(2), monkeypatch)
    answer = server.answer

    def hang(request: Any) -> tuple[int, Any]:
        if "/file_stream" in request.path:
            server.hang()
        return answer(request)

    monkeypatch.setattr(server, "answer", hang)
    with pytest.raises(InputError, match="out of reach"):
        sync.send_run(Path("runs/a"), incomplete=False)
    assert list(log.parent.glob("*.wandb*")) == [log]


def test_a_log_is_read_and_written_as_the_client_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a long or cut log would not reach W&B, or damage in it would go unnoticed."""
    path = log_offline(tmp_path / "a", range(2000), monkeypatch)
    records = list(read_records(path))
    assert path.stat().st_size > 3 * 32768
    assert [one.history.step.num for one in records if one.HasField("history")] == [*range(2000)]
    again = tmp_path / "again.wandb"
    write_records(again, records)
    assert list(read_records(again)) == records
    again.write_bytes(path.read_bytes()[:-3])  # as a kill leaves it
    assert list(read_records(again)) == records[:-1]
    again.write_bytes(path.read_bytes().replace(b"train/loss", b"train/lass", 1))
    with pytest.raises(ValueError, match="damaged at byte"):
        list(read_records(again))
