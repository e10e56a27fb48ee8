"""Capture of the two tensors every statistic needs: inputs and output gradients of the tracked layers.

act_BTI: [sequences, positions, inputs]; grad_BTO: [sequences, positions, outputs].

Parameters are frozen, so the backward pass computes no weight gradient. Autograd begins at the output of the first
tracked layer: everything below it runs without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from influence.layers import TrackedLayer


@dataclass(frozen=True)
class Use:
    """One call of a tracked layer: its input act_BTI and the gradient grad_BTO of its output."""

    act_BTI: Tensor
    grad_BTO: Tensor


Consume = Callable[[TrackedLayer, Sequence[Use]], None]


@dataclass
class _Pending:
    """The calls of one layer in the current forward pass, and how many still wait for their gradient."""

    inputs: list[Tensor] = field(default_factory=list)
    gradients: dict[int, Tensor] = field(default_factory=dict)

    def uses(self) -> list[Use]:
        return [Use(self.inputs[index], grad) for index, grad in sorted(self.gradients.items())]


class Capture:
    """Hooks on the tracked layers that hand over each layer's uses when the backward pass has reached all of them.

    A layer that is called several times, or whose weight several modules share, is handed over once, with one
    `Use` a call: its gradient is the sum over uses. A layer is released as soon as it was consumed, so only the layers
    that the backward pass has not reached keep their inputs.
    """

    def __init__(self, model: nn.Module, layers: Sequence[TrackedLayer]) -> None:
        self._modules = [(layer, model.get_submodule(path)) for layer in layers for path in layer.modules]

    @contextmanager
    def consuming(self, consume: Consume, positions: int) -> Iterator[None]:
        """Hooks for one forward and one backward pass inside the `with` block, of sequences of `positions` tokens."""
        pending: dict[str, _Pending] = {}
        by_name = {layer.name: layer for layer, _ in self._modules}

        def arrived(layer: TrackedLayer, index: int, grad_BTO: Tensor) -> None:
            state = pending[layer.name]
            state.gradients[index] = by_sequence(grad_BTO, positions)
            if len(state.gradients) == len(state.inputs):
                consume(layer, pending.pop(layer.name).uses())

        handles = [
            module.register_forward_hook(_forward_hook(layer, pending, arrived, positions))
            for layer, module in self._modules
        ]
        try:
            with torch.enable_grad():
                yield
            for name in list(pending):  # calls that the loss does not depend on have no gradient, and add nothing
                uses = pending.pop(name).uses()
                if uses:
                    consume(by_name[name], uses)
        finally:
            for handle in handles:
                handle.remove()


def _forward_hook(
    layer: TrackedLayer,
    pending: dict[str, _Pending],
    arrived: Callable[[TrackedLayer, int, Tensor], None],
    positions: int,
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        state = pending.setdefault(layer.name, _Pending())
        index = len(state.inputs)
        state.inputs.append(by_sequence(inputs[0].detach(), positions))
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        output.register_hook(lambda grad_BTO: arrived(layer, index, grad_BTO.detach()))
        return output

    return hook


def by_sequence(rows: Tensor, positions: int) -> Tensor:
    """[B, T, ...] of a tensor that a model may hand to its layers as [B * T, ...] (OPT's MLP, shared experts)."""
    return rows.unflatten(0, (-1, positions)) if rows.dim() == 2 else rows


def homogeneous(act: Tensor, bias: bool, width: int | None = None) -> Tensor:
    """The homogeneous activations ā = (a, 1) of Equation 12 where the layer has a bias, else a; [..., I].

    A `width` above I is reached with zeros.
    """
    columns = act.shape[-1] + bias
    if columns == act.shape[-1] and width in (None, columns):
        return act
    padded = act.new_zeros(*act.shape[:-1], width or columns)
    padded[..., : act.shape[-1]] = act
    if bias:
        padded[..., columns - 1] = 1
    return padded
