"""Which modules of a model are linear layers, where they belong, and what stands against tracking them.

A linear layer is an `nn.Linear` (or a subclass of it) or GPT-2's `Conv1D`, which stores its weight as [inputs,
outputs]. A block is a child of the outermost `nn.ModuleList` of its path. A linear layer of a block belongs to
attention if it, or a module between it and the block, has attention in its attribute or class name, and to the MLP
otherwise; outside of blocks, it belongs to what the attributes of its path say. Everything is read from the module
tree: names of attributes and classes, shapes and types of parameters. No model is known by name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

from torch import Tensor, nn

_ATTENTION = re.compile(r"attn|attention|(^|_)att(_|$)", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward", re.IGNORECASE)
_NORMALISATION = re.compile(r"norm|(^|_)ln(_|$)", re.IGNORECASE)
_ROUTER = re.compile(r"router|gate|gating", re.IGNORECASE)
TIED = "weight tied with another module"

Users = dict[nn.Parameter, list[nn.Module]]
"""The modules that hold each Parameter, in the order of the module tree."""


@dataclass(frozen=True)
class LinearModule:
    """A linear module before it is chosen.

    Attributes:
        paths: Every path at which it is registered.
        module: The module itself.
        part: `mlp`, `attention` or `outside` (of both).
        obstacle: Why it cannot be tracked; None if it can.
    """

    paths: tuple[str, ...]
    module: nn.Module
    part: str
    obstacle: str | None

    @property
    def path(self) -> str:
        """The first of its paths."""
        return self.paths[0]


def find_linears(model: nn.Module, users: Users) -> list[LinearModule]:
    """Every linear module, in the order of the module tree."""
    paths: dict[nn.Module, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        paths[module].append(path)
    return [
        LinearModule(
            tuple(paths[module]), module, _part(model, paths[module][0]), _obstacle(model, module, path, users)
        )
        for path, module in model.named_modules()
        if is_linear(module)
    ]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, quantised ones (which hold their weights as buffers) among them."""
    return isinstance(module, nn.Linear) or is_transposed(module) or "qweight" in module._buffers


def is_transposed(module: nn.Module) -> bool:
    """Whether this is GPT-2's Conv1D, which computes a W + b with W stored as [inputs, outputs]."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(weight, Tensor) and weight.dim() == 2
    )


def _ancestry(model: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """(attribute name, module) from the model's child down to the module at `path`."""
    steps, module = [], model
    for name in path.split("."):
        module = module.get_submodule(name)
        steps.append((name, module))
    return steps


def _part(model: nn.Module, path: str) -> str:
    """`mlp`, `attention`, or `outside` for a linear layer that is in no block and has neither in its path."""
    steps = _ancestry(model, path)
    lists = [depth for depth, (_, module) in enumerate(steps) if isinstance(module, nn.ModuleList)]
    names = [name for name, _ in steps]
    if lists:
        below_block = steps[lists[0] + 2 :]
        names = [text for name, module in below_block for text in (name, type(module).__name__)]
    if any(_ATTENTION.search(text) for text in names):
        return "attention"
    return "mlp" if lists or any(_MLP.search(text) for text in names) else "outside"


def _obstacle(model: nn.Module, module: nn.Module, path: str, users: Users) -> str | None:
    """Why the gradient of this linear module's parameters cannot be tracked; None if it can."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    steps = _ancestry(model, path)
    if any(hasattr(parent, "base_layer") for _, parent in steps):
        return "adapted layers (merge the adapter into the model first)"
    if "qweight" in module._buffers or (weight is not None and (not weight.is_floating_point() or weight.itemsize < 2)):
        return "quantised weights"
    if weight is None:
        return "parametrised weights"
    if any(name == "experts" for name, _ in steps[:-1]):
        return "mixture-of-experts weights (an expert sees only the tokens routed to it)"
    if not all(is_linear(user) for user in users[weight]):
        return TIED
    if not all(_alike(module, user) for user in users[weight]) or (
        bias is not None and set(users[bias]) != set(users[weight])
    ):
        return "weights or biases shared with a layer of another bias or layout"
    return None


def _alike(module: nn.Module, other: nn.Module) -> bool:
    same_bias = module._parameters.get("bias") is other._parameters.get("bias")
    return same_bias and is_transposed(module) == is_transposed(other)


def parameter_users(model: nn.Module) -> Users:
    """The modules that hold each Parameter, in the order of the module tree."""
    users: Users = defaultdict(list)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and module not in users[parameter]:
                users[parameter].append(module)
    return users


def untracked_reason(name: str, users: list[nn.Module], linears: dict[nn.Module, LinearModule]) -> str:
    """Why a parameter is not tracked, from the modules that hold it."""
    kinds = [type(user).__name__ for user in users]
    if any(isinstance(user, nn.Embedding) for user in users):
        tied = any(user in linears for user in users)
        return "embedding, also the output head" if tied else "embedding"
    linear = linears.get(users[0])
    if linear is not None:
        names = {"mlp": "MLP", "attention": "attention", "outside": "outside of the blocks"}
        return linear.obstacle or f"{names[linear.part]}, not selected"
    fused = any(parameter.dim() == 3 for parameter in users[0].parameters(False)) and not isinstance(
        users[0], nn.Conv1d
    )
    if fused or "expert" in kinds[0].lower():
        return "fused mixture-of-experts weights"
    if any(_NORMALISATION.search(kind) for kind in kinds):
        return "normalisation"
    if any(_ROUTER.search(kind) for kind in kinds):
        return "mixture-of-experts router"
    if ".parametrizations." in name:
        return "parametrised weights"
    return f"not a linear layer ({kinds[0]})"


def block_pattern(name: str) -> str:
    """The path with the numbers of blocks replaced: `layers.3.norm` is `layers.*.norm`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
