"""Two networks for CIFAR: 32×32 images of three channels, logits of shape (N, classes).

`resnet18` is the network of document 004, after He et al., "Deep Residual Learning for Image
Recognition" (2016); `vgg8` that of document 003, in the manner of Simonyan and Zisserman, "Very
Deep Convolutional Networks for Large-Scale Image Recognition" (2015). The documents end in
log-softmax and the negative log-likelihood; cross-entropy on logits is the same function, so no
head here holds a softmax.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from distcv.models.dropout import Dropout


def conv_norm(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dropout: float = 0.0
) -> nn.Sequential:
    """Padded bias-free convolution → BatchNorm (→ dropout): (N, inputs, H, W) to
    (N, outputs, ⌈H/stride⌉, ⌈W/stride⌉).
    """
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    block = nn.Sequential(conv, nn.BatchNorm2d(outputs))
    if dropout > 0:
        # Last in its block, so that parameter names don't depend on it: weights trained with
        # dropout load into the network without it.
        block.append(Dropout(dropout))
    return block


class BasicBlock(nn.Module):
    """Two 3×3 convolutions added to a shortcut, which is a 1×1 convolution where shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.first = conv_norm(inputs, outputs, 3, stride, dropout)
        self.second = conv_norm(outputs, outputs, 3, 1, dropout)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = conv_norm(inputs, outputs, 1, stride, dropout)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.second(F.relu(self.first(x)))
        return F.relu(residual + self.shortcut(x))


class ResNet(nn.Module):
    """3×3 stem, four stages of two basic blocks, mean over positions, linear head.

    Images are (N, channels, H, W) of any size; the stages leave 512 maps of about H/8 × W/8.
    """

    def __init__(self, channels: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.stem = conv_norm(channels, 64)
        self.stages = nn.Sequential()
        inputs = 64
        for outputs, stride in [(64, 1), (128, 2), (256, 2), (512, 2)]:
            self.stages.append(BasicBlock(inputs, outputs, stride, dropout))
            self.stages.append(BasicBlock(outputs, outputs, 1, dropout))
            inputs = outputs
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stages(F.relu(self.stem(images)))
        logits: Tensor = self.head(maps.mean(dim=(2, 3)))
        return logits


def resnet18(channels: int = 3, classes: int = 10, dropout: float = 0.0) -> ResNet:
    """The CIFAR ResNet-18, 11,173,962 parameters (document 004).

    `dropout` above 0 puts a dropout layer after each BatchNorm of the blocks, none in the stem.
    """
    return ResNet(channels, classes, dropout)


def vgg8(channels: int = 3, classes: int = 10, dropout: float = 0.0) -> nn.Sequential:
    """Eight convolutions in four pairs, 1,822,250 parameters (document 003); 32×32 images only.

    The document gives the order of the layers and not their widths, which are chosen here.
    """
    layers: list[nn.Module] = []
    inputs = channels
    for pair in [(32, 64), (96, 96), (192, 192), (256, 256)]:
        for outputs in pair:
            layers += [*conv_norm(inputs, outputs), nn.ReLU()]
            inputs = outputs
        layers += [Dropout(dropout), nn.MaxPool2d(2)]
    # Four pools leave 2×2 of 32×32.
    head = [nn.Linear(inputs * 2 * 2, 128), nn.ReLU(), nn.Linear(128, classes)]
    return nn.Sequential(*layers, nn.Flatten(), *head)
