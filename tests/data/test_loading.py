"""The order of samples, and how batches are dealt out to processes."""

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils._python_dispatch import TorchDispatchMode

from distcv.config import InputError
from distcv.data.loading import (
    PADDING,
    EvaluationBatches,
    ResidentImages,
    TrainingBatches,
    make_loader,
)


def dealt(sampler: object, processes: int) -> list[list[torch.Tensor]]:
    """What Accelerate gives to each process."""
    return [
        list(BatchSamplerShard(sampler, processes, rank, even_batches=False))  # type: ignore[arg-type]
        for rank in range(processes)
    ]


def global_batches(processes: int, accumulation: int, step: int = 0) -> list[list[int]]:
    sampler = TrainingBatches(1000, 96, processes=processes, accumulation=accumulation, seed=3)
    sampler.seek(step)
    shares = dealt(sampler, processes)
    rounds = [torch.cat(parts) for parts in zip(*shares, strict=True)]
    steps = [rounds[i : i + accumulation] for i in range(0, len(rounds), accumulation)]
    return [torch.cat(parts).tolist() for parts in steps]


@pytest.mark.parametrize("accumulation", [1, 2, 5])
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
def test_global_batches_are_the_same_on_any_number_of_processes(
    processes: int, accumulation: int
) -> None:
    """A run on more processes would train on other batches and show another learning curve."""
    batches = global_batches(processes, accumulation)
    assert batches == global_batches(1, 1)
    assert [len(batch) for batch in batches] == [96] * 10
    seen = [index for batch in batches for index in batch]
    assert len(set(seen)) == len(seen), "no sample twice in an epoch"


def test_epochs_differ_and_any_step_can_be_sought() -> None:
    """A resumed run would repeat or skip batches, or all epochs would have the same order."""
    first, second = global_batches(2, 1), global_batches(2, 1, step=10)
    assert first != second
    assert global_batches(2, 1, step=4) == first[4:]
    assert global_batches(3, 2, step=17) == second[7:]


def test_impossible_batches_are_refused() -> None:
    """A batch size that cannot be split would cause a traceback or a process without samples."""
    with pytest.raises(InputError, match="batch_size 96 exceeds the 50 training samples"):
        TrainingBatches(50, 96, processes=1, accumulation=1, seed=0)
    with pytest.raises(InputError, match="3 processes x 2 accumulation steps"):
        TrainingBatches(50, 5, processes=3, accumulation=2, seed=0)


@pytest.mark.parametrize("samples", [1, 10, 1000, 1001, 9999, 10_000])
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
def test_evaluation_holds_each_sample_once_in_equal_rounds(samples: int, processes: int) -> None:
    """Test accuracy would count samples twice or not at all, or evaluation would hang."""
    shares = dealt(EvaluationBatches(samples, 1000, processes=processes), processes)
    assert len({len(share) for share in shares}) == 1, "all processes take the same path"
    ids = torch.cat([batch for share in shares for batch in share])
    assert ids[ids != PADDING].sort().values.tolist() == list(range(samples))


def test_one_indexed_fetch_a_batch() -> None:
    """Training would be slower, since images would be fetched one by one."""
    images = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1)
    data = ResidentImages(images, torch.arange(20), torch.device("cpu"))
    calls = []
    fetch = data.__getitems__

    class Counting(ResidentImages):
        def __getitems__(self, ids: torch.Tensor):  # type: ignore[no-untyped-def]
            calls.append(len(ids))
            return fetch(ids)

    counting = Counting(images, torch.arange(20), torch.device("cpu"))
    batches = TrainingBatches(20, 8, processes=1, accumulation=1, seed=0)
    for batch in make_loader(counting, batches):
        assert batch.images.dtype == torch.uint8
        assert torch.equal(batch.images.flatten().long(), batch.ids)
        assert torch.equal(batch.labels, batch.ids)
    assert calls == [8, 8]


def test_resident_images_are_fetched_by_places_on_their_device() -> None:
    """Each training step on a GPU would make the host wait, and users would lose images/s.

    Indices on the CPU cause that wait; "cuda" and "cuda:0" are not equal.
    """

    class Places(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.ops.aten.index.Tensor:
                places.append(args[1][0].device.type)
            return func(*args, **(kwargs or {}))

    places: list[str] = []
    images, labels = torch.zeros(20, 1, 4, 4, dtype=torch.uint8), torch.arange(20)
    data = ResidentImages(images, labels, torch.device("meta"))
    data.device = torch.device("meta", 0)  # other than its tensors', as where no number was given
    with Places():
        data.__getitems__(torch.tensor([3, 7, PADDING]))
    assert places == ["meta", "meta"]


@pytest.mark.parametrize("fits", [True, False])
def test_images_that_do_not_fit_stay_where_they_are(fits: bool) -> None:
    """A data set larger than the device's memory would be copied there and end the run."""
    images = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1)
    # A CPU with a number is another device than the one without, and does for one of its own.
    data = ResidentImages(images, torch.arange(20), torch.device("cpu", 0), fits=fits)
    batch = data.__getitems__(torch.tensor([3, 7, PADDING]))
    assert (data.images.data_ptr() == images.data_ptr()) or fits
    assert batch.images.flatten().tolist() == [3, 7, 0]
    assert batch.labels.tolist() == [3, 7, 0]
    assert batch.ids.tolist() == [3, 7, PADDING]
