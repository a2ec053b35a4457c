"""Makes trainings in other processes wait in each step, without work for the processor.

A folder on PYTHONPATH; Python imports this at its start. While the file that SLOW_STEPS names
exists, each step takes as many seconds longer as it says: time for Slurm to notice something.
"""

import contextlib
import importlib.abc
import importlib.util
import os
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any


class SlowLoop(importlib.abc.MetaPathFinder):
    """Finds `distcv.loop` as others do, and changes one function of it when it is loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != "distcv.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec and spec.loader
        load: Any = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            lr_at = module.lr_at  # called once a step

            def slow_lr_at(*args: Any) -> float:
                # It may be removed, or be empty for a moment, at any time.
                with contextlib.suppress(FileNotFoundError, ValueError):
                    time.sleep(float(Path(os.environ["SLOW_STEPS"]).read_text()))
                return float(lr_at(*args))

            module.lr_at = slow_lr_at

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "SLOW_STEPS" in os.environ:
    sys.meta_path.insert(0, SlowLoop())
