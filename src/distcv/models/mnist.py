"""Thirteen small networks for MNIST: 28×28 images of one channel, ten classes.

`tiny_*` come from document 000, which gives only their sizes; the others from the layer tables of
001 and 002. Every builder returns a module from images (N, channels, 28, 28) to logits
(N, classes). The documents end in log-softmax and the negative log-likelihood; cross-entropy on
logits is the same function, so no head here holds a softmax.

Dropout layers stay in place at probability 0, so that a network's layer table doesn't depend on
the recipe. Convolutions carry no bias unless a docstring says otherwise.
"""

from torch import nn

from distcv.models.dropout import Dropout


def conv_relu(inputs: int, outputs: int, kernel: int = 3) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, bias=False), nn.ReLU()]


def conv_relu_norm(inputs: int, outputs: int, kernel: int = 3) -> list[nn.Module]:
    return [*conv_relu(inputs, outputs, kernel), nn.BatchNorm2d(outputs)]


def conv_relu_norm_drop(
    inputs: int, outputs: int, dropout: float | None, kernel: int = 3
) -> list[nn.Module]:
    """The block of 001 and 002; `dropout=None` leaves the dropout layer out."""
    drop = [] if dropout is None else [Dropout(dropout)]
    return [*conv_relu_norm(inputs, outputs, kernel), *drop]


def conv_norm_relu(inputs: int, outputs: int, dropout: float, kernel: int = 3) -> list[nn.Module]:
    """The block of `tiny_*`."""
    conv = nn.Conv2d(inputs, outputs, kernel, bias=False)
    return [conv, nn.BatchNorm2d(outputs), Dropout(dropout), nn.ReLU()]


def average_and_flatten() -> list[nn.Module]:
    """Map (N, C, H, W) to (N, C) by the mean over positions.

    After a 7×7 or 3×3 head the map is 1×1 at 28×28 and the mean changes nothing; at larger images
    it keeps the number of logits equal to the number of classes.
    """
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def tiny_v1(channels: int = 1, classes: int = 10, dropout: float = 0.0) -> nn.Sequential:
    """24,986 parameters (document 000, Model v1); the linear head has a bias."""
    return nn.Sequential(
        *conv_norm_relu(channels, 12, dropout),
        *conv_norm_relu(12, 12, dropout),
        *conv_norm_relu(12, 14, dropout),
        *conv_norm_relu(14, 10, dropout, kernel=1),
        nn.MaxPool2d(2),
        *conv_norm_relu(10, 32, dropout),
        *conv_norm_relu(32, 32, dropout),
        *conv_norm_relu(32, 32, dropout),
        *average_and_flatten(),
        nn.Linear(32, classes),
    )


def tiny_v2(channels: int = 1, classes: int = 10, dropout: float = 0.0) -> nn.Sequential:
    """7,538 parameters (document 000, Model v2)."""
    return nn.Sequential(
        *conv_norm_relu(channels, 14, dropout),
        *conv_norm_relu(14, 20, dropout),
        *conv_norm_relu(20, 12, dropout, kernel=1),
        nn.MaxPool2d(2),
        *conv_norm_relu(12, 12, dropout),
        *conv_norm_relu(12, 12, dropout),
        *conv_norm_relu(12, 16, dropout),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(16, classes, 1, bias=False),
        nn.Flatten(),
    )


def tiny_v3(channels: int = 1, classes: int = 10, dropout: float = 0.0) -> nn.Sequential:
    """7,316 parameters (document 000, Model v3)."""
    return nn.Sequential(
        *conv_norm_relu(channels, 8, dropout),
        *conv_norm_relu(8, 16, dropout),
        *conv_norm_relu(16, 10, dropout, kernel=1),
        nn.MaxPool2d(2),
        *conv_norm_relu(10, 10, dropout),
        *conv_norm_relu(10, 12, dropout),
        *conv_norm_relu(12, 32, dropout),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(32, classes, 1, bias=False),
        nn.Flatten(),
    )


def plain(channels: int = 1, classes: int = 10) -> nn.Sequential:
    """593,200 parameters (document 001, "First Step"); every layer has a bias; 28×28 images only.

    The document's table omits the pools and the ReLUs, which were calls and not modules; the
    shapes place a pool after the second and the fourth convolution.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3),
        nn.ReLU(),
        nn.Conv2d(128, 256, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256 * 4 * 4, 50),
        nn.ReLU(),
        nn.Linear(50, classes),
    )


def skeleton(channels: int = 1, classes: int = 10) -> nn.Sequential:
    """194,884 parameters (document 001, "Basic Model Skeleton")."""
    return nn.Sequential(
        *conv_relu(channels, 32),
        *conv_relu(32, 64),
        *conv_relu(64, 128),
        nn.MaxPool2d(2),
        *conv_relu(128, 32, kernel=1),
        *conv_relu(32, 64),
        *conv_relu(64, 128),
        *conv_relu(128, 10, kernel=1),
        nn.Conv2d(10, classes, 7, bias=False),
        *average_and_flatten(),
    )


def lighter(channels: int = 1, classes: int = 10) -> nn.Sequential:
    """20,954 parameters (document 001, "Lighter Model")."""
    return nn.Sequential(
        *conv_relu(channels, 10),
        *conv_relu(10, 16),
        *conv_relu(16, 16),
        nn.MaxPool2d(2),
        *conv_relu(16, 16, kernel=1),
        *conv_relu(16, 24),
        *conv_relu(24, 24),
        *conv_relu(24, 16, kernel=1),
        nn.Conv2d(16, classes, 7, bias=False),
        *average_and_flatten(),
    )


def gap_body(channels: int, outputs: int, dropout: float | None) -> list[nn.Module]:
    """(N, channels, 28, 28) to (N, outputs, 7, 7): what `batchnorm`, `dropout` and `gap` share."""
    return [
        *conv_relu_norm_drop(channels, 10, dropout),
        *conv_relu_norm_drop(10, 10, dropout),
        *conv_relu_norm_drop(10, 10, dropout),
        nn.MaxPool2d(2),
        *conv_relu_norm_drop(10, 16, dropout, kernel=1),
        *conv_relu_norm_drop(16, 16, dropout),
        *conv_relu_norm_drop(16, 32, dropout),
        *conv_relu_norm_drop(32, outputs, dropout, kernel=1),
    ]


def batchnorm(channels: int = 1, classes: int = 10) -> nn.Sequential:
    """14,390 parameters (document 001, "With BatchNorm"): `gap` with a 7×7 convolution as head.

    The section is empty; the one on GAP says that a network of 14.4k parameters came before it.
    """
    head = nn.Conv2d(10, classes, 7, bias=False)
    return nn.Sequential(*gap_body(channels, 10, dropout=None), head, *average_and_flatten())


def dropout(channels: int = 1, classes: int = 10, dropout: float = 0.0) -> nn.Sequential:
    """14,390 parameters (document 001, "With Dropout"): `batchnorm` with dropout layers."""
    head = nn.Conv2d(10, classes, 7, bias=False)
    return nn.Sequential(*gap_body(channels, 10, dropout), head, *average_and_flatten())


def gap(channels: int = 1, classes: int = 10, dropout: float = 0.0) -> nn.Sequential:
    """9,490 parameters (document 001, "GAP"): global average pooling in place of the 7×7 head."""
    return nn.Sequential(*gap_body(channels, classes, dropout), *average_and_flatten())


def wide(channels: int = 1, classes: int = 10) -> nn.Sequential:
    """6,379,786 parameters (document 002, Model-1); every convolution has a bias, the first four
    are padded. The document's table omits the ReLUs, which were calls and not modules.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(128, 256, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(256, 512, 3),
        nn.ReLU(),
        nn.Conv2d(512, 1024, 3),
        nn.ReLU(),
        nn.Conv2d(1024, classes, 3),
        *average_and_flatten(),
    )


def compact(channels: int = 1, classes: int = 10, dropout: float = 0.0) -> nn.Sequential:
    """12,854 parameters (document 002, Model-2); BatchNorm and dropout before the pool only."""
    return nn.Sequential(
        *conv_relu_norm_drop(channels, 10, dropout),
        *conv_relu_norm_drop(10, 32, dropout),
        *conv_relu_norm_drop(32, 10, dropout),
        nn.MaxPool2d(2),
        *conv_relu(10, 10, kernel=1),
        *conv_relu(10, 10),
        *conv_relu(10, 10),
        *conv_relu(10, 10, kernel=1),
        nn.Conv2d(10, classes, 7, bias=False),
        *average_and_flatten(),
    )


def gap_9k(channels: int = 1, classes: int = 10, dropout: float = 0.0) -> nn.Sequential:
    """9,180 parameters (document 002, Model-3)."""
    return nn.Sequential(
        *conv_relu_norm_drop(channels, 12, dropout),
        *conv_relu_norm_drop(12, 16, dropout),
        *conv_relu_norm_drop(16, 12, dropout),
        nn.MaxPool2d(2),
        *conv_relu_norm_drop(12, 16, dropout),
        *conv_relu_norm_drop(16, 16, dropout),
        nn.Conv2d(16, classes, 3, bias=False),
        *average_and_flatten(),
    )


def gap_8k(channels: int = 1, classes: int = 10, dropout: float = 0.0) -> nn.Sequential:
    """7,616 parameters (document 002, Model-4); its 1×1 convolution stands alone."""
    return nn.Sequential(
        *conv_relu_norm(channels, 8),
        *conv_relu_norm(8, 16),
        nn.Conv2d(16, 16, 1, bias=False),
        *conv_relu_norm_drop(16, 16, dropout),
        nn.MaxPool2d(2),
        *conv_relu_norm(16, 12),
        *conv_relu_norm_drop(12, 10, dropout),
        nn.Conv2d(10, classes, 3, bias=False),
        *average_and_flatten(),
    )
