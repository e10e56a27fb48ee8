"""Plain SGD for many small networks side by side: grids of hyperparameters, and training again on parts of the data.

S runs, each with a learning rate, an L2, first weights, an order and training examples of its own. B examples a
step, C outputs of a network.

Each run is what it would be alone: it shares no number with its neighbours, its first weights and its order are
functions of its own seed, and what it does not train on enters none of its batches, so that it takes the steps of a
training that never saw those examples. Stacking is for speed: a network of Appendix C is far too small to keep a core
busy, but thirty of them make batched products of a decent size (`torch.func.vmap` over the stacked weights).

Batch norm in training would have to keep statistics for each run; networks with buffers are trained one at a time.
Their statistics are those of training, and frozen after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from influence.gauss_newton import Examples, TensorNetwork
from influence.supervised import micro_batches

BATCH = 128  # Appendix C
ORDER = 3  # tells the draws of a seed apart; points and measurements have 1 and 2
EVALUATED = 2048  # examples at a time, where nothing is learnt
CHANNELS_LAST = torch.channels_last

States = dict[str, Tensor]
"""State dicts of S networks, stacked: [S, ...] by the name of a parameter or buffer."""


@dataclass(frozen=True)
class Recipe:
    """One run of SGD, which minimises the mean of the loss plus l2/2 · ‖θ‖² over all parameters.

    Attributes:
        learning_rate: constant; without momentum.
        l2: SGD's weight decay.
        seed: of the first weights, and of the order in which examples come.
        kept: numbers of the training examples that it sees, each once, int64; None is all of them.
    """

    learning_rate: float
    l2: float
    seed: int
    kept: Tensor | None = None


def learn(
    fresh: Callable[[int], TensorNetwork],
    examples: Examples,
    recipes: Sequence[Recipe],
    epochs: int,
    batch: int = BATCH,
    tick: Callable[[], None] = lambda: None,
) -> States:
    """Train S networks by θ ← θ − η (∇ mean_b L(z_b, θ) + l2 · θ).

    An epoch goes through a run's examples once, in batches of `batch`, the last of which may be smaller.

    Args:
        fresh: a network with the first weights of a seed.
        examples: all training examples, in the type of the networks.
        recipes: S runs, in any mixture.
        epochs: passes over its own examples that each run makes.
        batch: examples a step.
        tick: called after each epoch of all runs, or of a run that is trained alone.

    Returns:
        The last weights. Those of a run that diverged are not finite.

    Raises:
        ValueError: if a run has no examples.
    """
    if not all(_examples_of(recipe, examples) for recipe in recipes):
        raise ValueError("a network cannot be trained on no examples")
    networks = [fresh(recipe.seed) for recipe in recipes]
    if stackable(networks[0]):
        return _side_by_side(networks, examples, recipes, epochs, batch, tick)
    learnt = [
        _alone(network, examples, recipe, epochs, batch, tick)
        for network, recipe in zip(networks, recipes, strict=True)
    ]
    return {name: torch.stack([state[name] for state in learnt]) for name in learnt[0]}


def stackable(network: TensorNetwork) -> bool:
    """Whether networks like this one are trained side by side: they keep no statistics."""
    return next(network.model.buffers(), None) is None


@torch.no_grad()
def losses(network: TensorNetwork, states: States, examples: Examples) -> Tensor:
    """L(z_b, θ_s) of all examples in evaluation mode, float64 [S, B]."""
    return _outcomes(network, states, examples, network.loss.value)


@torch.no_grad()
def hits(network: TensorNetwork, states: States, examples: Examples) -> Tensor:
    """1 where the class of an example has the highest score, else 0; float64 [S, B]."""
    return _outcomes(network, states, examples, lambda outputs, targets: outputs.argmax(-1) == targets)


def one(states: Mapping[str, Tensor], run: int) -> dict[str, Tensor]:
    """The state dict of one of the networks."""
    return {name: value[run].clone() for name, value in states.items()}


def joined(several: Sequence[States]) -> States:
    """Stacks of states, one after the other, as one."""
    return {name: torch.cat([states[name] for states in several]) for name in several[0]}


# --- training -------------------------------------------------------------------------------------------------------


def _side_by_side(
    networks: Sequence[TensorNetwork],
    examples: Examples,
    recipes: Sequence[Recipe],
    epochs: int,
    batch: int,
    tick: Callable[[], None],
) -> States:
    network = networks[0]
    named = [dict(each.model.named_parameters()) for each in networks]
    weights = {name: torch.stack([each[name].detach() for each in named]).requires_grad_() for name in named[0]}
    dtype = next(iter(weights.values())).dtype
    rates_S = torch.tensor([recipe.learning_rate for recipe in recipes], dtype=dtype)
    l2_S = torch.tensor([recipe.l2 for recipe in recipes], dtype=dtype)
    orders = [_orders(recipe, examples, epochs) for recipe in recipes]
    for epoch in zip(*orders, strict=True):
        for numbers_SB in _batches(epoch, batch):
            _step(network, weights, examples, numbers_SB, rates_S, l2_S)
        tick()
    return {name: value.detach() for name, value in weights.items()}


def _step(
    network: TensorNetwork, weights: States, examples: Examples, numbers_SB: Tensor, rates_S: Tensor, l2_S: Tensor
) -> None:
    """One step of every run that has a batch left; numbers below 0 are no examples."""
    there_SB, numbers_SB = numbers_SB >= 0, numbers_SB.clamp(min=0)
    counts_S = there_SB.sum(1)
    outputs_SBC = vmap(lambda state, inputs: functional_call(network.model, state, (inputs,)))(
        weights, examples.inputs[numbers_SB]
    )
    value_R = network.loss.value(outputs_SBC.flatten(0, 1), examples.targets[numbers_SB].flatten(0, 1))
    value_SB = torch.where(there_SB, value_R.view_as(there_SB), 0.0)
    mean_S = value_SB.sum(1) / counts_S.clamp(min=1)
    gradients = torch.autograd.grad(mean_S.sum(), list(weights.values()))  # runs share nothing: each gets its own
    rates_S = torch.where(counts_S > 0, rates_S, 0.0)
    with torch.no_grad():
        for weight, gradient in zip(weights.values(), gradients, strict=True):
            shape = (-1, *[1] * (weight.dim() - 1))
            weight -= rates_S.view(shape) * (gradient + l2_S.view(shape) * weight)


def _alone(
    network: TensorNetwork,
    examples: Examples,
    recipe: Recipe,
    epochs: int,
    batch: int,
    tick: Callable[[], None],
) -> dict[str, Tensor]:
    model, inputs = network.model, examples.inputs
    model.train().requires_grad_(True)
    if inputs.dim() == 4:  # convolutions on the CPU take a quarter less time so
        model = model.to(memory_format=CHANNELS_LAST)  # type: ignore[call-overload]
        inputs = inputs.contiguous(memory_format=CHANNELS_LAST)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.l2)
    for order in _orders(recipe, examples, epochs):
        for numbers_B in order.split(batch):
            optimizer.zero_grad()
            outputs_BC = model(inputs[numbers_B])
            network.loss.value(outputs_BC, examples.targets[numbers_B]).mean().backward()
            optimizer.step()
        tick()
    model.eval().requires_grad_(False)
    state = model.state_dict()
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}


def _examples_of(recipe: Recipe, examples: Examples) -> int:
    return len(examples.inputs) if recipe.kept is None else len(recipe.kept)


def _orders(recipe: Recipe, examples: Examples, epochs: int) -> Iterator[Tensor]:
    """The numbers of a run's examples in the order of each epoch.

    The order of all examples depends on the seed alone; a run that leaves some out has the others in the same order,
    so that runs of one seed differ by no more than what they leave out.
    """
    size = len(examples.inputs)
    kept_N = torch.ones(size, dtype=torch.bool)
    if recipe.kept is not None:
        kept_N = torch.zeros_like(kept_N).index_fill(0, recipe.kept, True)
    generator = torch.Generator().manual_seed(1_000_003 * recipe.seed + ORDER)
    for _ in range(epochs):
        order_N = torch.randperm(size, generator=generator)
        yield order_N[kept_N[order_N]]


def _batches(orders: Sequence[Tensor], size: int) -> Iterator[Tensor]:
    """Numbers [S, B] of the examples of each step; a run that has fewer left is filled up with −1."""
    padded_SN = torch.nn.utils.rnn.pad_sequence(list(orders), batch_first=True, padding_value=-1)
    yield from padded_SN.split(size, dim=1)


# --- evaluation -----------------------------------------------------------------------------------------------------


def _outcomes(
    network: TensorNetwork, states: States, examples: Examples, outcome: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    training = network.model.training
    network.model.eval()
    try:
        found = [_part(network, states, part, outcome) for part in micro_batches(examples, EVALUATED)]
    finally:
        network.model.train(training)
    return torch.cat(found, dim=1)


def _part(
    network: TensorNetwork, states: States, part: Examples, outcome: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    def outputs(state: Mapping[str, Tensor]) -> Tensor:
        return functional_call(network.model, dict(state), (part.inputs,))

    count = len(next(iter(states.values())))
    if stackable(network):
        outputs_SBC = vmap(outputs)(states)
    else:
        outputs_SBC = torch.stack([outputs(one(states, run)) for run in range(count)])
    targets = part.targets.repeat(count, *[1] * (part.targets.dim() - 1))
    return outcome(outputs_SBC.flatten(0, 1), targets).view(count, -1).double()
