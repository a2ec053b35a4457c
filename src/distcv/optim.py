"""Optimizers, the learning rate as a function of the step, and the moving average of weights."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim.adamw import adamw as adamw_update

from distcv.config import Recipe


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The model's parameters in groups with and without weight decay.

    Unless ``decay_norm_and_bias``, vectors (BatchNorm's weights and all biases) are not decayed:
    He et al., "Bag of Tricks" (2019).
    """
    weights = [p for p in model.parameters() if p.ndim > 1 or recipe.decay_norm_and_bias]
    vectors = [p for p in model.parameters() if p.ndim <= 1 and not recipe.decay_norm_and_bias]
    groups = [
        {"params": weights, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Kept:
    """Copies of tensors, to be put back if a step turns out to be bad; nobody waits to know it.

    Of tensors in pieces (FSDP2's), those that this process holds.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        held = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
        self.tensors = [t.detach() for t in held]
        self.copies = [torch.empty_like(t) for t in self.tensors]
        torch._foreach_copy_(self.copies, self.tensors)

    def put_back_if(self, bad: Tensor) -> None:
        """Put the copies back if ``bad``, a bool () on the device, is true."""
        for tensor, copy in zip(self.tensors, self.copies, strict=True):
            torch.where(bad, copy, tensor, out=tensor)


class SGD(torch.optim.SGD):
    """torch's, which changes nothing in a step for which ``found_inf``, a float (), is 1.

    torch's own knows that in its fused form alone, and there it would leave the memory of new
    momentum as it found it (torch 2.14). So the momentum begins as zeros, of which the first step
    makes the same.
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        if self.defaults["momentum"]:
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        bad = self.found_inf
        if bad is None or self.param_groups[0]["fused"]:
            super().step()
            return
        before = Kept([*params, *(t for p in params for t in self.state[p].values())])
        self.found_inf = None
        super().step()
        before.put_back_if(bad.bool())


def sgd(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with (Nesterov) momentum, one fused kernel over all parameters."""
    return SGD(
        parameter_groups(model, recipe),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        fused=True,
    )


def adamw(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), one fused kernel over all parameters."""
    return torch.optim.AdamW(
        parameter_groups(model, recipe), lr=recipe.lr, betas=recipe.adam_betas, fused=True
    )


class MuonAdamW(torch.optim.Optimizer):
    """Muon on hidden weights taken as matrices, AdamW on all other parameters.

    A convolution's weight (O, I, H, W) is the matrix (O, I·H·W). Updates of Muon are scaled to the
    root mean square of AdamW's, so that one learning rate serves both (Liu et al., "Muon is
    scalable for LLM training", 2025; K. Jordan, "Muon", 2024). A group's key ``muon`` says whose
    it is. Orthogonal factors are computed in bf16; on CPUs, many of which only emulate it, in fp32
    unless ``bf16``. AdamW's update is torch's own; its Muon takes matrices only, and is slow on
    CPUs. A step for which ``found_inf``, a float () on the device, is 1 changes nothing, as in
    torch's fused ones.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, momentum: float, nesterov: bool,
        betas: tuple[float, float], bf16: bool,
    ) -> None:  # fmt: skip
        self.bf16 = bf16
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "betas": betas}
        defaults["fused"] = True  # by which load_state_dict puts the counters on the device
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            if params := [p for p in group["params"] if p.grad is not None]:
                (self._step_muon if group["muon"] else self._step_adamw)(group, params)

    def _step_muon(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        gradients = [p.grad for p in params if p.grad is not None]
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        before = Kept([*params, *buffers])
        lr, momentum = group["lr"], group["momentum"]
        weights, gradients, averages = (
            [_matrix(t) for t in tensors] for tensors in (params, gradients, buffers)
        )
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        updates = averages
        if group["nesterov"]:
            updates = [g.lerp(a, momentum) for g, a in zip(gradients, averages, strict=True)]
        if self.bf16 or updates[0].device.type != "cpu":
            updates = [update.bfloat16() for update in updates]
        together = _joinable(updates[0])
        factors = orthogonal_together(updates) if together else map(orthogonal, updates)
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        for weight, factor in zip(weights, factors, strict=True):
            weight.add_(factor, alpha=-lr * 0.2 * math.sqrt(max(weight.shape)))
        if self.found_inf is not None:
            before.put_back_if(self.found_inf.bool())

    def _step_adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        states = [self.state[p] for p in params]
        adamw_update(
            params,
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
            found_inf=self.found_inf,
        )


def orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal factor of a matrix (M, N), roughly: its singular values become 0.7 to 1.2.

    Of each in a batch (B, M, N), too. Five steps of the quintic Newton-Schulz iteration of
    K. Jordan, "Muon" (2024), for which bf16 is precise enough.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    add_product = torch.addmm if matrix.ndim == 2 else torch.baddbmm
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def orthogonal_together(matrices: list[Tensor]) -> list[Tensor]:
    """The orthogonal factors of matrices, at once of all whose shorter sides are the same.

    Their longer sides are made the same by zeros, which stay zeros and change nothing else.
    """
    wide = [m.T if m.shape[0] > m.shape[1] else m for m in matrices]
    factors = list(wide)
    for rows in sorted({m.shape[0] for m in wide}):
        places = [i for i, m in enumerate(wide) if m.shape[0] == rows]
        batch = pad_sequence([wide[i].T for i in places], batch_first=True).mT
        for factor, i in zip(orthogonal(batch), places, strict=True):
            factors[i] = factor[:, : wide[i].shape[1]]
    return [f.T if m.shape[0] > m.shape[1] else f for f, m in zip(factors, matrices, strict=True)]


def _joinable(matrix: Tensor) -> bool:
    """Whether matrices are better taken together: where launches cost, and they lie here whole."""
    return matrix.device.type != "cpu" and not hasattr(matrix, "to_local")


def _matrix(weight: Tensor) -> Tensor:
    """A view as a matrix that shares memory; the order of its columns is of no consequence."""
    weight = weight.detach()
    if weight.ndim == 4 and not weight.is_contiguous():
        weight = weight.permute(0, 2, 3, 1)
    return weight.flatten(1)


def muon_adamw(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """:class:`MuonAdamW`: the first weight (from pixels) and the last (to classes) are AdamW's."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    hidden = {id(p) for p in weights[1:-1]}
    groups = []
    for group in parameter_groups(model, recipe):
        matrices = [p for p in group["params"] if id(p) in hidden]
        others = [p for p in group["params"] if id(p) not in hidden]
        groups += [
            group | {"params": params, "muon": is_muon}
            for params, is_muon in ((matrices, True), (others, False))
            if params
        ]
    return MuonAdamW(
        groups,
        lr=recipe.lr,
        betas=recipe.adam_betas,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        bf16=recipe.precision == "bf16",
    )


OPTIMIZERS: dict[str, Callable[[nn.Module, Recipe], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "adamw": adamw,
    "muon": muon_adamw,
}


def lr_at(step: int, recipe: Recipe, steps_per_epoch: int, total_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0 to ``total_steps`` - 1).

    The warm-up is linear; what follows is the recipe's ``schedule``: ``cosine`` (Loshchilov and
    Hutter 2017) and ``onecycle`` (Smith and Topin 2018, in its triangular form) come down to
    ``final_lr_factor``; ``step`` and ``multistep`` multiply by ``lr_gamma`` at whole epochs.
    """
    warmup = recipe.warmup * total_steps
    if step < warmup:
        start = recipe.initial_lr_factor
        return recipe.lr * (start + (1 - start) * (step + 1) / (warmup + 1))
    left = 1 - (step - warmup) / max(1.0, total_steps - warmup)
    low, epoch = recipe.final_lr_factor, step // steps_per_epoch
    match recipe.schedule:
        case "constant":
            factor = 1.0
        case "onecycle":
            factor = low + (1 - low) * left
        case "cosine":
            factor = low + (1 - low) * (1 - math.cos(math.pi * left)) / 2
        case "step":
            factor = recipe.lr_gamma ** (epoch // recipe.lr_step_epochs)
        case "multistep":
            factor = recipe.lr_gamma ** sum(epoch >= at for at in recipe.lr_milestones)
    return recipe.lr * factor


class MovingAverage:
    """Exponential moving average of a model's parameters and of BatchNorm's running statistics.

    In the first steps the decay is lower, (1 + n) / (10 + n), so that the average does not hang on
    to the initial weights. torch's AveragedModel is not used: it reads a counter from the device
    in every step, which makes the host wait. ``live`` are the tensors to follow, by name, in the
    memory that the optimizer writes to.
    """

    def __init__(self, live: dict[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.live = live
        self.average = {name: tensor.clone() for name, tensor in live.items()}

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor) -> None:
        """Take in the weights after optimizer step ``step`` (the first is 0).

        Unless ``skipped``, a float () on the device, is 1; it is 0 otherwise.
        """
        weight = (1 - min(self.decay, (1 + step) / (10 + step))) * (1 - skipped)
        average = list(self.average.values())
        # Not _foreach_lerp_: on a GPU it takes tensor by tensor where the weight is a tensor.
        change = torch._foreach_sub(list(self.live.values()), average)
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(average, change)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's tensors with the averaged ones; a second call changes them back."""
        for name, tensor in self.live.items():
            held = tensor.clone()
            tensor.copy_(self.average[name])
            self.average[name].copy_(held)
