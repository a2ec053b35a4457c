"""A W&B workspace for the runs of a project, as code: ``python -m distcv.dashboard --project P``.

It is a saved view of the project with a name of its own, so that a second call updates the first
one's. Charts are described by wandb-workspaces (0.4.13).
"""

import contextlib
import importlib
import io
import json
import math
import os
from typing import Annotated, Any

import tyro
from pydantic import Field

from distcv.command import run_command
from distcv.command_line import parse_arguments
from distcv.config import InputError, Strict
from distcv.wandb_api import ask_user, ask_wandb

TITLE = "distcv"
NAME = "nw-distcv-v"  # by which W&B knows the view: nw-ID-v, with ID in its address
COLUMNS = 3  # of charts; a section shows all its rows at once
VIEWS_QUERY = """
query View($entityName: String, $name: String, $viewType: String, $viewName: String) {
  project(name: $name, entityName: $entityName) {
    allViews(viewType: $viewType, viewName: $viewName) { edges { node { id } } }
  }
}"""
NODE_METRICS = {
    "cpu_percent": "Processor of each node (%)",
    "memory_percent": "Memory of each node (%)",
    "gpu_percent": "GPUs of each node (%)",
    "gpu_memory_percent": "GPU memory of each node (%)",
}


class Arguments(Strict):
    """Which project's workspace to write."""

    project: str = Field("distcv", description="Project name in W&B.")
    entity: str | None = Field(
        None, description="User or team that has the project; default: the key's own."
    )
    print_only: Annotated[bool, tyro.conf.arg(name="print")] = Field(
        False, description="Print the workspace's JSON and end; needs neither key nor network."
    )


def main() -> None:
    """Print the workspace, or save it in the place of the one that was saved before."""
    arguments = parse_arguments(
        Arguments,
        prog="distcv.dashboard",
        description="Create or update the saved workspace `distcv` of a W&B project.",
    )
    if arguments.print_only:
        print(json.dumps(specification(make_workspace("", arguments.project)), indent=1))
    else:
        save(arguments.project, arguments.entity or os.environ.get("WANDB_ENTITY"))


def save(project: str, entity: str | None) -> None:
    """Create the workspace, or update it, and say where it is.

    Raises:
        InputError: no key or project, or the server is out of reach or refuses.
    """
    user = ask_user()
    entity = entity or user
    place = {"entityName": entity, "name": project, "viewType": "project-view", "viewName": NAME}
    found = ask_wandb(VIEWS_QUERY, **place)["project"]
    if found is None:
        raise InputError(f"W&B has no project {entity}/{project}: train with --track wandb first")
    ids = [edge["node"]["id"] for edge in found["allViews"]["edges"]]
    workspace = make_workspace(entity, project)
    # The library makes up a new name for each workspace that is not read from the server.
    workspace._internal_name, workspace._internal_id = NAME, ids[0] if ids else ""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            workspace.save()
    except Exception as error:  # of the library's several transports
        said = " ".join(str(error).split())[:200]
        raise InputError(f"W&B does not save the workspace of {entity}/{project}: {said}") from None
    print(f"{'updated' if ids else 'created'} {workspace.url}")


def specification(workspace: Any) -> dict[str, Any]:
    """A workspace as W&B's server keeps it."""
    text = workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)
    return dict(json.loads(text))


def make_workspace(entity: str, project: str) -> Any:
    """The workspace: sections of quality, speed, comparison, and of means over seeds.

    Raises:
        InputError: wandb-workspaces is not installed.
    """
    try:
        workspaces = importlib.import_module("wandb_workspaces.workspaces")
        panels = importlib.import_module("wandb_workspaces.reports.v2")
    except ModuleNotFoundError as error:
        raise InputError(f"no module {error.name}: pip install 'distcv[dashboard]'") from None
    sections = {
        "Quality": _quality(panels),
        "Speed": _speed(panels),
        "Comparison": _comparison(panels),
        "Seeds": _seeds(panels),
    }
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=TITLE,
        sections=[
            workspaces.Section(
                name=name,
                panels=shown,
                is_open=True,
                layout_settings=workspaces.SectionLayoutSettings(
                    columns=COLUMNS, rows=math.ceil(len(shown) / COLUMNS)
                ),
            )
            for name, shown in sections.items()
        ],
        settings=workspaces.WorkspaceSettings(max_runs=20),
        runset_settings=workspaces.RunsetSettings(
            pinned_columns=["summary:val/accuracy", "summary:val/best_accuracy"]
        ),
    )


def _quality(panels: Any) -> list[Any]:
    def by_epoch(metric: str, title: str, unit: str) -> Any:
        return panels.LinePlot(title=title, x="epoch", y=[metric], title_x="epoch", title_y=unit)

    return [
        by_epoch("val/accuracy", "Test accuracy", "%"),
        by_epoch("val/best_accuracy", "Best test accuracy so far", "%"),
        by_epoch("val/loss", "Test loss", "cross entropy"),
        panels.LinePlot(title="Training accuracy", y=["train/accuracy"], title_y="%"),
        panels.LinePlot(title="Training loss", y=["train/loss"], title_y="cross entropy"),
        panels.MediaBrowser(title="Samples, raw and augmented", media_keys=["samples"]),
    ]


def _speed(panels: Any) -> list[Any]:
    plots = {
        "train/images_per_second": ("Throughput", "images/s"),
        "train/mfu": ("Model FLOPs utilization", "%"),
        "train/memory_mib": ("Memory of the first process", "MiB"),
        "train/grad_norm": ("Norm of the gradient", "L2"),
        "train/lr": ("Learning rate", "lr"),
    }
    return [
        panels.LinePlot(title=title, y=[metric], title_y=unit)
        for metric, (title, unit) in plots.items()
    ] + [
        panels.LinePlot(title=title, metric_regex=f"nodes/[0-9]+/{key}", title_y="%")
        for key, title in NODE_METRICS.items()
    ]


def _comparison(panels: Any) -> list[Any]:
    column = panels.ParallelCoordinatesPlotColumn
    return [
        panels.BarPlot(title="Test accuracy at the end (%)", metrics=["val/accuracy"]),
        panels.ParallelCoordinatesPlot(
            title="Hyperparameters and the best test accuracy",
            columns=[
                column(panels.Config("lr"), display_name="lr", log=True),
                column(panels.Config("batch_size"), display_name="batch size"),
                column(panels.Config("epochs"), display_name="epochs"),
                column(panels.SummaryMetric("val/best_accuracy"), display_name="best accuracy"),
            ],
        ),
        panels.RunComparer(diff_only="split"),
        panels.CustomChart(  # as wandb.plot.confusion_matrix describes it
            query={"summaryTable": {"tableKey": "confusion_matrix_table"}},
            chart_name="wandb/confusion_matrix/v1",
            chart_fields={key: key for key in ("Actual", "Predicted", "nPredictions")},
            chart_strings={"title": "Confusion matrix"},
        ),
        panels.WeavePanelSummaryTable(table_name="class_accuracy"),
        panels.WeavePanelSummaryTable(table_name="mistakes"),
    ]


def _seeds(panels: Any) -> list[Any]:
    """Mean and standard deviation over the runs of a group, which differ in their seeds only."""
    over_seeds = {"groupby": "Group", "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
    return [
        panels.LinePlot(
            title="Test accuracy: mean and standard deviation over seeds",
            x="epoch",
            y=["val/accuracy"],
            title_y="%",
            **over_seeds,
        ),
        panels.LinePlot(
            title="Training loss: mean and standard deviation over seeds",
            y=["train/loss"],
            title_y="cross entropy",
            **over_seeds,
        ),
        panels.BarPlot(
            title="Test accuracy at the end: mean and standard deviation over seeds",
            metrics=["val/accuracy"],
            **over_seeds,
        ),
    ]


def command() -> None:
    """Entry point: :func:`main`, and its exit code."""
    run_command(main)


if __name__ == "__main__":
    command()
