"""The linear layers whose gradients are studied, found from a model's module tree.

`influence.linears` says what a linear layer is, which are the MLP's and which attention's. A layer is one weight with
every module that uses it: two modules that share a Parameter are one layer, whose gradient is the sum over both uses.
Every parameter of the model is either tracked or stands in an `Untracked` entry with the reason.

B: sequences, T: positions. Weights are read as [outputs, inputs] whatever their storage.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from influence.linears import (
    TIED,
    LinearModule,
    Users,
    block_pattern,
    find_linears,
    is_linear,
    is_transposed,
    parameter_users,
    untracked_reason,
)

_EXAMPLES = 6  # names that a message shows


@dataclass(frozen=True)
class TrackedLayer:
    """A linear layer W whose gradient is tracked.

    Attributes:
        name: Module path of its first use.
        modules: Module path of every module that uses this weight, once each: a module that is registered under
            two paths, or called several times, stands here once.
        inputs: Inputs I of the layer, without the homogeneous coordinate.
        outputs: Outputs O.
        bias: Whether the layer has a bias, the last column of [W b] (Eq. 12).
        transposed: Whether the weight is stored as [inputs, outputs] (GPT-2's Conv1D).
        input_group: Name of the first layer with the very same input tensor and bias-ness; its own name if alone.
    """

    name: str
    modules: tuple[str, ...]
    inputs: int
    outputs: int
    bias: bool
    transposed: bool
    input_group: str

    @property
    def columns(self) -> int:
        """Columns of [W b]: the inputs, and one for a bias."""
        return self.inputs + self.bias

    @property
    def parameters(self) -> int:
        """Parameters of the layer, its bias among them."""
        return self.outputs * self.columns


@dataclass(frozen=True)
class Untracked:
    """Parameters whose gradient is not studied, and why."""

    name: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class LayerSelection:
    """What is tracked of a model and what is not: `total = tracked + sum of untracked`, each Parameter once."""

    layers: tuple[TrackedLayer, ...]
    untracked: tuple[Untracked, ...]
    total_parameters: int

    @property
    def tracked_parameters(self) -> int:
        """Parameters of all tracked layers."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def coverage(self) -> float:
        """Share of the model's parameters that is tracked."""
        return self.tracked_parameters / self.total_parameters

    def only(self, names: Collection[str]) -> LayerSelection:
        """The same selection with some of its tracked layers, for a pass that reduces these alone."""
        return replace(self, layers=tuple(layer for layer in self.layers if layer.name in names))

    def describe(self) -> str:
        """Lines for people: the tracked share, the tracked layers, and what is not tracked, by reason."""
        share = f"{_millions(self.tracked_parameters)} of {_millions(self.total_parameters)} parameters"
        lines = [f"tracked {len(self.layers)} layers, {share} ({100 * self.coverage:.1f} %)"]
        patterns = dict.fromkeys(block_pattern(layer.name) for layer in self.layers)
        lines.append("  " + ", ".join(patterns))
        by_reason: dict[str, list[Untracked]] = defaultdict(list)
        for entry in self.untracked:
            by_reason[entry.reason].append(entry)
        for reason, entries in by_reason.items():
            count = _millions(sum(entry.parameters for entry in entries))
            lines.append(f"not tracked, {reason}: {count} ({_some([entry.name for entry in entries])})")
        return "\n".join(lines)


def select_layers(model: nn.Module, selection: str) -> LayerSelection:
    """Find the linear layers to track.

    Args:
        model: Any module tree; only names, types and shapes are read, so a model on the meta device will do.
        selection: `mlp`, `attention` or `all` (both) of the blocks; anything else is a regular expression that is
            searched for in the module path of every linear layer, inside of blocks or not (`re.search`, so anchor
            with ^ and $ where the whole path is meant).

    Returns:
        The layers in the order of the module tree, each its own input group until `group_inputs` is called, and every
        other parameter with the reason that it is not tracked.

    Raises:
        ValueError: If the expression is invalid or matches no linear layer that can be tracked, or if it matches a
            layer whose weight also has a use that is not a linear layer (an output head tied with the embedding).
    """
    users = parameter_users(model)
    linears = find_linears(model, users)
    wanted = _predicate(selection)
    chosen = [linear for linear in linears if wanted(linear)]
    tied = [linear for linear in chosen if linear.obstacle == TIED]
    if tied:
        raise ValueError(
            f"model.layers={selection!r} selects {tied[0].path}, whose weight is also used by "
            f"{_other_users(tied[0], users)}. Its gradient is not that of linear layers alone, so it cannot be "
            "tracked exactly: choose an expression that does not match it"
        )
    trackable = [linear for linear in chosen if linear.obstacle is None]
    if not trackable:
        raise ValueError(_nothing_selected(selection, linears, chosen))
    layers = tuple(_merge_shared(trackable, linears))
    return LayerSelection(layers, _untracked(model, linears, layers, users), sum(p.numel() for p in model.parameters()))


def group_inputs(model: nn.Module, selection: LayerSelection, input_ids_BT: Tensor) -> LayerSelection:
    """Run the model once and group layers that receive the very same input (query, key and value; gate and up).

    Layers of a group have the same uncentred input covariance, so it is accumulated and decomposed once. Two layers
    are grouped if all their calls received the same tensors in the same order, and both or neither have a bias.

    Args:
        model: The model that `selection` was made from. It is called as `model(input_ids=...)`.
        selection: The layers to group.
        input_ids_BT: A few tokens of any text. Their activations at tracked layers are held at once.

    Returns:
        The selection with input groups set. A layer that was not called, that did not see one row a token, or whose
        output is not `W a + b`, is moved to the untracked with that reason.

    Raises:
        ValueError: If no layer is left.
    """
    calls = _record_calls(model, selection, input_ids_BT)
    groups: dict[object, str] = {}
    kept, dropped = [], []
    for layer in selection.layers:
        obstacle = next((call.obstacle for call in calls[layer.name] if call.obstacle), None)
        if not calls[layer.name]:
            obstacle = "not called in a forward pass"
        if obstacle is None:
            key = (layer.bias, tuple(call.signature for call in calls[layer.name]))
            kept.append(replace(layer, input_group=groups.setdefault(key, layer.name)))
        else:
            dropped.append((layer, obstacle))
    if not kept:
        raise ValueError(f"no selected layer can be tracked: {dropped[0][0].name} was {dropped[0][1]}")
    entries = [(layer.name, layer.parameters, obstacle) for layer, obstacle in dropped]
    return replace(selection, layers=tuple(kept), untracked=selection.untracked + _grouped(entries))


# --- choosing among them ---


def _predicate(selection: str) -> Callable[[LinearModule], bool]:
    if selection in ("mlp", "attention"):
        return lambda linear: linear.part == selection
    if selection == "all":
        return lambda linear: linear.part != "outside"
    try:
        expression = re.compile(selection)
    except re.error as error:
        raise ValueError(
            f"model.layers={selection!r} is neither mlp, attention nor all, and not a regular expression: {error}"
        ) from error
    return lambda linear: any(expression.search(path) for path in linear.paths)


def _merge_shared(trackable: list[LinearModule], linears: list[LinearModule]) -> Iterator[TrackedLayer]:
    """One layer for each weight, with all the modules that use it, selected or not."""
    done: set[nn.Parameter] = set()
    for linear in trackable:
        weight = linear.module._parameters["weight"]
        assert weight is not None
        if weight in done:
            continue
        done.add(weight)
        transposed = is_transposed(linear.module)
        outputs, inputs = reversed(weight.shape) if transposed else weight.shape
        modules = tuple(other.path for other in linears if other.module._parameters.get("weight") is weight)
        bias = linear.module._parameters.get("bias") is not None
        yield TrackedLayer(modules[0], modules, inputs, outputs, bias, transposed, input_group=modules[0])


def _other_users(linear: LinearModule, users: Users) -> str:
    weight = linear.module._parameters["weight"]
    assert weight is not None
    return ", ".join(sorted({type(user).__name__ for user in users[weight] if not is_linear(user)}))


def _nothing_selected(selection: str, linears: list[LinearModule], chosen: list[LinearModule]) -> str:
    if chosen:
        return f"model.layers={selection!r} selects {chosen[0].path}, which cannot be tracked: {chosen[0].obstacle}"
    names = list(dict.fromkeys(block_pattern(linear.path) for linear in linears if linear.obstacle is None))
    if not names:
        return f"model.layers={selection!r} selects no layer: the model has no linear layer that can be tracked"
    return f"model.layers={selection!r} selects no linear layer; there are {_some(names)}"


# --- everything else, with a reason ---


def _untracked(
    model: nn.Module,
    linears: list[LinearModule],
    layers: tuple[TrackedLayer, ...],
    users: Users,
) -> tuple[Untracked, ...]:
    tracked = {
        parameter
        for layer in layers
        for path in layer.modules
        for parameter in model.get_submodule(path).parameters(False)
    }
    by_module = {linear.module: linear for linear in linears}
    entries = [
        (name, parameter.numel(), untracked_reason(name, users[parameter], by_module))
        for name, parameter in model.named_parameters()
        if parameter not in tracked
    ]
    buffered = [(linear.path, 0, str(linear.obstacle)) for linear in linears if "qweight" in linear.module._buffers]
    return _grouped(entries + buffered)


def _grouped(entries: list[tuple[str, int, str]]) -> tuple[Untracked, ...]:
    """One entry for the same place in all blocks: `layers.0.norm` and `layers.1.norm` are `layers.*.norm`."""
    sums: dict[tuple[str, str], int] = defaultdict(int)
    for name, parameters, reason in entries:
        sums[block_pattern(name), reason] += parameters
    return tuple(Untracked(name, parameters, reason) for (name, reason), parameters in sums.items())


def _some(names: list[str]) -> str:
    """The first names, and how many follow."""
    more = f" and {len(names) - _EXAMPLES} more" if len(names) > _EXAMPLES else ""
    return ", ".join(names[:_EXAMPLES]) + more


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}M" if count >= 100_000 else f"{count:,}"


# --- the probe ---


@dataclass(frozen=True)
class _Call:
    """One call of a tracked module: which tensor it received, and why it is not a layer's, if it is not."""

    signature: tuple[object, ...]
    held: Tensor  # kept alive, so that no later tensor takes its address
    obstacle: str | None


def _record_calls(model: nn.Module, selection: LayerSelection, input_ids_BT: Tensor) -> dict[str, list[_Call]]:
    calls: dict[str, list[_Call]] = {layer.name: [] for layer in selection.layers}

    def recorder(layer: TrackedLayer) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def record(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            calls[layer.name].append(_inspect(layer, module, args, output, input_ids_BT.shape))

        return record

    handles = [  # before all other hooks: those of a sharded model free the weight
        model.get_submodule(path).register_forward_hook(recorder(layer), prepend=True)
        for layer in selection.layers
        for path in layer.modules
    ]
    try:
        with torch.no_grad():
            model(input_ids=input_ids_BT)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _inspect(
    layer: TrackedLayer, module: nn.Module, args: tuple[object, ...], output: object, shape_BT: torch.Size
) -> _Call:
    if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
        return _Call((), torch.empty(0), "not called with one tensor")
    act = args[0]
    address = id(act) if act.is_meta else act.data_ptr()
    signature = (address, tuple(act.shape), act.stride(), act.dtype, act._version)
    if act.shape[:-1] not in (shape_BT, torch.Size([shape_BT.numel()])):
        return _Call(signature, act, "not called with one row a token")
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    expected = F.linear(act, weight.T if layer.transposed else weight, bias)
    if output.shape != expected.shape or not _close(output, expected):
        return _Call(signature, act, "not computing W a + b")
    return _Call(signature, act, None)


def _close(output: Tensor, expected: Tensor) -> bool:
    """Agreement to the rounding of half precision: enough to tell another computation from another kernel."""
    return output.is_meta or bool((output - expected).abs().max() <= 0.05 * expected.abs().max() + 1e-6)
