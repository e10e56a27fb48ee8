"""Each gradient stage against its floor: a forward and activation-only backward pass of the same tokens.

    python -m benchmarks.stages [--family llama] [--peer kronfluence] [--output results/stages.md]

The floor is a plain loop over the same micro-batches: frozen parameters, autograd from the first tracked layer's
output on, the sum of cross-entropies. Every repeat times a stage next to the floor, in alternating order, and takes
their ratio; medians and extremes of the ratios are printed. FLOPs and bytes come from `influence.cost`, whose tests
hold them equal to counted ones. The peer is kronfluence, run through its own `Analyzer` on the same weights and tokens,
its loops over the data timed from inside, so that its reading and writing of files does not count.

Weights and tokens are random: times do not depend on their values.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.peer import STAGES as PEER_STAGES
from benchmarks.peer import Peer
from influence import cost
from influence.batch import Batch
from influence.correction import Bases, CorrectionSums, LayerBasis
from influence.covariance import CovarianceSums, block_slices
from influence.eigenbasis import BlockBasis
from influence.labels import SampledLabels
from influence.layers import LayerSelection, TrackedLayer, group_inputs, select_layers
from influence.scoring import LayerQueries, plan_contractions
from influence.shape import ForwardShape, forward_shape
from influence.worker import Precision, Worker

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # CPU time is steadier on a shared machine
TARGETS = {"covariance": 1.6, "correction": 2.1, "scan": 1.35}  # floors, at the default shape on one thread
CONTRACTIONS = ("factored", "dense")


@dataclass(frozen=True)
class Case:
    """A model with its tracked layers, the tokens, and what the stages need."""

    model: nn.Module
    selection: LayerSelection
    shape: ForwardShape
    batches: list[Batch]
    arguments: argparse.Namespace


@dataclass
class Measured:
    """A stage's times and costs; `flops` is of one run over all sequences, the floor's own included."""

    name: str
    flops: int
    numbers: dict[str, int]
    run: Callable[[], float | None] = field(repr=False)
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """What is printed and written."""
        median = statistics.median(self.seconds)
        stage = self.name.partition(" ")[0]
        return {
            "stage": self.name,
            "seconds": median,
            "floors": statistics.median(self.ratios),
            "floors_min": min(self.ratios),
            "floors_max": max(self.ratios),
            "target": TARGETS.get(stage) if not self.name.startswith("kronfluence") else None,
            "gflop": self.flops / 1e9 or None,
            "gflop_per_second": self.flops / 1e9 / median or None,
            "mebibytes": {name: 4 * count / 2**20 for name, count in self.numbers.items()},
        }


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stages", description="Each stage against its floor.")
    parser.add_argument("--family", choices=("gpt2", "llama", "neox"), default="gpt2")
    for name, default in (("layers", 4), ("hidden", 256), ("inner", 1024), ("heads", 4), ("vocabulary", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("tokens", 256), ("sequences", 64), ("queries", 16), ("rank", 32), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--blocks", type=int, default=1, help="diagonal blocks a side (Appendix A)")
    parser.add_argument("--select", default="mlp", help="layers that are tracked: mlp, attention, all or a regex")
    parser.add_argument("--attention", default=None, help="transformers' attn_implementation")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--product", choices=("float32", "bfloat16"), default="float32", help="operands of our products"
    )
    parser.add_argument("--peer", choices=("kronfluence",), default=None)
    parser.add_argument("--only", nargs="*", default=None, help="stages whose name begins with one of these")
    parser.add_argument("--output", type=Path, default=None, help="a file: .json, else Markdown")
    return parser.parse_args(words)


def build(arguments: argparse.Namespace) -> Case:
    torch.manual_seed(0)
    model = _model(arguments).eval().requires_grad_(False)
    probe = torch.zeros(1, 4, dtype=torch.long)
    selection = group_inputs(model, select_layers(model, arguments.select), probe)
    rows = torch.randint(arguments.vocabulary, (arguments.sequences, arguments.tokens)).tolist()
    starts = range(0, arguments.sequences, arguments.batch)
    batches = [
        Batch.collate(range(start, min(start + arguments.batch, len(rows))), rows[start : start + arguments.batch])
        for start in starts
    ]
    return Case(model, selection, forward_shape(copy.deepcopy(model).to("meta"), selection), batches, arguments)


def _model(given: argparse.Namespace) -> nn.Module:
    options = {"vocab_size": given.vocabulary, "bos_token_id": 0, "eos_token_id": 0}
    if given.attention is not None:
        options["attn_implementation"] = given.attention
    if given.family == "gpt2":
        sizes = {"n_embd": given.hidden, "n_inner": given.inner, "n_layer": given.layers, "n_head": given.heads}
        return GPT2LMHeadModel(GPT2Config(**sizes, n_positions=given.tokens, **options))
    sizes = {
        "hidden_size": given.hidden,
        "intermediate_size": given.inner,
        "num_hidden_layers": given.layers,
        "num_attention_heads": given.heads,
        "max_position_embeddings": given.tokens,
    }
    if given.family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False, **options))
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, **options))


# --- stages ---


def floor(case: Case) -> None:
    """A forward and an activation-only backward pass over every micro-batch."""
    modules = {case.model.get_submodule(path) for layer in case.selection.layers for path in layer.modules}
    handles = [module.register_forward_hook(_begin_autograd) for module in modules]
    try:
        for batch in case.batches:
            logits_BTV = case.model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1]
            labels_N = batch.input_ids[:, 1:].flatten()
            F.cross_entropy(logits_BTV.flatten(0, 1), labels_N, reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()


def _begin_autograd(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.detach().requires_grad_()


def stages(case: Case) -> Iterator[Measured]:
    """Our stages: covariance, correction, and the scan with each contraction and with those that the plan chooses."""
    precision = Precision(product=getattr(torch, case.arguments.product))
    worker = Worker(case.model, case.selection, precision)
    layers, blocks = case.selection.layers, case.arguments.blocks
    labels = SampledLabels(0)

    def covariance() -> None:
        sums = CovarianceSums.empty(case.selection, blocks)
        for batch in case.batches:
            worker.accumulate_covariance(batch, labels, sums)

    extra = sum(cost.covariance_flops(*_positions(case, layer), blocks) for layer in layers)
    yield Measured("covariance", _flops(case, extra), {"sums": cost.strip_numbers(layers, blocks)}, covariance)

    bases = _random_bases(case, precision.product)

    def correction() -> None:
        sums = CorrectionSums.empty(case.selection)
        for batch in case.batches:
            worker.accumulate_correction(batch, labels, bases, sums)

    extra = sum(cost.correction_flops(*_positions(case, layer), blocks) for layer in layers)
    held = {"sums": cost.correction_numbers(layers), "bases": cost.basis_numbers(layers, blocks)}
    yield Measured("correction", _flops(case, extra), held, correction)

    stored = _random_queries(case)
    for name, choice in _choices(case):
        queries = {
            layer: (value.densified() if choice[layer] == "dense" else value).to(precision.product, precision.sums)
            for layer, value in stored.items()
        }

        def scan(queries: dict[str, LayerQueries] = queries) -> None:
            for batch in case.batches:
                worker.scores(batch, queries)

        extra, numbers = _scan_cost(case, choice)
        yield Measured(f"scan {name}", _flops(case, extra), {"queries": numbers}, scan)


def _positions(case: Case, layer: TrackedLayer) -> tuple[TrackedLayer, int, int]:
    return layer, case.arguments.tokens, case.shape.calls[layer.name]


def _flops(case: Case, extra: int) -> int:
    return case.arguments.sequences * (cost.floor_flops(case.shape, case.arguments.tokens) + extra)


def _choices(case: Case) -> Iterator[tuple[str, dict[str, str]]]:
    """Every layer factored, every layer dense, and what the plan chooses if that is a mixture."""
    given, layers = case.arguments, case.selection.layers
    total = given.queries * given.rank
    planned = plan_contractions(layers, [total] * len(layers), given.queries, given.tokens, 1 << 30)
    chosen = set(planned.values())
    for contraction in CONTRACTIONS:
        star = " (planned)" if chosen == {contraction} else ""
        yield f"{contraction}{star}", {layer.name: contraction for layer in layers}
    if len(chosen) > 1:
        yield "mixed (planned)", planned


def _scan_cost(case: Case, choice: dict[str, str]) -> tuple[int, int]:
    given, flops, numbers = case.arguments, 0, 0
    total = given.queries * given.rank
    for layer in case.selection.layers:
        _, tokens, calls = _positions(case, layer)
        flops += cost.scan_flops(layer, choice[layer.name], tokens, total, given.queries, calls)
        dense = choice[layer.name] == "dense"
        numbers += cost.dense_numbers(layer, given.queries) if dense else cost.factored_numbers(layer, total)
    return flops, numbers


def _random_bases(case: Case, dtype: torch.dtype) -> Bases:
    def orthogonal(size: int) -> BlockBasis:
        widths = [part.stop - part.start for part in block_slices(size, case.arguments.blocks)]
        vectors = tuple(torch.linalg.qr(torch.randn(width, width))[0].to(dtype) for width in widths)
        return BlockBasis(vectors, tuple(torch.ones(width, dtype=dtype) for width in widths))

    return {
        layer.name: LayerBasis(orthogonal(layer.columns).aligned(), orthogonal(layer.outputs))
        for layer in case.selection.layers
    }


def _random_queries(case: Case) -> dict[str, LayerQueries]:
    """Queries of the same rank in every layer."""
    given = case.arguments
    owner_R = torch.arange(given.queries).repeat_interleave(given.rank)
    return {
        layer.name: LayerQueries(
            given.queries,
            torch.randn(layer.outputs, len(owner_R)),
            torch.randn(layer.columns, len(owner_R)),
            owner_R,
        )
        for layer in case.selection.layers
    }


# --- measuring ---


def measure(case: Case, found: list[Measured]) -> list[Measured]:
    """Time every stage beside the floor, the order changed with every repeat; the floor itself is listed first."""
    base = Measured("floor", _flops(case, 0), {}, lambda: floor(case))
    clock = CLOCKS[case.arguments.clock]
    _timed(base, clock)
    for repeat in range(case.arguments.repeats):
        for stage in found:
            if not stage.seconds and repeat == 0:
                _timed(stage, clock)  # warm-up
            first, second = (base, stage) if repeat % 2 == 0 else (stage, base)
            first.seconds.append(_timed(first, clock))
            second.seconds.append(_timed(second, clock))
            stage.ratios.append(stage.seconds[-1] / base.seconds[-1])
        _progress(f"repeat {repeat + 1} of {case.arguments.repeats}")
    middle = statistics.median(base.seconds)
    base.ratios = [seconds / middle for seconds in base.seconds]
    return [base, *found]


def _timed(stage: Measured, clock: Callable[[], float]) -> float:
    """Seconds of one run; a run that returns a number has timed itself."""
    started = clock()
    own = stage.run()
    return clock() - started if own is None else own


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- what is shown ---


def render(case: Case, found: list[Measured]) -> str:
    """A Markdown table with what was measured."""
    given = case.arguments
    lines = [
        f"{given.family}: {given.layers} layers, hidden {given.hidden}, inner {given.inner}, vocabulary "
        f"{given.vocabulary}; {given.sequences} sequences of {given.tokens} tokens, micro-batch {given.batch}; "
        f"{given.queries} queries of rank {given.rank}; {given.threads} threads; products {given.product}; "
        f"{given.repeats} repeats, {given.clock} time; torch {torch.__version__}, {platform.machine()}",
        "",
        "| stage | floors, median | min–max | target | seconds | GFLOP | GFLOP/s | MiB held |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in (stage.row() for stage in found):
        held = ", ".join(f"{name} {size:.1f}" for name, size in row["mebibytes"].items())
        numbers = [_number(row[name], digits) for name, digits in (("gflop", 1), ("gflop_per_second", 1))]
        lines.append(
            f"| {row['stage']} | {row['floors']:.3f} | {row['floors_min']:.3f}–{row['floors_max']:.3f} | "
            f"{_number(row['target'], 2)} | {row['seconds']:.3f} | {numbers[0]} | {numbers[1]} | {held or '–'} |"
        )
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def write(path: Path, case: Case, found: list[Measured]) -> None:
    """JSON if the path ends so, else Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        settings = {
            name: str(value) if isinstance(value, Path) else value for name, value in vars(case.arguments).items()
        }
        rows = [stage.row() | {"runs": stage.seconds, "ratios": stage.ratios} for stage in found]
        record = {"settings": settings, "shape": asdict(case.shape), "torch": torch.__version__, "stages": rows}
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    else:
        path.write_text(render(case, found) + "\n", encoding="utf-8")


def main(words: list[str] | None = None) -> None:
    arguments = parse(words)
    torch.set_num_threads(arguments.threads)
    case = build(arguments)
    found = list(stages(case))
    with tempfile.TemporaryDirectory() as folder:
        if arguments.peer:
            queries = torch.randint(arguments.vocabulary, (arguments.queries, arguments.tokens))
            clock = CLOCKS[arguments.clock]
            peer = Peer(case.model, case.selection, case.batches, queries, arguments, Path(folder), clock)
            found += [
                Measured(f"kronfluence {name}", 0, {}, lambda name=name: peer.seconds(name)) for name in PEER_STAGES
            ]
        if arguments.only:
            found = [stage for stage in found if stage.name.startswith(tuple(arguments.only))]
        found = measure(case, found)
    print(render(case, found))
    if arguments.output:
        write(arguments.output, case, found)


if __name__ == "__main__":
    main()
