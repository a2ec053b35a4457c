"""A process with torch and distcv loaded, which forks trainings: see ``core.Nursery``.

Reads orders as JSON lines, and answers with lines that tell of births and deaths.
"""

import importlib
import json
import os
import select
import sys
import warnings

from worker import main

# Loaded once for all children; nothing of it starts a thread. The first optimizer of a process asks
# for dynamo, which takes longer than all of a small training.
LOADED = ["distcv.data.synthetic", "distcv.samples", "distcv.tracking", "distcv.train",
          "distcv.training", "torch._dynamo"]  # fmt: skip
for module in LOADED:
    importlib.import_module(module)


def tell(**told: object) -> None:
    print(json.dumps(told), flush=True)


def child(order: dict) -> None:
    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(order["env"])
    code = 70
    try:
        main(order["flags"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    alive: set[int] = set()
    pending, open_ = b"", True
    while open_ or alive:
        if open_ and select.select([0], [], [], 0.005)[0]:
            read = os.read(0, 65536)
            open_ = bool(read)
            *lines, pending = (pending + read).split(b"\n")
            for line in lines:
                order = json.loads(line)
                sys.stdout.flush()
                pid = os.fork()
                if pid == 0:
                    child(order)
                alive.add(pid)
                tell(born=pid, log=order["log"])
        elif not open_:
            select.select([], [], [], 0.005)
        for pid in list(alive):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                alive.discard(pid)
                tell(died=pid, code=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    serve()
