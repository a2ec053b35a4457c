"""Random numbers as a function of counters, with no state to carry or restore.

The hash is integer arithmetic on values below 2**32 held in int64, with multipliers below 2**31, so
that no product overflows: Python integers, CPU tensors and GPU tensors give the same bits. The
mixing function is the two-round xorshift-multiply family of C. Wellons, "Prospecting for hash
functions" (2018), with the constants of its later search (bias 0.11).
"""

from typing import TypeVar

import torch
from torch import Tensor

Integer = TypeVar("Integer", int, Tensor)

_MASK = 0xFFFFFFFF
_START = 0x9E3779B9  # golden ratio, 2**32 / phi: any constant but zero, which hashes to itself


def _mix(x: Integer) -> Integer:
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def hash_int(*keys: int) -> int:
    """Hash non-negative integers (below 2**64 each) to one in [0, 2**32)."""
    state = _START
    for key in keys:
        state = _mix(_mix(state ^ (key & _MASK)) ^ (key >> 32))
    return state


def hash_tensor(key: int, counters: Tensor) -> Tensor:
    """Hash each counter (int64 in [0, 2**32), any shape) under a 32-bit key to the same range."""
    return _mix((_mix(counters ^ _START) + key) & _MASK)


def uniform(key: int, counters: Tensor) -> Tensor:
    """A float32 in [0, 1) for each counter, exact on every device (24 bits of the hash)."""
    return (hash_tensor(key, counters) >> 8).to(torch.float32) * 2.0**-24


def permutation(key: int, count: int) -> Tensor:
    """A permutation of 0 … count-1 (int64, on the CPU) that depends on nothing but ``key``."""
    index = torch.arange(count)
    # The index breaks ties of the hash, so that the order does not hang on the sorting algorithm.
    return torch.argsort(hash_tensor(key, index) * count + index)
