"""The table of networks, and the one function that builds them.

Reading this table loads nothing heavy: a builder is a dotted name that is resolved, and `torch`
imported, only when a network is built. A new network is a function and a row.

`params` counts weights and biases for the home dataset's channels and classes, without BatchNorm's
running statistics.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from distcv.config import InputError, nearest

if TYPE_CHECKING:
    from torch import nn


class Model(NamedTuple):
    """One network of the table."""

    build: str
    """Dotted name of the builder, "package.module:function"."""
    dataset: str
    """The home dataset: the row of `distcv.data.DATASETS` the network was designed for."""
    params: int
    """Trainable parameters at the home dataset's channels and classes."""


MODELS: dict[str, Model] = {
    "tiny_v1": Model("distcv.models.mnist:tiny_v1", "mnist", 24_986),
    "tiny_v2": Model("distcv.models.mnist:tiny_v2", "mnist", 7_538),
    "tiny_v3": Model("distcv.models.mnist:tiny_v3", "mnist", 7_316),
    "plain": Model("distcv.models.mnist:plain", "mnist", 593_200),
    "skeleton": Model("distcv.models.mnist:skeleton", "mnist", 194_884),
    "lighter": Model("distcv.models.mnist:lighter", "mnist", 20_954),
    "batchnorm": Model("distcv.models.mnist:batchnorm", "mnist", 14_390),
    "dropout": Model("distcv.models.mnist:dropout", "mnist", 14_390),
    "gap": Model("distcv.models.mnist:gap", "mnist", 9_490),
    "wide": Model("distcv.models.mnist:wide", "mnist", 6_379_786),
    "compact": Model("distcv.models.mnist:compact", "mnist", 12_854),
    "gap_9k": Model("distcv.models.mnist:gap_9k", "mnist", 9_180),
    "gap_8k": Model("distcv.models.mnist:gap_8k", "mnist", 7_616),
    "vgg8": Model("distcv.models.cifar:vgg8", "cifar10", 1_822_250),
    "resnet18": Model("distcv.models.cifar:resnet18", "cifar10", 11_173_962),
}


def find_model(name: str) -> Model:
    """The row of `MODELS` called `name`, found without importing torch.

    Raises:
        InputError: there is no such network; the message offers the nearest name.
    """
    if name in MODELS:
        return MODELS[name]
    raise InputError(f"unknown model {name!r}: {nearest(name, MODELS)}")


def build_model(name: str, *, channels: int, classes: int, dropout: float = 0.0) -> nn.Module:
    """Build the network `name` with freshly initialised weights, for one device.

    Args:
        name: a key of `MODELS`.
        channels: channels C of the images; the network takes float tensors of shape (N, C, H, W).
        classes: columns of the logits it returns, of shape (N, classes).
        dropout: probability in [0, 1) of zeroing an activation, at each of its dropout layers.

    Raises:
        InputError: the name is unknown, `dropout` is outside [0, 1), or it is above 0 for a
            network that has no dropout layers.
    """
    build: Callable[..., nn.Module] = pkgutil.resolve_name(find_model(name).build)
    if not 0 <= dropout < 1:
        raise InputError(f"dropout = {dropout} is outside [0, 1): set it to a value such as 0.1")
    if "dropout" in inspect.signature(build).parameters:
        return build(channels, classes, dropout)
    if dropout > 0:
        raise InputError(
            f"dropout = {dropout}, but model {name!r} has no dropout layers: "
            "set dropout to 0, or choose a model that has them, such as 'gap' or 'resnet18'"
        )
    return build(channels, classes)
