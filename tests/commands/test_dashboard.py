"""The W&B workspace that ``python -m distcv.dashboard`` writes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from distcv import dashboard
from distcv.config import load_recipe
from support.wandb_runs import be_client
from support.wandb_server import ENTITY, WandbServer

pytest.importorskip("wandb_workspaces.workspaces")  # which warns of its own old style
Call = Callable[..., tuple[int, str]]
SECTIONS = ["Quality", "Speed", "Comparison", "Seeds"]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``--print`` prints where there is no key, no home folder and no server."""
    home = tmp_path_factory.mktemp("elsewhere") / "home"
    env = {"PATH": os.environ["PATH"], "HOME": str(home)}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "distcv.dashboard", "--project", "p", "--print"]
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stderr) == (0, "")
    assert not home.exists()
    return dict(json.loads(process.stdout))


def panels(spec: dict[str, Any], section: str) -> list[dict[str, Any]]:
    sections = spec["section"]["panelBankConfig"]["sections"]
    [found] = [one for one in sections if one["name"] == section]
    return list(found["panels"])


@pytest.mark.slow
def test_it_has_the_sections_and_their_charts(printed: dict[str, Any]) -> None:
    """Users would miss charts in the W&B workspace, or see curves over the wrong axis."""
    sections = printed["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == SECTIONS
    axes = {
        metric: panel["config"]["xAxis"]
        for section in ("Quality", "Speed")
        for panel in panels(printed, section)
        for metric in panel["config"].get("metrics", [])
    }
    assert axes == {
        "val/accuracy": "epoch",
        "val/best_accuracy": "epoch",
        "val/loss": "epoch",
        "train/accuracy": "_step",
        "train/loss": "_step",
        "train/images_per_second": "_step",
        "train/mfu": "_step",
        "train/memory_mib": "_step",
        "train/grad_norm": "_step",
        "train/lr": "_step",
    }
    kinds = [panel["viewType"] for panel in panels(printed, "Comparison")]
    assert kinds == [
        "Bar Chart", "Parallel Coordinates Plot", "Run Comparer", "Vega2", "Weave", "Weave"
    ]  # fmt: skip
    text = json.dumps(panels(printed, "Comparison"))
    for key in ("confusion_matrix_table", "class_accuracy", "mistakes", "val/accuracy"):
        assert f'"{key}"' in text
    for panel in panels(printed, "Seeds"):
        shown = {key: panel["config"][key] for key in ("groupBy", "groupAgg", "groupArea")}
        assert shown == {"groupBy": "group", "groupAgg": "mean", "groupArea": "stddev"}
    shown = [metric for panel in panels(printed, "Seeds") for metric in panel["config"]["metrics"]]
    assert shown == ["val/accuracy", "train/loss", "val/accuracy"]


def test_what_it_shows_is_logged(printed: dict[str, Any]) -> None:
    """The W&B workspace would show empty charts of metrics that no run logs."""
    from distcv.runtime.nodes import NodeMetrics
    from distcv.tracking import _tracked

    numbers = dict.fromkeys(
        ["step", "epoch", "loss", "accuracy", "lr", "grad_norm", "images_per_second", "mfu",
         "memory_mib", "test_loss", "test_accuracy", "best_test_accuracy"], 1.0,
    )  # fmt: skip
    nodes = [dict.fromkeys(NodeMetrics.KEYS, 1.0)]
    logged = _tracked(numbers | {"event": "train", "nodes": nodes * 12})
    logged |= _tracked(numbers | {"event": "epoch"})

    configs = [p["config"] for section in SECTIONS for p in panels(printed, section)]
    assert {metric for one in configs for metric in one.get("metrics", [])} <= logged.keys()
    for one in configs:
        if "metricRegex" in one:
            matched = [key for key in logged if re.fullmatch(one["metricRegex"], key)]
            assert len(matched) == 12, one["metricRegex"]
    [plot] = [one for one in configs if "columns" in one]
    accessors = [column["accessor"] for column in plot["columns"]]
    fields = load_recipe("gap").model_dump()
    assert all(name.removeprefix("config:").removesuffix(".value") in fields
               for name in accessors[:-1])  # fmt: skip
    assert accessors[-1].removeprefix("summary:") in logged


@pytest.fixture
def server(server: WandbServer, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> WandbServer:
    """A server whose key is known."""
    be_client(server, monkeypatch, HOME=str(tmp_path))
    return server


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the command with these arguments; its exit code, and what it said."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["distcv.dashboard", *arguments])
        with pytest.raises(SystemExit) as left:
            dashboard.command()
        said = capsys.readouterr()
        return int(str(left.value.code)), said.out + said.err

    return run


def test_a_second_call_updates_the_view_of_the_first(
    server: WandbServer, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call would add another workspace to the project instead of updating the first."""
    address = f"{server.url}/{ENTITY}/p?nw=distcv"
    assert call("--project", "p") == (0, f"created {address}\n")
    with monkeypatch.context() as patch:
        patch.setattr(dashboard, "_seeds", lambda panels: [panels.RunComparer()])
        patch.delenv("WANDB_ENTITY")
        assert call("--project", "p") == (0, f"updated {address}\n")
    [view] = server.views
    place = (view.entity, view.project, view.type, view.name, view.display_name)
    assert place == (ENTITY, "p", "project-view", "nw-distcv-v", "distcv")
    assert [panel["viewType"] for panel in panels(view.spec, "Seeds")] == ["Run Comparer"]
    assert call("--project", "p", "--entity", "team")[1].startswith("created ")
    assert call("--project", "q")[1].startswith("created ")
    assert len(server.views) == 3


def test_what_prevents_it_is_said_in_one_line(
    server: WandbServer, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users would see a traceback instead of the key, project or package that is missing."""
    host = "W&B at 127.0.0.1"
    with monkeypatch.context() as patch:
        patch.delenv("WANDB_API_KEY")
        wanted = f"error: no key for {host}: set WANDB_API_KEY, or call wandb login\n"
        assert call() == (2, wanted)
    refused = f"{host} refuses the key: see WANDB_API_KEY, or call wandb login --relogin"
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_API_KEY", "0" * 40)
        assert call() == (2, f"error: {refused}\n")
    with monkeypatch.context() as patch:  # as some servers say it
        patch.delenv("WANDB_ENTITY")
        patch.setitem(server.operations, "Viewer", lambda v: {"viewer": None})
        assert call() == (2, f"error: {refused}\n")
    broken = {"UpsertView2": lambda v: {}["of no use"], "View": lambda v: {"project": None}}
    monkeypatch.setitem(server.operations, "UpsertView2", broken["UpsertView2"])
    code, said = call()
    assert code == 2 and said.startswith("error: W&B does not save the workspace of lab/distcv: ")
    assert said.count("\n") == 1
    server.unknown.clear()
    monkeypatch.setitem(server.operations, "View", broken["View"])
    wanted = "error: W&B has no project lab/distcv: train with --track wandb first\n"
    assert call() == (2, wanted)
    server.refuse()
    code, said = call()
    assert code == 2 and said.startswith(f"error: {host} is out of reach") and said.count("\n") == 1
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    wanted = "error: no module wandb_workspaces.workspaces: pip install 'distcv[dashboard]'\n"
    assert call("--print") == (2, wanted)
