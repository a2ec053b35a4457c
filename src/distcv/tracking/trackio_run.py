"""A training as a run of trackio: rows in one SQLite file for all runs of a folder."""

import contextlib
import io
import os
from typing import Any

from distcv.run_folder import RunFolder


def settings(folder: RunFolder, config: dict[str, Any], group: str, *, new: bool) -> dict[str, Any]:
    """Arguments of ``trackio.init``; to be called before trackio is imported.

    It keeps nothing in the home folder, and asks nothing of the network unless the user has named
    a Space or a server for it.
    """
    place = folder.path.parent / ".trackio"  # hidden: no run folder
    os.environ.setdefault("TRACKIO_DIR", str(place.resolve()))
    # On a network file system it would go on under another id (trackio 0.43), or lock in vain.
    os.environ.setdefault("TRACKIO_STORAGE_MODE", "sqlite")
    os.environ.setdefault("TRACKIO_SQLITE_JOURNAL_MODE", "delete")
    if not {"TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"} & os.environ.keys():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return {
        "name": folder.path.name,
        "group": group,
        "config": config,
        "resume": "never" if new else "allow",  # a run of that name may have been deleted
        "embed": False,
        "auto_log_cpu": False,
        "auto_log_gpu": False,
    }


def first_missing_step(project: str, folder: RunFolder) -> int:
    """The first step whose row it lacks: what is logged twice is there twice."""
    from trackio.sqlite_storage import SQLiteStorage

    last = SQLiteStorage.get_max_step_for_run(project, folder.path.name)
    return 0 if last is None else int(last) + 1


def finish() -> None:
    """Write what is left; Accelerate's own way would do it a second time at exit."""
    import trackio

    trackio.finish()  # type: ignore[no-untyped-call]


def quiet() -> contextlib.AbstractContextManager[Any]:
    """Keep what it prints at start and end, several lines, to itself."""
    return contextlib.redirect_stdout(io.StringIO())
