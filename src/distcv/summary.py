"""Print a network's layer table: `python -m distcv.summary --model resnet18`.

The network runs on torch's meta device, which computes shapes and no values, so any batch size
is free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from distcv.command import run_command
from distcv.command_line import parse_arguments
from distcv.config import Strict
from distcv.data import DATASETS
from distcv.models import MODELS, build_model, find_model

if TYPE_CHECKING:
    from torch import nn

MEGABYTE = 2**20


class SummaryArguments(Strict):
    """What to summarise."""

    model: str = Field(description=f"The network: {', '.join(MODELS)}.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout probability, in networks that have dropout layers."
    )
    batch_size: int = Field(
        1, ge=1, le=65_536, description="Images in the batch whose shapes are shown."
    )


def layer_table(model: nn.Module, input_shape: tuple[int, ...]) -> str:
    """The layers of `model` in the order in which they run, and its totals.

    Args:
        model: a network on the meta device.
        input_shape: shape (N, C, H, W) of the batch of images.

    Returns:
        One row a layer: type, indented below the block it belongs to, output shape, parameters.
        Then parameters, multiply-accumulates of the convolutions and linear layers for one
        image, and sizes in memory at 32 bits a number and 2^20 bytes a MB. The forward/backward
        size counts every row's output twice, as the documents do: for its value and its gradient.
    """
    import torch
    import torchinfo
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

    def is_layer(info: torchinfo.layer_info.LayerInfo) -> bool:
        return info.depth > 0 and type(info.module) not in (nn.Sequential, nn.Identity)

    stats = torchinfo.summary(model, input_shape, depth=99, device="meta", verbose=0)
    layers = [info for info in stats.summary_list if is_layer(info)]
    rows = []
    for layer in layers:
        name, parent = layer.class_name, layer.parent_info
        while parent is not None:
            name = "  " * is_layer(parent) + name
            parent = parent.parent_info
        parameters = layer.num_params_to_str(reached_max_depth=False)
        rows.append(f"{name:<28}{layer.output_size!s:>24}{parameters:>16}")

    # torchinfo adds biases and BatchNorm to its multiply-adds; the convention of papers doesn't.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(input_shape, device="meta"))
    macs = counter.get_total_flops() / 2 / input_shape[0]

    sizes = {
        "Input": stats.total_input,
        "Forward/backward": sum(2 * layer.output_bytes for layer in layers),
        "Parameters": stats.total_param_bytes,
    }
    sizes["Total"] = sum(sizes.values())
    line = "-" * 68
    return "\n".join(
        [
            f"{'Layer':<28}{'Output shape':>24}{'Parameters':>16}",
            line,
            *rows,
            line,
            f"Parameters: {stats.total_params:,}",
            f"Trainable parameters: {stats.trainable_params:,}",
            f"Non-trainable parameters: {stats.total_params - stats.trainable_params:,}",
            f"Forward MACs per image: {macs / 1e6:,.1f} M",
            *(f"{name} size: {size / MEGABYTE:,.2f} MB" for name, size in sizes.items()),
        ]
    )


def main() -> None:
    arguments = parse_arguments(
        SummaryArguments, prog="distcv.summary", description="Print a network's layer table."
    )
    # Before torch, which takes seconds to import: a misspelt name should be refused at once.
    home = DATASETS[find_model(arguments.model).dataset]

    import torch

    with torch.device("meta"):
        model = build_model(
            arguments.model,
            channels=home.shape[0],
            classes=len(home.classes),
            dropout=arguments.dropout,
        )
    print(layer_table(model, (arguments.batch_size, *home.shape)))


def command() -> None:
    """Entry point: :func:`main`, and its exit code."""
    run_command(main)


if __name__ == "__main__":
    command()
