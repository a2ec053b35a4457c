"""Runs commands one after the other, and tells what each has done beside them: for ``hostile``.

Reads a JSON object: ``load``, the modules that are loaded before anything is watched; ``allowed``,
the folders that may be written to; and ``cases``, each of them a name of ``ACTIONS`` or a command,
and its words. Prints a line of JSON for each: exit code, output,
and what was done that should not be: programs started, files outside touched, connections opened.
"""

import faulthandler
import functools
import importlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from faults.commands import Answer, answer, command

SECONDS = 60.0  # for one case, on a machine that is busy with other things
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn")
CHANGES = (
    "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.chown", "os.utime", "shutil.rmtree", "shutil.move", "shutil.copyfile",
)  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """Notes what Python's own audit tells, while it is on."""

    def __init__(self, allowed: list[str]) -> None:
        self.allowed = [os.path.realpath(folder) for folder in (*allowed, "/dev/null")]
        self.on, self.seen = False, list[str]()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in STARTS or event == "socket.connect":
            self.seen.append(f"{event} {args!r:.200}")
        elif event == "open" and isinstance(args[2], int) and args[2] & WRITES:
            self._check(event, args[0])
        elif event in CHANGES:
            for path in args[:2]:
                self._check(event, path)

    def _check(self, event: str, path: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # an open file, or a mode
        # The name itself, not what a link there leads to: that is what is changed.
        named = Path(os.fsdecode(path)).absolute()
        place = named.parent.resolve() / named.name
        if event == "open":
            place = place.resolve()
        if not any(place.is_relative_to(folder) for folder in self.allowed):
            self.seen.append(f"{event} {path!r}")


def read_data(folder: str, changes: dict[str, Any]) -> int:
    """Read a data set as it lies in a folder; 2 if it is refused. Its row has these changes."""
    from distcv.config import InputError
    from distcv.data import DATASETS
    from distcv.data.layouts import read_folder
    from distcv.data.readers import check_arrays

    info = DATASETS[changes.pop("name")]
    if sha256 := changes.pop("sha256", None):
        assert info.npm is not None
        changes["files"] = tuple((name, sha256) for name, _ in info.files)
        changes["npm"] = replace(info.npm, sha256=sha256)
    info = replace(info, **changes | {"sums": tuple(changes["sums"])})
    try:
        check_arrays(info, read_folder(info, Path(folder)))
    except InputError as error:
        raise InputError(" ".join(str(error).split())) from None
    return 0


ACTIONS = {"read_data": read_data}


class Hung(BaseException):
    """No answer in time; an OSError such as TimeoutError would be taken for one of the file's."""


def hung(*_: Any) -> None:
    raise Hung(f"no answer in {SECONDS:.0f} s")


def main() -> None:
    order = json.load(sys.stdin)
    for module in order["load"]:
        importlib.import_module(module)
    watch = Watch(order["allowed"])
    out = os.fdopen(os.dup(1), "w", buffering=1)
    signal.signal(signal.SIGALRM, hung)
    for name, words in order["cases"]:
        watch.seen.clear()
        main = functools.partial(ACTIONS[name], *words) if name in ACTIONS else command(name).main
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        faulthandler.dump_traceback_later(2 * SECONDS, exit=True)  # where no signal gets through
        watch.on = True
        try:
            got = answer(main) if name in ACTIONS else answer(main, *words)
        except Hung as error:
            got = Answer(str(error), "", "", SECONDS)
        watch.on = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        told = got._asdict() | {"did": watch.seen}
        out.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
