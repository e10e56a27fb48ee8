"""kronfluence 1.0.1 as a peer of `benchmarks.stages`: its covariance, Lambda and pairwise scores, timed from inside.

Its loops over the data are wrapped in a clock, so that neither its files nor, for the scores, its query gradients
count. Its calls of the garbage collector, a fixed cost of a stage that would count heavily over few sequences, are left
out in its favour. Its task is the usual one: the sum of cross-entropies, pseudo-labels by `torch.multinomial`.
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from influence.batch import Batch
from influence.layers import LayerSelection

STAGES = ("covariance", "correction", "scan")


class Peer:
    """kronfluence on the same weights and tokens; GPT-2's Conv1D becomes the Linear that it tracks."""

    def __init__(
        self,
        model: nn.Module,
        selection: LayerSelection,
        batches: list[Batch],
        queries_QT: Tensor,
        arguments: argparse.Namespace,
        folder: Path,
        clock: Callable[[], float],
    ) -> None:
        """Prepare the model and fit all factors once, which the later stages need."""
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments

        logging.getLogger("kronfluence").setLevel(logging.ERROR)
        task = _task([path for layer in selection.layers for path in layer.modules])
        prepared = prepare_model(with_linears(copy.deepcopy(model)), task)
        self._analyzer = Analyzer("peer", prepared, task, cpu=True, disable_tqdm=True, output_dir=str(folder))
        self._train = [{"input_ids": row} for batch in batches for row in batch.input_ids]
        self._queries = [{"input_ids": row} for row in queries_QT]
        self._batch, self._clock = arguments.batch, clock
        self._factors = FactorArguments(strategy="ekfac")
        self._scores = ScoreArguments(damping_factor=None, query_gradient_low_rank=arguments.rank)
        self._common = {"per_device_batch_size": self._batch, "factor_args": self._factors}
        self._analyzer.fit_all_factors("factors", self._train, overwrite_output_dir=True, **self._common)

    def seconds(self, stage: str) -> float:
        """Run a stage over all sequences; the seconds of its loop over them."""
        return getattr(self, f"_{stage}")()

    def _covariance(self) -> float:
        with _timed(
            self._clock, "kronfluence.computer.factor_computer", "fit_covariance_matrices_with_loader"
        ) as seconds:
            self._analyzer.fit_covariance_matrices("timed", self._train, overwrite_output_dir=True, **self._common)
        return sum(seconds)

    def _correction(self) -> float:
        with _timed(self._clock, "kronfluence.computer.factor_computer", "fit_lambda_matrices_with_loader") as seconds:
            self._analyzer.fit_lambda_matrices("factors", self._train, overwrite_output_dir=True, **self._common)
        return sum(seconds)

    def _scan(self) -> float:
        with _timed(self._clock, "kronfluence.score.pairwise", "compute_dot_products_with_loader") as seconds:
            self._analyzer.compute_pairwise_scores(
                "timed",
                "factors",
                self._queries,
                self._train,
                len(self._queries),
                self._batch,
                score_args=self._scores,
                overwrite_output_dir=True,
            )
        return sum(seconds)


@contextmanager
def _timed(clock: Callable[[], float], module: str, function: str) -> Iterator[list[float]]:
    """Time every call of a function of theirs."""
    import importlib

    place = importlib.import_module(module)
    original: Callable[..., Any] = getattr(place, function)
    seconds: list[float] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = clock()
        try:
            with mock.patch("gc.collect", return_value=0):
                return original(*args, **kwargs)
        finally:
            seconds.append(clock() - started)

    setattr(place, function, timed)
    try:
        yield seconds
    finally:
        setattr(place, function, original)


def _task(names: list[str]) -> Any:
    from kronfluence.task import Task

    class LanguageModelling(Task):
        """Sum of cross-entropies over predicted positions."""

        def compute_train_loss(self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
            logits_NV = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].flatten(0, 1)
            labels_N = batch["input_ids"][:, 1:].flatten()
            if sample:
                with torch.no_grad():
                    labels_N = torch.multinomial(logits_NV.detach().softmax(-1), num_samples=1).flatten()
            return F.cross_entropy(logits_NV, labels_N, reduction="sum")

        def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return names

        def get_attention_mask(self, batch: dict[str, Tensor]) -> None:
            del batch

    return LanguageModelling()


def with_linears(model: nn.Module) -> nn.Module:
    """Replace every Conv1D by the Linear that computes the same."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                linear = nn.Linear(*child.weight.shape, dtype=child.weight.dtype)
                linear.weight.data, linear.bias.data = child.weight.data.T.contiguous(), child.bias.data
                setattr(parent, name, linear)
    return model
