"""The proximal Bregman objective (Equation 7) of many added points side by side: its value, gradient and response.

    PBO(θ) = 1/N Σ_i D_L(h(θ, x_i), h(θˢ, x_i)) + ε L(z_m, θ) + Σ_ℓ λ_ℓ/2 ‖θ_ℓ − θˢ_ℓ‖²

over the weights of the tracked layers; all others stay. It is written in u with θ = θˢ + ε u, the response of the
weights, whose size does not depend on ε:

    ∇_θ PBO / ε = λ u + ∇L(z_m, θ) + 1/(N ε) Σ_i J_iᵀ (∇L(h(θ, x_i)) − ∇L(h(θˢ, x_i))).

Legend: S points side by side, B examples of a micro-batch, N of them in all; u: vectors by layer, [S, O, I], the bias
last. g = ∇L(z_m, θˢ), the gradient at u = 0. G is the Gauss-Newton matrix at θˢ.

When it has converged. The Hessian is about G + λ, so u is off its optimum by about √(∇ᵀ(G + λ)⁻¹∇) in the norm of
G + λ, in which the response itself has the length √(−gᵀu). Their ratio, with M⁻¹ for (G + λ)⁻¹, is the *relative
gradient*. If M lies below G + λ (`influence.dominant`) it is no less than the relative error of u. The Euclidean norm
of the gradient does not tell: where curvature is small, responses are largest and gradients next to nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from influence.batch import DUMMY
from influence.capture import Capture, Use, homogeneous
from influence.gauss_newton import Examples, Network, Vectors, input_rows, output_rows
from influence.layers import TrackedLayer
from influence.output_losses import OutputLoss

M = TypeVar("M")


@dataclass(frozen=True)
class Proximal(Generic[M]):
    """What the objectives of all points share.

    Attributes:
        network: θˢ, in evaluation mode, its parameters frozen; of any type.
        layers: tracked; only they move.
        damping: λ by layer, positive.
        batches: all N training examples, in micro-batches.
    """

    network: Network[M]
    layers: Sequence[TrackedLayer]
    damping: Mapping[str, float]
    batches: Sequence[M]

    @cached_property
    def wide(self) -> Network[M]:
        """The same network in float64, whose weights are moved; made at the first call."""
        return in_double(self.network)

    @cached_property
    def size(self) -> int:
        """N."""
        return sum(1 for batch in self.batches for number in self.network.ids(batch) if number != DUMMY)

    def zero(self, points: int) -> Vectors:
        """The start, where u is 0."""
        device = next(self.network.model.parameters()).device
        return {
            layer.name: torch.zeros(points, layer.outputs, layer.columns, dtype=torch.float64, device=device)
            for layer in self.layers
        }

    def values(self, points: Sequence[M], weights: Vectors, epsilon: float) -> Tensor:
        """PBO(θˢ + ε u) of each point, [S], by the definition of the divergence; float64.

        Args:
            points: z_m, a micro-batch of one example each.
            weights: u of each.
            epsilon: ε.
        """
        loss, found = self.wide.loss, []
        with torch.no_grad():
            for number, point in enumerate(points):
                total = sum(
                    self.damping[name] / 2 * (epsilon * value[number]).square().sum() for name, value in weights.items()
                )
                for batch in map(widened, self.batches):
                    targets, reference = self.wide.targets(batch), self.wide.outputs(batch)
                    with moved(self.wide.model, self.layers, weights, number, epsilon):
                        outputs = self.wide.outputs(batch)
                    total = total + loss.divergence(outputs, reference, targets).sum() / self.size
                alone = widened(point)
                with moved(self.wide.model, self.layers, weights, number, epsilon):
                    total = total + epsilon * loss.value(self.wide.outputs(alone), self.wide.targets(alone)).sum()
                found.append(total)
        return torch.stack(found)  # type: ignore[arg-type]

    def gradients(self, points: Sequence[M], weights: Vectors | None, epsilon: float) -> Vectors:
        """∇_θ PBO(θˢ + ε u) / ε of each point, in float64; a forward and a backward pass over all examples a point.

        Args:
            points: z_m, a micro-batch of one example each.
            weights: u of each; None is 0, where no pass over the examples is needed.
            epsilon: ε.
        """
        found, loss, wide = self.zero(len(points)), self.wide.loss, self.wide
        weights = weights or found
        if weights is not found:
            for batch in map(widened, self.batches):
                self._add_divergences(batch, weights, epsilon, found)
        for number, point in enumerate(points):
            alone = widened(point)
            targets = wide.targets(alone)
            with moved(wide.model, self.layers, weights, number, epsilon):
                add_gradient(
                    wide, self.layers, alone, lambda outputs, y=targets: loss.gradient(outputs, y), found, number
                )
        if weights is not found:
            for name, value in weights.items():
                found[name] += self.damping[name] * value
        return found

    def _add_divergences(self, batch: M, weights: Vectors, epsilon: float, found: Vectors) -> None:
        """Add 1/(N ε) Σ_b J_bᵀ (∇L(h(θ, x_b)) − ∇L(h(θˢ, x_b))) of a micro-batch."""
        loss, wide = self.wide.loss, self.wide
        targets = wide.targets(batch)
        with torch.no_grad():
            reference = loss.gradient(wide.outputs(batch), targets)

        def cotangent(outputs: Tensor) -> Tensor:
            return (loss.gradient(outputs, targets) - reference) / (self.size * epsilon)

        for number in range(len(next(iter(weights.values())))):
            with moved(wide.model, self.layers, weights, number, epsilon):
                add_gradient(wide, self.layers, batch, cotangent, found, number)


def measured(
    network: Network[M],
    layers: Sequence[TrackedLayer],
    weights: Vectors,
    epsilon: float,
    measure: Callable[[Network[M]], Tensor],
) -> Tensor:
    """(f_q(θˢ + ε u_s) − f_q(θˢ)) / ε, [S, Q], in float64.

    Args:
        network: θˢ, of any type.
        layers: tracked.
        weights: u of S points.
        epsilon: ε.
        measure: f of Q measurements, [Q], of a network in float64.
    """
    wide = in_double(network)
    with torch.no_grad():
        before_Q, found = measure(wide).double(), []
        for number in range(len(next(iter(weights.values())))):
            with moved(wide.model, layers, weights, number, epsilon):
                found.append((measure(wide).double() - before_Q) / epsilon)
    return torch.stack(found)


def _gradient(loss: OutputLoss, targets: Tensor, outputs: Tensor) -> Tensor:
    return loss.gradient(outputs, targets)


# --- a network that is moved ------------------------------------------------------------------------------------------


def in_double(network: Network[M]) -> Network[M]:
    """A copy of a network in float64, frozen; what a model computes in float32 by itself stays so."""
    model = copy.deepcopy(network.model).double().requires_grad_(False)
    return replace(network, model=model)  # type: ignore[type-var]


def widened(batch: M) -> M:
    """A micro-batch for a network in float64: tensors of numbers are cast, tokens are what they are."""
    if not isinstance(batch, Examples):
        return batch
    targets = batch.targets.double() if batch.targets.is_floating_point() else batch.targets
    return Examples(batch.inputs.double(), targets)  # type: ignore[return-value]


@contextmanager
def moved(
    model: nn.Module, layers: Sequence[TrackedLayer], weights: Vectors, number: int, epsilon: float
) -> Iterator[None]:
    """The weights of the tracked layers at θˢ + ε u inside the `with` block, for the point of this number."""
    before: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for layer in layers:
            module = model.get_submodule(layer.modules[0])
            move_OI = epsilon * weights[layer.name][number]
            weight: Any = module.weight
            step_OI = move_OI[:, :-1] if layer.bias else move_OI
            _move(weight, step_OI.T if layer.transposed else step_OI, before)
            if layer.bias:
                bias: Any = module.bias
                _move(bias, move_OI[:, -1], before)
        yield
    finally:
        for parameter, value in before:
            parameter.data = value


def _move(parameter: nn.Parameter, step: Tensor, before: list[tuple[nn.Parameter, Tensor]]) -> None:
    before.append((parameter, parameter.data))
    parameter.data = parameter.data + step.reshape(parameter.shape).to(parameter)


def add_gradient(
    network: Network[M],
    layers: Sequence[TrackedLayer],
    batch: M,
    cotangent: Callable[[Tensor], Tensor],
    found: Vectors,
    number: int,
) -> None:
    """Add Σ_b J_bᵀ u_b to one of several vectors: one forward and one backward pass.

    Args:
        network: with the weights that J is taken at.
        layers: tracked.
        batch: examples.
        cotangent: from the outputs to u.
        found: [S, O, I] by layer, changed in place.
        number: which of the S.
    """
    positions = network.positions(batch)

    def consume(layer: TrackedLayer, uses: Sequence[Use]) -> None:
        for use in uses:
            module = network.model.get_submodule(layer.modules[0])
            act_NI = homogeneous(input_rows(module, use.act_BTI, positions), layer.bias).flatten(0, 1)
            grad_NO = output_rows(module, use.grad_BTO[None])[0]
            found[layer.name][number] += grad_NO.T.to(act_NI) @ act_NI

    with Capture(network.model, layers).consuming(consume, positions):
        outputs = network.outputs(batch)
        if outputs.requires_grad:
            outputs.backward(cotangent(outputs.detach()))
