"""Networks of Appendix C: two hidden layers for tables and digits, ResNet-20 for CIFAR-10. All weights of linear layers
and convolutions are tracked; batch norm is not, and keeps what it learnt: networks stand in evaluation mode.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from conf.schema import Subject
from influence.gauss_newton import TensorNetwork
from influence.layers import TrackedLayer
from influence.output_losses import SoftmaxCrossEntropy, SquaredError
from pipelines.validation.datasets import SETS, Table

REGRESSION_WIDTH = 128
DIGITS_WIDTH = 256
STAGES = (16, 32, 64)  # channels of ResNet-20
BLOCKS = 3  # a stage, of two convolutions each


@dataclass(frozen=True)
class Built:
    """A network with fresh weights, in evaluation mode and frozen, and its tracked layers."""

    network: TensorNetwork
    layers: tuple[TrackedLayer, ...]


def build(subject: Subject, inputs: int, outputs: int, seed: int, dtype: torch.dtype | None = None) -> Built:
    """A network for a data set, with the first weights of a seed.

    Args:
        subject: of `pipelines.validation.datasets.SETS`.
        inputs: features, or channels of images.
        outputs: targets of a regression, or classes.
        seed: of the first weights; those of a seed are the same in any type, up to rounding.
        dtype: of the weights; float64 for regressions and float32 for images if None.
    """
    regression = isinstance(SETS[subject], Table)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if subject is Subject.cifar10:
            model: nn.Module = ResNet20(inputs, outputs)
        else:
            width, activation = (REGRESSION_WIDTH, nn.Tanh) if regression else (DIGITS_WIDTH, nn.ReLU)
            model = two_hidden_layers(inputs, width, outputs, activation)
    model.to(dtype or (torch.float64 if regression else torch.float32)).eval().requires_grad_(False)
    return Built(TensorNetwork(model, SquaredError() if regression else SoftmaxCrossEntropy()), tracked(model))


def two_hidden_layers(inputs: int, width: int, outputs: int, activation: type[nn.Module]) -> nn.Module:
    """A multilayer perceptron."""
    return nn.Sequential(
        OrderedDict(
            hidden1=nn.Linear(inputs, width),
            activation1=activation(),
            hidden2=nn.Linear(width, width),
            activation2=activation(),
            output=nn.Linear(width, outputs),
        )
    )


def tracked(model: nn.Module) -> tuple[TrackedLayer, ...]:
    """All linear layers and convolutions, in the order of the module tree, each with an input of its own.

    The inputs of a convolution are a patch: channels times the size of the kernel.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            outputs, inputs = module.weight.flatten(1).shape
            found.append(TrackedLayer(name, (name,), inputs, outputs, module.bias is not None, False, name))
    return tuple(found)


class ResNet20(nn.Module):
    """He et al. (2016), Section 4.2, for 32 × 32 images: 3 stages of 3 blocks with 16, 32 and 64 channels.

    Shortcuts between stages have no weights (their option A). Weights are drawn as He et al. (2015) do.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, STAGES[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(STAGES[0])
        blocks, before = [], STAGES[0]
        for stage, width in enumerate(STAGES):
            for block in range(BLOCKS):
                blocks.append(Residual(before, width, stride=2 if stage and not block else 1))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.output = nn.Linear(STAGES[-1], classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Scores of the classes, [B, C]."""
        act = functional.relu(self.norm(self.convolution(x_BCHW)))
        return self.output(self.blocks(act).mean((2, 3)))


class Residual(nn.Module):
    """Two convolutions with batch norm, and the input added; where it grows, every other pixel and zeros."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.convolution1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.convolution2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.stride, self.added = stride, width - channels

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, width, H / stride, W / stride]."""
        act = functional.relu(self.norm1(self.convolution1(x_BCHW)))
        shortcut = functional.pad(x_BCHW[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return functional.relu(self.norm2(self.convolution2(act)) + shortcut)
