"""Hooks of ``worker.py``: losses and gradients that are not finite, and runs that do without."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def spoil(
    on_rank: int, *, what: str, value: str, rank: int, steps: list[int], out: str, part: int = 0,
    rollbacks: int = 99,
) -> None:  # fmt: skip
    """Make a loss, or a gradient after the processes' exchange, not finite on one rank.

    Args:
        what: ``loss`` or ``gradient``.
        value: ``nan`` or ``inf``.
        steps: which ones, from 0; until the run has been rolled back so often.
        out: folder; each rank writes there whether each of these steps changed its weights, and at
            the end of each epoch how many steps it has skipped.
        part: of the accumulation, for a loss.
    """
    import torch

    import distcv.loop
    import distcv.runtime

    now: Any = SimpleNamespace(progress=None, part=0)
    log = Path(out) / f"rank-{on_rank}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)

    def is_spoilt(step: int) -> bool:
        return step in steps and now.progress.rollbacks < rollbacks

    def due(kind: str) -> bool:
        return what == kind and on_rank == rank and is_spoilt(now.progress.step)

    def tell(**told: Any) -> None:
        with log.open("a") as file:
            file.write(json.dumps(told) + "\n")

    train_epoch = distcv.loop.train_epoch

    def hooked_epoch(training: Any, progress: Any, **kwargs: Any) -> bool:
        def weights() -> list[Any]:
            return [p.clone() for p in training.runtime.strategy.pieces().values()]

        now.progress, now.parts = progress, training.recipe.gradient_accumulation_steps
        now.weights, advance = weights(), kwargs["advance"]

        def hooked_advance() -> None:
            before, now.weights = now.weights, weights()
            if is_spoilt(progress.step - 1):
                same = all(map(torch.equal, before, now.weights))
                tell(step=progress.step - 1, changed=not same)
            advance()

        completed = train_epoch(training, progress, **kwargs | {"advance": hooked_advance})
        tell(skipped=progress.skipped_steps)
        return completed

    cross_entropy = torch.nn.functional.cross_entropy

    def spoilt_loss(*args: Any, **kwargs: Any) -> Any:
        loss = cross_entropy(*args, **kwargs)
        if kwargs["reduction"] == "sum":  # not in an evaluation
            if due("loss") and now.part == part:
                loss = loss + float(value)  # whose gradient is finite
            now.part = (now.part + 1) % now.parts
        return loss

    def write(gradients: Any) -> None:
        max(gradients, key=torch.numel).view(-1)[-1] = float(value)

    nonfinite = distcv.runtime.Runtime.nonfinite

    def spoilt_gradient(runtime: Any, losses: Any) -> Any:
        if due("gradient") and not runtime.strategy.has_engine:
            write(runtime.strategy.gradients())
        return nonfinite(runtime, losses)

    distcv.loop.train_epoch = hooked_epoch
    distcv.loop.F = SimpleNamespace(cross_entropy=spoilt_loss)
    distcv.runtime.Runtime.nonfinite = spoilt_gradient
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        from distcv.runtime.zero import Zero

        wrapped = Zero.wrapped

        def hooked_wrapped(self: Any, model: Any, optimizer: Any) -> None:
            wrapped(self, model, optimizer)
            step = self.zero.step

            def spoilt_step() -> None:
                if due("gradient"):
                    groups = self.zero.averaged_gradients.values()
                    write([g for group in groups for g in group if g is not None])
                step()

            self.zero.step = spoilt_step

        Zero.wrapped = hooked_wrapped


def without(omit: tuple[int, ...] = (), slower_from: int | None = None, factor: float = 1) -> None:
    """Leave out steps (from 0) as if they were done, and lower the learning rate from a step on."""
    import distcv.loop

    lr_at, train_epoch = distcv.loop.lr_at, distcv.loop.train_epoch

    def hooked_rate(step: int, *rest: Any) -> float:
        slower = slower_from is not None and step >= slower_from
        return lr_at(step, *rest) * (factor if slower else 1)

    def hooked_epoch(training: Any, progress: Any, **kwargs: Any) -> bool:
        epoch = progress.step // training.steps_per_epoch
        end = min((epoch + 1) * training.steps_per_epoch, training.total_steps)
        for step in sorted(s for s in omit if progress.step <= s < end):
            if progress.step < step:
                at = SimpleNamespace(signalled=False, pending=lambda: progress.step >= step)  # noqa: B023
                train_epoch(training, progress, **kwargs | {"stop": at})
            progress.step = step + 1
        return progress.step == end or train_epoch(training, progress, **kwargs)

    distcv.loop.lr_at, distcv.loop.train_epoch = hooked_rate, hooked_epoch
