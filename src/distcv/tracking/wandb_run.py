"""A training as one run of W&B: its start, what it goes on with, what it shows at the end."""

import contextlib
import os
import re
import sys
import time
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np

from distcv.config import InputError, Recipe
from distcv.environment import git_remote, wandb_key, wandb_server
from distcv.run_folder import RunFolder
from distcv.wandb_api import USER_QUERY, KeyRefused, ask_user, send_query
from distcv.wandb_log import read_records

# A server that answers may take its time for a model, one that doesn't costs these together.
ANSWER_SECONDS, PROBE_SECONDS, FINISH_SECONDS = 5, 4, 15
UPLOAD_SECONDS = 240  # the other processes wait, and would take ten minutes for a failure


def settings(
    folder: RunFolder, recipe: Recipe, config: dict[str, Any], group: str
) -> dict[str, Any]:
    """Arguments of ``wandb.init``: online if a key is set, else offline, and never a question."""
    import wandb

    root = str(folder.path.resolve())
    if "WANDB_BASE_URL" in os.environ:  # W&B would print a password in it
        os.environ["WANDB_BASE_URL"] = wandb_server()
    os.environ.setdefault("WANDB_DATA_DIR", root)  # artifacts wait for their sync in the run folder
    mode = os.environ.get("WANDB_MODE") or ("online" if wandb_key() else "offline")
    return {
        "id": folder.tracker_id,
        "name": folder.path.name,
        "resume": "allow",
        "reinit": "create_new",
        "dir": root,
        "config": config,
        "group": group,
        "job_type": "train",
        "tags": [recipe.model, recipe.dataset],
        "mode": mode,
        "settings": wandb.Settings(
            init_timeout=15,
            finish_timeout=FINISH_SECONDS,
            x_transaction_log_flush_interval=1,
            git_remote_url=git_remote(),  # W&B would send a token that stands for the user's name
        ),
    }


def first_missing_step(run: Any, folder: RunFolder) -> int:
    """The first step whose rows W&B lacks: by its server, or offline by the logs on disk.

    A process that is killed takes along what it had not sent (15 s of rows) or written (1 s). And
    no row may be in two logs: ``wandb sync`` would give it another step in the second (0.31).
    """
    logs = folder.path.glob(f"wandb/*run-*-{run.id}/*.wandb")
    if not run.offline:
        for log in logs:
            if log.parent.name.startswith("offline-"):  # not to be synced over what is sent now
                log.with_suffix(".wandb.synced").touch()
        # A picture leaves some time after its row: a process that was killed took it along.
        for files in folder.path.glob(f"wandb/run-*-{run.id}/files"):
            if files != Path(run.dir):
                for file in files.glob("media/**/*.*"):
                    run.save(str(file), base_path=str(files), policy="now")
        return int(run.starting_step)
    for log in sorted(logs, key=os.path.getmtime, reverse=True):
        with contextlib.suppress(ValueError):  # it has no head yet
            steps = [r.history.step.num for r in read_records(log) if r.HasField("history")]
            if steps:
                return int(steps[-1]) + 1
    return 0


def refusal() -> KeyRefused | None:
    """The server's refusal of the key, or None: it takes it, or doesn't answer."""
    try:
        ask_user(PROBE_SECONDS)
    except KeyRefused as refused:
        return refused
    except InputError:
        pass
    return None


def forget_service() -> None:
    """Let go of W&B's process, which may be dead, or still hold the run's id."""
    if "wandb" in sys.modules:
        with contextlib.suppress(Exception):
            sys.modules["wandb"].teardown()


def image(pixels: Any) -> Any:
    """A picture for W&B from uint8 (C, H, W)."""
    import wandb

    return wandb.Image(np.moveaxis(np.asarray(pixels), 0, -1).squeeze())


def findings(result: dict[str, Any], pictures: Any) -> dict[str, Any]:
    """Charts and tables of a finished run's result.

    Args:
        result: the contents of result.json.
        pictures: the test images of its mistakes, uint8 (N, C, H, W).
    """
    import wandb

    names = list(result["class_accuracy"])
    counts = np.asarray(result["confusion"])
    labels, predictions = (np.repeat(axis, counts.ravel()) for axis in np.indices(counts.shape))
    rows = [
        [image(picture), names[one["label"]], names[one["predicted"]], one["confidence"]]
        for picture, one in zip(pictures, result["mistakes"], strict=True)
    ]
    return {
        "confusion_matrix": wandb.plot.confusion_matrix(
            y_true=labels.tolist(), preds=predictions.tolist(), class_names=names
        ),
        "class_accuracy": wandb.Table(
            ["class", "accuracy"], [list(pair) for pair in result["class_accuracy"].items()]
        ),
        "mistakes": wandb.Table(["image", "label", "predicted", "confidence"], rows),
    }


def log_models(
    run: Any, folder: RunFolder, last: Path, best: Path, figures: dict[str, Any]
) -> None:
    """Send the checkpoints as versions of a model artifact: `best`, then `latest`.

    Waits for the server to have them, as long as it answers.
    """
    import wandb

    name = "model-" + re.sub(r"[^\w.-]", "_", folder.path.name)
    logged = []
    for path in dict.fromkeys([best, last]):
        artifact = wandb.Artifact(name, type="model", metadata=figures)
        for file in [*sorted(path.iterdir()), folder.path / "config.yaml"]:
            # Not copied: a checkpoint of a finished run is neither changed nor removed.
            artifact.add_file(str(file.resolve()), skip_cache=True, policy="immutable")
        aliases = ["best"] * (path == best) + ["latest"] * (path == last)
        logged.append(run.log_artifact(artifact, aliases=aliases))
    deadline = time.monotonic() + UPLOAD_SECONDS
    for artifact in [] if run.offline else logged:
        if not _taken(artifact, deadline):
            return


def _taken(artifact: Any, deadline: float) -> bool:
    """Wait until the server has an artifact, for as long as it answers at all."""
    from wandb.sdk.artifacts.exceptions import WaitTimeoutError

    while time.monotonic() < deadline:
        try:
            artifact.wait(timeout=ANSWER_SECONDS)
            return True
        except WaitTimeoutError:
            if not answers():
                return False
    return False


def answers() -> bool:
    """Whether W&B's server answers at all, and not that it is out of order."""
    try:
        send_query(USER_QUERY, seconds=PROBE_SECONDS)
    except HTTPError as error:
        return error.code < 500
    except (OSError, HTTPException, ValueError, TypeError):
        return False
    return True
