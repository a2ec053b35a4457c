"""Batches: the order of samples as f(seed, epoch), and one indexed fetch a batch.

The samplers list the parts of a global batch in the order of the processes, and Accelerate deals
them out, part ``i`` to process ``i``. So the global batches are the same on any number of
processes, also on one that does not divide the batch.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from distcv.config import InputError
from distcv.counter_rng import hash_int, permutation

PADDING = -1  # id of a place in an evaluation batch that holds no sample


class Batch(NamedTuple):
    """Samples of one fetch; ``ids`` are places in the set, ``PADDING`` where there is none."""

    images: Tensor  # uint8 (N, C, H, W)
    labels: Tensor  # int64 (N,)
    ids: Tensor  # int64 (N,)
    host_ids: Tensor  # the same on the CPU


class ResidentImages(Dataset[Batch]):
    """A whole set: uint8 images (N, C, H, W) and int64 labels (N,), on the device if they fit.

    Images that don't stay in memory shared by the processes of a node (the mapped cache file), and
    only each batch goes to the device.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, device: torch.device, *, fits: bool = True
    ) -> None:
        self.device, self.fits = device, fits
        self.images = images.to(device) if fits else images
        self.labels = labels.to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, ids: Tensor) -> Batch:
        on_device = ids.to(self.device, non_blocking=True)
        places = on_device.clamp(min=0)
        if self.fits:
            images = self.images[places]
        else:
            images = self.images[ids.clamp(min=0)].to(self.device, non_blocking=True)
        return Batch(images, self.labels[places], on_device, ids)


class TrainingBatches(Sampler[Tensor]):
    """Index tensors of an epoch's batches, each split into accumulation steps, those into shares.

    Every global batch is full: the samples that are left over at the end of an epoch sit out, and
    others in the next, since each epoch has its own permutation.

    Raises:
        InputError: the set is smaller than a batch, or a process would get no sample of a part.
    """

    drop_last = True  # tells Accelerate not to fill up the last round

    def __init__(
        self, samples: int, batch_size: int, *, processes: int, accumulation: int, seed: int
    ) -> None:
        if batch_size > samples:
            raise InputError(
                f"batch_size {batch_size} exceeds the {samples} training samples: lower it"
            )
        if batch_size < processes * accumulation:
            raise InputError(
                f"batch_size {batch_size} is less than {processes} processes x {accumulation} "
                "accumulation steps: raise --batch-size or use fewer"
            )
        # Not named batch_size: Accelerate would drop parts of another length than that.
        self.samples, self.global_batch, self.seed = samples, batch_size, seed
        self.processes, self.accumulation = processes, accumulation
        self.steps_per_epoch = samples // batch_size
        self.seek(0)

    def seek(self, step: int) -> None:
        """Let the next iteration begin at this optimizer step of the whole training."""
        self.epoch, self.first = divmod(step, self.steps_per_epoch)

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.first) * self.accumulation * self.processes

    def __iter__(self) -> Iterator[Tensor]:
        order = permutation(hash_int(self.seed, self.epoch), self.samples)
        for step in range(self.first, self.steps_per_epoch):
            batch = order[step * self.global_batch : (step + 1) * self.global_batch]
            for part in batch.tensor_split(self.accumulation):
                yield from part.tensor_split(self.processes)


class EvaluationBatches(Sampler[Tensor]):
    """Index tensors that hold every sample once, filled up with padding to equal shares."""

    drop_last = True

    def __init__(self, samples: int, batch_size: int, *, processes: int) -> None:
        self.share = min(batch_size, -(-samples // processes))
        rounds = -(-samples // (self.share * processes))
        self.ids = torch.full((rounds * self.share * processes,), PADDING)
        self.ids[:samples] = torch.arange(samples)

    def __len__(self) -> int:
        return len(self.ids) // self.share

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.split(self.ids, self.share)


def make_loader(images: ResidentImages, batches: Sampler[Tensor]) -> DataLoader[Batch]:
    """A DataLoader that fetches each batch by one index; no workers, since all data is resident."""
    return DataLoader(images, batch_sampler=batches, collate_fn=_as_is)  # type: ignore[arg-type]


def _as_is(batch: Batch) -> Batch:
    return batch
