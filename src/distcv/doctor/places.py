"""Checks of what lies outside of the processes: the folder of runs, the data, W&B."""

import contextlib
import http.client
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError

import filelock

from distcv.data import find_dataset
from distcv.data.cache import check_cached
from distcv.doctor import Arguments, Line, one_line
from distcv.environment import wandb_key, wandb_server
from distcv.runtime.probe import World, within
from distcv.wandb_api import USER_QUERY, send_query

LEAST_FREE_GB = 1.0
SEEN_WITHIN_S = 5.0  # by another node, once a file was written
ANSWERS_WITHIN_S = 5.0  # W&B's server


def runs_folder(world: World, arguments: Arguments) -> Iterator[Line]:
    """Rank 0 writes a file and holds a lock in there; all look at them, itself too."""
    folder = arguments.runs_dir
    if world.rank:
        if name := world.hear_main("probe"):
            problems = list(_problems(folder / name))
            world.say("looked", not problems)
            yield from problems
        return
    try:
        with _probe(folder) as probe:
            world.say("probe", probe.name)
            problems = list(_problems(probe))
            world.say("looked", not problems)
            looked = world.hear_all("looked")
            yield from problems
            free = shutil.disk_usage(folder).free / 1e9
            if free < LEAST_FREE_GB:
                yield Line("wrong", f"{folder}: {free:.2f} GB free: make room, or --runs-dir")
            shared = ", shared and locked" if all(looked.values()) else ""
            yield Line("ok", f"{folder.resolve()}: writable{shared}, {free:,.0f} GB free")
    except OSError as error:
        yield Line("wrong", f"{folder}: {error.strerror or one_line(error)}: choose --runs-dir")
    finally:
        world.say("probe", "")


@contextlib.contextmanager
def _probe(folder: Path) -> Iterator[Path]:
    """A folder in `folder` with a file that holds its own name, and a lock that is held if it can
    be: if not, `_problems` says so.
    """
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".doctor-", dir=folder, ignore_cleanup_errors=True
        ) as name:
            probe = Path(name)
            (probe / "file").write_text(probe.name)
            with contextlib.ExitStack() as held:
                with contextlib.suppress(OSError, NotImplementedError):
                    held.enter_context(_lock(probe))
                yield probe
    finally:
        with contextlib.suppress(OSError):  # another run may have come
            for path in absent:
                path.rmdir()


def _lock(probe: Path) -> filelock.FileLock:
    """As a run's: not a file in its place, which filelock makes where there are no locks."""
    return filelock.FileLock(probe / "lock", fallback_to_soft=False)


def _problems(probe: Path) -> Iterator[Line]:
    """What this process doesn't see as it should."""
    deadline, text = time.monotonic() + SEEN_WITHIN_S, ""
    while text != probe.name and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            text = (probe / "file").read_text()
        time.sleep(0.05)
    if text != probe.name:
        yield Line(
            "wrong",
            f"{probe.parent.resolve()} isn't shared: a file of rank 0 isn't seen here within "
            f"{SEEN_WITHIN_S:g} s: choose a --runs-dir that all nodes share",
        )
        return
    try:
        with _lock(probe).acquire(timeout=0):
            yield Line(
                "wrong",
                f"{probe.parent.resolve()}: a lock that rank 0 holds was given here too, so two "
                "runs could write to one folder: mount it with locking, or choose --runs-dir",
            )
    except filelock.Timeout:
        pass
    except (OSError, NotImplementedError) as error:
        yield Line(
            "wrong",
            f"{probe.parent.resolve()} has no locks ({one_line(error)}): mount it with locking, or "
            "choose --runs-dir",
        )


def data(world: World, arguments: Arguments) -> Iterator[Line]:
    """The data set in this node's cache, verified."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    yield Line("ok", check_cached(find_dataset(arguments.dataset), arguments.data_dir))


def wandb(world: World, arguments: Arguments) -> Iterator[Line]:
    """Whether runs can be logged online, from rank 0, which alone does."""
    if world.rank:
        return
    base = wandb_server()
    mode = os.environ.get("WANDB_MODE", "online")
    key = wandb_key()
    if mode != "online":
        yield Line("ok", f"WANDB_MODE is {mode}: nothing is sent to {base}")
        return
    try:
        answer = within(ANSWERS_WITHIN_S, _viewer)
    except HTTPError as error:
        yield Line("warn", f"{base}: {error}: runs are logged offline")
        return
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or one_line(error)
        status: Literal["ok", "warn"] = "warn" if key else "ok"
        yield Line(status, f"{base} is out of reach ({reason}): runs are logged offline")
        return
    viewer = (answer.get("data") or {}).get("viewer")
    if key is None:
        yield Line("ok", f"{base} answers, no key is set: runs are logged offline (wandb login)")
    elif viewer:
        yield Line("ok", f"{base} accepts the key of {viewer.get('entity')}")
    else:
        yield Line("wrong", f"{base} refuses the key: wandb login --relogin, or WANDB_API_KEY")


def _viewer() -> dict[str, Any]:
    """The server's answer to who this is, as wandb asks it; empty if it doesn't want to know.

    Raises whatever a request raises.
    """
    try:
        return send_query(USER_QUERY, seconds=ANSWERS_WITHIN_S)
    except HTTPError as error:
        if error.code in (400, 401, 403):
            return {}
        raise
