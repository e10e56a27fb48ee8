"""What a validation of a small network is about: the trained network, its data, and which points are compared.

N training examples, P of them points whose influence is measured, Q test examples that it is measured on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from influence.gauss_newton import Examples, TensorNetwork
from influence.layers import TrackedLayer


@dataclass(frozen=True)
class Problem:
    """A trained network with its training examples, points and measurements.

    The measurement of test example q is f_q(θ) = −L(z_q, θ), so that positive influence lowers its loss. Influence
    of point m on it: ∇f_qᵀ (G + λ)⁻¹ (−∇L(z_m)), the derivative of f_q by the weight ε of Equation 7.

    Attributes:
        network: the model in evaluation mode with its parameters frozen, and its loss; a loss is a sum over outputs.
        layers: tracked: all linear layers and convolutions. What is not tracked (batch norm) is frozen everywhere.
        train: all N training examples; a network in float64 has them in float64.
        points_P: numbers of the training examples whose influence is measured, int64, ascending.
        test: the Q examples whose loss is the measurement.
    """

    network: TensorNetwork
    layers: tuple[TrackedLayer, ...]
    train: Examples
    points_P: Tensor
    test: Examples

    @property
    def size(self) -> int:
        """N."""
        return len(self.train.inputs)

    @property
    def points(self) -> Examples:
        """The P training examples that are compared."""
        return Examples(self.train.inputs[self.points_P], self.train.targets[self.points_P])


def parameters(problem: Problem) -> int:
    """Tracked parameters D."""
    return sum(layer.parameters for layer in problem.layers)


def chosen(count: int, size: int, seed: int, purpose: int) -> Tensor:
    """Numbers of `count` of `size` examples, drawn without replacement and ascending; all of them if there are fewer.

    Args:
        count: how many.
        size: out of how many.
        seed: of the validation.
        purpose: tells apart the draws of one seed: 1 for points, 2 for measurements.
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + purpose)
    return torch.randperm(size, generator=generator)[:count].sort().values
