"""BatchNorm over processes, against nn.BatchNorm2d on the whole batch in float64."""

import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distcv.runtime.sync_bn import SharedBatchNorm2d, convert

SHARES = {3: [5, 3, 4], 2: [10, 2]}
WITH_AN_EMPTY_ONE = {3: [5, 0, 7], 2: [0, 12]}
BF16 = 2.0**-8  # relative distance of neighbours

# What differs from the plain case; `tolerance` is for what is computed in the statistics' dtype,
# `rounding` for what is rounded to the input's. Both are relative to the largest value.
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "float64": {"dtype": torch.float64, "tolerance": 1e-12, "rounding": 1e-12},
    "bf16": {"dtype": torch.bfloat16, "rounding": BF16},
    "far from zero": {"offset": 1000.0, "tolerance": 2e-4, "rounding": 2e-4},
    "channels last": {"memory_format": torch.channels_last},
    "mean of all batches": {"options": {"momentum": None}},
    "normalization only": {"options": {"affine": False, "track_running_stats": False}},
    "input without gradient": {"input_gradient": False},
    "an empty share": {"shares": WITH_AN_EMPTY_ONE},
}


def layer_of(case: dict[str, Any]) -> nn.BatchNorm2d:
    torch.manual_seed(1)
    layer = nn.BatchNorm2d(6, **case.get("options", {}))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def steps(
    layer: nn.Module, case: dict[str, Any], part: slice, dtype: torch.dtype
) -> dict[str, Any]:
    """Three training steps with this part of each batch, then an evaluation: all that results."""
    found: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(2)
    for step in range(3):
        x, slope = torch.randn(2, 12, 6, 5, 7, generator=generator)
        x = (x * torch.arange(1, 7).view(-1, 1, 1) + step + case.get("offset", 0.0))[part]
        x, slope = (t.to(case.get("dtype", torch.float32)).to(dtype) for t in (x, slope[part]))
        x = x.to(memory_format=case.get("memory_format", torch.contiguous_format))
        x.requires_grad_(case.get("input_gradient", True))
        out = layer(x)
        if out.requires_grad:
            (out * slope).sum().backward()
        found["output", step], found["input gradient", step] = out.detach(), x.grad
        found["dtypes", step] = out.dtype == x.dtype
        found["layout", step] = out.stride() == x.stride()
    with torch.no_grad():
        layer(2 * x)  # counts, though there will be no backward pass
    found["buffers"] = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    found["gradients"] = {name: parameter.grad for name, parameter in layer.named_parameters()}
    layer.eval()
    found["evaluation"] = layer(x).detach()
    return found


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2),
    ).double()  # fmt: skip


def train(model: nn.Module, part: slice, factor: int) -> None:
    """Some steps of SGD; the loss is the mean over 12 samples times a factor."""
    generator = torch.Generator().manual_seed(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        x = torch.randn(12, 3, 8, 8, dtype=torch.float64, generator=generator)[part]
        loss = (model(x) - x.mean((2, 3))[:, :2]).square().sum() * (factor / 12)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def in_one_world(rank: int, world: int) -> dict[str, Any]:
    """What one of the processes computes."""

    def part(shares: list[int]) -> slice:
        return slice(sum(shares[:rank]), sum(shares[: rank + 1]))

    device = torch.device("cpu")
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        dtype = case.get("dtype", torch.float32)
        layer = layer_of(case).to(torch.promote_types(dtype, torch.float32))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            share = part(case.get("shares", SHARES)[world])
            found[name] = steps(convert(layer, device), case, share, dtype)
    model = network()
    wrapped = DistributedDataParallel(convert(model, device), broadcast_buffers=False)
    train(wrapped, part(SHARES[world]), world)
    found["trained"] = model.state_dict()
    single = convert(nn.BatchNorm2d(2), device)
    try:
        single(torch.ones(1 if rank == 0 else 0, 2, 1, 1))
    except ValueError as error:
        found["refused"] = str(error)
    return found


def process(folder: Path, rank: int) -> None:
    """One of three processes, which are a world of three, then one of two."""
    for world in (3, 2):
        if rank < world:
            method = f"file://{folder}/rendezvous{world}"
            dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world)
            torch.save(in_one_world(rank, world), folder / f"{rank} of {world}")
            dist.barrier()
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each process of each world computed."""
    folder = tmp_path_factory.mktemp("worlds")
    command = [sys.executable, __file__, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(3)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return {n: [torch.load(folder / f"{rank} of {n}") for rank in range(n)] for n in (3, 2)}


def assert_close(name: str, result: Tensor, expected: Tensor, tolerance: float) -> None:
    assert result.shape == expected.shape, name
    error = (result.double() - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{name}: off by {error:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 2])
@pytest.mark.parametrize("name", CASES)
def test_the_whole_batch_on_one_process_gives_the_same(
    name: str, world: int, found: dict[int, list[dict[str, Any]]]
) -> None:
    """--sync-bn would give other outputs, gradients or statistics than one process."""
    case = CASES[name]
    tolerance, rounding = case.get("tolerance", 1e-6), case.get("rounding", 1e-6)
    whole = steps(layer_of(case).double(), case, slice(None), torch.float64)
    parts = [process[name] for process in found[world]]
    for step in range(3):
        for key in [("output", step), ("input gradient", step)]:
            if whole[key] is None:
                assert all(part[key] is None for part in parts)
            else:
                together = torch.cat([part[key] for part in parts])
                assert_close(f"{key}", together, whole[key], rounding)
        assert all(part["dtypes", step] for part in parts)
        # Strides of an empty tensor mean nothing.
        assert all(part["layout", step] for part in parts if part["output", step].numel())
    together = torch.cat([part["evaluation"] for part in parts])
    if layer_of(case).track_running_stats:
        assert_close("evaluation", together, whole["evaluation"], rounding)
    for key, expected in whole["gradients"].items():
        assert_close(key, sum(part["gradients"][key] for part in parts), expected, tolerance)
    for key, expected in whole["buffers"].items():
        for part in parts:
            assert torch.equal(part["buffers"][key], parts[0]["buffers"][key])
        assert_close(key, parts[0]["buffers"][key], expected, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 2])
def test_a_network_in_ddp_learns_the_same(
    world: int, found: dict[int, list[dict[str, Any]]]
) -> None:
    """With --sync-bn under DDP, a network would reach other weights than on one process."""
    alone = network()
    train(alone, slice(None), 1)
    for process in found[world]:
        for name, expected in alone.state_dict().items():
            assert_close(name, process["trained"][name], expected, 1e-12)


@pytest.mark.slow
def test_all_processes_refuse_a_single_value(found: dict[int, list[dict[str, Any]]]) -> None:
    """A batch too small for BatchNorm would end one process and leave the others hanging."""
    refusals = {process["refused"] for world in found.values() for process in world}
    assert refusals == {"BatchNorm needs more than one value per channel to train on"}


def test_one_process_is_plain_batch_norm() -> None:
    """A synchronised BatchNorm would compute other numbers than nn.BatchNorm2d on one process."""
    case: dict[str, Any] = {}
    layer = layer_of(case)
    plain = steps(deepcopy(layer), case, slice(None), torch.float32)
    shared = steps(convert(layer, torch.device("cpu")), case, slice(None), torch.float32)
    assert isinstance(layer, SharedBatchNorm2d)
    for key in ("gradients", "buffers"):
        assert all(torch.equal(shared[key][name], plain[key][name]) for name in plain[key])
    assert all(torch.equal(shared["output", step], plain["output", step]) for step in range(3))


def test_a_converted_network_keeps_its_tensors() -> None:
    """With --sync-bn, the optimizer would lose BatchNorm's weights, and they would not learn."""
    model, calls = network(), []
    model[2].register_forward_hook(lambda *_: calls.append(1))
    before = [*model.named_parameters(), *model.named_buffers()]
    for _ in range(2):
        assert convert(model, torch.device("cpu")) is model
    after = [*model.named_parameters(), *model.named_buffers()]
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(now is then for (_, now), (_, then) in zip(after, before, strict=True))
    assert [type(model[i]) for i in (0, 2, 5)] == [SharedBatchNorm2d] * 3
    model(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert calls == [1]


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_other_kinds_are_refused(kind: Callable[[int], nn.Module]) -> None:
    """BatchNorm1d or BatchNorm3d in a user's network would silently stay unsynchronised."""
    with pytest.raises(TypeError, match=r"1: .*Norm.* can't be shared among processes"):
        convert(nn.Sequential(nn.ReLU(), kind(3)), torch.device("cpu"))


def test_other_devices_have_torch_s_own() -> None:
    """On a GPU, --sync-bn would use a layer made for CPUs, or the optimizer lose its weights."""
    model = network()
    parameters = list(model.parameters())
    assert convert(model, torch.device("cuda")) is model
    assert [type(model[i]) for i in (0, 2, 5)] == [nn.SyncBatchNorm] * 3
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


if __name__ == "__main__":
    process(Path(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # the interpreter's own end has aborted processes that used gloo
