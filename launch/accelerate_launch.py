"""``accelerate launch``, but it leaves as its processes did; for launch/multinode.sh.

Accelerate 1.15 ends with a traceback and exit code 1 for whatever reason a process has failed:
after a line that says what is wrong with the input there would be forty more, and a run that could
not be saved would look like one that broke.
"""

import logging
import subprocess
import sys

from accelerate.commands.launch import main

# Exit codes of processes that have said why: wrong input, not saved, stopped on request.
TOLD = (2, 74, 75)


def keeps(record: logging.LogRecord) -> bool:
    """Whether a line of torchrun's log says more than the processes have said themselves."""
    if record.msg.startswith("failed (exitcode") and isinstance(record.args, tuple):
        return record.args[0] not in TOLD
    return not record.msg.startswith("Sending process")  # … closing signal


def leave(error: Exception) -> None:
    """Exit without a traceback where the reason has been said, or can be in a line."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    code = None
    if isinstance(error, ChildFailedError):
        code = error.get_first_failure()[1].exitcode
    elif isinstance(error, subprocess.CalledProcessError):  # of one process
        code = error.returncode
    if code in TOLD:
        sys.exit(code)
    if isinstance(error, ImportError) and "DeepSpeed" in str(error):
        print(
            "error: the launch file asks for DeepSpeed, which is not installed: pip install "
            "'distcv[deepspeed]', or use launch/fsdp2.yaml",
            file=sys.stderr,
        )
        sys.exit(2)
    if isinstance(error, DistError | RendezvousError):
        sys.exit(
            f"error: this node's launcher misses the others ({str(error).splitlines()[0]}): run "
            "--module distcv.doctor on all nodes, which names those that are missing"
        )


if __name__ == "__main__":
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(keeps)
    try:
        main()
    except Exception as error:
        leave(error)
        raise
