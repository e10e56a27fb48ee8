"""Plain networks for the tests of validation, with tracked layers written out by hand, and their dense Jacobians.

B examples, C outputs, P parameters of all tracked layers: vec of each layer's [O, I] one after the other, rows first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from influence.gauss_newton import Examples, TensorNetwork, Vectors
from influence.layers import TrackedLayer
from influence.output_losses import OutputLoss, SoftmaxCrossEntropy, SquaredError


@dataclass(frozen=True)
class Plain:
    """A network in float64, its tracked layers and some examples."""

    network: TensorNetwork
    layers: tuple[TrackedLayer, ...]
    examples: Examples

    def parts(self, size: int) -> list[Examples]:
        """The examples in micro-batches."""
        x, y = self.examples.inputs, self.examples.targets
        return [Examples(x[at : at + size], y[at : at + size]) for at in range(0, len(x), size)]

    def vectors(self, count: int, seed: int = 0) -> Vectors:
        """Random vectors over the tracked parameters."""
        generator = torch.Generator().manual_seed(seed)
        return {
            layer.name: torch.randn(count, layer.outputs, layer.columns, generator=generator, dtype=torch.float64)
            for layer in self.layers
        }

    def flat(self, vectors: Vectors) -> Tensor:
        """[K, P]."""
        return torch.cat([vectors[layer.name].flatten(1) for layer in self.layers], dim=1)

    def matrix(self, function: Callable[[Vectors], Vectors]) -> Tensor:
        """A linear function of vectors written out, [P, P]."""
        sizes = [layer.parameters for layer in self.layers]
        parts = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, dim=1)
        unit = {
            layer.name: part.unflatten(1, (layer.outputs, layer.columns))
            for layer, part in zip(self.layers, parts, strict=True)
        }
        return self.flat(function(unit))

    @property
    def increasing(self) -> dict[str, float]:
        """λ by layer, another one for each."""
        return {layer.name: 0.05 * (1 + number) for number, layer in enumerate(self.layers)}

    def jacobian(self) -> Tensor:
        """[B, C, P], by autograd of the parameters themselves."""
        named = dict(self.network.model.named_parameters())
        tracked = {
            f"{layer.name}.{part}"
            for layer in self.layers
            for part in (("weight", "bias") if layer.bias else ("weight",))
        }
        chosen = {name: value for name, value in named.items() if name in tracked}
        found = jacrev(lambda given: functional_call(self.network.model, {**named, **given}, (self.examples.inputs,)))(
            chosen
        )
        return torch.cat([self._columns(layer, found) for layer in self.layers], dim=-1)

    def gauss_newton(self) -> Tensor:
        """The matrix [P, P], the mean over examples of Jᵀ H J, H by autograd of the loss."""
        J_BCP, outputs = self.jacobian(), self.network.model(self.examples.inputs).detach()
        total = torch.zeros(J_BCP.shape[-1], J_BCP.shape[-1], dtype=torch.float64)
        for J_CP, output_C, target in zip(J_BCP, outputs, self.examples.targets, strict=True):
            total += J_CP.T @ output_hessian(self.network.loss, output_C, target) @ J_CP
        return total / len(outputs)

    def damped(self, damping: dict[str, float]) -> Tensor:
        """G + λ, each layer with its own λ."""
        numbers = [torch.full((layer.parameters,), damping[layer.name], dtype=torch.float64) for layer in self.layers]
        return self.gauss_newton() + torch.diag(torch.cat(numbers))

    def solve(self, damping: dict[str, float], vectors: Vectors) -> Tensor:
        """(G + λ)⁻¹ V by a dense solve, [K, P]."""
        return torch.linalg.solve(self.damped(damping), self.flat(vectors).T).T

    def _columns(self, layer: TrackedLayer, found: dict[str, Tensor]) -> Tensor:
        weight = found[f"{layer.name}.weight"].flatten(3)  # [B, C, O, I]
        if layer.bias:
            weight = torch.cat([weight, found[f"{layer.name}.bias"][..., None]], dim=-1)
        return weight.flatten(2)


def output_hessian(loss: OutputLoss, output_C: Tensor, target: Tensor) -> Tensor:
    """∂²L/∂ŷ² of one example, by autograd of the loss's value."""
    return torch.func.hessian(lambda given: loss.value(given[None], target[None])[0])(output_C)


def mlp(loss: str = "softmax", examples: int = 24, hidden: int = 5, frozen_first: bool = False) -> Plain:
    """Two hidden layers with Tanh; five inputs, three outputs or classes."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(
        nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 3, bias=False)
    ).double()
    layers = (linear("0", 4, hidden), linear("2", hidden, hidden), linear("4", hidden, 3, bias=False))
    x = torch.randn(examples, 4, generator=generator, dtype=torch.float64)
    return _plain(model, layers[frozen_first:], x, loss, generator)


def convolutional(loss: str = "softmax") -> Plain:
    """A strided convolution with a bias, a batch norm in evaluation mode, a second convolution, and a linear head."""
    generator = torch.Generator().manual_seed(4)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 3),
    ).double()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_(generator=generator)
    norm.running_var.uniform_(0.5, 2, generator=generator)
    layers = (
        TrackedLayer("0", ("0",), 2 * 9, 4, True, False, "0"),
        TrackedLayer("3", ("3",), 4 * 9, 3, False, False, "3"),
        linear("7", 3, 3),
    )
    x = torch.randn(6, 2, 6, 6, generator=generator, dtype=torch.float64)
    return _plain(model, layers, x, loss, generator)


def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> TrackedLayer:
    """A tracked linear layer of its own input."""
    return TrackedLayer(name, (name,), inputs, outputs, bias, False, name)


def _plain(
    model: nn.Module, layers: tuple[TrackedLayer, ...], x: Tensor, loss: str, generator: torch.Generator
) -> Plain:
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scale = 0.5 if parameter.dim() == 1 else 1.2 / parameter[0].numel() ** 0.5
        parameter.data = scale * noise
    model.eval().requires_grad_(False)
    if loss == "softmax":
        targets = torch.randint(3, (len(x),), generator=generator)
        return Plain(TensorNetwork(model, SoftmaxCrossEntropy()), layers, Examples(x, targets))
    targets = torch.randn(len(x), 3, generator=generator, dtype=torch.float64)
    return Plain(TensorNetwork(model, SquaredError()), layers, Examples(x, targets))
