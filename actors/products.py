"""Tasks of conjugate gradients: products of the exact Gauss-Newton matrix, and what is done to vectors in between."""

from __future__ import annotations

import re
import time
from typing import Any

from actors.bench import Bench
from actors.errors import WhenceError
from actors.refinement import ProductTask, RefinementTask, at_a_time, product_tensors, read_direction, row_numbers
from actors.summing import commit_part, sum_group, write_part
from actors.tasks import Done
from influence.batch import Batch
from influence.gauss_newton import GaussNewton, LanguageNetwork, ProductSums

NO_FORWARD_MODE = re.compile("forward AD|forward mode AD")  # torch, of an operation that carries no tangents


def products(bench: Bench, task: ProductTask) -> Done:
    """Sum Jᵀ H J p over one group, p of all queries of a batch that have not stopped, and commit the sums."""
    started, systems, layers = time.perf_counter(), task.systems, bench.selection.layers
    bench.bases.release()
    vectors = read_direction(systems, task.direction, bench.selection, bench.device)
    newton = GaussNewton(LanguageNetwork(bench.worker.model), layers, bench.worker.precision.product)
    itemsize = bench.worker.precision.product.itemsize
    config: Any = bench.worker.model.config
    vocabulary = config.get_text_config().vocab_size

    def begin() -> ProductSums:
        return ProductSums.like(vectors)

    def step(batch: Batch, sums: ProductSums) -> None:
        ranks, tokens = bench.exchange.size, batch.input_ids.shape[1]
        held = task.memory * bench.batch_size // bench.spec.scan.batch_size  # less, once memory ran out
        rows = held // (itemsize * row_numbers(layers, tokens, vocabulary))
        width, most = at_a_time(len(task.direction.chosen), bench.batch_size, rows)
        local = batch.filled(ranks).part(bench.exchange.rank, ranks) if ranks > 1 else batch
        for start in range(0, len(local), most):
            newton.add(local.rows(start, start + most), vectors, sums, width)

    try:
        sums = sum_group(bench, task, begin, step)
    except RuntimeError as error:
        if not NO_FORWARD_MODE.search(str(error)):
            raise
        raise WhenceError(
            "the model has an operation without a forward-mode derivative, which factors.solver=ekfac_cg needs: "
            f"{error}",
            remedy="set model.attention=eager, or factors.solver=ekfac",
        ) from error
    _agree_on(bench, sums)
    for number, bundle in enumerate(systems.bundles(layers)):
        write_part(bench, task, number, product_tensors(sums, bundle))
    return commit_part(bench, task, sums, {}, started)


def _agree_on(bench: Bench, sums: ProductSums) -> None:
    """Count what all ranks have added, each its own sequences."""
    found = bench.exchange.agree((sums.sequences, sums.tokens, sums.excluded))
    sums.sequences = sum(sequences for sequences, _, _ in found)
    sums.tokens = sum(tokens for _, tokens, _ in found)
    sums.excluded = {key: why for _, _, excluded in found for key, why in excluded.items()}


def refine(bench: Bench, task: RefinementTask) -> Done:
    """One bundle's part of an iteration; of several ranks, the first does it."""
    started = time.perf_counter()
    bench.begin_commit()
    found = task.run() if bench.exchange.rank == 0 else {}
    return Done(seconds=time.perf_counter() - started, result=found)
