"""Sending to W&B what it lacks of runs, offline ones above all: ``python -m distcv.sync runs``.

Each row is sent once, the logs of a run in the order of its starts. ``wandb sync`` (0.31) ends with
exit code 0, and takes a log for sent, where rows or files of artifacts were not: what W&B has is
asked of its server, before and after.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tyro
from pydantic import Field

from distcv.command import run_command
from distcv.command_line import parse_arguments
from distcv.config import InputError, Strict
from distcv.lease import InUse, Lease
from distcv.wandb_api import ANSWER_SECONDS, ask_user, ask_wandb
from distcv.wandb_log import Log, read_records, write_records

LOGS = "wandb/*run-*/run-*.wandb"  # of offline and online starts
ARRIVAL_SECONDS = 20.0  # for a server to show what it was sent
# By default, it would try for hours to send to a server that does not take it.
PATIENCE = {
    f"WANDB__{part}_{limit}": "4"
    for part in ("GRAPHQL", "FILE_STREAM", "FILE_TRANSFER")
    for limit in ("RETRY_MAX", "RETRY_WAIT_MAX_SECONDS")
}
RUN_QUERY = """
query RunResumeStatus($project: String, $entity: String, $name: String!) {
  model(name: $project, entityName: $entity) {
    bucket(name: $name, missingOk: true) { historyTail }
  }
}"""
ID_QUERY = """
query ClientIDMapping($clientID: ID!) { clientIDMapping(clientID: $clientID) { serverID } }"""
ARTIFACT_QUERY = "query ArtifactByID($id: ID!) { artifact(id: $id) { state } }"


class Arguments(Strict):
    """What to send."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = Field(
        (Path("runs"),), description="Run folders, or folders that hold them."
    )
    incomplete: bool = Field(
        False, description="Send rows even if files of their artifacts are gone."
    )


def main() -> int:
    """Send what was not sent, and say so for each run; 1 if something could not be sent."""
    arguments = parse_arguments(
        Arguments,
        prog="distcv.sync",
        description="Send to W&B what it lacks of runs, with their artifacts: those that were "
        "logged offline, and those whose server was out of reach.",
    )
    folders = [folder for folder in run_folders(arguments.runs) if _unsent(folder)]
    if not folders:
        print("nothing to send")
        return 0
    ask_user()
    failed = 0
    for folder in folders:
        try:
            print(f"{folder}: {send_run(folder, incomplete=arguments.incomplete)}", flush=True)
        except Unsent as error:
            failed += 1
            print(f"{folder}: {error}", flush=True)
    return 1 if failed else 0


class Unsent(Exception):
    """Why a run could not be sent, or not wholly."""


def run_folders(places: tuple[Path, ...]) -> list[Path]:
    """The folders in which W&B's client has logged: these, or down to the second level in them.

    Raises:
        InputError: there is no such folder.
    """
    found = set()
    for place in places:
        if not place.is_dir():
            raise InputError(f"no folder {place}: give run folders, or a folder that holds some")
        for inside in ("", "*/", "*/*/"):
            found |= {log.parents[2] for log in place.glob(inside + LOGS)}
    return sorted(found)


def _unsent(folder: Path) -> list[Path]:
    return [log for log in folder.glob(LOGS) if not log.with_suffix(".wandb.synced").exists()]


def send_run(folder: Path, *, incomplete: bool) -> str:
    """Send what W&B lacks of a run's logs; what was sent, in words.

    Raises:
        Unsent: the run is in progress, or something could not be sent.
        InputError: the server is out of reach.
    """
    lease = Lease(folder)
    try:
        lease.take(0, functools.partial(print, flush=True))
        logs = [read_log(path) for path in folder.glob(LOGS)]
        logs = [log for log in logs if log.run]  # else ended before it had logged anything
        logs.sort(key=lambda log: log.run.start_time.ToNanoseconds())
        return _send(folder, logs, incomplete)
    except InUse as holder:
        raise Unsent(f"is in progress{holder}: send it when it has ended") from None
    except OSError as error:
        raise Unsent(f"can't be sent: {error}") from None
    finally:
        lease.release()


def read_log(path: Path) -> Log:
    """Read a log.

    Raises:
        Unsent: it is damaged.
    """
    try:
        return Log(path, list(read_records(path)))
    except ValueError as error:
        raise Unsent(f"can't be sent: {error}") from None


def _send(folder: Path, logs: list[Log], incomplete: bool) -> str:
    """Send those of a run's logs, the oldest first, that were not sent."""
    logs_sent, rows, files_gone = 0, 0, 0
    ids: dict[tuple[str, str], list[str]] = {}  # W&B keeps the same content under a name once
    for one in (one for log in logs for one in log.artifacts):
        ids.setdefault((one.name, one.digest), []).append(one.client_id)
    for log in logs:
        if log.synced.exists():
            continue
        lacking = {
            key: one
            for one in log.artifacts
            if not any(map(committed, ids[key := (one.name, one.digest)]))
        }
        gone = [path for one in lacking.values() for path in files_of(one) if not path.exists()]
        if gone and not incomplete:
            raise Unsent(
                f"artifact files are gone ({len(gone)}, as {gone[0]}): put them back, or send the "
                f"rows alone by --incomplete ({_words(logs_sent, rows)})"
            )
        whole = {k: one for k, one in lacking.items() if all(map(Path.exists, files_of(one)))}
        sent = send_log(folder, log, whole)
        log.synced.touch()
        logs_sent, rows, files_gone = logs_sent + (sent > 0), rows + sent, files_gone + len(gone)
    without = f", without artifact files that are gone ({files_gone})" if files_gone else ""
    return _words(logs_sent, rows) + without


def _words(logs: int, rows: int) -> str:
    if not logs:
        return "W&B has it all"
    return f"{logs} {'log' if logs == 1 else 'logs'} sent, {rows} rows"


def files_of(artifact: Any) -> list[Path]:
    """Paths of an artifact's files, as its log has them."""
    paths = [artifact.manifest.manifest_file_path]
    paths += [entry.local_path for entry in artifact.manifest.contents]
    return [Path(path) for path in paths if path]


def send_log(folder: Path, log: Log, lacking: dict[tuple[str, str], Any]) -> int:
    """Send of one log what W&B lacks, see that it is there, and count the rows.

    Raises:
        Unsent: something is not there.
        InputError: the server is out of reach.
    """
    reached = last_step(log.run)
    rows = [step for step in log.steps if step > reached]
    if not rows and not lacking:
        return 0
    # `wandb sync` would send all rows again, as further ones, and stop at a record that a kill cut.
    rest = log.path.with_name("rest.wandb")
    write_records(rest, remaining(log.records, reached, lacking))
    try:
        _wandb_sync(folder, rest)
    finally:
        for path in rest.parent.glob("rest.wandb*"):  # with the marks of `wandb sync`
            path.unlink()
    if rows and not _until(lambda: last_step(log.run) >= rows[-1]):
        raise Unsent(f"W&B did not take all rows of {log.path}: try again later")
    for one in lacking.values():
        if not _until(functools.partial(committed, one.client_id)):
            raise Unsent(f"W&B has the rows of {log.path}, but not artifact {one.name}")
    return len(rows)


def _wandb_sync(folder: Path, log: Path) -> None:
    """Send a log by ``wandb sync``, for as long as the server answers."""
    # In the run folder, for it leaves notes there, and artifacts of offline runs wait there.
    own = {"WANDB_MODE": "online", "WANDB_DATA_DIR": str(folder.resolve())}
    process = subprocess.Popen(
        [sys.executable, "-m", "wandb", "sync", "--include-online", str(log.resolve())],
        cwd=folder,
        env=os.environ | PATIENCE | own,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ANSWER_SECONDS)
                return
            ask_user()
    finally:
        process.terminate()
        process.wait()


def remaining(
    records: list[Any], reached: int, lacking: dict[tuple[str, str], Any]
) -> Iterator[Any]:
    """The records of a log without its rows to this step, and of its artifacts only these.

    Nor alerts and output from the time of those rows, which W&B should have.
    """
    past = any(one.HasField("history") and one.history.step.num <= reached for one in records)
    for record in records:
        kind = record.WhichOneof("record_type")
        if kind == "history":
            past = past and record.history.step.num <= reached
            if record.history.step.num <= reached:
                continue
        if kind in ("alert", "output", "output_raw", "stats") and past:
            continue
        if kind == "run":
            record.run.resume = True  # else its rows would take the place of those at W&B
        if kind == "artifact" and (record.artifact.name, record.artifact.digest) not in lacking:
            continue
        yield record


def _until(met: Callable[[], bool]) -> bool:
    """Wait for a condition, as long as a server may take to show what it was sent."""
    deadline = time.monotonic() + ARRIVAL_SECONDS
    while not met():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def last_step(run: Any) -> int:
    """The step of the last row that W&B has of a run, or -1."""
    place = {"project": run.project or None, "entity": run.entity or None}
    bucket = (ask_wandb(RUN_QUERY, name=run.run_id, **place).get("model") or {}).get("bucket")
    tail = json.loads((bucket or {}).get("historyTail") or "[]")
    return int(json.loads(tail[-1])["_step"]) if tail else -1


def committed(client_id: str) -> bool:
    """Whether W&B has all files of the artifact to which its client gave this id."""
    found = ask_wandb(ID_QUERY, clientID=client_id)["clientIDMapping"]
    if not found or not found["serverID"]:
        return False
    state = ask_wandb(ARTIFACT_QUERY, id=found["serverID"])["artifact"]
    return bool(state and state["state"] == "COMMITTED")


def command() -> None:
    """Entry point: :func:`main`, and its exit code."""
    run_command(main)


if __name__ == "__main__":
    command()
