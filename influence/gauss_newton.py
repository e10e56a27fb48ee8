"""Exact products of the Gauss-Newton matrix with K vectors side by side, over the tracked layers.

G = E_z[Jᵀ H_ŷ J] (Equations 6 and 9): the mean over examples, a sequence being one, of the sum over its outputs. J is
the Jacobian of the outputs with respect to the weights of the tracked layers alone; all other parameters are frozen.

Legend: K vectors, B examples, T positions, I columns of a layer (inputs, and one for a bias), O outputs, C outputs of
the model. vectors_KOI: in the layout of the weights, the bias last; act_BTI, grad_KBTO: rows of a layer.

How a product is formed, and why so. It takes two passes over a micro-batch, whatever K:

1. Forward mode. A hook adds V_ℓ ā to the *tangent* of each tracked layer's output, and forward-mode differentiation
   carries the K tangents to the outputs beside the one forward pass that they all share: J V. No weight is perturbed.
2. An ordinary forward pass, and a backward pass of the K vectors H_ŷ J V at once to the outputs of tracked layers. With
   the captured inputs, (Jᵀu)_ℓ = Σ_t Ds_t ā_tᵀ.

So of the parameters nothing is asked but that modules compute with them, as hooks see it: weights that are gathered
before a module runs and freed after it (DeepSpeed ZeRO-3) will do, which rules out `torch.func` on parameters. Two
reverse passes would give J V as well, but want a backward pass that can itself be differentiated, through such hooks
too. Central differences want no forward mode; they cost 2K forward passes that share nothing, want a step that somebody
chooses, and in float64 miss what this gives to rounding by more than 1e-13 (a test measures it).

K vectors are carried by torch's own batching of tangents and of gradients (`torch.autograd.functional.jacobian` runs on
the same), and not by `torch.func.vmap`, which refuses the functions that DeepSpeed puts around modules. A model with an
operation that it cannot batch has its tangents carried one vector at a time. Fused attention
has no forward mode, so step 1 runs scaled dot products by their definition, T² numbers a head and vector.

Cost a micro-batch: 2 forward passes; K times: a forward pass of tangents (twice a layer's own products in tracked
layers), a backward pass, and T·I·O multiply-adds a tracked layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as functional
from torch import Tensor, nn
from torch._vmap_internals import _vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from influence.batch import DUMMY, Batch
from influence.capture import by_sequence, homogeneous
from influence.labels import TrueLabels
from influence.layers import TrackedLayer
from influence.output_losses import OutputLoss, SoftmaxCrossEntropy

UNBATCHED = "Batching rule not implemented"  # torch, of an operation that it carries no batch of tangents through

log = logging.getLogger(__name__)

Vectors = dict[str, Tensor]
"""K vectors over the tracked parameters: [K, O, I] by the name of the layer."""

X = TypeVar("X")
M = TypeVar("M", contravariant=True)


class Network(Protocol[M]):
    """A model whose outputs have a loss; what a micro-batch is, is its own affair."""

    @property
    def model(self) -> nn.Module:
        """The module tree that tracked layers are named in."""
        ...

    @property
    def loss(self) -> OutputLoss:
        """Of the outputs."""
        ...

    def outputs(self, batch: M) -> Tensor:
        """Run the model: [B, ..., C]."""
        ...

    def targets(self, batch: M) -> Tensor:
        """The targets of the loss; their values do not enter the Gauss-Newton matrix, ignored positions do."""
        ...

    def positions(self, batch: M) -> int:
        """Rows T that a linear layer sees of each example."""
        ...

    def ids(self, batch: M) -> Sequence[int]:
        """Numbers of the examples, for messages."""
        ...


@dataclass(frozen=True)
class Examples:
    """A micro-batch of tensors: inputs [B, ...] and targets [B, ...]."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class TensorNetwork:
    """A plain network on tensors; its linear layers see one row of each example."""

    model: nn.Module
    loss: OutputLoss

    def outputs(self, batch: Examples) -> Tensor:
        """Run the model, [B, C]."""
        return self.model(batch.inputs)

    def targets(self, batch: Examples) -> Tensor:
        """Those of the micro-batch."""
        return batch.targets

    def positions(self, batch: Examples) -> int:
        """One."""
        del batch
        return 1

    def ids(self, batch: Examples) -> Sequence[int]:
        """Places in the micro-batch."""
        return range(len(batch.inputs))


@dataclass(frozen=True)
class LanguageNetwork:
    """A causal language model: the sum over predicted tokens of −log p."""

    model: nn.Module
    loss: OutputLoss = field(default_factory=SoftmaxCrossEntropy)

    def outputs(self, batch: Batch) -> Tensor:
        """Logits, [B, T, V]."""
        padded = bool((batch.lengths != batch.input_ids.shape[1]).any())
        mask = batch.attention_mask_BT if padded else None
        return self.model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits

    def targets(self, batch: Batch) -> Tensor:
        """The next tokens, ignored where nothing is predicted."""
        return TrueLabels()(batch, batch.input_ids)

    def positions(self, batch: Batch) -> int:
        """T."""
        return batch.input_ids.shape[1]

    def ids(self, batch: Batch) -> Sequence[int]:
        """Their numbers in the corpus."""
        return batch.sequence_ids.tolist()


@dataclass
class ProductSums:
    """Σ over examples of Jᵀ H_ŷ J V, by layer, with the number of examples; a value with `merge`.

    Attributes:
        sums: [K, O, I] by layer.
        sequences: how many examples were added.
        excluded: those whose outputs are not finite, with the reason; they are not counted.
    """

    sums: Vectors
    sequences: int = 0
    tokens: int = 0
    excluded: dict[int, str] = field(default_factory=dict)

    @staticmethod
    def like(vectors: Mapping[str, Tensor]) -> ProductSums:
        """Zero sums for products with these vectors."""
        return ProductSums({name: torch.zeros_like(value) for name, value in vectors.items()})

    def merge(self, other: ProductSums) -> None:
        """Add the sums over other examples to this one."""
        for name, value in other.sums.items():
            self.sums[name] += value
        self.sequences += other.sequences
        self.tokens += other.tokens
        self.excluded |= other.excluded

    def mean(self) -> Vectors:
        """G V.

        Raises:
            ValueError: if no example was added.
        """
        if self.sequences == 0:
            raise ValueError("a Gauss-Newton matrix over no examples")
        return {name: value / self.sequences for name, value in self.sums.items()}


class GaussNewton(Generic[X]):
    """Products with the Gauss-Newton matrix of a network, over its tracked layers."""

    def __init__(self, network: Network[X], layers: Sequence[TrackedLayer], product: torch.dtype | None = None) -> None:
        """Take the network's model as it is: in evaluation mode, its parameters frozen.

        Args:
            network: the model and its loss.
            layers: tracked; linear layers, or convolutions in one group whose inputs are counted as channels times
                the size of the kernel.
            product: type of the operands of our own products; the model's if None.
        """
        self._network, self._layers, self._product = network, tuple(layers), product
        self._modules = [(layer, network.model.get_submodule(path)) for layer in layers for path in layer.modules]

    def add(self, batch: X, vectors: Mapping[str, Tensor], sums: ProductSums, width: int | None = None) -> None:
        """Add a micro-batch's Σ_b Jᵀ H_ŷ J V.

        Args:
            batch: examples. One whose outputs are not finite is left out and named in the sums.
            vectors: V.
            sums: changed in place.
            width: vectors that go through the model together; all if None. Memory grows with it.
        """
        count = len(next(iter(vectors.values())))
        width = count if width is None else max(1, width)
        pieces = -(-count // width)
        bounds = [piece * count // pieces for piece in range(pieces + 1)]  # of nearly equal size
        finite_B = None
        for start, stop in pairwise(bounds):
            part = {name: value[start:stop] for name, value in vectors.items()}
            outputs, tangent = self._push(batch, part)
            finite_B = torch.isfinite(outputs).flatten(1).all(1)
            cotangent = self._curved(batch, outputs, tangent, finite_B)
            del outputs, tangent
            self._pull(batch, cotangent, finite_B, {name: value[start:stop] for name, value in sums.sums.items()})
        assert finite_B is not None
        counted = [(index, finite) for index, finite in zip(self._network.ids(batch), finite_B.tolist(), strict=True)]
        counted = [(index, finite) for index, finite in counted if index != DUMMY]
        sums.sequences += sum(finite for _, finite in counted)
        sums.excluded |= {index: "an output is not finite" for index, finite in counted if not finite}

    def __call__(self, batches: Iterable[X], vectors: Mapping[str, Tensor], width: int | None = None) -> Vectors:
        """G V, G the mean over all examples of the batches; sums are in the type of the vectors.

        Raises:
            ValueError: if there is no example with finite outputs.
        """
        sums = ProductSums.like(vectors)
        for batch in batches:
            self.add(batch, vectors, sums, width)
        return sums.mean()

    def jacobian_product(self, batch: X, vectors: Mapping[str, Tensor]) -> Tensor:
        """J V, [K, B, ..., C]: how the outputs change along each vector."""
        return self._push(batch, vectors)[1]

    def transposed_product(self, batch: X, cotangents: Tensor) -> Vectors:
        """Σ_b J_bᵀ u_b for K cotangents [K, B, ..., C] of the outputs, in their type."""
        found = {
            layer.name: cotangents.new_zeros(len(cotangents), layer.outputs, layer.columns) for layer in self._layers
        }
        everyone_B = torch.ones(cotangents.shape[1], dtype=torch.bool, device=cotangents.device)
        self._pull(batch, cotangents, everyone_B, found)
        return found

    # --- the two passes ---------------------------------------------------------------------------------------------

    def _push(self, batch: X, vectors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The outputs [B, ..., C], and their tangents [K, B, ..., C] along the vectors."""
        names = [layer.name for layer in self._layers]
        given = [vectors[name].to(self._product or vectors[name].dtype) for name in names]
        positions, found = self._network.positions(batch), []

        def tangent(*one: Tensor) -> Tensor:
            with self._hooked(_tangent_hook(dict(zip(names, one, strict=True)), positions)):
                primal, moved = forward_ad.unpack_dual(self._network.outputs(batch))
            found.append(primal)
            return torch.zeros_like(primal) if moved is None else moved

        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            try:
                tangents = _vmap(tangent, in_dims=0, out_dims=0)(*given)
            except RuntimeError as error:
                if UNBATCHED not in str(error):
                    raise
                log.debug("a vector at a time: %s", error)
                tangents = torch.stack([tangent(*one) for one in zip(*given, strict=True)])
        return found[-1], tangents  # type: ignore[return-value]

    def _curved(self, batch: X, outputs: Tensor, tangent: Tensor, finite_B: Tensor) -> Tensor:
        """H_ŷ J V, zero for examples that are left out."""
        loss, targets = self._network.loss, self._network.targets(batch)
        if bool(finite_B.all()):
            return loss.hessian_product(outputs, targets, tangent)
        kept = finite_B.view(-1, *[1] * (outputs.dim() - 1))
        found = loss.hessian_product(outputs.masked_fill(~kept, 0), targets, tangent.masked_fill(~kept, 0))
        return found.masked_fill_(~kept, 0)

    def _pull(self, batch: X, cotangent: Tensor, finite_B: Tensor, sums: Mapping[str, Tensor]) -> None:
        """Add Σ_b Jᵀ u to the sums, by layer."""
        uses: list[_Call] = []
        with torch.enable_grad(), self._hooked(_capture_hook(uses)):
            outputs = self._network.outputs(batch)
        if not outputs.requires_grad:
            return  # the outputs depend on no tracked layer
        grads = torch.autograd.grad(
            outputs, [use.output for use in uses], cotangent, is_grads_batched=True, allow_unused=True
        )
        del outputs
        positions = self._network.positions(batch)
        for use, grad in zip(uses, grads, strict=True):
            if grad is None:
                continue
            target = sums[use.layer.name]
            product = self._product or target.dtype
            act_BTI = homogeneous(input_rows(use.module, use.act, positions), use.layer.bias).to(product)
            grad_KNO = output_rows(use.module, grad).to(product)
            if not bool(finite_B.all()):  # what goes back to an example that is left out is zero times anything
                act_BTI = act_BTI.masked_fill(~finite_B[:, None, None], 0)
                rows_N = finite_B.repeat_interleave(act_BTI.shape[1])
                grad_KNO = grad_KNO.masked_fill(~rows_N[:, None], 0)
            act_NI = act_BTI.flatten(0, 1)
            found = grad_KNO.transpose(1, 2).reshape(-1, len(act_NI)) @ act_NI  # one product for all vectors
            target += found.view_as(target)

    @contextmanager
    def _hooked(self, hook: Callable[[TrackedLayer], Callable[..., Any]]) -> Iterator[None]:
        handles = [module.register_forward_hook(hook(layer)) for layer, module in self._modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class _Call:
    """One call of a tracked layer in the pass that is differentiated."""

    layer: TrackedLayer
    module: nn.Module
    act: Tensor
    output: Tensor


def _tangent_hook(vectors: Mapping[str, Tensor], positions: int) -> Callable[[TrackedLayer], Callable[..., Any]]:
    """Hooks that add V ā to the tangent of a layer's output; V is one vector of a batch."""

    def hook_of(layer: TrackedLayer) -> Callable[..., Any]:
        vector_OI = vectors[layer.name]

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            primal, moved = forward_ad.unpack_dual(output)
            act = input_rows(module, forward_ad.unpack_dual(inputs[0]).primal, positions).to(vector_OI.dtype)
            weight_OI = vector_OI[:, :-1] if layer.bias else vector_OI
            rows_NO = act.flatten(0, 1) @ weight_OI.T
            if layer.bias:
                rows_NO = rows_NO + vector_OI[:, -1]
            added = as_output(module, rows_NO.to(primal.dtype), primal)
            total = added if moved is None else moved + added
            return forward_ad.make_dual(primal.contiguous(), total.contiguous())  # layouts must be the same

        return hook

    return hook_of


def _capture_hook(uses: list[_Call]) -> Callable[[TrackedLayer], Callable[..., Any]]:
    """Hooks that note inputs and outputs; autograd begins at the output of the first tracked layer."""

    def hook_of(layer: TrackedLayer) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            uses.append(_Call(layer, module, inputs[0].detach(), output))
            return output

        return hook

    return hook_of


# --- rows of a layer ------------------------------------------------------------------------------------------------


def input_rows(module: nn.Module, act: Tensor, positions: int) -> Tensor:
    """What a layer multiplies its weights by, [B, T, inputs]; for a convolution the patches, one a place of its output.

    Raises:
        ValueError: for a convolution in groups, or padded otherwise than with zeros.
    """
    if not isinstance(module, nn.Conv2d):
        return by_sequence(act, positions)
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise ValueError("only convolutions in one group, padded with a number of zeros, can be tracked")
    patches = functional.unfold(act, module.kernel_size, module.dilation, module.padding, module.stride)
    return patches.transpose(1, 2)


def output_rows(module: nn.Module, grad: Tensor) -> Tensor:
    """Gradients of K outputs of a layer as rows, [K, B · T, O]."""
    if isinstance(module, nn.Conv2d):
        return grad.flatten(3).transpose(2, 3).flatten(1, 2)
    return grad.flatten(1, -2)


def as_output(module: nn.Module, rows_NO: Tensor, output: Tensor) -> Tensor:
    """Rows in the shape of a layer's output."""
    if isinstance(module, nn.Conv2d):
        batch, channels, height, width = output.shape
        return rows_NO.view(batch, height * width, channels).transpose(1, 2).reshape(batch, channels, height, width)
    return rows_NO.view(output.shape)
