"""Scores of a whole run by brute force: the oracle's equations, fed with the sequences and queries that the run read.

Legend: B sequences, Q queries, I columns and O outputs of a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.queries import TokenisedQuery
from actors.store import Artifact
from influence.batch import Batch
from influence.labels import SampledLabels
from tests import oracle
from tests.oracle import Oracle, OracleLayer, Trace

COVARIANCE_PASS, CORRECTION_PASS = 0, 1


def layers_of(model: str) -> list[OracleLayer]:
    """The layers that are tracked in a tiny model, written out by hand."""
    if model == "llama":
        parts = ("gate_proj", "up_proj", "down_proj")
        names = [f"model.layers.{block}.mlp.{part}" for block in range(2) for part in parts]
        return [OracleLayer(name, (name,), bias=False) for name in names]
    names = [f"transformer.h.{block}.mlp.{part}" for block in range(2) for part in ("c_fc", "c_proj")]
    return [OracleLayer(name, (name,), bias=True, transposed=True) for name in names]


def tokens_of(sequences: Artifact) -> list[list[int]]:
    """All sequences of a tokenised corpus, read without the reader that replicas use."""
    shards = [name for name in sequences.list("shard-") if name.endswith(".parquet")]
    rows = [row for name in shards for row in sequences.read_table(name).to_pylist()]
    assert [row["sequence_id"] for row in rows] == list(range(len(rows)))
    return [row["input_ids"] for row in rows]


class Brute:
    """A model and a tokenised corpus, on all of which the curvature is fitted.

    Args:
        folder: Of the model.
        rows: The sequences.
        seed: Of sampled labels; None takes the corpus's own.
        tracked: What the names of the tracked layers hold.
    """

    def __init__(self, folder: Path, rows: list[list[int]], seed: int | None = 0, tracked: str = "") -> None:
        layers = [layer for layer in layers_of(folder.name) if tracked in layer.name]
        self._machine = Oracle(AutoModelForCausalLM.from_pretrained(folder), layers)
        self._names = [layer.name for layer in layers]
        self._rows, self._seed = rows, seed

    def scores(
        self,
        queries: Sequence[TokenisedQuery],
        solver: str = "ekfac",
        blocks: int = 1,
        damping_factor: float = 0.1,
    ) -> np.ndarray:
        """Influence of every sequence on every query, [B, Q]."""
        gradients = [self._query_gradient(query) for query in queries]
        if solver == "ekfac_cg":
            gradients = self._exact(gradients, damping_factor)
        elif solver != "identity":
            curvature = {name: self._curvature(name, solver, blocks) for name in self._names}
            gradients = [
                {name: oracle.ihvp(curvature[name], g[name], damping_factor) for name in self._names} for g in gradients
            ]
        return np.asarray([[sum(oracle.score(g, trace).values()) for g in gradients] for trace in self._training])

    def fitted_on(self, sequence_ids: Sequence[int]) -> Brute:
        """The same with the curvature fitted on some of the sequences; it scores all of them."""
        other = copy.copy(self)
        for name in ("_first_pass", "_second_pass"):
            traces = getattr(self, name)
            setattr(other, name, [traces[number] for number in sequence_ids])
        return other

    @cached_property
    def _training(self) -> list[Trace]:
        return [self._machine.trace(tokens) for tokens in self._rows]

    @cached_property
    def _first_pass(self) -> list[Trace]:
        return self._pseudo(COVARIANCE_PASS)

    @cached_property
    def _second_pass(self) -> list[Trace]:
        return self._pseudo(CORRECTION_PASS)

    def _pseudo(self, pass_index: int) -> list[Trace]:
        """Traces with labels drawn from brute force's own distribution."""
        if self._seed is None:
            return self._training
        labels = SampledLabels(self._seed, pass_index)
        found = []
        for number, tokens in enumerate(self._rows):
            with torch.no_grad():
                logits_BTV = self._machine.logits(tokens)[None]
            drawn = labels(Batch.collate([number], [tokens]), logits_BTV)[0, :-1].tolist()
            found.append(self._machine.trace(tokens, drawn))
        return found

    def _curvature(self, name: str, solver: str, blocks: int) -> Tensor:
        moment = oracle.moments(self._first_pass, name)
        if solver == "kfac":
            return oracle.kfac(moment, blocks)
        sides = [oracle.eigenvectors(matrix, blocks) for matrix in (moment.A, moment.S)]
        return oracle.ekfac(self._second_pass, name, *sides)

    def _exact(self, gradients: list[dict[str, Tensor]], damping_factor: float) -> list[dict[str, Tensor]]:
        """(G + lambda)^-1 grad f, G exact and over all layers at once, lambda that of EK-FAC in each layer."""
        matrix, right, numbers = self._machine.whole_gauss_newton(self._rows), [], []
        for name in self._names:
            curvature = self._curvature(name, "ekfac", 1)
            mean = torch.trace(curvature) / len(curvature)
            numbers.append(mean.expand(len(curvature)))
            right.append(torch.stack([oracle.vec(gradient[name]) for gradient in gradients]))
        damped = matrix + damping_factor * torch.diag(torch.cat(numbers))
        parts = torch.linalg.solve(damped, torch.cat(right, 1).T).T.split([len(number) for number in numbers], dim=1)
        sizes = {name: gradients[0][name].shape[0] for name in self._names}
        return [
            {name: oracle.unvec(part[query], sizes[name]) for name, part in zip(self._names, parts, strict=True)}
            for query in range(len(gradients))
        ]

    def _query_gradient(self, query: TokenisedQuery) -> dict[str, Tensor]:
        """∇ log p(completion | prompt), less that of the second completion of a contrast."""
        first = query.completion_start - 1
        gradient = self._machine.trace(query.input_ids, first=first).gradient
        if query.contrast_ids is None:
            return gradient
        other = self._machine.trace(query.contrast_ids, first=first).gradient
        return {name: gradient[name] - other[name] for name in gradient}
