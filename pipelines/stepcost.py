"""What a step takes, and the parts that steps have in common: weights, passes, activations, rows of all ranks.

Legend: N ranks of a replica, B sequences of each in a micro-batch, T positions. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from conf.schema import Dtype
from influence import cost, traffic
from influence.correction import GRADIENT_BYTES
from influence.layers import TrackedLayer
from pipelines.rates import ATTENTION, ELEMENTWISE, TEXT
from pipelines.workload import SINGLE, Workload, bytes_of

PREFETCHED = 50_000_000  # numbers of weights that a GPU gathers ahead of their use, `actors.sharding.PREFETCH_NUMBERS`


@dataclass
class StepCost:
    """What a step takes.

    Attributes:
        work: Amount of each kind of work, as `pipelines.rates` names them; products by their type. Over all ranks.
        memory: Bytes that a rank of a replica (or a task) holds at once, by what they are.
        disk: Bytes of tensors and columns in the artifact; container overhead and compression are left out.
        temporary: Bytes of partial sums, beside that, until the step is committed.
        moved: Bytes that ranks receive from one another, by what they are. Over all ranks.
        stored: Bytes of tensors that are written to the store and read from it, artifacts of other steps among them.
        tasks: Whether Ray tasks do the work instead of replicas.
        pieces: How many units there are to deal, to replicas or as tasks.
        passes: Layers of each pass over the sample, where there are several.
    """

    work: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    disk: int = 0
    temporary: int = 0
    moved: dict[str, int] = field(default_factory=dict)
    stored: int = 0
    tasks: bool = False
    pieces: int = 1 << 30
    passes: tuple[tuple[TrackedLayer, ...], ...] = ()

    @property
    def flops(self) -> int:
        """Matrix products and decompositions."""
        return sum(amount for kind, amount in self.work.items() if kind not in (ATTENTION, ELEMENTWISE, TEXT))


def weights(load: Workload, copy: Dtype | None = None) -> dict[str, int]:
    """Bytes of the weights that a rank holds: all, or its slices and those that are gathered at a time.

    Args:
        load: The run.
        copy: Type of a second copy of the model that works beside the first; its own slices are not counted here.
    """
    size = bytes_of(load.config.model.dtype)
    if load.ranks == 1:
        return {"weights": load.parameters * size}
    ahead = PREFETCHED if load.config.cluster.gpus_per_rank > 0 else 0
    numbers = min(load.parameters, load.shape.largest_module + ahead)
    return {
        "weights": -(-load.parameters // load.ranks) * size,
        "gathered weights": numbers * max(size, 0 if copy is None else bytes_of(copy)),
    }


def passes(
    load: Workload,
    sequences: int,
    tokens: int,
    sampled: bool,
    layers: Sequence[TrackedLayer] = (),
    copy: Dtype | None = None,
) -> dict[str, int]:
    """The floor's work over some sequences, with these layers tracked (all if none are named).

    Args:
        load: The run.
        sequences: How many.
        tokens: Of each.
        sampled: Whether labels are drawn.
        layers: Those that are tracked.
        copy: Type of the copy of the model that does the work, if it is not the model itself.
    """
    shape = load.shape_for(layers) if layers else load.shape
    floor = sequences * cost.floor_flops(shape, tokens)
    return {
        (copy or load.config.model.dtype).name: floor,
        ELEMENTWISE: sequences * cost.elementwise_numbers(shape, tokens, sampled),
        ATTENTION: sequences * cost.attention_weights(shape, tokens),
    }


def gathered(load: Workload, steps: int, layers: Sequence[TrackedLayer] = (), copy: Dtype | None = None) -> int:
    """Bytes of weights that the ranks receive in so many micro-batches of a gang; of a copy in this type, if any."""
    if load.ranks == 1:
        return 0
    shape = load.shape_for(layers) if layers else load.shape
    each = traffic.weights_received(shape, load.ranks) * bytes_of(copy or load.config.model.dtype)
    return load.ranks * steps * each


def merged(*parts: Mapping[str, int]) -> dict[str, int]:
    """Amounts of the same kind added up."""
    total: dict[str, int] = {}
    for part in parts:
        for kind, amount in part.items():
            total[kind] = total.get(kind, 0) + amount
    return total


def activations(
    load: Workload, sequences: int, tokens: int, layers: Sequence[TrackedLayer] = (), copy: Dtype | None = None
) -> dict[str, int]:
    """Bytes of a micro-batch in flight: captured inputs, what autograd saves, logits with their gradient.

    Where a copy of the model in another type does some of the work, the larger of both.
    """
    shape = load.shape_for(layers) if layers else load.shape
    size, rows = bytes_of(load.config.model.dtype), sequences * tokens
    size = max(size, 0 if copy is None else bytes_of(copy))
    return {
        "captured": size * sequences * cost.captured_numbers(layers or load.layers, tokens, shape.calls),
        "autograd": size * rows * shape.saved_numbers,
        "logits": 2 * size * rows * shape.vocabulary,
    }


def formed_bytes(load: Workload) -> int:
    """Bytes of the sequence gradients that a rank forms at a time, and of their rotation."""
    largest = max(SINGLE * -(-layer.parameters // load.ranks) for layer in load.layers)
    return 2 * min(load.config.scan.batch_size * load.ranks * largest, max(GRADIENT_BYTES, largest))


def rank_memory(
    load: Workload, more: Mapping[str, int], layers: Sequence[TrackedLayer] = (), copy: Dtype | None = None
) -> dict[str, int]:
    """Bytes that a rank holds while it works on a micro-batch: weights, activations, and whatever else is not zero."""
    held = weights(load, copy) | activations(load, load.config.scan.batch_size, load.tokens, layers, copy)
    return held | {name: size for name, size in more.items() if size}


def row_bytes(load: Workload, layers: Sequence[TrackedLayer]) -> int:
    """Bytes of all ranks' rows of the layer that has most."""
    if load.ranks == 1:
        return 0
    most = max(traffic.row_numbers(layer, load.tokens, load.calls(layer)) for layer in layers)
    return load.ranks * load.config.scan.batch_size * most * bytes_of(load.config.scan.product_dtype)


def largest_memory(
    layers: Sequence[Sequence[TrackedLayer]], held: Callable[[Sequence[TrackedLayer]], dict[str, int]]
) -> dict:
    """What the pass that holds most holds."""
    return max((held(group) for group in layers), key=lambda memory: sum(memory.values()))
