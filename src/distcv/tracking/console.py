"""What the main process prints while a run goes on."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from distcv.command import printable
from distcv.config import Recipe
from distcv.runtime import Runtime


class Console:
    """The main process's output: a live bar and a line per epoch; without a terminal, lines."""

    QUIET_SECONDS = 30.0  # without a terminal, at most one line in this time besides the epochs'

    def __init__(self, runtime: Runtime, recipe: Recipe) -> None:
        self.shown = runtime.is_main
        self.live = self.shown and sys.stderr.isatty()
        self.epochs, self.batch_size = recipe.epochs, recipe.batch_size
        self.bar: tqdm[Any] | None = None
        self.last_line = time.monotonic()
        self.skipped = 0

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self.shown:
            with contextlib.suppress(OSError):  # what is printed may go to a full disk, too
                tqdm.write(printable(line), file=sys.stdout)
                sys.stdout.flush()
            self.last_line = time.monotonic()

    @contextlib.contextmanager
    def epoch(self, epoch: int, done: int, steps: int) -> Iterator[None]:
        """Show a bar over the steps of one epoch (numbered from 1)."""
        self.bar = tqdm(
            desc=f"epoch {epoch}/{self.epochs}",
            initial=done * self.batch_size,
            total=steps * self.batch_size,
            unit=" images",
            unit_scale=True,
            leave=False,
            disable=not self.live,
            dynamic_ncols=True,
        )
        try:
            with self.bar:
                yield
        finally:
            self.bar = None

    def advance(self) -> None:
        """One optimizer step is done."""
        if self.bar is not None:
            self.bar.update(self.batch_size)

    def training(self, row: dict[str, Any]) -> None:
        """Show a row of training metrics; say if steps were skipped since the last one."""
        if row["skipped_steps"] > self.skipped:
            self.skipped = row["skipped_steps"]
            self.say(
                f"step {row['step']}: {self.skipped} skipped so far, without a finite loss and "
                "gradient"
            )
        words = f"loss {row['loss']:.4f}  accuracy {row['accuracy']:.2f} %  lr {row['lr']:.4g}"
        if self.live and self.bar is not None:
            self.bar.set_postfix_str(words, refresh=False)
        elif self.shown and time.monotonic() - self.last_line > self.QUIET_SECONDS:
            rate = f"{row['images_per_second']:,.0f} images/s"
            self.say(f"step {row['step']}  epoch {row['epoch']:.2f}  {words}  {rate}")

    def epoch_line(self, row: dict[str, Any]) -> None:
        """Show the figures at the end of an epoch."""
        self.say(
            f"epoch {round(row['epoch'], 2):g}/{self.epochs}  "
            f"train: loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.2f} %  "
            f"test: loss {row['test_loss']:.4f}, accuracy {row['test_accuracy']:.2f} %  "
            f"best {row['best_test_accuracy']:.2f} %  {row['seconds']:.1f} s"
        )
