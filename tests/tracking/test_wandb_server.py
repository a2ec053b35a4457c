"""The tests' own W&B server, asked by the real client."""

import io
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from PIL import Image

from support.wandb_runs import be_client
from support.wandb_server import WandbServer
from support.wandb_store import ENTITY, Run

PICTURE = np.arange(784, dtype=np.uint8).reshape(28, 28)
QUICK = {
    "x_file_stream_transmit_interval": 1,
    "x_file_stream_retry_wait_min_seconds": 1,
    "x_disable_stats": True,
    "console": "off",
}


@pytest.fixture
def server(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[WandbServer]:
    """A server which this process's client is a client of."""
    own = {"HOME": str(tmp_path), "WANDB_DATA_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    be_client(server, monkeypatch, **own)
    wandb.teardown()  # it keeps the environment of its first use
    yield server
    wandb.teardown()


def start(folder: Path, **settings: Any) -> wandb.Run:
    """Begin a run, of which the only process of this test is the client."""
    quick = wandb.Settings(**QUICK, **settings)
    return wandb.init(project="p", id="r", dir=str(folder), settings=quick)


def log_model(run: wandb.Run, folder: Path, weights: str, aliases: list[str]) -> None:
    files = {"weights": weights, "config.yaml": "model: gap\n"}
    folder.mkdir(exist_ok=True)
    model = wandb.Artifact("model-r", type="model", metadata={"weights": weights})
    for name, text in files.items():
        (folder / name).write_text(text)
        model.add_file(str(folder / name))
    logged = run.log_artifact(model, aliases=aliases)
    if not run.offline:
        logged.wait()


def decoded(png: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_media_tables_artifacts_and_alerts_are_kept(
    mode: str, server: WandbServer, tmp_path: Path
) -> None:
    """The tests would miss lost pictures, tables, models or alerts in a user's W&B project."""
    run = start(tmp_path, mode=mode)
    run.log({"loss": 1.5, "samples": wandb.Image(PICTURE)}, step=1)
    rows = [[wandb.Image(PICTURE), 3], [wandb.Image(255 - PICTURE), 4]]
    run.log({"mistakes": wandb.Table(["image", "label"], rows)}, step=2)
    run.alert("stalled", "no step for 60 s", level="WARN")
    for weights, aliases in (("1", ["best"]), ("2", []), ("1", ["again"]), ("3", ["best"])):
        log_model(run, tmp_path / "model", weights, aliases)
    run.finish()
    if mode == "offline":
        assert server.requests == []
        command = [sys.executable, "-m", "wandb", "sync", str(Path(run.dir).parent)]
        subprocess.run(command, check=True, capture_output=True)

    kept = server.run("r")
    assert kept.state == "finished" and [row["_step"] for row in kept.history] == [1, 2]
    assert kept.alerts == [("stalled", "no step for 60 s", "WARN")]
    assert {"wandb-metadata.json", "config.yaml", "wandb-summary.json"} <= kept.files.keys()
    samples = kept.history[0]["samples"]
    assert (decoded(kept.files[samples["path"]]) == PICTURE).all()
    assert kept.history[1]["mistakes"]["path"] in kept.files
    [table] = [artifact for artifact in server.artifacts if artifact.type == "run_table"]
    assert [row["label"] for row in table.table()] == [3, 4]
    assert (decoded(table.table()[1]["image"]) == 255 - PICTURE).all()

    versions = [artifact for artifact in server.artifacts if artifact.name == "model-r"]
    assert [artifact.type for artifact in versions] == 3 * ["model"]
    assert [artifact.version for artifact in versions] == [0, 1, 2]
    # The third was the first one again: it kept its version, got an alias, and was the latest one.
    assert [artifact.aliases for artifact in versions] == [["again"], [], ["best", "latest"]]
    assert [artifact.metadata["weights"] for artifact in versions] == ["1", "2", "3"]
    assert versions[2].files == {"weights": b"3", "config.yaml": b"model: gap\n"}
    sent = [request.path for request in server.requests if request.path.endswith("config.yaml")]
    assert len([path for path in sent if "/artifacts/" in path]) == 1, "the same in each version"


def test_a_name_of_artifacts_has_one_type(server: WandbServer, tmp_path: Path) -> None:
    """The tests would accept a model artifact of a type that W&B refuses to users."""
    run = start(tmp_path)
    log_model(run, tmp_path / "model", "1", [])
    with pytest.raises(ValueError, match="already exists with type 'model'"):
        run.log_artifact(wandb.Artifact("model-r", type="data"))
    run.finish()


def wait_until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not met():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.02)


def has(run: Run, step: int) -> Callable[[], bool]:
    return lambda: bool(run.history) and run.history[-1]["_step"] == step


@pytest.mark.slow
def test_what_could_not_be_sent_is_sent_when_the_server_is_well_again(
    server: WandbServer, tmp_path: Path
) -> None:
    """The tests would not notice rows that an outage of W&B loses for good."""
    run = start(tmp_path)
    run.log({"loss": 0.0}, step=0)
    run.log({"loss": 1.0}, step=1)  # a row is sent when the next one comes
    wait_until(lambda: "r" in server.runs and has(server.run("r"), 0)())

    def fail() -> None:
        server.fail(3)

    for step, fault in ((2, fail), (4, server.hang), (6, server.refuse)):
        fault()
        run.log({"loss": float(step)}, step=step)
        run.log({"loss": float(step)}, step=step + 1)
        if fault is fail:
            wait_until(lambda: server.failures == 0)
        else:
            time.sleep(1)
            assert has(server.run("r"), step - 2)(), "nothing comes through"
            server.heal()
        wait_until(has(server.run("r"), step))
    run.finish()
    assert [row["_step"] for row in server.run("r").history] == list(range(8))
    assert server.run("r").state == "finished"


def test_a_view_is_one_however_often_it_is_saved(server: WandbServer) -> None:
    """The tests would not notice a dashboard that adds a new W&B view at each call."""
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    view = workspaces.Workspace(entity=ENTITY, project="p", name="first", sections=[])
    view.save()
    found = workspaces.Workspace.from_url(view.url)
    found.name = "second"
    found.save()
    assert [(view.project, view.display_name) for view in server.views] == [("p", "second")]
    assert server.views[0].type == "project-view" and "section" in server.views[0].spec
