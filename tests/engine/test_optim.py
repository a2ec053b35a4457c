"""Optimizers, learning rates, moving average."""

import itertools
from typing import Literal

import pytest
import torch
from torch import nn

from distcv import optim
from distcv.config import Recipe
from distcv.models import build_model
from distcv.optim import OPTIMIZERS, MovingAverage, lr_at, orthogonal, parameter_groups


def rates(total: int = 60, per_epoch: int = 6, **fields: object) -> list[float]:
    recipe = Recipe(epochs=10, lr=0.5, **fields)  # type: ignore[arg-type]
    return [lr_at(step, recipe, per_epoch, total) for step in range(total)]


def torch_rates(make: object, total: int = 60, per_epoch: int = 6) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = make(optimizer)  # type: ignore[operator]
    found = []
    for _ in range(total // per_epoch):
        found += [optimizer.param_groups[0]["lr"]] * per_epoch
        optimizer.step()
        scheduler.step()
    return found


def test_step_and_multistep_are_torch_s() -> None:
    """A `step` or `multistep` recipe ported from PyTorch would use other learning rates."""
    schedulers = torch.optim.lr_scheduler
    assert rates(schedule="step", lr_step_epochs=3, lr_gamma=0.1) == pytest.approx(
        torch_rates(lambda o: schedulers.StepLR(o, 3, 0.1))
    )
    assert rates(schedule="multistep", lr_milestones=(2, 7), lr_gamma=0.5) == pytest.approx(
        torch_rates(lambda o: schedulers.MultiStepLR(o, [2, 7], 0.5))
    )


def test_cosine_is_torch_s() -> None:
    """A `cosine` recipe ported from PyTorch would use other learning rates."""
    schedulers = torch.optim.lr_scheduler
    expected = torch_rates(lambda o: schedulers.CosineAnnealingLR(o, 60, eta_min=0.05), per_epoch=1)
    assert rates(schedule="cosine", final_lr_factor=0.1) == pytest.approx(expected)


def test_onecycle_is_a_triangle() -> None:
    """A `onecycle` run would not peak at --lr after its warm-up, or not end near zero."""
    lr = rates(schedule="onecycle", warmup=0.2, initial_lr_factor=0.1)
    assert lr[0] > 0.05 and max(lr) == lr[12] == 0.5
    rises, falls = lr[:13], lr[12:]
    assert rises == sorted(rises) and falls == sorted(falls, reverse=True)
    steps = {round(a - b, 9) for a, b in itertools.pairwise(falls)}
    assert len(steps) == 1, "straight down"
    assert 0 < lr[-1] < 0.02


def test_constant_and_warmup_never_give_zero() -> None:
    """A constant rate would drift, or a step of the warm-up would learn nothing at a rate of 0."""
    assert set(rates(schedule="constant")) == {0.5}
    assert min(rates(schedule="constant", warmup=1.0)) > 0


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_each_optimizer_learns(name: str) -> None:
    """`--optimizer sgd`, `adamw` or `muon` would run without lowering the loss."""
    torch.manual_seed(0)
    recipe = Recipe(optimizer=name, lr=0.02, weight_decay=1e-3)  # type: ignore[arg-type]
    model = build_model("gap", channels=1, classes=10)
    optimizer = OPTIMIZERS[name](model, recipe)
    x, y = torch.randn(32, 1, 28, 28), torch.arange(32) % 10
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_muon_updates_hidden_weights_as_torch_s_does_and_in_any_memory_format(
    precision: Literal["fp32", "bf16"],
) -> None:
    """`--optimizer muon` would not be PyTorch's Muon, or would depend on the memory format."""
    recipe = Recipe(optimizer="muon", lr=0.02, weight_decay=1e-2, precision=precision)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = build_model("resnet18", channels=3, classes=10).to(memory_format=memory_format)
        weight = dict(model.named_parameters())[_hidden(model)]
        optimizer = OPTIMIZERS["muon"](model, recipe)
        torch.manual_seed(1)
        # torch's iteration takes minutes for all of the network, and no weight knows of another.
        weight.grad = torch.randn(weight.shape).to(memory_format=memory_format)
        before = weight.detach().contiguous().flatten(1).clone()
        reference = nn.Parameter(before.clone())
        reference.grad = weight.grad.contiguous().flatten(1).clone()
        theirs = torch.optim.Muon(
            [reference], lr=0.02, weight_decay=1e-2, momentum=0.9, adjust_lr_fn="match_rms_adamw"
        )
        optimizer.step()
        theirs.step()
        # torch's iteration runs in bf16.
        moved, expected = (
            weight.detach().contiguous().flatten(1) - before,
            reference.detach() - before,
        )
        assert float((moved - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("shape", [(16, 144), (50, 20), (8, 8)])
def test_orthogonal_keeps_singular_vectors_and_evens_the_values(
    shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    """Muon's updates would leave the gradient's directions, or follow only its largest ones."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(1, 5, min(shape))
    made = u.T @ orthogonal((u @ torch.diag(values) @ v).to(dtype)).float() @ v.T
    assert float(made.diagonal().min()) > 0.65 and float(made.diagonal().max()) < 1.25
    assert float((made - made.diagonal().diag()).abs().max()) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_muon_updates_matrices_together_as_one_by_one(
    memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, which takes matrices in batches, Muon would make other updates than on a CPU."""
    made: dict[bool, list[torch.Tensor]] = {}
    for together in (False, True):
        monkeypatch.setattr(optim, "_joinable", lambda _, answer=together: answer)
        torch.manual_seed(0)
        model = build_model("resnet18", channels=3, classes=10).to(memory_format=memory_format)
        optimizer = OPTIMIZERS["muon"](model, Recipe(optimizer="muon", lr=0.02))
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        made[together] = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
    for one_by_one, joined in zip(made[False], made[True], strict=True):
        assert float((one_by_one - joined).norm()) < 1e-4 * float(one_by_one.norm())


def test_matrices_of_the_same_shorter_side_are_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon would be slow on a GPU, since it would take the weights one by one."""
    batches = []

    def as_it_is(batch: torch.Tensor) -> torch.Tensor:
        batches.append(tuple(batch.shape))
        return batch

    monkeypatch.setattr(optim, "orthogonal", as_it_is)
    matrices = [torch.randn(shape) for shape in ((4, 9), (5, 5), (9, 4), (4, 6))]
    found = optim.orthogonal_together(matrices)
    assert batches == [(3, 4, 9), (1, 5, 5)]
    assert all(map(torch.equal, found, matrices))


def _hidden(model: nn.Module) -> str:
    return [name for name, p in model.named_parameters() if p.ndim == 4][5]


def test_muon_s_state_is_loaded_onto_the_device_of_the_weights() -> None:
    """A Muon run resumed on a GPU would fail, since its optimizer state would be on the CPU."""
    recipe, network = Recipe(optimizer="muon"), build_model("tiny_v3", channels=1, classes=10)
    optimizer = OPTIMIZERS["muon"](network, recipe)
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()["state"]
    elsewhere = OPTIMIZERS["muon"](network.to("meta"), recipe)
    elsewhere.load_state_dict(elsewhere.state_dict() | {"state": saved})
    loaded = [value for state in elsewhere.state.values() for value in state.values()]
    assert loaded and {value.device.type for value in loaded} == {"meta"}


def test_weight_decay_spares_vectors_unless_asked() -> None:
    """Weight decay would shrink biases and BatchNorm's weights, or the flag for it do nothing."""
    model = build_model("resnet18", channels=3, classes=10)
    decayed, spared = parameter_groups(model, Recipe(weight_decay=0.1))
    assert {p.ndim for p in spared["params"]} == {1} and spared["weight_decay"] == 0
    assert min(p.ndim for p in decayed["params"]) == 2 and decayed["weight_decay"] == 0.1
    (everything,) = parameter_groups(model, Recipe(weight_decay=0.1, decay_norm_and_bias=True))
    assert len(everything["params"]) == len(list(model.parameters()))


def test_moving_average_follows_the_weights_and_swaps_back() -> None:
    """With --ema-decay, wrong weights would be evaluated, or training go on from the average."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    live = dict(model.named_parameters()) | {"1.running_mean": model[1].running_mean}
    average = MovingAverage({name: tensor.detach() for name, tensor in live.items()}, decay=0.5)
    weight = next(model.parameters())
    expected = float(weight.detach())
    for step in range(8):
        with torch.no_grad():
            weight.fill_(float(step))
        average.update(step, torch.zeros(()))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert float(average.average["0.weight"]) == pytest.approx(expected, rel=1e-5)
    average.swap()
    assert float(weight.detach()) == pytest.approx(expected, rel=1e-5)
    average.swap()
    assert float(weight.detach()) == 7.0
