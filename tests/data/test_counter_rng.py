"""Random numbers as functions of counters."""

import pytest
import torch

from distcv.counter_rng import hash_int, hash_tensor, permutation, uniform


def test_the_bits_never_change() -> None:
    """A run repeated with another version would see other batches and other augmentation.

    These bits are golden: other versions, machines and devices must see the same data.
    """
    assert hash_int(0) == GOLDEN_INT[0]
    assert hash_int(1, 2, 3) == GOLDEN_INT[1]
    assert hash_tensor(7, torch.tensor([0, 1, 59_999, 2**32 - 1])).tolist() == GOLDEN_TENSOR
    assert permutation(hash_int(0, 0), 8).tolist() == GOLDEN_ORDER


def test_python_integers_and_tensors_agree_with_plain_unsigned_arithmetic() -> None:
    """Integer overflow would replace the published hash by one whose quality nobody measured."""

    def mixed(x: int) -> int:
        x ^= x >> 16
        x = x * 0x21F0AAAD % 2**32
        x ^= x >> 15
        x = x * 0x735A2D97 % 2**32
        return x ^ x >> 15

    counters = [0, 1, 12345, 2**31, 2**32 - 1]
    expected = [mixed((mixed(c ^ 0x9E3779B9) + 99) % 2**32) for c in counters]
    assert hash_tensor(99, torch.tensor(counters)).tolist() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_same_bits_on_the_gpu() -> None:
    """A run that moves from CPU to GPU would see other augmentation and not be repeatable."""
    counters = torch.arange(1_000_000)
    assert torch.equal(uniform(5, counters), uniform(5, counters.cuda()).cpu())


def test_uniform_looks_uniform_and_independent() -> None:
    """Augmentation would prefer some strengths, or treat neighbouring samples alike."""
    u = uniform(hash_int(0, 1), torch.arange(1_000_000))
    v = uniform(hash_int(0, 2), torch.arange(1_000_000))
    assert float(u.min()) >= 0 and float(u.max()) < 1
    counts = torch.histc(u, bins=100, min=0, max=1)
    chi2 = float(((counts - 10_000) ** 2 / 10_000).sum())
    assert 50 < chi2 < 160, "99 degrees of freedom: far outside by less than one chance in 10,000"
    for other in (v, u.roll(1), u.roll(1000)):
        assert abs(float(torch.corrcoef(torch.stack([u, other]))[0, 1])) < 5e-3


def test_permutation_holds_each_index_once_and_depends_on_the_key() -> None:
    """An epoch would skip or repeat samples, or all epochs would have the same order."""
    a, b = permutation(1, 60_000), permutation(2, 60_000)
    assert torch.equal(a.sort().values, torch.arange(60_000))
    assert int((a == b).sum()) < 20


GOLDEN_INT = [340428713, 3564870899]
GOLDEN_TENSOR = [3470284471, 3105853072, 3729201636, 728159067]
GOLDEN_ORDER = [4, 7, 2, 6, 5, 1, 3, 0]
