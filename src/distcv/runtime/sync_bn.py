"""BatchNorm over the whole batch, wherever its samples lie."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

OVER = (0, 2, 3)  # the dimensions of (N, C, H, W) over which a channel has its statistics


class _Standardize(torch.autograd.Function):
    """(x - mean) / √(variance + eps) per channel, with the statistics over all processes.

    A mean and a sum of squared deviations per process are combined as by Chan, Golub and LeVeque
    ("Updating formulae and a pairwise algorithm for computing sample variances", 1979): nothing
    cancels if a channel's mean is far larger than its deviation, and shares weigh by their size.
    One gather forward, one sum backward; the latter only if x needs a gradient, which is so on all
    processes or on none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count = x.numel() // x.shape[1]
        mean = x.sum(OVER) / max(count, 1)  # a process may have no sample at all
        result = x - mean.view(-1, 1, 1)
        squares = result.square().sum(OVER)
        size = torch.tensor([count], dtype=torch.float64)
        share = torch.cat([size, mean, squares])
        shares = share.new_empty(dist.get_world_size() * len(share))
        dist.all_gather_into_tensor(shares, share)
        counts, means, squared = shares.view(-1, len(share)).tensor_split([1, 1 + len(mean)], 1)
        total = counts.sum()
        whole_mean = (counts * means).sum(0) / total
        variance = (squared + counts * (means - whole_mean).square()).sum(0) / total
        scale = (variance + eps).rsqrt().to(x.dtype)
        result += (mean - whole_mean).to(x.dtype).view(-1, 1, 1)
        result *= scale.view(-1, 1, 1)
        ctx.save_for_backward(result, scale, total)
        ctx.mark_non_differentiable(whole_mean, variance, total)
        return result, whole_mean, variance, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        result, scale, total = ctx.saved_tensors
        sums = torch.stack([grad.sum(OVER), (grad * result).sum(OVER)]).double()
        dist.all_reduce(sums)
        along_ones, along_result = (sums / total).to(grad.dtype)[..., None, None]
        return (grad - along_ones - result * along_result) * scale.view(-1, 1, 1), None


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that trains on statistics over all processes of the default group.

    The output, the input's gradient and the running statistics are those of one process that has
    the whole batch. Gradients of weight and bias are this process's terms of their sums, as the
    strategies expect that add up or average gradients. Statistics are taken in fp32 at least.
    In evaluation, and where there is one process, it is nn.BatchNorm2d.

    Raises:
        ValueError: the whole batch has one value per channel, or an input is not (N, C, H, W).
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        x: Tensor = input.to(torch.promote_types(input.dtype, torch.float32))
        x, mean, variance, total = _Standardize.apply(x, self.eps)
        if total < 2:
            raise ValueError("BatchNorm needs more than one value per channel to train on")
        self._track(mean, variance * (total / (total - 1)))
        if self.weight is not None:
            x = x * self.weight.view(-1, 1, 1)
        if self.bias is not None:
            x = x + self.bias.view(-1, 1, 1)
        return x.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Take a batch into the running statistics; ``variance`` is the unbiased one."""
        if not self.track_running_stats:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        # Without a momentum, the running statistics are the mean of all batches.
        momentum = self.momentum if self.momentum is not None else 1 / int(self.num_batches_tracked)
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            assert running is not None
            running.lerp_(new.to(running.dtype), momentum)


def convert(network: nn.Module, device: torch.device) -> nn.Module:
    """Make every BatchNorm of a network take its statistics over all processes.

    Parameters and buffers stay the same objects under the same names. The network is changed in
    place and returned; off the CPU a network that is itself a BatchNorm is returned as another
    object. There the layers are torch's own nn.SyncBatchNorm, which refuses to work on the CPU.

    Raises:
        TypeError: a kind of BatchNorm other than nn.BatchNorm2d, on the CPU.
    """
    if device.type != "cpu":
        to_shared: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
        return to_shared(network)
    for name, module in network.named_modules():
        if type(module) is nn.BatchNorm2d:
            # A layer that only changes its class keeps its tensors, hooks and place.
            module.__class__ = SharedBatchNorm2d
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(
            module, SharedBatchNorm2d
        ):
            raise TypeError(f"{name}: {type(module).__name__} can't be shared among processes")
    return network
