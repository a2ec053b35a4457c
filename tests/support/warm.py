"""Loads and prepares what every training needs, in the server that the tests fork trainings from.

Nothing here may start a thread, which forks would lack: no backward pass, no parallel operator.
"""

import importlib

from distcv.command_line import read_command_line
from distcv.models import find_model

for name in (
    "distcv.data.synthetic", "distcv.loop", "distcv.run_folder", "distcv.runtime.fsdp",
    "distcv.samples", "distcv.saving", "distcv.tracking", "distcv.training",
    "torch._dynamo",  # the first optimizer of a process asks for it, which takes 2 s
    "torch.utils.tensorboard",
):  # fmt: skip
    importlib.import_module(name)

# The first parsing takes 0.4 s for the flags' help, which tyro keeps.
read_command_line(prog="distcv.train", description="", find_model=find_model, args=[])
