"""The training loop and the evaluation. Nothing in a step waits for the device."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distcv.config import InputError
from distcv.data.loading import PADDING, Batch
from distcv.optim import Kept, lr_at
from distcv.preempt import StopRequest
from distcv.runtime import Runtime
from distcv.runtime.device import memory
from distcv.training import SKIPS, Progress, Training, averaged_weights, shared_statistics

AUGMENTED_AT_ONCE, AUGMENTED_NUMBERS = 1024, 2**24  # samples, and numbers in all
LOOK_SECONDS = 2.0  # at most about so long, or one step, between looks for a stop request
MISTAKES = 64  # wrong predictions that are kept of an evaluation


class Diverged(InputError):
    """Too many steps had no finite loss and gradient, or the test loss is not finite."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: lower --lr or set --clip-norm; checkpoints from before are kept")


@dataclass(frozen=True)
class Evaluation:
    """Exact figures on the test set."""

    loss: float
    """Mean over the samples."""
    accuracy: float
    """In percent."""
    class_accuracy: list[float]
    """In percent, class by class."""
    confusion: list[list[int]]
    """Samples by label (row) and prediction (column)."""
    mistakes: list[dict[str, Any]]
    """Wrong predictions, the most confident first: sample, label, predicted, confidence (0..1)."""


class Sums:
    """Sums over samples, kept on the device: loss, correct predictions, samples."""

    def __init__(self, device: torch.device, start: list[float]) -> None:
        self.values = torch.tensor(start, device=device)

    def add(self, loss_sum: Tensor, logits: Tensor, labels: Tensor) -> None:
        correct = (logits.argmax(1) == labels).sum()
        self.values += torch.stack(
            [loss_sum.detach(), correct, torch.full_like(correct, len(labels))]
        )

    def read(self, runtime: Runtime, steps: list[Tensor], *flags: float) -> list[float]:
        """Totals over all processes, of steps' numbers and more too; waits for the device."""
        more = torch.tensor(flags, device=self.values.device)
        return runtime.sum(torch.cat([self.values, torch.stack(steps), more])).tolist()


def stop_agreed(runtime: Runtime, stop: StopRequest) -> bool:
    """Whether one of the processes was asked to stop; by all together, waits for the device."""
    asked = torch.tensor(float(stop.pending()), device=runtime.device)
    return bool(runtime.sum(asked))


def augmented_parts(training: Training, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inputs, targets and labels of each part of the batches, as the samplers deal them out.

    About a thousand samples are augmented at once, if they are small: the many small operations
    cost as much for a hundred.
    """
    loader: Iterator[Batch] = iter(training.train_loader)
    first = next(loader)
    samples = min(AUGMENTED_AT_ONCE, AUGMENTED_NUMBERS // first.images[0].numel())
    at_once = max(1, samples // len(first.ids))
    loader = itertools.chain([first], loader)
    while held := list(itertools.islice(loader, at_once)):
        joined = Batch(*map(torch.cat, zip(*held, strict=True)))
        sizes = [len(part.ids) for part in held]
        inputs, targets = training.augment(joined, epoch)
        yield from zip(
            *(torch.split(t, sizes) for t in (inputs, targets, joined.labels)), strict=True
        )


def train_epoch(
    training: Training,
    progress: Progress,
    *,
    log_every: int,
    log: Callable[[dict[str, Any]], None],
    advance: Callable[[], None],
    checkpoint_every: int | None,
    save: Callable[[], None],
    stop: StopRequest,
) -> bool:
    """Train from ``progress.step`` to the end of its epoch; False at a stop request, also there.

    Every ``log_every`` steps the sums are read and ``log`` gets a row. Then, and every two seconds
    where steps are slow, the processes agree on whether one of them was asked to stop.

    A step without a finite loss and gradient on all processes is skipped: it leaves weights,
    optimizer, BatchNorm's statistics and the sums as they were.

    Raises:
        Diverged: three steps in a row were skipped, or all of an epoch, or with fp16 so many that
            the loss scale fell below 1; nothing is saved after.
    """
    recipe, runtime = training.recipe, training.runtime
    epoch = progress.step // training.steps_per_epoch
    end = min((epoch + 1) * training.steps_per_epoch, training.total_steps)
    window = Sums(runtime.device, progress.window_sums if runtime.is_main else [0.0] * 3)
    training.model.train()
    training.batches.seek(progress.step)
    parts = augmented_parts(training, epoch)
    skips: list[Tensor] = []  # 1 for each skipped step since the last look, 0 for each other
    since, since_step = time.perf_counter(), progress.step
    before = progress.train_seconds, progress.seconds

    def clock() -> float:
        elapsed = time.perf_counter() - since
        progress.train_seconds, progress.seconds = before[0] + elapsed, before[1] + elapsed
        return elapsed

    last_logged = last_look = 0.0
    looked_at = look_at = progress.step
    step_seconds = LOOK_SECONDS
    while progress.step < end:
        runtime.beat(progress.step)
        lr = lr_at(progress.step, recipe, training.steps_per_epoch, training.total_steps)
        lr *= progress.lr_factor
        for group in training.optimizer.param_groups:
            group["lr"] = lr
        log_due = (progress.step + 1) % log_every == 0 or progress.step + 1 == end
        kept = Kept([window.values, *runtime.statistics])
        for part in range(recipe.gradient_accumulation_steps):
            inputs, targets, labels = next(parts)
            runtime.seed_step(progress.step, part)
            with runtime.accumulate(training.model):
                with runtime.autocast():
                    logits = training.model(inputs).float()
                loss_sum = F.cross_entropy(
                    logits, targets, reduction="sum", label_smoothing=recipe.label_smoothing
                )
                runtime.backward(runtime.loss_share(loss_sum, recipe.batch_size))
            window.add(loss_sum, logits, labels)
        if recipe.clip_norm or log_due:
            runtime.clip(training.model, recipe.clip_norm or math.inf)
        skips.append(runtime.nonfinite(window.values[0]))
        runtime.step(training.optimizer, skips[-1])
        kept.put_back_if(skips[-1].bool())
        if training.ema:
            training.ema.update(progress.step, skips[-1])
        progress.step += 1
        advance()

        save_due = checkpoint_every is not None and progress.step % checkpoint_every == 0
        stop_seen = runtime.processes == 1 and stop.signalled
        if not (log_due or save_due or stop_seen or progress.step >= look_at):
            continue
        # The main process says when the next look is due, by the time that steps took lately.
        due_in = max(1.0, LOOK_SECONDS / step_seconds) if runtime.is_main else 0.0
        nodes = runtime.node_metrics.share() if runtime.node_metrics else []
        flags = float(stop.pending()), float(runtime.scale_is_spent()), due_in
        read = window.read(runtime, skips, *flags, *nodes)
        sums, (stops, spent, due_in, *nodes) = read[:3], read[3 + len(skips) :]
        diverged = progress.count_skips(read[3 : 3 + len(skips)])
        skips.clear()
        elapsed = clock()
        step_seconds = max((elapsed - last_look) / (progress.step - looked_at), 1e-6)
        last_look, looked_at, look_at = elapsed, progress.step, progress.step + int(due_in)
        if diverged or spent or (progress.step == end and progress.epoch_sums[2] + sums[2] == 0):
            what = f"no finite loss and gradient in {SKIPS} steps in a row, or all of an epoch"
            if spent:
                what = "no finite gradient at any loss scale down to 1"
            raise Diverged(f"{what}, by step {progress.step}, lr {lr:.4g}")
        if log_due and sums[2]:
            images = (progress.step - since_step) * recipe.batch_size
            rate = images / (elapsed - last_logged)
            row = _train_row(training, progress, sums, lr, rate)
            if runtime.node_metrics:
                row["nodes"] = runtime.node_metrics.read(nodes)
            log(row)
            last_logged, since_step = elapsed, progress.step
            progress.epoch_sums = [a + b for a, b in zip(progress.epoch_sums, sums, strict=True)]
            window = Sums(runtime.device, [0.0] * 3)
            sums = [0.0] * 3
        progress.window_sums = sums
        if stops:
            return False
        # At an epoch's end it is saved after the evaluation; after a skipped step not at all, since
        # the weights may be what is wrong.
        if save_due and progress.step < end and not progress.skipped_in_a_row:
            began = time.perf_counter()
            save()
            since += time.perf_counter() - began
    return True


def _train_row(
    training: Training,
    progress: Progress,
    sums: list[float],
    lr: float,
    rate: float,
) -> dict[str, Any]:
    runtime = training.runtime
    loss, correct, samples = sums
    return {
        "event": "train",
        **training.place(progress),
        "loss": loss / samples,
        "accuracy": 100 * correct / samples,
        "lr": lr,
        "grad_norm": runtime.gradient_norm(),
        "skipped_steps": progress.skipped_steps,
        "images_per_second": rate,
        "mfu": 100 * training.utilization(rate),
        "memory_mib": memory(runtime.device) / 2**20,
        "seconds": progress.seconds,
    }


def timed_evaluation(
    training: Training, progress: Progress, stop: StopRequest | None = None
) -> Evaluation | None:
    """Evaluate; add the time to the run's seconds and note the best accuracy so far.

    Raises:
        Diverged: the loss is not finite.
    """
    began = time.perf_counter()
    evaluation = evaluate(training, stop)
    progress.seconds += time.perf_counter() - began
    if evaluation is None:
        return None
    if not math.isfinite(evaluation.loss):
        raise Diverged(f"the test loss is not finite after step {progress.step}")
    if progress.best_accuracy is None or evaluation.accuracy > progress.best_accuracy:
        progress.best_accuracy, progress.best_step = evaluation.accuracy, progress.step
    return evaluation


@torch.no_grad()
def evaluate(training: Training, stop: StopRequest | None = None) -> Evaluation | None:
    """Loss and accuracy over the whole test set, each sample counted once, the same everywhere.

    The moving average is evaluated where there is one. No test-time augmentation. On a CPU, where
    it takes long, it is broken off at a stop request; None is returned then.
    """
    runtime, classes = training.runtime, training.classes
    training.model.eval()
    loss_sum = torch.zeros((), device=runtime.device)
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=runtime.device)
    # Confidence and prediction by sample; 0 where it is right, or another process's.
    wrong = torch.zeros(2, len(training.test_labels), device=runtime.device)
    with shared_statistics(training), averaged_weights(training), runtime.autocast():
        for batch in training.test_loader:
            runtime.beat()
            if stop and runtime.device.type == "cpu" and stop_agreed(runtime, stop):
                return None
            counted = batch.ids != PADDING
            logits = training.model(training.augment.normalize(batch.images)).float()
            losses = F.cross_entropy(logits, batch.labels, reduction="none")
            loss_sum += (losses * counted).sum()
            confidence, predicted = logits.softmax(1).amax(1).nan_to_num(), logits.argmax(1)
            confusion.scatter_add_(0, batch.labels * classes + predicted, counted.long())
            both = torch.stack([confidence, predicted]) * (counted & (predicted != batch.labels))
            wrong.index_add_(1, batch.ids.clamp(min=0), both)
    runtime.sum(loss_sum)
    runtime.sum(wrong)
    table = runtime.sum(confusion).view(classes, classes)  # row: label, column: prediction
    samples = int(table.sum())
    assert samples == len(training.test_labels), f"{samples} of the test set evaluated"
    right, of_class = table.diagonal(), table.sum(1).clamp(min=1)
    return Evaluation(
        loss=float(loss_sum) / samples,
        accuracy=100 * int(right.sum()) / samples,
        class_accuracy=[100 * share for share in (right / of_class).tolist()],
        confusion=table.tolist(),
        mistakes=_mistakes(wrong.cpu(), training.test_labels),
    )


def _mistakes(wrong: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """The most confident ones of wrong predictions (2, N): their confidence, or 0, and class."""
    confidence, samples = wrong[0].sort(descending=True, stable=True)
    count = min(MISTAKES, int(confidence.count_nonzero()))
    return [
        {
            "sample": sample,
            "label": int(labels[sample]),
            "predicted": int(wrong[1, sample]),
            "confidence": sure,
        }
        for sample, sure in zip(samples[:count].tolist(), confidence[:count].tolist(), strict=True)
    ]
