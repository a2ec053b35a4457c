"""How long a loop's steps take."""

import time
from collections.abc import Callable

from distcv.command_line import RunOptions
from distcv.runtime.device import synchronize

LOG_EVERY = RunOptions().log_every  # steps


def timed(
    step: Callable[[], None],
    seconds: float,
    images: int,
    agree: Callable[[bool], bool] | None = None,
) -> tuple[int, float]:
    """Repeat a step of so many images for about so long; images and seconds until all are done.

    Several processes ``agree`` every 20 steps on whether the time is over.
    """
    steps, began = 0, time.perf_counter()
    while True:
        step()
        steps += 1
        over = time.perf_counter() - began >= seconds
        if agree:
            over = steps % LOG_EVERY == 0 and agree(over)
        if over:
            synchronize()
            return steps * images, time.perf_counter() - began
