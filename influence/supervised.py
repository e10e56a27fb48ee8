"""EK-FAC statistics of a plain network on tensors: linear layers and convolutions; N examples of its training set.

act_BTI, grad_BTO: rows of a layer, B examples, T places: one of a linear layer on vectors, one for each place of the
output of a convolution, whose inputs are patches (`influence.gauss_newton.input_rows`). A convolution is a linear layer
over its places as a language model's is over its tokens, so the statistics are the same ones: A and S are means over
places, which are taken as independent, Λ has the exact gradients of examples, summed over places.

Targets of pseudo-gradients are drawn from the distribution whose −log p is the loss, at the true inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from influence.capture import Capture, Use, homogeneous
from influence.correction import Bases, CorrectionSums, LayerBasis, add_correction
from influence.covariance import CovarianceSums, SecondMoment
from influence.eigenbasis import eigenbasis
from influence.gauss_newton import Examples, TensorNetwork, Vectors, input_rows, output_rows
from influence.layers import TrackedLayer
from influence.output_losses import OutputLoss
from influence.scoring import LayerQueries, layer_scores
from influence.solvers import LayerCurvature

Consume = Callable[[TrackedLayer, Sequence[Use]], None]


def micro_batches(examples: Examples, size: int) -> Iterator[Examples]:
    """The examples in their order, at most `size` at a time."""
    for start in range(0, len(examples.inputs), size):
        part = slice(start, start + size)
        yield Examples(examples.inputs[part], examples.targets[part])


def sampled_targets(network: TensorNetwork, examples: Examples, seed: int, draws: int = 1, batch: int = 256) -> Tensor:
    """Targets of N examples from the network's own distribution, [draws, N, ...]; the batch size moves no draw.

    Raises:
        ValueError: if an output is not finite, naming the first such example.
    """
    with torch.no_grad():
        outputs = torch.cat([network.outputs(part) for part in micro_batches(examples, batch)])
    broken = torch.nonzero(~torch.isfinite(outputs).flatten(1).all(1)).flatten()
    if len(broken):
        raise ValueError(f"outputs of {len(broken)} examples are not finite, the first of them {int(broken[0])}")
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([network.loss.sample(outputs, generator) for _ in range(draws)])


def backward(
    network: TensorNetwork,
    layers: Sequence[TrackedLayer],
    inputs: Tensor,
    cotangent: Callable[[Tensor], Tensor],
    consume: Consume,
) -> None:
    """One forward and one backward pass, which hand over the rows of each tracked layer.

    Args:
        network: in evaluation mode, its parameters frozen.
        layers: tracked.
        inputs: of B examples.
        cotangent: from the outputs to what goes back from them, the gradient of a loss for example.
        consume: called with each layer's uses.
    """
    modules = {layer.name: network.model.get_submodule(layer.modules[0]) for layer in layers}

    def rows(layer: TrackedLayer, uses: Sequence[Use]) -> None:
        module, count = modules[layer.name], len(inputs)
        consume(
            layer,
            [
                Use(
                    input_rows(module, use.act_BTI, 1),
                    output_rows(module, use.grad_BTO[None])[0].unflatten(0, (count, -1)),
                )
                for use in uses
            ],
        )

    with Capture(network.model, layers).consuming(rows, 1):
        outputs = network.model(inputs)
        if outputs.requires_grad:
            outputs.backward(cotangent(outputs.detach()))


def example_gradients(network: TensorNetwork, layers: Sequence[TrackedLayer], examples: Examples) -> Vectors:
    """∇L of each example, [B, O, I] by layer; zero in layers that the outputs do not depend on."""
    return pulled_back(network, layers, examples.inputs, _loss_gradient(network.loss, examples.targets))


def pulled_back(
    network: TensorNetwork, layers: Sequence[TrackedLayer], inputs: Tensor, cotangent: Callable[[Tensor], Tensor]
) -> Vectors:
    """What `backward` takes each example's cotangent to, [B, O, I] by layer: Jᵀ of the example times it."""
    like = next(network.model.parameters())
    found = {layer.name: like.new_zeros(len(inputs), layer.outputs, layer.columns) for layer in layers}

    def consume(layer: TrackedLayer, uses: Sequence[Use]) -> None:
        for use in uses:
            found[layer.name] += use.grad_BTO.transpose(1, 2) @ homogeneous(use.act_BTI, layer.bias)

    backward(network, layers, inputs, cotangent, consume)
    return found


def example_scores(
    network: TensorNetwork, layers: Sequence[TrackedLayer], examples: Examples, vectors: Vectors, batch: int = 256
) -> Tensor:
    """⟨V_q, −∇L(z_b)⟩ of each vector and example, [Q, B] in float64, as the scan computes it (Equation 25)."""
    queries = {name: LayerQueries(len(value), dense_QOI=value.double()) for name, value in vectors.items()}
    found, product = [], next(network.model.parameters()).dtype
    for part in micro_batches(examples, batch):
        shares: list[Tensor] = []

        def consume(layer: TrackedLayer, uses: Sequence[Use], into: list[Tensor] = shares) -> None:
            into.append(layer_scores(layer, uses, queries[layer.name], product, torch.float64))

        backward(network, layers, part.inputs, _loss_gradient(network.loss, part.targets), consume)
        found.append(-torch.stack(shares).sum(0))
    return torch.cat(found).T.contiguous()


def places(network: TensorNetwork, layers: Sequence[TrackedLayer], examples: Examples) -> dict[str, int]:
    """Rows T of each layer for one example; 0 where the outputs do not depend on it."""
    found: dict[str, int] = {layer.name: 0 for layer in layers}

    def consume(layer: TrackedLayer, uses: Sequence[Use]) -> None:
        found[layer.name] = sum(use.act_BTI.shape[1] for use in uses)

    backward(network, layers, examples.inputs[:1], torch.zeros_like, consume)
    return found


# --- the statistics ---------------------------------------------------------------------------------------------------


def fit(
    network: TensorNetwork,
    layers: Sequence[TrackedLayer],
    examples: Examples,
    targets_DN: Tensor,
    blocks: int = 1,
    batch: int = 256,
) -> dict[str, LayerCurvature]:
    """EK-FAC of each layer: A and S, their eigenbases, Λ.

    Args:
        network: in evaluation mode, its parameters frozen.
        layers: tracked.
        examples: whose inputs the mean is over.
        targets_DN: D draws of their targets (`sampled_targets`); all enter the mean.
        blocks: on each side of each layer, at most one a coordinate (Appendix A).
        batch: examples a micro-batch; moves rounding alone.
    """
    covariance = fit_covariance(network, layers, examples, targets_DN, blocks, batch)
    bases = bases_of(layers, covariance)
    correction = fit_correction(network, layers, examples, targets_DN, bases, batch)
    return curvature_of(layers, covariance, bases, correction)


def fit_covariance(
    network: TensorNetwork,
    layers: Sequence[TrackedLayer],
    examples: Examples,
    targets_DN: Tensor,
    blocks: int = 1,
    batch: int = 256,
) -> CovarianceSums:
    """The sums of A and S over examples, draws and places, in float64."""
    device = examples.inputs.device

    def moment(size: int) -> SecondMoment:
        return SecondMoment.zeros(size, min(blocks, size), torch.float64, device)

    sums = CovarianceSums(
        {layer.name: moment(layer.columns) for layer in layers if layer.name == layer.input_group},
        {layer.name: moment(layer.outputs) for layer in layers},
    )

    def consume(layer: TrackedLayer, uses: Sequence[Use]) -> None:
        everywhere = torch.ones(uses[0].act_BTI.shape[:2], dtype=torch.bool, device=device)
        sums.add(layer, tuple(uses), everywhere, uses[0].act_BTI.dtype)

    _over_draws(network, layers, examples, targets_DN, batch, consume)
    sums.sequences = targets_DN.shape[0] * targets_DN.shape[1]
    return sums


def bases_of(layers: Sequence[TrackedLayer], sums: CovarianceSums) -> dict[str, LayerBasis]:
    """Q_A and Q_S of each layer, in float64; block by block."""
    groups = {name: eigenbasis(f"A of layer {name}", moment.mean()) for name, moment in sums.activation.items()}
    return {
        layer.name: LayerBasis(
            groups[layer.input_group], eigenbasis(f"S of layer {layer.name}", sums.gradient[layer.name].mean())
        )
        for layer in layers
    }


def fit_correction(
    network: TensorNetwork,
    layers: Sequence[TrackedLayer],
    examples: Examples,
    targets_DN: Tensor,
    bases: Bases,
    batch: int = 256,
) -> CorrectionSums:
    """The sums of Λ over examples and draws, in float64."""
    like = next(network.model.parameters())
    sums = CorrectionSums(
        {layer.name: like.new_zeros(layer.outputs, layer.columns, dtype=torch.float64) for layer in layers}
    )
    given = {
        name: LayerBasis(both.activation.to(like.dtype), both.gradient.to(like.dtype)) for name, both in bases.items()
    }

    def consume(layer: TrackedLayer, uses: Sequence[Use]) -> None:
        if len(uses) == 1 and uses[0].act_BTI.shape[1] == 1:
            _add_products(sums.sums[layer.name], layer, uses[0], given[layer.name])
        else:
            add_correction(sums.sums[layer.name], layer, uses, given[layer.name], like.dtype)

    _over_draws(network, layers, examples, targets_DN, batch, consume)
    sums.sequences = targets_DN.shape[0] * targets_DN.shape[1]
    return sums


def curvature_of(
    layers: Sequence[TrackedLayer], covariance: CovarianceSums, bases: Bases, correction: CorrectionSums | None
) -> dict[str, LayerCurvature]:
    """What solvers are fitted to; without Λ where there is no correction."""
    found = {}
    for layer in layers:
        basis, places = bases[layer.name], covariance.gradient[layer.name].rows / covariance.sequences
        eigenvalues = None if correction is None else correction.mean(layer.name)
        found[layer.name] = LayerCurvature(basis.activation, basis.gradient, eigenvalues, places)
    return found


def _over_draws(
    network: TensorNetwork,
    layers: Sequence[TrackedLayer],
    examples: Examples,
    targets_DN: Tensor,
    batch: int,
    consume: Consume,
) -> None:
    """A pass of pseudo-gradients for each draw of the targets."""
    for targets_N in targets_DN:
        for part in micro_batches(Examples(examples.inputs, targets_N), batch):
            backward(network, layers, part.inputs, _loss_gradient(network.loss, part.targets), consume)


def _loss_gradient(loss: OutputLoss, targets: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda outputs: loss.gradient(outputs, targets)


def _add_products(sum_OI: Tensor, layer: TrackedLayer, use: Use, basis: LayerBasis) -> None:
    """Add Σ_b (Q_Sᵀ g_b)² ⊗ (Q_Aᵀ a_b)², where the gradient of an example is a single product g aᵀ.

    B·I·O multiply-adds in one product, and no gradient is formed.
    """
    act_BI = basis.activation.rotate(homogeneous(use.act_BTI[:, 0], layer.bias))
    grad_BO = basis.gradient.rotate(use.grad_BTO[:, 0])
    sum_OI += grad_BO.square_().T @ act_BI.square_()
