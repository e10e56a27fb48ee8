"""The matrix products of one forward and one activation-only backward pass, read off a model on the meta device.

T: positions of a sequence; W: width of attention, heads times head size.

Parameters are frozen and autograd begins at the output of the first tracked layer (`influence.capture`), so which
linear layers have a backward product depends on the order in which the model calls them: a probe sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from influence.layers import LayerSelection
from influence.linears import LinearModule, block_pattern, find_linears, parameter_users

_BATCH = 2  # sequences of a probe
_TOKENS = 11  # positions of a probe, a number that no other size of a model is likely to be


@dataclass(frozen=True)
class LinearCalls:
    """A linear layer of the model, tracked or not.

    Attributes:
        name: Module path.
        inputs: Inputs, without a bias.
        outputs: Outputs.
        forward: Calls in a forward pass.
        backward: Those of them whose input needs a gradient.
    """

    name: str
    inputs: int
    outputs: int
    forward: int = 1
    backward: int = 1


@dataclass(frozen=True)
class Attention:
    """One block's attention over a full T × T square (masked positions are computed too); `backward` if it has one."""

    name: str
    width: int
    backward: bool = True


@dataclass(frozen=True)
class Weights:
    """Parameters of one size that modules use for themselves: how often in a forward and in a backward pass.

    A sharded model gathers a module's own parameters before each use. In the backward pass, it uses them to take a
    gradient to its input, and only where that needs one.
    """

    numbers: int
    forward: int
    backward: int


@dataclass(frozen=True)
class ForwardShape:
    """What a pass over one sequence consists of.

    Attributes:
        linears: Every linear layer that is called.
        attentions: Every attention.
        calls: Calls of each tracked layer in a forward pass, over all the modules that use its weight.
        vocabulary: Logits a position.
        saved_numbers: Activations a position that autograd holds from the forward to the backward pass.
        heads: Attention heads with a backward pass, over all blocks: each has a weight for every pair of positions.
        weights: Uses of parameters by modules, by the size of the parameter.
        largest_module: Parameters that the largest module uses at once.
        probed: Whether a forward pass on the meta device was seen; if not, the order of the module tree stands for it.
    """

    linears: tuple[LinearCalls, ...]
    attentions: tuple[Attention, ...]
    calls: Mapping[str, int] = field(default_factory=dict)
    vocabulary: int = 0
    saved_numbers: int = 0
    heads: int = 0
    weights: tuple[Weights, ...] = ()
    largest_module: int = 0
    probed: bool = True


def forward_shape(model: nn.Module, selection: LayerSelection) -> ForwardShape:
    """Run a forward pass, best on the meta device, where nothing is computed, and note what is called.

    Attention's width is the number of inputs of its output projection, the attention linear of a block that is called
    last.

    Args:
        model: Frozen here; called as `model(input_ids=...)`.
        selection: Its tracked layers.

    Returns:
        The shape. Where the forward pass needs values that are not there (a mixture of experts on the meta device), it
        is made from the module tree alone: every layer called once, gradients needed from the first tracked layer on,
        and `probed` is off.
    """
    linears = find_linears(model, parameter_users(model))
    probe = _Probe(model.requires_grad_(False), linears, selection)
    try:
        logits = probe.run()
    except (NotImplementedError, RuntimeError, ValueError, TypeError):
        return _from_tree(model, linears, selection)
    calls = {layer.name: sum(probe.forward.get(path, 0) for path in layer.modules) for layer in selection.layers}
    return ForwardShape(
        tuple(probe.called()),
        tuple(_attentions(probe.order, {linear.path: linear for linear in linears}, probe.needs_gradient)),
        calls,
        logits.shape[-1],
        probe.saved_numbers(),
        probe.heads(),
        probe.weights(),
        _largest_module(model),
    )


class _Probe:
    """Hooks that note calls, in order, and the tensors that autograd saves."""

    def __init__(self, model: nn.Module, linears: list[LinearModule], selection: LayerSelection) -> None:
        self._model, self._linears = model, linears
        self._tracked = {path for layer in selection.layers for path in layer.modules}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._saved: dict[int, int] = {}
        self._weights: dict[int, int] = {}
        self._uses: dict[int, list[int]] = {}
        self.order: list[str] = []
        self.forward: dict[str, int] = {}
        self.needs_gradient: dict[str, int] = {}

    def run(self) -> Tensor:
        """One forward pass; gives the logits."""
        handles = [module.register_forward_hook(self._use) for module in _owners(self._model)]
        handles += [linear.module.register_forward_hook(self._note(linear.path)) for linear in self._linears]
        device = next(self._model.parameters()).device
        input_ids_BT = torch.zeros(_BATCH, _TOKENS, dtype=torch.long, device=device)
        try:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
                return self._model(input_ids=input_ids_BT).logits
        finally:
            for handle in handles:
                handle.remove()

    def called(self) -> list[LinearCalls]:
        """Every linear that was called, in the order of first calls."""
        return [
            LinearCalls(path, *self._sizes[path], self.forward[path], self.needs_gradient[path])
            for path in dict.fromkeys(self.order)
        ]

    def saved_numbers(self) -> int:
        """Numbers a position that autograd saved, parameters left out."""
        parameters = {parameter.untyped_storage()._cdata for parameter in self._model.parameters()}
        numbers = sum(count for storage, count in self._saved.items() if storage not in parameters)
        return numbers // (_BATCH * _TOKENS)

    def weights(self) -> tuple[Weights, ...]:
        """Uses of parameters, by their size."""
        return tuple(Weights(size, *uses) for size, uses in sorted(self._uses.items()))

    def heads(self) -> int:
        """Heads, by the T × T weights that autograd saved."""
        return sum(self._weights.values()) // (_BATCH * _TOKENS**2)

    def _use(self, module: nn.Module, _inputs: object, output: object) -> None:
        """Note a module's own parameters. Seen before a tracked layer's output is made to need a gradient."""
        needed = torch.is_tensor(output) and output.requires_grad
        for parameter in module.parameters(recurse=False):
            uses = self._uses.setdefault(parameter.numel(), [0, 0])
            uses[0] += 1
            uses[1] += needed

    def _note(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            rows = inputs[0].numel() // inputs[0].shape[-1]
            if rows == _BATCH * _TOKENS:  # the head may be asked for fewer, experts for a share
                self.order.append(path)
                self._sizes[path] = (inputs[0].shape[-1], output.shape[-1])
                self.forward[path] = self.forward.get(path, 0) + 1
                self.needs_gradient[path] = self.needs_gradient.get(path, 0) + inputs[0].requires_grad
            if path in self._tracked and not output.requires_grad:
                output = output.detach().requires_grad_()
            return output

        return hook

    def _pack(self, tensor: Tensor) -> Tensor:
        """Note a saved tensor; attention's T × T weights, which fused kernels do not keep, apart from the others."""
        storage = tensor.untyped_storage()
        square = tuple(tensor.shape[-2:]) == (_TOKENS, _TOKENS)
        if square and tensor.is_floating_point() and storage.nbytes() % (tensor.itemsize * _TOKENS**2) == 0:
            self._weights[storage._cdata] = storage.nbytes() // tensor.itemsize
        elif not square:
            self._saved[storage._cdata] = storage.nbytes() // tensor.itemsize
        return tensor


def _owners(model: nn.Module) -> list[nn.Module]:
    """Modules with parameters of their own."""
    return [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]


def _largest_module(model: nn.Module) -> int:
    own = [sum(parameter.numel() for parameter in module.parameters(recurse=False)) for module in _owners(model)]
    return max(own, default=0)


def _attentions(
    order: list[str], linears: Mapping[str, LinearModule], needs_gradient: Mapping[str, int]
) -> list[Attention]:
    """The attention of every block, by its output projection: the attention linear that was called last there."""
    last: dict[str, str] = {}
    for path in order:
        if linears[path].part == "attention":
            last[path.rpartition(".")[0]] = path
    return [
        Attention(place, _inputs(linears[path].module), needs_gradient.get(path, 0) > 0) for place, path in last.items()
    ]


def _inputs(module: nn.Module) -> int:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.shape[0] if hasattr(module, "nf") else weight.shape[1]


def _from_tree(model: nn.Module, linears: list[LinearModule], selection: LayerSelection) -> ForwardShape:
    plain = [linear for linear in linears if linear.module._parameters.get("weight") is not None]
    first = next(index for index, linear in enumerate(plain) if linear.path == selection.layers[0].modules[0])
    calls = []
    for index, linear in enumerate(plain):
        weight = linear.module._parameters["weight"]
        assert weight is not None
        inputs = _inputs(linear.module)
        calls.append(LinearCalls(linear.path, inputs, weight.numel() // inputs, 1, int(index > first)))
    backward = {call.name: call.backward for call in calls}
    modules = {id(linear.module): backward[linear.path] for linear in plain}
    uses: dict[int, list[int]] = {}
    for module in _owners(model):
        for parameter in module.parameters(recurse=False):
            count = uses.setdefault(parameter.numel(), [0, 0])
            count[0] += 1
            count[1] += modules.get(id(module), 1)
    return ForwardShape(
        tuple(calls),
        tuple(_attentions([call.name for call in calls], {linear.path: linear for linear in plain}, backward)),
        {layer.name: len(layer.modules) for layer in selection.layers},
        calls[-1].outputs,
        2 * sum(call.inputs + call.outputs for call in calls[:-1]),
        weights=tuple(Weights(size, *count) for size, count in sorted(uses.items())),
        largest_module=_largest_module(model),
        probed=False,
    )


def describe_shape(shape: ForwardShape) -> str:
    """One line for people: the kinds of linear layers, with their sizes."""
    kinds = dict.fromkeys(f"{block_pattern(call.name)} {call.inputs}→{call.outputs}" for call in shape.linears)
    return ", ".join(kinds)
